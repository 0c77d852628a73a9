// y = x W^T + b of int8 and bf16 weights with AMX tiles (16 rows of 64 bytes); everything else is
// another set's. Included by isa_amx.cpp and isa_amx_standin.cpp, which set NS, NS_NAME, LANES and
// TABLE.
//
// A chunk is 64 bytes of a row of activations: 64 int8 or 32 bf16 inputs. In a panel it is 16 rows
// of 128 bytes (kernels.h), so the tiles of its outputs [0, 16) and [16, 32) lie there as they are.
// 32 rows of activations at a time: tiles 0 to 3 sums (rows by outputs), 4 and 5 activations, 6 and
// 7 weights. Every number of rows goes this way, so a row has the same bits in any company.
#include "kernels.h"
#include "simd.h"
#include "tiles.h"

namespace tokenry::NS {

constexpr int64_t kSide = 16;                       // rows of a tile, outputs of a tile
constexpr int64_t kChunk = 64;                      // bytes of activations
constexpr int64_t kChunkOfPanel = kSide * kPanel * 4;  // bytes of weights
constexpr int64_t kAhead = 2 * kChunkOfPanel;
static_assert(kPanel == 2 * kSide, "a panel is two tiles of outputs");

typedef int32_t vi_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

const Kernels* rest;  // the other set

inline bool by_tiles(const Weight& w) { return w.format == kInt8 || w.format == kBF16Dots; }

inline int64_t row_bytes(const Weight& w) { return w.depth * (w.format == kInt8 ? 1 : 2); }

// A packed weight's tiles of one chunk start here.
inline const char* chunk_of(const Weight& w, int64_t panel, int64_t at) {
  return static_cast<const char*>(w.data) + panel * row_bytes(w) * kPanel + at * kPanel;
}

// Activations lie chunk by chunk, [rows][64 bytes] each; of the last one's rows only what is there.
void pack_rows(const Weight& w, const float* x, int64_t stride, Packed& to, int64_t tile) {
  if (!by_tiles(w)) return rest->pack_rows(w, x, stride, to, tile);
  const int64_t bytes = row_bytes(w), first = tile * to.tile;
  const int64_t last = first + to.tile < to.rows ? first + to.tile : to.rows;
  char* data = static_cast<char*>(to.data);
  char* line = static_cast<char*>(scratch(bytes));
  for (int64_t r = first; r < last; r++) {
    // one row alone is packed as neighbouring inputs, whatever the set
    Packed one{1, 1, line, to.scales ? to.scales + r : nullptr, to.sums ? to.sums + r : nullptr};
    rest->pack_rows(w, x + r * stride, stride, one, 0);
    for (int64_t at = 0; at < bytes; at += kChunk) {
      const int64_t n = bytes - at < kChunk ? bytes - at : kChunk;
      memcpy(data + at * to.rows + r * n, line + at, n);
    }
  }
}

struct Shape {  // LDTILECFG's 64 bytes
  uint8_t palette, start_row, zeros[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Shape) == 64, "as the instruction reads it");

// Tiles for `upper` rows of activations, and `lower` more.
inline void configure(int64_t upper, int64_t lower) {
  alignas(64) Shape shape{};
  shape.palette = 1;
  for (int t = 0; t < 8; t++) {
    const int64_t rows = t >= 6 ? kSide : t == 0 || t == 1 || t == 4 ? upper : lower;
    shape.rows[t] = uint8_t(rows);
    shape.bytes[t] = rows ? kChunk : 0;
  }
  TILES_CONFIGURE(&shape);
}

// sums += products of a chunk: x [rows][64 bytes], w [16][128 bytes].
template <bool DOTS, bool LOWER>
INLINE void multiply(const char* x, const char* w) {
  TILE_LOAD(6, w, kPanel * 4);
  TILE_LOAD(4, x, kChunk);
  TILE_LOAD(7, w + kChunk, kPanel * 4);
  if constexpr (DOTS) {
    TILE_DOT_BF16(0, 4, 6);
    TILE_DOT_BF16(1, 4, 7);
  } else {
    TILE_DOT_INT8(0, 4, 6);
    TILE_DOT_INT8(1, 4, 7);
  }
  if constexpr (LOWER) {
    TILE_LOAD(5, x + kSide * kChunk, kChunk);
    if constexpr (DOTS) {
      TILE_DOT_BF16(2, 5, 6);
      TILE_DOT_BF16(3, 5, 7);
    } else {
      TILE_DOT_INT8(2, 5, 6);
      TILE_DOT_INT8(3, 5, 7);
    }
  }
}

// A chunk of which only `bytes` are there, with zeros behind.
template <bool DOTS, bool LOWER>
void multiply_rest(const char* x, const char* w, int64_t rows, int64_t bytes) {
  alignas(64) char padded[2 * kSide * kChunk] = {}, weights[kChunkOfPanel] = {};
  for (int64_t r = 0; r < rows; r++) memcpy(padded + r * kChunk, x + r * bytes, bytes);
  memcpy(weights, w, bytes * kPanel);
  multiply<DOTS, LOWER>(padded, weights);
}

template <bool LOWER>
INLINE void zero() {
  TILE_ZERO(0);
  TILE_ZERO(1);
  if constexpr (LOWER) {
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
}

// The sums of 32 or fewer rows as they are in the tiles, to [rows][kPanel] of 4 bytes.
template <bool LOWER>
INLINE void store_sums(char* to) {
  constexpr int64_t kWidth = kPanel * 4;
  TILE_STORE(0, to, kWidth);
  TILE_STORE(1, to + kChunk, kWidth);
  if constexpr (LOWER) {
    TILE_STORE(2, to + kSide * kWidth, kWidth);
    TILE_STORE(3, to + kSide * kWidth + kChunk, kWidth);
  }
}

// Sums over all inputs of rows [row, row + rows), for a panel: int32, or float, block by block.
template <bool DOTS, bool LOWER>
void sums_of(const Weight& w, const Packed& x, int64_t panel, int64_t row, int64_t rows,
             int64_t ahead, char* sums) {
  const int64_t bytes = row_bytes(w), block = DOTS ? kDepth * 2 : bytes;
  const char* data = static_cast<const char*>(x.data);
  for (int64_t from = 0; from < bytes; from += block) {
    zero<LOWER>();
    for (int64_t at = from; at < from + block && at < bytes; at += kChunk) {
      const char* weights = chunk_of(w, panel, at);
      const int64_t n = bytes - at < kChunk ? bytes - at : kChunk;
      const char* rows_at = data + at * x.rows + row * n;
      if (n < kChunk) {
        multiply_rest<DOTS, LOWER>(rows_at, weights, rows, n);
        continue;
      }
      if (ahead)
        for (int64_t i = 0; i < kChunkOfPanel; i += 64) __builtin_prefetch(weights + ahead + i);
      multiply<DOTS, LOWER>(rows_at, weights);
    }
    if (from == 0) {
      store_sums<LOWER>(sums);
      continue;
    }
    alignas(64) float part[2 * kSide * kPanel];
    store_sums<LOWER>(reinterpret_cast<char*>(part));
    float* all = reinterpret_cast<float*>(sums);
    for (int64_t i = 0; i < rows * kPanel; i += LANES)
      store(all + i, load(all + i) + load(part + i));
  }
}

// One row's outputs of a panel from its sums.
inline void finish(const Weight& w, const Packed& x, int64_t panel, int64_t row, const char* sums,
                   float* y) {
  const int64_t first = panel * kPanel, count = w.n - first < kPanel ? w.n - first : kPanel;
  float line[kPanel];
  for (int64_t i = 0; i < kPanel; i += LANES) {
    if (w.format == kInt8) {
      const vi whole = *reinterpret_cast<const vi_any*>(sums + i * 4) + splat(-128 * x.sums[row]);
      store(line + i, __builtin_convertvector(whole, vf) *
                          (load(w.scales + first + i) * x.scales[row]));
    } else {
      store(line + i, load(reinterpret_cast<const float*>(sums) + i));
    }
  }
  for (int64_t i = 0; i < count; i++) y[first + i] = line[i] + (w.bias ? w.bias[first + i] : 0.0f);
}

void linear(const Weight& w, const Packed& x, int64_t panel, int64_t from, int64_t to, float* y,
            int64_t stride) {
  if (!by_tiles(w)) return rest->linear(w, x, panel, from, to, y, stride);
  const int64_t first = from * x.tile, last = to * x.tile < x.rows ? to * x.tile : x.rows;
  // as in linear.inl: the first rows ask for the weights that come next
  int64_t ahead = last - first > 2 * kSide ? row_bytes(w) * kPanel : kAhead;
  int64_t shaped = 0;  // rows that the tiles are for
  alignas(64) char sums[2 * kSide * kPanel * 4];
  for (int64_t row = first; row < last; row += 2 * kSide) {
    const int64_t rows = last - row < 2 * kSide ? last - row : 2 * kSide;
    const int64_t lower = rows > kSide ? rows - kSide : 0;
    if (shaped != rows) configure(rows - lower, lower);
    shaped = rows;
    const bool dots = w.format == kBF16Dots;
    const auto run = dots ? lower ? sums_of<true, true> : sums_of<true, false>
                          : lower ? sums_of<false, true> : sums_of<false, false>;
    run(w, x, panel, row, rows, ahead, sums);
    for (int64_t r = 0; r < rows; r++)
      finish(w, x, panel, row + r, sums + r * kPanel * 4, y + (row + r) * stride);
    ahead = 0;
  }
  TILES_RELEASE();
}

}  // namespace tokenry::NS

namespace tokenry {
// `other` with tiles for what they serve.
Kernels TABLE(const Kernels& other) {
  NS::rest = &other;
  Kernels table = other;
  table.name = NS_NAME;
  table.dots = true;
  table.pack_rows = NS::pack_rows;
  table.linear = NS::linear;
  return table;
}
}  // namespace tokenry
