"""C++ that the kernels share: vectors, one call's description, and where its keys lie.

The kernels are kept as text, since a Hub copy can carry Python modules alone. They are written with the vector
extensions of GCC and Clang, so that one source serves AVX-512, AVX2 and NEON; only the bfloat16 dot product of AVX-512
has a path of its own. Softmax statistics and sums are float32 everywhere.
"""

COMMON_SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16v __attribute__((vector_size(64)));
typedef uint32_t u16v __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint16_t bf16;

// One call. Strides count elements, the innermost dimension is contiguous. Mirrored by ctypes in native_attention.py.
struct Call {
  const void *query, *key, *value;
  void *out;
  int64_t query_b, query_h, query_t;
  int64_t key_b, key_h, key_t;
  int64_t value_b, value_h, value_t;
  int64_t out_b, out_h, out_t;
  const uint8_t *valid;       // (B, S) or null
  const int32_t *segments;    // (B, S) or null
  const uint8_t *map;         // block flags (B, H, query blocks, key blocks), page flags (B, HK, pages), or null
  int64_t map_b, map_h, map_row;
  const int32_t *table;       // (B, pages): where each page of a row lies in a paged key and value storage, or null
  int64_t table_b;
  const int64_t *places;      // (B, queries), rising: the key at which each query stands; null where offset says it
  int64_t page_tokens;        // of `table` and of page flags
  int64_t batch, heads, kv_heads, queries, keys, dim, offset;
  int64_t causal, query_block, key_block, threads, is_bf16;
  float scaling;
};

static const float NEG = -std::numeric_limits<float>::infinity();

static inline v16 splat(float x) { return v16{} + x; }
static inline v16 load(const float *p) { v16 x; std::memcpy(&x, p, 64); return x; }
static inline v16 load(const bf16 *p) {
  h16 x;
  std::memcpy(&x, p, 32);
  u16v wide = __builtin_convertvector(x, u16v) << 16;
  v16 y;
  std::memcpy(&y, &wide, 64);
  return y;
}
static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
static inline bf16 to_bf16(float x) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline void put(float *to, float x) { *to = x; }
static inline void put(bf16 *to, float x) { *to = x != x ? 0x7fc0 : to_bf16(x); }  // NaN stays NaN
static inline void store(float *p, v16 x) { std::memcpy(p, &x, 64); }
static inline void store(bf16 *p, v16 x) {
  u16v bits;
  std::memcpy(&bits, &x, 64);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if defined(__AVX512F__)  // GCC takes the vector extension's conversion apart
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)bits));
#else
  h16 y = __builtin_convertvector(bits, h16);
  std::memcpy(p, &y, 32);
#endif
}
static inline float sum(v16 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s = 0;
  for (int i = 0; i < 16; i++) s += x[i];
  return s;
#endif
}
static inline float largest(v16 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < 16; i++) m = std::max(m, x[i]);
  return m;
#endif
}
static inline v16 maximum(v16 a, v16 b) {
#if defined(__AVX512F__)
  return (v16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
// 2**x for x <= 0, to 1e-7 of the value; below -126 it is 0, and NaN stays.
static inline v16 exp2_nonpositive(v16 x) {
  i16v dead = x < -126.0f, number = x == x;
  v16 given = x;
  x = maximum(x, splat(-126.0f));
  v16 magic = splat(12582912.0f);
  v16 whole = (x + magic) - magic;
  v16 f = x - whole;
  v16 p = splat(1.533757750e-4f);  // least squares of relative error on [-1/2, 1/2]
  p = p * f + 1.339985989e-3f;
  p = p * f + 9.618519805e-3f;
  p = p * f + 5.550329015e-2f;
  p = p * f + 2.402264625e-1f;
  p = p * f + 6.931471825e-1f;
  p = p * f + 1.0f;
  i16v power = (__builtin_convertvector(whole, i16v) + 127) << 23;
  v16 scale;
  std::memcpy(&scale, &power, 64);
  v16 y = p * scale;
  return dead ? v16{} : number ? y : given;
}

static int thread_count(const Call &c) {
#ifdef _OPENMP
  return std::max<int64_t>(1, c.threads);
#else
  return 1;
#endif
}
static int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Where token `t` of row `b` and KV head `h` lies; a run of tokens inside a page is contiguous by `stride_t`.
template <class T>
static inline const T *token(const Call &c, const void *base, int64_t sb, int64_t sh, int64_t st, int64_t b, int64_t h,
                             int64_t t) {
  const T *p = (const T *)base + h * sh;
  if (!c.table) return p + b * sb + t * st;
  return p + (int64_t)c.table[b * c.table_b + t / c.page_tokens] * sb + (t % c.page_tokens) * st;
}
"""
