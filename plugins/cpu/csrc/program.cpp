#include "program.h"

#include <cmath>
#include <cstring>

#include "ops.h"
#include "pool.h"

namespace tokenry {
namespace {

constexpr int64_t kSmall = 16384;  // values that one thread works through at a time

bool by_rows(const Instruction& i) {
  return i.op != kAttend && i.op != kGather && i.rows == 0;
}

// Instructions on the rows [from, from + count) of the tokens, or on all rows of what they are on.
struct Run {
  const Program& program;
  const Step& step;
  int64_t from, count;

  float* at(const Operand& o) const {
    const Buffer& b = program.buffers[o.buffer];
    if (b.place < 0) return step.out + o.offset;
    if (!b.passing) return step.arena + b.place * step.share + from * b.width + o.offset;
    return step.arena + program.lasting * step.share + b.place * step.passing + o.offset;
  }
  int64_t width(const Operand& o) const { return program.buffers[o.buffer].width; }

  // Applies f(row) to all rows, some at a time on each thread.
  template <class Body>
  void rows(int64_t count, int64_t width, Body&& body) const {
    const int64_t chunk = 1 + kSmall / (width + 1);
    parallel((count + chunk - 1) / chunk, [&](int64_t c) {
      for (int64_t r = c * chunk; r < count && r < (c + 1) * chunk; r++) body(r);
    });
  }

  template <class F>
  void map(const Instruction& i, F&& f) const {
    const int64_t n = width(i.out[0]), stride = width(i.in[0]);
    const float* x = at(i.in[0]);
    float* y = at(i.out[0]);
    rows(count, n, [&](int64_t r) {
      for (int64_t d = 0; d < n; d++) y[r * n + d] = f(x[r * stride + d], r, d);
    });
  }

  void run(const Instruction& i) const {
    switch (i.op) {
      case kEmbed: {
        const int32_t* ids = (i.n1 ? step.positions : step.token_ids) + from;
        float* y = at(i.out[0]);
        const char* table = reinterpret_cast<const char*>(i.vector);
        return rows(count, i.n0, [&](int64_t r) {
          const int64_t at = int64_t(ids[r]) * i.n0;
          kernels().widen(table + at * (i.n2 == kF32 ? 4 : 2), i.n0, int32_t(i.n2), y + r * i.n0);
        });
      }
      case kAdd: {
        const float* other = at(i.in[1]);
        const int64_t stride = width(i.in[1]);
        return map(i, [&](float x, int64_t r, int64_t d) { return x + other[r * stride + d]; });
      }
      case kMul:
        return map(i, [&](float x, int64_t, int64_t) { return x * i.scalar; });
      case kDiv:
        return map(i, [&](float x, int64_t, int64_t) { return x / i.scalar; });
      case kTanh:
        return map(i, [&](float x, int64_t, int64_t) { return std::tanh(x); });
      case kGather: {
        const int64_t n = width(i.out[0]), stride = width(i.in[0]);
        const float* x = at(i.in[0]);
        float* y = at(i.out[0]);
        return rows(count, n, [&](int64_t r) {
          memcpy(y + r * n, x + step.logit_rows[r] * stride, n * 4);
        });
      }
      case kLinear:
        return tk_linear(i.weight, at(i.in[0]), width(i.in[0]), count, at(i.out[0]),
                         width(i.out[0]));
      case kRmsNorm:
        return tk_rms_norm(at(i.in[0]), width(i.in[0]), i.n1,
                           i.in[1].buffer < 0 ? nullptr : at(i.in[1]), i.vector, i.scalar,
                           count * i.n1, i.n0, at(i.out[0]),
                           i.out[1].buffer < 0 ? nullptr : at(i.out[1]));
      case kRope:
        return tk_rope(at(i.in[0]), width(i.in[0]), i.n0, at(i.in[1]), width(i.in[1]), i.n1, count,
                       i.n2, step.positions + from, i.vector, i.n3, at(i.out[0]), at(i.out[1]));
      case kActMul:
        return tk_act_mul(at(i.in[0]), count, i.n0, int32_t(i.n1), at(i.out[0]));
      default: {
        const Attention call{
            at(i.in[0]),      at(i.in[1]),    at(i.in[2]),     width(i.in[0]), width(i.in[1]),
            width(i.in[2]),   step.kv[i.n3],  at(i.out[0]),    step.q_start,   step.q_lens,
            step.seq_lens,    step.block_table, step.slots,    step.tokens,    step.requests,
            step.table_width, i.n0,           i.n1,            i.n2,           step.block_size,
            i.scalar,         i.scalar1,      i.n4,            step.kv_format,
        };
        return tk_attention(&call);
      }
    }
  }
};

}  // namespace
}  // namespace tokenry

API void tk_run(const tokenry::Program* program, const tokenry::Step* step) {
  using namespace tokenry;
  const Instruction* all = program->instructions;
  for (int64_t first = 0, last; first < program->count; first = last) {
    last = first + 1;
    if (!by_rows(all[first])) {
      const Run whole{*program, *step, 0, all[first].rows ? step->rows : step->tokens};
      whole.run(all[first]);
      continue;
    }
    while (last < program->count && by_rows(all[last])) last++;
    for (int64_t from = 0; from < step->tokens; from += step->passing) {
      const int64_t left = step->tokens - from;
      const Run pass{*program, *step, from, left < step->passing ? left : step->passing};
      for (int64_t i = first; i < last; i++) pass.run(all[i]);
    }
  }
}
