// Rates that the machine gives now: memory read, fp32 FMA, int8 VNNI. argv[1]: most threads.
#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
enum { BYTES = 256 << 20, ROUNDS = 3 };
static char *memory[64];
static volatile float sink;
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static int kind;
static void *work(void *arg) {
  long thread = (long)arg;
  if (kind == 0) {
    const float *p = (const float *)memory[thread];
    __m512 a[8];
    for (int j = 0; j < 8; j++) a[j] = _mm512_setzero_ps();
    for (int r = 0; r < ROUNDS; r++)
      for (long i = 0; i < BYTES / 4; i += 128)
        for (int j = 0; j < 8; j++) a[j] = _mm512_add_ps(a[j], _mm512_loadu_ps(p + i + j * 16));
    for (int j = 1; j < 8; j++) a[0] = _mm512_add_ps(a[0], a[j]);
    sink = _mm512_reduce_add_ps(a[0]);
  } else if (kind == 1) {
    // named registers: as an array the compiler may keep the sums in memory, and times that
    __m512 a0 = _mm512_set1_ps(1), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0,
           a8 = a0, a9 = a0, a10 = a0, a11 = a0, x = _mm512_set1_ps(1.000001f), y = _mm512_set1_ps(1e-9f);
    for (long i = 0; i < 20000000; i++) {
#define FMA(a) __asm__ volatile("vfmadd213ps %2, %1, %0" : "+v"(a) : "v"(x), "v"(y));
      FMA(a0) FMA(a1) FMA(a2) FMA(a3) FMA(a4) FMA(a5) FMA(a6) FMA(a7) FMA(a8) FMA(a9) FMA(a10) FMA(a11)
    }
    sink = _mm512_reduce_add_ps(a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9 + a10 + a11);
#ifdef __AVX512VNNI__
  } else {
    __m512i a[12], x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(-2);
    for (int j = 0; j < 12; j++) a[j] = _mm512_setzero_si512();
    for (long i = 0; i < 20000000; i++) {
      for (int j = 0; j < 12; j++) a[j] = _mm512_dpbusd_epi32(a[j], x, y);
      __asm__ volatile("" : "+v"(x), "+v"(y));
    }
    for (int j = 1; j < 12; j++) a[0] = _mm512_add_epi32(a[0], a[j]);
    sink = (float)_mm512_reduce_add_epi32(a[0]);
#endif
  }
  return 0;
}
static double seconds(int threads) {
  pthread_t t[64];
  double best = 1e9;
  for (int r = 0; r < 3; r++) {
    double begin = now();
    for (long i = 0; i < threads; i++) pthread_create(&t[i], 0, work, (void *)i);
    for (int i = 0; i < threads; i++) pthread_join(t[i], 0);
    double s = now() - begin;
    if (s < best) best = s;
  }
  return best;
}
int main(int argc, char **argv) {
  int most = atoi(argv[1]);
  (void)argc;
  for (int i = 0; i < most; i++) { memory[i] = aligned_alloc(64, BYTES); memset(memory[i], 0, BYTES); }
  printf("{");
  for (int n = 1; n <= most; n += most > 1 ? most - 1 : 1) {
    const char *comma = n < most ? ", " : "";
    kind = 0; printf("\"read GB/s, %d threads\": %.1f, ", n, (double)BYTES * ROUNDS * n / seconds(n) / 1e9);
    kind = 1; printf("\"fp32 GFLOP/s, %d threads\": %.0f", n, 20000000.0 * 12 * 32 * n / seconds(n) / 1e9);
#ifdef __AVX512VNNI__
    kind = 2; printf(", \"int8 GOP/s, %d threads\": %.0f", n, 20000000.0 * 12 * 128 * n / seconds(n) / 1e9);
#endif
    printf("%s", comma);
  }
  printf("}\n");
  return 0;
}
