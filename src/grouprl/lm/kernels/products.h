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

enum { BLOCK = 16, VECTORS = BLOCK / W }; /* columns of a block, and vectors of a row of it */

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

/* c [n][16 blocks] = (more: +=) a [n][k] times one block or two; n and blocks are constants, so that sums stay in
   registers. */
INLINE void few_rows_f32(
    const int n, const int blocks, int more, int k, const float *a, int lda, const float *w0, const float *w1, float *c,
    int ldc
) {
    vec s[8][2 * VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 8
        for (int v = 0; v < blocks * VECTORS; v++) s[r][v] = more ? load(c + (size_t)r * ldc + v * W) : all(0);
    for (int i = 0; i < k; i++) {
        vec w[2 * VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < blocks * VECTORS; v++)
            w[v] = load((v < VECTORS ? w0 : w1) + (size_t)i * BLOCK + v % VECTORS * W);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) {
            vec x = all(a[(size_t)r * lda + i]);
#pragma GCC unroll 8
            for (int v = 0; v < blocks * VECTORS; v++) s[r][v] += x * w[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 8
        for (int v = 0; v < blocks * VECTORS; v++) store(c + (size_t)r * ldc + v * W, s[r][v]);
}

/* c [rows up to 32][32] = (more: +=) a [rows][k] times blocks w0 and w1; a has a multiple of 16 rows, and so has c;
   k > 0. Each number of c is one sum along k, whatever the rows beside it. Registers hold the sums of 8 rows of 32, of
   6 rows of 16, or of 2 rows of 16. */
static void two_blocks_f32(
    int more, int rows, int k, const float *a, int lda, const float *w0, const float *w1, float *c, int ldc
) {
    int r = 0;
    if (VECTORS == 1)
        for (; r < rows; r += 8)
            few_rows_f32(8, 2, more, k, a + (size_t)r * lda, lda, w0, w1, c + (size_t)r * ldc, ldc);
    if (VECTORS == 2 || REGISTERS == 32)
        for (; r + 6 <= rows; r += 6) {
            few_rows_f32(6, 1, more, k, a + (size_t)r * lda, lda, w0, NULL, c + (size_t)r * ldc, ldc);
            few_rows_f32(6, 1, more, k, a + (size_t)r * lda, lda, w1, NULL, c + (size_t)r * ldc + BLOCK, ldc);
        }
    for (; r < rows; r += 2) {
        few_rows_f32(2, 1, more, k, a + (size_t)r * lda, lda, w0, NULL, c + (size_t)r * ldc, ldc);
        few_rows_f32(2, 1, more, k, a + (size_t)r * lda, lda, w1, NULL, c + (size_t)r * ldc + BLOCK, ldc);
    }
}

/* The same in bfloat16. */
#ifdef GROUPRL_TILES
static void two_blocks_bf16(
    int more, int rows, int k, const bf16 *a, int lda, const bf16 *w0, const bf16 *w1, float *c, int ldc
) {
    float *below = c + (size_t)16 * ldc;
    size_t apart = ldc * sizeof(float);
    if (more) {
        _tile_loadd(0, c, apart);
        _tile_loadd(1, c + BLOCK, apart);
        if (rows > 16) _tile_loadd(2, below, apart);
        if (rows > 16) _tile_loadd(3, below + BLOCK, apart);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    if (rows <= 16) {
        for (int i = 0; i < k; i += 32) {
            _tile_loadd(4, a + i, lda * sizeof(bf16));
            _tile_loadd(6, w0 + i * BLOCK, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w1 + i * BLOCK, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
    } else {
        for (int i = 0; i < k; i += 32) {
            _tile_loadd(4, a + i, lda * sizeof(bf16));
            _tile_loadd(6, w0 + i * BLOCK, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w1 + i * BLOCK, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + i + (size_t)16 * lda, lda * sizeof(bf16));
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, below, apart);
        _tile_stored(3, below + BLOCK, apart);
    }
    _tile_stored(0, c, apart);
    _tile_stored(1, c + BLOCK, apart);
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
        y[r] = more ? _mm512_loadu_ps(c + (size_t)r * ldc + BLOCK) : _mm512_setzero_ps();
    }
    for (int i = 0; i < k; i += 2) {
        __m512bh u = (__m512bh)_mm512_loadu_si512(w0 + i * BLOCK), v = (__m512bh)_mm512_loadu_si512(w1 + i * BLOCK);
        if (ahead) _mm_prefetch(w0 + ahead + i * BLOCK, _MM_HINT_T0), _mm_prefetch(w1 + ahead + i * BLOCK, _MM_HINT_T0);
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
        _mm512_storeu_ps(c + (size_t)r * ldc, x[r]), _mm512_storeu_ps(c + (size_t)r * ldc + BLOCK, y[r]);
}

/* A piece of the blocks at a time, which stays in the nearest cache while the rows pass by and the next one comes: of
   these blocks, and at their end of the two behind them. */
static void two_blocks_bf16(
    int more, int rows, int k, const bf16 *a, int lda, const bf16 *w0, const bf16 *w1, float *c, int ldc
) {
    enum { PIECE = 96 };
    for (int i = 0; i < k; i += PIECE, a += PIECE, w0 += PIECE * BLOCK, w1 += PIECE * BLOCK, more = 1) {
        int here = k - i < PIECE ? k - i : PIECE;
        size_t next = i + PIECE < k ? PIECE * BLOCK : (size_t)(2 * k - i) * BLOCK;
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
/* A block of bfloat16 [k / 2][16][2] in float32, [k][16]. */
INLINE void widen(int k, const bf16 *w, float *to) {
    for (int i = 0; i < k; i += 2)
        for (int j = 0; j < BLOCK; j += W) {
            uvec pairs;
            memcpy(&pairs, w + (size_t)i * BLOCK + 2 * j, sizeof pairs);
            store(to + (size_t)i * BLOCK + j, (vec)(pairs << 16));
            store(to + (size_t)(i + 1) * BLOCK + j, (vec)(pairs & 0xffff0000u));
        }
}

static void two_blocks_bf16(
    int more, int rows, int k, const bf16 *a, int lda, const bf16 *w0, const bf16 *w1, float *c, int ldc
) {
    enum { PIECE = 128 };
    float x[32 * PIECE], u[PIECE * BLOCK], v[PIECE * BLOCK];
    for (int i = 0; i < k; i += PIECE, more = 1) {
        int here = k - i < PIECE ? k - i : PIECE;
        for (int r = 0; r < (rows + 15) / 16 * 16; r++)
            for (int j = 0; j < here; j += W) store(x + r * PIECE + j, load_bf16(a + (size_t)r * lda + i + j));
        widen(here, w0 + (size_t)i * BLOCK, u);
        widen(here, w1 + (size_t)i * BLOCK, v);
        two_blocks_f32(more, rows, here, x, PIECE, u, v, c, ldc);
    }
}
#endif

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

/* Rows become columns. */
INLINE void transpose(uint32_t t[BLOCK][BLOCK]) {
#if W == 16 && defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define SWAP(a, b, low, high)                                                                                          \
    do {                                                                                                               \
        uvec x = a, y = b;                                                                                             \
        a = __builtin_shufflevector(x, y, LIST low);                                                                   \
        b = __builtin_shufflevector(x, y, LIST high);                                                                  \
    } while (0)
#define LIST(...) __VA_ARGS__
    uvec r[W];
    for (int i = 0; i < W; i++) memcpy(&r[i], t[i], sizeof r[i]);
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
    for (int i = 0; i < W; i++) memcpy(t[i], &r[i], sizeof r[i]);
#undef SWAP
#undef LIST
#else
    for (int i = 0; i < BLOCK; i++)
        for (int j = 0; j < i; j++) {
            uint32_t x = t[i][j];
            t[i][j] = t[j][i], t[j][i] = x;
        }
#endif
}

/* Sixteen rows of x (some may lack), columns 0..k, as a block: its outputs are those rows. */
static void pack_rows(int low, int rows, int k, const void *x, int is_bf16, size_t ld, void *block) {
    int step = low ? 2 * BLOCK : BLOCK;
    for (int i = 0; i < k; i += step) {
        uint32_t t[BLOCK][BLOCK] = {0};
        for (int j = 0; j < BLOCK && j < rows; j++)
            for (int c = 0; c < step; c += W) put(low, t[j], c, get(is_bf16, x, j * ld + i + c));
        transpose(t);
        memcpy((uint32_t *)element(low, block, (size_t)i * BLOCK), t, sizeof t);
    }
}

#endif
