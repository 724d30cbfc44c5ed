/* A small fully connected network and its gradient, a few rows at a time, so that what lies between two layers stays
   in the cache. Between layers a row is a multiple of 16 wide, and what is beyond a layer's width is 0. */
#ifndef GROUPRL_LAYERS_H
#define GROUPRL_LAYERS_H

#include <stdlib.h>
#include <vector.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { ROWS = 96, DEEPEST = 8 }; /* rows worked on at once; most layers */
enum { PADDED = 16 };            /* rows between layers are a multiple of it wide: mlp.py makes room for them */
enum { ACROSS = REGISTERS / 8 }; /* vectors of a row of sums; with six rows, most registers hold sums */

typedef struct {
    int32_t layers, tanh; /* else the rectifier */
    int32_t width[DEEPEST + 1];
    const float *weight[DEEPEST], *bias[DEEPEST]; /* [out][in] and [out] */
} Mlp;

INLINE int up(int n) { return (n + PADDED - 1) / PADDED * PADDED; }

INLINE int least(size_t a, int b) { return a < (size_t)b ? (int)a : b; }

/* --- products --------------------------------------------------------------------------------------------------- */

/* c [m][W n] = start + a [m][k] b [k][W n], m and n constants. Rows of a lie `down` apart, columns `along`; those of
   start `start_down`: 0 where all rows begin with the same, and nothing where it is NULL. */
INLINE void tile(
    int m, int n, int k, const float *a, size_t down, size_t along, const float *b, int ldb, const float *start,
    int start_down, float *c, int ldc
) {
    vec s[6][4];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) s[i][j] = start ? load(start + (size_t)i * start_down + j * W) : all(0);
    for (int t = 0; t < k; t++) {
        vec w[4];
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) w[j] = load(b + (size_t)t * ldb + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            vec x = all(a[i * down + t * along]);
#pragma GCC unroll 8
            for (int j = 0; j < n; j++) s[i][j] += x * w[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) store(c + (size_t)i * ldc + j * W, s[i][j]);
}

/* The same for any m; n stays a constant. */
INLINE void strip(
    int n, int m, int k, const float *a, size_t down, size_t along, const float *b, const float *start, int start_down,
    float *c, int ld
) {
    int i = 0;
#define ROWS_OF(count)                                                                                                 \
    for (; i + count <= m; i += count)                                                                                 \
    tile(                                                                                                              \
        count, n, k, a + i * down, down, along, b, ld, start ? start + (size_t)i * start_down : NULL, start_down,      \
        c + (size_t)i * ld, ld                                                                                         \
    )
    ROWS_OF(6);
    ROWS_OF(2);
    ROWS_OF(1);
#undef ROWS_OF
}

/* The same for any number of columns that is a multiple of 16, all of which b, start and c have. */
INLINE void product_of(
    int m, int columns, int k, const float *a, size_t down, size_t along, const float *b, const float *start,
    int start_down, float *c
) {
    for (int j = 0; j < columns; j += ACROSS * W) {
        const float *from = start ? start + j : NULL;
        switch (least((columns - j) / W, ACROSS)) {
        case 1:
            strip(1, m, k, a, down, along, b + j, from, start_down, c + j, columns);
            break;
        case 2:
            strip(2, m, k, a, down, along, b + j, from, start_down, c + j, columns);
            break;
        case 3:
            strip(3, m, k, a, down, along, b + j, from, start_down, c + j, columns);
            break;
        default:
            strip(4, m, k, a, down, along, b + j, from, start_down, c + j, columns);
        }
    }
}

/* c [rows][columns] = bias + a [rows][k] b [k][columns]; bias may be NULL. */
static void product(
    int rows, int columns, int k, const float *a, int lda, const float *b, const float *bias, float *c
) {
    product_of(rows, columns, k, a, lda, 1, b, bias, 0, c);
}

/* c [m][columns] += a [rows][m]^T b [rows][columns]. */
static void product_sum(int m, int columns, int rows, const float *a, int lda, const float *b, float *c) {
    product_of(m, columns, rows, a, 1, lda, b, c, columns, c);
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

/* A network laid out for work on at most ROWS rows at a time. */
typedef struct {
    const Mlp *net;
    int last, columns[DEEPEST + 1]; /* of layer l's inputs, rounded up to 16 */
    float *room;
    float *turned[DEEPEST], *bias[DEEPEST];                       /* [in][columns of out] and [columns of out] */
    float *weight[DEEPEST], *d_weight[DEEPEST], *d_bias[DEEPEST]; /* [out][columns of in]; sums; sums */
    float *out, *d[2];                                            /* [ROWS][columns] */
} Work;

/* 0, or 1 if there is no memory. `gradients`: there will be some. */
static int start_work(Work *w, const Mlp *net, int gradients) {
    int widest = W;
    size_t size = 0;
    w->net = net, w->last = net->layers - 1;
    for (int l = 0; l <= w->last + 1; l++) {
        w->columns[l] = up(net->width[l]);
        if (w->columns[l] > widest) widest = w->columns[l];
    }
    for (int l = 0; l <= w->last; l++) {
        size_t in = w->columns[l], out = w->columns[l + 1];
        size += out * (in + 1) + (gradients ? out * (2 * in + 1) : 0);
    }
    size += (size_t)ROWS * (w->columns[w->last + 1] + (gradients ? 2 * widest : 0));
    if (posix_memalign((void **)&w->room, 64, size * sizeof(float))) return 1;
    memset(w->room, 0, size * sizeof(float));
    float *at = w->room;
    for (int l = 0; l <= w->last; l++) {
        int k = net->width[l], n = net->width[l + 1], in = w->columns[l], out = w->columns[l + 1];
        w->bias[l] = at, w->turned[l] = at + out, at += (size_t)out * (in + 1);
        memcpy(w->bias[l], net->bias[l], n * sizeof(float));
        for (int i = 0; i < k; i++)
            for (int j = 0; j < n; j++) w->turned[l][(size_t)i * out + j] = net->weight[l][(size_t)j * k + i];
        if (!gradients) continue;
        w->d_bias[l] = at, w->d_weight[l] = at + out, w->weight[l] = w->d_weight[l] + (size_t)out * in;
        at = w->weight[l] + (size_t)out * in;
        for (int j = 0; j < n; j++)
            memcpy(w->weight[l] + (size_t)j * in, net->weight[l] + (size_t)j * k, k * sizeof(float));
    }
    w->out = at, w->d[0] = w->out + (size_t)ROWS * w->columns[w->last + 1], w->d[1] = w->d[0] + (size_t)ROWS * widest;
    return 0;
}

/* w->out of m rows of x; hidden[l] [m][columns] gets what layer l gives. */
static void forwards(Work *w, int m, const float *x, float *const *hidden) {
    int lda = w->net->width[0];
    for (int l = 0; l < w->last; l++) {
        int columns = w->columns[l + 1];
        product(m, columns, w->net->width[l], x, lda, w->turned[l], w->bias[l], hidden[l]);
        activate(w->net, hidden[l], (size_t)m * columns);
        x = hidden[l], lda = columns;
    }
    product(m, w->columns[w->last + 1], w->net->width[w->last], x, lda, w->turned[w->last], w->bias[w->last], w->out);
}

/* Add up the gradients of m rows from that of their outputs, g [m][ldg]; and write that of x, unless dx is NULL. */
static void backwards(Work *w, int m, const float *x, float *const *hidden, const float *g, int ldg, float *dx) {
    const Mlp *net = w->net;
    for (int l = w->last, which = 0; l >= 0; l--, which = !which) {
        int k = net->width[l], n = net->width[l + 1], columns = w->columns[l];
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) w->d_bias[l][j] += g[(size_t)i * ldg + j];
        if (l == 0) {
            product_sum(k, w->columns[1], m, x, k, g, w->d_weight[0]);
            if (!dx) return;
            product(m, columns, n, g, ldg, w->weight[0], NULL, w->d[which]);
            for (int i = 0; i < m; i++)
                memcpy(dx + (size_t)i * k, w->d[which] + (size_t)i * columns, k * sizeof(float));
            return;
        }
        product_sum(n, columns, m, g, ldg, hidden[l - 1], w->d_weight[l]);
        product(m, columns, n, g, ldg, w->weight[l], NULL, w->d[which]);
        through_activation(net, hidden[l - 1], w->d[which], (size_t)m * columns);
        g = w->d[which], ldg = columns;
    }
}

/* The sums of gradients: [out][in] and [out] of each layer, one after the other. */
static void gradients_of(const Work *w, float *to) {
    for (int l = 0; l <= w->last; l++) {
        int k = w->net->width[l], n = w->net->width[l + 1], ld = w->columns[l == 0 ? 1 : l];
        for (int j = 0; j < n; j++)
            for (int i = 0; i < k; i++) *to++ = w->d_weight[l][l == 0 ? (size_t)i * ld + j : (size_t)j * ld + i];
        memcpy(to, w->d_bias[l], n * sizeof(float));
        to += n;
    }
}

static void stop_work(Work *w) { free(w->room); }

#endif
