"""Attention over listed blocks in plain PyTorch: where no compiled kernel runs, and where gradients are needed.

A block of keys that every query of a block may see whole is attended to without a mask; the blocks at the diagonal,
at padding and at the borders of packed sequences follow with one. The two are merged by their log-sum-exp, as in
FlashAttention (arXiv 2205.14135). The query heads that share a list of blocks are the rows of one matrix, so keys and
values are never repeated.
"""

import torch
from torch.nn import functional

from .attention_layout import AttentionLayout
from .block_map import BlockMap, PageMap, causal_block_map, visible_pairs


# Gathered keys, values, masks and scores of one call of the inner kernel.
WORKING_BYTES = 64 * 2**20
# Blocks when nothing is left out: long enough for the matrix products, short enough for a small diagonal.
EXACT_BLOCK = 512
# Log-sum-exp of no key at all. Finite, so that differences of two are 0 and not NaN.
NOTHING = -1e30


def plain_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: AttentionLayout | None,
    scaling: float,
    block_map: BlockMap | None = None,
) -> torch.Tensor:
    """Attention of many queries to the blocks of `block_map`; the others are not computed.

    Differentiable; with gradients the scores of all computed pairs are kept in float32, so memory grows with them.

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        key, value (`torch.Tensor`): (B, HK, S, D).
        layout (`AttentionLayout`, *optional*): what a query may see; `None` for everything.
        scaling (`float`): factor on the scores.
        block_map (`BlockMap`, *optional*): by default nothing is left out.
    Returns:
        (B, T, H, D) in the dtype of `query`; zeros for queries that see nothing. The softmax runs in float32.
    Raises:
        ValueError: if `block_map` does not cover the tensors.
    """
    queries, keys = query.shape[2], key.shape[2]
    if block_map is None:
        whole = layout is None or (layout.plainly_causal and layout.query_offset == 0 and queries == keys)
        if whole:
            return _attend_whole(query, key, value, scaling, causal=layout is not None)
        block_map = causal_block_map(queries, keys, EXACT_BLOCK, EXACT_BLOCK, layout.query_offset, query.device)
    block_map.check(query, key)
    units = _Units(query, key, value, layout, block_map)
    out = units.query.new_zeros(units.query.shape)
    log_sum = torch.full(out.shape[:2], NOTHING, dtype=_accumulator(query), device=query.device)
    for flags, masked in units.passes():
        for chosen, blocks in units.chunks(flags, masked):
            mask = units.mask(chosen, blocks) if masked else None
            new, new_log_sum = attend_with_log_sum(*units.gather(chosen, blocks), mask, scaling, units.fused)
            if masked:
                new, new_log_sum = merge(out[chosen], log_sum[chosen], new, new_log_sum)
            out = out.index_copy_(0, chosen, new.to(out.dtype))
            log_sum = log_sum.index_copy_(0, chosen, new_log_sum)
    return units.restore(out)


def plain_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: AttentionLayout | None,
    scaling: float,
    page_map: PageMap | None = None,
) -> torch.Tensor:
    """Attention of few queries, with the query heads of a KV head as rows of one matrix; pages left out are not read.

    Args as for [`plain_blocks`], with the pages that each KV head reads in place of the blocks.
    Returns:
        (B, T, H, D); zeros for queries that see nothing.
    Raises:
        ValueError: if `page_map` does not cover the keys.
    """
    (batch, heads, queries, dim), (kv_heads, keys) = query.shape, key.shape[1:3]
    if page_map is None:
        seen = (
            None if layout is None or _sees_all(layout, queries, keys) else layout.dense(queries, keys, query.device)
        )
    else:
        page_map.check(key)
        index, read = _pages_to_keys(page_map, batch, kv_heads, keys)
        row = torch.arange(batch, device=key.device)[:, None, None]
        head = torch.arange(kv_heads, device=key.device)[None, :, None]
        key, value = key[row, head, index], value[row, head, index]
        unmasked = read is None and (layout is None or _sees_all(layout, queries, keys))
        seen = None if unmasked else _seen_keys(layout, index, queries, read)
    mask = None
    if seen is not None:
        group = heads // kv_heads
        mask = seen[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    rows = query.reshape(batch, kv_heads, -1, dim)
    out = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    if mask is not None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.view(batch, heads, queries, dim).transpose(1, 2)


class _Units:
    """Rows of queries that share a list of blocks: a block of queries, of one head or of all heads of a KV head."""

    def __init__(self, query, key, value, layout, block_map: BlockMap):
        self.batch, self.heads, self.queries, self.dim = query.shape
        self.kv_heads, self.keys = key.shape[1:3]
        self.fused = has_fused_kernel(query, key, value)
        self.layout, self.query_block, self.key_block = layout, block_map.query_block, block_map.key_block
        self.query_blocks, self.key_blocks = block_map.mask.shape[2:]
        # One list for all heads: the heads of a KV head go together. Otherwise every head is a lane of its own.
        self.lanes = self.kv_heads if block_map.mask.shape[1] == 1 else self.heads
        self.fold = self.heads // self.lanes
        self.flags = block_map.mask.to(query.device)
        padded = functional.pad(query, (0, 0, 0, self.query_blocks * self.query_block - self.queries))
        lanes = padded.view(
            self.batch, self.lanes, self.fold, self.query_blocks, self.query_block, self.dim
        )  # (B, lanes, fold, QB, query_block, D)
        self.query = lanes.transpose(2, 3).reshape(-1, self.fold * self.query_block, self.dim)
        self.key, self.value = self._in_blocks(key), self._in_blocks(value)

    def _in_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """(B * HK * KB, key_block * D), so that a gathered block is one run of memory."""
        x = functional.pad(x, (0, 0, 0, self.key_blocks * self.key_block - self.keys))
        return x.reshape(-1, self.key_block * self.dim)

    def passes(self):
        """The blocks that need no mask, then those that do; each (units, KB) boolean."""
        pairs = visible_pairs(
            self.layout, self.queries, self.keys, self.query_block, self.key_block, self.flags.device
        )[:, None]
        first = torch.arange(self.query_blocks, device=self.flags.device) * self.query_block
        rows = (self.queries - first).clamp(max=self.query_block)
        whole = pairs == rows[:, None] * self.key_block
        shape = (self.batch, self.lanes, self.query_blocks, self.key_blocks)
        yield (self.flags & whole).expand(shape).reshape(-1, self.key_blocks), False
        yield (self.flags & ~whole & (pairs > 0)).expand(shape).reshape(-1, self.key_blocks), True

    def chunks(self, flags: torch.Tensor, masked: bool):
        """Units with equally many blocks, and the blocks of each: (u,) and (u, n). Nothing is padded."""
        counts = flags.sum(-1)
        rows = self.query.shape[1]
        per_key = 2 * self.dim * self.query.element_size() + rows * (0 if self.fused and not masked else 4)
        for count in counts.unique().tolist():
            if count == 0:
                continue
            at_once = max(1, WORKING_BYTES // (count * self.key_block * per_key))
            for chosen in (counts == count).nonzero()[:, 0].split(at_once):
                yield chosen, flags[chosen].nonzero()[:, 1].view(-1, count)

    def gather(self, chosen: torch.Tensor, blocks: torch.Tensor):
        """Queries (u, 1, rows, D), keys and values (u, 1, n * key_block, D)."""
        lane = chosen // self.query_blocks
        # Lanes are numbered row by row, and the lanes of a KV head follow each other, so a division is enough.
        index = ((lane // (self.lanes // self.kv_heads))[:, None] * self.key_blocks + blocks).flatten()
        shape = (len(chosen), 1, -1, self.dim)
        key, value = self.key.index_select(0, index), self.value.index_select(0, index)
        return self.query.index_select(0, chosen)[:, None], key.view(shape), value.view(shape)

    def mask(self, chosen: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """(u, 1, rows, n * key_block) boolean."""
        within = torch.arange(self.key_block, device=blocks.device)
        key = (blocks[:, :, None] * self.key_block + within).flatten(1)  # (u, n * key_block)
        row = (chosen % self.query_blocks)[:, None] * self.query_block
        row = row + torch.arange(self.query_block, device=blocks.device)  # (u, query_block)
        seen = (key < self.keys)[:, None].expand(-1, self.query_block, -1)
        if self.layout is not None:
            batch = (chosen // (self.lanes * self.query_blocks))[:, None]
            stored = key.clamp(max=self.keys - 1)
            seen = seen & (key[:, None] <= (row + self.layout.query_offset)[..., None])
            if self.layout.valid is not None:
                seen = seen & self.layout.valid[batch, stored][:, None]
            if self.layout.segments is not None:
                own = self.layout.segments[batch, row.clamp(max=self.queries - 1)]
                seen = seen & (own[..., None] == self.layout.segments[batch, stored][:, None])
        return seen[:, None, None].expand(-1, 1, self.fold, -1, -1).flatten(2, 3)

    def restore(self, out: torch.Tensor) -> torch.Tensor:
        """(units, rows, D) to (B, T, H, D)."""
        shape = (self.batch, self.lanes, self.query_blocks, self.fold, self.query_block, self.dim)
        out = out.view(shape).permute(0, 2, 4, 1, 3, 5)  # (B, QB, query_block, lanes, fold, D)
        return out.reshape(self.batch, -1, self.heads, self.dim)[:, : self.queries]


def _attend_whole(query, key, value, scaling: float, causal: bool) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def attend_with_log_sum(query, key, value, mask: torch.Tensor | None, scaling: float, in_one_kernel: bool):
    """Attention (u, rows, D) and its log-sum-exp (u, rows) of queries (u, 1, rows, D)."""
    if in_one_kernel:
        bias = None
        if mask is not None:
            bias = torch.zeros((), dtype=query.dtype).masked_fill(~mask, float("-inf"))
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias, scale=scaling
        )
        if mask is not None:
            log_sum = log_sum.masked_fill(~mask.any(-1), NOTHING)
        return out[:, 0], log_sum[:, 0].to(_accumulator(query))
    dtype = _accumulator(query)
    scores = query[:, 0].to(dtype) @ key[:, 0].to(dtype).transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask[:, 0], NOTHING)
    peak = scores.detach().amax(-1, keepdim=True)
    weights = (scores - peak).exp()
    if mask is not None:
        weights = weights * mask[:, 0]
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    log_sum = (peak + total.log()).masked_fill(empty, NOTHING)
    return (weights / total) @ value[:, 0].to(dtype), log_sum[..., 0]


def merge(first, first_log_sum, second, second_log_sum):
    """Attention over two sets of keys, and its log-sum-exp, out of those over each."""
    log_sum = torch.logaddexp(first_log_sum, second_log_sum)
    share = (first_log_sum - log_sum).exp()[..., None], (second_log_sum - log_sum).exp()[..., None]
    return (second * share[1]).addcmul_(first, share[0]), log_sum


def has_fused_kernel(*tensors: torch.Tensor) -> bool:
    """Whether PyTorch's fused CPU kernel serves: it gives no gradient through the log-sum-exp."""
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return tensors[0].device.type == "cpu" and not grad


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sees_all(layout: AttentionLayout, queries: int, keys: int) -> bool:
    return layout.plainly_causal and queries == 1 and layout.query_offset >= keys - 1


def _pages_to_keys(page_map: PageMap, batch: int, kv_heads: int, keys: int):
    """Keys to read (B, HK, n), as many for all heads, and which of them count (B, HK, n) or `None` for all."""
    mask, page_tokens = page_map.mask.expand(batch, kv_heads, -1), page_map.page_tokens
    counts = mask.sum(-1)
    most, fewest = max(1, int(counts.max())), int(counts.min())
    pages = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    index = (pages[..., None] * page_tokens + torch.arange(page_tokens, device=mask.device)).flatten(2)
    cut_short = keys % page_tokens != 0 and bool(mask[..., -1].any())
    if most == fewest and not cut_short:
        return index, None
    read = mask.gather(2, pages).repeat_interleave(page_tokens, dim=2) & (index < keys)
    return index.clamp(max=keys - 1), read


def _seen_keys(layout: AttentionLayout | None, index: torch.Tensor, queries: int, read: torch.Tensor | None):
    """(B, HK, queries, n) boolean: the gathered keys that count and that the layout lets a query see."""
    seen = torch.ones_like(index, dtype=torch.bool) if read is None else read
    seen = seen[:, :, None].expand(-1, -1, queries, -1)
    if layout is None:
        return seen
    position = torch.arange(queries, device=index.device) + layout.query_offset
    seen = seen & (index[:, :, None] <= position[:, None])
    batch = torch.arange(index.shape[0], device=index.device)[:, None, None]
    if layout.valid is not None:
        seen = seen & layout.valid[batch, index][:, :, None]
    if layout.segments is not None:
        own = layout.segments[:, None, :queries, None]
        seen = seen & (own == layout.segments[batch, index][:, :, None])
    return seen
