/* Products of a few rows with a large weight, [rows, k] x [out, k]^T, limited by how fast the weight can be read.

   A weight lies packed in blocks of 16 outputs. In float32 a block is [k][16]; in bfloat16 it is [k / 2][16][2], pairs
   along k, which is what the processor's bfloat16 instructions take. Blocks are worked on in pairs. Sums are float32. */
#ifndef GROUPRL_PRODUCTS_H
#define GROUPRL_PRODUCTS_H

#include "vector.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define GROUPRL_TILES 1
#endif
#if defined(GROUPRL_TILES) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

enum { GROUP = 32 }; /* rows worked on at once */

typedef struct {
    const void *weight; /* packed */
    const float *bias;  /* [out] or NULL */
    int32_t k, out;
    int32_t stride; /* blocks from one of its blocks to the next */
} Linear;

#ifdef GROUPRL_TILES
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileConfig;
#endif

/* Each thread calls it before its first product, and stop_products after its last. */
INLINE void start_products(void) {
#ifdef GROUPRL_TILES
    TileConfig c = {.palette = 1};
    for (int i = 0; i < 8; i++) c.rows[i] = 16, c.bytes[i] = 64;
    _tile_loadconfig(&c);
#endif
}

INLINE void stop_products(void) {
#ifdef GROUPRL_TILES
    _tile_release();
#endif
}

/* c [rows up to 32][32] = a [rows][k] times blocks w0 and w1, in bfloat16; a has a multiple of 16 rows. */
#ifdef GROUPRL_TILES
static void two_blocks_bf16(int rows, int k, const bf16 *a, const bf16 *w0, const bf16 *w1, float *c) {
    _tile_zero(0);
    _tile_zero(1);
    if (rows <= 16) {
        for (int i = 0; i < k; i += 32) {
            _tile_loadd(4, a + i, k * sizeof(bf16));
            _tile_loadd(6, w0 + i * W, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w1 + i * W, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
    } else {
        _tile_zero(2);
        _tile_zero(3);
        for (int i = 0; i < k; i += 32) {
            _tile_loadd(4, a + i, k * sizeof(bf16));
            _tile_loadd(6, w0 + i * W, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w1 + i * W, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + i + 16 * k, k * sizeof(bf16));
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, c + 16 * 32, 128);
        _tile_stored(3, c + 16 * 32 + 16, 128);
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
}
#else
INLINE void rows_bf16(const int n, int k, const bf16 *a, const bf16 *w0, const bf16 *w1, float *c) {
    vec x[4], y[4];
    for (int r = 0; r < n; r++) x[r] = y[r] = all(0);
    for (int i = 0; i < k; i += 2) {
#ifdef __AVX512BF16__
        __m512bh u = (__m512bh)_mm512_loadu_si512(w0 + i * W), v = (__m512bh)_mm512_loadu_si512(w1 + i * W);
        for (int r = 0; r < n; r++) {
            int32_t pair;
            memcpy(&pair, a + r * k + i, sizeof pair);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            x[r] = (vec)_mm512_dpbf16_ps((__m512)x[r], u, both);
            y[r] = (vec)_mm512_dpbf16_ps((__m512)y[r], v, both);
        }
#else
        uvec u, v;
        memcpy(&u, w0 + i * W, sizeof u);
        memcpy(&v, w1 + i * W, sizeof v);
        vec u0 = (vec)(u << 16), u1 = (vec)(u & 0xffff0000u), v0 = (vec)(v << 16), v1 = (vec)(v & 0xffff0000u);
        for (int r = 0; r < n; r++) {
            union { uint32_t bits; float value; } first = {(uint32_t)a[r * k + i] << 16};
            union { uint32_t bits; float value; } second = {(uint32_t)a[r * k + i + 1] << 16};
            x[r] += u0 * first.value + u1 * second.value;
            y[r] += v0 * first.value + v1 * second.value;
        }
#endif
    }
    for (int r = 0; r < n; r++) store(c + r * 32, x[r]), store(c + r * 32 + W, y[r]);
}

static void two_blocks_bf16(int rows, int k, const bf16 *a, const bf16 *w0, const bf16 *w1, float *c) {
    for (int r = 0; r < rows; r += 4) rows_bf16(4, k, a + r * k, w0, w1, c + r * 32);
}
#endif

static void two_blocks_f32(int rows, int k, const float *a, const float *w0, const float *w1, float *c) {
    for (int r0 = 0; r0 < rows; r0 += 4) {
        vec x[4], y[4];
        for (int r = 0; r < 4; r++) x[r] = y[r] = all(0);
        for (int i = 0; i < k; i++) {
            vec u = load(w0 + i * W), v = load(w1 + i * W);
            for (int r = 0; r < 4; r++) {
                float b = a[(r0 + r) * k + i];
                x[r] += u * b;
                y[r] += v * b;
            }
        }
        for (int r = 0; r < 4; r++) store(c + (r0 + r) * 32, x[r]), store(c + (r0 + r) * 32 + W, y[r]);
    }
}

/* What becomes of c [n][32], rows `row` and on, outputs `column` and on. */
typedef void (*Use)(void *context, int row, int n, int column, const float *c);

/* The part of a product that thread `me` of `threads` does; its results go to `use`, 32 outputs at a time.
   a [rows rounded up to 16][k] is bfloat16 if low, else float32. */
static void product(int low, int rows, const void *a, const Linear *l, int me, int threads, Use use, void *context) {
    int pairs = (l->out + 31) / 32, last = (l->out + 15) / 16 - 1, k = l->k;
    size_t size = (size_t)l->stride * W * k;
    float c[GROUP * 32];
    for (int p = pairs * me / threads; p < pairs * (me + 1) / threads; p++) {
        int b0 = 2 * p, b1 = b0 < last ? b0 + 1 : b0;
        for (int r = 0; r < rows; r += GROUP) {
            int n = rows - r < GROUP ? rows - r : GROUP;
            if (low) {
                const bf16 *w = l->weight;
                two_blocks_bf16(n, k, (const bf16 *)a + (size_t)r * k, w + b0 * size, w + b1 * size, c);
            } else {
                const float *w = l->weight;
                two_blocks_f32(n, k, (const float *)a + (size_t)r * k, w + b0 * size, w + b1 * size, c);
            }
            if (l->bias)
                for (int i = 0; i < n; i++)
                    for (int j = 0; j < 32 && 32 * p + j < l->out; j++) c[i * 32 + j] += l->bias[32 * p + j];
            use(context, r, n, 32 * p, c);
        }
    }
}

/* Lay out w [out, k] of float32 or bfloat16; its block i becomes block first + i * stride of `packed`. */
static void pack_weight(const void *w, int is_bf16, int low, int out, int k, void *packed, int first, int stride) {
    int blocks = (out + 15) / 16;
#pragma omp parallel for schedule(static)
    for (int b = 0; b < blocks; b++) {
        size_t block = ((size_t)first + (size_t)b * stride) * W * k;
        for (int i = 0; i < k; i += W) {
            uint32_t t[W][W];
            for (int j = 0; j < W; j++) {
                size_t at = ((size_t)b * W + j) * k + i;
                vec v = all(0);
                if (b * W + j < out) v = is_bf16 ? load_bf16((const bf16 *)w + at) : load((const float *)w + at);
                if (low)
                    store_bf16((bf16 *)t[j], v);
                else
                    memcpy(t[j], &v, sizeof v);
            }
            uint32_t *to = low ? (uint32_t *)((bf16 *)packed + block + (size_t)i * W)
                               : (uint32_t *)((float *)packed + block + (size_t)i * W);
            for (int n = 0; n < (low ? W / 2 : W); n++)
                for (int j = 0; j < W; j++) to[n * W + j] = t[j][n];
        }
    }
}

#endif
