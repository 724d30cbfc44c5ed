/* Panels: the keys or values of many tokens, packed in blocks as the second factor of a product (products.h). */
#ifndef GROUPRL_PANELS_H
#define GROUPRL_PANELS_H

#include "products.h"

static int up(int n, int to) { return (n + to - 1) / to * to; }

/* Columns c..c + W of row r of [n][d], with zeros around. */
INLINE vec part(int low, const void *x, size_t ld, int n, int d, int r, int c) {
    return r < n && c < d ? get(low, x, r * ld + c) : all(0);
}

/* x [n][d] into places `at`.. of blocks of 16 rows; `places` of them are written. */
static void pack_places(int low, const void *x, size_t ld, int n, int d, int D, int places, int at, void *to) {
    for (int b = 0; b < places; b += BLOCK) {
        void *block = (void *)element(low, to, (size_t)(at + b) * D);
        int rows = n - b < 0 ? 0 : n - b < BLOCK ? n - b : BLOCK;
        if (d == D) {
            pack_rows(low, rows, D, element(low, x, b * ld), low, ld, block);
            continue;
        }
        float y[BLOCK][D];
        for (int r = 0; r < BLOCK; r++)
            for (int c = 0; c < D; c += W) store(y[r] + c, part(low, x, ld, n, d, b + r, c));
        pack_rows(low, rows, D, y, 0, D, block);
    }
}

/* x [n][d] into blocks of 16 of its columns, places `at`.. of `all_places` in each; `places` of them are written. */
static void pack_dimensions(
    int low, const void *x, size_t ld, int n, int d, int D, int places, int at, int all_places, void *to
) {
    for (int c = 0; c < D; c += W) {
        size_t of_block = (size_t)(c / BLOCK * BLOCK) * all_places + (size_t)at * BLOCK;
        char *block = (char *)element(low, to, of_block + (low ? 2 : 1) * (c % BLOCK));
        for (int r = 0; r < places; r += low ? 2 : 1) {
            vec a = part(low, x, ld, n, d, r, c);
            if (low) {
                uvec pair = ((uvec)a >> 16) | (uvec)part(1, x, ld, n, d, r + 1, c);
                memcpy((bf16 *)block + (size_t)r * BLOCK, &pair, sizeof pair);
            } else {
                store((float *)block + (size_t)r * BLOCK, a);
            }
        }
    }
}

/* c [m][n] = (more: +=) a [m][k] times n / 16 blocks of `places` along k, of which k are used; multiples of 32. */
static void multiply(
    int low, int more, int m, int n, int k, const void *a, int lda, const void *w, int places, float *c, int ldc
) {
    for (int j = 0; j < n; j += 32)
        for (int i = 0; i < m; i += 32)
            two_blocks(
                low, more, 32, k, element(low, a, (size_t)i * lda), lda, w, (size_t)j * places,
                (size_t)(j + BLOCK) * places, c + (size_t)i * ldc + j, ldc
            );
}

#endif
