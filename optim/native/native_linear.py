"""Matrix products of few rows on the CPU, which are bound by reading the weights: every weight is read once."""

import ctypes

import torch

from .native_build import load_library, takes_native
from .native_common_source import COMMON_SOURCE


MOST_ROWS = 8
LINEAR_SOURCE = (
    COMMON_SOURCE
    + r"""
constexpr int OUTPUTS = 4;  // weight rows at a time, which share what is loaded of the input

// Elements of one step, and their products added to sixteen sums.
static inline v16 multiply_add(v16 sums, const float *w, const float *x) { return sums + load(w) * load(x); }
static constexpr int step_of(const float *) { return 16; }
#if defined(__AVX512BF16__)
static inline v16 multiply_add(v16 sums, const bf16 *w, const bf16 *x) {
  return (v16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(x));
}
static constexpr int step_of(const bf16 *) { return 32; }
#else
static inline v16 multiply_add(v16 sums, const bf16 *w, const bf16 *x) { return sums + load(w) * load(x); }
static constexpr int step_of(const bf16 *) { return 16; }
#endif

// out (R, outputs) = x (R, inputs) times the rows [first, first + N) of weight (outputs, inputs), turned, plus bias.
template <int R, int N, class T>
static void few_outputs(const T *x, const T *weight, const T *bias, T *out, int64_t first, int64_t inputs,
                        int64_t outputs) {
  v16 sums[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) sums[r][n] = v16{};
  const int step = step_of(x);
  int64_t i = 0;
  for (; i + step <= inputs; i += step)
    for (int n = 0; n < N; n++) {
      const T *w = weight + (first + n) * inputs + i;
      __builtin_prefetch(w + N * inputs, 0, 2);  // what comes next, to the second cache: 1.2 times as fast
      for (int r = 0; r < R; r++) sums[r][n] = multiply_add(sums[r][n], w, x + r * inputs + i);
    }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      float total = sum(sums[r][n]) + (bias ? to_float(bias[first + n]) : 0.0f);
      for (int64_t j = i; j < inputs; j++)
        total += to_float(weight[(first + n) * inputs + j]) * to_float(x[r * inputs + j]);
      put(out + r * outputs + first + n, total);
    }
}

template <int R, class T>
static void product(const T *x, const T *weight, const T *bias, T *out, int64_t inputs, int64_t outputs, int threads) {
  const int64_t groups = (outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t g = 0; g < groups; g++) {
    int64_t first = g * OUTPUTS, end = std::min(outputs, first + OUTPUTS);
    if (end - first == OUTPUTS) few_outputs<R, OUTPUTS>(x, weight, bias, out, first, inputs, outputs);
    else
      for (; first < end; first++) few_outputs<R, 1>(x, weight, bias, out, first, inputs, outputs);
  }
}

template <class T>
static void linear(const T *x, const T *weight, const T *bias, T *out, int64_t rows, int64_t inputs, int64_t outputs,
                   int threads) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r;
    if (left >= 4) product<4>(x + r * inputs, weight, bias, out + r * outputs, inputs, outputs, threads), r += 4;
    else if (left >= 2) product<2>(x + r * inputs, weight, bias, out + r * outputs, inputs, outputs, threads), r += 2;
    else product<1>(x + r * inputs, weight, bias, out + r * outputs, inputs, outputs, threads), r += 1;
  }
}

extern "C" void qwen3_vl_linear(const void *x, const void *weight, const void *bias, void *out, int64_t rows,
                                int64_t inputs, int64_t outputs, int threads, int is_bf16) {
  if (is_bf16)
    linear((const bf16 *)x, (const bf16 *)weight, (const bf16 *)bias, (bf16 *)out, rows, inputs, outputs, threads);
  else
    linear((const float *)x, (const float *)weight, (const float *)bias, (float *)out, rows, inputs, outputs, threads);
}
"""
)


def linear_kernel():
    """The library, or `None`."""
    return load_library("linear", LINEAR_SOURCE)


def supports_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the kernel takes these tensors; it has no backward and no place in a traced graph."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        takes_native(*tensors)
        and 0 < x.numel() <= MOST_ROWS * weight.shape[1]
        and x.shape[-1] == weight.shape[1]
        and all(one.dtype == x.dtype and one.is_contiguous() for one in tensors)
        and not torch.is_autocast_enabled("cpu")
        and linear_kernel() is not None
    )


def native_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` (..., inputs) times `weight` (outputs, inputs), turned, plus `bias`: (..., outputs), summed in float32."""
    outputs, inputs = weight.shape
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    pointers = (ctypes.c_void_p(None if one is None else one.data_ptr()) for one in (x, weight, bias, out))
    sizes = (ctypes.c_int64(size) for size in (x.numel() // inputs, inputs, outputs))
    linear_kernel().qwen3_vl_linear(*pointers, *sizes, torch.get_num_threads(), x.dtype == torch.bfloat16)
    return out
