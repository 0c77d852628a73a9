#define NS avx512_bf16
#define NS_NAME "avx512_bf16"
#define LANES 16
#define MAX_TILE 12
#define TABLE kBf16Kernels
#include "isa.inl"
