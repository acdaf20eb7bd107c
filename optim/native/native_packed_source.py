"""C++ of products with weights in packed bytes: few rows straight from the bytes, more in tiles; and unpacking.

With AVX-512 VNNI products of few rows are products of bytes: every 128 inputs are split into two signed bytes each,
fifteen bits relative to the largest of them, and multiplied with the codes as they lie; sums of whole numbers are
exact. Elsewhere a row of weights is unpacked to float32 while it is in the nearest cache. For more rows a few outputs
at a time are unpacked to the rows' own type there, and multiplied with all rows. How codes lie is said in
`packed_codes.py`. Stands behind the source of `native_linear.py`.
"""

PACKED_SOURCE = r"""
constexpr int CHUNK = 128;
constexpr int AHEAD = 8192;  // bytes that are fetched, to the second cache, before they are needed
constexpr int FEW_ROWS = 6;  // more are faster in tiles

// One weight, (outputs, inputs). Mirrored by ctypes in native_packed_linear.py.
struct Packed {
  const uint8_t *codes;        // (outputs, inputs) int8, or two int4 a byte, the even input in the low bits
  const float *row_scale;      // (outputs), of int8
  const bf16 *scale, *zero;    // (outputs, groups), of int4: weight = code * scale + zero
  int64_t bits, inputs, outputs, group;
};

static inline int64_t row_bytes(const Packed &p) { return p.inputs * p.bits / 8; }

// Sixteen bytes as whole numbers; GCC takes the vector extension's conversion apart, byte by byte.
#if defined(__AVX512F__)
static inline i16v widen(const uint8_t *p) { return (i16v)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline i16v widen(const int8_t *p) { return (i16v)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
#else
template <class B> static inline i16v widen(const B *p) {
  i16v wide;
  for (int i = 0; i < 16; i++) wide[i] = p[i];
  return wide;
}
#endif
// Sixteen signed int4 from the low or, shifted, the high bits of sixteen bytes.
static inline v16 nibbles(i16v wide, int shift) {
  return __builtin_convertvector((((wide >> shift) & 15) ^ 8) - 8, v16);
}
// Thirty-two neighbours of which `even` and `odd` hold every other one, or `first` and `second` one half each.
// With FAR they go past the caches where they lie on whole lines: unpacked matrices are larger, and a line that is
// written whole need not be read before.
template <bool FAR> static inline void put_pairs(float *to, v16 even, v16 odd) {
  for (int i = 0; i < 16; i++) to[2 * i] = even[i], to[2 * i + 1] = odd[i];
}
template <bool FAR> static inline void put_halves(float *to, v16 first, v16 second) {
  store(to, first), store(to + 16, second);
}
#if defined(__AVX512BF16__)
template <bool FAR> static inline void put_line(bf16 *to, __m512i x) {
  if (FAR && (uintptr_t)to % 64 == 0) _mm512_stream_si512((__m512i *)to, x);
  else _mm512_storeu_si512(to, x);
}
template <bool FAR> static inline void put_pairs(bf16 *to, v16 even, v16 odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
  put_line<FAR>(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
template <bool FAR> static inline void put_halves(bf16 *to, v16 first, v16 second) {
  put_line<FAR>(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
static inline void finish_writing() { _mm_sfence(); }
#else
template <bool FAR> static inline void put_pairs(bf16 *to, v16 even, v16 odd) {
  u16v e, o;
  std::memcpy(&e, &even, 64);
  std::memcpy(&o, &odd, 64);
  e = (e + 0x7fff + ((e >> 16) & 1)) >> 16;
  o = (o + 0x7fff + ((o >> 16) & 1)) & 0xffff0000u;
  e |= o;
  std::memcpy(to, &e, 64);
}
template <bool FAR> static inline void put_halves(bf16 *to, v16 first, v16 second) {
  store(to, first), store(to + 16, second);
}
static inline void finish_writing() {}
#endif

// Weights of output `n` as numbers.
template <bool FAR, class T> static void unpack_row(const Packed &p, int64_t n, T *to) {
  const uint8_t *codes = p.codes + n * row_bytes(p);
  if (p.bits == 8) {
    const float scale = p.row_scale[n];
    auto sixteen = [&](int64_t i) { return __builtin_convertvector(widen((const int8_t *)codes + i), v16) * scale; };
    int64_t i = 0;
    for (; i + 32 <= p.inputs; i += 32) put_halves<FAR>(to + i, sixteen(i), sixteen(i + 16));
    for (; i < p.inputs; i++) put(to + i, (int8_t)codes[i] * scale);
    return;
  }
  const int64_t groups = p.inputs / p.group;
  for (int64_t g = 0; g < groups; g++) {
    const float scale = to_float(p.scale[n * groups + g]), zero = to_float(p.zero[n * groups + g]);
    int64_t i = g * p.group;
    const int64_t end = i + p.group;
    for (; i + 32 <= end; i += 32) {
      const i16v x = widen(codes + i / 2);
      put_pairs<FAR>(to + i, nibbles(x, 0) * scale + zero, nibbles(x, 4) * scale + zero);
    }
    for (; i < end; i += 2) {
      const int low = ((codes[i / 2] & 15) ^ 8) - 8, high = ((codes[i / 2] >> 4) ^ 8) - 8;
      put(to + i, low * scale + zero);
      put(to + i + 1, high * scale + zero);
    }
  }
}

template <class T> static void unpack(const Packed &p, T *to, int64_t first, int64_t count, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < count; n++) unpack_row<true>(p, first + n, to + n * p.inputs);
    finish_writing();
  }
}

// Out of unpacked rows, for all widths and processors.
template <class T>
static void multiply_unpacked(const Packed &p, const T *x, const T *bias, T *out, int64_t rows, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> weights(p.inputs);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.outputs; n++) {
      unpack_row<false>(p, n, weights.data());
      for (int64_t r = 0; r < rows; r++) {
        const T *row = x + r * p.inputs;
        v16 sums{};
        int64_t i = 0;
        for (; i + 16 <= p.inputs; i += 16) sums += load(weights.data() + i) * load(row + i);
        float total = sum(sums) + (bias ? to_float(bias[n]) : 0.0f);
        for (; i < p.inputs; i++) total += weights[i] * to_float(row[i]);
        put(out + r * p.outputs + n, total);
      }
    }
  }
}

// All rows of x times N rows of weights, to N columns of `out` (rows, outputs). The weights lie `stride` apart.
template <int R, int N, class T>
static void tile(const T *x, const T *w, int64_t stride, const T *bias, T *out, int64_t inputs, int64_t outputs) {
  v16 sums[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) sums[r][n] = v16{};
  const int step = step_of(x);
  int64_t i = 0;
  for (; i + step <= inputs; i += step)
    for (int n = 0; n < N; n++)
      for (int r = 0; r < R; r++) sums[r][n] = multiply_add(sums[r][n], w + n * stride + i, x + r * stride + i);
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      float total = sum(sums[r][n]) + (bias ? to_float(bias[n]) : 0.0f);
      for (int64_t j = i; j < inputs; j++) total += to_float(w[n * stride + j]) * to_float(x[r * stride + j]);
      put(out + r * outputs + n, total);
    }
}
template <int N, class T>
static void columns(const T *x, const T *w, int64_t stride, const T *bias, T *out, int64_t rows, int64_t inputs,
                    int64_t outputs) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) tile<6, N>(x + r * stride, w, stride, bias, out + r * outputs, inputs, outputs);
  for (; r + 2 <= rows; r += 2) tile<2, N>(x + r * stride, w, stride, bias, out + r * outputs, inputs, outputs);
  for (; r < rows; r++) tile<1, N>(x + r * stride, w, stride, bias, out + r * outputs, inputs, outputs);
}

// Rows at a distance that is no power of two, so that neighbours do not fall into the same sets of a cache.
template <class T> struct Spread {
  std::vector<T> memory;
  int64_t stride;
  T *rows;
  Spread(int64_t count, int64_t inputs) {
    const int64_t line = 64 / sizeof(T);
    stride = (inputs + line - 1) / line * line + line;
    memory.resize(count * stride + line);
    rows = memory.data() + (64 - (uintptr_t)memory.data() % 64) % 64 / sizeof(T);
  }
};

// A few outputs at a time are unpacked to T, where they stay in the nearest cache for all rows.
template <class T>
static void multiply_tiles(const Packed &p, const T *x, const T *bias, T *out, int64_t rows, int threads) {
  Spread<T> given(rows, p.inputs);
  for (int64_t r = 0; r < rows; r++)
    std::memcpy(given.rows + r * given.stride, x + r * p.inputs, p.inputs * sizeof(T));
#pragma omp parallel num_threads(threads)
  {
    Spread<T> weights(OUTPUTS, p.inputs);
    const int64_t stride = weights.stride;
#pragma omp for schedule(static)
    for (int64_t g = 0; g < (p.outputs + OUTPUTS - 1) / OUTPUTS; g++) {
      int64_t n = g * OUTPUTS;
      const int64_t count = std::min<int64_t>(OUTPUTS, p.outputs - n);
      for (int64_t i = 0; i < count; i++) unpack_row<false>(p, n + i, weights.rows + i * stride);
      const T *added = bias ? bias + n : nullptr;
      if (count == OUTPUTS) {
        columns<OUTPUTS>(given.rows, weights.rows, stride, added, out + n, rows, p.inputs, p.outputs);
      } else {
        for (int64_t i = 0; i < count; i++)
          columns<1>(given.rows, weights.rows + i * stride, stride, bias ? added + i : nullptr, out + n + i, rows,
                     p.inputs, p.outputs);
      }
    }
  }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// What one row becomes: for each 128 inputs two times 64 high and 64 low bytes in the order of the codes.
struct Split {
  std::vector<int8_t> memory;
  std::vector<float> unit;     // of each chunk
  std::vector<float> sums;     // sixteen lanes a chunk: the sums of its inputs
  std::vector<int32_t> shift;  // sixteen lanes a chunk: what makes unsigned codes signed again
  int8_t *bytes;               // chunk: high of the first 64, of the second, low of the first, of the second

  template <class T> Split(const T *x, int64_t inputs, int64_t bits) {
    const int64_t chunks = inputs / CHUNK;
    memory.resize(chunks * 2 * CHUNK + 64);
    bytes = memory.data() + (64 - (uintptr_t)memory.data() % 64) % 64;
    unit.resize(chunks);
    sums.resize(chunks * 16);
    shift.resize(chunks * 16);
    for (int64_t c = 0; c < chunks; c++) chunk(x + c * CHUNK, c, bits);
  }

  template <class T> void chunk(const T *x, int64_t c, int64_t bits) {
    alignas(64) float ordered[CHUNK];
    for (int i = 0; i < CHUNK; i++) ordered[bits == 8 ? i : i / 2 + (i & 1) * 64] = to_float(x[i]);
    v16 top{};
    i16v lost{};
    for (int i = 0; i < CHUNK; i += 16) {
      const v16 v = load(ordered + i);
      top = maximum(top, maximum(v, -v));
      u16v exponent;
      std::memcpy(&exponent, &v, 64);
      lost |= (exponent & 0x7f800000u) == 0x7f800000u;
    }
    const float most = largest(top);
    const bool no_number = sum(__builtin_convertvector(lost, v16)) != 0.0f;
    int8_t *to = bytes + c * 2 * CHUNK;
    const bool dead = no_number || !(most > 1e-30f);
    const float factor = dead ? 0.0f : 16256.0f / most;
    const v16 magic = splat(12582912.0f);
    typedef int8_t s16 __attribute__((vector_size(16)));
    for (int i = 0; i < CHUNK; i += 16) {
      const v16 rounded = dead ? v16{} : (load(ordered + i) * factor + magic) - magic;
      const i16v whole = __builtin_convertvector(rounded, i16v), upper = (whole + 64) >> 7;
      const s16 high = __builtin_convertvector(upper, s16), low = __builtin_convertvector(whole - (upper << 7), s16);
      std::memcpy(to + i, &high, 16);
      std::memcpy(to + CHUNK + i, &low, 16);
    }
    // Not a number anywhere makes the whole row not a number.
    unit[c] = no_number ? std::numeric_limits<float>::quiet_NaN() : most / 16256.0f;
    const __m512i ones = _mm512_set1_epi8(1), none = _mm512_setzero_si512();
    auto lanes = [&](const int8_t *p) {
      const __m512i half = _mm512_dpbusd_epi32(none, ones, _mm512_loadu_si512(p));
      return _mm512_dpbusd_epi32(half, ones, _mm512_loadu_si512(p + 64));
    };
    const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(lanes(to), 7), lanes(to + CHUNK));
    store(sums.data() + c * 16, (v16)_mm512_cvtepi32_ps(total) * unit[c]);
    const __m512i moved = bits == 8 ? _mm512_slli_epi32(total, 7) : _mm512_slli_epi32(total, 3);
    _mm512_storeu_si512(shift.data() + c * 16, _mm512_sub_epi32(none, moved));
  }
};

// Scales of one chunk, one for each of sixteen lanes of 8 inputs.
template <int GROUPS> static inline __m512 spread(const bf16 *p) {
  if (GROUPS == 1) return _mm512_set1_ps(to_float(*p));
  uint64_t bits = 0;
  std::memcpy(&bits, p, GROUPS * 2);
  const __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(bits)), 16);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(lane, GROUPS == 2 ? 3 : 2),
                               _mm512_castps128_ps512(_mm_castsi128_ps(wide)));
}

// out (R rows) of output `n`; GROUPS int4 groups a chunk, or 0 for int8.
template <int R, int GROUPS, class T>
static void multiply_bytes(const Packed &p, const Split *x, const T *bias, T *out, int64_t n) {
  const int64_t chunks = p.inputs / CHUNK;
  const uint8_t *codes = p.codes + n * row_bytes(p);
  __m512 acc[R], zeros[R];
  for (int r = 0; r < R; r++) acc[r] = zeros[r] = _mm512_setzero_ps();
  const __m512i low_bits = _mm512_set1_epi8(15), none = _mm512_setzero_si512();
  const __m512i to_unsigned = _mm512_set1_epi8(GROUPS ? (char)0x88 : (char)0x80);
  for (int64_t c = 0; c < chunks; c++) {
    __m512i first, second;
    __m512 scale, zero;
    if (GROUPS) {
      const __m512i raw = _mm512_xor_si512(_mm512_loadu_si512(codes + c * 64), to_unsigned);
      _mm_prefetch((const char *)codes + c * 64 + AHEAD, _MM_HINT_T1);
      first = _mm512_and_si512(raw, low_bits);
      second = _mm512_and_si512(_mm512_srli_epi16(raw, 4), low_bits);
      scale = spread<GROUPS ? GROUPS : 1>(p.scale + (n * chunks + c) * GROUPS);
      zero = spread<GROUPS ? GROUPS : 1>(p.zero + (n * chunks + c) * GROUPS);
    } else {
      first = _mm512_xor_si512(_mm512_loadu_si512(codes + c * 128), to_unsigned);
      second = _mm512_xor_si512(_mm512_loadu_si512(codes + c * 128 + 64), to_unsigned);
      _mm_prefetch((const char *)codes + c * 128 + AHEAD, _MM_HINT_T1);
      _mm_prefetch((const char *)codes + c * 128 + AHEAD + 64, _MM_HINT_T1);
    }
    for (int r = 0; r < R; r++) {
      const int8_t *bytes = x[r].bytes + c * 2 * CHUNK;
      __m512i high = _mm512_dpbusd_epi32(none, first, _mm512_load_si512(bytes));
      __m512i low = _mm512_loadu_si512(x[r].shift.data() + c * 16);
      high = _mm512_dpbusd_epi32(high, second, _mm512_load_si512(bytes + 64));
      low = _mm512_dpbusd_epi32(low, first, _mm512_load_si512(bytes + 128));
      low = _mm512_dpbusd_epi32(low, second, _mm512_load_si512(bytes + 192));
      const __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low));
      const __m512 unit = _mm512_set1_ps(x[r].unit[c]);
      if (GROUPS) {
        acc[r] = _mm512_fmadd_ps(_mm512_mul_ps(value, unit), scale, acc[r]);
        zeros[r] = _mm512_fmadd_ps(_mm512_loadu_ps(x[r].sums.data() + c * 16), zero, zeros[r]);
      } else {
        acc[r] = _mm512_fmadd_ps(value, unit, acc[r]);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    const float total = _mm512_reduce_add_ps(_mm512_add_ps(acc[r], zeros[r])) * (GROUPS ? 1.0f : p.row_scale[n]);
    put(out + r * p.outputs + n, total + (bias ? to_float(bias[n]) : 0.0f));
  }
}

template <int GROUPS, class T>
static void multiply_split(const Packed &p, const T *x, const T *bias, T *out, int64_t rows, int threads) {
  std::vector<Split> split;
  split.reserve(rows);
  for (int64_t r = 0; r < rows; r++) split.emplace_back(x + r * p.inputs, p.inputs, p.bits);
  // One output after another, so that each thread reads one straight stream.
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = 0; n < p.outputs; n++)
    for (int64_t r = 0; r < rows;) {
      const int64_t left = rows - r;
      T *to = out + r * p.outputs;
      if (left >= 4) multiply_bytes<4, GROUPS>(p, split.data() + r, bias, to, n), r += 4;
      else if (left >= 2) multiply_bytes<2, GROUPS>(p, split.data() + r, bias, to, n), r += 2;
      else multiply_bytes<1, GROUPS>(p, split.data() + r, bias, to, n), r += 1;
    }
}

template <class T>
static bool multiply_fast(const Packed &p, const T *x, const T *bias, T *out, int64_t rows, int threads) {
  if (p.inputs % CHUNK) return false;
  if (p.bits == 8) multiply_split<0>(p, x, bias, out, rows, threads);
  else if (p.group == 128) multiply_split<1>(p, x, bias, out, rows, threads);
  else if (p.group == 64) multiply_split<2>(p, x, bias, out, rows, threads);
  else if (p.group == 32) multiply_split<4>(p, x, bias, out, rows, threads);
  else return false;
  return true;
}
#else
template <class T> static bool multiply_fast(const Packed &, const T *, const T *, T *, int64_t, int) { return false; }
#endif

template <class T>
static void multiply(const Packed &p, const void *x, const void *bias, void *out, int64_t rows, int threads) {
  if (rows > FEW_ROWS) multiply_tiles(p, (const T *)x, (const T *)bias, (T *)out, rows, threads);
  else if (!multiply_fast(p, (const T *)x, (const T *)bias, (T *)out, rows, threads))
    multiply_unpacked(p, (const T *)x, (const T *)bias, (T *)out, rows, threads);
}

extern "C" void qwen3_vl_packed_linear(const Packed *p, const void *x, const void *bias, void *out, int64_t rows,
                                       int threads, int is_bf16) {
  if (is_bf16) multiply<bf16>(*p, x, bias, out, rows, threads);
  else multiply<float>(*p, x, bias, out, rows, threads);
}

extern "C" void qwen3_vl_unpack(const Packed *p, void *out, int64_t first, int64_t count, int threads, int is_bf16) {
  if (is_bf16) unpack(*p, (bf16 *)out, first, count, threads);
  else unpack(*p, (float *)out, first, count, threads);
}
"""
