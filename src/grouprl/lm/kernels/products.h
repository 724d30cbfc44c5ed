/* The innermost product: up to 32 rows times 32 columns, with the fastest unit of the processor.

   The second factor is packed in blocks of 16 columns. In float32 a block is [k][16]. In bfloat16 a block is
   [k / 2][16][2], with pairs along k, because the processor's bfloat16 instructions expect pairs. Sums are float32. */
#ifndef GROUPRL_PRODUCTS_H
#define GROUPRL_PRODUCTS_H

#include <vector.h>

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define GROUPRL_TILES 1
#endif
#if defined(GROUPRL_TILES) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

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

/* c [rows up to 32][32] = (more: +=) a [rows][k] times blocks w0 and w1; a has a multiple of 16 rows, and so has c;
   k > 0. */
#ifdef GROUPRL_TILES
static void two_blocks_bf16(
    int more, int rows, int k, const bf16 *a, int lda, const bf16 *w0, const bf16 *w1, float *c, int ldc
) {
    float *below = c + (size_t)16 * ldc;
    size_t apart = ldc * sizeof(float);
    if (more) {
        _tile_loadd(0, c, apart);
        _tile_loadd(1, c + W, apart);
        if (rows > 16) _tile_loadd(2, below, apart);
        if (rows > 16) _tile_loadd(3, below + W, apart);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    if (rows <= 16) {
        for (int i = 0; i < k; i += 32) {
            _tile_loadd(4, a + i, lda * sizeof(bf16));
            _tile_loadd(6, w0 + i * W, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w1 + i * W, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
    } else {
        for (int i = 0; i < k; i += 32) {
            _tile_loadd(4, a + i, lda * sizeof(bf16));
            _tile_loadd(6, w0 + i * W, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w1 + i * W, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + i + (size_t)16 * lda, lda * sizeof(bf16));
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, below, apart);
        _tile_stored(3, below + W, apart);
    }
    _tile_stored(0, c, apart);
    _tile_stored(1, c + W, apart);
}
#elif defined(__AVX512BF16__)
/* n rows, a constant. The sums of 8 rows are 16 registers: as many as the unit needs to be busy at its latency. Unless
   `ahead` is 0, what lies so far behind the blocks is fetched meanwhile. */
INLINE void few_rows_bf16(
    const int n, int more, int k, size_t ahead, const bf16 *a, int lda, const bf16 *w0, const bf16 *w1, float *c,
    int ldc
) {
    __m512 x[8], y[8];
#pragma GCC unroll 8
    for (int r = 0; r < n; r++) {
        x[r] = more ? _mm512_loadu_ps(c + (size_t)r * ldc) : _mm512_setzero_ps();
        y[r] = more ? _mm512_loadu_ps(c + (size_t)r * ldc + W) : _mm512_setzero_ps();
    }
    for (int i = 0; i < k; i += 2) {
        __m512bh u = (__m512bh)_mm512_loadu_si512(w0 + i * W), v = (__m512bh)_mm512_loadu_si512(w1 + i * W);
        if (ahead) _mm_prefetch(w0 + ahead + i * W, _MM_HINT_T0), _mm_prefetch(w1 + ahead + i * W, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) {
            int32_t pair;
            memcpy(&pair, a + (size_t)r * lda + i, sizeof pair);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            x[r] = _mm512_dpbf16_ps(x[r], u, both);
            y[r] = _mm512_dpbf16_ps(y[r], v, both);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
        _mm512_storeu_ps(c + (size_t)r * ldc, x[r]), _mm512_storeu_ps(c + (size_t)r * ldc + W, y[r]);
}

/* A piece of the blocks at a time, which stays in the nearest cache while the rows pass by and the next one comes: of
   these blocks, and at their end of the two behind them. */
static void two_blocks_bf16(
    int more, int rows, int k, const bf16 *a, int lda, const bf16 *w0, const bf16 *w1, float *c, int ldc
) {
    enum { PIECE = 96 };
    for (int i = 0; i < k; i += PIECE, a += PIECE, w0 += PIECE * W, w1 += PIECE * W, more = 1) {
        int here = k - i < PIECE ? k - i : PIECE;
        size_t next = i + PIECE < k ? PIECE * W : (size_t)(2 * k - i) * W;
        if (rows <= 4) {
            few_rows_bf16(4, more, here, next, a, lda, w0, w1, c, ldc);
            continue;
        }
        few_rows_bf16(8, more, here, next, a, lda, w0, w1, c, ldc);
        for (int r = 8; r < rows; r += 8)
            few_rows_bf16(8, more, here, 0, a + (size_t)r * lda, lda, w0, w1, c + (size_t)r * ldc, ldc);
    }
}
#else
static void two_blocks_bf16(
    int more, int rows, int k, const bf16 *a, int lda, const bf16 *w0, const bf16 *w1, float *c, int ldc
) {
    for (int r0 = 0; r0 < rows; r0 += 4, a += (size_t)4 * lda, c += (size_t)4 * ldc) {
        vec x[4], y[4];
        for (int r = 0; r < 4; r++) x[r] = more ? load(c + (size_t)r * ldc) : all(0);
        for (int r = 0; r < 4; r++) y[r] = more ? load(c + (size_t)r * ldc + W) : all(0);
        for (int i = 0; i < k; i += 2) {
            uvec u, v;
            memcpy(&u, w0 + i * W, sizeof u);
            memcpy(&v, w1 + i * W, sizeof v);
            vec u0 = (vec)(u << 16), u1 = (vec)(u & 0xffff0000u), v0 = (vec)(v << 16), v1 = (vec)(v & 0xffff0000u);
            for (int r = 0; r < 4; r++) {
                union {
                    uint32_t bits;
                    float value;
                } first = {(uint32_t)a[(size_t)r * lda + i] << 16};
                union {
                    uint32_t bits;
                    float value;
                } second = {(uint32_t)a[(size_t)r * lda + i + 1] << 16};
                x[r] += u0 * first.value + u1 * second.value;
                y[r] += v0 * first.value + v1 * second.value;
            }
        }
        for (int r = 0; r < 4; r++) store(c + (size_t)r * ldc, x[r]), store(c + (size_t)r * ldc + W, y[r]);
    }
}
#endif

static void two_blocks_f32(
    int more, int rows, int k, const float *a, int lda, const float *w0, const float *w1, float *c, int ldc
) {
    for (int r0 = 0; r0 < rows; r0 += 4) {
        vec x[4], y[4];
        for (int r = 0; r < 4; r++) x[r] = more ? load(c + (size_t)(r0 + r) * ldc) : all(0);
        for (int r = 0; r < 4; r++) y[r] = more ? load(c + (size_t)(r0 + r) * ldc + W) : all(0);
        for (int i = 0; i < k; i++) {
            vec u = load(w0 + i * W), v = load(w1 + i * W);
            for (int r = 0; r < 4; r++) {
                float b = a[(size_t)(r0 + r) * lda + i];
                x[r] += u * b;
                y[r] += v * b;
            }
        }
        for (int r = 0; r < 4; r++)
            store(c + (size_t)(r0 + r) * ldc, x[r]), store(c + (size_t)(r0 + r) * ldc + W, y[r]);
    }
}

INLINE const void *element(int low, const void *p, size_t i) {
    return low ? (const void *)((const bf16 *)p + i) : (const void *)((const float *)p + i);
}

/* The same for bfloat16 (low) or float32, and the blocks that begin at elements i0 and i1 of w. */
static void two_blocks(
    int low, int more, int rows, int k, const void *a, int lda, const void *w, size_t i0, size_t i1, float *c, int ldc
) {
    if (low)
        two_blocks_bf16(more, rows, k, a, lda, element(1, w, i0), element(1, w, i1), c, ldc);
    else
        two_blocks_f32(more, rows, k, a, lda, element(0, w, i0), element(0, w, i1), c, ldc);
}

/* Sixteen rows of x (some may lack), columns 0..k, as a block: its outputs are those rows. */
static void pack_rows(int low, int rows, int k, const void *x, int is_bf16, size_t ld, void *block) {
    int step = low ? 2 * W : W;
    for (int i = 0; i < k; i += step) {
        uvec t[W];
        for (int j = 0; j < W; j++) {
            if (j >= rows) {
                t[j] = (uvec){0};
            } else if (low) {
                put(1, &t[j], 0, get(is_bf16, x, j * ld + i));
                put(1, &t[j], W, get(is_bf16, x, j * ld + i + W));
            } else {
                t[j] = (uvec)get(is_bf16, x, j * ld + i);
            }
        }
        transpose(t);
        memcpy((uint32_t *)element(low, block, (size_t)i * W), t, sizeof t);
    }
}

#endif
