"""Attention of few queries to packed keys and values on the CPU, in one pass and without unpacking them first."""

import ctypes

import torch

from .native_attention import flag_pages, prepare_call, run_kernel, supports
from .native_build import load_library
from .native_common_source import COMMON_SOURCE
from .native_decode_source import DECODE_SOURCE
from .native_quantized_source import QUANTIZED_SOURCE


SOURCE = "#include <type_traits>\n" + COMMON_SOURCE + DECODE_SOURCE + QUANTIZED_SOURCE
MOST_VALUE_GROUPS = 16


class _Packed(ctypes.Structure):
    """`Packed` of the C++ source, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "query")),
        *((name, ctypes.c_int64) for name in ("page_stride", "record")),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("table_b", "pages", "page_tokens", "bits", "value_groups")),
    ]


def quantized_kernel():
    """The library, or `None`."""
    return load_library("quantized", SOURCE)


def supports_quantized(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, value_groups: int = 1) -> bool:
    """Whether the kernel takes queries (B, H, T, D) and unpacked keys and values of their dtype."""
    return supports(query, key, value) and value_groups <= MOST_VALUE_GROUPS and quantized_kernel() is not None


def native_quantized_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    form,
    newest: tuple[torch.Tensor, torch.Tensor],
    layout,
    scaling: float,
    turned_query: torch.Tensor | None = None,
    page_map=None,
) -> torch.Tensor:
    """Few queries against packed pages and the tokens that follow them.

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        keys, values (`torch.Tensor`): (pool pages, KV heads, group_size, token_bytes) uint8, contiguous records.
        table (`torch.Tensor`): (B, pages) int32, the pages of each row.
        form (`PackedFormat`): of the records.
        newest (`tuple`): keys and values (B, KV heads, n, D) of the tokens behind those pages, n at least 1.
        layout (`AttentionLayout`, *optional*): `None` for attention to all keys; its queries come after the pages.
        scaling (`float`): factor on the scores.
        turned_query (`torch.Tensor`, *optional*): (B, H, T, D) float32, for keys that were rotated before packing.
        page_map (`PageMap`, *optional*): the pages that each KV head reads, of `group_size`; what follows the packed
            ones is read in any case.
    Returns:
        (B, T, H, D); zeros for queries that see nothing.
    """
    call, out, keep = prepare_call(query, *newest, layout, scaling, None)
    packed_tokens = table.shape[1] * form.group_size
    call.keys += packed_tokens
    if layout is None:
        call.offset = call.keys
    # The kernel counts tokens from the first of the row on, of which these are the last.
    call.key -= packed_tokens * call.key_t * query.itemsize
    call.value -= packed_tokens * call.value_t * query.itemsize
    keep.append(flag_pages(call, page_map))
    packed, held = _describe(keys, values, table, form, turned_query)
    keep += held
    function, first_loose = quantized_kernel().qwen3_vl_quantized_decode, ctypes.c_int64(packed_tokens)
    run_kernel(lambda first: function(first, ctypes.byref(packed), first_loose), call)
    return out


def native_packed_page_scores(
    query: torch.Tensor, keys: torch.Tensor, table: torch.Tensor, form, turned_query: torch.Tensor | None = None
) -> torch.Tensor:
    """The highest score that a key of each packed page can have, (B, KV heads, pages) float32, before scaling.

    Args:
        query (`torch.Tensor`): (B, H, T, D); the highest of all queries of a KV head counts.
        keys, table, form, turned_query: as for [`native_quantized_decode`].
    """
    out = torch.empty(query.shape[0], keys.shape[1], table.shape[1])
    like = keys.new_empty((), dtype=query.dtype).expand(query.shape[0], keys.shape[1], 1, query.shape[3])
    call, _, keep = prepare_call(query, like, like, None, 1.0, None)
    packed, held = _describe(keys, keys, table, form, turned_query)
    keep += held
    function, to = quantized_kernel().qwen3_vl_packed_page_scores, ctypes.c_void_p(out.data_ptr())
    run_kernel(lambda first: function(first, ctypes.byref(packed), to), call)
    return out


def _describe(keys, values, table, form, turned_query) -> tuple[_Packed, list]:
    """The packed pages of a call, and the tensors that have to live as long."""
    table = table.contiguous()
    packed = _Packed(keys=keys.data_ptr(), values=values.data_ptr(), table=table.data_ptr(), table_b=table.shape[1])
    packed.page_stride, packed.record, packed.pages = keys.stride(0), keys.stride(1), table.shape[1]
    packed.page_tokens, packed.bits, packed.value_groups = form.group_size, form.bits, form.value_groups
    if turned_query is not None:
        turned_query = turned_query.contiguous()
        packed.query = turned_query.data_ptr()
    return packed, [keys, values, table, turned_query]
