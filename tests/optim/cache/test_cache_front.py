"""Classes in front of a cache's own."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from qwen3_vl.modeling_qwen3_vl.mrope_qwen3_vl import PositionsFollowRows
from qwen3_vl.modeling_qwen3_vl.reduced_cache import CountsAllTokens
from qwen3_vl.optim.cache.cache_common import with_notes
from qwen3_vl.optim.cache.cache_front import CacheFront, fronts_of, put_in_front


FRONTS = (PositionsFollowRows, CountsAllTokens)


class Recorder(CacheFront):
    """Notes what happens to the rows."""

    def move_notes(self, move):
        super().move_notes(move)
        self.note = move(self.note)


def filled_cache():
    cache = DynamicCache()
    cache.update(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4), 0)
    cache._qwen3_vl_next_position = torch.tensor([[1, 2, 3], [1, 5, 6]])
    return cache


@pytest.mark.parametrize("fronts", [FRONTS[:1], FRONTS, FRONTS[::-1]])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_have_the_same_in_front(fronts, copied):
    cache = filled_cache()
    for front in (*fronts, *fronts):  # the second time changes nothing
        put_in_front(front, cache)
    assert fronts_of(cache) == fronts and type(cache).__name__ == "DynamicCache"
    twin = copied(cache)
    assert type(twin) is type(cache)
    twin.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(twin._qwen3_vl_next_position, cache._qwen3_vl_next_position.flip(0))
    assert torch.equal(twin.layers[0].keys, cache.layers[0].keys.flip(0))
    taken = with_notes(DynamicCache(), cache)
    assert fronts_of(taken) == fronts


def test_every_front_moves_its_notes_once():
    cache = filled_cache()
    cache.note = torch.arange(2)
    for front in (Recorder, PositionsFollowRows):
        put_in_front(front, cache)
    cache.batch_repeat_interleave(2)
    assert cache.note.tolist() == [0, 0, 1, 1] and len(cache._qwen3_vl_next_position) == len(cache.layers[0].keys) == 4
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.note.tolist() == [1, 0] and cache._qwen3_vl_next_position[:, 1].tolist() == [5, 2]
