/* Products of a few rows with a large weight, [rows, k] x [out, k]^T. The time to read the weight limits them. */
#ifndef GROUPRL_LINEAR_H
#define GROUPRL_LINEAR_H

#include "products.h"

#include <stdlib.h>

enum { GROUP = 32, BATCH = 128 }; /* rows worked on at once; rows that stay in the cache while weights pass by */

typedef struct {
    const void *weight; /* packed */
    const float *bias;  /* [out] or NULL */
    int32_t k, out;
} Linear;

/* Receives the results c [n][32] of the rows from `row` on and the outputs from `column` on. */
typedef void (*Use)(void *context, int row, int n, int column, const float *c);

/* The part of a product that thread `me` of `threads` does; its results go to `use`, 32 outputs at a time.
   a [rows rounded up to 16][k] is bfloat16 if low, else float32. */
static void product(int low, int rows, const void *a, const Linear *l, int me, int threads, Use use, void *context) {
    int pairs = (l->out + 31) / 32, last = (l->out + 15) / 16 - 1, k = l->k;
    size_t size = (size_t)BLOCK * k;
    float c[GROUP * 32];
    for (int batch = 0; batch < rows; batch += BATCH)
        for (int p = pairs * me / threads; p < pairs * (me + 1) / threads; p++) {
            int b0 = 2 * p, b1 = b0 < last ? b0 + 1 : b0;
            for (int r = batch; r < rows && r < batch + BATCH; r += GROUP) {
                int n = rows - r < GROUP ? rows - r : GROUP;
                two_blocks(low, 0, n, k, element(low, a, (size_t)r * k), k, l->weight, b0 * size, b1 * size, c, 32);
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
        void *block = (void *)element(low, packed, ((size_t)first + (size_t)b * stride) * BLOCK * k);
        pack_rows(low, out - b * BLOCK, k, element(is_bf16, w, (size_t)b * BLOCK * k), is_bf16, k, block);
    }
}

/* The same for the way back: the columns of w [n, columns] become outputs, its rows places at.. of `places`; n is even.
   In bfloat16. */
static void pack_turned(const void *w, int is_bf16, int n, int columns, int at, int places, bf16 *packed) {
#pragma omp parallel for schedule(static)
    for (int b = 0; b < columns / BLOCK; b++) {
        bf16 *block = packed + ((size_t)b * places + at) * BLOCK;
        for (int r = 0; r < n; r += 2)
            for (int j = 0; j < BLOCK; j += W) {
                size_t from = (size_t)r * columns + b * BLOCK + j;
                bf16 two[2][W];
                store_bf16(two[0], get(is_bf16, w, from));
                store_bf16(two[1], get(is_bf16, w, from + columns));
                uvec pair = ((uvec)load_bf16(two[0]) >> 16) | (uvec)load_bf16(two[1]);
                memcpy(block + (size_t)r * BLOCK + 2 * j, &pair, sizeof pair);
            }
    }
}

static void *room(size_t bytes) {
    void *p = NULL;
    return posix_memalign(&p, 64, bytes ? bytes : 1) ? NULL : p;
}

/* Room for rows of activations, and for rows of zeros behind them that fill up the last group. */
static void *room_for_rows(int low, size_t rows, size_t width) {
    size_t one = low ? sizeof(bf16) : sizeof(float), used = rows * width * one,
           padded = (rows + GROUP - 1) / GROUP * GROUP;
    char *p = room(padded * width * one);
    return p ? memset(p + used, 0, padded * width * one - used), p : NULL;
}

/* --- what becomes of a product ---------------------------------------------------------------------------------- */

/* y [rows][out], rows `apart` elements apart. */
typedef struct {
    void *y;
    int out, low;
    size_t apart;
} Output;

static void use_output(void *context, int row, int n, int column, const float *c) {
    Output *o = context;
    int wide = o->out - column < 32 ? o->out - column : 32;
    for (int i = 0; i < n; i++) {
        size_t at = (row + i) * o->apart + column;
        if (o->low)
            for (int j = 0; j + W <= wide; j += W) store_bf16((bf16 *)o->y + at + j, load(c + i * 32 + j));
        else
            memcpy((float *)o->y + at, c + i * 32, wide * sizeof(float));
    }
}

static void use_residual(void *context, int row, int n, int column, const float *c) {
    Output *o = context;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < 32 && column + j < o->out; j += W) {
            float *y = (float *)o->y + (row + i) * o->apart + column + j;
            store(y, load(y) + load(c + i * 32 + j));
        }
}

static void use_gate(void *context, int row, int n, int column, const float *c) {
    Output *o = context;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < BLOCK; j += W) {
            vec gate = load(c + i * 32 + j), up = load(c + i * 32 + BLOCK + j);
            put(o->low, o->y, (row + i) * o->apart + column / 2 + j, gate / (1.0f + exponential(-gate)) * up);
        }
}

#endif
