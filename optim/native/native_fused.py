"""RMSNorm, alone or behind a residual sum, and SwiGLU on the CPU: one pass in place of one for every operation."""

from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch

from .native_build import load_library, takes_native
from .native_common_source import COMMON_SOURCE


FUSED_SOURCE = (
    COMMON_SOURCE
    + r"""
template <class T> static void add_rows(const T *x, const T *y, T *to, int64_t size) {
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) store(to + i, load(x + i) + load(y + i));
  for (; i < size; i++) put(to + i, to_float(x[i]) + to_float(y[i]));
}

// Rows of `size` elements, each divided by its root mean square; rounded to T before the weight, as PyTorch does it.
// With `residual`, rows of `size`, what is normed is `sums` = x + residual, a row of which is still in the cache.
template <class T>
static void rms_norm(const T *x, const T *residual, const T *weight, T *sums, T *out, int64_t rows, int64_t size,
                     int64_t stride, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > 32768)
  for (int64_t r = 0; r < rows; r++) {
    const T *row = x + r * stride;
    T *to = out + r * size;
    if (residual) {
      add_rows(row, residual + r * size, sums + r * size, size);
      row = sums + r * size;
    }
    v16 squares{};
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
      v16 part = load(row + i);
      squares += part * part;
    }
    float total = sum(squares);
    for (int64_t j = i; j < size; j++) total += to_float(row[j]) * to_float(row[j]);
    const float scale = 1.0f / std::sqrt(total / size + eps);
    for (i = 0; i + 16 <= size; i += 16) {
      T rounded[16];
      store(rounded, load(row + i) * scale);
      store(to + i, load(rounded) * load(weight + i));
    }
    for (; i < size; i++) {
      T rounded;
      put(&rounded, to_float(row[i]) * scale);
      put(to + i, to_float(rounded) * to_float(weight[i]));
    }
  }
}

// exp(-|x|) keeps the exponential in its range for both signs.
static inline v16 silu(v16 x) {
  const v16 e = exp2_nonpositive((x < 0.0f ? x : -x) * 1.4426950408889634f);
  return x * ((x < 0.0f ? e : splat(1.0f)) / (1.0f + e));
}

template <class T>
static void swiglu(const T *gate, const T *up, T *out, int64_t rows, int64_t size, int64_t gate_stride,
                   int64_t up_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > 32768)
  for (int64_t r = 0; r < rows; r++) {
    const T *g = gate + r * gate_stride, *u = up + r * up_stride;
    T *to = out + r * size;
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
      T rounded[16];
      store(rounded, silu(load(g + i)));
      store(to + i, load(rounded) * load(u + i));
    }
    for (; i < size; i++) {
      const float x = to_float(g[i]);
      T rounded;
      put(&rounded, x / (1.0f + std::exp(-x)));
      put(to + i, to_float(rounded) * to_float(u[i]));
    }
  }
}

// `residual` and `sums` may be null.
extern "C" void qwen3_vl_rms_norm(const void *x, const void *residual, const void *weight, void *sums, void *out,
                                  int64_t rows, int64_t size, int64_t stride, float eps, int threads, int is_bf16) {
  if (is_bf16)
    rms_norm((const bf16 *)x, (const bf16 *)residual, (const bf16 *)weight, (bf16 *)sums, (bf16 *)out, rows, size,
             stride, eps, threads);
  else
    rms_norm((const float *)x, (const float *)residual, (const float *)weight, (float *)sums, (float *)out, rows, size,
             stride, eps, threads);
}
extern "C" void qwen3_vl_swiglu(const void *gate, const void *up, void *out, int64_t rows, int64_t size,
                                int64_t gate_stride, int64_t up_stride, int threads, int is_bf16) {
  if (is_bf16) swiglu((const bf16 *)gate, (const bf16 *)up, (bf16 *)out, rows, size, gate_stride, up_stride, threads);
  else swiglu((const float *)gate, (const float *)up, (float *)out, rows, size, gate_stride, up_stride, threads);
}
"""
)


def is_silu(act_fn) -> bool:
    """Whether an activation module is SiLU, PyTorch's or that of `transformers`."""
    return type(act_fn).__name__ in ("SiLU", "SiLUActivation")


@cache
def fused_kernels() -> CDLL | None:
    """The library, or `None`."""
    library = load_library("fused", FUSED_SOURCE)
    if library is not None:  # told once, numbers need no wrapping at every call, which costs more than a short row
        library.qwen3_vl_rms_norm.argtypes = [*[c_void_p] * 5, *[c_int64] * 3, c_float, c_int, c_int]
        library.qwen3_vl_swiglu.argtypes = [*[c_void_p] * 3, *[c_int64] * 4, c_int, c_int]
    return library


def supports_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the norm takes these tensors; it has no backward and no place in a traced graph."""
    return (
        takes_native(x, weight)
        and x.dtype == weight.dtype
        and x.numel() > 0
        and x.shape[-1:] == weight.shape
        and weight.is_contiguous()
        and _row_stride(x) is not None
        and fused_kernels() is not None
    )


def native_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` (..., size) over the root mean square of its last dimension, times `weight` (size,); contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype)
    fused_kernels().qwen3_vl_rms_norm(
        x.data_ptr(), None, weight.data_ptr(), None, out.data_ptr(), *_norm_sizes(x), eps, *_kind(x)
    )
    return out


def supports_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the norm of a sum takes these tensors."""
    return (
        supports_rms_norm(x, weight)
        and takes_native(residual)
        and residual.dtype == x.dtype
        and residual.shape == x.shape
        and residual.is_contiguous()
    )


def native_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x + residual`, both (..., size), and the norm of that as [`native_rms_norm`] computes it."""
    sums, out = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    pointers = (one.data_ptr() for one in (x, residual, weight, sums, out))
    fused_kernels().qwen3_vl_rms_norm(*pointers, *_norm_sizes(x), eps, *_kind(x))
    return sums, out


def _norm_sizes(x: torch.Tensor) -> tuple[int, int, int]:
    return x.numel() // x.shape[-1], x.shape[-1], _row_stride(x)


def _kind(x: torch.Tensor) -> tuple[int, bool]:
    """Threads, and whether the elements are bfloat16."""
    return torch.get_num_threads(), x.dtype == torch.bfloat16


def supports_swiglu(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether SwiGLU takes these tensors."""
    return (
        takes_native(gate, up)
        and gate.dtype == up.dtype
        and gate.shape == up.shape
        and gate.numel() > 0
        and _row_stride(gate) is not None
        and _row_stride(up) is not None
        and fused_kernels() is not None
    )


def native_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, both (..., size) and maybe parts of one tensor; contiguous."""
    out, size = torch.empty(gate.shape, dtype=gate.dtype), gate.shape[-1]
    sizes = gate.numel() // size, size, _row_stride(gate), _row_stride(up)
    fused_kernels().qwen3_vl_swiglu(gate.data_ptr(), up.data_ptr(), out.data_ptr(), *sizes, *_kind(gate))
    return out


def _row_stride(x: torch.Tensor) -> int | None:
    """Elements from one row of the last dimension to the next, if that is one number."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    stride = None
    rows = 1
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != stride * rows:
            return None
        rows *= size
    return x.shape[-1] if stride is None else stride
