"""The quantized cache alone: content against a plain list, attention against float64, bytes, faults, copies."""

import copy
import gc
import pickle
import sys
from pathlib import Path

import pytest
import torch
from helpers import one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from qwen3_vl import QuantizedKVCache
from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.cache import packed_history, quantized_layer
from qwen3_vl.optim.cache.kv_quantization import (
    PackedFormat,
    QuantizedSettings,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
    rotate_states,
)
from qwen3_vl.optim.cache.memory_pool import MemoryPool, PagePools
from qwen3_vl.optim.cache.packed_history import PackedHistory
from qwen3_vl.optim.cache.quantized_layer import QuantizedLayer


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "attention"))
from reference import assert_matches, dense_reference


HEADS, DIM, GROUP, WINDOW = 2, 16, 32, 40


def make_layer(bits=4, rotate=False, group=GROUP, window=WINDOW, pools=None):
    return QuantizedLayer(QuantizedSettings(bits, group, window, rotate), pools)


def draw(rows, new, seed=0, dtype=torch.float32, heads=HEADS, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, heads, new, dim, generator=generator).to(dtype).unbind(0)


def packed_tokens(length, setting):
    return max(0, length - setting.residual_tokens) // setting.group_size * setting.group_size


def as_held(keys, values, setting, packed=None):
    """What a layer should give back for tokens (B, heads, tokens, D): whole pages quantized, the rest as it is."""
    packed = packed_tokens(keys.shape[2], setting) if packed is None else packed
    form = PackedFormat(setting.bits, setting.group_size, keys.shape[3])
    pages = [x[:, :, :packed].unflatten(2, (-1, setting.group_size)).float() for x in (keys, values)]
    if not packed:
        return keys, values
    turn = rotate_states if setting.rotate else torch.clone
    old = (
        turn(dequantize_keys(quantize_keys(turn(pages[0]), form), form)),
        dequantize_values(quantize_values(pages[1], form), form),
    )
    return tuple(
        torch.cat((a.flatten(2, 3).to(b.dtype), b[:, :, packed:]), 2) for a, b in zip(old, (keys, values), strict=True)
    )


def assert_holds(layer, keys, values):
    assert layer.get_seq_length() == keys.shape[2]
    assert layer.get_mask_sizes(3) == (keys.shape[2] + 3, 0)
    for actual, expected in zip(layer.dense(), as_held(keys, values, layer.settings), strict=True):
        assert torch.equal(actual, expected)


# --- One layer ---


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("chunks", [[200], [1] * 110, [71, 1, 1, 70, 3], [30, 150, 64, 65]], ids=len)
def test_what_is_held_depends_on_the_tokens_alone(bits, rotate, chunks):
    layer, (keys, values) = make_layer(bits, rotate), draw(2, sum(chunks))
    seen = 0
    for new in chunks:
        given_now = keys[:, :, seen : seen + new], values[:, :, seen : seen + new]
        returned = layer.update(*given_now)
        seen += new
        # The first of the new tokens decides what all of them see packed.
        packed = packed_tokens(seen - new + 1, layer.settings) if seen > new else 0
        expected = as_held(keys[:, :, :seen], values[:, :, :seen], layer.settings, packed)
        for actual, wanted in zip(returned, expected, strict=True):
            assert torch.equal(actual, wanted)
        assert_holds(layer, keys[:, :, :seen], values[:, :, :seen])


def test_the_first_prefill_is_given_back_untouched():
    layer, (keys, values) = make_layer(), draw(2, 150)
    assert all(a is b for a, b in zip(layer.update(keys, values), (keys, values), strict=True))
    new = draw(2, 3, seed=1)
    assert layer.update(*new, dense=False)[0] is new[0]
    assert layer.reader is layer


@pytest.mark.parametrize("dropped", [1, 20, 63, 64])
def test_a_rollback_leaves_no_trace(dropped):
    layer, (keys, values) = make_layer(), draw(1, 260)
    layer.update(keys[:, :, :200], values[:, :, :200])
    for start in (200, 230):
        layer.update(keys[:, :, start : start + 30], values[:, :, start : start + 30], dense=False)
    layer.crop(0)
    layer.crop(-dropped)
    assert_holds(layer, keys[:, :, : 260 - dropped], values[:, :, : 260 - dropped])
    more = draw(1, 90, seed=1)
    layer.update(*more)
    whole = [torch.cat((a[:, :, : 260 - dropped], b), 2) for a, b in zip((keys, values), more, strict=True)]
    assert_holds(layer, *whole)


@pytest.mark.parametrize("new", [65, 100, 300])
def test_a_whole_update_is_undone_exactly(new):
    layer, (keys, values) = make_layer(), draw(2, 130 + new)
    layer.update(keys[:, :, :130], values[:, :, :130])
    held = layer.pool.statistics().pages_held
    layer.update(keys[:, :, 130:], values[:, :, 130:], dense=False)
    layer.crop(-new)
    assert_holds(layer, keys[:, :, :130], values[:, :, :130])
    assert layer.pool.statistics().pages_held == held


@pytest.mark.parametrize("keep", [1, 31, 64, 100, 150])
def test_a_deep_crop_keeps_what_was_packed(keep):
    """Those tokens come back as they were read before; the ones behind follow the plain rule again."""
    layer, (keys, values) = make_layer(8), draw(2, 300)
    layer.update(keys, values)
    before = layer.dense()
    layer.crop(keep - 300)
    assert layer.get_seq_length() == keep
    for actual, expected in zip(layer.dense(), before, strict=True):
        assert torch.equal(actual, expected[:, :, :keep])
    more = draw(2, 200, seed=1)
    layer.update(*more)
    for actual, old, new in zip(layer.dense(), (keys, values), more, strict=True):
        assert (actual - torch.cat((old[:, :, :keep], new), 2)).abs().max() < 0.06
    layer.crop(-1000)
    assert layer.get_seq_length() == 0 and not layer.is_initialized
    layer.update(*draw(3, 5))
    assert layer.dense()[0].shape == (3, HEADS, 5, DIM)


def test_a_step_costs_the_same_at_any_length(monkeypatch):
    """Nothing but whole pages is packed, each once, and the window is moved once in a group of steps."""
    layer, packed, moved = make_layer(), [], []
    layer.update(*draw(1, 500))
    pack, window = quantized_layer.quantize_keys, QuantizedLayer._window
    monkeypatch.setattr(quantized_layer, "quantize_keys", lambda x, f: packed.append(x.shape[2]) or pack(x, f))
    monkeypatch.setattr(QuantizedLayer, "_window", lambda self, x: moved.append(x.shape[3]) or window(self, x))
    for step in range(3 * GROUP):
        layer.update(*draw(1, 1, seed=step), dense=False)
    assert packed == [1, 1, 1]
    assert len(moved) <= 3 and max(moved) <= WINDOW + GROUP + 64


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_random_sequences_against_a_plain_list(data):
    setting = QuantizedSettings(data.draw(st.sampled_from([2, 4, 8])), GROUP, data.draw(st.integers(1, 50)))
    layer, pools = None, PagePools(GROUP)
    layer = QuantizedLayer(setting, pools)
    keys = values = torch.empty(data.draw(st.integers(1, 3)), HEADS, 0, DIM)
    for seed in range(data.draw(st.integers(3, 12))):
        length, rows = keys.shape[2], len(keys)
        action = data.draw(st.sampled_from(["step", "chunk", "crop", "select", "repeat", "copy", "reset", "replace"]))
        if action in ("step", "chunk", "replace") or not length:
            new = draw(rows, data.draw(st.integers(1, 3) if action == "step" else st.integers(1, 180)), seed)
            if action == "replace":
                layer.replace(*new)
                keys = values = torch.empty(rows, HEADS, 0, DIM)
            else:
                layer.update(*new, dense=data.draw(st.booleans()))
            keys, values = torch.cat((keys, new[0]), 2), torch.cat((values, new[1]), 2)
        elif action == "crop":
            count = data.draw(st.integers(0, min(length, 16)))
            layer.crop(-count)
            keys, values = keys[:, :, : length - count], values[:, :, : length - count]
        elif action == "select":
            index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
            (layer.reorder_cache if len(index) == rows else layer.batch_select_indices)(index)
            keys, values = keys[index], values[index]
        elif action == "repeat" and rows < 4:
            layer.batch_repeat_interleave(2)
            keys, values = keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0)
        elif action == "copy":
            old, layer = layer, copy.deepcopy(layer)
            old.update(*draw(rows, 50, seed + 100))
            old.crop(-3)
            del old
        elif action == "reset":
            layer.reset()
            keys, values = keys[:, :, :0], values[:, :, :0]
        assert layer.get_seq_length() == keys.shape[2]
        if keys.shape[2]:
            assert_holds(layer, keys, values)
            pages = len(set(layer._state.table.flatten().tolist()))
            assert layer.pool.statistics().pages_held == pages
            assert pages <= len(keys) * packed_tokens(keys.shape[2], setting) // GROUP


# --- Attention ---


def attend(layer, query, offset, valid=None):
    return layer.attend(query, AttentionLayout(offset, valid), query.shape[-1] ** -0.5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 4, 8]),
    groups=st.sampled_from([1, 2, 4, 8]),
    dim=st.sampled_from([16, 64, 80, 128]),
    past=st.integers(1, 300),
    new=st.sampled_from([1, 2, 7, 40, 64, 65, 130]),
    rows=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    padded=st.booleans(),
    native=st.booleans(),
    rotate=st.booleans(),
)
def test_attention_is_that_of_what_each_query_may_see(
    bits, groups, dim, past, new, rows, dtype, padded, native, rotate
):
    """Query by query against float64: the tokens packed at its position, all others as they were given."""
    layer = make_layer(bits, rotate and dim != 80)
    keys, values = draw(rows, past + new, 0, dtype, dim=dim)
    layer.update(keys[:, :, :past], values[:, :, :past])
    at_hand = layer.update(keys[:, :, past:], values[:, :, past:], dense=False)
    assert at_hand[0].shape[2] >= new
    query = draw(rows, new, 1, dtype, heads=HEADS * groups, dim=dim)[0]
    valid = None
    if padded:
        valid = torch.arange(past + new)[None] >= torch.arange(rows)[:, None] * (past // 3)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(packed_history, "supports_quantized", lambda *args: False)
        out = attend(layer, query, past, valid)
    for index in range(new):
        seen = past + index + 1
        packed = packed_tokens(seen if new <= 64 else past + 1, layer.settings)
        if index in (0, new // 2, new - 1):
            content = as_held(keys[:, :, :seen], values[:, :, :seen], layer.settings, packed)
            mask = None if valid is None else valid[:, None, None, :seen]
            expected = dense_reference(query[:, :, index : index + 1], *content, mask)
            # In bfloat16 the history that is unpacked piece by piece is rounded to it, as `dense` does.
            assert_matches(out[:, index : index + 1], expected, 2e-5 if dtype == torch.float32 else 2.5e-2)


def test_the_future_does_not_count():
    """Not through the scales of a group either, which later tokens are part of."""
    outs = []
    for other in (False, True):
        layer, (keys, values) = make_layer(), draw(1, 400)
        if other:
            keys[:, :, 310:], values[:, :, 310:] = 50.0, -50.0
        layer.update(keys[:, :, :200], values[:, :, :200])
        at_hand = layer.update(keys[:, :, 200:], values[:, :, 200:], dense=False)
        outs.append(attend(layer, draw(1, 200, 1)[0], 200))
        assert at_hand[0].shape[2] > 200
    assert torch.equal(outs[0][:, :110], outs[1][:, :110])
    assert not torch.equal(outs[0][:, 110:], outs[1][:, 110:])


def test_many_tokens_at_once_read_as_one_by_one():
    """What assisted decoding relies on: a candidate's token gives what it gives in a step of its own."""
    keys, values = draw(1, 260)
    query = draw(1, 60, 1, heads=2 * HEADS)[0]
    layers = [make_layer(), make_layer()]
    for layer in layers:
        layer.update(keys[:, :, :200], values[:, :, :200])
    steps = []
    for token in range(60):
        layers[0].update(keys[:, :, 200 + token, None], values[:, :, 200 + token, None], dense=False)
        steps.append(attend(layers[0], query[:, :, token, None], 200 + token))
    layers[1].update(keys[:, :, 200:], values[:, :, 200:], dense=False)
    assert_matches(attend(layers[1], query, 200), torch.cat(steps, 1).double(), 1e-5)


def test_plain_attention_unpacks_no_more_than_a_piece(monkeypatch):
    monkeypatch.setattr(packed_history, "supports_quantized", lambda *args: False)
    monkeypatch.setattr(packed_history, "PIECE_TOKENS", 64)
    layer, (keys, values) = make_layer(), draw(1, 500)
    layer.update(keys, values)
    sizes, unpack = [], PackedHistory.unpack
    monkeypatch.setattr(PackedHistory, "unpack", lambda self, a, b, t: sizes.append(b - a) or unpack(self, a, b, t))
    query = draw(1, 1, 1)[0]
    assert_matches(attend(layer, query, 499), dense_reference(query, *layer.dense(), None), 2e-5)
    assert max(sizes) == 64


# --- Bytes ---


@pytest.mark.parametrize(("bits", "most"), [(8, 0.56), (4, 0.30), (2, 0.18)])
def test_bytes_held_at_the_widths_of_the_2b_model(bits, most):
    tokens, heads, dim = 32768, 8, 128
    keys = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16).expand(1, heads, tokens, dim)
    cache = QuantizedKVCache(bits=bits)
    cache.update(keys, keys, 0, dense=False)
    assert cache.held_bytes == QuantizedKVCache.bytes_per_row(tokens, heads, dim, bits=bits)
    assert cache.held_bytes <= most * 2 * keys.numel() * 2
    layer = cache.layers[0]
    resident = layer.pool.statistics().bytes_resident + layer._state.newest.nbytes
    assert resident == cache.held_bytes


@pytest.mark.parametrize("tokens", [0, 1, 71, 72, 300])
def test_the_formula_is_what_is_held(tokens):
    layer = make_layer(2)
    if tokens:
        layer.update(*draw(1, tokens, dtype=torch.bfloat16))
    expected = QuantizedKVCache.bytes_per_row(tokens, HEADS, DIM, bits=2, group_size=GROUP, residual_tokens=WINDOW)
    assert layer.held_bytes == expected


def test_rows_share_pages():
    layer = make_layer()
    layer.update(*draw(1, 200))
    alone, window = layer.held_bytes, layer._state.newest.nbytes
    layer.batch_repeat_interleave(3)
    assert layer.held_bytes == alone + 2 * window
    layer.update(*draw(3, 100, 1))
    layer.batch_select_indices(torch.tensor([False, True, False]))
    assert layer.pool.statistics().pages_held == packed_tokens(300, layer.settings) // GROUP


# --- Faults ---


def same_content(first, second):
    return all(torch.equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("fault", ["allocate", "window", "quantize", "write"])
def test_a_failure_anywhere_changes_nothing(monkeypatch, fault):
    """The n-th allocation, window or packing fails, for every n; the same forward then succeeds."""
    expected, failures = None, 0
    places = {
        "allocate": (MemoryPool, "allocate", MemoryError),
        "window": (torch, "empty", RuntimeError),
        "quantize": (quantized_layer, "quantize_values", MemoryError),
        "write": (QuantizedLayer, "_write", KeyboardInterrupt),
    }
    owner, name, kind = places[fault]
    original = getattr(owner, name)
    for failing in range(-1, 100):
        cache, calls = QuantizedKVCache(group_size=GROUP, residual_tokens=WINDOW), []

        def scarce(*args, calls=calls, failing=failing, **options):
            if fault != "window" or (isinstance(args[0], tuple) and len(args[0]) == 5):
                calls.append(0)
                if len(calls) - 1 == failing:
                    raise kind("injected")
            return original(*args, **options)

        def forward(new, seed, cache=cache):
            nonlocal failures
            rows = cache.layers[0]._state.newest.shape[1] if cache.layers else 2
            for attempt in range(2):
                before = [layer.dense() for layer in cache.layers if layer.get_seq_length()]
                held = [layer.pool.statistics().pages_held for layer in cache.layers if layer.get_seq_length()]
                try:
                    for index in range(3):
                        cache.update(*draw(rows, new, seed + 100 * index), index, dense=False)
                    return
                except (MemoryError, KeyboardInterrupt):
                    assert attempt == 0
                    failures += 1
                    if kind is KeyboardInterrupt:  # not the cache's to mend, beyond the layer itself
                        for layer in cache.layers:
                            layer.crop(cache.layers[-1].get_seq_length() - layer.get_seq_length())
                    after = [layer.dense() for layer in cache.layers if layer.get_seq_length()]
                    assert all(
                        torch.equal(x, y)
                        for a, b in zip(before, after, strict=True)
                        for x, y in zip(a, b, strict=True)
                    )
                    if before:
                        assert [x.pool.statistics().pages_held for x in cache.layers[: len(before)]] == held

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, scarce)
            forward(150, 0)
            cache.batch_repeat_interleave(2)
            for step in range(3):
                forward(30, 1 + step)
            cache.reorder_cache(torch.tensor([1, 1, 0, 2]))
            forward(100, 7)
            cache.crop(-20)
            forward(1, 8)
        content = [layer.dense() for layer in cache.layers]
        expected = expected or content
        assert all(
            torch.equal(x, y) for a, b in zip(content, expected, strict=True) for x, y in zip(a, b, strict=True)
        )
        pages = {page for layer in cache.layers for page in layer._state.table.flatten().tolist()}
        assert cache.layers[0].pool.statistics().pages_held == len(pages)
        if failing >= len(calls):
            break
    assert failures == failing >= 6


def wrong_updates():
    keys, values = draw(2, 1)
    return {
        "layer 0: the cache holds 2 rows but the batch has 3": draw(3, 1),
        "layer 0: the cache holds 2 KV heads of 16 in torch.float32 on cpu but .*bfloat16": (keys.bfloat16(),) * 2,
        "have 4 of 16 in torch.float32": (keys.repeat(1, 2, 1, 1),) * 2,
        "have 2 of 32 in torch.float32": (keys.repeat(1, 1, 1, 2),) * 2,
        "on meta": (keys.to("meta"),) * 2,
        "in torch.float32 and .* in torch.float64": (keys, values.double()),
        r"got \(2, 2, 1, 16\) .* and \(2, 2, 1, 8\)": (keys, values[..., :8]),
        r"got \(2, 1, 16\)": (keys[0], values[0]),
        "must be floating point to be quantized, got torch.int64": (keys.long(), values.long()),
        "layer 0: keys with NaN or infinite": tuple(torch.full_like(x, float("nan")) for x in draw(2, 120)),
        "layer 0: values with NaN or infinite": (draw(2, 120)[0], torch.full((2, HEADS, 120, DIM), float("inf"))),
    }


@pytest.mark.parametrize("message", wrong_updates())
def test_updates_that_do_not_fit(message):
    cache = QuantizedKVCache(group_size=GROUP, residual_tokens=WINDOW)
    tokens = draw(2, 91)
    for index in range(2):
        cache.update(*(x[:, :, :90] for x in tokens), index)
    with pytest.raises(ValueError, match=message) as error:
        cache.update(*wrong_updates()[message], 0)
    one_line(error.value)
    for layer in cache.layers:
        assert_holds(layer, *(x[:, :, :90] for x in tokens))
        layer.update(*(x[:, :, 90:] for x in tokens))
        assert_holds(layer, *tokens)


def test_a_replacement_that_fails_changes_nothing():
    layer, tokens = make_layer(), draw(2, 120)
    layer.update(*tokens)
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.replace(*(torch.full((2, HEADS, 200, DIM), float("nan")),) * 2)
    for other in (draw(3, 5), draw(2, 5, dim=32), draw(2, 5, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="the cache holds 2"):
            layer.replace(*other)
    assert_holds(layer, *tokens)
    layer.replace(*(x[:, :, ::2] for x in tokens))
    assert_holds(layer, *(x[:, :, ::2] for x in tokens))
    assert layer.pool.statistics().pages_held == 2 * (packed_tokens(60, layer.settings) // GROUP)


def test_other_mistakes():
    layer = make_layer()
    for read in (layer.dense, lambda: attend(layer, draw(1, 1)[0], 0)):
        with pytest.raises(ValueError, match="holds no tokens yet"):
            read()
    layer.update(*draw(2, 6))
    with pytest.raises(ValueError, match="negative count of tokens to drop, got 3"):
        layer.crop(3)
    with pytest.raises(IndexError, match="the cache has 2 rows, got indices"):
        layer.batch_select_indices(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="power of two, got 80"):
        make_layer(rotate=True).update(*draw(1, 3, dim=80))
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16"):
        make_layer().update(*draw(1, 3, dim=24))
    for options, message in (
        ({"bits": 5}, "bits must be 8, 4 or 2"),
        ({"group_size": 20}, "group_size must be a multiple of 32"),
        ({"residual_tokens": 0}, "residual_tokens must be a whole number of at least 1"),
        ({"pool": PagePools(16)}, "pages of 16 tokens does not fit group_size=64"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            QuantizedKVCache(**options)
        one_line(error.value)


# --- Life, copies and conversions ---


def test_pages_come_back_when_a_cache_is_dropped():
    pools = PagePools(GROUP)
    cache = QuantizedKVCache(group_size=GROUP, residual_tokens=WINDOW, pool=pools)
    for index in range(3):
        cache.update(*draw(2, 150), index)
    (pool,) = pools.pools.values()
    copied = copy.deepcopy(cache)
    assert pool.statistics().pages_held == 3 * 2 * 3
    del cache
    gc.collect()
    assert pool.statistics().pages_held == 18
    copied.reset()
    assert pool.statistics().pages_held == 0
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(copied)


def test_conversion_both_ways():
    dynamic, tokens = DynamicCache(), draw(2, 150)
    for index in (0, 2):
        dynamic.update(*tokens, index)
    cache = QuantizedKVCache.from_dynamic(dynamic, bits=8, group_size=GROUP, residual_tokens=WINDOW)
    assert [layer.get_seq_length() for layer in cache.layers] == [150, 0, 150]
    assert_holds(cache.layers[2], *tokens)
    back = cache.to_dynamic()
    assert type(back) is DynamicCache and not back.layers[1].is_initialized
    for actual, expected in zip((back.layers[0].keys, back.layers[0].values), cache.layers[0].dense(), strict=True):
        assert torch.equal(actual, expected)
    assert (cache.is_croppable, cache.is_compileable, cache.get_max_length()) == (True, False, -1)


def test_prefill_in_inference_mode_and_steps_outside():
    layer, tokens = make_layer(), draw(1, 140)
    with torch.inference_mode():
        layer.update(*(x[:, :, :100] for x in tokens))
    layer.update(*(x[:, :, 100:] for x in tokens))
    assert_holds(layer, *tokens)


def test_gradients_flow_in_one_forward_and_never_silently_stop():
    layer = make_layer()
    keys, values = (x.clone().requires_grad_() for x in draw(1, 100))
    seen = layer.update(keys, values)
    (seen[0].sum() + 2 * seen[1].sum()).backward()
    assert bool((keys.grad == 1).all()) and bool((values.grad == 2).all())
    for new in (1, 70):
        for states in layer.update(*(x.clone().requires_grad_() for x in draw(1, new))):
            with pytest.raises(RuntimeError, match="keeps no gradients of the history; train in one forward"):
                states.sum().backward()
