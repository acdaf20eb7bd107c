"""Attention on the CPU by our own kernels: a pass over the cache for few queries, listed blocks for many.

The first follows FlashDecoding (Dao et al., 2023): each thread takes a part of the keys, the parts are merged by their
log-sum-exp, and the query heads of a KV head share every key that is read. The second follows FlashAttention 2
(arXiv 2307.08691), with the blocks to visit given by a map.
"""

import ctypes

import torch

from .native_blocks_source import BLOCKS_SOURCE
from .native_build import load_library, takes_native
from .native_common_source import COMMON_SOURCE
from .native_decode_source import DECODE_SOURCE


# Joined once: the library is looked up by it at every call.
ATTENTION_SOURCE = COMMON_SOURCE + DECODE_SOURCE + BLOCKS_SOURCE
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_STRIDES = tuple(f"{name}_{axis}" for name in ("query", "key", "value", "out") for axis in "bht")
_SIZES = ("batch", "heads", "kv_heads", "queries", "keys", "dim", "offset")
_OPTIONS = ("causal", "query_block", "key_block", "threads", "is_bf16")


class _Call(ctypes.Structure):
    """`Call` of the C++ source, field for field."""

    _fields_ = [
        *((name, _POINTER) for name in ("query", "key", "value", "out")),
        *((name, _LONG) for name in _STRIDES),
        *((name, _POINTER) for name in ("valid", "segments", "map")),
        *((name, _LONG) for name in ("map_b", "map_h", "map_row")),
        ("table", _POINTER),
        ("table_b", _LONG),
        ("places", _POINTER),
        ("page_tokens", _LONG),
        *((name, _LONG) for name in (*_SIZES, *_OPTIONS)),
        ("scaling", ctypes.c_float),
    ]


def kernels():
    """The library, or `None`."""
    return load_library("attention", ATTENTION_SOURCE)


def has_bf16_products() -> bool:
    """Whether tiles of bfloat16 are multiplied as such (AVX-512 BF16) and not widened first."""
    library = kernels()
    return library is not None and bool(library.qwen3_vl_has_bf16_products())


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernels take these tensors; they have no backward and no place in a traced graph."""
    tensors = (query, key, value)
    return (
        takes_native(*tensors)
        and all(x.stride(-1) == 1 for x in tensors)
        and key.dtype == value.dtype == query.dtype
        and value.shape == key.shape
        and kernels() is not None
    )


def native_decode(query, key, value, layout, scaling: float, page_map=None, view=None) -> torch.Tensor:
    """Few queries against many keys.

    Args:
        query (`torch.Tensor`): (B, H, T, D), D a multiple of 16.
        key, value (`torch.Tensor`): (B, HK, S, D), any strides but the last; not read where `view` is given.
        layout (`AttentionLayout`, *optional*): `None` for attention to all keys.
        page_map (`PageMap`, *optional*): the pages of keys that each KV head reads.
        view (`PageView`, *optional*): the paged storage of keys and values.
    Returns:
        (B, T, H, D); zeros for queries that see nothing.
    """
    call, out, keep = prepare_call(query, key, value, layout, scaling, view)
    keep.append(flag_pages(call, page_map))
    run_kernel(kernels().qwen3_vl_decode, call)
    return out


def native_blocks(
    query, key, value, layout, scaling: float, block_map=None, view=None, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Many queries, tile by tile; blocks that `block_map` leaves out are not computed. Arguments as above, any D.

    With `places` (B, T), int64 and rising in each row, query t stands at key `places[:, t]`, whatever the offset of
    the layout is.
    """
    call, out, keep = prepare_call(query, key, value, layout, scaling, view)
    if places is not None:
        places = places.contiguous()
        keep.append(places)
        call.places = places.data_ptr()
    if block_map is not None:
        flags = block_map.mask.contiguous()
        keep.append(flags)
        call.map, call.map_b, call.map_h = flags.data_ptr(), *(_step(flags, axis) for axis in (0, 1))
        call.map_row, call.query_block, call.key_block = flags.shape[3], block_map.query_block, block_map.key_block
    run_kernel(kernels().qwen3_vl_blocks, call)
    return out


def native_page_scores(
    query: torch.Tensor, low: torch.Tensor, high: torch.Tensor, table: torch.Tensor | None = None
) -> torch.Tensor:
    """The highest score that a key of each page can have, (B, HK, pages) float32, before scaling.

    Args:
        query (`torch.Tensor`): (B, H, T, D), D a multiple of 16; the highest of all queries of a KV head counts.
        low, high (`torch.Tensor`): bounds of each page's keys with equal strides: (B, HK, pages, D), or with `table`
            (pool pages, HK, D).
        table (`torch.Tensor`, *optional*): (B, pages) int32, contiguous: where each page of a row lies.
    """
    (batch, heads, queries, dim), kv_heads = query.shape, low.shape[1]
    pages, axes = (low.shape[2], (0, 1, 2)) if table is None else (table.shape[1], (1, 1, 0))
    out = torch.empty(batch, kv_heads, pages)
    pointers = (_POINTER(None if x is None else x.data_ptr()) for x in (query, low, high, table, out))
    strides = (_LONG * 3)(*query.stride()[:3]), (_LONG * 3)(*(low.stride(axis) for axis in axes))
    sizes = (_LONG(size) for size in (batch, heads, kv_heads, queries, pages, dim))
    kernels().qwen3_vl_page_scores(*pointers, *strides, *sizes, torch.get_num_threads(), query.dtype == torch.bfloat16)
    return out


def flag_pages(call: _Call, page_map) -> torch.Tensor | None:
    """Has a call read the pages of a `PageMap`, if there is one; returns what has to live as long as the call."""
    if page_map is None:
        return None
    flags = page_map.mask.contiguous()
    call.map, call.map_b, call.map_h = flags.data_ptr(), *(_step(flags, axis) for axis in (0, 1))
    call.page_tokens = page_map.page_tokens
    return flags


def _step(flags: torch.Tensor, axis: int) -> int:
    """Stride of a dimension, 0 where one entry stands for all."""
    return flags.stride(axis) if flags.shape[axis] > 1 else 0


def prepare_call(query, key, value, layout, scaling, view):
    batch, heads, queries, dim = query.shape
    out = torch.empty(batch, queries, heads, dim, dtype=query.dtype)
    call = _Call(out=out.data_ptr(), query=query.data_ptr(), page_tokens=64, query_block=64, key_block=64)
    call.query_b, call.query_h, call.query_t = query.stride()[:3]
    call.out_b, call.out_t, call.out_h = out.stride()[:3]
    keep = [query, key, value, out]
    if view is None:
        call.kv_heads, call.keys = key.shape[1:3]
    else:
        key, value, table = view.keys, view.values, view.table
        keep += [key, value, table]
        call.kv_heads, call.keys = key.shape[1], view.length
        call.table, call.table_b, call.page_tokens = table.data_ptr(), table.stride(0), view.page_tokens
    call.key, call.value = key.data_ptr(), value.data_ptr()
    call.key_b, call.key_h, call.key_t = key.stride()[:3]
    call.value_b, call.value_h, call.value_t = value.stride()[:3]
    call.batch, call.heads, call.queries, call.dim = batch, heads, queries, dim
    call.is_bf16, call.threads, call.scaling = query.dtype == torch.bfloat16, torch.get_num_threads(), scaling
    if layout is None:
        call.offset = call.keys  # nothing is later than the first query
    else:
        call.causal, call.offset = 1, layout.query_offset
        if layout.valid is not None:
            valid = layout.valid.contiguous()
            keep.append(valid)
            call.valid = valid.data_ptr()
        if layout.segments is not None:
            segments = layout.segments.contiguous()
            keep.append(segments)
            call.segments = segments.data_ptr()
    return call, out, keep


def run_kernel(function, call: _Call) -> None:
    if function(ctypes.byref(call)):
        raise MemoryError("the attention kernel could not get its working memory; use a shorter input or free some.")
