// A model's step as a list of instructions over buffers, so that one call runs it whole: what
// tokenry_cpu/program.py recorded. Mirrored there field by field.
#pragma once
#include "kernels.h"

namespace tokenry {

enum Op : int32_t {
  kEmbed = 0,   // out = table (vector, of format n2)[ids]; n0: width, n1: 0 token ids, 1 positions
  kAdd = 1,     // out = in0 + in1
  kMul = 2,     // out = in0 * scalar
  kDiv = 3,     // out = in0 / scalar
  kTanh = 4,    // out = tanh(in0)
  kGather = 5,  // out = rows of in0 that give logits
  kLinear = 6,  // out = in0 weight^T
  kRmsNorm = 7, // out (, out1: the sum) = norm of in0 (+ in1); n0: values, n1: vectors in a row
  kRope = 8,    // out, out1 = in0, in1 turned; vector: table; n0: heads, n1: KV heads, n2: values
                // of a head, n3: half of the turned ones
  kActMul = 9,  // out = kind n1 of in0[:, :n0] times in0[:, n0:]
  kAttend = 10, // out = attention of in0, in1, in2; n0: heads, n1: KV heads, n2: values of a head,
                // n3: layer, n4: window; scalar: scale, scalar1: softcap
};

// Where a tensor's rows are: a buffer and how many floats into each of its rows.
struct Operand {
  int32_t buffer, offset;
};

struct Instruction {
  int32_t op, rows;  // rows: 0 one for each token, 1 one for each row of logits
  Operand in[3], out[2];
  const Weight* weight;
  const float* vector;
  float scalar, scalar1;
  int64_t n0, n1, n2, n3, n4;
};

// What works on rows by themselves, from one attention to the next, is done for some rows at a time:
// what they need between two instructions then stays in the cache. A passing buffer is needed
// between such instructions only, and has room for the rows of one pass.
struct Buffer {
  int64_t width;    // floats of a row
  int64_t place;    // floats per row that lie before it; -1: the caller's output
  int64_t passing;  // whether it lies among the passing ones
};

struct Program {
  const Instruction* instructions;
  int64_t count;
  const Buffer* buffers;
  int64_t lasting;  // floats per row of the buffers that are not passing
};

// What a step brings.
struct Step {
  const int32_t *token_ids, *positions, *logit_rows;
  const int32_t *q_start, *q_lens, *seq_lens, *block_table, *slots;
  int64_t tokens, requests, rows, table_width, block_size;
  int64_t share;    // rows that a buffer has room for
  int64_t passing;  // rows of a pass, which a passing buffer has room for
  void* const* kv;  // per layer
  int32_t kv_format;
  float* arena;  // what lasts, then what passes: rows times the widths that program.py planned
  float* out;
};

}  // namespace tokenry
