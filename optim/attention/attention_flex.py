"""Attention over listed blocks by FlexAttention (Dong et al., arXiv 2412.05496): the way for GPUs."""

import math
from functools import cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .attention_layout import AttentionLayout
from .block_map import BlockMap, blocks_of, visible_pairs


# Tiles of the GPU kernels divide this, so blocks of the mask are multiples of it.
KERNEL_BLOCK = 128


def flex_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: AttentionLayout | None,
    scaling: float,
    block_map: BlockMap,
) -> torch.Tensor:
    """Attention of many queries to the blocks of `block_map`, differentiable on GPUs.

    On a GPU the kernel is compiled at the first call and skips blocks in steps of 128 queries and 128 keys: choose
    blocks of such sizes, as smaller ones are computed with their neighbours and masked. Elsewhere the definition runs
    uncompiled, which takes memory for all pairs and serves tests alone.

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        key, value (`torch.Tensor`): (B, HK, S, D).
        layout (`AttentionLayout`, *optional*): what a query may see; `None` for everything.
        scaling (`float`): factor on the scores.
        block_map (`BlockMap`): the blocks that are computed.
    Returns:
        (B, T, H, D) in the dtype of `query`; zeros for queries that see nothing.
    Raises:
        ValueError: if `block_map` does not cover the tensors.
    """
    block_map.check(query, key)
    mask = flex_block_mask(block_map, layout, query.shape[2], key.shape[2])
    run = _compiled() if query.is_cuda else flex_attention
    grouped = query.shape[1] != key.shape[1]
    return run(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped).transpose(1, 2)


def flex_block_mask(block_map: BlockMap, layout: AttentionLayout | None, queries: int, keys: int) -> BlockMask:
    """The `BlockMask` of a map and a layout; what of a block is computed without its mask is told apart."""
    query_block, key_block = (_kernel_multiple(x) for x in (block_map.query_block, block_map.key_block))
    rows, columns = blocks_of(queries, query_block), blocks_of(keys, key_block)
    ratio = query_block // block_map.query_block, key_block // block_map.key_block
    computed = visible_pairs(layout, queries, keys, block_map.query_block, block_map.key_block, block_map.mask.device)
    computed = torch.where(block_map.mask, computed[:, None], 0)
    missing = columns * ratio[1] - computed.shape[3], rows * ratio[0] - computed.shape[2]
    computed = torch.nn.functional.pad(computed, (0, missing[0], 0, missing[1]))
    computed = computed.unflatten(3, (columns, ratio[1])).unflatten(2, (rows, ratio[0])).sum((3, 5))
    full = computed == query_block * key_block
    return BlockMask.from_kv_blocks(
        *_ordered((computed > 0) & ~full),
        *_ordered(full),
        BLOCK_SIZE=(query_block, key_block),
        mask_mod=_mask_function(block_map, layout),
        seq_lengths=(queries, keys),
    )


def _mask_function(block_map: BlockMap, layout: AttentionLayout | None):
    """Whether a pair is computed. It reads tensors alone: a number would be compiled in."""
    flags, device = block_map.mask, block_map.mask.device
    query_block, key_block = block_map.query_block, block_map.key_block
    last_row, last_head = flags.shape[0] - 1, flags.shape[1] - 1

    def chosen(batch, head, query, key):
        row, own = batch.clamp(max=last_row), head.clamp(max=last_head)
        return flags[row, own, query // query_block, key // key_block]

    if layout is None:
        return chosen
    offset = torch.tensor(layout.query_offset, device=device)
    valid, segments = layout.valid, layout.segments

    def seen(batch, head, query, key):
        allowed = chosen(batch, head, query, key) & (key <= query + offset)
        if valid is not None:
            allowed = allowed & valid[batch, key]
        if segments is not None:
            allowed = allowed & (segments[batch, query] == segments[batch, key])
        return allowed

    return seen


def _ordered(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Set blocks of each row: how many, and their numbers before all others."""
    order = flags.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return flags.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _kernel_multiple(block: int) -> int:
    """The smallest multiple of both `block` and the kernel's."""
    return math.lcm(block, KERNEL_BLOCK)


@cache
def _compiled():
    return torch.compile(flex_attention)
