// What the library computes, as text: so that a build for another processor, run by an emulator, can
// be held beside this machine's. Prints a line of numbers for each product and each attention.
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels.h"

using namespace tokenry;

extern "C" {
int32_t tk_set_isa(const char*);
const char* tk_isas();
void tk_threads(int32_t);
Weight* tk_pack(const void*, const float*, int64_t, int64_t, int32_t);
void tk_free(Weight*);
void tk_linear(const Weight*, const float*, int64_t, int64_t, float*, int64_t);
void tk_attention(const Attention*);
}

namespace {

// The same numbers of [-1, 1) on every machine.
std::vector<float> numbers(int64_t count, uint32_t seed) {
  std::vector<float> all(count);
  for (float& x : all) {
    seed = seed * 1664525u + 1013904223u;
    x = float(int32_t(seed >> 8) - (1 << 23)) / float(1 << 23);
  }
  return all;
}

void print(const char* name, const std::vector<float>& values) {
  std::printf("%s", name);
  for (float x : values) std::printf(" %.9g", double(x));
  std::printf("\n");
}

void product(const char* name, int32_t format, int64_t rows) {
  const int64_t n = 70, k = 130;
  const std::vector<float> w = numbers(n * k, 1), bias = numbers(n, 2), x = numbers(rows * k, 3);
  std::vector<uint16_t> narrow(w.size());
  for (size_t i = 0; i < w.size(); i++) {  // cut off: bf16 of whatever the weights are
    uint32_t bits;
    memcpy(&bits, &w[i], 4);
    narrow[i] = uint16_t(bits >> 16);
  }
  const bool half = format == kBF16 || format == kBF16Dots;
  const void* source = half ? static_cast<const void*>(narrow.data()) : w.data();
  Weight* packed = tk_pack(source, bias.data(), n, k, format);
  std::vector<float> y(rows * n);
  tk_linear(packed, x.data(), k, rows, y.data(), n);
  tk_free(packed);
  print(name, y);
}

void attention(const char* name, int32_t format, int64_t element) {
  const int64_t heads = 6, kv_heads = 2, head_dim = 40, block = 16, blocks = 12;
  const std::vector<int32_t> q_lens{150, 1}, seq_lens{150, 1}, q_start{0, 150};
  const int64_t tokens = 151;
  std::vector<int32_t> slots, table(2 * 10);
  for (int32_t i = 0; i < 10; i++) table[i] = 11 - i;
  table[10] = 1;
  for (int32_t t = 0; t < 150; t++) slots.push_back(table[t / 16] * 16 + t % 16);
  slots.push_back(16);
  const std::vector<float> q = numbers(tokens * heads * head_dim, 4);
  const std::vector<float> k = numbers(tokens * kv_heads * head_dim, 5);
  const std::vector<float> v = numbers(tokens * kv_heads * head_dim, 6);
  const int64_t width = head_dim * element + (format == kInt8 ? 4 : 0);
  std::vector<float> kv((blocks * kv_heads * 2 * block * width + 3) / 4);
  std::vector<float> out(tokens * heads * head_dim);
  Attention a{};
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.kv = kv.data(), a.out = out.data();
  a.q_stride = heads * head_dim, a.k_stride = a.v_stride = kv_heads * head_dim;
  a.q_start = q_start.data(), a.q_lens = q_lens.data(), a.seq_lens = seq_lens.data();
  a.block_table = table.data(), a.slots = slots.data();
  a.tokens = tokens, a.requests = 2, a.table_width = 10, a.heads = heads, a.kv_heads = kv_heads;
  a.head_dim = head_dim, a.block_size = block, a.scale = 0.5f, a.softcap = 20, a.format = format;
  tk_attention(&a);
  print(name, out);
}

}  // namespace

int main() {
  if (!tk_set_isa("plain")) return 1;
  for (int32_t threads : {1, 2}) {
    tk_threads(threads);
    for (int64_t rows : {1, 5, 33}) {
      product("fp32", kF32, rows);
      product("bf16", kBF16, rows);
      product("int8", kInt8, rows);
      product("int4", kInt4, rows);
    }
    attention("kv-fp32", kF32, 4);
    attention("kv-bf16", kBF16, 2);
    attention("kv-fp16", kF16, 2);
    attention("kv-int8", kInt8, 1);
  }
  return 0;
}
