"""What a prefix cache keeps, against a plain list: random requests, padding, live caches, bounds and model changes.

No model computes here: a token's keys and values are made from all real tokens up to it, so that a page under the
wrong tokens, or at the wrong place, shows.
"""

import pytest
import torch
from helpers import tiny_config_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl import PrefixCache, Qwen3VLTextConfig


PAGE, LAYERS, HEADS, DIM = 4, 3, 2, 16
COLUMN_BYTES = LAYERS * 2 * (PAGE + 1) * HEADS * DIM * 4


class Stub(torch.nn.Module):
    """As much of a model as a prefix cache looks at."""

    def __init__(self):
        super().__init__()
        self.config = Qwen3VLTextConfig(**tiny_config_dict()["text_config"])
        self.weight, self.device = torch.nn.Parameter(torch.zeros(1)), torch.device("cpu")
        self.eval()

    @property
    def base_model(self):
        return self


def states_of(tokens, layer):
    """(KV heads, tokens, head_dim) keys of a row; values are their negatives."""
    running, states = 7, []
    for token in tokens:
        running = (running * 31 + token) % 1009
        states.append(running + 2000 * layer)
    heads = torch.arange(HEADS)[:, None] / 4
    return (torch.tensor(states, dtype=torch.float32) + heads)[..., None].expand(-1, -1, DIM)


def start(prefix, model, rows):
    """A cache for rows of different lengths, padded on the left."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    return ids, prefix.start(model, ids, torch.zeros_like(ids), positions, mask, {}, 2)


def append(cache, ids, padding):
    """Does what a forward over the tokens that the cache has not seen does."""
    seen = cache.get_seq_length()
    for layer in range(LAYERS):
        new = torch.full((len(ids), HEADS, ids.shape[1] - seen, DIM), -5.0)
        for row, (own, pads) in enumerate(zip(ids.tolist(), padding, strict=True)):
            states = states_of(own[pads:], layer)[:, max(0, seen - pads) :]
            if states.shape[1]:
                new[row, :, -states.shape[1] :] = states
        cache.update(new, -new, layer, dense=False)


def assert_holds(cache, ids, padding):
    for layer in range(LAYERS if cache.get_seq_length() else 0):
        keys, values = cache.layers[layer].dense()
        low, high = cache.layers[layer].key_bounds()
        assert torch.equal(values, -keys)
        for row, (own, pads) in enumerate(zip(ids.tolist(), padding, strict=True)):
            expected = states_of(own[pads : cache.get_seq_length()], layer)
            assert torch.equal(keys[row, :, pads:], expected)
        for column, page in enumerate(keys.split(PAGE, dim=2)):
            assert torch.equal(low[:, :, column], page.amin(2)) and torch.equal(high[:, :, column], page.amax(2))


def plain_shared(one, other):
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


ROW = st.lists(st.integers(10, 11), min_size=1, max_size=11)
REQUEST = st.tuples(
    st.lists(ROW, min_size=1, max_size=2),
    st.integers(0, 4),  # tokens of the answer
    st.sampled_from(["drop", "live", "fail", "prompt"]),
)
STEPS = st.lists(st.one_of(REQUEST, REQUEST, st.sampled_from(["go on", "clear", "change"])), min_size=3, max_size=14)


def answer_of(rows, new):
    """Behind every row, tokens that no prompt has; neighbours differ, as equal ones at the end count as padding."""
    return [[*row, *(20 + step + 10 * number for step in range(new))] for number, row in enumerate(rows)]


def check_pages(prefix, live):
    """Pages held are those of what is kept and of the caches that live, and nobody's else."""
    wanted = set()
    for row in prefix._rows:
        wanted |= {int(page) for pages in row.tables for page in pages}
    assert prefix.statistics().bytes_held == len(wanted) * COLUMN_BYTES // LAYERS
    for cache, *_ in live:
        wanted |= {int(page) for layer in cache.layers for page in layer._table.flatten()}
    for pool in prefix.pools.pools.values():
        assert pool.statistics().pages_held == len(wanted)


@pytest.mark.parametrize("columns", [None, 2, 5])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(steps=STEPS)
@torch.no_grad()
def test_against_a_plain_list(columns, steps):
    budget = {} if columns is None else {"max_bytes": columns * COLUMN_BYTES}
    # Room for everything, and quickly made: a pool without a limit reserves the machine's memory as address space.
    prefix = PrefixCache(page_tokens=PAGE, pool_bytes=1000 * COLUMN_BYTES, **budget)
    model, known, live = Stub(), [], []
    for step in steps:
        if step == "clear":
            prefix.clear()
            known.clear()
        elif step == "change":
            model.weight.add_(1)
            known.clear()
        elif step == "go on":
            for cache, ids, padding in live:
                append(cache, torch.nn.functional.pad(ids, (0, 2), value=15), padding)
                cache.crop(-2)
                assert_holds(cache, ids, padding)
                del cache
        else:
            rows, new, what = step
            ids, cache = start(prefix, model, rows)
            padding = [ids.shape[1] - len(row) for row in rows]
            best = [max((plain_shared(row, other) for other in known), default=0) for row in rows]
            seen = min(ids.shape[1] - 1, *map(sum, zip(padding, best, strict=True)))
            seen = seen if any(seen > pads for pads in padding) else 0
            assert cache.get_seq_length() == seen if columns is None else cache.get_seq_length() <= seen
            assert_holds(cache, ids, padding)
            if what != "fail":
                whole = torch.tensor(
                    [[0] * pads + row for pads, row in zip(padding, answer_of(rows, new), strict=True)]
                )
                append(cache, whole, padding)
                prefix.store(cache, None if what == "prompt" else whole)
                known += rows if what == "prompt" else answer_of(rows, new)
                if what == "live":
                    live.append((cache, whole, padding))
            del cache
        assert prefix.statistics().bytes_held <= prefix.max_bytes
        check_pages(prefix, live)
    live.clear()
    prefix.clear()
    check_pages(prefix, live)
    assert not any(pool._references.any() for pool in prefix.pools.pools.values())


@torch.no_grad()
def test_a_stored_row_is_not_written_to_by_those_who_go_on_from_it():
    """Two go on from the middle of the same page, and so does the request that was stored."""
    prefix, model = PrefixCache(page_tokens=PAGE), Stub()
    ids, first = start(prefix, model, [[10, 11, 12, 13, 14, 15]])
    append(first, ids, [0])
    prefix.store(first, ids)
    caches = [(first, torch.cat((ids, torch.tensor([[16, 17]])), 1))]
    for tail in ([20, 21, 22], [30, 31, 32]):
        other, cache = start(prefix, model, [[10, 11, 12, 13, 14, *tail]])
        assert cache.get_seq_length() == 5
        caches.append((cache, other))
    for cache, whole in caches:
        append(cache, whole, [0])
    for cache, whole in caches:
        assert_holds(cache, whole, [0])
    again, cache = start(prefix, model, [[10, 11, 12, 13, 14, 15, 16]])
    assert cache.get_seq_length() == 6
    assert_holds(cache, again, [0])


@torch.no_grad()
def test_a_page_that_was_dropped_is_not_copied_from():
    """The pool runs full while a padded row is copied: the row that it is copied from stays until that is done."""
    prefix, model = PrefixCache(page_tokens=PAGE, pool_bytes=6 * COLUMN_BYTES), Stub()
    for row in ([11] * 8, [10, 11, 12, 13, 14, 15, 16]):
        ids, cache = start(prefix, model, [row])
        append(cache, ids, [0])
        prefix.store(cache, ids)
    del cache
    held, other = start(prefix, model, [[20] * 8])
    append(other, held, [0])
    # Pages for the copy are there only if the first row goes; the second is needed.
    ids = torch.tensor([[0, 10, 11, 12, 13, 14, 15, 16, 17]])
    mask = (ids > 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    cache = prefix.start(model, ids, torch.zeros_like(ids), positions, mask, {}, 2)
    assert cache.get_seq_length() == 8
    assert_holds(cache, ids, [1])
    assert (prefix.statistics().hits, prefix.statistics().rows_evicted) == (1, 1)
