// Attention over paged KV. A tile of query rows walks through the keys, kKeys at a time from
// position 0, with a running maximum and sum (online softmax, Milakov and Gimelshein 2018). What a
// row adds up, and in which order, depends on its own position only: the same bits for any chunk,
// tile and batch.
namespace tokenry::NS {

INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
struct Block {
  T* base;
  int64_t size, head_dim, kv_heads;
  Block(const Attention& a) : base(static_cast<T*>(a.kv)), size(a.block_size),
                              head_dim(a.head_dim), kv_heads(a.kv_heads) {}
  T* keys(int64_t block, int64_t head) const {
    return base + (block * kv_heads + head) * 2 * size * head_dim;
  }
  T* values(int64_t block, int64_t head) const { return keys(block, head) + size * head_dim; }
};

template <class T>
void write_as(const Attention& a, int64_t token, int64_t head) {
  const Block<T> at(a);
  const int64_t slot = a.slots[token], block = slot / a.block_size, i = slot % a.block_size;
  T* keys = at.keys(block, head) + i;
  T* values = at.values(block, head) + i * a.head_dim;
  const float* k = a.k + token * a.k_stride + head * a.head_dim;
  const float* v = a.v + token * a.v_stride + head * a.head_dim;
  for (int64_t d = 0; d < a.head_dim; d++) {
    keys[d * a.block_size] = narrow(k[d], static_cast<T*>(nullptr));
    values[d] = narrow(v[d], static_cast<T*>(nullptr));
  }
}

inline void write_kv(const Attention& a, int64_t token, int64_t head) {
  if (a.format == kF32) return write_as<float>(a, token, head);
  if (a.format == kBF16) return write_as<bf16>(a, token, head);
  write_as<f16>(a, token, head);
}

// scores[m][0, 32) = q(m) . key, for two times 16 neighbouring keys: `first` and `second` point to
// them in rows of `size` keys; q is [head_dim][M].
template <int M, class T>
INLINE void score_tile(const float* q, const T* first, const T* second, int64_t size,
                       int64_t head_dim, float* scores) {
  constexpr int HALF = NV / 2;
  vf acc[M][NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[m][v] = vf{};
  for (int64_t d = 0; d < head_dim; d++) {
    vf row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < HALF; v++) {
      row[v] = load(first + d * size + v * LANES);
      row[HALF + v] = load(second + d * size + v * LANES);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[m][v] += q[d * M + m] * row[v];
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) store(scores + m * kKeys + v * LANES, acc[m][v]);
}

// out[m][0, 32) += sum over keys t < count of p[m][t] * value(t)
template <int M, class T>
INLINE void value_tile(const float* p, T* const* blocks, int64_t size, int64_t head_dim,
                       int64_t count, float* out) {
  vf acc[M][NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[m][v] = load(out + m * head_dim + v * LANES);
  for (int64_t start = 0; start < count; start += size) {
    const T* value = *blocks++;
    const int64_t end = start + size < count ? start + size : count;
    for (int64_t t = start; t < end; t++, value += head_dim) {
      vf row[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) row[v] = load(value + v * LANES);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) acc[m][v] += p[m * kKeys + t] * row[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) store(out + m * head_dim + v * LANES, acc[m][v]);
}

// One tile of M rows against the keys of one chunk.
template <int M, class T>
void chunk_tile(const Attention& a, const float* q, const int64_t* last, T* const* keys,
                T* const* values, int64_t start, int64_t count, float* most, float* total,
                float* out) {
  alignas(64) float p[M * kKeys];
  const int64_t size = a.block_size;
  for (int64_t t = 0; t < count; t += kPanel) {
    const T* first = keys[t / size] + t % size;
    const int64_t u = t + 16 < count ? t + 16 : t;  // past the end: any keys, masked below
    const T* second = keys[u / size] + u % size;
    score_tile<M>(q, first, second, size, a.head_dim, p + t);
  }
  const int64_t padded = (count + kPanel - 1) / kPanel * kPanel;
  for (int m = 0; m < M; m++) {
    float* row = p + m * kKeys;
    const int64_t end = least_of(last[m] + 1 - start, count);
    const int64_t begin = a.window ? most_of(0, last[m] - a.window + 1 - start) : 0;
    if (a.softcap != 0) {
      for (int64_t t = 0; t < padded; t += LANES)
        store(row + t, a.softcap * tanh(load(row + t) / a.softcap));
    }
    for (int64_t t = 0; t < least_of(begin, padded); t++) row[t] = -INFINITY;
    for (int64_t t = most_of(0, end); t < padded; t++) row[t] = -INFINITY;
    vf top = splat(most[m]);
    for (int64_t t = 0; t < padded; t += LANES) top = max(load(row + t), top);
    const float now = largest(top);
    if (!(now > -INFINITY)) {  // nothing to be seen here, or NaN only: that must stay visible
      for (int64_t t = 0; t < padded; t++) row[t] = row[t] != row[t] ? row[t] : 0.0f;
      continue;
    }
    if (now != most[m]) {
      const vf shrink = exp(splat(most[m] - now));
      total[m] *= shrink[0];
      float* line = out + m * a.head_dim;
      for (int64_t d = 0; d < a.head_dim; d++) line[d] *= shrink[0];
      most[m] = now;
    }
    vf here{};
    for (int64_t t = 0; t < padded; t += LANES) {
      const vf e = exp(load(row + t) - now);
      store(row + t, e);
      here += e;
    }
    total[m] += sum(here);
  }
  int64_t d = 0;
  for (; d + kPanel <= a.head_dim; d += kPanel) {
    T* here[kKeys / 16];
    for (int64_t b = 0; b * size < count; b++) here[b] = values[b] + d;
    value_tile<M>(p, here, size, a.head_dim, count, out + d);
  }
  for (; d < a.head_dim; d++) {
    for (int m = 0; m < M; m++) {
      float acc = out[m * a.head_dim + d];
      for (int64_t t = 0; t < count; t++)
        acc += p[m * kKeys + t] * one(values[t / size][t % size * a.head_dim + d]);
      out[m * a.head_dim + d] = acc;
    }
  }
}

template <int M, class T>
void chunk_of(int64_t rows, const Attention& a, const float* q, const int64_t* last,
              T* const* keys, T* const* values, int64_t start, int64_t count, float* most,
              float* total, float* out) {
  if constexpr (M > 0) {
    if (rows == M)
      return chunk_tile<M>(a, q, last, keys, values, start, count, most, total, out);
    chunk_of<M - 1>(rows, a, q, last, keys, values, start, count, most, total, out);
  }
}

template <class T>
void attend_as(const Attention& a, int64_t request, int64_t first, int64_t count, int64_t head) {
  const int64_t D = a.head_dim, G = a.heads / a.kv_heads, rows = count * G;
  const int64_t cached = a.seq_lens[request] - a.q_lens[request] + first;
  const int64_t token = a.q_start[request] + first;
  const int64_t tiles = (rows + MAX_TILE - 1) / MAX_TILE, tile = (rows + tiles - 1) / tiles;
  int64_t* last = static_cast<int64_t*>(scratch(rows * (8 + 4 * (2 * D + 2))));
  float* q = reinterpret_cast<float*>(last + rows);
  float *out = q + rows * D, *most = out + rows * D, *total = most + rows;
  memset(out, 0, rows * D * 4);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = r / tile * tile, here = least_of(tile, rows - at);
    const float* from = a.q + (token + r / G) * a.q_stride + (head * G + r % G) * D;
    for (int64_t d = 0; d < D; d++) q[at * D + d * here + r - at] = from[d] * a.scale;
    last[r] = cached + r / G;
    most[r] = -INFINITY;
    total[r] = 0.0f;
  }
  const Block<T> blocks(a);
  const int32_t* table = a.block_table + request * a.table_width;
  const int64_t seen = a.window ? most_of(0, cached - a.window + 1) : 0;
  const int64_t end = cached + count;
  for (int64_t start = seen / kKeys * kKeys; start < end; start += kKeys) {
    const int64_t keys_here = least_of(kKeys, end - start);
    T *keys[kKeys / 16], *values[kKeys / 16];
    for (int64_t t = 0; t < keys_here; t += a.block_size) {
      const int64_t block = table[(start + t) / a.block_size];
      keys[t / a.block_size] = blocks.keys(block, head);
      values[t / a.block_size] = blocks.values(block, head);
    }
    for (int64_t r = 0; r < rows; r += tile) {
      const int64_t here = least_of(tile, rows - r);
      if (last[r + here - 1] < start) continue;
      if (a.window && last[r] - a.window + 1 >= start + keys_here) continue;
      chunk_of<MAX_TILE, T>(here, a, q + r * D, last + r, keys, values, start, keys_here,
                            most + r, total + r, out + r * D);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    float* to = a.out + (token + r / G) * a.heads * D + (head * G + r % G) * D;
    for (int64_t d = 0; d < D; d++) to[d] = out[r * D + d] / total[r];
  }
}

inline void attend(const Attention& a, int64_t request, int64_t first, int64_t count,
                   int64_t head) {
  if (a.format == kF32) return attend_as<float>(a, request, first, count, head);
  if (a.format == kBF16) return attend_as<bf16>(a, request, first, count, head);
  attend_as<f16>(a, request, first, count, head);
}

}  // namespace tokenry::NS
