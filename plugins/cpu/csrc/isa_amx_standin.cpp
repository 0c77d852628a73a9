// AMX kernels on tiles in C++: what runs where there is no AMX, for tests.
#include <cstdio>
#include <cstdlib>

namespace {
void tile_fault(const char* what) {
  fprintf(stderr, "tokenry: AMX would fault here: %s\n", what);
  abort();
}
}  // namespace

#define TILE_FAULT(what) tile_fault(what)
#define TILES_STANDIN
#define NS amx_standin
#define NS_NAME "amx_standin"
#define LANES 8
#define TABLE with_standin
#include "amx.inl"
