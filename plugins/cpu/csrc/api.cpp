// The C interface that tokenry_cpu/native.py calls: packing of weights, one function per op, the
// choice of the instruction set. Pointers are to contiguous rows unless a stride is given; nothing
// here checks shapes, native.py does.
#include <sys/mman.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace tokenry {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool usable;
};

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    list.push_back({&kBf16Kernels, vnni && __builtin_cpu_supports("avx512bf16")});
    list.push_back({&kVnniKernels, vnni});
    list.push_back({&kAvx512Kernels, avx512});
    list.push_back({&kAvx2Kernels, avx2});
#endif
    list.push_back({&kPlainKernels, true});
    return list;
  }();
  return all;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* now = chosen.load(std::memory_order_acquire);
  if (now) return *now;
  for (const Candidate& c : candidates()) {
    if (c.usable) {
      chosen.store(c.kernels, std::memory_order_release);
      return *c.kernels;
    }
  }
  std::abort();  // the plain kernels are always usable
}

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

// Below this many units for each thread, threads share one long context piece by piece.
constexpr int64_t kUnitsPerThread = 4;

// A tile of neighbouring queries of one request.
struct Unit {
  int32_t request, first, count;
  int32_t pieces;    // that threads take one by one; 1: the whole context at once
  int64_t at;        // floats in `states` before its own

  Pieces seen(const Attention& a) const {
    return pieces_seen(a.seq_lens[request] - a.q_lens[request] + first, count, a.window);
  }
  int64_t from(const Attention& a) const { return seen(a).from; }
  int64_t state(const Attention& a, int64_t head, int64_t piece) const {
    const int64_t rows = count * (a.heads / a.kv_heads);
    return at + (head * pieces + piece) * attention_state(rows, a.head_dim);
  }
};

struct Part {
  int32_t unit, piece;
};

// Gives units with a long context several pieces, and room for the state of each.
void by_pieces(const Attention& a, std::vector<Unit>& units, std::vector<float>& states) {
  int64_t room = 0;
  for (Unit& unit : units) {
    const Pieces seen = unit.seen(a);
    unit.pieces = int32_t(seen.to - seen.from);
    if (unit.pieces <= 1) unit.pieces = 1;
    unit.at = room;
    if (unit.pieces > 1) room = unit.state(a, a.kv_heads, 0);
  }
  if (int64_t(states.size()) < room) states.resize(room);
}

// Packed activations of the calling thread; grows, never shrinks.
struct Rows {
  std::vector<char> data;
  std::vector<float> scales;
  std::vector<int32_t> sums;
};

}  // namespace

void* scratch(int64_t bytes) {
  static thread_local std::vector<double> memory;
  if (int64_t(memory.size()) * 8 < bytes) memory.resize(bytes / 8 + 1);
  return memory.data();
}

}  // namespace tokenry

using namespace tokenry;

API const char* tk_isa() { return kernels().name; }

// Takes the kernels of that name; 0 if this machine cannot run them or there are none.
API int32_t tk_set_isa(const char* name) {
  for (const Candidate& c : candidates()) {
    if (c.usable && !strcmp(c.kernels->name, name)) {
      chosen.store(c.kernels, std::memory_order_release);
      return 1;
    }
  }
  return 0;
}

// Names of the usable instruction sets, best first, with blanks between.
API const char* tk_isas() {
  static const std::string names = [] {
    std::string all;
    for (const Candidate& c : candidates())
      if (c.usable) all += (all.empty() ? "" : " ") + std::string(c.kernels->name);
    return all;
  }();
  return names.c_str();
}

// Whether kBF16Dots is one instruction here.
API int32_t tk_bf16_dots() { return kernels().dots; }

API void tk_threads(int32_t count) { set_threads(count); }

// counts[i] CPUs of node i, one after the other in `cpus`.
API void tk_nodes(const int32_t* counts, int32_t nodes, const int32_t* cpus) {
  std::vector<std::vector<int>> all;
  for (int32_t i = 0; i < nodes; i++) {
    all.emplace_back(cpus, cpus + counts[i]);
    cpus += counts[i];
  }
  set_nodes(std::move(all));
}

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

// y [rows, n] = x [rows, k] W^T + b; strides in floats.
API void tk_linear(const Weight* weight, const float* x, int64_t x_stride, int64_t rows, float* y,
                   int64_t y_stride) {
  if (rows == 0) return;
  const Weight& w = *weight;
  const Kernels& isa = kernels();
  static thread_local Rows held;
  const int64_t tiles = (rows + isa.max_tile - 1) / isa.max_tile;
  Packed packed{rows, (rows + tiles - 1) / tiles, nullptr, nullptr, nullptr};
  const int64_t all = (rows + packed.tile - 1) / packed.tile;
  const bool floats = !quantised(w.format) && w.format != kBF16Dots;
  if (floats && rows == 1 && w.depth == w.k) {
    packed.data = const_cast<float*>(x);  // one row is packed as it is
  } else {
    const int64_t values = all * packed.tile * w.depth;
    const int64_t size = floats ? values * 4 : w.format == kBF16Dots ? values * 2 : values;
    if (int64_t(held.data.size()) < size) held.data.resize(size);
    packed.data = held.data.data();
    if (quantised(w.format)) {
      const int64_t scales = all * packed.tile * (w.format == kInt4 ? w.depth / kGroup : 1);
      if (int64_t(held.scales.size()) < scales) {
        held.scales.resize(scales);
        held.sums.resize(scales);
      }
      packed.scales = held.scales.data();
      packed.sums = held.sums.data();
    }
    const auto pack = [&](int64_t tile) { isa.pack_rows(w, x, x_stride, packed, tile); };
    if (all < 4) {
      for (int64_t tile = 0; tile < all; tile++) pack(tile);
    } else {
      parallel(all, pack);
    }
  }
  const int64_t per_block = kRowBlock / packed.tile > 0 ? kRowBlock / packed.tile : 1;
  const int64_t blocks = (all + per_block - 1) / per_block;
  parallel(blocks * w.panels, [&](int64_t unit) {
    const int64_t block = unit / w.panels, from = block * per_block;
    const int64_t to = from + per_block < all ? from + per_block : all;
    isa.linear(w, packed, unit % w.panels, from, to, y, y_stride);
  });
}

// Writes k and v to their slots, then attends; rows of requests without tokens are left alone.
API void tk_attention(const Attention* attention) {
  const Attention& a = *attention;
  const Kernels& isa = kernels();
  parallel(a.tokens, [&](int64_t token) {
    for (int64_t head = 0; head < a.kv_heads; head++) isa.write_kv(a, token, head);
  });
  static thread_local std::vector<Unit> units;
  static thread_local std::vector<float> states;
  units.clear();
  const int64_t group = a.heads / a.kv_heads;
  const int64_t per_tile = kRowBlock / group > 0 ? kRowBlock / group : 1;
  for (int64_t r = 0; r < a.requests; r++) {
    // the last queries of a prompt see the most keys: they go first
    const int64_t count = a.q_lens[r], tiles = (count + per_tile - 1) / per_tile;
    for (int64_t t = tiles - 1; t >= 0; t--) {
      const int64_t first = t * per_tile;
      const int64_t here = count - first < per_tile ? count - first : per_tile;
      units.push_back({int32_t(r), int32_t(first), int32_t(here), 1, 0});
    }
  }
  const int64_t heads = a.kv_heads, shared = int64_t(units.size()) * heads;
  if (get_threads() > 1 && shared < kUnitsPerThread * get_threads()) {
    by_pieces(a, units, states);
  }
  static thread_local std::vector<Part> parts;
  parts.clear();
  for (int64_t u = 0; u < int64_t(units.size()); u++)
    for (int32_t p = 0; p < units[u].pieces; p++) parts.push_back({int32_t(u), p});
  const Unit* all = units.data();
  float* held = states.data();
  const Part* each = parts.data();
  parallel(int64_t(parts.size()) * heads, [&](int64_t i) {
    const Unit& unit = all[each[i / heads].unit];
    const int64_t head = i % heads, piece = each[i / heads].piece;
    if (unit.pieces == 1) return isa.attend(a, unit.request, unit.first, unit.count, head);
    isa.attend_piece(a, unit.request, unit.first, unit.count, head, unit.from(a) + piece,
                     held + unit.state(a, head, piece));
  });
  if (parts.size() == units.size()) return;
  parallel(shared, [&](int64_t i) {
    const Unit& unit = all[i / heads];
    if (unit.pieces > 1)
      isa.join_pieces(a, unit.request, unit.first, unit.count, i % heads, unit.pieces,
                      held + unit.state(a, i % heads, 0));
  });
}

// Rows of `inner` neighbours each: row r is at (r / inner) * stride + r % inner * size.
API void tk_rms_norm(const float* x, int64_t stride, int64_t inner, const float* residual,
                     const float* weight, float eps, int64_t rows, int64_t size, float* y,
                     float* total) {
  const Kernels& isa = kernels();
  const int64_t chunk = 1 + 16384 / size, chunks = (rows + chunk - 1) / chunk;
  parallel(chunks, [&](int64_t c) {
    for (int64_t r = c * chunk; r < rows && r < (c + 1) * chunk; r++)
      isa.rms_norm(x + r / inner * stride + r % inner * size,
                   residual ? residual + r * size : nullptr, weight, eps, size, y + r * size,
                   total ? total + r * size : nullptr);
  });
}

// table [positions, 2, half]: cosines, sines.
API void tk_rope(const float* q, int64_t q_stride, int64_t heads, const float* k, int64_t k_stride,
                 int64_t kv_heads, int64_t tokens, int64_t head_dim, const int32_t* positions,
                 const float* table, int64_t half, float* q_out, float* k_out) {
  const Kernels& isa = kernels();
  const int64_t chunk = 1 + 8192 / ((heads + kv_heads) * head_dim);
  parallel((tokens + chunk - 1) / chunk, [&](int64_t c) {
    for (int64_t t = c * chunk; t < tokens && t < (c + 1) * chunk; t++) {
      const float* cos = table + positions[t] * 2 * half;
      for (int64_t h = 0; h < heads; h++)
        isa.rope(q + t * q_stride + h * head_dim, cos, cos + half, half, head_dim,
                 q_out + (t * heads + h) * head_dim);
      for (int64_t h = 0; h < kv_heads; h++)
        isa.rope(k + t * k_stride + h * head_dim, cos, cos + half, half, head_dim,
                 k_out + (t * kv_heads + h) * head_dim);
    }
  });
}

// y [rows, size] = kind(x[:, :size]) * x[:, size:]
API void tk_act_mul(const float* x, int64_t rows, int64_t size, int32_t kind, float* y) {
  const Kernels& isa = kernels();
  const int64_t chunk = 1 + 8192 / size;
  parallel((rows + chunk - 1) / chunk, [&](int64_t c) {
    for (int64_t r = c * chunk; r < rows && r < (c + 1) * chunk; r++)
      isa.act_mul(x + r * 2 * size, x + r * 2 * size + size, size, kind, y + r * size);
  });
}
