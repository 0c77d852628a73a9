// The C interface that tokenry_cpu/native.py calls: one function per op, the choice of the
// instruction set. Pointers are to contiguous rows unless a stride is given; nothing
// here checks shapes, native.py does.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace tokenry {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool usable;
  bool standin;  // for tests: runs only where it is asked for by name
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
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    list.push_back({&kBf16Kernels, bf16, false});
    if (bf16 && amx_usable()) {  // behind what it is made of: no machine has run it yet
      static const Kernels amx = with_amx(kBf16Kernels);
      list.push_back({&amx, true, false});
    }
    list.push_back({&kVnniKernels, vnni, false});
    list.push_back({&kAvx512Kernels, avx512, false});
    list.push_back({&kAvx2Kernels, avx2, false});
#endif
    list.push_back({&kPlainKernels, true, false});
#if defined(__x86_64__)
    if (avx2) {
      static const Kernels standin = with_standin(bf16 ? kBf16Kernels : kAvx2Kernels);
      list.push_back({&standin, true, true});
    }
#endif
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

// A pass has rows for as many blocks, and for each thread one.
constexpr int64_t kLeastBlocks = 4;

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

std::string names_of(bool standins) {
  std::string all;
  for (const Candidate& c : candidates())
    if (c.usable && c.standin == standins)
      all += (all.empty() ? "" : " ") + std::string(c.kernels->name);
  return all;
}

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

// Names of the usable instruction sets, best first, with blanks between; and of what stands in for
// one that this machine may not have.
API const char* tk_isas() {
  static const std::string names = names_of(false);
  return names.c_str();
}
API const char* tk_standins() {
  static const std::string names = names_of(true);
  return names.c_str();
}

// Whether kBF16Dots is one instruction here.
API int32_t tk_bf16_dots() { return kernels().dots; }

API void tk_threads(int32_t count) { set_threads(count); }
API int32_t tk_get_threads() { return get_threads(); }

// Rows that a pass of a program takes at a time (program.h).
API int64_t tk_pass_rows() {
  return kRowBlock * (get_threads() < kLeastBlocks ? kLeastBlocks : get_threads());
}

// counts[i] CPUs of node i, one after the other in `cpus`.
API void tk_nodes(const int32_t* counts, int32_t nodes, const int32_t* cpus) {
  std::vector<std::vector<int>> all;
  for (int32_t i = 0; i < nodes; i++) {
    all.emplace_back(cpus, cpus + counts[i]);
    cpus += counts[i];
  }
  set_nodes(std::move(all));
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
