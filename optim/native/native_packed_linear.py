"""Products with packed int8 and int4 weights on the CPU: every byte is read once."""

import ctypes

import torch

from .native_build import load_library, takes_native
from .native_linear import LINEAR_SOURCE
from .native_packed_source import PACKED_SOURCE


# Joined once: the library is looked up by it at every call.
SOURCE = LINEAR_SOURCE + PACKED_SOURCE
# More rows are faster as unpacked weights times a matrix.
MOST_PACKED_ROWS = 96


class _Packed(ctypes.Structure):
    """`Packed` of the C++ source, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "row_scale", "scale", "zero")),
        *((name, ctypes.c_int64) for name in ("bits", "inputs", "outputs", "group")),
    ]


def packed_kernel():
    """The library, or `None`."""
    return load_library("packed", SOURCE)


def supports_packed(x: torch.Tensor, weight) -> bool:
    """Whether the kernels take rows `x` (..., inputs) and this `PackedWeight`; the rows may be of any number."""
    return (
        takes_native(x)
        and weight.codes.device.type == "cpu"
        and x.shape[-1] == weight.inputs
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and packed_kernel() is not None
    )


def supports_unpack(weight, dtype: torch.dtype) -> bool:
    """Whether `native_unpack` takes a `PackedWeight` and gives this dtype."""
    return (
        dtype in (torch.float32, torch.bfloat16)
        and weight.codes.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and packed_kernel() is not None
    )


def native_packed_linear(x: torch.Tensor, weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` (..., inputs) times a `PackedWeight` (outputs, inputs), turned, plus `bias`: (..., outputs)."""
    x = x.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    out = torch.empty(*x.shape[:-1], weight.outputs, dtype=x.dtype)
    pointers = (ctypes.c_void_p(None if one is None else one.data_ptr()) for one in (x, bias, out))
    rows = ctypes.c_int64(x.numel() // weight.inputs)
    packed_kernel().qwen3_vl_packed_linear(
        ctypes.byref(_describe(weight)), *pointers, rows, torch.get_num_threads(), x.dtype == torch.bfloat16
    )
    return out


def native_unpack(weight, first: int, end: int, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows `first` to `end` of a `PackedWeight` as numbers: (end - first, inputs) of float32 or bfloat16.

    They are written to `out` if it is given, contiguous and of that shape.
    """
    out = torch.empty(end - first, weight.inputs, dtype=dtype) if out is None else out
    sizes = (ctypes.c_int64(first), ctypes.c_int64(end - first))
    packed_kernel().qwen3_vl_unpack(
        ctypes.byref(_describe(weight)),
        ctypes.c_void_p(out.data_ptr()),
        *sizes,
        torch.get_num_threads(),
        dtype == torch.bfloat16,
    )
    return out


def _describe(weight) -> _Packed:
    call = _Packed(codes=weight.codes.data_ptr(), bits=weight.bits, inputs=weight.inputs, outputs=weight.outputs)
    if weight.bits == 8:
        call.row_scale = weight.scale.data_ptr()
    else:
        call.scale, call.zero, call.group = weight.scale.data_ptr(), weight.zero.data_ptr(), weight.group_size
    return call
