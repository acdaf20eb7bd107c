"""Attention to a packed history in plain PyTorch, piece by piece, so that never more of it is unpacked than one piece.

For few queries, scales and zeros are folded into queries and probabilities and codes are multiplied as they lie; for
many, keys and values are unpacked. The pieces are merged by their log-sum-exp, as in FlashAttention
(arXiv 2205.14135).
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

import torch

from ..attention.blocks_plain import NOTHING, attend_with_log_sum, has_fused_kernel, merge
from .kv_quantization import PackedFormat, multiply_codes, record_parts


# Queries that are attended to at once where they need a mask, which is a flag and a number for each pair.
MASKED_QUERIES = 256


def attend_piece_by_piece(
    query: torch.Tensor,
    pieces: Iterable[tuple[int, tuple[torch.Tensor, torch.Tensor]]],
    tail: tuple[int, tuple[torch.Tensor, torch.Tensor]],
    layout,
    scaling: float,
) -> torch.Tensor:
    """Attention (B, T, H, D) of queries to a history that is made as it is read.

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        pieces: first token, keys and values (B, KV heads, n, D) of each piece, in any order.
        tail: the same of the newest tokens.
        layout (`AttentionLayout`, *optional*): `None` where every query sees every key.
        scaling (`float`): factor on the scores.
    """
    states = chain(pieces, (tail,))
    return merge_parts((attend_to_states(query, *kv, layout, scaling, first) for first, kv in states), query)


def merge_parts(parts: Iterable[tuple[torch.Tensor, torch.Tensor]], query: torch.Tensor) -> torch.Tensor:
    """Attention (B, T, H, D) out of that to parts of the history.

    Args:
        parts: attention (B * KV heads, rows, D) and its log-sum-exp (B * KV heads, rows).
        query (`torch.Tensor`): (B, H, T, D).
    """
    out = log_sum = None
    for part, part_log_sum in parts:
        if out is None:
            out, log_sum = part.float(), part_log_sum
        else:
            out, log_sum = merge(out, log_sum, part, part_log_sum)
    return out.to(query.dtype).view(query.shape).transpose(1, 2)


def attend_to_states(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layout, scaling: float, first: int
):
    """Attention to keys and values (B, KV heads, n, D) that begin with token `first`, and its log-sum-exp.

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        layout (`AttentionLayout`, *optional*): `None` where every query sees every key.
    Returns:
        (B * KV heads, rows, D) and (B * KV heads, rows), the query heads of a KV head as rows; zeros for those that
        see nothing.
    """
    queries, end = query.shape[2], first + keys.shape[2]
    if queries <= MASKED_QUERIES or _sees_all(layout, first, end):
        return _attend_at_once(query, keys, values, layout, scaling, first)
    outs, log_sums = [], []
    for start in range(0, queries, MASKED_QUERIES):
        part = query[:, :, start : start + MASKED_QUERIES]
        own = replace(layout, query_offset=layout.query_offset + start)
        reached = max(1, own.query_offset + part.shape[2] - first)  # keys behind these no query of the part sees
        keys_seen, values_seen = keys[:, :, :reached], values[:, :, :reached]
        out, log_sum = _attend_at_once(part, keys_seen, values_seen, own, scaling, first)
        outs.append(out.unflatten(1, (-1, part.shape[2])))
        log_sums.append(log_sum.unflatten(1, (-1, part.shape[2])))
    return torch.cat(outs, 2).flatten(1, 2), torch.cat(log_sums, 2).flatten(1, 2)


def _attend_at_once(query, keys, values, layout, scaling: float, first: int):
    (batch, heads, queries, dim), kv_heads = query.shape, keys.shape[1]
    rows = query.reshape(batch * kv_heads, 1, -1, dim)
    keys, values = (x.reshape(batch * kv_heads, 1, -1, dim).to(query.dtype) for x in (keys, values))
    seen = _seen(layout, first, keys.shape[2], queries, query.device)
    if seen is not None:  # (B or 1, T or 1, n) to (B * KV heads, 1, rows, n)
        seen = seen.expand(batch, queries, -1).repeat_interleave(kv_heads, 0)[:, None]
        seen = seen.repeat(1, 1, heads // kv_heads, 1)
    out, log_sum = attend_with_log_sum(rows, keys, values, seen, scaling, has_fused_kernel(rows, keys, values))
    return out.masked_fill(log_sum[..., None] <= NOTHING, 0.0), log_sum


def attend_to_records(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: PackedFormat, seen: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`attend_to_states`], for packed pages that all queries of a KV head see, without unpacking them.

    Args:
        query (`torch.Tensor`): (B, H, T, D) float32, scaled, and rotated if the keys are.
        keys, values (`torch.Tensor`): records (B, pages, KV heads, record).
        seen (`torch.Tensor`, *optional*): (B, pages, KV heads or 1, tokens or 1) boolean.
    """
    rows = query.reshape(len(keys), 1, keys.shape[2], -1, query.shape[-1])
    packed, scale, zero = record_parts(keys, form, form.head_dim)
    scores = multiply_codes(rows * scale[..., None, :], packed, form)
    scores = scores + (rows @ zero.float().unsqueeze(-1))  # (B, pages, KV heads, rows, tokens)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, :, :, None], NOTHING)
    peak = scores.amax((1, 4), keepdim=True)
    weights = (scores - peak).exp()
    if seen is not None:
        weights = weights * seen[:, :, :, None]

    groups = form.value_groups
    packed, scale, zero = record_parts(values, form, groups * form.group_size)
    scale, zero = (
        x.float().unflatten(-1, (groups, 1, -1)) for x in (scale, zero)
    )  # (B, pages, KV heads, groups, 1, n)
    by_group = weights[..., None, :, :]
    sums = multiply_codes((by_group * scale).flatten(-3, -2), packed, form).sum(1)  # (B, KV heads, groups * rows, D)
    sums = sums.unflatten(-2, (groups, -1)).unflatten(-1, (groups, -1))
    sums = sums.diagonal(dim1=-4, dim2=-2).movedim(-1, -2)  # (B, KV heads, rows, groups, D / groups)
    sums = sums + (by_group * zero).sum((1, -1)).mT.unsqueeze(-1)
    total = weights.sum((1, 4))[..., None]
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    log_sum = (peak[:, 0] + total.log()).masked_fill(empty, NOTHING)
    return (sums.flatten(-2) / total).flatten(0, 1), log_sum[..., 0].flatten(0, 1)


def _sees_all(layout, first: int, end: int) -> bool:
    """Whether every query sees all keys from token `first` up to `end`."""
    if layout is None:
        return True
    return layout.query_offset >= end - 1 and (layout.valid is None or bool(layout.valid[:, first:end].all()))


def _seen(layout, first: int, keys: int, queries: int, device) -> torch.Tensor | None:
    """Which of the keys from token `first` on a query sees, (B or 1, T or 1, keys); `None` for all of them."""
    if _sees_all(layout, first, first + keys):
        return None
    valid = None if layout.valid is None else layout.valid[:, None, first : first + keys]
    if layout.query_offset >= first + keys - 1:
        return valid
    position = torch.arange(first, first + keys, device=device)
    causal = (position <= layout.query_offset + torch.arange(queries, device=device)[:, None])[None]
    return causal if valid is None else causal & valid
