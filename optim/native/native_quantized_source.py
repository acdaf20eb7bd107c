"""C++ of attention for few queries to packed keys and values, straight from their bytes.

A page's scales and zeros are folded into the query, and those of values into the probabilities, so that what is left
are products of a vector with small whole numbers. For bfloat16 inputs and with AVX-512 VNNI these are products of
bytes: the vector is split into two signed bytes an entry, fifteen bits relative to its largest, which is more than
bfloat16 has. Elsewhere codes are widened to float32. How codes lie is said in `kv_quantization.py`.
"""

QUANTIZED_SOURCE = r"""
// Where packed pages lie. Strides count bytes. Mirrored by ctypes in native_quantized.py.
struct Packed {
  const uint8_t *keys, *values;  // (pool pages, KV heads, record)
  const float *query;            // (B, H, T, D), rotated as the keys are, or null if they are not
  int64_t page_stride, record;
  const int32_t *table;          // (B, pages)
  int64_t table_b, pages, page_tokens, bits, value_groups;
};

typedef int8_t b16 __attribute__((vector_size(16)));
constexpr int TASK_PAGES = 8, MOST_GROUPS = 16;

static inline u16v load_codes(const uint8_t *p) { u16v x; std::memcpy(&x, p, 64); return x; }

// out[r][lane...] += sum over a of weights[r][a] * code[a][lane], for W vectors of sixteen lanes; codes as float32.
template <int R, int BITS, int W>
static void add_product(const uint8_t *packed, const uint8_t *next, int quads, int lanes, int at,
                        const float *const *weights, float *const *out) {
  constexpr int PLANES = 8 / BITS;
  constexpr uint32_t MASK = (1 << BITS) - 1;
  v16 acc[R][W];
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) acc[r][w] = load(out[r] + at + 16 * w);
  for (int q = 0; q < quads; q++) {
    const int64_t here = ((int64_t)q * lanes + at) * 4;
    for (int w = 0; w < W; w++) {
      __builtin_prefetch(next + here + 64 * w);
      u16v raw = load_codes(packed + here + 64 * w);
      for (int plane = 0; plane < PLANES; plane++)
        for (int k = 0; k < 4; k++) {
          v16 code = __builtin_convertvector((i16v)((raw >> (8 * k + BITS * plane)) & MASK), v16);
          const int a = (plane * quads + q) * 4 + k;
          for (int r = 0; r < R; r++) acc[r][w] += code * weights[r][a];
        }
    }
  }
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) store(out[r] + at + 16 * w, acc[r][w]);
}

// Weights for the products of one page: float32, or bytes with their unit.
template <int R> struct Weights {
  const float *rows[R];
  const int8_t *high[R], *low[R];
  float unit[R];
};

#if defined(__AVX512VNNI__)
static inline __m512i spread(const int8_t *p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
template <int R, int BITS, int W>
static void add_byte_product(const uint8_t *packed, const uint8_t *next, int quads, int lanes, int at,
                             const Weights<R> &weights, float *const *out) {
  constexpr int PLANES = 8 / BITS;
  const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
  __m512i high[R][W], low[R][W];
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) high[r][w] = low[r][w] = _mm512_setzero_si512();
  for (int q = 0; q < quads; q++) {
    const int64_t here = ((int64_t)q * lanes + at) * 4;
    __m512i raw[W];
    for (int w = 0; w < W; w++) {
      _mm_prefetch((const char *)next + here + 64 * w, _MM_HINT_T0);
      raw[w] = _mm512_loadu_si512(packed + here + 64 * w);
    }
    for (int plane = 0; plane < PLANES; plane++) {
      const int a = (plane * quads + q) * 4;
      __m512i codes[W];
      for (int w = 0; w < W; w++)
        codes[w] = BITS == 8 ? raw[w] : _mm512_and_si512(_mm512_srli_epi16(raw[w], BITS * plane), mask);
      for (int r = 0; r < R; r++) {
        const __m512i h = spread(weights.high[r] + a), l = spread(weights.low[r] + a);
        for (int w = 0; w < W; w++) {
          high[r][w] = _mm512_dpbusd_epi32(high[r][w], codes[w], h);
          low[r][w] = _mm512_dpbusd_epi32(low[r][w], codes[w], l);
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) {
      __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[r][w], 7), low[r][w]);
      float *to = out[r] + at + 16 * w;
      store(to, load(to) + (v16)_mm512_cvtepi32_ps(whole) * weights.unit[r]);
    }
}
static constexpr bool HAS_BYTE_PRODUCTS = true;
#else
template <int R, int BITS, int W>
static void add_byte_product(const uint8_t *, const uint8_t *, int, int, int, const Weights<R> &, float *const *) {}
static constexpr bool HAS_BYTE_PRODUCTS = false;
#endif

// Splits `count` weights into 128 * high + low of a unit. What is not finite stays in the zeros' share of the sums.
static float split_weights(const float *weights, int count, int8_t *high, int8_t *low) {
  v16 top{};
  for (int i = 0; i < count; i += 16) top = maximum(top, maximum(load(weights + i), -load(weights + i)));
  const float most = largest(top);
  if (!(most > 1e-30f)) {
    std::memset(high, 0, count);
    std::memset(low, 0, count);
    return 0;
  }
  const v16 magic = splat(12582912.0f);
  const float scale = 16256.0f / most;
  for (int i = 0; i < count; i += 16) {
    v16 rounded = (load(weights + i) * scale + magic) - magic;
    i16v whole = __builtin_convertvector(rounded, i16v), upper = (whole + 64) >> 7;
    b16 h = __builtin_convertvector(upper, b16), l = __builtin_convertvector(whole - (upper << 7), b16);
    std::memcpy(high + i, &h, 16);
    std::memcpy(low + i, &l, 16);
  }
  return most / 16256.0f;
}

// All lanes from `first` on, as many vectors at a time as registers hold.
template <int R, int BITS, bool BYTES>
static void add_products(const uint8_t *packed, const uint8_t *next, int quads, int lanes, int first, int count,
                         const Weights<R> &weights, float *const *out) {
  constexpr int W = R == 4 ? 2 : 4;
  int at = first;
  if (BYTES) {
    for (; at + 16 * W <= first + count; at += 16 * W)
      add_byte_product<R, BITS, W>(packed, next, quads, lanes, at, weights, out);
    for (; at < first + count; at += 16) add_byte_product<R, BITS, 1>(packed, next, quads, lanes, at, weights, out);
  } else {
    for (; at + 16 * W <= first + count; at += 16 * W)
      add_product<R, BITS, W>(packed, next, quads, lanes, at, weights.rows, out);
    for (; at < first + count; at += 16)
      add_product<R, BITS, 1>(packed, next, quads, lanes, at, weights.rows, out);
  }
}

static inline const uint8_t *record_of(const Packed &p, const uint8_t *base, int64_t b, int64_t h, int64_t page) {
  return base + p.table[b * p.table_b + page] * p.page_stride + h * p.record;
}

// Floats that one thread needs for its task: scores, weights, and their bytes.
static int64_t packed_scratch(const Call &c, const Packed &p) {
  return 4 * (TASK_PAGES * p.page_tokens + 2 * std::max(c.dim, p.page_tokens));
}

// One part, as `decode_rows` makes it, for R rows and `count` of the row's `pages`.
template <int R, int BITS, bool BYTES>
static void packed_rows(const Call &c, const Packed &p, int64_t b, int64_t h, const int32_t *pages, int count,
                        const float *const *rows, float *scratch, float *part, int64_t part_stride) {
  const int tokens = (int)p.page_tokens, dim = (int)c.dim, total = count * tokens, size = std::max(dim, tokens);
  const int64_t packed_bytes = (int64_t)tokens * dim * BITS / 8;
  float *scores[R], *out[R], *folded[R];
  Weights<R> weights;
  for (int r = 0; r < R; r++) {
    scores[r] = scratch + (int64_t)r * total;
    folded[r] = scratch + (int64_t)R * total + r * size;
    int8_t *bytes = (int8_t *)(scratch + (int64_t)R * (total + size)) + (int64_t)r * 2 * size;
    weights.rows[r] = folded[r];
    weights.high[r] = bytes;
    weights.low[r] = bytes + size;
    out[r] = part + r * part_stride + 16;
    std::fill(out[r], out[r] + dim, 0.0f);
  }
  auto split = [&](int r, int n) {
    if (BYTES) weights.unit[r] = split_weights(folded[r], n, (int8_t *)weights.high[r], (int8_t *)weights.low[r]);
  };
  const uint8_t *first_value = record_of(p, p.values, b, h, pages[0]);
  for (int i = 0; i < count; i++) {
    const uint8_t *record = record_of(p, p.keys, b, h, pages[i]);
    const uint8_t *next = i + 1 < count ? record_of(p, p.keys, b, h, pages[i + 1]) : first_value;
    const bf16 *scale = (const bf16 *)(record + packed_bytes), *zero = scale + dim;
    float *here[R];
    for (int r = 0; r < R; r++) {
      v16 shift{};
      for (int d = 0; d < dim; d += 16) {
        const v16 x = load(rows[r] + d);
        store(folded[r] + d, x * load(scale + d));
        shift += x * load(zero + d);
      }
      split(r, dim);
      here[r] = scores[r] + i * tokens;
      std::fill(here[r], here[r] + tokens, sum(shift));
    }
    add_products<R, BITS, BYTES>(record, next, dim / 4 * BITS / 8, tokens, 0, tokens, weights, here);
    if (c.valid) {
      const uint8_t *valid = c.valid + b * c.keys + (int64_t)pages[i] * tokens;
      for (int r = 0; r < R; r++)
        for (int t = 0; t < tokens; t++) here[r][t] = valid[t] ? here[r][t] : NEG;
    }
  }
  for (int r = 0; r < R; r++) {
    v16 top = splat(NEG);
    for (int t = 0; t < total; t += 16) top = maximum(top, load(scores[r] + t));
    const float most = largest(top), base = most == NEG ? 0.0f : most;
    v16 denominator{};
    for (int t = 0; t < total; t += 16) {
      v16 x = exp2_nonpositive(load(scores[r] + t) - base);
      store(scores[r] + t, x);
      denominator += x;
    }
    part[r * part_stride] = most;
    part[r * part_stride + 1] = sum(denominator);
  }
  const int groups = (int)p.value_groups, width = dim / groups;
  v16 shift[R][MOST_GROUPS];
  for (int r = 0; r < R; r++)
    for (int g = 0; g < groups; g++) shift[r][g] = v16{};
  for (int i = 0; i < count; i++) {
    const uint8_t *record = record_of(p, p.values, b, h, pages[i]);
    const uint8_t *next = i + 1 < count ? record_of(p, p.values, b, h, pages[i + 1]) : record;
    for (int g = 0; g < groups; g++) {
      const bf16 *scale = (const bf16 *)(record + packed_bytes) + g * tokens, *zero = scale + groups * tokens;
      for (int r = 0; r < R; r++) {
        for (int t = 0; t < tokens; t += 16) {
          const v16 x = load(scores[r] + i * tokens + t);
          store(folded[r] + t, x * load(scale + t));
          shift[r][g] += x * load(zero + t);
        }
        split(r, tokens);
      }
      add_products<R, BITS, BYTES>(record, next, tokens / 4 * BITS / 8, dim, g * width, width, weights, out);
    }
  }
  for (int r = 0; r < R; r++)
    for (int g = 0; g < groups; g++) {
      const float all = sum(shift[r][g]);
      for (int d = g * width; d < (g + 1) * width; d += 16) store(out[r] + d, load(out[r] + d) + all);
    }
}

template <int R, class T>
static void packed_task(const Call &c, const Packed &p, int64_t b, int64_t h, const int32_t *pages, int count,
                        const float *const *rows, float *scratch, float *part, int64_t part_stride) {
  constexpr bool BYTES = HAS_BYTE_PRODUCTS && sizeof(T) == 2;
  if (p.bits == 8) packed_rows<R, 8, BYTES>(c, p, b, h, pages, count, rows, scratch, part, part_stride);
  else if (p.bits == 4) packed_rows<R, 4, BYTES>(c, p, b, h, pages, count, rows, scratch, part, part_stride);
  else packed_rows<R, 2, BYTES>(c, p, b, h, pages, count, rows, scratch, part, part_stride);
}

// Scaled float32 queries, (B, KV heads, group, T, D).
template <class T>
static void lay_queries(const Call &c, const T *query, int64_t sb, int64_t sh, int64_t st, float unit, float *to) {
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t head = 0; head < c.heads; head++)
      for (int64_t t = 0; t < c.queries; t++, to += c.dim)
        for (int64_t d = 0; d < c.dim; d++) to[d] = to_float(query[b * sb + head * sh + t * st + d]) * unit;
}

// A run of the pages that are listed, or with `pages` 0 a run of tokens that are not packed.
struct Piece { int32_t b, h, first, count, pages; };

template <class T> static int quantized_decode(const Call &c, const Packed &p, int64_t first_loose) {
  const int64_t group = c.heads / c.kv_heads, rows = group * c.queries, part_stride = c.dim + 16;
  const int64_t last = std::min(c.keys, c.offset + c.queries);
  const float unit = c.scaling * 1.44269504f;
  std::vector<Piece> pieces;
  std::vector<int64_t> first_piece;
  std::vector<int32_t> listed;  // pages that are read: all, or those flagged
  for (int32_t b = 0; b < c.batch; b++)
    for (int32_t h = 0; h < c.kv_heads; h++) {
      first_piece.push_back(pieces.size());
      const uint8_t *flags = c.map ? c.map + b * c.map_b + h * c.map_h : nullptr;
      const int32_t begin = (int32_t)listed.size();
      for (int32_t page = 0; page < p.pages; page++)
        if (!flags || flags[page]) listed.push_back(page);
      const int32_t end = (int32_t)listed.size();
      for (int32_t i = begin; i < end; i += TASK_PAGES)
        pieces.push_back({b, h, i, std::min(TASK_PAGES, end - i), 1});
      for (int64_t t = first_loose; t < last; t += 256)
        pieces.push_back({b, h, (int32_t)t, (int32_t)std::min<int64_t>(256, last - t), 0});
    }
  first_piece.push_back(pieces.size());

  const int threads = thread_count(c);
  const int64_t all = c.batch * c.heads * c.queries * c.dim;
  const int64_t scratch_size = (std::max<int64_t>({packed_scratch(c, p), 4 * 256, c.dim}) + 15) / 16 * 16;
  const size_t wanted = (p.query ? 2 : 1) * all + pieces.size() * rows * part_stride + threads * scratch_size + 64;
  std::unique_ptr<float, decltype(&std::free)> memory(
      (float *)std::aligned_alloc(64, (wanted * 4 + 63) / 64 * 64), &std::free);
  if (!memory) return 1;
  float *queries = memory.get(), *turned = p.query ? queries + all : queries, *parts = turned + all;
  float *scratch = parts + pieces.size() * rows * part_stride;
  lay_queries(c, (const T *)c.query, c.query_b, c.query_h, c.query_t, unit, queries);
  if (p.query)
    lay_queries(c, p.query, c.heads * c.queries * c.dim, c.queries * c.dim, c.dim, unit, turned);

#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces.size() > 1)
  for (int64_t n = 0; n < (int64_t)pieces.size(); n++) {
    const Piece &piece = pieces[n];
    const Span span{piece.first, piece.count};
    float *mine = scratch + thread_index() * scratch_size;
    const float *base = (piece.pages ? turned : queries) + (piece.b * c.kv_heads + piece.h) * rows * c.dim;
    for (int64_t r = 0; r < rows;) {
      const float *row[4];
      int64_t limit[4];
      const int64_t left = rows - r, take = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      for (int64_t i = 0; i < take; i++) {
        row[i] = base + (r + i) * c.dim;
        limit[i] = c.causal ? c.offset + (r + i) % c.queries : c.keys - 1;
      }
      float *part = parts + (n * rows + r) * part_stride;
      auto run = [&](auto width) {
        constexpr int R = decltype(width)::value;
        if (piece.pages)
          packed_task<R, T>(c, p, piece.b, piece.h, &listed[piece.first], piece.count, row, mine, part, part_stride);
        else
          decode_rows<R, T>(c, piece.b, piece.h, &span, 1, row, limit, mine, part, part_stride);
      };
      if (take == 4) run(std::integral_constant<int, 4>{});
      else if (take == 2) run(std::integral_constant<int, 2>{});
      else run(std::integral_constant<int, 1>{});
      r += take;
    }
  }

  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t head = 0; head < c.heads; head++)
      for (int64_t t = 0; t < c.queries; t++) {
        const int64_t kv = b * c.kv_heads + head / group, r = (head % group) * c.queries + t;
        float most = NEG, total = 0;
        for (int64_t n = first_piece[kv]; n < first_piece[kv + 1]; n++)
          most = std::max(most, parts[(n * rows + r) * part_stride]);
        const float base = most == NEG ? 0.0f : most;
        std::fill(scratch, scratch + c.dim, 0.0f);
        for (int64_t n = first_piece[kv]; n < first_piece[kv + 1]; n++) {
          const float *part = parts + (n * rows + r) * part_stride;
          const float weight = std::exp2(part[0] - base);
          total += weight * part[1];
          for (int64_t d = 0; d < c.dim; d += 16) store(scratch + d, load(scratch + d) + load(part + 16 + d) * weight);
        }
        T *to = (T *)c.out + b * c.out_b + head * c.out_h + t * c.out_t;
        for (int64_t d = 0; d < c.dim; d += 16) store(to + d, total == 0 ? v16{} : load(scratch + d) / total);
      }
  return 0;
}

// The highest score that a key of each page can have for any query of the KV head, (B, KV heads, pages): the channels
// of a page lie between its zero and that plus all levels of its scale.
template <class T> static int packed_page_scores(const Call &c, const Packed &p, float *out) {
  const int64_t rows = c.heads / c.kv_heads * c.queries, block = 32, blocks = (p.pages + block - 1) / block;
  const int64_t all = c.batch * c.heads * c.queries * c.dim, packed_bytes = p.page_tokens * c.dim * p.bits / 8;
  const float levels = (float)((1 << p.bits) - 1);
  std::unique_ptr<float, decltype(&std::free)> memory((float *)std::aligned_alloc(64, (8 * all + 63) / 64 * 64),
                                                      &std::free);
  if (!memory) return 1;
  float *queries = memory.get(), *positive = queries + all;
  if (p.query) lay_queries(c, p.query, c.heads * c.queries * c.dim, c.queries * c.dim, c.dim, 1.0f, queries);
  else lay_queries(c, (const T *)c.query, c.query_b, c.query_h, c.query_t, 1.0f, queries);
  for (int64_t i = 0; i < all; i++) positive[i] = std::max(queries[i], 0.0f) * levels;

#pragma omp parallel for schedule(static) num_threads(thread_count(c))
  for (int64_t n = 0; n < c.batch * c.kv_heads * blocks; n++) {
    const int64_t b = n / blocks / c.kv_heads, h = n / blocks % c.kv_heads, first = n % blocks * block;
    const int64_t last = std::min(p.pages, first + block), base = (b * c.kv_heads + h) * rows * c.dim;
    for (int64_t page = first; page < last; page++) {
      const bf16 *scale = (const bf16 *)(record_of(p, p.keys, b, h, page) + packed_bytes), *zero = scale + c.dim;
      if (page + 1 < last) {
        const char *next = (const char *)record_of(p, p.keys, b, h, page + 1) + packed_bytes;
        for (int64_t at = 0; at < 4 * c.dim; at += 64) __builtin_prefetch(next + at);
      }
      float highest = NEG;
      for (int64_t r = 0; r < rows; r++) {
        const float *q = queries + base + r * c.dim, *up = positive + base + r * c.dim;
        v16 total{};
        for (int64_t d = 0; d < c.dim; d += 16) total += load(q + d) * load(zero + d) + load(up + d) * load(scale + d);
        highest = std::max(highest, sum(total));
      }
      out[(b * c.kv_heads + h) * p.pages + page] = highest;
    }
  }
  return 0;
}

extern "C" int qwen3_vl_packed_page_scores(const Call *c, const Packed *p, float *out) {
  try {
    return c->is_bf16 ? packed_page_scores<bf16>(*c, *p, out) : packed_page_scores<float>(*c, *p, out);
  } catch (const std::bad_alloc &) {
    return 1;
  }
}

extern "C" int qwen3_vl_quantized_decode(const Call *c, const Packed *p, int64_t first_loose) {
  try {
    return c->is_bf16 ? quantized_decode<bf16>(*c, *p, first_loose) : quantized_decode<float>(*c, *p, first_loose);
  } catch (const std::bad_alloc &) {
    return 1;
  }
}
"""
