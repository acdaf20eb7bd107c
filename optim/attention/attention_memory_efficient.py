"""Exact attention whose memory does not grow with the length: chunks of queries, chunks of keys, an online softmax."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .attention_layout import AttentionLayout, check_layout, register_attention
from .attention_technique import AttentionTechnique, refuse_attention_weights, settings_of


NAME = "qwen3_vl_memory_efficient"
# Powers of two are several times faster to compute than powers of e, most of all where they underflow.
LOG2_E = 1.0 / math.log(2.0)
# Below every score, yet finite: a row that has seen no key so far has this as its largest.
LOWEST = -1e30


@dataclass(frozen=True)
class MemoryEfficientSettings:
    """Chunk sizes.

    Args:
        query_chunk (`int`): queries of a head that are computed at a time, at least 1.
        key_chunk (`int`): keys that these meet at a time, at least 1.
    """

    query_chunk: int = 256
    key_chunk: int = 512

    def __post_init__(self):
        for name, size in vars(self).items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be a whole number of tokens, at least 1, got {size!r}; leave it out.")


DEFAULTS = MemoryEfficientSettings()


@dataclass(frozen=True)
class _Visibility:
    """What is hidden from whom, told for one chunk of queries and keys at a time."""

    offset: int | None  # keys before the first query; `None` without causality
    valid: torch.Tensor | None  # (B, keys)
    segments: torch.Tensor | None  # (B, keys)
    mask: torch.Tensor | None  # (B or 1, H or 1, queries, keys), boolean or additive

    def key_chunks(self, queries: int, keys: int, query_chunk: int, key_chunk: int) -> list[list[slice]]:
        """The chunks of keys, of those that any row sees, for every chunk of queries."""
        starts = range(0, keys, key_chunk)
        plan = []
        useful = self._useful_chunks(queries, keys, query_chunk, key_chunk)
        for index, first in enumerate(range(0, queries, query_chunk)):
            stop = keys
            if self.offset is not None:
                stop = min(keys, self.offset + min(first + query_chunk, queries))
            chosen = (start for j, start in enumerate(starts) if start < stop and (useful is None or useful[index][j]))
            plan.append([slice(start, min(start + key_chunk, stop)) for start in chosen])
        return plan

    def _useful_chunks(self, queries, keys, query_chunk, key_chunk) -> list[list[bool]] | None:
        if self.valid is None and self.segments is None:
            return None
        device = (self.segments if self.valid is None else self.valid).device
        useful = torch.ones(-(-queries // query_chunk), -(-keys // key_chunk), dtype=torch.bool, device=device)
        if self.valid is not None:
            useful &= torch.stack([chunk.any() for chunk in self.valid.split(key_chunk, dim=1)])
        if self.segments is not None:
            least, most = _ends_of_chunks(self.segments, key_chunk)
            own_least, own_most = _ends_of_chunks(self.segments[:, :queries], query_chunk)
            useful &= ((least[None] <= own_most[:, None]) & (most[None] >= own_least[:, None])).any(-1)
        return useful.tolist()

    def hide_(self, scores: torch.Tensor, rows: slice, heads: slice, queries: slice, keys: slice) -> None:
        """Writes -inf, in place, where a query does not see a key; adds an additive mask.

        Args:
            scores (`torch.Tensor`): (rows, KV heads, group, queries, keys), in powers of two.
        """
        hidden = None
        if self.offset is not None and keys.stop > self.offset + queries.start + 1:
            last_seen = torch.arange(queries.start, queries.stop, device=scores.device) + self.offset
            hidden = (torch.arange(keys.start, keys.stop, device=scores.device) > last_seen[:, None])[None]
        if self.valid is not None:
            padding = ~self.valid[rows, None, keys]
            hidden = padding if hidden is None else hidden | padding
        if self.segments is not None:
            foreign = self.segments[rows, queries, None] != self.segments[rows, None, keys]
            hidden = foreign if hidden is None else hidden | foreign
        if hidden is not None:
            scores.masked_fill_(hidden[:, None, None], -torch.inf)
        if self.mask is not None:
            self._apply_mask_(scores, rows, heads, queries, keys)

    def _apply_mask_(self, scores, rows, heads, queries, keys) -> None:
        group = scores.shape[2]
        mask = self.mask[:, :, queries, keys]
        if mask.shape[0] > 1:
            mask = mask[rows]
        if mask.shape[1] > 1:
            mask = mask[:, heads.start * group : heads.stop * group].unflatten(1, (-1, group))
        else:
            mask = mask[:, :, None]
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            scores.add_(mask, alpha=LOG2_E)
            # Additive masks hide with the lowest number of their dtype, which is no number to compute with.
            scores.masked_fill_(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)


def _ends_of_chunks(segments: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest segment of every chunk, each (chunks, B)."""
    chunks = segments.split(chunk, dim=1)
    return torch.stack([c.amin(1) for c in chunks]), torch.stack([c.amax(1) for c in chunks])


class _Walk:
    """One call, walked through chunk by chunk: its tensors by KV head, and scratch that every chunk reuses."""

    def __init__(self, query, key, value, visibility: _Visibility, scaling: float, query_chunk: int, key_chunk: int):
        batch, kv_heads = key.shape[:2]
        self.group = query.shape[1] // kv_heads
        self.query, self.key, self.value = query.unflatten(1, (kv_heads, self.group)), key, value
        self.visibility = visibility
        self.factor = scaling * LOG2_E
        self.query_chunk, self.key_chunk = min(query_chunk, query.shape[2]), min(key_chunk, key.shape[2])
        self.plan = visibility.key_chunks(query.shape[2], key.shape[2], self.query_chunk, self.key_chunk)
        # A processor works on what its cache holds, so only short queries share a chunk; elsewhere large kernels win.
        pairs = min(8, query_chunk // self.query_chunk) if query.device.type == "cpu" else 64
        self.heads_at_once = min(kv_heads, pairs)
        self.rows_at_once = min(batch, max(1, pairs // kv_heads))
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self._scratch = {}

    def tiles(self) -> Iterator[tuple[slice, slice, slice, list[slice]]]:
        """Rows, KV heads and queries of every tile, and the chunks of keys that it sees."""
        batch, kv_heads = self.key.shape[:2]
        for row in range(0, batch, self.rows_at_once):
            rows = slice(row, min(row + self.rows_at_once, batch))
            for head in range(0, kv_heads, self.heads_at_once):
                heads = slice(head, min(head + self.heads_at_once, kv_heads))
                for index, first in enumerate(range(0, self.query.shape[3], self.query_chunk)):
                    queries = slice(first, min(first + self.query_chunk, self.query.shape[3]))
                    yield rows, heads, queries, self.plan[index]

    def scratch(self, name: str, *shape: int) -> torch.Tensor:
        """Uninitialised memory that is reused under its name; allocated anew only to grow."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = torch.empty(size, dtype=self.dtype, device=self.key.device)
        return self._scratch[name][:size].view(shape)

    def load(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """Copies (rows, KV heads, ..., D) in the working precision to (rows * KV heads, tokens, D)."""
        rows, heads, *_, dim = part.shape
        copy = self.scratch(name, *part.shape).copy_(part)
        return copy.view(rows * heads, -1, dim)

    def load_query(self, rows: slice, heads: slice, queries: slice) -> torch.Tensor:
        return self.load("query", self.query[rows, heads, :, queries]).mul_(self.factor)

    def scores(self, query: torch.Tensor, key: torch.Tensor, rows, heads, queries, keys) -> torch.Tensor:
        """Masked scores (rows * KV heads, group * queries, keys), as exponents of two."""
        scores = torch.bmm(query, key.mT, out=self.scratch("scores", *query.shape[:2], key.shape[1]))
        shape = (rows.stop - rows.start, heads.stop - heads.start, self.group, -1, key.shape[1])
        self.visibility.hide_(scores.view(shape), rows, heads, queries, keys)
        return scores

    def store(self, part: torch.Tensor, result: torch.Tensor) -> None:
        """Writes (rows * KV heads, tokens, D) to the view (rows, KV heads, ..., D) `part`."""
        part.copy_(result.view(part.shape))


def _attend(walk: _Walk, output: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Fills `output` (B, KV heads, group, queries, D) and `lse` (B, KV heads, group, queries, 1)."""
    for rows, heads, queries, key_chunks in walk.tiles():
        query = walk.load_query(rows, heads, queries)
        shape = query.shape[:2]
        greatest = walk.scratch("greatest", *shape, 1).fill_(LOWEST)
        total = walk.scratch("total", *shape, 1).zero_()
        summed = walk.scratch("summed", *shape, output.shape[-1]).zero_()
        for keys in key_chunks:
            key = walk.load("key", walk.key[rows, heads, keys])
            value = walk.load("value", walk.value[rows, heads, keys])
            scores = walk.scores(query, key, rows, heads, queries, keys)
            greater = torch.maximum(greatest, scores.amax(-1, keepdim=True))
            weights = scores.sub_(greater).exp2_()
            shrink = greatest.sub_(greater).exp2_()
            total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            summed.mul_(shrink).baddbmm_(weights, value)
            greatest.copy_(greater)
        # A query that sees no key has no weights and gives zeros.
        blind = total == 0
        walk.store(output[rows, heads, :, queries], summed.div_(total.masked_fill(blind, 1.0)))
        if lse is not None:
            walk.store(lse[rows, heads, :, queries], (greatest + total.log2()).masked_fill(blind, torch.inf))


def _attend_backward(walk: _Walk, grad, output, lse, grad_query, grad_key, grad_value) -> None:
    """Fills the gradients, by chunks that are computed anew.

    Args:
        grad, output, grad_query (`torch.Tensor`): (B, KV heads, group, queries, D).
        grad_key, grad_value (`torch.Tensor`): (B, KV heads, keys, D), zeros, in the working precision.
    """
    for rows, heads, queries, key_chunks in walk.tiles():
        query = walk.load_query(rows, heads, queries)
        outer = walk.load("outer", grad[rows, heads, :, queries])
        shift = walk.load("shift", output[rows, heads, :, queries]).mul_(outer).sum(-1, keepdim=True)
        norm = walk.load("lse", lse[rows, heads, :, queries])
        inner = walk.scratch("inner", *query.shape).zero_()
        for keys in key_chunks:
            key = walk.load("key", walk.key[rows, heads, keys])
            value = walk.load("value", walk.value[rows, heads, keys])
            weights = walk.scores(query, key, rows, heads, queries, keys).sub_(norm).exp2_()
            product = torch.bmm(weights.mT, outer, out=walk.scratch("product", *value.shape))
            grad_value[rows, heads, keys].add_(product.view(grad_value[rows, heads, keys].shape))
            slope = torch.bmm(outer, value.mT, out=walk.scratch("slope", *weights.shape)).sub_(shift).mul_(weights)
            inner.baddbmm_(slope, key)
            product = torch.bmm(slope.mT, query, out=walk.scratch("product", *key.shape))
            grad_key[rows, heads, keys].add_(product.view(grad_key[rows, heads, keys].shape))
        walk.store(grad_query[rows, heads, :, queries], inner.mul_(walk.factor / LOG2_E))
    grad_key.div_(LOG2_E)  # the query came with the factor of powers of two


def _by_kv_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(B, queries, heads, D) as (B, KV heads, group, queries, D)."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


# As operators of the library these are one node in a compiled graph. A copy of this file from the Hub is another
# module, so its operators have another name.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::attend", mutates_args=())
def _attend_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    valid: torch.Tensor | None,
    segments: torch.Tensor | None,
    offset: int | None,
    scaling: float,
    query_chunk: int,
    key_chunk: int,
    keep_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, queries, heads, D), and the logarithms of the softmax sums (B, queries if kept, heads, 1)."""
    kv_heads = key.shape[1]
    walk = _Walk(query, key, value, _Visibility(offset, valid, segments, mask), scaling, query_chunk, key_chunk)
    output, lse = _empty_results(query, value, keep_lse)
    _attend(walk, _by_kv_head(output, kv_heads), _by_kv_head(lse, kv_heads) if keep_lse else None)
    return output, lse


@_attend_operator.register_fake
def _(query, key, value, mask, valid, segments, offset, scaling, query_chunk, key_chunk, keep_lse):
    return _empty_results(query, value, keep_lse)


def _empty_results(query, value, keep_lse):
    batch, heads, queries, _ = query.shape
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty(batch, queries, heads, value.shape[-1]),
        query.new_empty(batch, queries if keep_lse else 0, heads, 1, dtype=precise),
    )


@torch.library.custom_op(f"{_NAMESPACE}::attend_backward", mutates_args=())
def _backward_operator(
    grad: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    valid: torch.Tensor | None,
    segments: torch.Tensor | None,
    offset: int | None,
    scaling: float,
    query_chunk: int,
    key_chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kv_heads = key.shape[1]
    walk = _Walk(query, key, value, _Visibility(offset, valid, segments, mask), scaling, query_chunk, key_chunk)
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = (x.new_zeros(x.shape, dtype=walk.dtype) for x in (key, value))
    by_head = (_by_kv_head(x, kv_heads) for x in (grad, output, lse))
    _attend_backward(walk, *by_head, grad_query.unflatten(1, (kv_heads, -1)), grad_key, grad_value)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@_backward_operator.register_fake
def _(grad, output, lse, query, key, value, *rest):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _remember(ctx, inputs, output):
    query, key, value, mask, valid, segments, *ctx.numbers = inputs
    ctx.save_for_backward(*output, query, key, value, mask, valid, segments)


def _differentiate(ctx, grad, _):
    return *_backward_operator(grad, *ctx.saved_tensors, *ctx.numbers[:-1]), *[None] * 8


torch.library.register_autograd(_attend_operator, _differentiate, setup_context=_remember)


def memory_efficient_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionLayout | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Exact attention in memory that is independent of the length; see [`MemoryEfficientAttention`].

    Args:
        module (`torch.nn.Module`): may hold [`MemoryEfficientSettings`] in `attention_settings` under this name.
        query (`torch.Tensor`): (B, heads, queries, D).
        key, value (`torch.Tensor`): (B, KV heads, keys, D).
        attention_mask: an [`AttentionLayout`]; a boolean or additive mask (B or 1, heads or 1, queries, keys), read in
            chunks; padding flags (B, keys); or `None`.
        scaling (`float`, *optional*): factor on the scores, `D ** -0.5` by default.
    Returns:
        output (B, queries, heads, D) in the dtype of `query`, zeros for a query that sees no key; and `None`.
    Raises:
        ValueError: for dropout, for attention weights asked for, for a mask that does not fit or wants a gradient.
    """
    if dropout:
        raise ValueError(
            f"{NAME} has no dropout on attention weights, got {dropout}; set attention_dropout to 0 in the config, or "
            "select 'sdpa'."
        )
    refuse_attention_weights(module, NAME, kwargs)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    visibility = _visibility_of(check_layout(attention_mask, query, key, is_causal), query)
    settings = settings_of(module, NAME, DEFAULTS)
    output, _ = _attend_operator(
        query,
        key,
        value,
        visibility.mask,
        visibility.valid,
        visibility.segments,
        visibility.offset,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        settings.query_chunk,
        settings.key_chunk,
        torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)),
    )
    return output, None


def _visibility_of(layout: AttentionLayout | torch.Tensor | None, query: torch.Tensor) -> _Visibility:
    if layout is None:
        return _Visibility(None, None, None, None)
    if not isinstance(layout, torch.Tensor):
        return _Visibility(layout.query_offset, layout.valid, layout.segments, None)
    if layout.dtype != torch.bool and not layout.is_floating_point():
        raise ValueError(f"attention_mask must be boolean or additive in floating point, got {layout.dtype}.")
    if layout.requires_grad:
        raise ValueError(f"{NAME} gives no gradient for attention_mask; detach it, or select 'sdpa'.")
    # One row of flags may stand for all queries.
    return _Visibility(None, None, None, layout.expand(-1, -1, query.shape[2], -1))


register_attention(NAME, memory_efficient_attention_forward)


class MemoryEfficientAttention(AttentionTechnique):
    """Computes attention exactly, in chunks of queries and keys, in decoder and vision tower.

    For contexts whose masks or training activations do not fit: neither a mask nor weights of queries times keys ever
    exist, and the backward pass computes each chunk anew, so that training memory is linear in the length. Beyond the
    output a call takes about `group * query_chunk * key_chunk` numbers. Chunks past the causal frontier, of padding
    alone or of other packed sequences are not computed. Sums run in float32 (float64 for float64 inputs), which on a
    GPU is slower than FlashAttention. Dropout and attention weights are refused.

    Source: Rabe & Staats, Self-attention Does Not Need O(n^2) Memory (arXiv 2112.05682). The backward pass goes by
    the stored logarithms of the softmax sums, as in FlashAttention (arXiv 2205.14135), not by checkpoints.

    Args:
        config: accepted and not read.
        settings: the fields of [`MemoryEfficientSettings`].
    Raises:
        ValueError: for an unknown or invalid setting.
    """

    name = NAME
    exact = True
    settings_class = MemoryEfficientSettings
