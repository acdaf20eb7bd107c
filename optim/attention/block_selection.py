"""Estimates of where attention mass lies, and the blocks and pages that cover it.

Sources: MInference 1.0 (arXiv 2407.02490), section 3, for pooled scores; XAttention (arXiv 2503.16428), section 3, for
sums along antidiagonals and blocks up to a share of the mass; Quest (arXiv 2406.10774), section 3, for page bounds.
Nothing here is differentiated.
"""

import torch
from torch.nn import functional

from .attention_layout import AttentionLayout
from .block_map import BlockMap, PageMap, anchor_blocks, any_in_block, blocks_of, remembered, visible_pairs


# Scores that exist at a time, of all heads.
SCORES_AT_ONCE = 2**23


@torch.no_grad()
def pooled_mass(
    query: torch.Tensor, key: torch.Tensor, layout: AttentionLayout, scaling: float, query_block: int, key_block: int
) -> torch.Tensor:
    """The softmax, over key blocks, of the mean query of a block times the mean key of a block.

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        key (`torch.Tensor`): (B, HK, S, D).
        layout (`AttentionLayout`): what a query may see; padding counts on neither side.
    Returns:
        (B, H, query blocks, key blocks) float32; 0 where a block is not seen, or reaches past its last query.
    """
    (batch, heads, queries, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    means = _block_means(query, _valid_queries(layout, queries), query_block)
    key_means = _block_means(key, layout.valid, key_block)
    rows = means.unflatten(1, (kv_heads, -1)).flatten(2, 3).float()  # (B, HK, group * QB, D)
    scores = (rows @ key_means.float().transpose(-1, -2) * scaling).view(batch, heads, -1, key_means.shape[2])
    seen = _seen_groups(layout, queries, keys, query_block, key_block, query.device)
    mass = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return mass.masked_fill(~seen[:, None], 0.0)  # rows that see nothing hold NaN


@torch.no_grad()
def antidiagonal_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    layout: AttentionLayout,
    scaling: float,
    query_block: int,
    key_block: int,
    stride: int,
) -> torch.Tensor:
    """The softmax over groups of `stride` keys of their antidiagonal sums, added up over blocks.

    The antidiagonal of a group of queries and a group of keys meets each query and each key once, so that it crosses
    every vertical and every slanted line of attention. It costs `1 / stride` of the products of exact attention.

    Args and returns as for [`pooled_mass`]; `stride` divides both blocks.
    """
    (batch, heads, queries, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    valid_queries = _valid_queries(layout, queries)
    groups = _in_groups(key, layout.valid, stride, reverse=True).flatten(0, 1)  # (B * HK, key groups, stride * D)
    seen = _seen_groups(layout, queries, keys, stride, stride, query.device)  # (B or 1, query groups, key groups)
    mass = query.new_zeros(
        batch, heads, blocks_of(queries, query_block), blocks_of(keys, key_block), dtype=torch.float32
    )
    at_once = max(1, SCORES_AT_ONCE // (batch * heads * groups.shape[1] * (query_block // stride))) * query_block
    for first in range(0, queries, at_once):
        part = slice(first, min(first + at_once, queries))
        rows = slice(first // stride, blocks_of(part.stop, stride))
        last = blocks_of(min(keys, layout.query_offset + part.stop), stride)  # of the key groups before the future
        chunk = _in_groups(query[:, :, part], None if valid_queries is None else valid_queries[:, part], stride)
        chunk = chunk.unflatten(1, (kv_heads, -1)).flatten(0, 1).flatten(1, 2)  # (B * HK, group * rows, stride * D)
        scores = torch.empty(*chunk.shape[:2], last, dtype=query.dtype, device=query.device)
        for head in range(len(groups)):  # one by one, as a batched product would copy the slice of the keys
            torch.mm(chunk[head], groups[head, :last].t(), out=scores[head])
        scores = scores.mul_(scaling / stride).view(batch, heads, rows.stop - rows.start, last)
        share = _softmax_where(scores, seen[:, None, rows, :last])
        blocks = slice(first // query_block, blocks_of(part.stop, query_block))
        _add_up(mass[:, :, blocks], share, query_block // stride, key_block // stride)
    return mass


@torch.no_grad()
def select_blocks(
    mass: torch.Tensor,
    layout: AttentionLayout,
    queries: int,
    keys: int,
    query_block: int,
    key_block: int,
    threshold: float | torch.Tensor,
    min_blocks: int,
    window_tokens: int,
) -> BlockMap:
    """The smallest set of key blocks that covers a share of the mass, for every head and query block.

    Counted in are the blocks that are always kept: the first one, those of the latest `window_tokens`, and the
    heaviest up to `min_blocks`.

    Args:
        mass (`torch.Tensor`): (B, H, query blocks, key blocks), not negative.
        threshold (`float`, or `torch.Tensor`, (H, 1, 1)): share of the mass, 0 to 1.
    """
    blocks = queries, keys, query_block, key_block
    visible = visible_pairs(layout, *blocks, mass.device)[:, None] > 0
    notes = ("anchors", *blocks, window_tokens, str(mass.device))
    anchors = remembered(layout, notes, lambda: anchor_blocks(layout, *blocks, 1, window_tokens, mass.device))
    anchors = anchors[:, None] & visible
    mass = mass.masked_fill(~visible, 0.0)
    total = mass.sum(-1, keepdim=True)
    # Shares are at most 1, so anchors come first and what is not seen comes last.
    share = mass / total.clamp(min=torch.finfo(mass.dtype).tiny)
    rank, order = (share + 2.0 * anchors - 1.0 * ~visible).sort(-1, descending=True)
    ordered = share.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    wanted = threshold * total.sign()
    kept = (before < wanted) | (rank >= 2.0)
    kept[..., :min_blocks] = True
    kept = torch.zeros_like(kept).scatter_(-1, order, kept & (rank >= 0.0))
    return BlockMap(kept, query_block, key_block)


@torch.no_grad()
def kept_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    layout: AttentionLayout,
    scaling: float,
    block_map: BlockMap,
    samples: int = 64,
) -> torch.Tensor:
    """The share of the exact attention mass in the kept blocks (B, H), the mean of `samples` evenly spaced queries.

    Computes the scores of the sampled queries with all keys, in float32. Queries that see nothing do not count.
    """
    (batch, heads, queries, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    rows = torch.linspace(0, queries - 1, min(samples, queries), device=query.device).long()
    seen = torch.cat([layout.dense(1, keys, query.device, row) for row in rows.tolist()], dim=2)
    chosen = query[:, :, rows].unflatten(1, (kv_heads, -1)).flatten(2, 3).float()
    scores = (chosen @ key.float().transpose(-1, -2) * scaling).view(batch, heads, -1, keys)
    share = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    counted = seen.any(-1)  # (B or 1, 1, rows)
    kept = block_map.mask[:, :, rows // block_map.query_block].repeat_interleave(block_map.key_block, dim=3)[
        ..., :keys
    ]
    covered = torch.where(counted, (share * kept).sum(-1), 0.0)
    return covered.sum(-1) / counted.sum(-1).clamp(min=1)


@torch.no_grad()
def page_bounds(key: torch.Tensor, layout: AttentionLayout, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest key of each channel in every page, each (B, HK, pages, D). Padding does not count.

    Reads every key (B, HK, S, D): for when no cache keeps the bounds.
    """
    low = high = key
    if layout.valid is not None:
        padding = ~layout.valid[:, None, :, None]
        low, high = key.masked_fill(padding, float("inf")), key.masked_fill(padding, float("-inf"))
    whole = key.shape[2] - key.shape[2] % page_tokens

    def reduce(x, function):
        pages = [function(x[:, :, :whole].unflatten(2, (-1, page_tokens)), dim=3)] if whole else []
        if whole < x.shape[2]:
            pages.append(function(x[:, :, whole:], dim=2, keepdim=True))
        return torch.cat(pages, dim=2)

    return reduce(low, torch.amin), reduce(high, torch.amax)


@torch.no_grad()
def select_pages(
    scores: torch.Tensor,
    queries: int,
    layout: AttentionLayout,
    keys: int,
    page_tokens: int,
    kept_pages: int | tuple[int, ...],
    window_tokens: int,
) -> PageMap:
    """The pages whose keys can score highest, for every KV head.

    The first page and those of the latest `window_tokens` are among the `kept_pages`.

    Args:
        scores (`torch.Tensor`): (B, HK, pages), see [`page_scores`].
        queries (`int`): the queries that they are for.
        kept_pages (`int`, or `tuple[int, ...]`): pages to keep, for all KV heads or for each.
    """

    def always():
        pages = queries, keys, queries, page_tokens
        seen = visible_pairs(layout, *pages, scores.device) > 0
        return seen, seen & anchor_blocks(layout, *pages, 1, window_tokens, scores.device)

    notes = ("pages", queries, keys, page_tokens, window_tokens, str(scores.device))
    seen, anchors = remembered(layout, notes, always)  # (B or 1, 1, pages)
    # Not by arithmetic: pages of padding alone have infinite bounds.
    scores = scores.masked_fill(~seen, float("-inf")).masked_fill(anchors, float("inf"))
    each = isinstance(kept_pages, tuple)
    most = min(max(kept_pages) if each else kept_pages, scores.shape[-1])
    chosen = scores.topk(most, dim=-1, sorted=each).indices
    kept = torch.zeros_like(scores, dtype=torch.bool)
    if each:
        counts = torch.tensor(kept_pages, device=scores.device)[:, None]
        kept.scatter_(-1, chosen, (torch.arange(most, device=scores.device) < counts).expand_as(chosen))
    else:
        kept.scatter_(-1, chosen, True)
    return PageMap((kept | anchors) & seen, page_tokens)


def _valid_queries(layout: AttentionLayout, queries: int) -> torch.Tensor | None:
    """(B, queries) boolean, or `None` where all are real."""
    if layout.valid is None:
        return None
    return layout.valid[:, layout.query_offset : layout.query_offset + queries]


def _block_means(x: torch.Tensor, valid: torch.Tensor | None, block: int) -> torch.Tensor:
    """Means of the real tokens of every block, (B, heads, blocks, D), as products with a row of weights."""
    tokens = x.shape[2]
    missing = blocks_of(tokens, block) * block - tokens
    real = torch.ones(1, tokens, dtype=torch.bool, device=x.device) if valid is None else valid
    if valid is not None:
        x = x.masked_fill(~valid[:, None, :, None], 0.0)
    x = functional.pad(x, (0, 0, 0, missing)) if missing else x  # padding by nothing copies too
    real = functional.pad(real, (0, missing)).unflatten(1, (-1, block))[:, None, :, None]  # (B or 1, 1, blocks, 1, ·)
    weights = real.to(x.dtype) / real.sum(-1, keepdim=True).clamp(min=1).to(x.dtype)
    return (weights @ x.unflatten(2, (-1, block))).squeeze(3)


def _in_groups(x: torch.Tensor, valid: torch.Tensor | None, stride: int, reverse: bool = False) -> torch.Tensor:
    """(B, heads, tokens, D) to (B, heads, groups, stride * D), the tokens of a group one after the other.

    Missing tokens, and those that are not `valid`, become the mean of the others of their group: the antidiagonal
    then stands for what is there.
    """
    tokens = x.shape[2]
    whole = tokens - tokens % stride if valid is None else 0
    parts = [x[:, :, :whole].unflatten(2, (-1, stride))] if whole else []
    if whole < tokens:
        rest = x[:, :, whole:]
        missing = blocks_of(rest.shape[2], stride) * stride - rest.shape[2]
        real = torch.ones(1, rest.shape[2], dtype=torch.bool, device=x.device) if valid is None else valid
        real = functional.pad(real, (0, missing)).unflatten(1, (-1, stride))[:, None, ..., None]
        rest = functional.pad(rest, (0, 0, 0, missing)).unflatten(2, (-1, stride)).masked_fill(~real, 0.0)
        mean = rest.sum(3, keepdim=True) / real.sum(3, keepdim=True).clamp(min=1)
        parts.append(torch.where(real, rest, mean.to(x.dtype)))
    groups = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return (groups.flip(3) if reverse else groups).flatten(3)


def _seen_groups(layout: AttentionLayout, queries: int, keys: int, query_size: int, key_size: int, device):
    """Pairs of groups that are compared, (B or 1, query groups, key groups) boolean.

    They have real tokens and share a packed sequence, and no key is later than the last query: what a block keeps
    must not depend on tokens after it.
    """

    def build():
        first_query = torch.arange(blocks_of(queries, query_size), device=device) * query_size
        first_key = torch.arange(blocks_of(keys, key_size), device=device) * key_size
        last_query = (first_query + query_size).clamp(max=queries) - 1
        last_key = (first_key + key_size).clamp(max=keys) - 1
        seen = (last_key <= last_query[:, None] + layout.query_offset)[None]
        if layout.valid is not None:
            seen = seen & any_in_block(layout.valid, key_size)[:, None]
            seen = seen & any_in_block(_valid_queries(layout, queries), query_size)[..., None]
        if layout.segments is not None:
            own, other = layout.segments[:, :queries], layout.segments
            seen = seen & (own[:, first_query][..., None] <= other[:, last_key][:, None])
            seen = seen & (other[:, first_key][:, None] <= own[:, last_query][..., None])
        return seen

    return remembered(layout, ("seen_groups", queries, keys, query_size, key_size, str(device)), build)


def _softmax_where(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys that are seen; zeros for rows that see none. Overwrites `scores` (B, H, rows, keys)."""
    # What all rows see, in the causal case the whole past, needs no pass of masking.
    start = int(seen.flatten(0, 2).all(0).long().cumprod(0).sum())
    scores[..., start:].masked_fill_(~seen[..., start:], float("-inf"))
    share = scores.softmax(-1)
    blind = ~seen.any(-1, keepdim=True)
    return share.masked_fill_(blind, 0.0) if bool(blind.any()) else share


def _add_up(mass: torch.Tensor, share: torch.Tensor, rows: int, columns: int) -> None:
    """Sums (B, H, query groups, key groups) over blocks of `rows` times `columns` into `mass`, in place."""
    missing = mass.shape[2] * rows - share.shape[2]
    share = functional.pad(share, (0, 0, 0, missing)) if missing else share
    # A product with ones is several times faster than a sum over an outer dimension.
    ones = torch.ones(1, rows, dtype=share.dtype, device=share.device)
    by_block = (ones @ share.unflatten(2, (-1, rows))).squeeze(3).float()
    blocks = blocks_of(share.shape[3], columns)
    by_block = functional.pad(by_block, (0, blocks * columns - share.shape[3]))
    mass[..., :blocks] = by_block.unflatten(3, (-1, columns)).sum(-1)
