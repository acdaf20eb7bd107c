"""The C++ kernels against attention as it is defined, in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ALL_CASES, AttentionCase, assert_matches, dense_reference, inputs_of, layout_of, perturb_future

from qwen3_vl.optim.attention.block_map import BlockMap, PageMap
from qwen3_vl.optim.cache.cache_paged import PagedLayer
from qwen3_vl.optim.cache.memory_pool import PagePools
from qwen3_vl.optim.native.native_attention import kernels, native_blocks, native_decode, native_page_scores, supports


pytestmark = pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
KERNELS = {"blocks": native_blocks, "decode": native_decode}


def takes(kernel, case):
    return kernel is native_blocks or (not case.packed and case.head_dim % 16 == 0)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_matches_float64(name, case):
    if not takes(KERNELS[name], case):
        pytest.skip("packed rows go to the block kernel")
    tensors, layout = inputs_of(case), layout_of(case)
    assert supports(*tensors)
    assert_matches(KERNELS[name](*tensors, layout, case.scaling), dense_reference(*tensors, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(4, 4, 1), (8, 1, 1), (4, 2, 3)])
def test_page_scores_are_the_highest_bounds(heads, kv_heads, queries, head_dim, dtype):
    generator = torch.Generator().manual_seed(heads + queries)
    query = torch.randn(2, queries, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    bounds = torch.randn(2, kv_heads, 131, 2, head_dim, generator=generator).to(dtype)  # as a pool holds them
    low, high = bounds.amin(3), bounds.amax(3)
    rows = query.double().unflatten(1, (kv_heads, -1)).flatten(2, 3)[:, :, :, None]
    for smallest, largest in ((low, high), (bounds[..., 0, :], bounds[..., 1, :])):
        each = torch.where(rows > 0, rows * largest.double()[:, :, None], rows * smallest.double()[:, :, None])
        scores = native_page_scores(query, smallest, largest)
        assert torch.allclose(scores.double(), each.sum(-1).amax(2), atol=1e-4)
    table = torch.randperm(2 * 131, generator=generator).view(2, 131).int()
    pool = bounds.transpose(1, 2).flatten(0, 1)[table.flatten().argsort().long()]
    assert torch.equal(native_page_scores(query, *pool.unbind(2), table), scores)


@pytest.mark.parametrize("head_dim", [8, 40, 72, 100])
def test_blocks_take_any_head_dim(head_dim):
    case = AttentionCase(queries=70, head_dim=head_dim, dtype=torch.bfloat16)
    tensors = inputs_of(case)
    assert_matches(native_blocks(*tensors, layout_of(case), case.scaling), dense_reference(*tensors, layout_of(case)))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_future_does_not_count(name, dtype):
    case = AttentionCase(queries=21, past=300, dtype=dtype)
    tensors = inputs_of(case)
    other = perturb_future(case, tensors, token=9)
    first, second = (KERNELS[name](*x, layout_of(case), case.scaling) for x in (tensors, other))
    assert torch.equal(first[:, :10], second[:, :10])
    assert not torch.equal(first[:, 10:], second[:, 10:])


@pytest.mark.parametrize("name", KERNELS)
def test_large_scores_stay_finite(name):
    case = AttentionCase(queries=5, past=400)
    query, key, value = inputs_of(case)
    query = 1e3 * query
    assert_matches(
        KERNELS[name](query, key, value, layout_of(case), case.scaling),
        dense_reference(query, key, value, layout_of(case)),
    )


@pytest.mark.parametrize("name", KERNELS)
def test_nan_keys_are_not_hidden(name):
    case = AttentionCase(queries=3, past=40)
    query, key, value = inputs_of(case)
    key = key.clone()
    key[:, :, 5] = float("nan")
    assert not torch.isfinite(KERNELS[name](query, key, value, layout_of(case), case.scaling)).all()


@pytest.mark.parametrize("name", KERNELS)
def test_strides_and_threads_do_not_matter(name):
    case = AttentionCase(batch=3, queries=6, past=500, groups=4)
    query, key, value = inputs_of(case)
    expected = KERNELS[name](query, key, value, layout_of(case), case.scaling)
    room = torch.full((3, 2, 700, 64), float("nan"))
    room[:, :, :506] = key
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = KERNELS[name](query.contiguous(), room[:, :, :506], value.contiguous(), layout_of(case), case.scaling)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(expected, again)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 150),
    past=st.integers(0, 150),
    batch=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3]),
    query_block=st.sampled_from([32, 64, 128, 192]),
    key_block=st.sampled_from([32, 64, 96]),
    bf16=st.booleans(),
    padding=st.sampled_from(["none", "left", "right"]),
    seed=st.integers(0, 1000),
)
def test_only_listed_blocks_are_seen(queries, past, batch, groups, query_block, key_block, bf16, padding, seed):
    dtype = torch.bfloat16 if bf16 else torch.float32
    case = AttentionCase(batch, queries, past, groups=groups, dtype=dtype, padding=padding)
    tensors, layout = inputs_of(case, seed), layout_of(case)
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, case.heads, -(-queries // query_block), -(-case.keys // key_block))
    block_map = BlockMap(torch.rand(shape, generator=generator) < 0.6, query_block, key_block)
    mask = block_map.dense(layout, queries, case.keys)
    output = native_blocks(*tensors, layout, case.scaling, block_map)
    assert_matches(output, dense_reference(*tensors, mask))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 5),
    past=st.integers(0, 300),
    page_tokens=st.sampled_from([1, 16, 48, 64]),
    paged=st.booleans(),
    bf16=st.booleans(),
    left=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_only_listed_pages_are_read(queries, past, page_tokens, paged, bf16, left, seed):
    dtype = torch.bfloat16 if bf16 else torch.float32
    case = AttentionCase(2, queries, past, groups=3, dtype=dtype, padding="left" if left else "none")
    query, key, value = inputs_of(case, seed)
    layout = layout_of(case)
    generator = torch.Generator().manual_seed(seed)
    page_map = PageMap(torch.rand(2, 2, -(-case.keys // page_tokens), generator=generator) < 0.5, page_tokens)
    pages = page_map.mask.repeat_interleave(page_tokens, dim=2)[:, :, : case.keys].repeat_interleave(3, dim=1)
    mask = layout.dense(queries, case.keys) & pages[:, :, None]
    view, states = None, (key, value)
    if paged:
        layer = _layer(page_tokens)
        layer.update(key, value, dense=False)
        view, states = layer.page_view(), (key[:, :, -1:], value[:, :, -1:])
    output = native_decode(query, *states, layout, case.scaling, page_map, view)
    assert_matches(output, dense_reference(query, key, value, mask))


def _layer(page_tokens):
    return PagedLayer(PagePools(page_tokens))


@pytest.mark.parametrize("page_tokens", [32, 64])
def test_blocks_read_a_paged_cache(page_tokens):
    case = AttentionCase(batch=2, queries=90, past=200, dtype=torch.bfloat16)
    query, key, value = inputs_of(case)
    layer = _layer(page_tokens)
    layer.update(key[:, :, :200], value[:, :, :200])
    layer.update(key[:, :, 200:], value[:, :, 200:], dense=False)
    new = key[:, :, 200:], value[:, :, 200:]
    output = native_blocks(query, *new, layout_of(case), case.scaling, None, layer.page_view())
    assert_matches(output, dense_reference(query, key, value, layout_of(case)))
    if page_tokens == 64:  # then the tiles are those of whole keys
        assert torch.equal(output, native_blocks(query, key, value, layout_of(case), case.scaling))


def test_what_is_not_supported():
    query, key, value = inputs_of(AttentionCase())
    assert supports(query, key, value)
    assert not supports(query.double(), key.double(), value.double())
    assert not supports(query, key.bfloat16(), value.bfloat16())
    assert not supports(query, key, value[..., :32])
    assert not supports(query.transpose(2, 3).contiguous().transpose(2, 3), key, value)
    assert not supports(query.to("meta"), key.to("meta"), value.to("meta"))
    trained = replace(AttentionCase(), queries=4)
    assert not supports(*inputs_of(trained, requires_grad=True))
    with torch.no_grad():
        assert supports(*inputs_of(trained, requires_grad=True))
