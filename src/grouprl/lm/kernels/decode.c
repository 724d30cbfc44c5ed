/* A step of a Llama-shaped model that appends tokens to rows: norm, attention with rotary positions, norm, gated MLP.

   A step reads every weight once for a few tokens, so the time to read the weights should determine its cost. The whole
   step is one parallel region, and threads meet at barriers. Keys are transposed in blocks of 16 tokens, [D][16], so
   that scores are sums of vectors. Values are stored as [token][D]. The tokens whose rows have the same prompt read its
   keys and values together.

   A row may get one token or a stretch of them. What is computed of a token depends on the tokens before it alone, bit
   for bit: not on the other rows of the step, and not on how many tokens of its own row the step brings. */
#include "linear.h"
#include "panels.h"

#include <omp.h>
#include <stdlib.h>
#ifdef GROUPRL_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct {
    const float *norm1, *norm2, *q_norm, *k_norm; /* the latter two [D] or NULL */
    Linear qkv, o, gate_up, down;                 /* blocks of gate and up take turns */
    float scale;                                  /* of the scores */
    int32_t window;                               /* tokens a token sees, itself included; 0: all */
} Layer;

typedef struct {
    int32_t layers, width, heads, k_heads, head_dim, inner, low;
    float eps;
    const float *norm;
    Linear head;
    const Layer *layer;
} Model;

/* P prompts, S slots of at most C own tokens each (a multiple of 16). Keys and values of a prompt of n tokens are
   panels of T places, n up to a multiple of 32, [layers, K, T, D up to a multiple of 32], in the type of activations; a
   row's own are [layers, S, K, C / 16, D, 16] and [layers, S, K, C, D] in float32. */
typedef struct {
    int32_t slots, C;
    int32_t longest;                               /* tokens of the longest prompt */
    const int32_t *lengths;                        /* [P] tokens of each prompt */
    const void *const *prompt_k, *const *prompt_v; /* [P] */
    float *own_k, *own_v;
} Cache;

/* "Rows" are tokens here: those of a stretch stand one after the other. */
typedef struct {
    int32_t rows, parts, outputs;
    const int32_t *part;      /* [parts + 1] where each part of `row` starts; the rows of a part share a prompt */
    const int32_t *prompt;    /* [parts] */
    const int32_t *row;       /* [rows] rows by part */
    const int32_t *slot, *at; /* [rows] the slot of each, and how many own tokens come before it there */
    const int32_t *output;    /* [outputs] the rows whose logits are wanted, or NULL for all */
    float *x;                 /* [rows, width], overwritten */
    const float *cos, *sin;   /* [rows, D] */
    float *logits;            /* [outputs, vocabulary] */
} Step;

/* Norms of the rows that are this thread's; of the rows `which`, unless it is NULL. */
static void norms(
    const Model *m, int rows, const int32_t *which, const float *x, const float *weight, void *to, int me, int threads
) {
    for (int r = rows * me / threads; r < rows * (me + 1) / threads; r++) {
        const float *row = x + (size_t)(which ? which[r] : r) * m->width;
        float f = inverse_rms(0, row, 0, m->width, m->eps);
        for (int i = 0; i < m->width; i += W)
            put(m->low, to, (size_t)r * m->width + i, load(row + i) * f * load(weight + i));
    }
}

/* --- attention ------------------------------------------------------------------------------------------------- */

/* Scores of n queries and `blocks` blocks of 16 tokens, both constants. */
INLINE void scores_of(const int n, const int blocks, int d, const float *q, const float *k, float *s, int ld) {
    vec a[12 * VECTORS];
    for (int i = 0; i < n * blocks * VECTORS; i++) a[i] = all(0);
    for (int j = 0; j < d; j++)
        for (int b = 0; b < blocks * VECTORS; b++) {
            vec key = load(k + (size_t)(b / VECTORS) * d * BLOCK + j * BLOCK + b % VECTORS * W);
            for (int i = 0; i < n; i++) a[i * blocks * VECTORS + b] += key * q[i * d + j];
        }
    for (int i = 0; i < n; i++)
        for (int b = 0; b < blocks * VECTORS; b++) store(s + i * ld + b * W, a[i * blocks * VECTORS + b]);
}

/* s [n, tokens] = q [n, D] times the keys. At most 12 vectors of sums at once, so that they stay in registers. */
static void scores(int n, int tokens, int d, const float *q, const float *k, float *s, int ld) {
    enum { MOST = 12 / VECTORS, BY_SIX = MOST / 6 ? MOST / 6 : 1, BY_THREE = MOST / 3, BY_ONE = MOST < 4 ? MOST : 4 };
    int blocks = (tokens + BLOCK - 1) / BLOCK;
    while (n > 0) {
        int take = n >= 12 && MOST >= 12 ? 12 : n >= 6 && MOST >= 6 ? 6 : n >= 3 ? 3 : 1, b = 0;
        const int step = take == 12 ? 1 : take == 6 ? BY_SIX : take == 3 ? BY_THREE : BY_ONE;
        for (; b + step <= blocks; b += step) {
            const float *key = k + (size_t)b * d * BLOCK;
            if (take == 12)
                scores_of(12, 1, d, q, key, s + b * BLOCK, ld);
            else if (take == 6)
                scores_of(6, BY_SIX, d, q, key, s + b * BLOCK, ld);
            else if (take == 3)
                scores_of(3, BY_THREE, d, q, key, s + b * BLOCK, ld);
            else
                scores_of(1, BY_ONE, d, q, key, s + b * BLOCK, ld);
        }
        for (; b < blocks; b++) {
            const float *key = k + (size_t)b * d * BLOCK;
            if (take == 12)
                scores_of(12, 1, d, q, key, s + b * BLOCK, ld);
            else if (take == 6)
                scores_of(6, 1, d, q, key, s + b * BLOCK, ld);
            else if (take == 3)
                scores_of(3, 1, d, q, key, s + b * BLOCK, ld);
            else
                scores_of(1, 1, d, q, key, s + b * BLOCK, ld);
        }
        n -= take, q += (size_t)take * d, s += (size_t)take * ld;
    }
}

INLINE void mix_of(const int n, const int wide, int tokens, int d, const float *p, int ld, const float *v, float *out) {
    vec a[12];
    for (int i = 0; i < n; i++)
        for (int j = 0; j < wide; j++) a[i * wide + j] = load(out + i * d + j * W);
    for (int t = 0; t < tokens; t++)
        for (int j = 0; j < wide; j++) {
            vec value = load(v + (size_t)t * d + j * W);
            for (int i = 0; i < n; i++) a[i * wide + j] += value * p[i * ld + t];
        }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < wide; j++) store(out + i * d + j * W, a[i * wide + j]);
}

/* out [n, D] += p [n, tokens] times the values. */
static void mix(int n, int tokens, int d, const float *p, int ld, const float *v, float *out) {
    while (n > 0) {
        int take = n >= 12 ? 12 : n >= 6 ? 6 : n >= 3 ? 3 : 1, j = 0;
        for (; take < 6 && j + 4 * W <= d; j += 4 * W) {
            if (take == 3)
                mix_of(3, 4, tokens, d, p, ld, v + j, out + j);
            else
                mix_of(1, 4, tokens, d, p, ld, v + j, out + j);
        }
        for (; j < d; j += W) {
            if (take == 12)
                mix_of(12, 1, tokens, d, p, ld, v + j, out + j);
            else if (take == 6)
                mix_of(6, 1, tokens, d, p, ld, v + j, out + j);
            else if (take == 3)
                mix_of(3, 1, tokens, d, p, ld, v + j, out + j);
            else
                mix_of(1, 1, tokens, d, p, ld, v + j, out + j);
        }
        n -= take, p += (size_t)take * ld, out += (size_t)take * d;
    }
}

/* x [D] normed (if there is a norm), turned by its position, scaled. */
static void rotate(
    const float *x, int d, const float *norm, float eps, const float *cos, const float *sin, float scale, float *to
) {
    float f = norm ? inverse_rms(0, x, 0, d, eps) : 1.0f;
    int half = d / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i] * f, b = x[i + half] * f;
        if (norm) a *= norm[i], b *= norm[i + half];
        to[i] = (a * cos[i] - b * sin[i]) * scale;
        to[i + half] = (b * cos[i + half] + a * sin[i + half]) * scale;
    }
}

static void hide(float *s, int ld, int n, int from, int to) {
    for (int i = 0; i < n; i++)
        for (int t = from; t < to; t++) s[i * ld + t] = -1e30f;
}

/* Bytes that `attend` works in, for n rows of queries. */
static size_t space_of(const Model *m, const Cache *c, int n) {
    int R = up(n, 32), D = up(m->head_dim, 32), T = up(c->longest, 32);
    return (size_t)R * ((T + c->C) + 2 * m->head_dim + D) * sizeof(float) + (size_t)R * (T + D) * sizeof(float);
}

/* The first element of the own keys or values of a slot, for key head h of layer `at`. */
static size_t own_of(const Model *m, const Cache *c, int at, int slot, int h) {
    return (((size_t)at * c->slots + slot) * m->k_heads + h) * c->C * m->head_dim;
}

/* Store the keys and values of the rows' own tokens. */
static void keep_own(
    const Model *m, const Layer *l, int at, const Cache *c, const Step *s, const float *qkv, int me, int threads
) {
    int d = m->head_dim, all_heads = m->heads + 2 * m->k_heads;
    for (int task = me; task < s->rows * m->k_heads; task += threads) {
        int row = task / m->k_heads, h = task % m->k_heads, t = s->at[row];
        const float *x = qkv + (size_t)row * all_heads * d;
        size_t own = own_of(m, c, at, s->slot[row], h);
        float key[d], *block = c->own_k + own + (size_t)(t / BLOCK) * BLOCK * d + t % BLOCK;
        rotate(
            x + (m->heads + h) * d, d, l->k_norm, m->eps, s->cos + (size_t)row * d, s->sin + (size_t)row * d, 1.0f, key
        );
        for (int j = 0; j < d; j++) block[j * BLOCK] = key[j];
        memcpy(c->own_v + own + (size_t)t * d, x + (m->heads + m->k_heads + h) * d, d * sizeof(float));
    }
}

/* Scores s [places up to `end`] of one query become probabilities. */
static void soften(float *s, int end) {
    vec top = load(s), total = all(0);
    for (int t = W; t < end; t += W) top = larger(top, load(s + t));
    float most = largest(top);
    for (int t = 0; t < end; t += W) {
        vec e = exponential(load(s + t) - most);
        total += e;
        store(s + t, e);
    }
    float f = 1.0f / sum(total);
    for (int t = 0; t < end; t += W) store(s + t, load(s + t) * f);
}

/* Rows from..to of part p, key head h. Of the scores of a query, the first T belong to the prompt. */
static void attend(
    const Model *m, const Layer *l, int at, const Cache *c, const Step *s, int p, int h, int from, int to,
    const float *qkv, void *out, float *space
) {
    int d = m->head_dim, g = m->heads / m->k_heads, n = (to - from) * g, all_heads = m->heads + 2 * m->k_heads;
    int prompt = s->prompt[p], length = c->lengths[prompt], R = up(n, 32), D = up(d, 32), T = up(length, 32);
    int ld = T + c->C;
    float *w = space, *q = w + (size_t)R * ld, *o = q + (size_t)R * d, *mixed = o + (size_t)R * d;
    void *rows = mixed + (size_t)R * D, *weights = (float *)rows + (size_t)R * D;
    size_t of_prompt = ((size_t)at * m->k_heads + h) * T * D;
    memset(o, 0, (size_t)n * d * sizeof(float));
    for (int i = from; i < to; i++) {
        int row = s->row[i];
        const float *x = qkv + (size_t)row * all_heads * d, *cos = s->cos + row * d, *sin = s->sin + row * d;
        for (int j = 0; j < g; j++)
            rotate(x + (h * g + j) * d, d, l->q_norm, m->eps, cos, sin, l->scale, q + ((i - from) * g + j) * d);
        const float *keys = c->own_k + own_of(m, c, at, s->slot[row], h);
        scores(g, s->at[row] + 1, d, q + (i - from) * g * d, keys, w + (i - from) * g * ld + T, ld);
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < D; j += W) put(m->low, rows, (size_t)r * D + j, part(0, q, d, n, d, r, j));
    multiply(m->low, 0, R, T, D, rows, D, element(m->low, c->prompt_k[prompt], of_prompt), D, w, ld);
    for (int i = from; i < to; i++) {
        int own = s->at[s->row[i]] + 1, end = T + up(own, W), first = 0, first_own = 0;
        if (l->window > 0) {
            first = length + own - l->window;
            first_own = own - l->window;
            first = first < 0 ? 0 : first > length ? length : first;
            first_own = first_own < 0 ? 0 : first_own;
        }
        float *mine = w + (size_t)(i - from) * g * ld;
        hide(mine, ld, g, 0, first);
        hide(mine, ld, g, length, T + first_own);
        hide(mine, ld, g, T + own, end);
        for (int j = 0; j < g; j++) soften(mine + (size_t)j * ld, end);
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t += W) put(m->low, weights, (size_t)r * T + t, part(0, w, ld, n, T, r, t));
    multiply(m->low, 0, R, D, T, weights, T, element(m->low, c->prompt_v[prompt], of_prompt), T, mixed, D);
    for (int i = from; i < to; i++) {
        int row = s->row[i], at_row = (i - from) * g, own = s->at[row] + 1;
        int first_own = l->window > 0 && own > l->window ? own - l->window : 0;
        const float *values = c->own_v + own_of(m, c, at, s->slot[row], h) + (size_t)first_own * d;
        mix(g, own - first_own, d, w + (size_t)at_row * ld + T + first_own, ld, values, o + at_row * d);
        for (int r = at_row; r < at_row + g; r++)
            for (int j = 0; j < d; j += W)
                put(m->low, out, ((size_t)row * m->heads + h * g + r - at_row) * d + j,
                    load(o + r * d + j) + load(mixed + (size_t)r * D + j));
    }
}

/* --- what Python calls ----------------------------------------------------------------------------------------- */

/* 0 if the processor's units that this was compiled for may be used by this process. */
int grouprl_start(void) {
#ifdef GROUPRL_TILES
    const int arch_req_xcomp_perm = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, arch_req_xcomp_perm, tile_data) != 0;
#else
    return 0;
#endif
}

/* Keys and values of the n tokens of a prompt, [K][d] each, tokens `ld` elements apart, into the panels of a layer. */
void grouprl_keep(int low, int n, int k_heads, int d, int ld, const void *k, const void *v, void *to_k, void *to_v) {
    int D = up(d, 32), T = up(n, 32);
#pragma omp parallel for schedule(static)
    for (int h = 0; h < k_heads; h++) {
        size_t to = (size_t)h * T * D, from = (size_t)h * d;
        pack_places(low, element(low, k, from), ld, n, d, D, T, 0, (void *)element(low, to_k, to));
        pack_dimensions(low, element(low, v, from), ld, n, d, D, T, 0, T, (void *)element(low, to_v, to));
    }
}

/* 0, or 1 if there is no memory. */
int grouprl_decode(const Model *m, const Cache *c, const Step *s) {
    int g = m->heads / m->k_heads, d = m->head_dim, rows = s->rows;
    int chunk = 32 / g > 1 ? 32 / g : 1;
    int threads = omp_get_max_threads();
    size_t space = space_of(m, c, chunk * g);
    void *h = room_for_rows(m->low, rows, m->width), *attended = room_for_rows(m->low, rows, m->heads * d);
    int wide = (m->heads + 2 * m->k_heads) * d;
    float *qkv = room((size_t)rows * wide * sizeof(float));
    void *inner = room_for_rows(m->low, rows, m->inner);
    Output projected = {qkv, wide, 0, wide}, residual = {s->x, m->width, 0, m->width};
    Output gated = {inner, m->inner, m->low, m->inner}, logits = {s->logits, m->head.out, 0, m->head.out};
    char *spaces = room(threads * space);
    int failed = !h || !attended || !qkv || !inner || !spaces;
    if (!failed)
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num(), all_threads = omp_get_num_threads();
        start_products();
        for (int i = 0; i < m->layers; i++) {
            const Layer *l = m->layer + i;
            norms(m, rows, NULL, s->x, l->norm1, h, me, all_threads);
#pragma omp barrier
            product(m->low, rows, h, &l->qkv, me, all_threads, use_output, &projected);
#pragma omp barrier
            keep_own(m, l, i, c, s, qkv, me, all_threads);
#pragma omp barrier
            for (int p = 0, task = 0; p < s->parts; p++)
                for (int from = s->part[p]; from < s->part[p + 1]; from += chunk)
                    for (int head = 0; head < m->k_heads; head++, task++)
                        if (task % all_threads == me) {
                            int to = from + chunk < s->part[p + 1] ? from + chunk : s->part[p + 1];
                            attend(m, l, i, c, s, p, head, from, to, qkv, attended, (float *)(spaces + me * space));
                        }
#pragma omp barrier
            product(m->low, rows, attended, &l->o, me, all_threads, use_residual, &residual);
#pragma omp barrier
            norms(m, rows, NULL, s->x, l->norm2, h, me, all_threads);
#pragma omp barrier
            product(m->low, rows, h, &l->gate_up, me, all_threads, use_gate, &gated);
#pragma omp barrier
            product(m->low, rows, inner, &l->down, me, all_threads, use_residual, &residual);
#pragma omp barrier
        }
        norms(m, s->outputs, s->output, s->x, m->norm, h, me, all_threads);
#pragma omp barrier
        product(m->low, s->outputs, h, &m->head, me, all_threads, use_output, &logits);
        stop_products();
    }
    free(h), free(attended), free(qkv), free(inner), free(spaces);
    return failed;
}
