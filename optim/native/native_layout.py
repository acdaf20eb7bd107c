"""Queries, keys and values of the vision tower, rotated and laid out by head in one pass over memory, on the CPU."""

import ctypes

import torch

from .native_build import load_library, takes_native
from .native_common_source import COMMON_SOURCE


# Every product is rounded before it is added, as PyTorch does it, so that results are bit-equal to the plain ones.
EXACT_FLAGS = ("-ffp-contract=off",)
LAYOUT_SOURCE = (
    COMMON_SOURCE
    + r"""
// qkv (tokens, 3, heads, dim) to out (3, heads, tokens, dim), the first two parts rotated by angles (tokens, dim / 2).
template <class T>
static void lay_out(const T *qkv, const float *cos, const float *sin, T *out, int64_t tokens, int64_t heads,
                    int64_t dim, int threads) {
  const int64_t half = dim / 2, row = 3 * heads * dim, block = 64;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t first = 0; first < tokens; first += block)
    for (int64_t part = 0; part < 3; part++)
      for (int64_t head = 0; head < heads; head++)
        for (int64_t t = first; t < std::min(tokens, first + block); t++) {
          const T *__restrict__ from = qkv + t * row + (part * heads + head) * dim;
          T *__restrict__ to = out + ((part * heads + head) * tokens + t) * dim;
          if (part == 2) {
            std::memcpy(to, from, dim * sizeof(T));
            continue;
          }
          const float *__restrict__ c = cos + t * half, *__restrict__ s = sin + t * half;
          for (int64_t i = 0; i < half; i++) {
            const float x = to_float(from[i]), y = to_float(from[half + i]);
            put(to + i, x * c[i] - y * s[i]);
            put(to + half + i, y * c[i] + x * s[i]);
          }
        }
}

extern "C" void qwen3_vl_lay_out(const void *qkv, const float *cos, const float *sin, void *out, int64_t tokens,
                                 int64_t heads, int64_t dim, int threads, int is_bf16) {
  if (is_bf16) lay_out((const bf16 *)qkv, cos, sin, (bf16 *)out, tokens, heads, dim, threads);
  else lay_out((const float *)qkv, cos, sin, (float *)out, tokens, heads, dim, threads);
}
"""
)


def layout_kernel():
    """The library, or `None`."""
    return load_library("layout", LAYOUT_SOURCE, EXACT_FLAGS)


def supports_layout(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the kernel takes these tensors; it has no backward and no place in a traced graph."""
    return (
        takes_native(qkv, cos, sin)
        and all(x.is_contiguous() for x in (qkv, cos, sin))
        and cos.dtype == sin.dtype == torch.float32
        and layout_kernel() is not None
    )


def native_layout(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rotated queries and keys, and values.

    Args:
        qkv (`torch.Tensor`): (tokens, 3, heads, D).
        cos, sin (`torch.Tensor`): (tokens, D / 2) float32.
    Returns:
        query, key, value, each (heads, tokens, D) in `qkv.dtype`.
    """
    tokens, _, heads, dim = qkv.shape
    out = torch.empty(3, heads, tokens, dim, dtype=qkv.dtype)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (qkv, cos, sin, out))
    sizes = (ctypes.c_int64(size) for size in (tokens, heads, dim))
    layout_kernel().qwen3_vl_lay_out(*pointers, *sizes, torch.get_num_threads(), qkv.dtype == torch.bfloat16)
    return out.unbind(0)
