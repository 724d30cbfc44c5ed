/* Some floats at a time, in the compiler's portable vectors, and bfloat16 (the upper half of a float). */
#ifndef GROUPRL_VECTOR_H
#define GROUPRL_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* W: as many floats as a register holds; a compiler takes wider vectors too, but keeps them in memory. */
#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
enum { REGISTERS = 32 };
#else
enum { REGISTERS = 16 };
#endif
typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE vec all(float x) { return x - (vec){0}; } /* -0 stays -0 */

INLINE vec larger(vec a, vec b) {
    ivec m = a > b;
    return (vec)(((ivec)a & m) | ((ivec)b & ~m));
}

INLINE vec smaller(vec a, vec b) {
    ivec m = a < b;
    return (vec)(((ivec)a & m) | ((ivec)b & ~m));
}

INLINE float sum(vec v) {
    float s = 0;
    for (int i = 0; i < W; i++) s += v[i];
    return s;
}

INLINE float largest(vec v) {
    float s = v[0];
    for (int i = 1; i < W; i++) s = v[i] > s ? v[i] : s;
    return s;
}

/* exp(x) within 2 units in the last place; 0 below -87, exp(88) above 88. What is no number stays so: the bounds come
   first in the comparisons. */
INLINE vec exponential(vec x) {
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    ivec tiny = x < -87.0f;
    x = smaller(all(88.0f), larger(all(-87.0f), x));
    vec n = x * 1.44269504f + magic - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ivec scale = (__builtin_convertvector(n, ivec) + 127) << 23;
    return (vec)((ivec)(p * (vec)scale) & ~tiny);
}

/* To the nearest bfloat16, ties to even. */
INLINE void store_bf16(bf16 *p, vec v) {
    uvec u = (uvec)v;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    hvec h = __builtin_convertvector(u, hvec);
    memcpy(p, &h, sizeof h);
}

INLINE vec load_bf16(const bf16 *p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}

/* As bfloat16 (low) or float32. */
INLINE void put(int low, void *to, size_t at, vec v) {
    if (low)
        store_bf16((bf16 *)to + at, v);
    else
        store((float *)to + at, v);
}

INLINE vec get(int low, const void *from, size_t at) {
    return low ? load_bf16((const bf16 *)from + at) : load((const float *)from + at);
}

/* 1 / sqrt(mean of x^2 + eps) of n numbers from `at`. */
INLINE float inverse_rms(int low, const void *x, size_t at, int n, float eps) {
    vec s = all(0);
    for (int i = 0; i < n; i += W) {
        vec v = get(low, x, at + i);
        s += v * v;
    }
    return 1.0f / sqrtf(sum(s) / n + eps);
}

#endif
