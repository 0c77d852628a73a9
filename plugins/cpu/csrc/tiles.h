// The operations on AMX tiles that amx.inl is written in: the instructions, or with TILES_STANDIN
// what standin.h has in their place. Tiles are named by literals: they are part of the instruction.
#pragma once

#if defined(TILES_STANDIN)

#include "standin.h"
#define TILES_CONFIGURE(p) standin::configure(p)
#define TILES_RELEASE() standin::release()
#define TILE_ZERO(t) standin::zero(t)
#define TILE_LOAD(t, p, stride) standin::load(t, p, stride)
#define TILE_STORE(t, p, stride) standin::store(t, p, stride)
#define TILE_DOT_INT8(c, a, b) standin::dot_int8(c, a, b)
#define TILE_DOT_BF16(c, a, b) standin::dot_bf16(c, a, b)

#else

#include <immintrin.h>

// What was written before is in memory when an instruction reads there: GCC's intrinsics do not
// tell the compiler that they read (LDTILECFG: more than 8 bytes).
#define TILE_WRITTEN(p) __asm__ volatile("" ::"r"(p) : "memory")
#define TILES_CONFIGURE(p)  \
  do {                      \
    TILE_WRITTEN(p);        \
    _tile_loadconfig(p);    \
  } while (0)
#define TILES_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) \
  do {                          \
    TILE_WRITTEN(p);            \
    _tile_loadd(t, p, stride);  \
  } while (0)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_DOT_INT8(c, a, b) _tile_dpbsud(c, a, b)
#define TILE_DOT_BF16(c, a, b) _tile_dpbf16ps(c, a, b)

#endif
