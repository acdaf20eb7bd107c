"""One door to the attention kernels: our own on a CPU that has a compiler, plain PyTorch elsewhere.

Both sides give the same up to rounding; which one runs depends on the tensors alone.
"""

import torch

from ..native.native_attention import has_bf16_products, native_blocks, native_decode, supports
from .attention_layout import AttentionLayout
from .block_map import BlockMap, PageMap
from .blocks_plain import plain_blocks, plain_decode


# A tile of the block kernel holds many queries; up to so many rows a KV head, one pass over the cache is faster.
DECODE_ROWS = 32
# Tiles of 32 keys at least, which no block of a map may cut.
KEY_STEP = 32


def is_decoding(query: torch.Tensor, kv_heads: int) -> bool:
    """Whether there are so few queries (B, H, T, D) that reading the keys is what takes the time."""
    return query.shape[1] // kv_heads * query.shape[2] <= DECODE_ROWS


def attend_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: AttentionLayout | None,
    scaling: float,
    page_map: PageMap | None = None,
    kv_layer=None,
) -> torch.Tensor:
    """Attention of few queries to a long history.

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        key, value (`torch.Tensor`): (B, HK, S, D), all of them, or the new ones alone where `kv_layer` is given.
        layout (`AttentionLayout`, *optional*): what a query may see; `None` for everything.
        page_map (`PageMap`, *optional*): the pages that each KV head reads; with `kv_layer`, of its page size.
        kv_layer (*optional*): a cache layer that holds the history: with `page_view` and `dense`, or with
            `attend(query, layout, scaling)`, which then does the whole and takes a `page_map` if it has `page_scores`.
    Returns:
        (B, T, H, D); zeros for queries that see nothing.
    """
    if reads_itself(kv_layer):
        chosen = {} if page_map is None else {"page_map": page_map}
        return kv_layer.attend(query, layout, scaling, **chosen)
    if supports(query, key, value) and query.shape[-1] % 16 == 0 and (layout is None or layout.segments is None):
        view = None if kv_layer is None else kv_layer.page_view()
        if page_map is not None:
            page_map.check(_whole_history(key, view))
            if view is not None and page_map.page_tokens != view.page_tokens:
                raise ValueError(
                    f"a page map of {page_map.page_tokens} tokens a page does not fit a cache of {view.page_tokens}; "
                    "make both of the same page size."
                )
        return native_decode(query, key, value, layout, scaling, page_map, view)
    if kv_layer is not None:
        key, value = kv_layer.dense()
    return plain_decode(query, key, value, layout, scaling, page_map)


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: AttentionLayout | None,
    scaling: float,
    block_map: BlockMap | None = None,
    kv_layer=None,
) -> torch.Tensor:
    """As [`attend_decode`] for many queries; blocks that `block_map` leaves out are not computed."""
    if reads_itself(kv_layer) and block_map is None:
        return kv_layer.attend(query, layout, scaling)
    if supports(query, key, value) and _native_tiles_win(query, key, layout, block_map, kv_layer):
        view = None if kv_layer is None else kv_layer.page_view()
        if block_map is not None:
            block_map.check(query, _whole_history(key, view))
        return native_blocks(query, key, value, layout, scaling, block_map, view)
    if kv_layer is not None:
        key, value = kv_layer.dense()
    return plain_blocks(query, key, value, layout, scaling, block_map)


def reads_itself(kv_layer) -> bool:
    """Whether a cache layer holds its history in a form that it alone can read, as quantized ones do."""
    return kv_layer is not None and not hasattr(kv_layer, "page_view")


def _native_tiles_win(query, key, layout, block_map, kv_layer) -> bool:
    if kv_layer is not None and kv_layer.page_view().page_tokens % KEY_STEP:
        return False
    if block_map is not None:
        return block_map.key_block % KEY_STEP == 0 and block_map.query_block % KEY_STEP == 0
    if query.dtype == torch.bfloat16 and has_bf16_products() and not torch.cpu._is_amx_tile_supported():
        return True
    # PyTorch's own kernel is as fast for float32 and faster with AMX, but needs a dense mask for anything but these.
    whole = layout is None or (layout.plainly_causal and layout.query_offset == 0 and query.shape[2] == key.shape[2])
    return not whole or kv_layer is not None


def _whole_history(key: torch.Tensor, view) -> torch.Tensor:
    """A tensor of the shape of all keys (B, HK, S, D), whose values are not to be read."""
    if view is None:
        return key
    return key.new_empty(()).expand(*key.shape[:2], view.length, key.shape[3])
