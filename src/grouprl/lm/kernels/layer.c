/* The parts of a Llama-shaped layer that treat each token by itself, apart from matrix products, and their gradients:
   norms, rotary positions and gates. Activations are bfloat16 if low, else float32. The residual stream and all
   arithmetic are float32. */
#include "products.h"

#include <omp.h>
#include <stdlib.h>

/* h [n][width] = x / rms(x) * weight. If there is a y, the function first computes `to` = x + y and uses it as x. */
void grouprl_norm(
    int low, int n, int width, const float *x, const void *y, const float *weight, float eps, float *to, void *h
) {
#pragma omp parallel for schedule(static)
    for (int r = 0; r < n; r++) {
        size_t at = (size_t)r * width;
        const float *row = x + at;
        if (y) {
            for (int i = 0; i < width; i += W) store(to + at + i, load(row + i) + get(low, y, at + i));
            row = to + at;
        }
        float f = inverse_rms(0, row, 0, width, eps);
        for (int i = 0; i < width; i += W) put(low, h, at + i, load(row + i) * f * load(weight + i));
    }
}

/* Computes the gradient of the norm from the gradient dh of h. It adds the gradient of x to g, copies g to g_low,
   computes h again and adds the gradient of the weight to dweight. Returns 0, or 1 if there is not enough memory. */
int grouprl_norm_gradient(
    int low, int n, int width, const float *x, const float *weight, float eps, const void *dh, float *g, void *g_low,
    void *h, float *dweight
) {
    int threads = omp_get_max_threads();
    float *sums = calloc((size_t)threads * width, sizeof(float));
    if (!sums) return 1;
#pragma omp parallel num_threads(threads)
    {
        float *own = sums + (size_t)omp_get_thread_num() * width;
#pragma omp for schedule(static)
        for (int r = 0; r < n; r++) {
            size_t at = (size_t)r * width;
            const float *row = x + at;
            float f = inverse_rms(0, row, 0, width, eps);
            vec s = all(0);
            for (int i = 0; i < width; i += W) s += get(low, dh, at + i) * load(weight + i) * load(row + i);
            float c = sum(s) * f * f * f / width;
            for (int i = 0; i < width; i += W) {
                vec v = load(row + i), d = get(low, dh, at + i), w = load(weight + i), normed = v * f;
                vec total = load(g + at + i) + d * w * f - v * c;
                store(g + at + i, total);
                put(low, g_low, at + i, total);
                put(low, h, at + i, normed * w);
                store(own + i, load(own + i) + d * normed);
            }
        }
    }
    for (int t = 0; t < threads; t++) /* in a fixed order, so that runs can be repeated exactly */
        for (int i = 0; i < width; i++) dweight[i] += sums[(size_t)t * width + i];
    free(sums);
    return 0;
}

/* The queries, keys and values of a token are contiguous: [heads + 2 k_heads][d]. Norms are [d] or NULL. */
typedef struct {
    int32_t tokens, heads, k_heads, d, low;
    float eps;
    const float *q_norm, *k_norm, *cos, *sin; /* the latter [tokens][d] */
    float *dq_norm, *dk_norm;
} Rotary;

/* `to` = qkv, with norms (if there are any) and rotary positions applied to queries and keys. */
void grouprl_rotate(const Rotary *a, const void *qkv, void *to) {
    int all_heads = a->heads + 2 * a->k_heads, d = a->d, half = d / 2, low = a->low;
#pragma omp parallel for schedule(static)
    for (int t = 0; t < a->tokens; t++)
        for (int h = 0; h < all_heads; h++) {
            size_t at = ((size_t)t * all_heads + h) * d;
            float x[d], y[d];
            if (h >= a->heads + a->k_heads) {
                for (int i = 0; i < d; i += W) put(low, to, at + i, get(low, qkv, at + i));
                continue;
            }
            const float *norm = h < a->heads ? a->q_norm : a->k_norm;
            float f = norm ? inverse_rms(low, qkv, at, d, a->eps) : 1.0f;
            for (int i = 0; i < d; i += W) store(x + i, get(low, qkv, at + i) * f * (norm ? load(norm + i) : all(1)));
            const float *c = a->cos + (size_t)t * d, *s = a->sin + (size_t)t * d;
            for (int i = 0; i < half; i++) {
                y[i] = x[i] * c[i] - x[i + half] * s[i];
                y[i + half] = x[i + half] * c[i + half] + x[i] * s[i + half];
            }
            for (int i = 0; i < d; i += W) put(low, to, at + i, load(y + i));
        }
}

/* Computes the gradient `to` of qkv from the gradient g (float32) of the result of grouprl_rotate. It adds the
   gradients of the norms' weights to dq_norm and dk_norm. Returns 0, or 1 if there is not enough memory. */
int grouprl_rotate_gradient(const Rotary *a, const void *qkv, const float *g, void *to) {
    int all_heads = a->heads + 2 * a->k_heads, d = a->d, half = d / 2, low = a->low, threads = omp_get_max_threads();
    float *sums = calloc((size_t)threads * 2 * d, sizeof(float));
    if (!sums) return 1;
#pragma omp parallel num_threads(threads)
    {
        float *own = sums + (size_t)omp_get_thread_num() * 2 * d;
#pragma omp for schedule(static)
        for (int t = 0; t < a->tokens; t++)
            for (int h = 0; h < all_heads; h++) {
                size_t at = ((size_t)t * all_heads + h) * d;
                if (h >= a->heads + a->k_heads) {
                    for (int i = 0; i < d; i += W) put(low, to, at + i, load(g + at + i));
                    continue;
                }
                const float *c = a->cos + (size_t)t * d, *s = a->sin + (size_t)t * d, *y = g + at;
                float x[d];
                for (int i = 0; i < half; i++) {
                    x[i] = y[i] * c[i] + y[i + half] * s[i + half];
                    x[i + half] = y[i + half] * c[i + half] - y[i] * s[i];
                }
                const float *norm = h < a->heads ? a->q_norm : a->k_norm;
                if (!norm) {
                    for (int i = 0; i < d; i += W) put(low, to, at + i, load(x + i));
                    continue;
                }
                float f = inverse_rms(low, qkv, at, d, a->eps), *dnorm = own + (h < a->heads ? 0 : d);
                vec dot = all(0);
                for (int i = 0; i < d; i += W) dot += load(x + i) * load(norm + i) * get(low, qkv, at + i);
                float k = sum(dot) * f * f * f / d;
                for (int i = 0; i < d; i += W) {
                    vec v = get(low, qkv, at + i);
                    store(dnorm + i, load(dnorm + i) + load(x + i) * v * f);
                    put(low, to, at + i, load(x + i) * load(norm + i) * f - v * k);
                }
            }
    }
    for (int t = 0; t < threads && a->q_norm; t++)
        for (int i = 0; i < d; i++) {
            a->dq_norm[i] += sums[((size_t)t * 2) * d + i];
            a->dk_norm[i] += sums[((size_t)t * 2 + 1) * d + i];
        }
    free(sums);
    return 0;
}

/* m [n][inner] = silu(gate) * up. The gate and up of a token are contiguous. */
void grouprl_gate(int low, int n, int inner, const void *gate_up, void *m) {
#pragma omp parallel for schedule(static)
    for (int r = 0; r < n; r++)
        for (int i = 0; i < inner; i += W) {
            size_t at = (size_t)r * 2 * inner + i;
            vec gate = get(low, gate_up, at), up = get(low, gate_up, at + inner);
            put(low, m, (size_t)r * inner + i, gate / (1.0f + exponential(-gate)) * up);
        }
}

/* Computes the gradient of gate and up from the gradient dm of m, and computes m again. */
void grouprl_gate_gradient(int low, int n, int inner, const void *gate_up, const void *dm, void *to, void *m) {
#pragma omp parallel for schedule(static)
    for (int r = 0; r < n; r++)
        for (int i = 0; i < inner; i += W) {
            size_t at = (size_t)r * 2 * inner + i, one = (size_t)r * inner + i;
            vec gate = get(low, gate_up, at), up = get(low, gate_up, at + inner), d = get(low, dm, one);
            vec open = 1.0f / (1.0f + exponential(-gate)), silu = gate * open;
            put(low, to, at, d * up * (open + silu * (1.0f - open)));
            put(low, to, at + inner, d * silu);
            put(low, m, one, silu * up);
        }
}
