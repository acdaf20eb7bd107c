"""The FlexAttention path against the float64 reference: uncompiled here, compiled where there is a GPU."""

from dataclasses import replace

import pytest
import torch
from reference import AttentionCase, assert_matches, dense_reference, inputs_of, layout_of

from qwen3_vl.optim.attention.attention_flex import flex_block_mask, flex_blocks
from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.attention.block_map import BlockMap, causal_block_map


CASES = (
    AttentionCase(queries=300, head_dim=16),
    AttentionCase(batch=2, queries=150, past=140, groups=4, head_dim=16),
    AttentionCase(batch=3, queries=140, padding="left", padding_step=45, head_dim=16),
    AttentionCase(batch=3, queries=140, padding="right", groups=1, head_dim=16),
    AttentionCase(batch=2, queries=200, packed=(90, 60, 50), head_dim=16),
    AttentionCase(queries=7, past=60, spare=9, groups=4, head_dim=16),
    AttentionCase(batch=2, queries=150, groups=1, head_dim=16, causal=False),
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_map(case, query_block, key_block, by_head, seed=1):
    shape = (case.batch, case.heads if by_head else 1, -(-case.queries // query_block), -(-case.keys // key_block))
    return BlockMap(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5, query_block, key_block)


def to_gpu(x):
    if isinstance(x, BlockMap):
        return replace(x, mask=x.mask.cuda())
    return x if x is None else x.to("cuda")


@pytest.mark.parametrize(("blocks", "by_head"), [((128, 64), True), ((32, 16), False), ((48, 20), True)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_match_the_reference(case, blocks, by_head):
    tensors, layout, block_map = inputs_of(case), layout_of(case), random_map(case, *blocks, by_head)
    expected = dense_reference(*tensors, block_map.dense(layout, case.queries, case.keys))
    assert_matches(flex_blocks(*tensors, layout, case.scaling, block_map), expected)


def test_what_the_kernel_skips_and_what_it_masks():
    keys = 512
    block_map = causal_block_map(keys, keys, 128, 64)
    block_map.mask[0, 0, 3, :2] = False  # all of the kernel's block 0
    block_map.mask[0, 0, 2, 0] = False  # half of it
    mask = flex_block_mask(block_map, AttentionLayout(0), keys, keys)
    partial = [mask.kv_indices[0, 0, i, :n].tolist() for i, n in enumerate(mask.kv_num_blocks[0, 0].tolist())]
    full = [mask.full_kv_indices[0, 0, i, :n].tolist() for i, n in enumerate(mask.full_kv_num_blocks[0, 0].tolist())]
    assert partial == [[0], [1], [0, 2], [3]]
    assert full == [[], [0], [1], [1, 2]]


def test_a_map_of_other_tensors_is_refused():
    case = AttentionCase(queries=140, head_dim=16)
    block_map = random_map(AttentionCase(queries=300), 128, 64, False)
    with pytest.raises(ValueError, match="does not cover"):
        flex_blocks(*inputs_of(case), layout_of(case), case.scaling, block_map)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [(128, 128), (128, 64)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_blocks_match_the_reference_on_a_gpu(case, blocks, dtype):
    case = replace(case, head_dim=64, dtype=dtype)
    tensors, layout, block_map = inputs_of(case), layout_of(case), random_map(case, *blocks, by_head=True)
    expected = dense_reference(*tensors, block_map.dense(layout, case.queries, case.keys))
    output = flex_blocks(*map(to_gpu, tensors), to_gpu(layout), case.scaling, to_gpu(block_map))
    # Products of float32 may run as TensorFloat-32, with 10 bits.
    assert_matches(output.cpu(), expected, 1e-2 if dtype == torch.float32 else None)


@needs_gpu
@pytest.mark.gpu
def test_gradients_on_a_gpu():
    case = AttentionCase(batch=2, queries=300, head_dim=64)
    layout, block_map = layout_of(case), random_map(case, 128, 64, by_head=True)
    tensors = inputs_of(case, requires_grad=True)
    expected = dense_reference(*tensors, block_map.dense(layout, case.queries, case.keys))
    wanted = torch.autograd.grad(expected.square().sum(), tensors)
    moved = [x.detach().cuda().requires_grad_() for x in tensors]
    output = flex_blocks(*moved, to_gpu(layout), case.scaling, to_gpu(block_map))
    for gradient, expected_gradient in zip(torch.autograd.grad(output.square().sum(), moved), wanted, strict=True):
        assert_matches(gradient.cpu(), expected_gradient.double(), 5e-2)
