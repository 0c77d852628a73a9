#define NS avx512_vnni
#define NS_NAME "avx512_vnni"
#define LANES 16
#define MAX_TILE 12
#define TABLE kVnniKernels
#include "isa.inl"
