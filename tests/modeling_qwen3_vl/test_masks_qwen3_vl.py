"""Masks by layer: today's single mask for ordinary caches, one for each layout where layers hold a selection."""

import pytest
import torch
from helpers import make_inputs, make_pair
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask

from qwen3_vl import PagedKVCache
from qwen3_vl.modeling_qwen3_vl import masks_qwen3_vl
from qwen3_vl.modeling_qwen3_vl.masks_qwen3_vl import make_masks
from qwen3_vl.optim.attention.attention_layout import AttentionLayout


class HoldsSome:
    """A layer that holds the tokens `kept` (B, entries) of `seen`, −1 for gaps."""

    def __init__(self, kept, seen):
        self.kept, self.entries, self.layout = torch.tensor(kept), len(kept[0]), (str(kept), seen)

    def by_entry(self, by_token, new_tokens, gap=False):
        if by_token is None:
            return None if bool((self.kept >= 0).all()) else self._full(torch.ones(2, 99).bool(), new_tokens, gap)
        return self._full(by_token, new_tokens, gap)

    def _full(self, by_token, new, gap):
        held = by_token.gather(1, self.kept.clamp(min=0)).masked_fill(self.kept < 0, gap)
        return torch.cat((held, by_token[:, self.layout[1] : self.layout[1] + new]), dim=1)


class Selecting:
    """The port of a cache whose layers hold different tokens."""

    def __init__(self, *layers):
        self.layers, self.prepared = list(layers), []
        self.notes = type("Notes", (), {"valid": None})()

    def prepare_forward(self, rows, new_tokens, attention_mask, visual_runs):
        self.prepared.append((rows, new_tokens))
        self.notes.valid = None if attention_mask is None else attention_mask.bool()


@pytest.fixture(scope="module")
def model():
    return make_pair("dense").ours


@pytest.fixture
def config(model):
    yield model.config.text_config
    model.set_attn_implementation("sdpa")


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(
        masks_qwen3_vl, "create_causal_mask", lambda **given: made.append(given) or create_causal_mask(**given)
    )
    return made


def masks_of(config, cache, new, mask=None, positions=None, runs=None, layers=3):
    return make_masks(config, torch.zeros(2, new, 8), mask, cache, positions, layers, runs)


@pytest.mark.parametrize("name", ["sdpa", "eager", "qwen3_vl_exact"])
@pytest.mark.parametrize(
    "make_cache",
    [lambda c: None, lambda c: DynamicCache(config=c), PagedKVCache, lambda c: StaticCache(config=c, max_cache_len=9)],
    ids=["none", "dynamic", "paged", "static"],
)
def test_ordinary_caches_get_one_mask_by_one_call(model, config, calls, name, make_cache):
    model.set_attn_implementation(name)
    padding, runs = torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), object()
    cache = make_cache(config)
    masks, handed = masks_of(config, cache, 5, padding, torch.arange(5).expand(2, -1), runs)
    assert len(calls) == 1 and calls[0]["past_key_values"] is cache
    assert len(masks) == 3 and all(mask is masks[0] for mask in masks) and all(one is runs for one in handed)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["sdpa", "eager", "qwen3_vl_exact"])
def test_every_layout_gets_a_mask_of_its_own(model, config, calls, name, padded):
    model.set_attn_implementation(name)
    first, second = [[-1, 3, 5], [0, 4, 5]], [[2, 3, 4, 5, 1], [1, 2, 3, 4, 5]]
    cache = Selecting(HoldsSome(first, 6), HoldsSome(second, 6), HoldsSome(first, 6))
    padding = torch.ones(2, 8)
    if padded:
        padding[1, 4] = 0
    masks, _ = masks_of(config, cache, 2, padding if padded else None)
    assert len(calls) == 2 and masks[0] is masks[2] and cache.prepared == [(2, 2)]
    for kept, mask in zip((first, second), masks, strict=False):
        held = torch.tensor(
            [[token >= 0 and bool(padding[row, token]) for token in own] for row, own in enumerate(kept)]
        )
        causal = torch.tensor([[True, False], [True, True]])
        expected = torch.cat((held[:, None].expand(-1, 2, -1), causal.expand(2, -1, -1)), dim=2)[:, None]
        if isinstance(mask, AttentionLayout):
            mask = mask.dense(2, expected.shape[-1])
        elif mask.is_floating_point():
            mask = mask == 0
        assert torch.equal(mask.expand_as(expected), expected)


def test_a_single_token_that_sees_all_needs_no_mask(config):
    full = HoldsSome([[0, 4], [2, 5]], 6)
    assert masks_of(config, Selecting(full), 1)[0] == [None]


def test_pictures_are_handed_over_as_the_layer_holds_them(config):
    runs = torch.tensor([[0, 1, 1, 0, 2, 2, 0, 3], [0, 0, 0, 1, 1, 0, 2, 2]])
    cache = Selecting(HoldsSome([[-1, 1, 4], [0, 3, 5]], 6), HoldsSome([[0, 5], [4, 5]], 6))
    _, handed = masks_of(config, cache, 2, runs=runs)
    assert [one.tolist() for one in handed] == [[[0, 1, 2, 0, 3], [0, 1, 0, 2, 2]], [[0, 2, 0, 3], [1, 0, 2, 2]]]


@pytest.mark.parametrize("positions", [[0, 1, 2, 0, 1], [4, 5, 5, 6, 7]])
def test_packed_rows_are_refused(config, positions):
    cache = Selecting(HoldsSome([[0], [0]], 1))
    with pytest.raises(ValueError, match="rows are packed, which Selecting does not take"):
        masks_of(config, cache, 5, positions=torch.tensor([positions, [1, 2, 3, 4, 5]]))
    assert not cache.prepared
    masks_of(config, cache, 5, mask=torch.ones(2, 6), positions=torch.tensor([positions, [1, 2, 3, 4, 5]]))


def test_the_decoder_hands_every_layer_its_own(model):
    """Through the model: what a layer is given is the entry of the list."""
    decoder, given = model.model.language_model, []
    handles = [
        layer.register_forward_pre_hook(lambda _, __, kwargs: given.append(kwargs["attention_mask"]), with_kwargs=True)
        for layer in decoder.layers
    ]
    inputs = make_inputs(["text:4"], ["text:6"])
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert len(given) == 3 and given[0] is not None and all(mask is given[0] for mask in given)
