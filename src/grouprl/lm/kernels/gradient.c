/* The gradient of a weight, g^T x over many tokens. It adds the float32 sums to the gradient in place. */
#include "products.h"

#include <omp.h>
#include <stdlib.h>

enum { DEPTH = 320, TALL = 32 }; /* the numbers of tokens and of outputs of a tile */

static int up32(int n) { return (n + 31) / 32 * 32; }

/* W pairs of a number at `first` and one at `second`; where there is none, of 0. */
INLINE uvec pair_of(const bf16 *first, const bf16 *second) {
    uvec a = first ? (uvec)load_bf16(first) : (uvec){0}, b = second ? (uvec)load_bf16(second) : (uvec){0};
    return (a >> 16) | b;
}

/* Columns c..c + 32 (of `columns`) of n tokens of g, bfloat16, `apart` elements apart, as rows [32][ld]. */
static void turn_tokens(const bf16 *g, int columns, int apart, int c, int n, bf16 *to, int ld) {
    for (int half = 0; half < TALL; half += BLOCK)
        for (int t = 0; t < up32(n); t += 2 * BLOCK) {
            uint32_t r[BLOCK][BLOCK] = {0};
            for (int i = 0; i < BLOCK && c + half < columns; i++) {
                int row = t + 2 * i;
                const bf16 *from = g + (size_t)row * apart + c + half;
                for (int j = 0; j < BLOCK; j += W) {
                    uvec pair = pair_of(row < n ? from + j : NULL, row + 1 < n ? from + apart + j : NULL);
                    memcpy(&r[i][j], &pair, sizeof pair);
                }
            }
            transpose(r);
            for (int i = 0; i < BLOCK; i++) memcpy(to + (size_t)(half + i) * ld + t, r[i], sizeof r[i]);
        }
}

/* Columns c..c + 16 of n tokens of x, `apart` elements apart, as a block of `depth` places. */
static void pair_tokens(const bf16 *x, int apart, int c, int n, int depth, bf16 *block) {
    for (int t = 0; t < depth; t += 2)
        for (int j = 0; j < BLOCK; j += W) {
            const bf16 *from = x + (size_t)t * apart + c + j;
            uvec pair = pair_of(t < n ? from : NULL, t + 1 < n ? from + apart : NULL);
            memcpy(block + (size_t)t * BLOCK + 2 * j, &pair, sizeof pair);
        }
}

/* to [outs][ins] float32 = (add: +=) g^T x for g [tokens][outs], x [tokens][ins] in bfloat16; outs and ins are
   multiples of 16; tokens of g lie ld_g elements apart, those of x ld_x. 0, or 1 if there is no memory. */
int grouprl_weight_gradient(
    int tokens, int outs, int ins, const bf16 *g, int ld_g, const bf16 *x, int ld_x, float *to, int add
) {
    int most = up32(tokens < DEPTH ? tokens : DEPTH), ld = most + 32; /* not a power of 2, which the cache dislikes */
    bf16 *blocks;
    int failed = 0;
    if (posix_memalign((void **)&blocks, 64, (size_t)ins * most * sizeof(bf16))) return 1;
#pragma omp parallel reduction(| : failed)
    {
        bf16 *rows = NULL;
        if (posix_memalign((void **)&rows, 64, (size_t)TALL * ld * sizeof(bf16))) failed = 1, rows = NULL;
        start_products();
        for (int t = 0; t < tokens; t += DEPTH) {
            int n = tokens - t < DEPTH ? tokens - t : DEPTH, depth = up32(n);
#pragma omp for schedule(static)
            for (int b = 0; b < ins / BLOCK; b++)
                pair_tokens(x + (size_t)t * ld_x, ld_x, b * BLOCK, n, depth, blocks + (size_t)b * BLOCK * depth);
#pragma omp for schedule(static)
            for (int o = 0; o < outs; o += TALL) {
                if (!rows) continue;
                int height = outs - o < TALL ? outs - o : TALL;
                turn_tokens(g + (size_t)t * ld_g, outs, ld_g, o, n, rows, ld);
                for (int b = 0; b < ins / BLOCK; b += 2) {
                    int other = b + 1 < ins / BLOCK ? b + 1 : b;
                    float *c = to + (size_t)o * ins + b * BLOCK;
                    size_t i0 = (size_t)b * BLOCK * depth, i1 = (size_t)other * BLOCK * depth;
                    int more = add || t > 0;
                    if (other > b) {
                        two_blocks(1, more, height, depth, rows, ld, blocks, i0, i1, c, ins);
                        continue;
                    }
                    float sums[TALL * 2 * BLOCK]; /* one block is left: its twin goes nowhere */
                    two_blocks(1, 0, height, depth, rows, ld, blocks, i0, i1, sums, 2 * BLOCK);
                    for (int i = 0; i < height; i++) {
                        float *at = c + (size_t)i * ins;
                        for (int j = 0; j < BLOCK; j += W) {
                            vec v = load(sums + i * 2 * BLOCK + j);
                            store(at + j, more ? load(at + j) + v : v);
                        }
                    }
                }
            }
        }
        stop_products();
        free(rows);
    }
    free(blocks);
    return failed;
}
