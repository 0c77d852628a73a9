// Whether this machine and its system let a process use AMX. No vector flags: it runs everywhere.
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace tokenry {
namespace {

// AMX-TILE, AMX-INT8 and AMX-BF16, with palette 1 of at least 8 tiles of 16 rows of 64 bytes.
bool has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBF16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if (~d & (kBF16 | kTile | kInt8)) return false;
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
  return (b & 0xffff) >= 64 && b >> 16 >= 8 && (c & 0xffff) >= 16;
}

// The system saves and restores tiles: XCR0's bits 17 and 18. (AVX-512 was found before: XGETBV is
// there.)
bool saved() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;
}

// Linux gives a process the larger state when it asks once, for all of its threads.
bool permitted() {
#if defined(__linux__)
  constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool amx_usable() {
  static const bool usable = has_tiles() && saved() && permitted();
  return usable;
}

}  // namespace tokenry
#endif
