/* The softmax over the vocabulary. It computes the log-probability of a token, the entropy and the probabilities. */
#include <vector.h>

#include <math.h>
#include <omp.h>

enum { TERMS = 512 }; /* terms of a partial sum: one float32 sum over all terms would be too inexact */

/* z[at..at + n] for n up to W. The rest of the vector is -1e30, so that it adds nothing to a softmax. */
INLINE vec some(int low, const void *z, size_t at, int n) {
    if (n >= W) return get(low, z, at);
    float x[W];
    for (int i = 0; i < W; i++) {
        x[i] = -1e30f;
        if (i < n) {
            uint32_t bits = low ? (uint32_t)((const bf16 *)z)[at + i] << 16 : 0;
            memcpy(x + i, low ? (const void *)&bits : (const void *)((const float *)z + at + i), sizeof bits);
        }
    }
    return load(x);
}

INLINE void put_some(int low, void *z, size_t at, int n, vec v) {
    if (n >= W) {
        put(low, z, at, v);
        return;
    }
    float x[2 * W] = {0};
    put(low, x, 0, v);
    memcpy(low ? (void *)((bf16 *)z + at) : (void *)((float *)z + at), x, n * (low ? sizeof(bf16) : sizeof(float)));
}

/* From logits z [rows][size] times `scale`: the log-probability of each row's target, the entropy, the probability of
   all others together. If `learning`, z becomes probabilities, that of the target 0. */
void grouprl_softmax(
    int low, int rows, int size, void *z, float scale, const int64_t *targets, int learning, float *logp,
    float *entropy, float *others
) {
#pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r++) {
        size_t at = (size_t)r * size;
        vec top = all(-1e30f);
        for (int i = 0; i < size; i += W) top = larger(top, some(low, z, at + i, size - i));
        float most = largest(top);
        double total = 0, product = 0;
        for (int b = 0; b < size; b += TERMS) {
            vec e_sum = all(0), xe_sum = all(0);
            for (int i = b; i < size && i < b + TERMS; i += W) {
                vec x = (some(low, z, at + i, size - i) - most) * scale, e = exponential(x);
                e_sum += e;
                xe_sum += x * e;
            }
            total += sum(e_sum);
            product += sum(xe_sum);
        }
        float target[W];
        store(target, (some(low, z, at + targets[r], 1) - most) * scale);
        logp[r] = (float)(target[0] - log(total));
        entropy[r] = (float)(log(total) - product / total);
        if (!learning) continue;
        float f = (float)(1 / total);
        double rest = 0; /* not total - target: near 1 that would lose everything */
        for (int b = 0; b < size; b += TERMS) {
            vec e_sum = all(0);
            for (int i = b; i < size && i < b + TERMS; i += W) {
                vec e = exponential((some(low, z, at + i, size - i) - most) * scale);
                int t = (int)(targets[r] - i);
                if (t >= 0 && t < W) e[t] = 0;
                e_sum += e;
                put_some(low, z, at + i, size - i, e * f);
            }
            rest += sum(e_sum);
        }
        others[r] = (float)(rest / total);
    }
}
