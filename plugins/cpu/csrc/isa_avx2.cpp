#define NS avx2
#define NS_NAME "avx2"
#define LANES 8
#define MAX_TILE 3
#define TABLE kAvx2Kernels
#include "isa.inl"
