"""C++ of attention for few queries: one pass over keys and values, shared by the query heads of a KV head.

Every thread takes runs of keys (of the flagged pages, where there are flags), and the parts are merged by their
log-sum-exp, as in FlashDecoding (Dao et al., 2023).
"""

DECODE_SOURCE = r"""
struct Span { int32_t start, count; };

// How many tokens ahead memory is asked for, to the second cache, a third faster than to the first; behind the end of
// a run that is the run that comes `next`.
constexpr int AHEAD = 24;
template <class T> static inline const T *ahead(const T *run, const T *next, int64_t stride, int t, int count) {
  return t + AHEAD < count ? run + (t + AHEAD) * stride : next + (t + AHEAD - count) * stride;
}

// Scores of `count` neighbouring keys for R query rows of float32.
template <int R, class T>
static void score_span(const T *key, const T *next, int64_t stride, int count, const float *const *rows, int chunks,
                       float *const *scores) {
  for (int t = 0; t < count; t++) {
    const T *k = key + t * stride, *later = ahead(key, next, stride, t, count);
    for (int i = 0; i < chunks; i += 64 / (16 * (int)sizeof(T) / 16)) __builtin_prefetch(later + 16 * i, 0, 2);
    v16 acc[R];
    for (int r = 0; r < R; r++) acc[r] = v16{};
    for (int i = 0; i < chunks; i++) {
      v16 x = load(k + 16 * i);
      for (int r = 0; r < R; r++) acc[r] += x * load(rows[r] + 16 * i);
    }
    for (int r = 0; r < R; r++) scores[r][t] = sum(acc[r]);
  }
}

// Adds probability-weighted values to W vectors of R rows of output.
template <int R, int W, class T>
static void add_values(const T *value, const T *next, int64_t stride, int count, float *const *probs,
                       float *const *out, int at) {
  v16 acc[R][W];
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) acc[r][w] = load(out[r] + at + 16 * w);
  for (int t = 0; t < count; t++) {
    const T *v = value + t * stride + at, *later = ahead(value, next, stride, t, count) + at;
    for (int w = 0; w < W; w += 2) __builtin_prefetch(later + 16 * w, 0, 2);
    for (int w = 0; w < W; w++) {
      v16 x = load(v + 16 * w);
      for (int r = 0; r < R; r++) acc[r][w] += x * probs[r][t];
    }
  }
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) store(out[r] + at + 16 * w, acc[r][w]);
}

template <int R, class T>
static void add_span_values(const T *value, const T *next, int64_t stride, int count, float *const *probs,
                            float *const *out, int dim) {
  constexpr int W = R >= 4 ? 4 : 8;
  int at = 0;
  for (; at + 16 * W <= dim; at += 16 * W) add_values<R, W>(value, next, stride, count, probs, out, at);
  for (; at + 64 <= dim; at += 64) add_values<R, 4>(value, next, stride, count, probs, out, at);
  for (; at < dim; at += 16) add_values<R, 1>(value, next, stride, count, probs, out, at);
}

template <int R, class T>
static void decode_rows(const Call &c, int64_t b, int64_t h, const Span *spans, int n, const float *const *rows,
                        const int64_t *limits, float *scratch, float *part, int64_t part_stride) {
  int total = 0;
  for (int s = 0; s < n; s++) total += spans[s].count;
  int padded = (total + 15) / 16 * 16;
  float *scores[R], *out[R];
  for (int r = 0; r < R; r++) {
    scores[r] = scratch + (int64_t)r * padded;
    out[r] = part + r * part_stride + 16;
    std::fill(out[r], out[r] + c.dim, 0.0f);
  }
  auto key_at = [&](const Span &span) {
    return token<T>(c, c.key, c.key_b, c.key_h, c.key_t, b, h, span.start);
  };
  auto value_at = [&](const Span &span) {
    return token<T>(c, c.value, c.value_b, c.value_h, c.value_t, b, h, span.start);
  };
  const T *first_value = value_at(spans[0]);
  int at = 0;
  for (int s = 0; s < n; s++) {
    const Span &span = spans[s];
    float *here[R];
    for (int r = 0; r < R; r++) here[r] = scores[r] + at;
    score_span<R>(key_at(span), s + 1 < n ? key_at(spans[s + 1]) : first_value, c.key_t, span.count, rows,
                  (int)(c.dim / 16), here);
    for (int r = 0; r < R; r++) {
      if (c.valid) {
        const uint8_t *valid = c.valid + b * c.keys + span.start;
        for (int t = 0; t < span.count; t++) here[r][t] = valid[t] ? here[r][t] : NEG;
      }
      for (int64_t t = std::max<int64_t>(0, limits[r] + 1 - span.start); t < span.count; t++) here[r][t] = NEG;
    }
    at += span.count;
  }
  for (int r = 0; r < R; r++) {
    std::fill(scores[r] + total, scores[r] + padded, NEG);
    v16 top = splat(NEG);
    for (int t = 0; t < padded; t += 16) top = maximum(top, load(scores[r] + t));
    float most = largest(top), base = most == NEG ? 0.0f : most;
    v16 denominator{};
    for (int t = 0; t < padded; t += 16) {
      v16 p = exp2_nonpositive(load(scores[r] + t) - base);
      store(scores[r] + t, p);
      denominator += p;
    }
    part[r * part_stride] = most;
    part[r * part_stride + 1] = sum(denominator);
  }
  at = 0;
  for (int s = 0; s < n; s++) {
    float *here[R];
    for (int r = 0; r < R; r++) here[r] = scores[r] + at;
    const T *value = value_at(spans[s]), *next = s + 1 < n ? value_at(spans[s + 1]) : value;
    add_span_values<R>(value, next, c.value_t, spans[s].count, here, out, (int)c.dim);
    at += spans[s].count;
  }
}

// Which runs of keys row `b` and KV head `h` reads: all, or those of the flagged pages.
static void list_spans(const Call &c, int64_t b, int64_t h, std::vector<Span> &spans) {
  bool by_page = c.table || c.map;
  int64_t step = by_page ? c.page_tokens : 256;
  int64_t last = std::min(c.keys, c.offset + c.queries);
  const uint8_t *flags = c.map ? c.map + b * c.map_b + h * c.map_h : nullptr;
  spans.clear();
  for (int64_t start = 0, page = 0; start < last; start += step, page++)
    if (!flags || flags[page]) spans.push_back({(int32_t)start, (int32_t)std::min(step, last - start)});
}

struct Task { int32_t b, h, first, count; };

template <class T> static int decode(const Call &c) {
  const int64_t group = c.heads / c.kv_heads, rows = group * c.queries;
  const int64_t part_stride = c.dim + 16;
  const float unit = c.scaling * 1.44269504f;  // powers of two are cheaper than of e
  std::vector<std::vector<Span>> spans(c.batch * c.kv_heads);
  std::vector<Task> tasks;
  std::vector<int64_t> first_task;
  int64_t longest = 0;
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t h = 0; h < c.kv_heads; h++) {
      auto &own = spans[b * c.kv_heads + h];
      list_spans(c, b, h, own);
      first_task.push_back(tasks.size());
      for (size_t s = 0; s < own.size();) {
        int64_t tokens = 0;
        size_t e = s;
        while (e < own.size() && (e == s || tokens + own[e].count <= 256)) tokens += own[e++].count;
        tasks.push_back({(int32_t)b, (int32_t)h, (int32_t)s, (int32_t)(e - s)});
        longest = std::max(longest, tokens);
        s = e;
      }
    }
  first_task.push_back(tasks.size());

  // Queries as float32, scaled, one row after the other: (B, KV heads, group, queries, D).
  int threads = thread_count(c);
  int64_t scratch_size = std::max(4 * ((longest + 15) / 16 * 16), c.dim);
  const size_t wanted =
      c.batch * c.kv_heads * rows * c.dim + tasks.size() * rows * part_stride + threads * scratch_size + 64;
  std::unique_ptr<float, decltype(&std::free)> memory(
      (float *)std::aligned_alloc(64, (wanted * 4 + 63) / 64 * 64), &std::free);
  if (!memory) return 1;
  float *queries = memory.get(), *parts = queries + c.batch * c.kv_heads * rows * c.dim;
  float *scratch = parts + tasks.size() * rows * part_stride;
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t head = 0; head < c.heads; head++)
      for (int64_t t = 0; t < c.queries; t++) {
        const T *q = (const T *)c.query + b * c.query_b + head * c.query_h + t * c.query_t;
        float *to = queries + (((b * c.kv_heads + head / group) * group + head % group) * c.queries + t) * c.dim;
        for (int64_t d = 0; d < c.dim; d++) to[d] = to_float(q[d]) * unit;
      }

#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (tasks.size() > 1)
  for (int64_t n = 0; n < (int64_t)tasks.size(); n++) {
    const Task &task = tasks[n];
    const Span *own = spans[task.b * c.kv_heads + task.h].data() + task.first;
    float *mine = scratch + thread_index() * scratch_size;
    const float *base = queries + (task.b * c.kv_heads + task.h) * rows * c.dim;
    for (int64_t r = 0; r < rows;) {
      const float *row[4];
      int64_t limit[4];
      int64_t left = rows - r, take = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      for (int64_t i = 0; i < take; i++) {
        row[i] = base + (r + i) * c.dim;
        limit[i] = c.causal ? c.offset + (r + i) % c.queries : c.keys - 1;
      }
      float *part = parts + (n * rows + r) * part_stride;
      if (take == 4) decode_rows<4, T>(c, task.b, task.h, own, task.count, row, limit, mine, part, part_stride);
      else if (take == 2) decode_rows<2, T>(c, task.b, task.h, own, task.count, row, limit, mine, part, part_stride);
      else decode_rows<1, T>(c, task.b, task.h, own, task.count, row, limit, mine, part, part_stride);
      r += take;
    }
  }

  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t head = 0; head < c.heads; head++)
      for (int64_t t = 0; t < c.queries; t++) {
        int64_t kv = head / group, r = (head % group) * c.queries + t;
        int64_t first = first_task[b * c.kv_heads + kv], end = first_task[b * c.kv_heads + kv + 1];
        float most = NEG, total = 0;
        for (int64_t n = first; n < end; n++) most = std::max(most, parts[(n * rows + r) * part_stride]);
        float base = most == NEG ? 0.0f : most;
        float *sums = scratch;  // no task runs any more
        std::fill(sums, sums + c.dim, 0.0f);
        for (int64_t n = first; n < end; n++) {
          const float *part = parts + (n * rows + r) * part_stride;
          float weight = std::exp2(part[0] - base);
          total += weight * part[1];
          for (int64_t d = 0; d < c.dim; d += 16) store(sums + d, load(sums + d) + load(part + 16 + d) * weight);
        }
        T *to = (T *)c.out + b * c.out_b + head * c.out_h + t * c.out_t;
        for (int64_t d = 0; d < c.dim; d += 16) store(to + d, total == 0 ? v16{} : load(sums + d) / total);
      }
  return 0;
}

// The highest score that a key of each page can have for any query of the KV head, from the bounds of its channels.
// With a table, page p of row b is number table[b, p] of a storage, whose stride is that of pages.
template <class T>
static void page_scores(const T *query, const T *low, const T *high, const int32_t *table, float *out,
                        const int64_t *query_strides, const int64_t *bound_strides, int64_t batch, int64_t heads,
                        int64_t kv_heads, int64_t queries, int64_t pages, int64_t dim, int threads) {
  const int64_t group = heads / kv_heads, block = 64, blocks = (pages + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = 0; n < batch * kv_heads * blocks; n++) {
    const int64_t b = n / blocks / kv_heads, h = n / blocks % kv_heads, first = n % blocks * block;
    for (int64_t page = first; page < std::min(pages, first + block); page++) {
      const int64_t place = table ? table[b * pages + page] : page;
      const int64_t at = (table ? 0 : b * bound_strides[0]) + h * bound_strides[1] + place * bound_strides[2];
      float highest = NEG;
      for (int64_t r = 0; r < group * queries; r++) {
        const T *q = query + b * query_strides[0] + (h * group + r / queries) * query_strides[1] +
                     r % queries * query_strides[2];
        v16 total{};
        for (int64_t d = 0; d < dim; d += 16) {
          const v16 x = load(q + d), positive = maximum(x, v16{});
          total += positive * load(high + at + d) + (x - positive) * load(low + at + d);
        }
        highest = std::max(highest, sum(total));
      }
      out[(b * kv_heads + h) * pages + page] = highest;
    }
  }
}

extern "C" void qwen3_vl_page_scores(const void *query, const void *low, const void *high, const int32_t *table,
                                     float *out, const int64_t *query_strides, const int64_t *bound_strides,
                                     int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t pages,
                                     int64_t dim, int threads, int is_bf16) {
  if (is_bf16)
    page_scores((const bf16 *)query, (const bf16 *)low, (const bf16 *)high, table, out, query_strides, bound_strides,
                batch, heads, kv_heads, queries, pages, dim, threads);
  else
    page_scores((const float *)query, (const float *)low, (const float *)high, table, out, query_strides,
                bound_strides, batch, heads, kv_heads, queries, pages, dim, threads);
}

extern "C" int qwen3_vl_decode(const Call *c) {
  try {
    return c->is_bf16 ? decode<bf16>(*c) : decode<float>(*c);
  } catch (const std::bad_alloc &) {
    return 1;
  }
}
"""
