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

// Source rows as they come: float32 values, or 16-bit ones whose bits are kept.
template <class T>
void pack_values(const Weight& w, const T* source, int64_t panel) {
  T* to = static_cast<T*>(w.data) + panel * w.depth * kPanel;
  for (int64_t i = 0; i < kPanel && panel * kPanel + i < w.n; i++) {
    const T* row = source + (panel * kPanel + i) * w.k;
    for (int64_t d = 0; d < w.k; d++) to[d * kPanel + i] = row[d];
  }
}

// bf16 rows, neighbouring inputs side by side.
void pack_pairs(const Weight& w, const uint16_t* source, int64_t panel) {
  uint16_t* to = static_cast<uint16_t*>(w.data) + panel * w.depth * kPanel;
  for (int64_t i = 0; i < kPanel && panel * kPanel + i < w.n; i++) {
    const uint16_t* row = source + (panel * kPanel + i) * w.k;
    for (int64_t d = 0; d < w.k; d++) to[(d / 2 * kPanel + i) * 2 + d % 2] = row[d];
  }
}

void pack_int8(const Weight& w, const float* source, int64_t panel) {
  uint8_t* to = static_cast<uint8_t*>(w.data) + panel * w.depth * kPanel;
  memset(to, 128, w.depth * kPanel);
  for (int64_t i = 0; i < kPanel && panel * kPanel + i < w.n; i++) {
    const float* row = source + (panel * kPanel + i) * w.k;
    float top = 0;
    for (int64_t d = 0; d < w.k; d++) top = std::fmax(top, std::fabs(row[d]));
    w.scales[panel * kPanel + i] = top / 127.0f;
    const float inverse = top > 0 ? 127.0f / top : 0.0f;
    for (int64_t d = 0; d < w.k; d++)
      to[d / 4 * 4 * kPanel + i * 4 + d % 4] = uint8_t(std::lrintf(row[d] * inverse) + 128);
  }
}

// The scale of a group of weights with the least squared error among some: one that maps the value
// of largest magnitude to -8 (so that 16 levels are used), and others a little smaller or larger.
float best_scale(const float* x, int64_t n) {
  float top = 0, at = 0;
  for (int64_t i = 0; i < n; i++) {
    if (std::fabs(x[i]) > top) top = std::fabs(x[i]), at = x[i];
  }
  if (top == 0) return 0;
  float best = 0, least = INFINITY;
  for (int sign = -1; sign <= 1; sign += 2) {
    for (int step = -7; step <= 7; step++) {
      const float scale = sign * at / (8.0f + 0.15f * step), inverse = 1.0f / scale;
      float dot = 0, norm = 0;
      for (int64_t i = 0; i < n; i++) {
        const float q = std::fmin(7.0f, std::fmax(-8.0f, std::nearbyintf(x[i] * inverse)));
        dot += q * x[i];
        norm += q * q;
      }
      // for these levels the best scale is dot / norm, its error |x|^2 - dot^2 / norm
      if (norm > 0 && -dot * dot / norm < least) least = -dot * dot / norm, best = dot / norm;
    }
  }
  return best;
}

void pack_int4(const Weight& w, const float* source, int64_t panel) {
  const int64_t groups = w.depth / kGroup;
  uint8_t* to = static_cast<uint8_t*>(w.data) + panel * w.depth * (kPanel / 2);
  float* scales = w.scales + panel * groups * kPanel;
  memset(to, 0x88, w.depth * (kPanel / 2));
  for (int64_t i = 0; i < kPanel && panel * kPanel + i < w.n; i++) {
    const float* row = source + (panel * kPanel + i) * w.k;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t n = w.k - g * kGroup < kGroup ? w.k - g * kGroup : kGroup;
      const float scale = best_scale(row + g * kGroup, n);
      scales[g * kPanel + i] = scale;
      for (int64_t d = 0; d < n && scale != 0; d++) {
        const float q = std::nearbyintf(row[g * kGroup + d] / scale) + 8;
        const uint8_t level = q < 0 ? 0 : q > 15 ? 15 : uint8_t(q);
        uint8_t& byte = to[(g * 4 + d / 8) * kPanel * 4 + i * 4 + d % 4];
        byte = d % 8 < 4 ? uint8_t((byte & 0xf0) | level) : uint8_t((byte & 0x0f) | level << 4);
      }
    }
  }
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
  parallel(w->panels, [&](int64_t panel) {
    switch (format) {
      case kF32: return pack_values(*w, static_cast<const float*>(source), panel);
      case kBF16:
      case kBF16Dots: return pack_pairs(*w, static_cast<const uint16_t*>(source), panel);
      case kF16: return pack_values(*w, static_cast<const uint16_t*>(source), panel);
      case kInt8: return pack_int8(*w, static_cast<const float*>(source), panel);
      default: return pack_int4(*w, static_cast<const float*>(source), panel);
    }
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
