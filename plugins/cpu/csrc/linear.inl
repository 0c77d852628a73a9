// y = x W^T + b. Each output is the sum over its inputs in one fixed order (kDepth by kDepth, in a
// block one after the other), whatever the number of rows: the same bits alone or among others.
namespace tokenry::NS {

constexpr int NV = kPanel / LANES;

// What is asked for while a tile computes: in each turn of its loop, which reads kTurn bytes of
// weights, the two lines from `at` + turn * step on.
constexpr int64_t kTurn = kPanel * 4;
struct Ahead {
  const char* at;
  int64_t step;
  INLINE void turn(int64_t i) const {
    __builtin_prefetch(at + i * step);
    __builtin_prefetch(at + i * step + kTurn / 2);
  }
  Ahead after(int64_t turns) const { return {at + turns * step, step}; }
};

// total[m][v] = sum over d of x(d, m) * w[d][v], with x(d, m) = x[d * XD + m * XM] and w's row d at
// w + d * kPanel.
template <int M, int XD, int XM, class W>
INLINE void product(const float* x, const W* w, int64_t depth, Ahead ahead,
                    vf (&total)[M][NV]) {
  vf acc[M][NV];  // of our own: through the reference each sum would be stored in each turn
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[m][v] = vf{};
  for (int64_t d = 0; d < depth; d++) {
    vf row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) row[v] = load(w + d * kPanel + v * LANES);
    ahead.turn(d);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[m][v] += x[d * XD + m * XM] * row[v];
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) total[m][v] = acc[m][v];
}

// The same for bf16 weights, two inputs at a time; x either as floats (x + d * M) or as bf16 pairs.
template <int M, class X>
INLINE void product_pairs(const X* x, const uint32_t* w, int64_t depth, Ahead ahead,
                          vf (&total)[M][NV]) {
  vf acc[M][NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[m][v] = vf{};
  for (int64_t d = 0; d < depth; d += 2) {
    vu row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++)
      row[v] = *reinterpret_cast<const vu_any*>(w + d / 2 * kPanel + v * LANES);
    ahead.turn(d / 2);
    if constexpr (sizeof(X) == 2) {
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        uint32_t two;
        memcpy(&two, x + d * M + 2 * m, 4);
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) acc[m][v] = dot2(acc[m][v], row[v], two);
      }
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) acc[m][v] += x[d * M + m] * even(row[v]);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) acc[m][v] += x[(d + 1) * M + m] * odd(row[v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) total[m][v] = acc[m][v];
}

template <int M, class X>
void pairs_tile(const X* x, const uint32_t* w, int64_t k, Ahead ahead, vf (&total)[M][NV]) {
  product_pairs<M>(x, w, k < kDepth ? k : kDepth, ahead, total);
  for (int64_t d = kDepth; d < k; d += kDepth) {
    vf part[M][NV];
    product_pairs<M>(x + d * M, w + d / 2 * kPanel, k - d < kDepth ? k - d : kDepth,
                     ahead.after(d / 2), part);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) total[m][v] += part[m][v];
  }
}

// One tile of M rows against one panel.
template <int M, class W>
void float_tile(const float* x, const W* w, int64_t k, Ahead ahead, vf (&total)[M][NV]) {
  product<M, M, 1>(x, w, k < kDepth ? k : kDepth, ahead, total);
  for (int64_t d = kDepth; d < k; d += kDepth) {
    vf part[M][NV];
    product<M, M, 1>(x + d * M, w + d * kPanel, k - d < kDepth ? k - d : kDepth, ahead.after(d),
                     part);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) total[m][v] += part[m][v];
  }
}

template <int M>
void int8_tile(const Packed& x, const Weight& w, int64_t panel, int64_t at, const int8_t* rows,
               Ahead ahead, vf (&total)[M][NV]) {
  const uint8_t* bytes = static_cast<const uint8_t*>(w.data) + panel * w.depth * kPanel;
  vi acc[M][NV];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) acc[m][v] = splat(-128 * x.sums[at + m]);
  for (int64_t d = 0; d < w.depth; d += 4) {
    vb row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++)
      row[v] = *reinterpret_cast<const vb_any*>(bytes + d * kPanel + v * LANES * 4);
    ahead.turn(d / 4);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      int32_t four;
      memcpy(&four, rows + d * M + m * 4, 4);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[m][v] = dot4(acc[m][v], row[v], four);
    }
  }
  const float* scales = w.scales + panel * kPanel;
  for (int v = 0; v < NV; v++) {
    vf scale = load(scales + v * LANES);
    for (int m = 0; m < M; m++)
      total[m][v] = __builtin_convertvector(acc[m][v], vf) * (scale * x.scales[at + m]);
  }
}

template <int M>
void int4_tile(const Packed& x, const Weight& w, int64_t panel, int64_t tile, const int8_t* rows,
               Ahead ahead, vf (&total)[M][NV]) {
  const int64_t groups = w.depth / kGroup;
  const uint8_t* bytes =
      static_cast<const uint8_t*>(w.data) + panel * w.depth * (kPanel / 2);
  const float* scales = w.scales + panel * groups * kPanel;
  const float* x_scales = x.scales + tile * groups * x.tile;
  const int32_t* x_sums = x.sums + tile * groups * x.tile;
  vf all[M][NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) all[m][v] = vf{};
  for (int64_t g = 0; g < groups; g++) {
    vi acc[M][NV];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[m][v] = splat(-8 * x_sums[g * M + m]);
#pragma GCC unroll 8
    for (int j = 0; j < kGroup / 8; j++) {
      const uint8_t* pair = bytes + (g * kGroup / 8 + j) * kPanel * 4;
      const int8_t* at = rows + (g * kGroup + j * 8) * M;
      vb low[NV], high[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) {
        vb raw = *reinterpret_cast<const vb_any*>(pair + v * LANES * 4);
        low[v] = raw & 0xf;
        high[v] = (vb)((vu)raw >> 4) & 0xf;
      }
      ahead.turn(g * kGroup / 8 + j);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        int32_t first, second;
        memcpy(&first, at + m * 4, 4);
        memcpy(&second, at + (M + m) * 4, 4);
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++)
          acc[m][v] = dot4(dot4(acc[m][v], low[v], first), high[v], second);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      vf scale = load(scales + g * kPanel + v * LANES);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
        all[m][v] += __builtin_convertvector(acc[m][v], vf) * (scale * x_scales[g * M + m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) total[m][v] = all[m][v];
}

template <int M>
void one_tile(const Weight& w, const Packed& x, int64_t panel, int64_t tile, Ahead ahead,
              float* y, int64_t stride) {
  vf total[M][NV];
  const int64_t at = tile * x.tile, first = panel * kPanel;
  // the lines that are written at the end come while it computes
  for (int m = 0; m < M; m++)
    for (int i = 0; i < kPanel; i += 16) __builtin_prefetch(y + (at + m) * stride + first + i, 1);
  const float* floats = static_cast<const float*>(x.data) + at * w.depth;
  const int8_t* bytes = static_cast<const int8_t*>(x.data) + at * w.depth;
  const int64_t from = panel * w.depth * kPanel;
  switch (w.format) {
    case kF32:
      float_tile<M>(floats, static_cast<const float*>(w.data) + from, w.depth, ahead, total);
      break;
    case kBF16:
      pairs_tile<M>(floats, static_cast<const uint32_t*>(w.data) + from / 2, w.depth, ahead, total);
      break;
    case kBF16Dots:
      pairs_tile<M>(static_cast<const bf16*>(x.data) + at * w.depth,
                    static_cast<const uint32_t*>(w.data) + from / 2, w.depth, ahead, total);
      break;
    case kF16:
      float_tile<M>(floats, static_cast<const f16*>(w.data) + from, w.depth, ahead, total);
      break;
    case kInt8:
      int8_tile<M>(x, w, panel, at, bytes, ahead, total);
      break;
    default:
      int4_tile<M>(x, w, panel, tile, bytes, ahead, total);
  }
  const int64_t count = w.n - first < kPanel ? w.n - first : kPanel;
  for (int m = 0; m < M; m++) {
    float* out = y + (at + m) * stride + first;
    if (count == kPanel) {
      for (int v = 0; v < NV; v++) {
        vf value = total[m][v];
        if (w.bias) value += load(w.bias + first + v * LANES);
        store(out + v * LANES, value);
      }
    } else {
      float line[kPanel];
      for (int v = 0; v < NV; v++) store(line + v * LANES, total[m][v]);
      for (int64_t i = 0; i < count; i++) out[i] = line[i] + (w.bias ? w.bias[first + i] : 0.0f);
    }
  }
}

template <int M>
void tile_of(int64_t rows, const Weight& w, const Packed& x, int64_t panel, int64_t tile,
             Ahead ahead, float* y, int64_t stride) {
  if constexpr (M > 0) {
    if (rows == M) return one_tile<M>(w, x, panel, tile, ahead, y, stride);
    tile_of<M - 1>(rows, w, x, panel, tile, ahead, y, stride);
  }
}

inline int64_t rows_of(const Packed& x, int64_t tile) {
  int64_t left = x.rows - tile * x.tile;
  return left < x.tile ? left : x.tile;
}

// How far ahead of their use weights that come from memory are asked for, in bytes, with one tile of
// rows. With several each asks for its share of the next panel, so that reading and multiplying
// overlap.
constexpr int64_t kAhead = 4096;

inline int64_t panel_bytes(const Weight& w) {
  const int64_t values = w.depth * kPanel;
  if (w.format == kInt4) return values / 2;
  return values * (w.format == kF32 ? 4 : w.format == kInt8 ? 1 : 2);
}

inline void linear(const Weight& w, const Packed& x, int64_t panel, int64_t from, int64_t to,
                   float* y, int64_t stride) {
  const int64_t bytes = panel_bytes(w), tiles = to - from;
  const char* next = static_cast<const char*>(w.data) + panel * bytes + (tiles > 1 ? bytes : kAhead);
  const int64_t turn = w.format == kF16 ? kTurn / 2 : kTurn;
  for (int64_t tile = from; tile < to; tile++) {
    const Ahead ahead{next + (tile - from) * bytes / tiles, (turn + tiles - 1) / tiles};
    tile_of<MAX_TILE>(rows_of(x, tile), w, x, panel, tile, ahead, y, stride);
  }
}

// ---- activations ----

typedef uint32_t v4 __attribute__((vector_size(16)));
typedef uint32_t v4_any __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t word __attribute__((may_alias, aligned(4)));

// to[i * rows + m] = from[m * stride + i] for words i < n: neighbouring rows side by side.
inline void interleave(const void* source, int64_t stride, int64_t rows, int64_t n, void* target) {
  const word* from = static_cast<const word*>(source);
  word* to = static_cast<word*>(target);
  if (rows == 1) memcpy(to, from, n * 4);
  for (int64_t m = 0; rows > 1 && m < rows; m += 4) {
    if (rows - m < 4 && rows >= 4) m = rows - 4;  // some rows twice
    int64_t i = 0;
    for (; rows >= 4 && i + 4 <= n; i += 4) {
      v4 row[4];
      for (int j = 0; j < 4; j++)
        row[j] = *reinterpret_cast<const v4_any*>(from + (m + j) * stride + i);
      const v4 a = SHUFFLE(v4, row[0], row[1], 0, 4, 1, 5);
      const v4 b = SHUFFLE(v4, row[2], row[3], 0, 4, 1, 5);
      const v4 c = SHUFFLE(v4, row[0], row[1], 2, 6, 3, 7);
      const v4 d = SHUFFLE(v4, row[2], row[3], 2, 6, 3, 7);
      const v4 columns[4] = {
          SHUFFLE(v4, a, b, 0, 1, 4, 5), SHUFFLE(v4, a, b, 2, 3, 6, 7),
          SHUFFLE(v4, c, d, 0, 1, 4, 5), SHUFFLE(v4, c, d, 2, 3, 6, 7)};
      for (int j = 0; j < 4; j++)
        *reinterpret_cast<v4_any*>(to + (i + j) * rows + m) = columns[j];
    }
    for (; i < n; i++)
      for (int64_t j = m; j < m + 4 && j < rows; j++) to[i * rows + j] = from[j * stride + i];
  }
}

// Quantises x[0, n) to [-127, 127] * scale; what follows up to `padded`, a multiple of 4, is 0. A
// NaN or infinity becomes a NaN scale, so that it is seen in the output.
inline void quantise(const float* x, int64_t n, int64_t padded, int8_t* out, float* scale,
                     int32_t* sum_out) {
  typedef int8_t bytes_of __attribute__((vector_size(LANES)));
  vf most{}, check{};
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES) {
    const vf v = load(x + d);
    most = max(most, v < 0.0f ? -v : v);
    check += v * 0.0f;
  }
  float line[LANES] = {};
  for (int64_t i = d; i < n; i++) line[i - d] = x[i];
  const vf rest = load(line);
  most = max(most, rest < 0.0f ? -rest : rest);
  check += rest * 0.0f;
  const float top = largest(most);
  const bool finite = sum(check) == 0.0f;
  *scale = finite ? top / 127.0f : NAN;
  const float inverse = finite && top > 0 ? 127.0f / top : 0.0f;
  vi total{};
  for (d = 0; d < padded; d += LANES) {
    const vf v = d + LANES <= n ? load(x + d) : d < n ? rest : vf{};
    // adding and taking away 1.5 * 2^23 rounds to the nearest whole number
    const vf whole = (min(max(v * inverse, splat(-127.0f)), splat(127.0f)) + 12582912.0f) -
                     12582912.0f;
    const vi q = __builtin_convertvector(finite ? whole : vf{}, vi);
    total += q;
    const bytes_of narrowed = __builtin_convertvector(q, bytes_of);
    if (d + LANES <= padded) {
      memcpy(out + d, &narrowed, LANES);
    } else {
      memcpy(out + d, &narrowed, padded - d);
    }
  }
  int32_t all = 0;
  for (int i = 0; i < LANES; i++) all += total[i];
  *sum_out = all;
}

// x[0, n) rounded to bf16, with zeros up to a whole panel.
INLINE void narrow_row(const float* x, int64_t n, bf16* y) {
  for (int64_t d = 0; d < n; d += kPanel) {
    float last[kPanel] = {};
    if (n - d < kPanel) memcpy(last, x + d, (n - d) * 4);
    narrow_panel(n - d < kPanel ? last : x + d, y + d);
  }
}

// Inputs that are rounded row by row before the rows are put side by side.
constexpr int64_t kStaged = 512;

inline void pack_rows(const Weight& w, const float* x, int64_t stride, Packed& to, int64_t tile) {
  const int64_t rows = rows_of(to, tile), at = tile * to.tile;
  x += at * stride;
  if (w.format == kBF16Dots) {
    bf16* out = static_cast<bf16*>(to.data) + at * w.depth;
    alignas(64) bf16 staged[MAX_TILE * kStaged];
    for (int64_t from = 0; from < w.depth; from += kStaged) {
      const int64_t here = w.depth - from < kStaged ? w.depth - from : kStaged;
      const int64_t n = w.k - from < here ? w.k - from : here;
      for (int64_t m = 0; m < rows; m++)
        narrow_row(x + m * stride + from, n, staged + m * kStaged);
      interleave(staged, kStaged / 2, rows, here / 2, out + from * rows);
    }
    return;
  }
  if (!quantised(w.format)) {
    float* out = static_cast<float*>(to.data) + at * w.depth;
    interleave(x, stride, rows, w.k, out);
    for (int64_t i = w.k * rows; i < w.depth * rows; i++) out[i] = 0.0f;
    return;
  }
  int8_t* out = static_cast<int8_t*>(to.data) + at * w.depth;
  if (w.format == kInt8) {
    // one row is where it belongs at once; its target may be the scratch itself
    int8_t* staged = rows == 1 ? out : static_cast<int8_t*>(scratch(rows * w.depth));
    for (int64_t m = 0; m < rows; m++)
      quantise(x + m * stride, w.k, w.depth, staged + m * w.depth, to.scales + at + m,
               to.sums + at + m);
    if (rows > 1) interleave(staged, w.depth / 4, rows, w.depth / 4, out);
    return;
  }
  const int64_t groups = w.depth / kGroup;
  alignas(64) int8_t staged[MAX_TILE * kGroup];
  for (int64_t g = 0; g < groups; g++) {
    const int64_t from = g * kGroup, n = w.k - from < kGroup ? w.k - from : kGroup;
    const int64_t row = tile * groups * to.tile + g * rows;
    for (int64_t m = 0; m < rows; m++)
      quantise(x + m * stride + from, n, kGroup, staged + m * kGroup, to.scales + row + m,
               to.sums + row + m);
    interleave(staged, kGroup / 4, rows, kGroup / 4, out + from * rows);
  }
}

}  // namespace tokenry::NS
