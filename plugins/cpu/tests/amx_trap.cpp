// The AMX kernels as they were compiled, on a machine without AMX: each tile instruction raises
// SIGILL there, is decoded from its bytes and carried out by standin.h. Built by test_cpu_amx.py.
// Where the machine has AMX nothing is trapped, and the same tests compare it with standin.h.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {
const char* fault = nullptr;  // the first since somebody asked
int64_t trapped = 0;          // instructions carried out
}  // namespace
#define TILE_FAULT(what) (void)(fault = fault ? fault : what)
#include "standin.h"

using namespace tokenry;

namespace {

struct sigaction before;

// General registers by their number in an instruction.
int64_t& reg(ucontext_t* c, int number) {
  static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                 REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                 REG_R12, REG_R13, REG_R14, REG_R15};
  return reinterpret_cast<int64_t&>(c->uc_mcontext.gregs[places[number]]);
}

// Carries out the instruction at *at and returns its length; 0 if it is none of ours.
int carry_out(const uint8_t* at, ucontext_t* c) {
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || at[2] & 0x84) return 0;  // map 0F38, W0, L0
  const int r = ~at[1] >> 7 & 1, x = ~at[1] >> 6 & 1, b = ~at[1] >> 5 & 1;
  const int third = ~at[2] >> 3 & 15, prefix = at[2] & 3;  // 1: 66, 2: F3, 3: F2
  const int mode = at[4] >> 6, first = at[4] >> 3 & 7, second = at[4] & 7;
  if (mode == 3) {
    if (r || b) return 0;
    switch (at[3] << 4 | prefix) {
      case 0x490: return third || first || second ? 0 : (standin::release(), 5);
      case 0x493: return third || second ? 0 : (standin::zero(first), 5);
      case 0x5c2: return third > 7 ? 0 : (standin::dot_bf16(first, second, third), 5);
      case 0x5e2: return third > 7 ? 0 : (standin::dot_int8(first, second, third), 5);
      default: return 0;
    }
  }
  int length = 5;
  int64_t base = 0, index = 0;
  bool scaled = false;
  if (second == 4) {
    const int scale = at[5] >> 6, i = (at[5] >> 3 & 7) | x << 3, start = (at[5] & 7);
    length = 6;
    scaled = true;
    if (i != 4) index = reg(c, i) << scale;
    if (start == 5 && mode == 0) return 0;  // no base: nobody writes that here
    base = reg(c, start | b << 3);
  } else if (second == 5 && mode == 0) {
    base = reinterpret_cast<int64_t>(at) + 9;  // relative to the next instruction
  } else {
    base = reg(c, second | b << 3);
  }
  if (mode == 1) {
    base += int8_t(at[length]);
    length += 1;
  } else if (mode == 2 || (second == 5 && mode == 0)) {
    int32_t far;
    memcpy(&far, at + length, 4);
    base += far;
    length += 4;
  }
  void* memory = reinterpret_cast<void*>(base);
  if (third || r) return 0;
  switch (at[3] << 4 | prefix) {
    case 0x490:
      standin::configure(reinterpret_cast<char*>(memory) + index);
      return first == 0 ? length : 0;
    case 0x4b3: return scaled ? (standin::load(first, memory, index), length) : 0;
    case 0x4b2: return scaled ? (standin::store(first, memory, index), length) : 0;
    default: return 0;
  }
}

void on_illegal(int, siginfo_t*, void* context) {
  ucontext_t* c = static_cast<ucontext_t*>(context);
  auto& next = c->uc_mcontext.gregs[REG_RIP];
  const int length = carry_out(reinterpret_cast<const uint8_t*>(next), c);
  if (length == 0) {
    sigaction(SIGILL, &before, nullptr);  // again, for who was there before
    return;
  }
  next += length;
  trapped++;
}

// Memory whose last byte lies before a page that may not be touched.
struct Guarded {
  int64_t pages, page = sysconf(_SC_PAGESIZE);
  char *all, *data;
  explicit Guarded(int64_t bytes) {
    pages = (bytes + page - 1) / page + 1;
    all = static_cast<char*>(
        mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(all + (pages - 1) * page, page, PROT_NONE);
    data = all + (pages - 1) * page - bytes;
    memset(data, 0x7f, bytes);  // NaN, if it is taken for bf16
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(all, pages * page); }
};

}  // namespace

namespace tokenry {
void* scratch(int64_t bytes) {
  static std::vector<double> memory;
  memory.resize(bytes / 8 + 1);
  return memory.data();
}
}  // namespace tokenry

extern "C" {

// y [rows, n] = x [rows, k] W^T + b as compiled for AMX (standin 0) or by standin.h, with memory
// that ends where it ends. Returns how many instructions were trapped.
int64_t run(const Weight* packed, const float* x, int64_t rows, float* y, int32_t standin) {
  static const Kernels real = with_amx(kPlainKernels), other = with_standin(kPlainKernels);
  const Kernels& isa = standin ? other : real;
  Weight w = *packed;
  const int64_t width = w.format == kInt8 ? 1 : 2, bytes = w.panels * kPanel * w.depth * width;
  Guarded weights(bytes), activations(rows * w.depth * width);
  memcpy(weights.data, w.data, bytes);
  w.data = weights.data;
  std::vector<float> scales(rows);
  std::vector<int32_t> sums(rows);
  Packed to{rows, 7, activations.data, scales.data(), sums.data()};
  const int64_t tiles = (rows + to.tile - 1) / to.tile;
  for (int64_t t = 0; t < tiles; t++) isa.pack_rows(w, x, w.k, to, t);
  struct sigaction action {};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO;
  trapped = 0;
  if (!standin) sigaction(SIGILL, &action, &before);
  for (int64_t p = 0; p < w.panels; p++)
    for (int64_t from = 0; from < tiles; from += 13)
      isa.linear(w, to, p, from, from + 13 < tiles ? from + 13 : tiles, y, w.n);
  if (!standin) sigaction(SIGILL, &before, nullptr);
  return trapped;
}

// 1 if the instructions of this machine run, 0 if they are trapped.
int32_t has_amx() { return amx_usable(); }

const char* tile_fault() {
  const char* was = fault;
  fault = nullptr;
  return was;
}
void tile_configure(const void* memory) { standin::configure(memory); }
void tile_release() { standin::release(); }
void tile_zero(int32_t t) { standin::zero(t); }
void tile_load(int32_t t, const void* from, int64_t stride) { standin::load(t, from, stride); }
void tile_store(int32_t t, void* to, int64_t stride) { standin::store(t, to, stride); }
void tile_dot_int8(int32_t c, int32_t a, int32_t b) { standin::dot_int8(c, a, b); }
void tile_dot_bf16(int32_t c, int32_t a, int32_t b) { standin::dot_bf16(c, a, b); }
}
