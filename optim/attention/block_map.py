"""Which blocks of keys are computed: the form in which sparse patterns reach the attention kernels.

A pattern never widens what a query may see. Causality, padding and packed rows are the layout's; a map says which of
the pairs that the layout allows are computed.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .attention_layout import AttentionLayout


# What was computed from a layout, for as long as the layout lives. Layouts compare by value and two forwards may have
# equal ones, so the key is the object itself.
_NOTES: dict[int, tuple[weakref.ref, dict]] = {}


@dataclass(frozen=True)
class BlockMap:
    """The key blocks that each block of queries attends to.

    Args:
        mask (`torch.Tensor`): (B or 1, H or 1, query blocks, key blocks) boolean. Query block i holds the new tokens
            `[i * query_block, (i + 1) * query_block)`, key block j the keys `[j * key_block, (j + 1) * key_block)`.
        query_block, key_block (`int`): tokens in a block; the last one may be cut short.
    Raises:
        ValueError: for a mask of another shape or dtype, or a block without tokens.
    """

    mask: torch.Tensor
    query_block: int
    key_block: int

    def __post_init__(self):
        require_count("query_block", self.query_block)
        require_count("key_block", self.key_block)
        _require_flags("block map", self.mask, 4, "(batch or 1, heads or 1, query blocks, key blocks)")

    def check(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Raises `ValueError` unless the map covers `query` (B, H, T, D) and `key` (B, HK, S, D)."""
        batch, heads, queries = query.shape[:3]
        blocks = (blocks_of(queries, self.query_block), blocks_of(key.shape[2], self.key_block))
        shape = tuple(self.mask.shape)
        if shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2:] != blocks:
            raise ValueError(
                f"a block map of shape {shape} does not cover {batch} rows, {heads} heads, {queries} queries and "
                f"{key.shape[2]} keys; its shape has to be ({batch} or 1, {heads} or 1, {blocks[0]}, {blocks[1]})."
            )

    def density(self, layout: AttentionLayout | None, queries: int, keys: int) -> torch.Tensor:
        """Share of the pairs that `layout` allows which are computed, a scalar between 0 and 1 on the map's device."""
        pairs = visible_pairs(layout, queries, keys, self.query_block, self.key_block, self.mask.device)
        return _share(self.mask, pairs[:, None])

    def dense(self, layout: AttentionLayout | None, queries: int, keys: int) -> torch.Tensor:
        """The same as a mask (B or 1, H or 1, queries, keys), true where a pair is computed; for references."""
        rows = self.mask.repeat_interleave(self.query_block, dim=2)[:, :, :queries]
        mask = rows.repeat_interleave(self.key_block, dim=3)[..., :keys]
        return mask if layout is None else mask & layout.dense(queries, keys, mask.device)


@dataclass(frozen=True)
class PageMap:
    """The pages of keys that the queries of a KV head read when decoding.

    Args:
        mask (`torch.Tensor`): (B or 1, HK or 1, pages) boolean; page j holds the keys
            `[j * page_tokens, (j + 1) * page_tokens)`.
        page_tokens (`int`): keys in a page; the last one may be cut short.
    Raises:
        ValueError: for a mask of another shape or dtype, or a page without tokens.
    """

    mask: torch.Tensor
    page_tokens: int

    def __post_init__(self):
        require_count("page_tokens", self.page_tokens)
        _require_flags("page map", self.mask, 3, "(batch or 1, KV heads or 1, pages)")

    def check(self, key: torch.Tensor) -> None:
        """Raises `ValueError` unless the map covers `key` (B, HK, S, D)."""
        batch, kv_heads, keys = key.shape[:3]
        pages, shape = blocks_of(keys, self.page_tokens), tuple(self.mask.shape)
        if shape[0] not in (1, batch) or shape[1] not in (1, kv_heads) or shape[2] != pages:
            raise ValueError(
                f"a page map of shape {shape} does not cover {batch} rows, {kv_heads} KV heads and {keys} keys; its "
                f"shape has to be ({batch} or 1, {kv_heads} or 1, {pages})."
            )

    def density(self, layout: AttentionLayout | None, queries: int, keys: int) -> torch.Tensor:
        """Share of the pairs that `layout` allows which are read, a scalar between 0 and 1 on the map's device."""
        pairs = visible_pairs(layout, queries, keys, queries, self.page_tokens, self.mask.device)
        return _share(self.mask, pairs)

    def dense(self, layout: AttentionLayout | None, queries: int, keys: int) -> torch.Tensor:
        """The same as a mask (B or 1, HK or 1, queries, keys), true where a pair is computed; for references."""
        mask = self.mask.repeat_interleave(self.page_tokens, dim=2)[:, :, None, :keys].expand(-1, -1, queries, -1)
        return mask if layout is None else mask & layout.dense(queries, keys, mask.device)


def require_count(name: str, value, least: int = 1) -> None:
    """Raises `ValueError` unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")


def blocks_of(tokens: int, block: int) -> int:
    """Blocks that `tokens` fill, the last one perhaps in part."""
    return -(-tokens // block)


def causal_block_map(
    queries: int, keys: int, query_block: int, key_block: int, query_offset: int | None = None, device=None
) -> BlockMap:
    """All key blocks that begin at or before the last query of a block; with it nothing is left out.

    Args:
        queries, keys (`int`): new tokens, and all tokens.
        query_offset (`int`, *optional*): keys before the first query; by default the queries are the last tokens.
    """
    offset = keys - queries if query_offset is None else query_offset
    last = _block_ends(queries, query_block, device) + offset - 1
    first_key = torch.arange(blocks_of(keys, key_block), device=device) * key_block
    return BlockMap((first_key <= last[:, None])[None, None], query_block, key_block)


def visible_pairs(
    layout: AttentionLayout | None, queries: int, keys: int, query_block: int, key_block: int, device=None
) -> torch.Tensor:
    """How many (query, key) pairs of every pair of blocks the layout allows: (B or 1, query blocks, key blocks) int64.

    Computed once for a layout and remembered with it. Packed sequences have to be contiguous.

    Raises:
        ValueError: for segment ids that decrease along a row.
    """

    def count():
        begin = torch.arange(blocks_of(queries, query_block), device=device) * query_block
        end = _block_ends(queries, query_block, device)
        first_key = torch.arange(blocks_of(keys, key_block), device=device) * key_block
        end_key = _block_ends(keys, key_block, device)
        if layout is None:
            return ((end - begin)[:, None] * (end_key - first_key))[None]
        begin, end = begin + layout.query_offset, end + layout.query_offset
        if layout.plainly_causal:
            # Pairs at or after the first key of a block, less those at or after the end of it.
            until, before = (_triangle(x[:, None] - first_key) - _triangle(x[:, None] - end_key) for x in (end, begin))
            return (until - before)[None]
        return _count_by_key(layout, begin, end, keys, key_block)

    if layout is None:
        return count()
    return remembered(layout, ("visible_pairs", queries, keys, query_block, key_block, str(device)), count)


def remembered(layout: AttentionLayout, key, build: Callable):
    """`build()`, called once for a layout object and a key: all layers of a forward share the layout."""
    number = id(layout)
    if number not in _NOTES or _NOTES[number][0]() is not layout:
        _NOTES[number] = (weakref.ref(layout, lambda _, notes=_NOTES: notes.pop(number, None)), {})
    notes = _NOTES[number][1]
    if key not in notes:
        notes[key] = build()
    return notes[key]


def anchor_blocks(
    layout: AttentionLayout,
    queries: int,
    keys: int,
    query_block: int,
    key_block: int,
    sink_tokens: int,
    window_tokens: int,
    device=None,
) -> torch.Tensor:
    """Blocks that a sparse pattern always keeps: the first tokens and the latest ones.

    A block is kept if one of its queries has one of its keys among the first `sink_tokens` real tokens of the row
    (of each packed sequence), or among the latest `window_tokens` up to and with itself.

    Returns:
        (B or 1, query blocks, key blocks) boolean; blocks in the future may be set.
    """
    begin = torch.arange(blocks_of(queries, query_block), device=device) * query_block + layout.query_offset
    end_key = _block_ends(keys, key_block, device)
    window = (end_key > begin[:, None] - window_tokens + 1)[None]
    rank = torch.arange(keys, device=device)[None]  # of a token among the real ones of its sequence
    if layout.segments is not None:
        rank = rank - segment_starts(layout.segments)
    if layout.valid is not None:
        before = layout.valid.long().cumsum(1) - layout.valid.long()
        start = torch.zeros_like(before) if layout.segments is None else segment_starts(layout.segments)
        rank = (before - before.gather(1, start)).masked_fill(~layout.valid, keys)
    return window | any_in_block(rank < sink_tokens, key_block)[:, None]


def any_in_block(flags: torch.Tensor, block: int) -> torch.Tensor:
    """(B, tokens) to (B, blocks): whether a flag of the block is set."""
    missing = blocks_of(flags.shape[1], block) * block - flags.shape[1]
    return torch.nn.functional.pad(flags, (0, missing)).unflatten(1, (-1, block)).any(-1)


def segment_starts(segments: torch.Tensor) -> torch.Tensor:
    """Index of the first token of each token's packed sequence, (B, tokens) int64."""
    index = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(begins, index, 0).cummax(1).values


def _count_by_key(layout: AttentionLayout, begin, end, keys: int, key_block: int) -> torch.Tensor:
    """Sums over the keys of a block of how many queries of `[begin, end)` see the key."""
    index = torch.arange(keys, device=begin.device)[None]
    until = torch.full_like(index, torch.iinfo(index.dtype).max)  # the first position that sees the key no more
    if layout.segments is not None:
        if bool((layout.segments[:, 1:] < layout.segments[:, :-1]).any()):
            raise ValueError("segments decrease along a row; number the packed sequences of a row in their order.")
        until = keys - segment_starts(layout.segments.flip(1)).flip(1)
    rows = []
    for first, last in zip(begin.tolist(), end.tolist(), strict=True):
        seeing = (until.clamp(max=last) - index.clamp(min=first)).clamp(min=0)
        if layout.valid is not None:
            seeing = seeing * layout.valid
        missing = blocks_of(keys, key_block) * key_block - keys
        rows.append(torch.nn.functional.pad(seeing, (0, missing)).unflatten(1, (-1, key_block)).sum(-1))
    return torch.stack(rows, dim=1)


def _block_ends(tokens: int, block: int, device) -> torch.Tensor:
    return ((torch.arange(blocks_of(tokens, block), device=device) + 1) * block).clamp(max=tokens)


def _triangle(n: torch.Tensor) -> torch.Tensor:
    n = n.clamp(min=0)
    return n * (n + 1) // 2


def _share(mask: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    shape = torch.broadcast_shapes(mask.shape, pairs.shape)
    computed = torch.where(mask, pairs, 0).expand(shape).sum()
    return computed / pairs.expand(shape).sum().clamp(min=1)


def _require_flags(kind: str, mask, dimensions: int, meaning: str) -> None:
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.ndim != dimensions:
        given = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"the mask of a {kind} has to be boolean, {meaning}, got {given}.")
