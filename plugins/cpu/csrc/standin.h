// AMX's tile instructions in C++, for machines without them: slow, exact, and strict. What they do
// and when they fault is from Intel's Software Developer's Manual, volume 2: LDTILECFG, TILELOADD,
// TILESTORED, TILEZERO, TILERELEASE, TDPBSUD, TDPBF16PS, and the exception classes of AMX.
// The including file defines TILE_FAULT(text): what happens where the instruction would fault.
#pragma once
#include <xmmintrin.h>

#include <cstdint>
#include <cstring>

namespace tokenry::standin {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;  // palette 1

struct Tile {
  int rows, bytes;  // both 0: not there
  uint8_t data[kRows][kRowBytes];
};

struct State {
  bool configured;
  Tile tiles[kTiles];
};

static thread_local State state;

static inline bool zeros(const uint8_t* from, const uint8_t* to) {
  for (; from < to; from++)
    if (*from) return false;
  return true;
}

static inline void release() { memset(&state, 0, sizeof state); }

// LDTILECFG: byte 0 palette, 1 start_row, 16-31 bytes of each tile's rows, 48-55 rows; the rest 0.
// (A start_row other than 0 is legal there, for what an interrupt broke off; nobody here wants it.)
static inline void configure(const void* memory) {
  uint8_t bytes[64];
  memcpy(bytes, memory, sizeof bytes);
  if (bytes[0] > 1) return TILE_FAULT("#GP: LDTILECFG of a palette that is not there");
  if (bytes[0] == 0) return release();
  if (bytes[1]) return TILE_FAULT("LDTILECFG with a start_row");
  if (!zeros(bytes + 2, bytes + 16) || !zeros(bytes + 32, bytes + 48) ||
      !zeros(bytes + 56, bytes + 64))
    return TILE_FAULT("#GP: LDTILECFG with reserved bytes that are not 0");
  for (int t = 0; t < kTiles; t++) {
    uint16_t width;
    memcpy(&width, bytes + 16 + 2 * t, 2);
    const int rows = bytes[48 + t];
    if (width > kRowBytes || rows > kRows)
      return TILE_FAULT("#GP: LDTILECFG of a tile larger than 16 rows of 64 bytes");
    if ((width == 0) != (rows == 0))
      return TILE_FAULT("#GP: LDTILECFG of a tile with rows or columns only");
  }
  release();
  state.configured = true;
  for (int t = 0; t < kTiles; t++) {
    uint16_t width;
    memcpy(&width, bytes + 16 + 2 * t, 2);
    state.tiles[t].rows = bytes[48 + t];
    state.tiles[t].bytes = width;
  }
}

static inline bool there(int t) {
  return state.configured && t >= 0 && t < kTiles && state.tiles[t].rows;
}

static inline void zero(int t) {
  if (!there(t)) return TILE_FAULT("#UD: TILEZERO of a tile that is not configured");
  memset(state.tiles[t].data, 0, sizeof state.tiles[t].data);
}

// Whether rows of a tile can be loaded and stored.
static inline bool moves(int t) { return there(t) && state.tiles[t].bytes % 4 == 0; }

static inline void load(int t, const void* base, int64_t stride) {
  if (!moves(t)) return TILE_FAULT("#UD: TILELOADD of a tile that is not configured for it");
  Tile& tile = state.tiles[t];
  memset(tile.data, 0, sizeof tile.data);
  for (int r = 0; r < tile.rows; r++)
    memcpy(tile.data[r], static_cast<const char*>(base) + r * stride, tile.bytes);
}

static inline void store(int t, void* base, int64_t stride) {
  if (!moves(t)) return TILE_FAULT("#UD: TILESTORED of a tile that is not configured for it");
  const Tile& tile = state.tiles[t];
  for (int r = 0; r < tile.rows; r++)
    memcpy(static_cast<char*>(base) + r * stride, tile.data[r], tile.bytes);
}

// Whether c += a b is one that the hardware takes.
static inline bool multiplies(int c, int a, int b) {
  if (!there(c) || !there(a) || !there(b)) return false;
  if (c == a || c == b || a == b) return false;
  const Tile &to = state.tiles[c], &left = state.tiles[a], &right = state.tiles[b];
  return to.bytes % 4 == 0 && left.bytes % 4 == 0 && to.rows == left.rows &&
         left.bytes / 4 == right.rows && to.bytes == right.bytes;
}

// TDPBSUD: signed bytes of a times unsigned bytes of b, four at a time, to 32-bit sums that wrap.
static inline void dot_int8(int c, int a, int b) {
  if (!multiplies(c, a, b)) return TILE_FAULT("#UD: TDPBSUD of tiles that do not fit");
  Tile& to = state.tiles[c];
  const Tile &left = state.tiles[a], &right = state.tiles[b];
  for (int m = 0; m < to.rows; m++) {
    uint32_t sums[kRowBytes / 4];
    memcpy(sums, to.data[m], sizeof sums);
    for (int k = 0; k < left.bytes / 4; k++) {
      const int8_t* x = reinterpret_cast<const int8_t*>(left.data[m]) + 4 * k;
      const uint8_t* w = right.data[k];
      for (int n = 0; n < kRowBytes / 4; n++)  // beyond c's columns b is 0
        sums[n] += uint32_t(x[0] * w[4 * n] + x[1] * w[4 * n + 1] + x[2] * w[4 * n + 2] +
                            x[3] * w[4 * n + 3]);
    }
    memcpy(to.data[m], sums, to.bytes);
  }
}

static inline float widened(const uint8_t* at) {
  uint16_t half;
  memcpy(&half, at, 2);
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Out of line: its arithmetic stays between the two changes of the control register.
static __attribute__((noinline)) void sum_bf16(Tile& to, const Tile& left, const Tile& right) {
  constexpr int kColumns = kRowBytes / 4;
  float w[kRows][2][kColumns];
  for (int k = 0; k < right.rows; k++)
    for (int n = 0; n < kColumns; n++)
      for (int i = 0; i < 2; i++) w[k][i][n] = widened(right.data[k] + 4 * n + 2 * i);
  for (int m = 0; m < to.rows; m++) {
    float parts[2][kColumns] = {}, sums[kColumns];
    for (int k = 0; k < right.rows; k++)
      for (int i = 0; i < 2; i++) {
        const float x = widened(left.data[m] + 4 * k + 2 * i);
        for (int n = 0; n < kColumns; n++)
          parts[i][n] = __builtin_fmaf(x, w[k][i][n], parts[i][n]);
      }
    memcpy(sums, to.data[m], sizeof sums);
    for (int n = 0; n < kColumns; n++) sums[n] += parts[0][n] + parts[1][n];
    memcpy(to.data[m], sums, to.bytes);
  }
}

// TDPBF16PS: of each output the products of even inputs and those of odd ones are summed apart, by
// fused multiply-add from 0 on, then both sums are added, then that to c. Rounded to the nearest,
// ties to even; what is subnormal counts and comes out as 0; the control register plays no part.
static inline void dot_bf16(int c, int a, int b) {
  if (!multiplies(c, a, b)) return TILE_FAULT("#UD: TDPBF16PS of tiles that do not fit");
  constexpr unsigned kMasked = 0x1f80, kInputs = 0x0040, kOutputs = 0x8000;  // exceptions, DAZ, FTZ
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kMasked | kInputs | kOutputs);
  sum_bf16(state.tiles[c], state.tiles[a], state.tiles[b]);
  _mm_setcsr(before);
}

}  // namespace tokenry::standin
