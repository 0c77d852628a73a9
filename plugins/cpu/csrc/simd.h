// Vectors of LANES floats, written with the compiler's vector types: one source for every
// instruction set. Included by each isa_*.cpp, which sets NS and LANES.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

// The elements at these places of a and b, counted through both; `places` is a type of that many.
#if defined(__clang__)
#define SHUFFLE(places, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(places, a, b, ...) __builtin_shuffle(a, b, places{__VA_ARGS__})
#endif

namespace tokenry::NS {

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint8_t vb __attribute__((vector_size(4 * LANES)));
typedef float vf_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint8_t vb_any __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

INLINE vf splat(float x) { return x - vf{}; }
INLINE vi splat(int32_t x) { return x - vi{}; }

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
INLINE vf load(const bf16* p) {
  vh_any raw = *reinterpret_cast<const vh_any*>(p);
  return (vf)(__builtin_convertvector(raw, vu) << 16);
}
// GCC takes bytes apart one by one where it converts vectors of them.
INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vf y;
  for (int i = 0; i < LANES; i++) y[i] = p[i];
  return y;
#endif
}
// Whole numbers of [-128, 127].
INLINE void store(int8_t* p, vf x) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x)));
#else
  for (int i = 0; i < LANES; i++) p[i] = int8_t(x[i]);
#endif
}
INLINE float one(float x) { return x; }
INLINE float one(bf16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
// IEEE half to single by integer arithmetic: subnormals are scaled up by a float multiplication.
INLINE float one(f16 x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  float y;
  if (magnitude >= 0x0f800000) {
    magnitude += 0x70000000;
    memcpy(&y, &magnitude, 4);
  } else {
    memcpy(&y, &magnitude, 4);
    y *= 5.192296858534828e33f;  // 2^112
  }
  uint32_t bits;
  memcpy(&bits, &y, 4);
  bits |= sign;
  memcpy(&y, &bits, 4);
  return y;
}
INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf y;
  for (int i = 0; i < LANES; i++) y[i] = one(p[i]);
  return y;
#endif
}
INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

INLINE float narrow(float x, float*) { return x; }
INLINE bf16 narrow(float x, bf16*) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
// Round to nearest, ties to even, through the float's own rounding at the half's precision.
INLINE f16 narrow(float x, f16*) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (bits < 0x38800000) {
    float y;
    memcpy(&y, &bits, 4);
    y += 0.5f;
    memcpy(&bits, &y, 4);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  bits += 0xc8000fff + (bits >> 13 & 1);
  return {uint16_t(sign | bits >> 13)};
}

INLINE vf max(vf a, vf b) { return a > b ? a : b; }
INLINE vf min(vf a, vf b) { return a < b ? a : b; }
// f(x, the lanes that are 8 (4, 2, 1) away) again and again: every lane then has all.
#if LANES == 16
#define REDUCED(f, x)                                                                     \
  x = f(x, SHUFFLE(vi, x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));      \
  x = f(x, SHUFFLE(vi, x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));      \
  x = f(x, SHUFFLE(vi, x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));      \
  x = f(x, SHUFFLE(vi, x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))
#elif LANES == 8
#define REDUCED(f, x)                                     \
  x = f(x, SHUFFLE(vi, x, x, 4, 5, 6, 7, 0, 1, 2, 3));    \
  x = f(x, SHUFFLE(vi, x, x, 2, 3, 0, 1, 6, 7, 4, 5));    \
  x = f(x, SHUFFLE(vi, x, x, 1, 0, 3, 2, 5, 4, 7, 6))
#else
#define REDUCED(f, x)                         \
  x = f(x, SHUFFLE(vi, x, x, 2, 3, 0, 1));    \
  x = f(x, SHUFFLE(vi, x, x, 1, 0, 3, 2))
#endif
INLINE vf plus(vf a, vf b) { return a + b; }
INLINE float sum(vf x) {
  REDUCED(plus, x);
  return x[0];
}
INLINE float largest(vf x) {
  REDUCED(max, x);
  return x[0];
}

// Whether some lane of a comparison is true.
INLINE bool any(vi x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#else
  int32_t all = 0;
  for (int i = 0; i < LANES; i++) all |= x[i];
  return all;
#endif
}

// e^x for x <= 88; 0 below -87; NaN of NaN. Argument reduction by ln 2 in two parts, then the Taylor series to
// x^6 on |r| <= ln(2)/2: relative error below 2e-7 (tested against double).
INLINE vf exp(vf x) {
  vf n = x * 1.44269504088896341f;
#if defined(__AVX512F__)
  n = (vf)_mm512_maskz_roundscale_ps(0xffff, (__m512)n, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  n = (n + 12582912.0f) - 12582912.0f;  // rounds: 1.5 * 2^23
#endif
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.3888889e-3f);
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)n);
#else
  vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  vf y = p * (vf)power;
  return x < -87.0f ? vf{} : y;
#endif
}

INLINE vf tanh(vf x) {
  vf a = x < 0.0f ? -x : x;
  vf e = exp(-2.0f * min(a, splat(40.0f)));
  vf big = (1.0f - e) / (1.0f + e);
  vf x2 = x * x;  // near 0 the quotient loses digits: the series instead
  vf series = a * (1.0f + x2 * (-0.33333333f + x2 * (0.13333334f - x2 * 0.053968254f)));
  vf y = a < 0.1f ? series : big;
  return x < 0.0f ? -y : y;
}

#if defined(__AVX512BF16__)
constexpr bool kDots = true;
#else
constexpr bool kDots = false;
#endif

// The two bf16 values of each lane: inputs 2d and 2d + 1 of an output.
INLINE vf even(vu pairs) { return (vf)(pairs << 16); }
INLINE vf odd(vu pairs) { return (vf)(pairs & 0xffff0000u); }

// acc[i] += w[i][0] * x[0] + w[i][1] * x[1] of bf16 pairs. Without the instruction the order of
// the two and what becomes of subnormal numbers may differ from it.
INLINE vf dot2(vf acc, vu w, uint32_t x) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(int32_t(x)));
#else
  const uint32_t low = x << 16, high = x & 0xffff0000u;
  float first, second;
  memcpy(&first, &low, 4);
  memcpy(&second, &high, 4);
  acc += even(w) * first;
  return acc + odd(w) * second;
#endif
}

// kPanel values as bf16, rounded to the nearest, ties to even; subnormal ones become 0 where there
// is an instruction for it.
INLINE void narrow_panel(const float* x, bf16* y) {
#if defined(__AVX512BF16__)
  const auto both = _mm512_cvtne2ps_pbh((__m512)load(x + LANES), (__m512)load(x));
  memcpy(y, &both, sizeof both);
#else
  for (int64_t i = 0; i < kPanel; i++) y[i] = narrow(x[i], y);
#endif
}

// x rounded to bf16 as narrow_panel does.
INLINE vf rounded(vf x) {
#if defined(__AVX512BF16__)
  const auto half = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
  for (int i = 0; i < LANES; i++) x[i] = one(narrow(x[i], static_cast<bf16*>(nullptr)));
  return x;
#endif
}

// kPanel bytes as bf16, exactly.
INLINE void widen_panel(const int8_t* x, bf16* y) {
#if defined(__AVX512BF16__)
  const auto both = _mm512_cvtne2ps_pbh((__m512)load(x + LANES), (__m512)load(x));
  memcpy(y, &both, sizeof both);
#else
  for (int64_t i = 0; i < kPanel; i += LANES)
    *reinterpret_cast<vh_any*>(y + i) = __builtin_convertvector((vu)load(x + i) >> 16, vh_any);
#endif
}

// acc[i] += sum over j < 4 of u[4i+j] * s[j], u unsigned, s signed bytes: 4 products a lane.
INLINE vi dot4(vi acc, vb u, int32_t s) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, _mm512_set1_epi32(s));
#elif defined(__AVX512BW__)
  __m512i word = _mm512_cvtepi8_epi16(_mm256_set1_epi32(s));
  __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256((__m512i)u));
  __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64((__m512i)u, 1));
  low = _mm512_madd_epi16(low, word);
  high = _mm512_madd_epi16(high, word);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return acc + (vi)_mm512_permutex2var_epi32(low, even, high) +
         (vi)_mm512_permutex2var_epi32(low, odd, high);
#elif defined(__AVX2__)
  __m256i word = _mm256_cvtepi8_epi16(_mm_set1_epi32(s));
  __m256i low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128((__m256i)u));
  __m256i high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256((__m256i)u, 1));
  // hadd works in halves of 128 bits; the permutation puts the lanes back in order
  __m256i sums =
      _mm256_hadd_epi32(_mm256_madd_epi16(low, word), _mm256_madd_epi16(high, word));
  return acc + (vi)_mm256_permute4x64_epi64(sums, 0xd8);
#else
  const int8_t* t = reinterpret_cast<const int8_t*>(&s);
  for (int i = 0; i < LANES; i++) {
    acc[i] += u[4 * i] * t[0] + u[4 * i + 1] * t[1] + u[4 * i + 2] * t[2] + u[4 * i + 3] * t[3];
  }
  return acc;
#endif
}

}  // namespace tokenry::NS
