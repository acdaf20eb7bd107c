"""Attention to the blocks that content asks for: the settings, the attention function and the technique."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from .attention_block_sparse import attend_listed, pages_of, sparse_layout
from .attention_exact import find_history
from .attention_kernels import attend_blocks, attend_decode, is_decoding, reads_itself
from .attention_layout import AttentionLayout, register_attention
from .attention_technique import AttentionTechnique, attention_modules, settings_of
from .block_map import BlockMap, PageMap, blocks_of, remembered, require_count
from .block_selection import antidiagonal_mass, page_bounds, pooled_mass, select_blocks, select_pages
from .page_scores import page_scores


NAME = "qwen3_vl_dynamic_sparse"
SCORINGS = ("antidiagonal", "pooled")
# Up to so many new tokens, each picks pages of its own: what an assistant drafts is judged as if it came one by one.
DECODE_QUERIES = 8


@dataclass(frozen=True)
class DynamicSparseSettings:
    """How much is kept, and how it is found.

    Args:
        threshold (`float`, or one a head): share of the estimated attention mass that the key blocks of a query block
            cover, over 0 up to 1. At 1 everything is computed, in decoding too, and the result is exact; at 1 for some
            heads, all blocks of these.
        min_blocks (`int`): key blocks that a query block keeps at least.
        window_tokens (`int`): latest tokens that a query always sees; the first block or page is always kept too.
        scoring (`str`): `"antidiagonal"`: every `stride`-th antidiagonal of a block is summed (XAttention);
            `"pooled"`: the mean query meets the mean key, cheaper and blind to single tokens (MInference).
        stride (`int`): distance of the antidiagonals, a divisor of both blocks; the cost goes with its inverse.
        query_block, key_block (`int`): tokens in the blocks; multiples of 128 lose nothing on a GPU.
        decode_share (`float`, or one a KV head): share of the pages that is read when decoding, over 0 up to 1.
        min_pages (`int`): pages that are read at least.
        page_tokens (`int`): keys in a page; a cache in pages brings its own size.
        dense_below_tokens (`int`): up to so many keys everything is computed.
    Raises:
        ValueError: for a value out of range.
    """

    threshold: float | tuple[float, ...] = 0.9
    min_blocks: int = 8
    window_tokens: int = 256
    scoring: str = "antidiagonal"
    stride: int = 16
    query_block: int = 128
    key_block: int = 64
    decode_share: float | tuple[float, ...] = 0.125
    min_pages: int = 16
    page_tokens: int = 64
    dense_below_tokens: int = 2048

    def __post_init__(self):
        for name in ("min_blocks", "window_tokens", "stride", "query_block", "key_block", "min_pages", "page_tokens"):
            require_count(name, getattr(self, name))
        require_count("dense_below_tokens", self.dense_below_tokens, least=0)
        for name in ("threshold", "decode_share"):
            share = getattr(self, name)
            if isinstance(share, list):
                object.__setattr__(self, name, tuple(share))
            if not share or not all(map(_is_share, share if isinstance(share, list | tuple) else (share,))):
                raise ValueError(
                    f"{name} must be a share over 0 and up to 1, got {share!r}; one for all or one a head."
                )
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {SCORINGS}, got {self.scoring!r}.")
        if self.scoring == "antidiagonal" and (self.query_block % self.stride or self.key_block % self.stride):
            raise ValueError(
                f"stride {self.stride} does not divide query_block {self.query_block} and key_block {self.key_block}; "
                "choose a common divisor, or scoring='pooled'."
            )

    @property
    def computes_everything(self) -> bool:
        shares = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        return all(share == 1 for share in shares)


def _is_share(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


DEFAULTS = DynamicSparseSettings()


class Computed(NamedTuple):
    """What the last call of a layer computed: a map, or `None` for everything, and the call it belongs to."""

    kept: BlockMap | PageMap | None
    layout: AttentionLayout
    queries: int
    keys: int

    def density(self) -> float:
        if self.kept is None:
            return 1.0
        return self.kept.density(self.layout, self.queries, self.keys).item()


def dynamic_sparse_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionLayout | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    kv_layer=None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function behind [`DynamicSparseAttention`].

    Without a cache layer decoding reads every key to find the bounds of pages, which takes longer than exact
    attention: use a paged or a quantized cache. One that is read in place but has no pages, as the tiered one, is
    decoded exactly.

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        key, value (`torch.Tensor`): (B, HK, S, D); the new tokens alone where `kv_layer` holds the history.
        attention_mask: an [`AttentionLayout`], padding flags (B, S) or `None`.
        kv_layer (*optional*): a cache layer that is read in place, by pages if it has `page_scores`: see
            [`PagedLayer`] and [`QuantizedLayer`].
    Returns:
        output (B, T, H, D), and `None`.
    Raises:
        ValueError: for a dense mask, dropout, or attention weights asked for.
    """
    key, value, kv_layer = find_history(key, value, kv_layer)
    keys = key.shape[2] if kv_layer is None else kv_layer.get_seq_length()
    layout = sparse_layout(NAME, module, query, key, attention_mask, dropout, is_causal, keys, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        return attend_blocks(query, key, value, None, scaling), None
    settings = settings_of(module, NAME, DEFAULTS)
    attend = _decode if query.shape[2] <= DECODE_QUERIES and layout.segments is None else _prefill
    output, module.last_computed = attend(query, key, value, layout, scaling, settings, keys, kv_layer)
    return output, None


dynamic_sparse_attention.reads_cache_layer = True


def _prefill(query, key, value, layout, scaling, settings: DynamicSparseSettings, keys: int, kv_layer):
    """Attention (B, T, H, D) and what was computed."""
    queries, block_map = query.shape[2], None
    # A few rows read packed entries as they are, in less time than it takes to unpack them.
    in_place = reads_itself(kv_layer) and is_decoding(query, key.shape[1])
    if layout.query_offset + queries > settings.dense_below_tokens and not settings.computes_everything | in_place:
        if kv_layer is not None:
            key, value = kv_layer.dense()
            kv_layer = None
        block_map = choose_blocks(query, key, layout, scaling, settings)
    output = attend_listed(query, key, value, layout, scaling, block_map, kv_layer)
    return output, Computed(block_map, layout, queries, keys)


def choose_blocks(query, key, layout: AttentionLayout, scaling: float, settings: DynamicSparseSettings) -> BlockMap:
    """The blocks that are computed for `query` (B, H, T, D) and `key` (B, HK, S, D)."""
    mass = estimate_mass(query, key, layout, scaling, settings)
    blocks = query.shape[2], key.shape[2], settings.query_block, settings.key_block
    floor = settings.min_blocks, settings.window_tokens
    if not isinstance(settings.threshold, tuple):
        return select_blocks(mass, layout, *blocks, settings.threshold, *floor)
    _require_one_each("threshold", settings.threshold, query.shape[1], "heads")
    threshold = torch.tensor(settings.threshold, dtype=mass.dtype, device=mass.device)[:, None, None]
    block_map = select_blocks(mass, layout, *blocks, threshold, *floor)
    # Blocks without estimated mass add nothing to a sum that has to reach 1.
    return replace(block_map, mask=block_map.mask | (threshold == 1))


def estimate_mass(query, key, layout: AttentionLayout, scaling: float, settings: DynamicSparseSettings):
    """The estimated attention mass (B, H, query blocks, key blocks) by which blocks are chosen."""
    blocks = settings.query_block, settings.key_block
    if settings.scoring == "pooled":
        return pooled_mass(query, key, layout, scaling, *blocks)
    return antidiagonal_mass(query, key, layout, scaling, *blocks, settings.stride)


def _decode(query, key, value, layout, scaling, settings: DynamicSparseSettings, keys: int, kv_layer):
    """Attention (B, T, H, D), every query with pages of its own, and what was computed for the last one."""
    queries = query.shape[2]
    page_tokens = settings.page_tokens if kv_layer is None else pages_of(kv_layer)
    if page_tokens is None or pages_to_read(layout.query_offset + queries, page_tokens, settings) is None:
        output = attend_decode(query, key, value, layout, scaling, None, kv_layer)
        return output, Computed(None, layout, queries, keys)
    if isinstance(settings.decode_share, tuple):
        _require_one_each("decode_share", settings.decode_share, key.shape[1], "KV heads")
    bounds = page_bounds(key, layout, page_tokens) if kv_layer is None else None
    outputs = []
    for index in range(queries):
        own, page_map = query[:, :, index : index + 1], None
        step = layout if index == 0 else remembered(layout, ("step", index), partial(_later, layout, index))
        kept = pages_to_read(step.query_offset + 1, page_tokens, settings)
        if kept is not None:
            scores = page_scores(own, *bounds) if kv_layer is None else kv_layer.page_scores(own)
            window = max(settings.window_tokens, _tokens_in_full(kv_layer, step.query_offset + 1))
            page_map = select_pages(scores, 1, step, keys, page_tokens, kept, window)
        outputs.append(attend_decode(own, key, value, step, scaling, page_map, kv_layer))
    return torch.cat(outputs, dim=1), Computed(page_map, step, 1, keys)


def pages_to_read(seen: int, page_tokens: int, settings: DynamicSparseSettings) -> int | tuple[int, ...] | None:
    """How many pages a query reads that sees so many keys, one number or one for each KV head; `None` for all."""
    if seen <= settings.dense_below_tokens or settings.computes_everything:
        return None
    pages = blocks_of(seen, page_tokens)
    if isinstance(settings.decode_share, tuple):
        kept = tuple(max(settings.min_pages, math.ceil(share * pages)) for share in settings.decode_share)
        return kept if min(kept) < pages else None
    kept = max(settings.min_pages, math.ceil(settings.decode_share * pages))
    return kept if kept < pages else None


def _tokens_in_full(kv_layer, seen: int) -> int:
    """The latest of `seen` tokens that are read in any case, since a cache keeps them beside its pages."""
    return kv_layer.tokens_in_full(seen) if hasattr(kv_layer, "tokens_in_full") else 0


def _require_one_each(name: str, shares: tuple, heads: int, kind: str) -> None:
    if len(shares) != heads:
        raise ValueError(f"{name} has {len(shares)} shares for {heads} {kind}; pass one for each, or one for all.")


def _later(layout: AttentionLayout, steps: int) -> AttentionLayout:
    return replace(layout, query_offset=layout.query_offset + steps)


register_attention(NAME, dynamic_sparse_attention)


class DynamicSparseAttention(AttentionTechnique):
    """Computes the blocks of keys that hold most of the attention, chosen by content for each head and query block.

    Lossy. For long inputs: up to `dense_below_tokens` everything is computed. Prefill keeps key blocks up to a share
    of the estimated mass; decoding reads the pages whose bounds promise the highest scores, which needs a cache that
    keeps the bounds: a paged one, or a quantized one, whose scales are bounds. Over a cache that is read in place but
    not by pages, as the tiered one, decoding is exact. Queries of one block choose together, so a query may see other
    blocks when later tokens of its own block change; tokens of later blocks never matter. The vision tower computes
    exact attention.

    Sources: MInference 1.0 (arXiv 2407.02490) and XAttention (arXiv 2503.16428) for prefill, without their offline
    search for a pattern or a threshold per head; Quest (arXiv 2406.10774) for decoding, with one choice for the
    query heads that share a KV head.

    Args:
        config: accepted and not read.
        settings: the fields of [`DynamicSparseSettings`].
    Raises:
        ValueError: for an unknown or invalid setting.
    """

    name = NAME
    exact = False
    settings_class = DynamicSparseSettings

    def revert(self, model) -> None:
        super().revert(model)
        for module in attention_modules(model):
            vars(module).pop("last_computed", None)

    @staticmethod
    def last_density(model) -> list[float]:
        """Share of the allowed (query, key) pairs that each decoder layer computed in its last call, in their order.

        Empty if no layer ran under this name.
        """
        modules = attention_modules(model)
        return [module.last_computed.density() for module in modules if hasattr(module, "last_computed")]
