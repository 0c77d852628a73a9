// What works on one row: normalisation, rotation, activations.

namespace tokenry::NS {

inline void rms_norm(const float* x, const float* residual, const float* weight, float eps,
                     int64_t size, float* y, float* total) {
  const float* in = x;
  if (residual) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(total + i, load(x + i) + load(residual + i));
    for (; i < size; i++) total[i] = x[i] + residual[i];
    in = total;
  }
  vf squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES)
    for (int j = 0; j < 4; j++) {
      const vf v = load(in + i + j * LANES);
      squares[j] += v * v;
    }
  float all = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < size; i++) all += in[i] * in[i];
  const float scale = 1.0f / __builtin_sqrtf(all / float(size) + eps);
  for (i = 0; i + LANES <= size; i += LANES)
    store(y + i, load(in + i) * scale * load(weight + i));
  for (; i < size; i++) y[i] = in[i] * scale * weight[i];
}

// Rotates the first 2 * half of head_dim values (pairs i and i + half), copies the others.
inline void rope(const float* x, const float* cos, const float* sin, int64_t half,
                 int64_t head_dim, float* y) {
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    const vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(y + i, a * c - b * s);
    store(y + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    const float a = x[i], b = x[half + i];
    y[i] = a * cos[i] - b * sin[i];
    y[half + i] = b * cos[i] + a * sin[i];
  }
  for (i = 2 * half; i < head_dim; i++) y[i] = x[i];
}

// The first of the largest values; a NaN is skipped unless there is nothing else. broken: the
// largest is infinite, or there is a NaN.
inline int64_t argmax(const float* x, int64_t size, bool* broken) {
  vf most = splat(-INFINITY), check{};  // check: 0, or NaN for good
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    const vf v = load(x + i);
    most = max(v, most);
    check = v != v ? v : check;
  }
  float top = largest(most);
  bool odd = sum(check) != 0.0f;
  for (; i < size; i++) {
    odd |= x[i] != x[i];
    top = x[i] > top ? x[i] : top;
  }
  *broken = odd || top - top != 0.0f;
  for (i = 0; i + LANES <= size; i += LANES) {
    const vi same = load(x + i) == top;
    if (any(same)) break;
  }
  for (; i < size; i++)
    if (x[i] == top) return i;
  return 0;
}

// y = e^((x - most) / temperature)
inline void boltzmann(const float* x, int64_t size, float most, float temperature, float* y) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(y + i, exp((load(x + i) - most) / temperature));
  if (i < size) {
    float line[LANES];
    for (int j = 0; j < LANES; j++) line[j] = i + j < size ? x[i + j] : most;
    store(line, exp((load(line) - most) / temperature));
    for (int64_t j = i; j < size; j++) y[j] = line[j - i];
  }
}

template <class T>
void widen_as(const T* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(y + i, load(x + i));
  for (; i < n; i++) y[i] = one(x[i]);
}

inline void widen(const void* x, int64_t n, int32_t format, float* y) {
  if (format == kF32) return widen_as(static_cast<const float*>(x), n, y);
  if (format == kF16) return widen_as(static_cast<const f16*>(x), n, y);
  widen_as(static_cast<const bf16*>(x), n, y);
}

// kind 0: silu, 1: gelu (erf), 2: gelu (tanh)
INLINE vf activate(vf x, int32_t kind) {
  if (kind == 0) return x / (1.0f + exp(min(-x, splat(88.0f))));
  if (kind == 2) return 0.5f * x * (1.0f + tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
  vf y;
  for (int i = 0; i < LANES; i++) y[i] = 0.5f * x[i] * (1.0f + __builtin_erff(x[i] * 0.70710678f));
  return y;
}

inline void act_mul(const float* gate, const float* up, int64_t size, int32_t kind, float* y) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(y + i, activate(load(gate + i), kind) * load(up + i));
  if (i < size) {  // the same vector code for the rest, so that a value's bits know no neighbours
    float a[LANES] = {}, b[LANES] = {};
    for (int64_t j = i; j < size; j++) a[j - i] = gate[j], b[j - i] = up[j];
    store(a, activate(load(a), kind) * load(b));
    for (int64_t j = i; j < size; j++) y[j] = a[j - i];
  }
}

}  // namespace tokenry::NS
