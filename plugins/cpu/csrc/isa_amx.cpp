#define NS amx
#define NS_NAME "avx512_amx"
#define LANES 16
#define TABLE with_amx
#include "amx.inl"
