"""The kernel for packed keys and values against float64 attention over their unpacked content."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import AttentionCase, assert_matches, dense_reference, inputs_of, layout_of

from qwen3_vl.optim.cache.kv_quantization import (
    PackedFormat,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
    rotate_states,
)
from qwen3_vl.optim.native.native_quantized import native_quantized_decode, quantized_kernel, supports_quantized


pytestmark = pytest.mark.skipif(quantized_kernel() is None, reason="no C++ compiler")


def packed_case(case, bits, group_size, loose, seed=0, rotate=False):
    """Arguments of the kernel for all but the newest `loose` tokens or more, and the content as float32."""
    form = PackedFormat(bits, group_size, case.head_dim)
    query, key, value = inputs_of(case, seed)
    pages = (case.keys - loose) // group_size
    tokens = pages * group_size
    old = [x[:, :, :tokens].unflatten(2, (pages, group_size)).float() for x in (key, value)]
    old[0] = rotate_states(old[0]) if rotate else old[0]
    records = quantize_keys(old[0], form), quantize_values(old[1], form)
    unpacked = [dequantize_keys(records[0], form), dequantize_values(records[1], form)]
    unpacked[0] = rotate_states(unpacked[0]) if rotate else unpacked[0]
    # Pages of a shuffled pool, so that a wrong table shows.
    order = torch.randperm(case.batch * pages, generator=torch.Generator().manual_seed(seed))
    storages = []
    for record in records:
        by_page = record.transpose(1, 2).reshape(-1, case.kv_heads, group_size, form.token_bytes)
        storages.append(torch.empty_like(by_page).index_copy_(0, order, by_page))
    table = order.int().view(case.batch, pages)
    newest = key[:, :, tokens:], value[:, :, tokens:]
    content = [torch.cat((a.flatten(2, 3), b.float()), 2) for a, b in zip(unpacked, newest, strict=True)]
    turned = rotate_states(query) if rotate else None
    return query, (*storages, table, form, newest), turned, content


def attend(case, bits, group_size=64, loose=20, seed=0, rotate=False, layout=None):
    layout = layout_of(case) if layout is None else layout
    query, packed, turned, content = packed_case(case, bits, group_size, loose, seed, rotate)
    assert supports_quantized(query, *packed[4])
    out = native_quantized_decode(query, *packed, layout, case.scaling, turned)
    return out, dense_reference(query, *content, layout)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    groups=st.sampled_from([1, 2, 3, 4, 8]),
    queries=st.integers(1, 5),
    past=st.integers(0, 900),
    batch=st.integers(1, 3),
    bf16=st.booleans(),
    padding=st.sampled_from(["none", "left", "right"]),
    rotate=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_matches_float64(bits, group_size, head_dim, groups, queries, past, batch, bf16, padding, rotate, seed):
    dtype = torch.bfloat16 if bf16 else torch.float32
    case = AttentionCase(batch, queries, past, groups=groups, head_dim=head_dim, dtype=dtype, padding=padding)
    if padding == "left" and past > 200:
        case = replace(case, padding_step=70)
    loose = min(case.keys, queries + seed % 40)
    out, expected = attend(case, bits, group_size, loose, seed, rotate and head_dim != 80)
    # bfloat16 may round the output, of up to about 3; the sums before it are held to far less below.
    assert_matches(out, expected, 1e-2 if bf16 else None)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_products_of_bytes_lose_less_than_the_rounding_of_the_output(bits):
    case = AttentionCase(queries=1, past=1500, head_dim=128, dtype=torch.bfloat16)
    out, expected = attend(case, bits)
    error = (out.double() - expected).abs()
    rounding = (expected.bfloat16().double() - expected).abs()
    assert error.max() <= 1.5 * rounding.max()
    assert error.mean() <= 1.1 * rounding.mean()


def test_every_key_may_be_masked():
    case = AttentionCase(batch=2, queries=1, past=300, dtype=torch.bfloat16)
    valid = torch.ones(2, 301, dtype=torch.bool)
    valid[1] = False
    out, expected = attend(case, 4, layout=replace(layout_of(case), valid=valid))
    assert_matches(out, expected)
    assert not out[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_stay_finite_and_nan_is_not_hidden(dtype):
    case = AttentionCase(queries=2, past=400, dtype=dtype)
    query, packed, _, content = packed_case(case, 8, 64, 20)
    for factor, bad in ((1e3, False), (float("nan"), True)):
        asked = query.clone()
        asked[:, 1] *= factor
        out = native_quantized_decode(asked, *packed, layout_of(case), case.scaling)
        # Scores of a thousand move by whole units with the fifteen bits of their products.
        assert torch.isfinite(out[:, :, 1]).all() != bad
        assert_matches(out[:, :, 0], dense_reference(asked, *content, layout_of(case))[:, :, 0], 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_strides_do_not_matter(dtype):
    case = AttentionCase(batch=2, queries=3, past=1300, groups=4, dtype=dtype)
    query, packed, _, _ = packed_case(case, 4, 64, 100)
    expected = native_quantized_decode(query, *packed, layout_of(case), case.scaling)
    room = torch.full((2, *packed[4][0].shape[:2], 500, case.head_dim), float("nan"), dtype=dtype)
    for index, states in enumerate(packed[4]):
        room[index, :, :, 7 : 7 + states.shape[2]] = states
    newest = room[:, :, :, 7 : 7 + states.shape[2]].unbind(0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = native_quantized_decode(query.contiguous(), *packed[:4], newest, layout_of(case), case.scaling)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(expected, again)
