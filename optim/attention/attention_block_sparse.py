"""Attention to a fixed pattern of blocks: the first tokens, the latest ones, the own picture, and text."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from .attention_exact import find_history
from .attention_flex import flex_blocks
from .attention_kernels import attend_blocks, attend_decode, is_decoding, reads_itself
from .attention_layout import AttentionLayout, check_layout, register_attention
from .attention_technique import (
    AttentionTechnique,
    refuse_attention_weights,
    refuse_dense_mask,
    refuse_dropout,
    settings_of,
)
from .block_map import (
    BlockMap,
    PageMap,
    anchor_blocks,
    any_in_block,
    blocks_of,
    remembered,
    require_count,
    visible_pairs,
)


NAME = "qwen3_vl_block_sparse"
TEXT_QUERIES = ("all", "local")
PADDING = -1


@dataclass(frozen=True)
class BlockSparseSettings:
    """What a query sees.

    Args:
        sink_tokens (`int`): first tokens of a row that everything sees; 0 for none.
        window_tokens (`int`): latest tokens that a query sees, itself among them.
        query_block, key_block (`int`): tokens in the blocks by which the pattern is cut; multiples of 128 lose
            nothing on a GPU.
        text_queries (`str`): `"all"`: text sees everything, since it is little and the answer depends on it;
            `"local"`: text sees first and latest tokens and other text, pictures only inside the window.
        short_text_tokens (`int`): a run of text that is shorter than this and stands before a picture of the same row
            belongs to that picture, as time stamps and labels do; without that, every frame of a video would count as
            text.
    Raises:
        ValueError: for a value out of range.
    """

    sink_tokens: int = 64
    window_tokens: int = 1024
    query_block: int = 128
    key_block: int = 64
    text_queries: str = "all"
    short_text_tokens: int = 16

    def __post_init__(self):
        for name in ("window_tokens", "query_block", "key_block"):
            require_count(name, getattr(self, name))
        for name in ("sink_tokens", "short_text_tokens"):
            require_count(name, getattr(self, name), least=0)
        if self.text_queries not in TEXT_QUERIES:
            raise ValueError(f"text_queries must be one of {TEXT_QUERIES}, got {self.text_queries!r}.")


DEFAULTS = BlockSparseSettings()


def block_sparse_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionLayout | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    kv_layer=None,
    visual_runs: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function behind [`BlockSparseAttention`].

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        key, value (`torch.Tensor`): (B, HK, S, D); the new tokens alone where `kv_layer` holds the history.
        attention_mask: an [`AttentionLayout`], padding flags (B, S) or `None`.
        kv_layer (*optional*): a cache layer that is read in place, see [`PagedLayer`].
        visual_runs (`torch.Tensor`, *optional*): (B, S) integers over all keys: k for a token of the row's k-th
            picture or frame, 0 for text and padding. Without it only the first and the latest tokens are seen, by
            text too.
    Returns:
        output (B, T, H, D), and `None`.
    Raises:
        ValueError: for a dense mask, dropout, attention weights asked for, or `visual_runs` of another shape.
    """
    key, value, kv_layer = find_history(key, value, kv_layer)
    keys = key.shape[2] if kv_layer is None else kv_layer.get_seq_length()
    layout = sparse_layout(NAME, module, query, key, attention_mask, dropout, is_causal, keys, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        return attend_blocks(query, key, value, None, scaling), None
    settings = settings_of(module, NAME, DEFAULTS)
    block_map = pattern_of(layout, query.shape[2], keys, visual_runs, settings, query.device)
    if is_decoding(query, key.shape[1]) and query.shape[2] <= settings.query_block:
        page_map = None if block_map is None else PageMap(block_map.mask[:, :, 0], block_map.key_block)
        if page_map is not None and kv_layer is not None and pages_of(kv_layer) != page_map.page_tokens:
            key, value = kv_layer.dense()
            kv_layer = None
        return attend_decode(query, key, value, layout, scaling, page_map, kv_layer), None
    return attend_listed(query, key, value, layout, scaling, block_map, kv_layer), None


block_sparse_attention.reads_cache_layer = True
block_sparse_attention.reads_visual_runs = True


def sparse_layout(
    name: str, module, query, key, attention_mask, dropout: float, is_causal: bool | None, keys: int, kwargs: dict
) -> AttentionLayout | None:
    """The layout of a call to a sparse implementation; `None` means that every query sees every key.

    Raises:
        ValueError: for a mask that does not fit, a dense mask, dropout, or attention weights asked for.
    """
    refuse_attention_weights(module, name, kwargs)
    refuse_dropout(name, dropout)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layout = check_layout(attention_mask, query, key, causal, keys)
    if isinstance(layout, torch.Tensor):
        refuse_dense_mask(name, layout)
    return layout


def attend_listed(query, key, value, layout, scaling: float, block_map: BlockMap | None, kv_layer=None):
    """Attention (B, T, H, D) of many queries to listed blocks, by FlexAttention on a GPU."""
    if block_map is not None and kv_layer is not None and (query.is_cuda or reads_itself(kv_layer)):
        key, value = kv_layer.dense()
        kv_layer = None
    if block_map is not None and query.is_cuda:
        return flex_blocks(query, key, value, layout, scaling, block_map)
    return attend_blocks(query, key, value, layout, scaling, block_map, kv_layer)


def pages_of(kv_layer) -> int | None:
    """Tokens in the pages that a cache layer can be read by, or `None` if it can only be read whole."""
    return kv_layer.page_tokens if hasattr(kv_layer, "page_scores") else None


register_attention(NAME, block_sparse_attention)


class BlockSparseAttention(AttentionTechnique):
    """Computes a fixed pattern of blocks in the decoder: first tokens, latest tokens, own picture or frame, text.

    Lossy: a picture does not see other pictures beyond the window. For long inputs of many pictures or frames, where
    time goes with the share of blocks kept; a row of text alone, or of one picture, stays exact. What is decoded is
    text, so with `text_queries="all"` decoding is exact and as slow. The vision tower computes exact attention.

    Sources: the pattern of sink and window is that of StreamingLLM (arXiv 2309.17453), here over a complete cache;
    blocks within a picture and global text follow the local and global tokens of Longformer (arXiv 2004.05150).

    Args:
        config: accepted and not read.
        settings: the fields of [`BlockSparseSettings`].
    Raises:
        ValueError: for an unknown or invalid setting.
    """

    name = NAME
    exact = False
    settings_class = BlockSparseSettings


def pattern_of(
    layout: AttentionLayout,
    queries: int,
    keys: int,
    visual_runs: torch.Tensor | None,
    settings: BlockSparseSettings,
    device=None,
) -> BlockMap | None:
    """The blocks of the pattern (B or 1, 1, query blocks, key blocks), or `None` if it leaves nothing out.

    Computed once for a layout and remembered with it, so once a forward.

    Raises:
        ValueError: if `visual_runs` is not (B, keys), where unused places of a preallocated cache may be missing.
    """
    seen = layout.query_offset + queries
    if visual_runs is not None and (visual_runs.ndim != 2 or visual_runs.shape[1] not in (seen, keys)):
        raise ValueError(
            f"visual_runs of shape {tuple(visual_runs.shape)} does not fit {seen} tokens; pass (batch, tokens seen + "
            "new)."
        )

    def build():
        text_sees_all = visual_runs is not None and settings.text_queries == "all"
        if text_sees_all and not bool(visual_runs[:, layout.query_offset : seen].any()):
            return visual_runs, None  # decoding, as a rule
        blocks = (queries, keys, settings.query_block, settings.key_block)
        kept = anchor_blocks(layout, *blocks, settings.sink_tokens, settings.window_tokens, device)
        if visual_runs is not None:
            runs = functional.pad(visual_runs, (0, keys - visual_runs.shape[1]))
            kept = kept | _by_modality(layout, *blocks, runs, settings)
        if bool((kept | (visible_pairs(layout, *blocks, device) == 0)).all()):
            return visual_runs, None
        return visual_runs, BlockMap(kept[:, None], settings.query_block, settings.key_block)

    # The tensor is kept with the note: as long as it lives, no other one has its number.
    return remembered(layout, (NAME, settings, queries, keys, id(visual_runs)), build)[1]


def _by_modality(layout, queries: int, keys: int, query_block: int, key_block: int, visual_runs, settings):
    """Blocks of the own picture, of text, and for text: (B, query blocks, key blocks) boolean."""
    groups = picture_groups(visual_runs, layout, settings.short_text_tokens)
    own = groups[:, layout.query_offset : layout.query_offset + queries]
    first, last = _ends_in_blocks(groups, key_block)
    own_first, own_last = _ends_in_blocks(own, query_block)
    # Pictures follow each other, so two blocks share one if their ranges overlap.
    kept = (first[:, None] <= own_last[..., None]) & (own_first[..., None] <= last[:, None])
    kept = kept | any_in_block(groups == 0, key_block)[:, None]
    if settings.text_queries == "all":
        kept = kept | any_in_block(own == 0, query_block)[..., None]
    return kept


def picture_groups(visual_runs: torch.Tensor, layout: AttentionLayout, short_text_tokens: int) -> torch.Tensor:
    """The picture that each key belongs to (B, keys): its number, 0 for text, -1 for padding.

    Runs of text below `short_text_tokens` that end at a picture take the number of that picture.
    """
    groups = visual_runs.long()
    if layout.valid is not None:
        groups = groups.masked_fill(~layout.valid, PADDING)
    parts = torch.zeros_like(groups) if layout.segments is None else layout.segments.long()
    begins = functional.pad((groups[:, 1:] != groups[:, :-1]) | (parts[:, 1:] != parts[:, :-1]), (1, 0))
    run = begins.long().cumsum(1)
    size = torch.zeros_like(run).scatter_add_(1, run, torch.ones_like(run))
    # Of the run after each one; behind the last stands padding.
    following = functional.pad(torch.zeros_like(run).scatter_(1, run, groups), (0, 1), value=PADDING)
    following_part = functional.pad(torch.zeros_like(run).scatter_(1, run, parts), (0, 1), value=PADDING)
    following, following_part = (x.gather(1, run + 1) for x in (following, following_part))
    short = (groups == 0) & (size.gather(1, run) < short_text_tokens) & (following > 0) & (following_part == parts)
    return torch.where(short, following, groups)


def _ends_in_blocks(groups: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and last picture in every block, each (B, blocks); first > last where there is none."""
    none_first = torch.iinfo(groups.dtype).max
    missing = blocks_of(groups.shape[1], block) * block - groups.shape[1]
    in_blocks = functional.pad(groups, (0, missing), value=PADDING).unflatten(1, (-1, block))
    picture = in_blocks > 0
    first = in_blocks.masked_fill(~picture, none_first).amin(-1)
    return first, in_blocks.masked_fill(~picture, 0).amax(-1)
