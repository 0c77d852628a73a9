// Attention over paged KV. A tile of query rows walks through the keys, kKeys at a time from
// position 0, with a running maximum and sum (online softmax, Milakov and Gimelshein 2018). Every
// kPiece keys these begin anew, and the pieces are joined in order; so threads may share a long
// context. What a row adds up, and in which order, depends on its own position only: the same bits
// for any chunk, tile, batch and number of threads.
namespace tokenry::NS {

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
  // Weights with a scale are rounded to bf16 first, and what they add up to is told of the rounded
  // ones: of equal weights the mean is exact.
  const bool scaled = kPaired<T> && chunk.scales, rounds = scaled && kDots;
  const float* weighs = scaled ? chunk.scales + kKeys : nullptr;
  const float* inverses = scaled ? weighs + kKeys : nullptr;
  if (chunk.asks)
    for (int64_t b = 0; b * size < count; b++) {
      ask_for(values[b], block_bytes);
      if (b + kBlocksAhead < chunk.found) ask_for(keys[b + kBlocksAhead], block_bytes);
    }
  const T* parts[kKeys / 16];  // past the end: any keys, masked below
  for (int64_t i = 0; i < kKeys / 16; i++) {
    const int64_t t = i * 16 < count ? i * 16 : 0;
    parts[i] = keys[t / size] + at.in_keys(t % size, 0);
  }
  using Q = typename Factor<T>::type;
  score_panels<M, kAtOnce<M, T>>(reinterpret_cast<const Q*>(q), parts, size, a.head_dim, count, p);
  const int64_t padded = (count + kPanel - 1) / kPanel * kPanel;
  if (scaled) scale_rows<M>(p, chunk.scales, padded);
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
        vf e = exp(load(row + t + v * LANES) - now[m]);
        if (rounds) {
          const vf weight = rounded(e * load(weighs + t + v * LANES));
          store(row + t + v * LANES, weight);
          e = weight * load(inverses + t + v * LANES);
        } else {
          store(row + t + v * LANES, e);
        }
        here[v] += e;
      }
    for (int v = 1; v < NV; v++) here[0] += here[v];
    total[m] += sum(here[0]);
  }
  if (scaled && !rounds) scale_rows<M>(p, weighs, padded);
  constexpr bool dots = kPaired<T> && kDots;
  alignas(64) bf16 pairs[dots ? M * kKeys : 1];
  if constexpr (dots) {  // up to the end of the panel: 0 after the last key
    for (int m = 0; m < M; m++)
      for (int64_t t = 0; t < padded; t += kPanel)
        narrow_panel(p + m * kKeys + t, pairs + m * kKeys + t);
  }
  int64_t d = 0;
  if constexpr (dots)
    d = value_panels<M, kAtOnce<M, T>>(pairs, values, size, a.head_dim, count, out);
  else
    d = value_panels<M, kAtOnce<M, T>>(p, values, size, a.head_dim, count, out);
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
  const int64_t begin = seen / kKeys * kKeys, again = begin / a.block_size;
  for (int64_t start = most_of(begin, piece * kPiece); start < end; start += kKeys) {
    const int64_t keys_here = least_of(kKeys, end - start);
    Chunk<W> chunk;
    chunk.scales = nullptr, chunk.start = start;
    chunk.asks = sizeof(T) > 1 && rows <= at.tile;
    if constexpr (sizeof(T) == 1) {
      Chunk<T> bytes;
      bytes.start = start;
      find_chunk(a, table, head, at.cached + at.count - start, again, bytes);
      widen_chunk(a, bytes, keys_here, at.wide, chunk);
    } else {
      find_chunk(a, table, head, at.cached + at.count - start, again, chunk);
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
