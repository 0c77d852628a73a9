// The products of attention: rows of queries with panels of keys, weights with the values of a chunk.
namespace tokenry::NS {

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

// Panels that M rows take at once: few rows have few sums, and each waits for the one before.
template <int M, class T>
constexpr int kAtOnce = !kDots || !kPaired<T> || M > 6 ? 1 : M > 3 ? 2 : 4;

// As score_tile, for P panels: `parts` are 16 neighbouring keys each, two a panel. q is
// [head_dim / 2][M] pairs, or floats [head_dim][M], with a zero behind an odd head_dim.
template <int M, int P, class X>
INLINE void score_pairs(const X* q, const bf16* const* parts, int64_t size, int64_t head_dim,
                        float* scores) {
  constexpr int HALF = NV / 2;
  vf acc[P][M][NV];
#pragma GCC unroll 4
  for (int s = 0; s < P; s++)
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[s][m][v] = vf{};
  for (int64_t d = 0; d < head_dim; d += 2)
#pragma GCC unroll 4
    for (int s = 0; s < P; s++) {
      vu row[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++)
        row[v] = load_pairs(parts[2 * s + v / HALF] + d * size + 2 * (v % HALF) * LANES);
      add_pairs<M>(q + d * M, sizeof(X) == 2 ? 2 : 1, M, row, acc[s]);
    }
#pragma GCC unroll 4
  for (int s = 0; s < P; s++)
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) store(scores + s * kPanel + m * kKeys + v * LANES, acc[s][m][v]);
}

// As value_tile, for P panels; p is [M][kKeys] of bf16 or floats, 0 after the last key.
template <int M, int P, class X>
INLINE void value_pairs(const X* p, bf16* const* blocks, int64_t size, int64_t head_dim,
                        int64_t count, float* out) {
  vf acc[P][M][NV];
#pragma GCC unroll 4
  for (int s = 0; s < P; s++)
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[s][m][v] = load(out + s * kPanel + m * head_dim + v * LANES);
  const auto add = [&](const bf16* value, int64_t t, uint32_t seen) INLINED {
#pragma GCC unroll 4
    for (int s = 0; s < P; s++) {
      vu row[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) row[v] = load_pairs(value + 2 * (s * kPanel + v * LANES)) & seen;
      add_pairs<M>(p + t, kKeys, 1, row, acc[s]);
    }
  };
  for (int64_t start = 0; start < count; start += size) {
    const bf16* value = *blocks++;
    const int64_t end = start + size < count ? start + size : count;
    int64_t t = start;
    for (; t + 1 < end; t += 2, value += 2 * head_dim) add(value, t, ~0u);
    if (t < end) add(value, t, 0xffffu);  // beside the last there may be anything
  }
#pragma GCC unroll 4
  for (int s = 0; s < P; s++)
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) store(out + s * kPanel + m * head_dim + v * LANES, acc[s][m][v]);
}

// What queries and weights are multiplied as with keys and values of T.
template <class T>
struct Factor {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Factor<bf16> {
  using type = bf16;
};
#endif

// The scores of the panels that hold `count` keys, P or fewer at once.
template <int M, int P, class T, class X>
INLINE void score_panels(const X* q, const T* const* parts, int64_t size, int64_t head_dim,
                         int64_t count, float* scores) {
  int64_t t = 0;
  if constexpr (kPaired<T>) {
    for (; t + (P - 1) * kPanel < count; t += P * kPanel)
      score_pairs<M, P>(q, parts + t / 16, size, head_dim, scores + t);
    if constexpr (P > 1)
      if (t < count)
        score_panels<M, P / 2>(q, parts + t / 16, size, head_dim, count - t, scores + t);
  } else {
    for (; t < count; t += kPanel)
      score_tile<M>(q, parts[t / 16], parts[t / 16 + 1], size, head_dim, scores + t);
  }
}

// The outputs of the whole panels of a head, P or fewer at once, from output `d` on; returns which
// is the next.
template <int M, int P, class T, class X>
INLINE int64_t value_panels(const X* p, T* const* values, int64_t size, int64_t head_dim,
                            int64_t count, float* out, int64_t d = 0) {
  for (; d + P * kPanel <= head_dim; d += P * kPanel) {
    T* here[kKeys / 16];
    for (int64_t b = 0; b * size < count; b++) here[b] = values[b] + (kPaired<T> ? 2 * d : d);
    if constexpr (kPaired<T>)
      value_pairs<M, P>(p, here, size, head_dim, count, out + d);
    else
      value_tile<M>(p, here, size, head_dim, count, out + d);
  }
  if constexpr (P > 1) d = value_panels<M, P / 2>(p, values, size, head_dim, count, out, d);
  return d;
}

}  // namespace tokenry::NS
