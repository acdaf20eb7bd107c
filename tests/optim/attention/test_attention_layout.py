"""The layout that masks travel as, against the masks that `transformers` builds."""

from types import SimpleNamespace

import pytest
import torch
from helpers import one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CASES, dense_mask_of, layout_of
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import (
    causal_mask_function,
    create_causal_mask,
    packed_sequence_compatibility_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from qwen3_vl import Qwen3VLTextConfig
from qwen3_vl.optim.attention.attention_layout import AttentionLayout, check_layout, layout_mask, register_attention


NAME = "qwen3_vl_layout_test"


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_attention(NAME, lambda *args, **kwargs: None)


def dense(mask, queries, keys, batch):
    mask = mask.dense(queries, keys) if isinstance(mask, AttentionLayout) else mask
    return mask.expand(batch, 1, queries, keys)


def both(batch, queries, keys, **kwargs):
    """What our mask function returns, and the dense boolean mask of `transformers`."""
    return layout_mask(batch, queries, keys, **kwargs), sdpa_mask(
        batch, queries, keys, **kwargs, allow_is_causal_skip=False
    )


def padding_flags(batch, keys, side, step=2):
    missing = torch.arange(batch)[:, None] * step
    token = torch.arange(keys)[None]
    return token >= missing if side == "left" else token < keys - missing


@given(
    batch=st.integers(1, 4),
    queries=st.integers(1, 12),
    past=st.integers(0, 9),
    spare=st.integers(0, 5),
    side=st.sampled_from(["none", "left", "right"]),
    step=st.integers(0, 4),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_equals_the_mask_of_transformers(batch, queries, past, spare, side, step):
    """Prefill, chunked prefill and decoding, on grown and on preallocated caches, padded or not."""
    flags = None if side == "none" else padding_flags(batch, past + queries, side, step)
    keys = past + queries + spare
    ours, stock = both(batch, queries, keys, q_offset=past, attention_mask=flags)
    assert isinstance(ours, AttentionLayout)
    assert torch.equal(dense(ours, queries, keys, batch), stock)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_packed_rows(lengths, turn):
    """Two rows, packed differently; the positions start anew in each sequence."""
    rows = [lengths, lengths[turn % len(lengths) :] + lengths[: turn % len(lengths)]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    numbers = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
    function = packed_sequence_compatibility_function(causal_mask_function, positions, numbers)
    tokens = positions.shape[1]
    ours, stock = both(2, tokens, tokens, mask_function=function)
    assert isinstance(ours, AttentionLayout) and ours.segments.dtype == torch.int32
    assert torch.equal(dense(ours, tokens, tokens, 2), stock)


def see_pictures_whole(batch, head, query, key):
    return causal_mask_function(batch, head, query, key) | ((query // 4 == key // 4) & (query >= 4))


def every_other(batch, head, query, key):
    return causal_mask_function(batch, head, query, key) & ((query - key) % 2 == 0)


def not_causal(batch, head, query, key):
    return (query >= 0) & (key >= 0)


@pytest.mark.parametrize(
    "function",
    [sliding_window_causal_mask_function(3), see_pictures_whole, every_other, not_causal],
    ids=["window", "whole pictures", "every other", "full"],
)
def test_other_patterns_come_back_dense(function):
    ours, stock = both(2, 11, 11, mask_function=function)
    assert isinstance(ours, torch.Tensor)
    assert torch.equal(ours.expand_as(stock), stock)


@pytest.mark.parametrize("queries, past", [(5, 6), (1, 10), (11, 0)])
def test_other_patterns_with_padding_and_history(queries, past):
    flags = padding_flags(3, 11, "left")
    function = sliding_window_causal_mask_function(4)
    ours, stock = both(3, queries, 11, q_offset=past, mask_function=function, attention_mask=flags)
    assert isinstance(ours, torch.Tensor)
    assert torch.equal(ours, stock)


def test_packing_is_not_read_off_behind_a_cache_or_under_padding():
    """There the places of a mask function's tensors and of the keys are not the same."""
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1]])

    def function(batch, head, query, key):
        return causal_mask_function(batch, head, query, key) & packed_sequence_mask_function(numbers)(
            batch, head, query, key
        )

    flags = torch.ones(1, 6, dtype=torch.bool)
    flags[:, 0] = False
    for kwargs in ({"q_offset": 2}, {"attention_mask": flags}):
        ours, stock = both(1, 6 - kwargs.get("q_offset", 0), 6, mask_function=function, **kwargs)
        assert isinstance(ours, torch.Tensor)
        assert torch.equal(ours, stock)


def test_key_offset():
    """A cache that dropped its first 4 tokens."""
    flags = padding_flags(2, 10, "left", step=6)
    ours, stock = both(2, 2, 6, q_offset=8, kv_offset=4, attention_mask=flags)
    assert torch.equal(dense(ours, 2, 6, 2), stock)
    assert ours.query_offset == 4


def test_offset_as_a_tensor():
    """`StaticCache` counts in a tensor."""
    assert layout_mask(1, 2, 16, q_offset=torch.tensor(5)) == AttentionLayout(5)


def test_padding_without_padding_is_dropped():
    layout = layout_mask(2, 4, 4, attention_mask=torch.ones(2, 4, dtype=torch.long))
    assert layout.plainly_causal and layout == AttentionLayout(0)


def test_unused_places_are_no_padding():
    """They lie behind the last query of a preallocated cache."""
    for side in ("none", "left"):
        flags = torch.ones(2, 9, dtype=torch.bool) if side == "none" else padding_flags(2, 9, "left")
        ours, stock = both(2, 4, 16, q_offset=5, attention_mask=flags)
        assert ours.plainly_causal == (side == "none")
        assert torch.equal(dense(ours, 4, 16, 2), stock)


def text_config(implementation):
    config = Qwen3VLTextConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=20
    )
    config._attn_implementation = implementation
    return config


def make_cache(kind, seen):
    config = text_config("sdpa")
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=20)
    if seen:
        states = torch.zeros(2, 1, seen, 8)
        cache.update(states, states, 0)
    return cache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("seen, new", [(0, 7), (7, 1), (5, 4)])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_through_create_causal_mask(kind, seen, new, side):
    """The door that models use, with the caches of `transformers`."""
    flags = None if side == "none" else padding_flags(2, seen + new, side).long()
    masks = {}
    for name in (NAME, "sdpa"):
        masks[name] = create_causal_mask(
            config=text_config(name),
            inputs_embeds=torch.zeros(2, new, 16),
            attention_mask=flags,
            past_key_values=make_cache(kind, seen),
            allow_is_causal_skip=False,
        )
    keys = masks["sdpa"].shape[-1]
    assert isinstance(masks[NAME], AttentionLayout)
    assert torch.equal(dense(masks[NAME], new, keys, 2), masks["sdpa"])


def test_custom_function_through_create_causal_mask():
    """`and_mask_function` may not be index-based, so nothing is read off it."""
    arguments = {
        "inputs_embeds": torch.zeros(2, 9, 16),
        "attention_mask": None,
        "past_key_values": None,
        "and_mask_function": lambda batch, head, query, key: query // 3 == key // 3,
    }
    ours = create_causal_mask(config=text_config(NAME), **arguments)
    assert isinstance(ours, torch.Tensor)
    assert torch.equal(ours, create_causal_mask(config=text_config("sdpa"), **arguments))


def test_four_dimensional_mask_passes_through():
    mask = torch.rand(2, 1, 9, 9) > 0.5
    assert (
        create_causal_mask(
            config=text_config(NAME), inputs_embeds=torch.zeros(2, 9, 16), attention_mask=mask, past_key_values=None
        )
        is mask
    )


def test_inside_a_compiled_graph_the_mask_is_dense():
    def make(flags):
        return layout_mask(2, 6, 6, attention_mask=flags, device=torch.device("cpu"))

    flags = padding_flags(2, 6, "left")
    compiled = torch.compile(make, backend="eager", fullgraph=True)(flags)
    assert isinstance(compiled, torch.Tensor)
    assert torch.equal(compiled, dense(make(flags), 6, 6, 2))


@pytest.mark.parametrize("case", [case for case in CASES if case.causal], ids=str)
def test_dense_by_definition_and_in_parts(case):
    layout, expected = layout_of(case), dense_mask_of(case)
    assert torch.equal(layout.dense(case.queries, case.keys), expected)
    first = case.queries // 2
    part = layout.dense(case.queries - first, case.keys, first_query=first)
    assert torch.equal(part, expected[:, :, first:])


def test_moves_with_a_hook():
    layout = AttentionLayout(3, torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.int32))
    moved = layout.to("meta")
    assert moved.query_offset == 3 and moved.valid.is_meta and moved.segments.is_meta
    assert AttentionLayout(3).to("meta") == AttentionLayout(3)


def tensors(batch=2, queries=3, keys=8):
    return torch.zeros(batch, 4, queries, 16), torch.zeros(batch, 2, keys, 16)


def test_check_of_masks_that_fit():
    query, key = tensors()
    layout = AttentionLayout(5, torch.ones(2, 8, dtype=torch.bool))
    assert check_layout(layout, query, key, True) is layout
    assert check_layout(None, query, key, True) == AttentionLayout(5)
    assert check_layout(None, query, key, False) is None
    for shape in ((2, 1, 3, 8), (1, 1, 3, 8), (2, 1, 3, 12)):
        mask = torch.zeros(shape)
        assert check_layout(mask, query, key, True) is mask
    flags = torch.tensor([[0] * 2 + [1] * 6, [1] * 8])
    layout = check_layout(flags, query, key, True)
    assert layout.query_offset == 5 and torch.equal(layout.valid, flags.bool())
    full = check_layout(flags, query, key, False)
    assert torch.equal(full.expand(2, 1, 3, 8), flags.bool()[:, None, None].expand(2, 1, 3, 8))


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 1, 2, 8),
        torch.zeros(3, 1, 3, 8),
        torch.zeros(2, 2, 3, 8),  # the KV heads' number
        torch.zeros(2, 1, 3, 7),
        torch.zeros(2, 3, 8),
        torch.zeros(2, 7),
        torch.zeros(1, 8),
        torch.zeros(8),
    ],
    ids=lambda mask: "x".join(map(str, mask.shape)),
)
def test_masks_that_do_not_fit(mask):
    query, key = tensors()
    with pytest.raises(ValueError, match="does not fit 3 queries and 8 keys of 2 rows; pass") as error:
        check_layout(mask, query, key, True)
    assert str(tuple(mask.shape)) in one_line(error.value)


@pytest.mark.parametrize("name, dtype", [("valid", torch.bool), ("segments", torch.int32)])
@pytest.mark.parametrize("shape", [(2, 7), (1, 8), (2, 9)])
def test_layouts_that_do_not_fit(name, dtype, shape):
    query, key = tensors()
    layout = AttentionLayout(5, **{name: torch.ones(shape, dtype=dtype)})
    with pytest.raises(ValueError, match=f"{name} of shape .* does not fit 8 keys of 2 rows") as error:
        check_layout(layout, query, key, True)
    one_line(error.value)


def test_keys_of_a_cache_layer():
    """Where a layer holds the history, `key` has the new tokens alone."""
    query, key = tensors(keys=3)
    layout = AttentionLayout(5, torch.ones(2, 8, dtype=torch.bool))
    assert check_layout(layout, query, key, True, keys=8) is layout
    with pytest.raises(ValueError, match="does not fit 9 keys"):
        check_layout(layout, query, key, True, keys=9)
    assert check_layout(None, query, key, True, keys=8) == AttentionLayout(5)


def test_both_tables_know_the_name():
    from transformers import AttentionInterface, AttentionMaskInterface

    function = SimpleNamespace()
    register_attention(NAME, function)
    assert AttentionInterface()[NAME] is function
    assert AttentionMaskInterface()[NAME] is layout_mask
