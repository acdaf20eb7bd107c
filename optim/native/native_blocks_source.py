"""C++ of attention for many queries: tiles of queries against the listed blocks of keys, with an online softmax.

The order of FlashAttention 2 (arXiv 2307.08691); blocks that are not listed are not visited. Tiles are turned into the
order of the products once for all rows of a tile, products of bfloat16 are bfloat16 dot products where the processor
has them, and float32 multiply-adds elsewhere.
"""

BLOCKS_SOURCE = r"""
#if defined(__AVX512F__)
constexpr int COLUMNS = 4;  // vectors of a register tile
#else
constexpr int COLUMNS = 1;
#endif
constexpr int ROWS = 4;        // rows of a register tile
constexpr int QUERY_TILE = 128;

// How products are computed: float32 multiply-add of single elements, or bfloat16 dot products of pairs.
struct Single {
  typedef float Element;
  static constexpr int depth = 1;
  static inline Element from(float x) { return x; }
  static inline v16 madd(v16 acc, const Element *a, const Element *b) { return acc + load(b) * *a; }
};
#if defined(__AVX512BF16__)
struct Pair {
  typedef bf16 Element;
  static constexpr int depth = 2;
  static inline Element from(float x) { return to_bf16(x); }
  static inline v16 madd(v16 acc, const Element *a, const Element *b) {
    int32_t pair;
    std::memcpy(&pair, a, 4);
    __m512i x = _mm512_set1_epi32(pair), y = _mm512_loadu_si512(b);
    return (v16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)y);
  }
};
#endif

// out (R, 16 * W) += a (R, depth of `steps`) times b, whose rows of `columns` groups lie one after the other.
template <class P, int R, int W>
static inline void product_tile(const typename P::Element *a, int64_t a_stride, const typename P::Element *b,
                                int64_t columns, int steps, v16 (&acc)[R][W]) {
  for (int k = 0; k < steps; k++)
    for (int w = 0; w < W; w++) {
      const typename P::Element *at = b + (k * columns + 16 * w) * P::depth;
      for (int r = 0; r < R; r++) acc[r][w] = P::madd(acc[r][w], a + r * a_stride + k * P::depth, at);
    }
}

template <class P, int W>
static void scores_tile(const typename P::Element *q, const typename P::Element *k, int dim, int columns, int at,
                        float *out) {
  v16 acc[ROWS][W];
  for (int r = 0; r < ROWS; r++)
    for (int w = 0; w < W; w++) acc[r][w] = v16{};
  product_tile<P, ROWS, W>(q, dim, k + at * P::depth, columns, dim / P::depth, acc);
  for (int r = 0; r < ROWS; r++)
    for (int w = 0; w < W; w++) store(out + r * columns + at + 16 * w, acc[r][w]);
}

template <class P, int W>
static void values_tile(const typename P::Element *p, const typename P::Element *v, int columns, int dim, int at,
                        const float *shrink, float *out) {
  v16 acc[ROWS][W];
  for (int r = 0; r < ROWS; r++)
    for (int w = 0; w < W; w++) acc[r][w] = load(out + r * dim + at + 16 * w) * shrink[r];
  product_tile<P, ROWS, W>(p, columns, v + at * P::depth, dim, columns / P::depth, acc);
  for (int r = 0; r < ROWS; r++)
    for (int w = 0; w < W; w++) store(out + r * dim + at + 16 * w, acc[r][w]);
}

// Working memory of a thread: a tile of queries, a tile of keys and values in the order of the products, the output.
template <class P> struct Workspace {
  typedef typename P::Element E;
  std::vector<E> storage;
  std::vector<float> floats;
  E *query, *key, *value, *probs;
  float *scores, *out, *most, *total, *shrink;
  Workspace(int dim, int columns)
      : storage(64 + QUERY_TILE * dim + 2 * columns * dim + QUERY_TILE * columns),
        floats(64 + QUERY_TILE * (columns + dim + 3)) {
    query = storage.data() + ((64 - (uintptr_t)storage.data() % 64) % 64) / sizeof(E);
    key = query + QUERY_TILE * dim;
    value = key + columns * dim;
    probs = value + columns * dim;
    scores = floats.data() + ((64 - (uintptr_t)floats.data() % 64) % 64) / 4;
    out = scores + QUERY_TILE * columns;
    most = out + QUERY_TILE * dim;
    total = most + QUERY_TILE;
    shrink = total + QUERY_TILE;
  }
};

template <class P, class T>
static void pack_queries(const T *q, int64_t stride, int rows, int real_dim, int dim, typename P::Element *to) {
  for (int r = 0; r < QUERY_TILE; r++)
    for (int d = 0; d < dim; d++)
      to[r * dim + d] = r < rows && d < real_dim ? P::from(to_float(q[r * stride + d])) : typename P::Element(0);
}
#if defined(__AVX512BF16__)
template <>
void pack_queries<Pair, bf16>(const bf16 *q, int64_t stride, int rows, int real_dim, int dim, bf16 *to) {
  for (int r = 0; r < QUERY_TILE; r++) {
    int copied = r < rows ? real_dim : 0;
    std::memcpy(to + r * dim, q + r * stride, copied * 2);
    std::memset(to + r * dim + copied, 0, (dim - copied) * 2);
  }
}
#endif

// Keys (count, D) to (D / depth, columns, depth): a product walks down D, with the keys side by side.
template <class P, class T>
static void pack_keys(const T *k, int64_t stride, int count, int columns, int real_dim, int dim,
                      typename P::Element *to) {
  for (int d = 0; d < dim; d++)
    for (int n = 0; n < columns; n++)
      to[(d / P::depth * columns + n) * P::depth + d % P::depth] =
          n < count && d < real_dim ? P::from(to_float(k[n * stride + d])) : typename P::Element(0);
}
#if defined(__AVX512BF16__)
// Sixteen rows of sixteen 32-bit pairs, turned.
static inline void turn_16x16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
template <>
void pack_keys<Pair, bf16>(const bf16 *k, int64_t stride, int count, int columns, int real_dim, int dim, bf16 *to) {
  for (int n = 0; n < columns; n += 16)
    for (int d = 0; d < dim; d += 32) {
      __m512i rows[16];
      int left = std::min(32, real_dim - d);
      __mmask32 lanes = left >= 32 ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
      for (int i = 0; i < 16; i++)
        rows[i] = n + i < count ? _mm512_maskz_loadu_epi16(lanes, k + (n + i) * stride + d) : _mm512_setzero_si512();
      turn_16x16(rows);
      for (int i = 0; i < 16 && d + 2 * i < dim; i++)
        _mm512_storeu_si512(to + ((d / 2 + i) * columns + n) * 2, rows[i]);
    }
}
#endif

// Values (count, D) to (count / depth, D, depth).
template <class P, class T>
static void pack_values(const T *v, int64_t stride, int count, int columns, int real_dim, int dim,
                        typename P::Element *to) {
  for (int n = 0; n < columns; n++)
    for (int d = 0; d < dim; d++)
      to[(n / P::depth * dim + d) * P::depth + n % P::depth] =
          n < count && d < real_dim ? P::from(to_float(v[n * stride + d])) : typename P::Element(0);
}
#if defined(__AVX512BF16__)
template <>
void pack_values<Pair, bf16>(const bf16 *v, int64_t stride, int count, int columns, int real_dim, int dim, bf16 *to) {
  for (int n = 0; n < columns; n += 2)
    for (int d = 0; d < dim; d += 16) {
      int left = std::min(16, real_dim - d);
      __mmask16 lanes = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
      __mmask16 first = n < count ? lanes : 0, second = n + 1 < count ? lanes : 0;
      __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, v + n * stride + d));
      __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, v + (n + 1) * stride + d));
      _mm512_storeu_si512(to + (n / 2 * dim + d) * 2, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}
#endif

static inline void store_probs(float *to, v16 p) { store(to, p); }
static inline void store_probs(bf16 *to, v16 p) {
#if defined(__AVX512BF16__)
  __m256bh y = _mm512_cvtneps_pbh((__m512)p);
  std::memcpy(to, &y, 32);
#else
  store(to, p);
#endif
}

// The key at which a query stands, which is the last that it may see.
static inline int64_t place(const Call &c, int64_t b, int64_t query) {
  return c.places ? c.places[b * c.queries + query] : c.offset + query;
}

// Hides keys [start, start + count) that row `query` may not see.
static void hide(const Call &c, int64_t b, int64_t query, int64_t start, int count, int columns, float *scores) {
  int64_t visible = c.causal ? std::min<int64_t>(count, place(c, b, query) + 1 - start) : count;
  for (int64_t n = std::max<int64_t>(0, visible); n < columns; n++) scores[n] = NEG;
  if (c.valid) {
    const uint8_t *valid = c.valid + b * c.keys + start;
    for (int64_t n = 0; n < visible; n++) scores[n] = valid[n] ? scores[n] : NEG;
  }
  if (c.segments) {
    const int32_t *segment = c.segments + b * c.keys, own = segment[c.places ? place(c, b, query) : query];
    for (int64_t n = 0; n < visible; n++) scores[n] = segment[start + n] == own ? scores[n] : NEG;
  }
}

template <class P, class T>
static void attend_key_tile(const Call &c, Workspace<P> &w, int64_t b, int64_t kv, int64_t first_query, int rows,
                            int64_t start, int count, int columns, int dim) {
  const T *key = token<T>(c, c.key, c.key_b, c.key_h, c.key_t, b, kv, start);
  const T *value = token<T>(c, c.value, c.value_b, c.value_h, c.value_t, b, kv, start);
  pack_keys<P, T>(key, c.key_t, count, columns, (int)c.dim, dim, w.key);
  pack_values<P, T>(value, c.value_t, count, columns, (int)c.dim, dim, w.value);
  const float unit = c.scaling * 1.44269504f;
  const bool whole = count == columns && !c.valid && !c.segments;
  for (int r = 0; r < rows; r += ROWS) {
    float *scores = w.scores + r * columns;
    int at = 0;
    for (; at + 16 * COLUMNS <= columns; at += 16 * COLUMNS)
      scores_tile<P, COLUMNS>(w.query + r * dim, w.key, dim, columns, at, scores);
    for (; at < columns; at += 16) scores_tile<P, 1>(w.query + r * dim, w.key, dim, columns, at, scores);
    for (int i = r; i < r + ROWS; i++) {
      float *row = w.scores + i * columns;
      int64_t query = first_query + std::min(i, rows - 1);
      const bool cut = c.causal && start + count > place(c, b, query) + 1;
      if (!whole || cut) hide(c, b, query, start, count, columns, row);
      v16 top = splat(NEG);
      for (int n = 0; n < columns; n += 16) top = maximum(top, load(row + n));
      float most = std::max(w.most[i], largest(top) * unit), base = most == NEG ? 0.0f : most;
      v16 sums{};
      for (int n = 0; n < columns; n += 16) {
        v16 p = exp2_nonpositive(load(row + n) * unit - base);
        sums += p;
        store_probs(w.probs + i * columns + n, p);
      }
      w.shrink[i] = w.most[i] == NEG ? 0.0f : std::exp2(w.most[i] - base);
      w.total[i] = w.total[i] * w.shrink[i] + sum(sums);
      w.most[i] = most;
    }
    at = 0;
    for (; at + 16 * COLUMNS <= dim; at += 16 * COLUMNS)
      values_tile<P, COLUMNS>(w.probs + r * columns, w.value, columns, dim, at, w.shrink + r, w.out + r * dim);
    for (; at < dim; at += 16)
      values_tile<P, 1>(w.probs + r * columns, w.value, columns, dim, at, w.shrink + r, w.out + r * dim);
  }
}

template <class P, class T>
static void attend_query_tile(const Call &c, Workspace<P> &w, int64_t b, int64_t head, int64_t first, int tile,
                              int dim, int columns) {
  const int rows = (int)std::min<int64_t>(tile, c.queries - first);
  const int64_t kv = head / (c.heads / c.kv_heads);
  pack_queries<P, T>((const T *)c.query + b * c.query_b + head * c.query_h + first * c.query_t, c.query_t, rows,
                     (int)c.dim, dim, w.query);
  std::fill(w.out, w.out + QUERY_TILE * dim, 0.0f);
  std::fill(w.most, w.most + QUERY_TILE, NEG);
  std::fill(w.total, w.total + QUERY_TILE, 0.0f);
  const int64_t last = c.causal ? std::min(c.keys, place(c, b, first + rows - 1) + 1) : c.keys;
  const uint8_t *flags = c.map ? c.map + b * c.map_b + head * c.map_h + first / c.query_block * c.map_row : nullptr;
  for (int64_t start = 0; start < last; start += columns)
    if (!flags || flags[start / c.key_block]) {
      const int count = (int)std::min<int64_t>(columns, last - start);
      attend_key_tile<P, T>(c, w, b, kv, first, rows, start, count, columns, dim);
    }
  for (int r = 0; r < rows; r++) {
    T *to = (T *)c.out + b * c.out_b + head * c.out_h + (first + r) * c.out_t;
    float scale = w.total[r] == 0 ? 0.0f : 1.0f / w.total[r];
    int d = 0;
    for (; d + 16 <= c.dim; d += 16) store(to + d, load(w.out + r * dim + d) * scale);
    if (d < c.dim) {
      T last_values[16];
      store(last_values, load(w.out + r * dim + d) * scale);
      std::memcpy(to + d, last_values, (c.dim - d) * sizeof(T));
    }
  }
}

template <class P, class T> static int blocks(const Call &c) {
  const int step = 16 * P::depth;
  const int dim = (int)((c.dim + step - 1) / step * step);
  // A tile may not cross a block of the map or a page.
  int tile = QUERY_TILE, columns = 64;
  while (c.map && c.query_block % tile) tile /= 2;
  if (c.map && c.key_block % columns) columns = 32;
  if (c.table && c.page_tokens % columns) columns = 32;
  const int64_t tiles = (c.queries + tile - 1) / tile, tasks = c.batch * c.heads * tiles;
  const int threads = thread_count(c);
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<Workspace<P>> w;
    try {
      w.reset(new Workspace<P>(dim, columns));
    } catch (const std::bad_alloc &) {
#pragma omp atomic write
      failed = 1;
    }
    // Late tiles see the most keys: begin with them, so that no thread ends alone with a long one.
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < tasks; n++) {
      if (!w) continue;
      int64_t first = (tiles - 1 - n / (c.batch * c.heads)) * tile, row = n % (c.batch * c.heads);
      attend_query_tile<P, T>(c, *w, row / c.heads, row % c.heads, first, tile, dim, columns);
    }
  }
  return failed;
}

extern "C" int qwen3_vl_blocks(const Call *c) {
  if (!c->is_bf16) return blocks<Single, float>(*c);
#if defined(__AVX512BF16__)
  return blocks<Pair, bf16>(*c);
#else
  return blocks<Single, bf16>(*c);
#endif
}

// Whether bfloat16 products are computed as such.
extern "C" int qwen3_vl_has_bf16_products() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}
"""
