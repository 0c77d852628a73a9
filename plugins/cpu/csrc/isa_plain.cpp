#define NS plain
#define NS_NAME "plain"
#define LANES 4
#define MAX_TILE 1
#define TABLE kPlainKernels
#include "isa.inl"
