/* A small fully connected network and its gradient, a few rows at a time, so that what lies between two layers stays
   in the cache. Rows of x and of the outputs follow each other closely; between layers a row is a multiple of 16 wide,
   and what is beyond a layer's width is 0. */
#include <stdlib.h>
#include <vector.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { ROWS = 96, DEEPEST = 8 }; /* rows worked on at once; most layers */

typedef struct {
    int32_t layers, tanh; /* else the rectifier */
    int32_t width[DEEPEST + 1];
    const float *weight[DEEPEST], *bias[DEEPEST]; /* [out][in] and [out] */
} Mlp;

static int up(int n) { return (n + W - 1) / W * W; }

/* --- products --------------------------------------------------------------------------------------------------- */

/* c [m][16 n] = bias + a [m][k] b [k][16 n], m and n constants. */
INLINE void tile(int m, int n, int k, const float *a, int lda, const float *b, int ldb, const float *bias, float *c, int ldc) {
    vec s[6][4];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) s[i][j] = bias ? load(bias + j * W) : all(0);
    for (int t = 0; t < k; t++) {
        vec w[4];
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) w[j] = load(b + (size_t)t * ldb + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            vec x = all(a[(size_t)i * lda + t]);
#pragma GCC unroll 8
            for (int j = 0; j < n; j++) s[i][j] += x * w[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) store(c + (size_t)i * ldc + j * W, s[i][j]);
}

/* c [m][16 n] += a [rows][m]^T b [rows][16 n], m and n constants. */
INLINE void tile_sum(int m, int n, int rows, const float *a, int lda, const float *b, int ldb, float *c, int ldc) {
    vec s[6][4];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) s[i][j] = load(c + (size_t)i * ldc + j * W);
    for (int r = 0; r < rows; r++) {
        vec w[4];
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) w[j] = load(b + (size_t)r * ldb + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            vec x = all(a[(size_t)r * lda + i]);
#pragma GCC unroll 8
            for (int j = 0; j < n; j++) s[i][j] += x * w[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) store(c + (size_t)i * ldc + j * W, s[i][j]);
}

INLINE void strip(int n, int rows, int k, const float *a, int lda, const float *b, int ldb, const float *bias, float *c, int ldc) {
    int r = 0;
    for (; r + 6 <= rows; r += 6) tile(6, n, k, a + (size_t)r * lda, lda, b, ldb, bias, c + (size_t)r * ldc, ldc);
    for (; r + 2 <= rows; r += 2) tile(2, n, k, a + (size_t)r * lda, lda, b, ldb, bias, c + (size_t)r * ldc, ldc);
    if (r < rows) tile(1, n, k, a + (size_t)r * lda, lda, b, ldb, bias, c + (size_t)r * ldc, ldc);
}

/* c [rows][columns] = bias + a [rows][k] b [k][columns]; columns is a multiple of 16, bias may be NULL. */
static void product(int rows, int columns, int k, const float *a, int lda, const float *b, const float *bias, float *c) {
    for (int j = 0; j < columns; j += 4 * W) {
        const float *at = bias ? bias + j : NULL;
        switch ((columns - j) / W) {
        case 1: strip(1, rows, k, a, lda, b + j, columns, at, c + j, columns); break;
        case 2: strip(2, rows, k, a, lda, b + j, columns, at, c + j, columns); break;
        case 3: strip(3, rows, k, a, lda, b + j, columns, at, c + j, columns); break;
        default: strip(4, rows, k, a, lda, b + j, columns, at, c + j, columns);
        }
    }
}

INLINE void strip_sum(int n, int m, int rows, const float *a, int lda, const float *b, int ldb, float *c, int ldc) {
    int i = 0;
    for (; i + 6 <= m; i += 6) tile_sum(6, n, rows, a + i, lda, b, ldb, c + (size_t)i * ldc, ldc);
    for (; i + 2 <= m; i += 2) tile_sum(2, n, rows, a + i, lda, b, ldb, c + (size_t)i * ldc, ldc);
    if (i < m) tile_sum(1, n, rows, a + i, lda, b, ldb, c + (size_t)i * ldc, ldc);
}

/* c [m][columns] += a [rows][m]^T b [rows][columns]; columns is a multiple of 16. */
static void product_sum(int m, int columns, int rows, const float *a, int lda, const float *b, float *c) {
    for (int j = 0; j < columns; j += 4 * W)
        switch ((columns - j) / W) {
        case 1: strip_sum(1, m, rows, a, lda, b + j, columns, c + j, columns); break;
        case 2: strip_sum(2, m, rows, a, lda, b + j, columns, c + j, columns); break;
        case 3: strip_sum(3, m, rows, a, lda, b + j, columns, c + j, columns); break;
        default: strip_sum(4, m, rows, a, lda, b + j, columns, c + j, columns);
        }
}

/* --- activations ------------------------------------------------------------------------------------------------ */

/* tanh(x) within 3.1e-7, as x P(x^2) / Q(x^2) on [-8, 8]; P and Q fitted to the smallest relative error. */
INLINE vec hyperbolic_tangent(vec x) {
    x = larger(all(-8.0f), x); /* in this order, what is no number stays so */
    x = -larger(all(-8.0f), -x);
    vec z = x * x;
    vec p = z * 1.5230170902e-8f + 2.1894498786e-5f;
    vec q = z * 8.5223507540e-7f + 3.4112762660e-4f;
    p = p * z + 3.5715887789e-3f;
    q = q * z + 2.6164406911e-2f;
    p = p * z + 1.3444490731e-1f;
    q = q * z + 4.6777817607e-1f;
    p = p * z + 1.0f;
    q = q * z + 1.0f;
#ifdef __AVX512F__
    vec r = (vec)_mm512_rcp14_ps((__m512)q); /* 14 bits; one step of Newton's method makes them all of a float's */
    r = r * (2.0f - q * r);
    return x * p * r;
#else
    return x * p / q;
#endif
}

static void activate(const Mlp *net, float *x, size_t n) {
    if (net->tanh)
        for (size_t i = 0; i < n; i += W) store(x + i, hyperbolic_tangent(load(x + i)));
    else
        for (size_t i = 0; i < n; i += W) store(x + i, larger(all(0), load(x + i)));
}

/* d *= the derivative of the activation, where it gave h. */
static void through_activation(const Mlp *net, const float *h, float *d, size_t n) {
    if (net->tanh)
        for (size_t i = 0; i < n; i += W) {
            vec y = load(h + i);
            store(d + i, load(d + i) * (1.0f - y * y));
        }
    else
        for (size_t i = 0; i < n; i += W) store(d + i, (vec)((ivec)load(d + i) & (load(h + i) > 0.0f)));
}

/* --- the network ------------------------------------------------------------------------------------------------ */

static int least(size_t a, int b) { return a < (size_t)b ? (int)a : b; }

/* out [rows][last width] of x [rows][first width]. hidden: what each layer but the last gives, one after the other,
   each [rows][width rounded up to 16]. 0, or 1 if there is no memory. */
int grouprl_mlp(const Mlp *net, size_t rows, const float *x, float *hidden, float *out) {
    int last = net->layers - 1, outs = net->width[last + 1], wide = up(outs);
    size_t size = (size_t)ROWS * wide;
    for (int l = 0; l <= last; l++) size += ((size_t)net->width[l] + 1) * up(net->width[l + 1]);
    float *room, *turned[DEEPEST], *bias[DEEPEST];
    if (posix_memalign((void **)&room, 64, size * sizeof(float))) return 1;
    float *free_room = room + (size_t)ROWS * wide;
    for (int l = 0; l <= last; l++) {
        int k = net->width[l], n = net->width[l + 1], columns = up(n);
        bias[l] = free_room, turned[l] = free_room + columns;
        free_room += ((size_t)k + 1) * columns;
        memset(bias[l], 0, ((size_t)k + 1) * columns * sizeof(float));
        memcpy(bias[l], net->bias[l], n * sizeof(float));
        for (int j = 0; j < n; j++)
            for (int i = 0; i < k; i++) turned[l][(size_t)i * columns + j] = net->weight[l][(size_t)j * k + i];
    }
    for (size_t r = 0; r < rows; r += ROWS) {
        int m = least(rows - r, ROWS), lda = net->width[0];
        const float *a = x + r * lda;
        float *layer = hidden;
        for (int l = 0; l < last; l++) {
            int columns = up(net->width[l + 1]);
            float *to = layer + r * columns;
            product(m, columns, net->width[l], a, lda, turned[l], bias[l], to);
            activate(net, to, (size_t)m * columns);
            a = to, lda = columns, layer += rows * columns;
        }
        product(m, wide, net->width[last], a, lda, turned[last], bias[last], room);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < outs; j++) out[(r + i) * outs + j] = room[(size_t)i * wide + j];
    }
    free(room);
    return 0;
}

/* to [m][n] = from [m][ld] (turned: from [n][ld], rows and columns exchanged) */
static void lay_down(int turned, int m, int n, const float *from, int ld, float *to) {
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) to[(size_t)i * n + j] = turned ? from[(size_t)j * ld + i] : from[(size_t)i * ld + j];
}

/* The gradient, from that of out: [out][in] and [out] of each layer, one after the other; and of x, unless dx is NULL.
   Of one layer alone there is none here. 0, or 1 if there is no memory. */
int grouprl_mlp_gradient(
    const Mlp *net, size_t rows, const float *x, const float *hidden, const float *dout, float *gradient, float *dx
) {
    int last = net->layers - 1, widest = W, columns[DEEPEST + 1];
    size_t size = 0;
    for (int l = 0; l <= last + 1; l++) {
        columns[l] = up(net->width[l]);
        if (columns[l] > widest) widest = columns[l];
    }
    for (int l = 0; l <= last; l++)
        size += (size_t)columns[l + 1] * (columns[l] + 1) + (size_t)net->width[l + 1] * columns[l];
    size += (size_t)2 * ROWS * widest;
    float *room, *sums[DEEPEST], *bias[DEEPEST], *weight[DEEPEST], *d[2];
    if (posix_memalign((void **)&room, 64, size * sizeof(float))) return 1;
    memset(room, 0, size * sizeof(float));
    d[0] = room, d[1] = room + (size_t)ROWS * widest;
    float *free_room = d[1] + (size_t)ROWS * widest;
    for (int l = 0; l <= last; l++) {
        int k = net->width[l], n = net->width[l + 1];
        bias[l] = free_room, sums[l] = bias[l] + columns[l + 1], weight[l] = sums[l] + (size_t)columns[l + 1] * columns[l];
        free_room = weight[l] + (size_t)n * columns[l];
        for (int j = 0; j < n; j++) memcpy(weight[l] + (size_t)j * columns[l], net->weight[l] + (size_t)j * k, k * sizeof(float));
    }
    for (size_t r = 0; r < rows; r += ROWS) {
        int m = least(rows - r, ROWS), ldg = net->width[last + 1], which = 0;
        const float *g = dout + r * ldg, *layer = hidden;
        for (int l = 0; l < last; l++) layer += rows * columns[l + 1];
        for (int l = last; l >= 0; l--) {
            int k = net->width[l], n = net->width[l + 1];
            for (int i = 0; i < m; i++) /* n where g has no columns to spare, and few there */
                for (int j = 0; j < n; j++) bias[l][j] += g[(size_t)i * ldg + j];
            if (l == 0) {
                product_sum(k, columns[1], m, x + r * k, k, g, sums[0]);
                if (dx) {
                    product(m, columns[0], n, g, ldg, weight[0], NULL, d[which]);
                    lay_down(0, m, k, d[which], columns[0], dx + r * k);
                }
                break;
            }
            layer -= rows * columns[l];
            const float *h = layer + r * columns[l];
            product_sum(n, columns[l], m, g, ldg, h, sums[l]);
            product(m, columns[l], n, g, ldg, weight[l], NULL, d[which]);
            through_activation(net, h, d[which], (size_t)m * columns[l]);
            g = d[which], ldg = columns[l], which = !which;
        }
    }
    for (int l = 0; l <= last; l++) {
        int k = net->width[l], n = net->width[l + 1];
        lay_down(l == 0, n, k, sums[l], columns[l == 0 ? 1 : l], gradient);
        gradient += (size_t)n * k;
        memcpy(gradient, bias[l], n * sizeof(float));
        gradient += n;
    }
    free(room);
    return 0;
}
