/* Attention over packed groups, and its gradient. grouprl/lm/packed/rectangles.py computes the same in torch.

   A group is a prompt and its completions. Each of them is a stretch of the row. A token sees its prompt, and the
   tokens of its stretch up to itself. Threads divide the work by group and key head. In the panels of keys, the prompt
   starts at place 0 and the current completion starts at place `start`. The query heads of a key head are rows of one
   product: row i * g + j is head j of token i of a chunk. The gradient computes the scores again. */
#include "panels.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>

typedef struct {
    int32_t heads, k_heads, d, low, out_low, groups;
    int32_t window;     /* tokens a token sees, itself included; 0: all */
    int32_t ld_q, ld_k; /* elements from token to token of q and dq, and of k, v, dk, dv */
    float scale;
    const int32_t *group;         /* [groups + 1] where each group's stretches begin; the first is its prompt */
    const int32_t *start, *count; /* tokens of each stretch, in the row */
    const void *q, *k, *v, *dout; /* [tokens, heads, d], [tokens, k_heads, d] twice, and as q: bfloat16 if low */
    void *out;                    /* [tokens, heads, d], of the forward pass: bfloat16 if out_low */
    float *dq, *dk, *dv;          /* of the gradient */
} Attention;

enum { CHUNK = 96, SPREAD = 4 }; /* rows worked on at once, about; tasks per thread, at least */

/* What a thread works in. L: places of keys; R: rows; both multiples of 32. D: d rounded up to one. */
typedef struct {
    int L, R, D;
    void *kd, *vd;         /* keys and values, blocks of 16 places: for scores and for the gradient of probabilities */
    void *kt, *vt;         /* the same, blocks of 16 dimensions: for the gradient of queries and for outputs */
    void *q, *qt, *o, *ot; /* [R][D] queries and gradients of outputs as rows, and in blocks of 16 dimensions */
    float *s, *dp, *c;     /* [R][L] scores, then probabilities; their gradient; [R][D] a product */
    void *p, *ds, *pt, *dst; /* [R][L] probabilities and gradients of scores, and their transposes [L][R] */
    float *dk, *dv;          /* [L][D] */
    float *total;            /* [R] */
} Space;

static size_t slice(char **at, size_t bytes) {
    size_t from = (size_t)*at;
    *at += (bytes + 63) / 64 * 64;
    return from;
}

/* Lays a space out behind `at` (which may be 0, to learn its size) and returns its end. */
static char *lay_out(Space *s, char *at, int low, int gradient, int L, int R, int D) {
    size_t one = low ? sizeof(bf16) : sizeof(float), panel = (size_t)L * D * one, rows = (size_t)R * D * one;
    size_t square = (size_t)R * L * one, rows_f = (size_t)R * D * sizeof(float);
    s->L = L, s->R = R, s->D = D;
    s->kd = (void *)slice(&at, panel);
    s->q = (void *)slice(&at, rows);
    s->s = (float *)slice(&at, (size_t)R * L * sizeof(float));
    s->total = (float *)slice(&at, R * sizeof(float));
    s->c = (float *)slice(&at, rows_f);
    if (!gradient) {
        s->vt = (void *)slice(&at, panel);
        s->p = (void *)slice(&at, square);
        return at;
    }
    s->vd = (void *)slice(&at, panel);
    s->kt = (void *)slice(&at, panel);
    s->qt = (void *)slice(&at, rows);
    s->o = (void *)slice(&at, rows);
    s->ot = (void *)slice(&at, rows);
    s->dp = (float *)slice(&at, (size_t)R * L * sizeof(float));
    s->ds = (void *)slice(&at, square);
    s->pt = (void *)slice(&at, square);
    s->dst = (void *)slice(&at, square);
    s->dk = (float *)slice(&at, (size_t)L * D * sizeof(float));
    s->dv = (float *)slice(&at, (size_t)L * D * sizeof(float));
    return at;
}

/* a [R][ld] in float32, columns 0..n, into its transpose [n][R]. */
static void turn(int low, const float *a, int R, int ld, int n, void *to) {
    for (int c = 0; c < n; c += BLOCK)
        for (int r = 0; r < R; r += BLOCK) {
            uint32_t t[BLOCK][BLOCK];
            for (int i = 0; i < BLOCK; i++) memcpy(t[i], a + (size_t)(r + i) * ld + c, sizeof t[i]);
            transpose(t);
            for (int j = 0; j < BLOCK; j++)
                for (int i = 0; i < BLOCK; i += W) put(low, to, (size_t)(c + j) * R + r + i, get(0, t[j], i));
        }
}

/* Probabilities of a chunk's scores s [rows of R][L], places 0..end; unnormalised, their sums in `total`. They take the
   place of the scores, or (to_p) go to p. */
static void soften(
    const Attention *a, Space *x, int to_p, int R, int rows, int g, int first, int prompt, int start, int end
) {
    for (int r = 0; r < rows; r++) {
        float *s = x->s + (size_t)r * x->L;
        int seen = start + first + r / g + 1,
            at = prompt + first + r / g; /* own places end; position in the sequence */
        for (int t = prompt; t < start; t++) s[t] = -1e30f;
        for (int t = seen; t < end; t++) s[t] = -1e30f;
        if (a->window > 0) {
            int far = at - a->window + 1; /* the first position that is near enough */
            for (int t = 0; t < prompt && t < far; t++) s[t] = -1e30f;
            for (int t = 0; t < far - prompt; t++) s[start + t] = -1e30f;
        }
        vec top = all(-1e30f), sums = all(0);
        for (int t = 0; t < end; t += W) top = larger(top, load(s + t));
        float most = largest(top);
        for (int t = 0; t < end; t += W) {
            vec e = exponential((load(s + t) - most) * a->scale);
            sums += e;
            if (to_p)
                put(a->low, x->p, (size_t)r * x->L + t, e);
            else
                store(s + t, e);
        }
        x->total[r] = sum(sums);
    }
    for (int r = rows; r < R; r++) {
        x->total[r] = 1.0f;
        for (int t = 0; t < end; t += W)
            if (to_p)
                put(a->low, x->p, (size_t)r * x->L + t, all(0));
            else
                store(x->s + (size_t)r * x->L + t, all(0));
    }
}

/* Keys and values of n tokens from `at` of the row into places start.. of the panels. */
static void pack_keys(const Attention *a, Space *x, int h, int at, int n, int start, int gradient) {
    size_t own = (size_t)at * a->ld_k + (size_t)h * a->d;
    const void *k = element(a->low, a->k, own), *v = element(a->low, a->v, own);
    int places = up(n, 32);
    pack_places(a->low, k, a->ld_k, n, a->d, x->D, places, start, x->kd);
    if (gradient) {
        pack_places(a->low, v, a->ld_k, n, a->d, x->D, places, start, x->vd);
        pack_dimensions(a->low, k, a->ld_k, n, a->d, x->D, places, start, x->L, x->kt);
    } else {
        pack_dimensions(a->low, v, a->ld_k, n, a->d, x->D, places, start, x->L, x->vt);
    }
}

/* The n queries from `at` of the row, behind `prompt` keys, their own keys in places start.. */
static void stretch(const Attention *a, Space *x, int h, int at, int n, int prompt, int start, int gradient) {
    int g = a->heads / a->k_heads, d = a->d, D = x->D, L = x->L, low = a->low, step = x->R / g;
    size_t of_query = a->ld_q, of_out = (size_t)a->heads * d;
    for (int first = 0; first < n; first += step) {
        int tokens = n - first < step ? n - first : step, rows = tokens * g, end = start + up(first + tokens, 32);
        int R = up(rows, 32);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < D; c += W) {
                size_t token = at + first + r / g, head = (size_t)(h * g + r % g) * d + c;
                int there = r < rows && c < d;
                put(low, x->q, (size_t)r * D + c, there ? get(low, a->q, token * of_query + head) : all(0));
                if (gradient)
                    put(low, x->o, (size_t)r * D + c, there ? get(low, a->dout, token * of_out + head) : all(0));
            }
        multiply(low, 0, R, end, D, x->q, D, x->kd, D, x->s, L);
        soften(a, x, !gradient, R, rows, g, first, prompt, start, end);
        if (!gradient) {
            multiply(low, 0, R, D, end, x->p, L, x->vt, L, x->c, D);
            for (int r = 0; r < rows; r++) {
                float f = 1.0f / x->total[r];
                size_t to = (at + first + r / g) * of_out + (size_t)(h * g + r % g) * d;
                for (int c = 0; c < d; c += W) put(a->out_low, a->out, to + c, load(x->c + (size_t)r * D + c) * f);
            }
            continue;
        }
        multiply(low, 0, R, end, D, x->o, D, x->vd, D, x->dp, L);
        for (int r = 0; r < R; r++) {
            float *s = x->s + (size_t)r * L, *dp = x->dp + (size_t)r * L, f = 1.0f / x->total[r];
            vec sums = all(0);
            for (int t = 0; t < end; t += W) {
                vec p = load(s + t) * f;
                store(s + t, p);
                sums += p * load(dp + t);
            }
            float delta = sum(sums);
            for (int t = 0; t < end; t += W) {
                vec ds = load(s + t) * (load(dp + t) - delta) * a->scale;
                store(dp + t, ds);
                put(low, x->ds, (size_t)r * L + t, ds);
            }
        }
        multiply(low, 0, R, D, end, x->ds, L, x->kt, L, x->c, D);
        for (int r = 0; r < rows; r++) {
            float *to = a->dq + (size_t)(at + first + r / g) * of_query + (size_t)(h * g + r % g) * d;
            for (int c = 0; c < d; c += W) store(to + c, load(x->c + (size_t)r * D + c));
        }
        turn(low, x->s, R, L, end, x->pt);
        turn(low, x->dp, R, L, end, x->dst);
        pack_dimensions(low, x->q, D, R, D, D, R, 0, R, x->qt);
        pack_dimensions(low, x->o, D, R, D, D, R, 0, R, x->ot);
        multiply(low, 1, end, D, R, x->pt, R, x->ot, R, x->dv, D);
        multiply(low, 1, end, D, R, x->dst, R, x->qt, R, x->dk, D);
    }
}

/* Gradients dk and dv [n][D] to n tokens from `at` of the row. */
static void give(const Attention *a, const float *dk, const float *dv, int D, int h, int at, int n) {
    for (int t = 0; t < n; t++)
        for (int c = 0; c < a->d; c += W) {
            size_t to = (size_t)(at + t) * a->ld_k + (size_t)h * a->d + c, from = (size_t)t * D + c;
            store(a->dk + to, load(dk + from));
            store(a->dv + to, load(dv + from));
        }
}

/* x [n] becomes the sum of `shares` of them, `apart` elements apart, in order. */
static void collect(float *x, int shares, size_t apart, size_t n) {
    for (int s = 1; s < shares; s++)
        for (size_t i = 0; i < n; i += W) store(x + i, load(x + i) + load(x + s * apart + i));
}

/* 0, or 1 if there is no memory. With `gradient` from q, k, v, dout to dq, dk, dv, otherwise from q, k, v to out. */
int grouprl_attention(const Attention *a, int gradient) {
    int g = a->heads / a->k_heads, D = up(a->d, 32), L = 0, longest_prompt = 0, failed = 0,
        tasks = a->groups * a->k_heads;
    for (int i = 0; i < a->groups; i++) {
        int longest = 0, prompt = up(a->count[a->group[i]], 32);
        for (int j = a->group[i] + 1; j < a->group[i + 1]; j++)
            if (a->count[j] > longest) longest = a->count[j];
        L = prompt + up(longest, 32) > L ? prompt + up(longest, 32) : L;
        longest_prompt = prompt > longest_prompt ? prompt : longest_prompt;
    }
    int R = up(g, 32) > CHUNK ? up(g, 32) : up(CHUNK / g * g, 32), threads = omp_get_max_threads();
    int shares = tasks < SPREAD * threads ? (SPREAD * threads + tasks - 1) / tasks : 1;
    size_t of_prompt = (size_t)2 * longest_prompt * D;
    float *sums = NULL;
    if (gradient && posix_memalign((void **)&sums, 64, (size_t)tasks * shares * of_prompt * sizeof(float))) return 1;
    Space none;
    size_t size = (size_t)lay_out(&none, 0, a->low, gradient, L, R, D);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        void *memory = NULL;
        if (posix_memalign(&memory, 64, size)) failed = 1, memory = NULL;
        Space x;
        if (memory) lay_out(&x, memory, a->low, gradient, L, R, D);
        start_products();
#pragma omp for schedule(dynamic)
        for (int task = 0; task < tasks * shares; task++) {
            if (!memory) continue;
            int share = task % shares, h = task / shares % a->k_heads, i = task / shares / a->k_heads;
            int first = a->group[i], prompt = a->count[first], start = up(prompt, 32);
            if (gradient)
                memset(x.dk, 0, (size_t)start * D * sizeof(float)), memset(x.dv, 0, (size_t)start * D * sizeof(float));
            pack_keys(a, &x, h, a->start[first], prompt, 0, gradient);
            if (share == 0) stretch(a, &x, h, a->start[first], prompt, 0, 0, gradient);
            for (int j = first + 1 + share; j < a->group[i + 1]; j += shares) {
                size_t own = (size_t)start * D, bytes = (size_t)up(a->count[j], 32) * D * sizeof(float);
                if (gradient) memset(x.dk + own, 0, bytes), memset(x.dv + own, 0, bytes);
                pack_keys(a, &x, h, a->start[j], a->count[j], start, gradient);
                stretch(a, &x, h, a->start[j], a->count[j], prompt, start, gradient);
                if (gradient) give(a, x.dk + own, x.dv + own, D, h, a->start[j], a->count[j]);
            }
            if (!gradient) continue;
            float *to = sums + task * of_prompt;
            memcpy(to, x.dk, (size_t)start * D * sizeof(float));
            memcpy(to + of_prompt / 2, x.dv, (size_t)start * D * sizeof(float));
        }
#pragma omp for schedule(static)
        for (int task = 0; task < (gradient ? tasks : 0); task++) {
            float *dk = sums + (size_t)task * shares * of_prompt, *dv = dk + of_prompt / 2;
            int first = a->group[task / a->k_heads], prompt = a->count[first];
            collect(dk, shares, of_prompt, (size_t)prompt * D);
            collect(dv, shares, of_prompt, (size_t)prompt * D);
            give(a, dk, dv, D, task % a->k_heads, a->start[first], prompt);
        }
        stop_products();
        free(memory);
    }
    free(sums);
    return failed;
}
