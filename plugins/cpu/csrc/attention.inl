// Attention over paged KV. A tile of query rows walks through the keys, kKeys at a time from
// position 0, with a running maximum and sum (online softmax, Milakov and Gimelshein 2018). Every
// kPiece keys these begin anew, and the pieces are joined in order; so threads may share a long
// context. What a row adds up, and in which order, depends on its own position only: the same bits
// for any chunk, tile, batch and number of threads.
namespace tokenry::NS {

INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t even_up(int64_t n) { return n + n % 2; }

// bf16 lies in pairs, as one instruction multiplies them: neighbouring values of a key, neighbouring
// keys' values. int8 lies alike and is worked on as bf16, which has room for each of its values.
template <class T>
constexpr bool kPaired = false;
template <>
inline constexpr bool kPaired<bf16> = true;
template <>
inline constexpr bool kPaired<int8_t> = true;

template <class T>
struct Worked {
  using type = T;
};
template <>
struct Worked<int8_t> {
  using type = bf16;
};

template <class T>
struct Block {
  T* base;
  int64_t size, head_dim, half, kv_heads;  // half: of a head's share of a block
  Block(const Attention& a)
      : base(static_cast<T*>(a.kv)),
        size(a.block_size),
        head_dim(a.head_dim),
        half(size * ((kPaired<T> ? even_up(head_dim) : head_dim) +
                     (sizeof(T) == 1 ? int64_t(sizeof(float)) : 0))),
        kv_heads(a.kv_heads) {}
  T* keys(int64_t block, int64_t head) const { return base + (block * kv_heads + head) * 2 * half; }
  T* values(int64_t block, int64_t head) const { return keys(block, head) + half; }
  // Where value d of key i is, and of the value that belongs to it.
  int64_t in_keys(int64_t i, int64_t d) const {
    return kPaired<T> ? (d / 2 * size + i) * 2 + d % 2 : d * size + i;
  }
  int64_t in_values(int64_t i, int64_t d) const {
    return kPaired<T> ? (i / 2 * head_dim + d) * 2 + i % 2 : i * head_dim + d;
  }
};

// The int8 format's scales, after the keys or the values of a block.
INLINE float* scales_of(const Attention& a, int8_t* keys_or_values) {
  return reinterpret_cast<float*>(keys_or_values + a.block_size * even_up(a.head_dim));
}

// x[0, n) as whole numbers of [-127, 127] times the scale that is returned; zeros follow them in
// the last panel. A NaN or infinity makes the scale NaN.
inline float quantise_row(const float* x, int64_t n, int8_t* out) {
  alignas(64) float last[LANES] = {};
  const int64_t whole = n / LANES * LANES;
  for (int64_t d = whole; d < n; d++) last[d - whole] = x[d];
  const auto at = [&](int64_t d) { return load(d < whole ? x + d : last); };
  vf top{}, check{};
  for (int64_t d = 0; d < n; d += LANES) {
    const vf v = at(d);
    top = max(v < 0.0f ? -v : v, top);
    check += v * 0.0f;
  }
  const float most = sum(check) != 0.0f ? NAN : largest(top);
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  for (int64_t d = 0; d < n; d += LANES) {
    vf v = inverse > 0 ? (at(d) * inverse + 12582912.0f) - 12582912.0f : vf{};
    store(out + d, max(min(v, splat(127.0f)), splat(-127.0f)));
  }
  return most / 127.0f;
}

// Tokens of a pair may be written by two threads: each its own places.
template <class T>
void write_paired(const Attention& a, int64_t token, int64_t head) {
  const Block<T> at(a);
  const int64_t slot = a.slots[token], block = slot / a.block_size, i = slot % a.block_size;
  T* line = static_cast<T*>(scratch((a.head_dim + kPanel) * 2));
  const auto rounded = [&](const float* x, T* block_of_it) {
    if constexpr (sizeof(T) == 1)
      scales_of(a, block_of_it)[i] = quantise_row(x, a.head_dim, line);
    else
      narrow_row(x, a.head_dim, line);
  };
  T *keys = at.keys(block, head), *values = at.values(block, head);
  rounded(a.k + token * a.k_stride + head * a.head_dim, keys);
  for (int64_t d = 0; d < a.head_dim; d += 2)
    memcpy(keys + at.in_keys(i, d), line + d, 2 * sizeof(T));
  rounded(a.v + token * a.v_stride + head * a.head_dim, values);
  values += at.in_values(i, 0);
  for (int64_t d = 0; d < a.head_dim; d++) values[2 * d] = line[d];
}

template <class T>
void write_as(const Attention& a, int64_t token, int64_t head) {
  const Block<T> at(a);
  const int64_t slot = a.slots[token], block = slot / a.block_size, i = slot % a.block_size;
  T *keys = at.keys(block, head) + i, *values = at.values(block, head) + i * a.head_dim;
  const float* k = a.k + token * a.k_stride + head * a.head_dim;
  const float* v = a.v + token * a.v_stride + head * a.head_dim;
  for (int64_t d = 0; d < a.head_dim; d++)
    keys[d * a.block_size] = narrow(k[d], static_cast<T*>(nullptr));
  for (int64_t d = 0; d < a.head_dim; d++) values[d] = narrow(v[d], static_cast<T*>(nullptr));
}

inline void write_kv(const Attention& a, int64_t token, int64_t head) {
  if (a.format == kF32) return write_as<float>(a, token, head);
  if (a.format == kBF16) return write_paired<bf16>(a, token, head);
  if (a.format == kInt8) return write_paired<int8_t>(a, token, head);
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

INLINE vu load_pairs(const bf16* p) { return *reinterpret_cast<const vu_any*>(p); }

// acc[m] += row's pairs times the two of row m, at x + m * step: bf16 pairs where one instruction
// multiplies those, else floats.
template <int M, class X>
INLINE void add_pairs(const X* x, int64_t step, int64_t second, const vu (&row)[NV],
                      vf (&acc)[M][NV]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
    if constexpr (sizeof(X) == 2) {
      uint32_t two;
      memcpy(&two, x + m * step, 4);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[m][v] = dot2(acc[m][v], row[v], two);
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[m][v] += x[m * step] * even(row[v]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[m][v] += x[m * step + second] * odd(row[v]);
    }
  }
}

// As score_tile; q is [head_dim / 2][M] pairs, or floats [head_dim][M], with a zero behind an odd
// head_dim.
template <int M, class X>
INLINE void score_pairs(const X* q, const bf16* first, const bf16* second, int64_t size,
                        int64_t head_dim, float* scores) {
  constexpr int HALF = NV / 2;
  vf acc[M][NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[m][v] = vf{};
  for (int64_t d = 0; d < head_dim; d += 2) {
    vu row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < HALF; v++) {
      row[v] = load_pairs(first + d * size + 2 * v * LANES);
      row[HALF + v] = load_pairs(second + d * size + 2 * v * LANES);
    }
    add_pairs<M>(q + d * M, sizeof(X) == 2 ? 2 : 1, M, row, acc);
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) store(scores + m * kKeys + v * LANES, acc[m][v]);
}

// As value_tile; p is [M][kKeys] of bf16 or floats, 0 after the last key.
template <int M, class X>
INLINE void value_pairs(const X* p, bf16* const* blocks, int64_t size, int64_t head_dim,
                        int64_t count, float* out) {
  vf acc[M][NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[m][v] = load(out + m * head_dim + v * LANES);
  for (int64_t start = 0; start < count; start += size) {
    const bf16* value = *blocks++;
    const int64_t end = start + size < count ? start + size : count;
    vu row[NV];
    int64_t t = start;
    for (; t + 1 < end; t += 2, value += 2 * head_dim) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) row[v] = load_pairs(value + 2 * v * LANES);
      add_pairs<M>(p + t, kKeys, 1, row, acc);
    }
    if (t < end) {  // beside the last there may be anything
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) row[v] = load_pairs(value + 2 * v * LANES) & 0xffffu;
      add_pairs<M>(p + t, kKeys, 1, row, acc);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) store(out + m * head_dim + v * LANES, acc[m][v]);
}

// So many blocks before a block is read, memory is asked for it: blocks lie anywhere.
constexpr int64_t kBlocksAhead = 4;

// The blocks of one chunk of keys and of up to kBlocksAhead that are read next, and where they were
// int8 the scales of its keys and then of its values, kKeys each.
template <class T>
struct Chunk {
  T *keys[kKeys / 16 + kBlocksAhead], *values[kKeys / 16 + kBlocksAhead];
  const float* scales;
  int64_t start, found;
  bool asks;  // for lines: where few rows are few products
};

template <class T>
INLINE void ask_for(const T* block, int64_t bytes) {
  const char* line = reinterpret_cast<const char*>(block);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
}

// rows[m][0, count) *= scales, for M rows of kKeys.
template <int M>
INLINE void scale_rows(float* rows, const float* scales, int64_t count) {
  for (int64_t t = 0; t < count; t += LANES) {
    const vf scale = load(scales + t);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) store(rows + m * kKeys + t, load(rows + m * kKeys + t) * scale);
  }
}

// One tile of M rows against the first `count` keys of a chunk.
template <int M, class T>
void chunk_tile(const Attention& a, const float* q, const int64_t* last, const Chunk<T>& chunk,
                int64_t count, float* most, float* total, float* out) {
  const auto &keys = chunk.keys, &values = chunk.values;
  const int64_t start = chunk.start;
  alignas(64) float p[M * kKeys];
  const int64_t size = a.block_size;
  const Block<T> at(a);
  const int64_t block_bytes = size * a.head_dim * int64_t(sizeof(T));
  for (int64_t t = 0; t < count; t += kPanel) {
    if (chunk.asks)
      for (int64_t b = (t + size - 1) / size; b * size < least_of(t + kPanel, count); b++) {
        ask_for(values[b], block_bytes);
        if (b + kBlocksAhead < chunk.found) ask_for(keys[b + kBlocksAhead], block_bytes);
      }
    const T* first = keys[t / size] + at.in_keys(t % size, 0);
    const int64_t u = t + 16 < count ? t + 16 : t;  // past the end: any keys, masked below
    const T* second = keys[u / size] + at.in_keys(u % size, 0);
    if constexpr (kPaired<T> && kDots)
      score_pairs<M>(reinterpret_cast<const bf16*>(q), first, second, size, a.head_dim, p + t);
    else if constexpr (kPaired<T>)
      score_pairs<M>(q, first, second, size, a.head_dim, p + t);
    else
      score_tile<M>(q, first, second, size, a.head_dim, p + t);
  }
  const int64_t padded = (count + kPanel - 1) / kPanel * kPanel;
  if (kPaired<T> && chunk.scales) scale_rows<M>(p, chunk.scales, padded);
  // first the maxima of all rows, then what needs them: the rows' reductions overlap
  static_assert(M <= LANES, "a lane for each row");
  alignas(64) float before[LANES] = {}, now[LANES] = {};
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
    vf top[NV];
    for (int v = 0; v < NV; v++) top[v] = splat(most[m]);
    for (int64_t t = 0; t < padded; t += kPanel)
      for (int v = 0; v < NV; v++) top[v] = max(load(row + t + v * LANES), top[v]);
    for (int v = 1; v < NV; v++) top[0] = max(top[v], top[0]);
    before[m] = most[m];
    now[m] = largest(top[0]);
  }
  alignas(64) float shrink[LANES];
  store(shrink, exp(load(before) - load(now)));
  for (int m = 0; m < M; m++) {
    float* row = p + m * kKeys;
    if (!(now[m] > -INFINITY)) {  // nothing to be seen here, or NaN only: that must stay visible
      for (int64_t t = 0; t < padded; t++) row[t] = row[t] != row[t] ? row[t] : 0.0f;
      continue;
    }
    if (now[m] != before[m]) {
      total[m] *= shrink[m];
      float* line = out + m * a.head_dim;
      for (int64_t d = 0; d < a.head_dim; d++) line[d] *= shrink[m];
      most[m] = now[m];
    }
    vf here[NV] = {};
    for (int64_t t = 0; t < padded; t += kPanel)
      for (int v = 0; v < NV; v++) {
        const vf e = exp(load(row + t + v * LANES) - now[m]);
        store(row + t + v * LANES, e);
        here[v] += e;
      }
    for (int v = 1; v < NV; v++) here[0] += here[v];
    total[m] += sum(here[0]);
  }
  // a value's scale goes to its weight
  if (kPaired<T> && chunk.scales) scale_rows<M>(p, chunk.scales + kKeys, padded);
  // weights with a scale stay floats: rounded, rows of equal weights would not add up to 1
  const bool dots = kPaired<T> && kDots && !chunk.scales;
  alignas(64) bf16 pairs[kPaired<T> && kDots ? M * kKeys : 1];
  if (dots) {  // up to the end of the panel: 0 after the last key
    for (int m = 0; m < M; m++)
      for (int64_t t = 0; t < padded; t += kPanel)
        narrow_panel(p + m * kKeys + t, pairs + m * kKeys + t);
  }
  int64_t d = 0;
  for (; d + kPanel <= a.head_dim; d += kPanel) {
    T* here[kKeys / 16];
    for (int64_t b = 0; b * size < count; b++) here[b] = values[b] + at.in_values(0, d);
    if constexpr (kPaired<T>) {
      if (dots)
        value_pairs<M>(pairs, here, size, a.head_dim, count, out + d);
      else
        value_pairs<M>(p, here, size, a.head_dim, count, out + d);
    } else {
      value_tile<M>(p, here, size, a.head_dim, count, out + d);
    }
  }
  for (; d < a.head_dim; d++) {
    for (int m = 0; m < M; m++) {
      float acc = out[m * a.head_dim + d];
      for (int64_t t = 0; t < count; t++)
        acc += p[m * kKeys + t] * one(values[t / size][at.in_values(t % size, d)]);
      out[m * a.head_dim + d] = acc;
    }
  }
}

template <int M, class T>
void chunk_of(int64_t rows, const Attention& a, const float* q, const int64_t* last,
              const Chunk<T>& chunk, int64_t count, float* most, float* total, float* out) {
  if constexpr (M > 0) {
    if (rows == M) return chunk_tile<M>(a, q, last, chunk, count, most, total, out);
    chunk_of<M - 1>(rows, a, q, last, chunk, count, most, total, out);
  }
}

// Rows of a tile of queries, ready for the keys.
struct Queries {
  int64_t rows, tile, width, cached, count;
  int64_t* last;  // [rows] position of each
  float* q;       // [tiles][width][tile], scaled
  float* free;    // what follows in the scratch
  float* wide;    // room for a chunk of int8 keys and values as bf16, and their scales; 64 bytes
};

// Floats of that room.
constexpr int64_t kLine = 64 / sizeof(float);
INLINE int64_t wide_size(const Attention& a) {
  return a.format == kInt8 ? kKeys * even_up(a.head_dim) + 2 * kKeys + kLine : 0;
}

// Rows r % G of the queries first + r / G; `more` floats are left free behind them.
inline Queries queries_of(const Attention& a, int64_t request, int64_t first, int64_t count,
                          int64_t head, int64_t more) {
  const int64_t D = a.head_dim, G = a.heads / a.kv_heads, rows = count * G;
  const int64_t cached = a.seq_lens[request] - a.q_lens[request] + first;
  const int64_t token = a.q_start[request] + first;
  const int64_t tiles = (rows + MAX_TILE - 1) / MAX_TILE, tile = (rows + tiles - 1) / tiles;
  const int64_t width = even_up(D), line = width + kPanel;  // zeros behind the last
  const int64_t floats = rows * width + more + tile * line + wide_size(a);
  int64_t* last = static_cast<int64_t*>(scratch(rows * 8 + floats * 4));
  float* q = reinterpret_cast<float*>(last + rows);
  float* staged = q + rows * width + more;
  float* wide = staged + tile * line;
  while (reinterpret_cast<uintptr_t>(wide) % 64) wide++;
  const bool pairs = kDots && (a.format == kBF16 || a.format == kInt8);
  bf16* narrowed = reinterpret_cast<bf16*>(staged);
  for (int64_t at = 0; at < rows; at += tile) {
    const int64_t here = least_of(tile, rows - at);
    for (int64_t r = at; r < at + here; r++) {
      const float* from = a.q + (token + r / G) * a.q_stride + (head * G + r % G) * D;
      float* to = staged + (r - at) * line;
      for (int64_t d = 0; d < D; d++) to[d] = from[d] * a.scale;
      for (int64_t d = D; d < line; d++) to[d] = 0.0f;
      // in place: what is written lies before what is still to be read
      if (pairs) narrow_row(to, D, narrowed + (r - at) * line);
      last[r] = cached + r / G;
    }
    if (pairs)
      interleave(staged, line / 2, here, width / 2, q + at * width);
    else
      interleave(staged, line, here, width, q + at * width);
  }
  return {rows, tile, width, cached, count, last, q, q + rows * width, wide};
}

// Finds the blocks of a chunk and those that are read next: the request has `count` keys from the
// chunk's start on, then the next head's turn comes from block `again` on.
template <class T>
INLINE void find_chunk(const Attention& a, const int32_t* table, int64_t head, int64_t count,
                       int64_t again, Chunk<T>& chunk) {
  const Block<T> blocks(a);
  const int64_t first = chunk.start / a.block_size, size = a.block_size;
  const int64_t here = (count + size - 1) / size, most = kKeys / size + kBlocksAhead;
  const int64_t later = head + 1 < a.kv_heads ? least_of(kBlocksAhead, first + here - again) : 0;
  chunk.found = least_of(here + later, most);
  for (int64_t b = 0; b < chunk.found; b++) {
    const int64_t block = table[b < here ? first + b : again + b - here];
    chunk.keys[b] = blocks.keys(block, head + (b >= here));
    chunk.values[b] = blocks.values(block, head + (b >= here));
  }
}

// The blocks of its first `count` keys widened to bf16 in `room`, their scales behind them.
inline void widen_chunk(const Attention& a, const Chunk<int8_t>& from, int64_t count, float* room,
                        Chunk<bf16>& to) {
  const int64_t size = a.block_size, all = size * even_up(a.head_dim);
  bf16* wide = reinterpret_cast<bf16*>(room);
  float* scales = room + kKeys * even_up(a.head_dim);
  for (int64_t b = 0; b * size < count; b++) {
    const int64_t later = b + kBlocksAhead < from.found ? b + kBlocksAhead : b;
    for (int v = 0; v < 2; v++) {
      int8_t* const* blocks = v ? from.values : from.keys;
      for (int64_t i = 0; i < all; i += kPanel) {
        __builtin_prefetch(blocks[later] + i);
        widen_panel(blocks[b] + i, wide + i);
      }
      const float* of = scales_of(a, blocks[b]);
      for (int64_t i = 0; i < size; i += LANES)
        store(scales + v * kKeys + b * size + i, load(of + i));
      (v ? to.values : to.keys)[b] = wide;
      wide += all;
    }
  }
  // a weight of 0 stays 0 whatever was in memory
  for (int64_t t = count; t < kKeys; t++) scales[t] = scales[kKeys + t] = 0.0f;
  to.scales = scales;
}

// The keys of one piece: state = outputs [rows, D], maxima [rows], sums [rows].
template <class T>
void piece_as(const Attention& a, const Queries& at, int64_t request, int64_t head, int64_t piece,
              float* state) {
  using W = typename Worked<T>::type;
  const int64_t D = a.head_dim, rows = at.rows;
  float *out = state, *most = out + rows * D, *total = most + rows;
  for (int64_t i = 0; i < rows * D; i++) out[i] = 0.0f;
  for (int64_t r = 0; r < rows; r++) most[r] = -INFINITY, total[r] = 0.0f;
  const int32_t* table = a.block_table + request * a.table_width;
  const int64_t seen = a.window ? most_of(0, at.cached - a.window + 1) : 0;
  const int64_t end = least_of(at.cached + at.count, (piece + 1) * kPiece);
  const int64_t begin = most_of(seen / kKeys * kKeys, piece * kPiece);
  for (int64_t start = begin; start < end; start += kKeys) {
    const int64_t keys_here = least_of(kKeys, end - start);
    Chunk<W> chunk;
    chunk.scales = nullptr, chunk.start = start;
    chunk.asks = sizeof(T) > 1 && rows <= at.tile;
    if constexpr (sizeof(T) == 1) {
      Chunk<T> bytes;
      bytes.start = start;
      find_chunk(a, table, head, at.cached + at.count - start, begin / a.block_size, bytes);
      widen_chunk(a, bytes, keys_here, at.wide, chunk);
    } else {
      find_chunk(a, table, head, at.cached + at.count - start, begin / a.block_size, chunk);
    }
    for (int64_t r = 0; r < rows; r += at.tile) {
      const int64_t here = least_of(at.tile, rows - r);
      if (at.last[r + here - 1] < start) continue;
      if (a.window && at.last[r] - a.window + 1 >= start + keys_here) continue;
      const int64_t visible = least_of(keys_here, at.last[r + here - 1] + 1 - start);
      chunk_of<MAX_TILE, W>(here, a, at.q + r * at.width, at.last + r, chunk, visible, most + r,
                            total + r, out + r * D);
    }
  }
}

inline void piece_of(const Attention& a, const Queries& at, int64_t request, int64_t head,
                     int64_t piece, float* state) {
  if (a.format == kF32) return piece_as<float>(a, at, request, head, piece, state);
  if (a.format == kBF16) return piece_as<bf16>(a, at, request, head, piece, state);
  if (a.format == kInt8) return piece_as<int8_t>(a, at, request, head, piece, state);
  piece_as<f16>(a, at, request, head, piece, state);
}

// Adds the state of the next piece. One function for all who join, never inlined, so that a sum is
// compiled once and its bits do not depend on who asks. A piece of which a row saw nothing changes
// none of its bits, but a NaN of it stays visible.
__attribute__((noinline, noclone)) inline void join(int64_t rows, int64_t D, float* state,
                                           const float* next) {
  float *most = state + rows * D, *total = most + rows;
  const float *next_most = next + rows * D, *next_total = next_most + rows;
  for (int64_t r = 0; r < rows; r++) {
    float* out = state + r * D;
    const float* add = next + r * D;
    if (!(next_most[r] > -INFINITY)) {
      for (int64_t d = 0; d < D; d++) out[d] = add[d] != add[d] ? add[d] : out[d];
      continue;
    }
    if (!(most[r] > -INFINITY)) {
      for (int64_t d = 0; d < D; d++) out[d] = out[d] != out[d] ? out[d] : add[d];
      most[r] = next_most[r];
      total[r] = next_total[r];
      continue;
    }
    const float now = most[r] > next_most[r] ? most[r] : next_most[r];
    const float here = exp(splat(most[r] - now))[0], there = exp(splat(next_most[r] - now))[0];
    for (int64_t d = 0; d < D; d++) out[d] = out[d] * here + add[d] * there;
    total[r] = total[r] * here + next_total[r] * there;
    most[r] = now;
  }
}

// Writes the output of the rows.
inline void give(const Attention& a, int64_t request, int64_t first, int64_t count, int64_t head,
                 const float* state) {
  const int64_t D = a.head_dim, G = a.heads / a.kv_heads, rows = count * G;
  const float* total = state + rows * D + rows;
  const int64_t token = a.q_start[request] + first;
  for (int64_t r = 0; r < rows; r++) {
    float* to = a.out + (token + r / G) * a.heads * D + (head * G + r % G) * D;
    for (int64_t d = 0; d < D; d++) to[d] = state[r * D + d] / total[r];
  }
}

inline void attend(const Attention& a, int64_t request, int64_t first, int64_t count,
                   int64_t head) {
  const int64_t rows = count * (a.heads / a.kv_heads), size = attention_state(rows, a.head_dim);
  const Queries at = queries_of(a, request, first, count, head, 2 * size);
  const Pieces seen = pieces_seen(at.cached, count, a.window);
  for (int64_t piece = seen.from; piece < seen.to; piece++) {
    float* state = piece == seen.from ? at.free : at.free + size;
    piece_of(a, at, request, head, piece, state);
    if (piece > seen.from) join(rows, a.head_dim, at.free, state);
  }
  give(a, request, first, count, head, at.free);
}

inline void attend_piece(const Attention& a, int64_t request, int64_t first, int64_t count,
                         int64_t head, int64_t piece, float* state) {
  piece_of(a, queries_of(a, request, first, count, head, 0), request, head, piece, state);
}

inline void join_pieces(const Attention& a, int64_t request, int64_t first, int64_t count,
                        int64_t head, int64_t pieces, float* states) {
  const int64_t rows = count * (a.heads / a.kv_heads), size = attention_state(rows, a.head_dim);
  for (int64_t i = 1; i < pieces; i++) join(rows, a.head_dim, states, states + i * size);
  give(a, request, first, count, head, states);
}

}  // namespace tokenry::NS
