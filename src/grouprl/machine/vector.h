/* Sixteen floats at a time, in the compiler's portable vectors, and bfloat16 (the upper half of a float). */
#ifndef GROUPRL_VECTOR_H
#define GROUPRL_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { W = 16 };
typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE vec all(float x) { return (vec){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

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

/* Rows become columns. */
INLINE void transpose(uvec r[W]) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define SWAP(a, b, low, high)                                                                                          \
    do {                                                                                                               \
        uvec x = a, y = b;                                                                                             \
        a = __builtin_shufflevector(x, y, LIST low);                                                                   \
        b = __builtin_shufflevector(x, y, LIST high);                                                                  \
    } while (0)
#define LIST(...) __VA_ARGS__
    for (int i = 0; i < W; i += 2)
        SWAP(
            r[i], r[i + 1], (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
            (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
        );
    for (int i = 0; i < W; i++)
        if (!(i & 2))
            SWAP(
                r[i], r[i + 2], (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
            );
    for (int i = 0; i < W; i++)
        if (!(i & 4))
            SWAP(
                r[i], r[i + 4], (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
            );
    for (int i = 0; i < W / 2; i++)
        SWAP(
            r[i], r[i + 8], (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
            (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
        );
#undef SWAP
#undef LIST
#else
    uint32_t t[W][W];
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) t[j][i] = r[i][j];
    for (int i = 0; i < W; i++) memcpy(&r[i], t[i], sizeof r[i]);
#endif
}

#endif
