#define NS avx512
#define NS_NAME "avx512"
#define LANES 16
#define MAX_TILE 12
#define TABLE kAvx512Kernels
#include "isa.inl"
