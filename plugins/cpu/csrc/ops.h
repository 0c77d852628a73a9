// The C interface, see api.cpp and program.cpp.
#pragma once
#include "kernels.h"

#define API extern "C" __attribute__((visibility("default")))

namespace tokenry {
struct Program;
struct Step;
const Kernels& kernels();  // those of the chosen instruction set
}  // namespace tokenry

API void tk_linear(const tokenry::Weight* weight, const float* x, int64_t x_stride, int64_t rows,
                   float* y, int64_t y_stride);
API void tk_attention(const tokenry::Attention* attention);
API void tk_rms_norm(const float* x, int64_t stride, int64_t inner, const float* residual,
                     const float* weight, float eps, int64_t rows, int64_t size, float* y,
                     float* total);
API void tk_rope(const float* q, int64_t q_stride, int64_t heads, const float* k, int64_t k_stride,
                 int64_t kv_heads, int64_t tokens, int64_t head_dim, const int32_t* positions,
                 const float* table, int64_t half, float* q_out, float* k_out);
API void tk_act_mul(const float* x, int64_t rows, int64_t size, int32_t kind, float* y);
API void tk_run(const tokenry::Program* program, const tokenry::Step* step);
