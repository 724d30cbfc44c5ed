/* The gradient of a weight, g^T x over many tokens. It adds the float32 sums to the gradient in place. */
#include "products.h"

#include <omp.h>
#include <stdlib.h>

enum { DEPTH = 320, TALL = 32 }; /* the numbers of tokens and of outputs of a tile */

static int up32(int n) { return (n + 31) / 32 * 32; }

/* Columns c..c + 32 (of `columns`) of n tokens of g, bfloat16, `apart` elements apart, as rows [32][ld]. */
static void turn_tokens(const bf16 *g, int columns, int apart, int c, int n, bf16 *to, int ld) {
    for (int half = 0; half < TALL; half += W)
        for (int t = 0; t < up32(n); t += 2 * W) {
            uvec r[W];
            for (int i = 0; i < W; i++) {
                int row = t + 2 * i;
                const bf16 *from = g + (size_t)row * apart + c + half;
                int there = c + half < columns;
                uvec a = there && row < n ? (uvec)load_bf16(from) : (uvec){0};
                uvec b = there && row + 1 < n ? (uvec)load_bf16(from + apart) : (uvec){0};
                r[i] = (a >> 16) | b;
            }
            transpose(r);
            for (int i = 0; i < W; i++) memcpy(to + (size_t)(half + i) * ld + t, &r[i], sizeof r[i]);
        }
}

/* Columns c..c + 16 of n tokens of x, `apart` elements apart, as a block of `depth` places. */
static void pair_tokens(const bf16 *x, int apart, int c, int n, int depth, bf16 *block) {
    for (int t = 0; t < depth; t += 2) {
        const bf16 *from = x + (size_t)t * apart + c;
        uvec a = t < n ? (uvec)load_bf16(from) : (uvec){0}, b = t + 1 < n ? (uvec)load_bf16(from + apart) : (uvec){0};
        uvec pair = (a >> 16) | b;
        memcpy(block + (size_t)t * W, &pair, sizeof pair);
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
            for (int b = 0; b < ins / W; b++)
                pair_tokens(x + (size_t)t * ld_x, ld_x, b * W, n, depth, blocks + (size_t)b * W * depth);
#pragma omp for schedule(static)
            for (int o = 0; o < outs; o += TALL) {
                if (!rows) continue;
                int height = outs - o < TALL ? outs - o : TALL;
                turn_tokens(g + (size_t)t * ld_g, outs, ld_g, o, n, rows, ld);
                for (int b = 0; b < ins / W; b += 2) {
                    int other = b + 1 < ins / W ? b + 1 : b;
                    float *c = to + (size_t)o * ins + b * W;
                    size_t i0 = (size_t)b * W * depth, i1 = (size_t)other * W * depth;
                    int more = add || t > 0;
                    if (other > b) {
                        two_blocks(1, more, height, depth, rows, ld, blocks, i0, i1, c, ins);
                        continue;
                    }
                    float sums[TALL * 2 * W]; /* one block is left: its twin goes nowhere */
                    two_blocks(1, 0, height, depth, rows, ld, blocks, i0, i1, sums, 2 * W);
                    for (int i = 0; i < height; i++) {
                        float *at = c + (size_t)i * ins;
                        vec v = load(sums + i * 2 * W);
                        store(at, more ? load(at) + v : v);
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
