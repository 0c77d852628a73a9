// What the kernels of one instruction set are, as a table that api.cpp picks from at run time.
#pragma once
#include <cstdint>

namespace tokenry {

// Weights lie in panels of this many outputs, whatever the instruction set.
constexpr int64_t kPanel = 32;
// Inputs of a 4-bit group that share a scale.
constexpr int64_t kGroup = 64;
// Inputs summed before the sum is added to the output.
constexpr int64_t kDepth = 512;
// Rows of activations worked on together while a panel is in the cache.
constexpr int64_t kRowBlock = 96;
// Keys of one partial softmax; a multiple of every block size up to it.
constexpr int64_t kKeys = 128;
// Keys of one piece of a context, which threads may share piece by piece; a multiple of kKeys.
constexpr int64_t kPiece = 1024;

// Version of what follows: weights packed with another are not read from a cache.
constexpr int32_t kLayout = 2;

// kBF16Dots: bf16 weights whose activations are rounded to bf16 once (to nearest, ties to even) and
// multiplied in pairs with float32 sums: one instruction where the machine has it.
enum Format : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2, kInt8 = 3, kInt4 = 4, kBF16Dots = 5 };

constexpr bool quantised(int32_t format) { return format == kInt8 || format == kInt4; }

// A packed weight [n, k] with panels of kPanel outputs:
//   fp32, fp16     [panels][k][kPanel]
//   bf16           [panels][k/2][kPanel][2], neighbouring inputs side by side
//   int8           [panels][k/4][kPanel][4] unsigned (value + 128), scales [panels * kPanel]
//   int4           [panels][k/64][8][kPanel][4] bytes: low nibble input j, high nibble input j + 4
//                  of each 8 (value + 8), scales [panels][k/64][kPanel]
// n and k are padded with zeros to whole panels and groups.
struct Weight {
  int32_t format;
  int64_t n, k, panels, depth;  // depth: k padded
  void* data;
  float* scales;
  const float* bias;  // [n] or null
  bool borrowed;      // the memory is the caller's
};

// Activations as the kernels read them: tiles of equally many rows (the last may have fewer).
struct Packed {
  int64_t rows, tile;  // rows in all, rows of a tile
  void* data;          // float: [tiles][k][tile]; dots: [tiles][k/2][tile][2] bf16;
                       // int8, int4: [tiles][k/4][tile][4]
  float* scales;       // int8: [rows]; int4: [tiles][k/64][tile]
  int32_t* sums;       // sums of the quantised values, shaped like scales
};

struct Attention {
  const float *q, *k, *v;  // rows of T tokens, strides in floats
  int64_t q_stride, k_stride, v_stride;
  void* kv;  // [blocks][KH][2][...]: keys [head_dim][block_size], values [block_size][head_dim];
             // bf16, int8: [head_dim / 2][block_size][2], [block_size / 2][head_dim][2] (a zero
             // follows an odd head's last value); int8: after each of the two float scales
             // [block_size]
  float* out;  // [T, heads * head_dim]
  const int32_t *q_start, *q_lens, *seq_lens, *block_table, *slots;
  int64_t tokens, requests, table_width, heads, kv_heads, head_dim, block_size;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
  int32_t format;        // of the KV: kF32, kBF16, kF16 or kInt8
};

// Floats of the running maximum, sum and output of `rows` rows.
constexpr int64_t attention_state(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }

// The pieces that a tile of queries sees: its first sees keys from `cached` - window + 1 on.
struct Pieces {
  int64_t from, to;
};
constexpr Pieces pieces_seen(int64_t cached, int64_t count, int64_t window) {
  const int64_t first = window && cached >= window ? cached - window + 1 : 0;
  return {first / kPiece, (cached + count + kPiece - 1) / kPiece};
}

// Memory of the calling thread, good until its next call. (The files of one instruction set use no
// template or inline function of the standard library: the linker would merge them across sets.)
void* scratch(int64_t bytes);

struct Kernels {
  const char* name;
  int max_tile;  // rows of activations in one tile
  bool dots;     // kBF16Dots has its instruction
  void (*pack_rows)(const Weight&, const float* x, int64_t stride, Packed&, int64_t tile);
  // One panel of outputs for the rows of tiles [from, to).
  void (*linear)(const Weight&, const Packed&, int64_t panel, int64_t from, int64_t to, float* y,
                 int64_t stride);
  void (*write_kv)(const Attention&, int64_t token, int64_t head);
  // Queries [first, first + count) of a request, those that share one KV head: over all keys to the
  // output, or over one piece of them to `state`, attention_state() floats.
  void (*attend)(const Attention&, int64_t request, int64_t first, int64_t count, int64_t kv_head);
  void (*attend_piece)(const Attention&, int64_t request, int64_t first, int64_t count,
                       int64_t kv_head, int64_t piece, float* state);
  // The output from the states of `pieces` neighbouring pieces, overwriting the first of them.
  void (*join_pieces)(const Attention&, int64_t request, int64_t first, int64_t count,
                      int64_t kv_head, int64_t pieces, float* states);
  void (*rms_norm)(const float* x, const float* residual, const float* weight, float eps,
                   int64_t size, float* y, float* total);
  void (*rope)(const float* x, const float* cos, const float* sin, int64_t half, int64_t head_dim,
               float* y);
  void (*act_mul)(const float* gate, const float* up, int64_t size, int32_t kind, float* y);
  // y = the n values at x in a float format
  void (*widen)(const void* x, int64_t n, int32_t format, float* y);
  int64_t (*argmax)(const float* x, int64_t size, bool* broken);
  void (*boltzmann)(const float* x, int64_t size, float most, float temperature, float* y);
};

// The instruction sets that this binary has, best first; `usable` says what this machine can run.
extern const Kernels kPlainKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels, kVnniKernels, kBf16Kernels;
bool amx_usable();
// Another set whose int8 and bf16 products are AMX's: by the instructions, or by what stands in for
// them where there are none.
Kernels with_amx(const Kernels& other);
Kernels with_standin(const Kernels& other);
#endif

}  // namespace tokenry
