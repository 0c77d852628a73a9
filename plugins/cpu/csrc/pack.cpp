// The C interface to packed weights: formats and layouts are in kernels.h.
#include <sys/mman.h>
#include <unistd.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "ops.h"
#include "pool.h"

namespace tokenry {
namespace {

// Memory in pages of its own (huge where the kernel has them); null if there is none. The address
// sanitizer watches the ends of what malloc gives, so under it that is what a weight gets.
#if defined(__SANITIZE_ADDRESS__)
void* pages(int64_t bytes) {
  void* at = std::malloc(bytes);
  if (at) memset(at, 0, bytes);
  return at;
}
void free_pages(void* at, int64_t) { std::free(at); }
#else
void* pages(int64_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
  madvise(at, bytes, MADV_HUGEPAGE);
#endif
  return at;
}
void free_pages(void* at, int64_t bytes) { munmap(at, bytes); }
#endif

int64_t value_bytes(int32_t format, int64_t values) {
  switch (format) {
    case kF32: return values * 4;
    case kBF16:
    case kBF16Dots:
    case kF16: return values * 2;
    case kInt8: return values;
    default: return values / 2;
  }
}

int64_t scale_count(const Weight& w) {
  if (w.format == kInt8) return w.panels * kPanel;
  if (w.format == kInt4) return w.panels * kPanel * (w.depth / kGroup);
  return 0;
}

int64_t weight_bytes(const Weight& w) {
  return value_bytes(w.format, w.panels * kPanel * w.depth) + scale_count(w) * 4;
}

// A weight's sizes, without memory.
Weight shaped(int64_t n, int64_t k, int32_t format) {
  Weight w{};
  w.format = format;
  w.n = n;
  w.k = k;
  w.panels = (n + kPanel - 1) / kPanel;
  const bool pairs = format == kBF16 || format == kBF16Dots;
  const int64_t multiple = format == kInt8 ? 4 : format == kInt4 ? kGroup : pairs ? 2 : 1;
  w.depth = (k + multiple - 1) / multiple * multiple;
  return w;
}

// Values first, scales behind them.
void lay_out(Weight& w, void* memory) {
  w.data = memory;
  w.scales = reinterpret_cast<float*>(static_cast<char*>(memory) + weight_bytes(w) -
                                      scale_count(w) * 4);
}

// Values and bytes of 16 neighbouring inputs: vectors of the compiler's, so that one text serves
// every instruction set. This file is compiled without fused multiply-add: scales and levels are
// the same wherever they are made.
constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
#define INLINE inline __attribute__((always_inline))

// To the nearest integer, ties to even, of values below 2^22.
INLINE Floats rounded(Floats x) {
  const float big = 12582912.0f;  // 1.5 * 2^23: its neighbours are the integers
  return (x + big) - big;
}

INLINE Floats clamped(Floats x, float low, float high) {
  const Floats least = Floats{} + low, most = Floats{} + high;
  x = x > least ? x : least;  // NaN becomes the least
  return x < most ? x : most;
}

// 16 values from x, of which n are there.
INLINE Floats some(const float* x, int64_t n) {
  if (n >= kLanes) return *reinterpret_cast<const Floats*>(x);
  float held[kLanes] = {};
  for (int64_t i = 0; i < n; i++) held[i] = x[i];
  return *reinterpret_cast<const Floats*>(held);
}

// The bits of the largest magnitude among n values. (Of two finite magnitudes the larger has the
// larger bits.)
INLINE int32_t top_bits(const float* x, int64_t n) {
  Ints most{};
  for (int64_t d = 0; d < n; d += kLanes) {
    const Ints bits = (Ints)some(x + d, n - d) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t top = 0;
  for (int64_t i = 0; i < kLanes; i++) top = most[i] > top ? most[i] : top;
  return top;
}

INLINE float as_float(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Source rows as they come: float32 values, 16-bit ones whose bits are kept, or pairs of those.
template <class T>
void pack_values(T* to, const T* source, int64_t rows, int64_t k) {
  constexpr int64_t kBlock = 16;
  int64_t d = 0;
  for (; rows == kPanel && d + kBlock <= k; d += kBlock) {
    const T* from = source + d;
    T* at = to + d * kPanel;
    for (int64_t i = 0; i < kPanel; i++) {
      for (int64_t j = 0; j < kBlock; j++) at[j * kPanel + i] = from[i * k + j];
    }
  }
  for (; d < k; d++) {
    for (int64_t i = 0; i < rows; i++) to[d * kPanel + i] = source[i * k + d];
  }
}

// bf16 rows, neighbouring inputs side by side.
void pack_pairs(uint16_t* to, const uint16_t* source, int64_t rows, int64_t k) {
  if (k % 2 == 0 && reinterpret_cast<uintptr_t>(source) % 4 == 0) {
    typedef uint32_t __attribute__((may_alias)) Pair;
    return pack_values(reinterpret_cast<Pair*>(to), reinterpret_cast<const Pair*>(source), rows,
                       k / 2);
  }
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t d = 0; d < k; d++) to[(d / 2 * kPanel + i) * 2 + d % 2] = source[i * k + d];
  }
}

INLINE void pack_int8(const Weight& w, const float* source, int64_t panel) {
  uint8_t* to = static_cast<uint8_t*>(w.data) + panel * w.depth * kPanel;
  const int64_t rows = w.n - panel * kPanel < kPanel ? w.n - panel * kPanel : kPanel;
  if (rows < kPanel) memset(to, 128, w.depth * kPanel);
  for (int64_t i = 0; i < rows; i++) {
    const float* row = source + (panel * kPanel + i) * w.k;
    const float top = as_float(top_bits(row, w.k));
    w.scales[panel * kPanel + i] = top / 127.0f;
    const float inverse = top > 0 ? 127.0f / top : 0.0f;
    for (int64_t d = 0; d < w.depth; d += kLanes) {
      const Floats q = rounded(some(row + d, w.k - d) * inverse) + 128.0f;
      const Bytes bytes = __builtin_convertvector(__builtin_convertvector(q, Ints), Bytes);
      const int64_t fours = w.depth - d < kLanes ? (w.depth - d) / 4 : 4;
      for (int64_t j = 0; j < fours; j++)
        memcpy(to + (d / 4 + j) * kPanel * 4 + i * 4, reinterpret_cast<const char*>(&bytes) + j * 4,
               4);
    }
  }
}

// The scale of a group of weights with the least squared error among some: one that maps the value
// of largest magnitude to -8 (so that 16 levels are used), and others a little smaller or larger.
// Each lane tries one scale on all values, in their order.
INLINE float best_scale(const float* x, int64_t n) {
  const int32_t top = top_bits(x, n);
  if (top == 0) return 0;
  float at = 0;
  for (int64_t i = n - 1; i >= 0; i--) {  // the first of them
    int32_t bits;
    memcpy(&bits, x + i, 4);
    if ((bits & 0x7fffffff) == top) at = x[i];
  }
  Floats steps;
  for (int64_t j = 0; j < kLanes; j++) steps[j] = 8.0f + 0.15f * float(j < 15 ? j - 7 : -7);
  const Floats scales[2] = {-at / steps, at / steps};
  const Floats inverse[2] = {1.0f / scales[0], 1.0f / scales[1]};
  Floats dot[2] = {}, norm[2] = {};
  for (int64_t i = 0; i < n; i++) {
    for (int s = 0; s < 2; s++) {
      const Floats q = rounded(clamped(x[i] * inverse[s], -8.0f, 7.0f));
      dot[s] += q * x[i];
      norm[s] += q * q;
    }
  }
  // for these levels the best scale is dot / norm, its error |x|^2 - dot^2 / norm
  float best = 0, least = INFINITY;
  for (int s = 0; s < 2; s++) {
    const Floats error = -dot[s] * dot[s] / norm[s], scale = dot[s] / norm[s];
    for (int64_t j = 0; j < kLanes - 1; j++)
      if (norm[s][j] > 0 && error[j] < least) least = error[j], best = scale[j];
  }
  return best;
}

INLINE void pack_int4(const Weight& w, const float* source, int64_t panel) {
  const int64_t groups = w.depth / kGroup;
  uint8_t* to = static_cast<uint8_t*>(w.data) + panel * w.depth * (kPanel / 2);
  float* scales = w.scales + panel * groups * kPanel;
  const int64_t rows = w.n - panel * kPanel < kPanel ? w.n - panel * kPanel : kPanel;
  if (rows < kPanel) memset(to, 0x88, w.depth * (kPanel / 2));
  for (int64_t i = 0; i < rows; i++) {
    const float* row = source + (panel * kPanel + i) * w.k;
    for (int64_t g = 0; g < groups; g++) {
      const float* x = row + g * kGroup;
      const int64_t n = w.k - g * kGroup < kGroup ? w.k - g * kGroup : kGroup;
      const float scale = best_scale(x, n);
      scales[g * kPanel + i] = scale;
      for (int64_t part = 0; part < kGroup / kLanes; part++) {
        Floats q = Floats{} + 8.0f;
        if (scale != 0)
          q += rounded(clamped(some(x + part * kLanes, n - part * kLanes) / scale, -8.0f, 7.0f));
        const Bytes levels = __builtin_convertvector(__builtin_convertvector(q, Ints), Bytes);
        for (int64_t j = 0; j < 2; j++) {
          uint32_t low, high;
          memcpy(&low, reinterpret_cast<const char*>(&levels) + j * 8, 4);
          memcpy(&high, reinterpret_cast<const char*>(&levels) + j * 8 + 4, 4);
          low |= high << 4;
          memcpy(to + (g * kGroup / 8 + part * 2 + j) * kPanel * 4 + i * 4, &low, 4);
        }
      }
    }
  }
}

// One panel of a quantised weight, with the vectors that the machine has.
using Quantise = void (*)(const Weight&, const float* source, int64_t panel);
INLINE void quantise(const Weight& w, const float* source, int64_t panel) {
  return w.format == kInt8 ? pack_int8(w, source, panel) : pack_int4(w, source, panel);
}
void quantise_plain(const Weight& w, const float* x, int64_t panel) { quantise(w, x, panel); }
#if defined(__x86_64__)
__attribute__((target("avx2"))) void quantise_avx2(const Weight& w, const float* x, int64_t panel) {
  quantise(w, x, panel);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void quantise_avx512(
    const Weight& w, const float* x, int64_t panel) {
  quantise(w, x, panel);
}
#endif

// As the kernels that run: one instruction set for all.
Quantise quantiser() {
#if defined(__x86_64__)
  if (!strncmp(kernels().name, "avx512", 6)) return quantise_avx512;
  if (!strcmp(kernels().name, "avx2")) return quantise_avx2;
#endif
  return quantise_plain;
}

}  // namespace
}  // namespace tokenry

using namespace tokenry;

// A packed copy of source [n, k] (float32; 16-bit for the 16-bit formats), null without memory.
API Weight* tk_pack(const void* source, const float* bias, int64_t n, int64_t k, int32_t format) {
  Weight* w = new (std::nothrow) Weight(shaped(n, k, format));
  if (!w) return nullptr;
  w->bias = bias;
  const int64_t bytes = weight_bytes(*w);
  char* memory = static_cast<char*>(pages(bytes));
  if (!memory) {
    delete w;
    return nullptr;
  }
  lay_out(*w, memory);
  const Quantise quantised = quantiser();
  parallel(w->panels, [&](int64_t panel) {
    const int64_t first = panel * kPanel, rows = n - first < kPanel ? n - first : kPanel;
    if (format == kInt8 || format == kInt4)
      return quantised(*w, static_cast<const float*>(source), panel);
    if (format == kF32)
      return pack_values(static_cast<float*>(w->data) + first * w->depth,
                         static_cast<const float*>(source) + first * k, rows, k);
    uint16_t* to = static_cast<uint16_t*>(w->data) + first * w->depth;
    const uint16_t* from = static_cast<const uint16_t*>(source) + first * k;
    return format == kF16 ? pack_values(to, from, rows, k) : pack_pairs(to, from, rows, k);
  });
  return w;
}

// A weight that lies packed in memory of the caller's, which outlives it.
API Weight* tk_adopt(void* memory, const float* bias, int64_t n, int64_t k, int32_t format) {
  Weight* w = new (std::nothrow) Weight(shaped(n, k, format));
  if (!w) return nullptr;
  w->bias = bias;
  w->borrowed = true;
  lay_out(*w, memory);
  return w;
}

API int64_t tk_packed_bytes(int64_t n, int64_t k, int32_t format) {
  return weight_bytes(shaped(n, k, format));
}

API int32_t tk_layout() { return kLayout; }

API void* tk_data(const Weight* w) { return w->data; }

API int64_t tk_bytes(const Weight* w) { return weight_bytes(*w); }

API void tk_free(Weight* w) {
  if (!w) return;
  if (!w->borrowed) free_pages(w->data, weight_bytes(*w));
  delete w;
}

// Lets go of the whole pages in [at, at + bytes), which a file has behind it: read again when they
// are touched again.
API void tk_let_go(void* at, int64_t bytes) {
  const uintptr_t page = sysconf(_SC_PAGESIZE), from = reinterpret_cast<uintptr_t>(at);
  const uintptr_t first = (from + page - 1) / page * page, last = (from + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

// Gives free memory of the heap back to the system.
API void tk_trim() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}
