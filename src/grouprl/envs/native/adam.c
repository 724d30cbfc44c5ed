/* One step of Adam on the numbers of some tensors: p -= rate * first / (sqrt(second) * scale + eps), after both moments
 * moved towards g. The gradient and the moments of all tensors lie end to end.
 */
#include <math.h>
#include <stddef.h>

void grouprl_adam(
    size_t tensors, const size_t *sizes, float *const *places, const float *restrict g, float *restrict first,
    float *restrict second, float beta1, float beta2, float rate, float scale, float eps
) {
    for (size_t t = 0; t < tensors; t++) {
        float *restrict p = places[t];
        for (size_t i = 0; i < sizes[t]; i++) {
            first[i] += (1.0f - beta1) * (g[i] - first[i]);
            second[i] = beta2 * second[i] + (1.0f - beta2) * g[i] * g[i];
            p[i] -= rate * first[i] / (sqrtf(second[i]) * scale + eps);
        }
        g += sizes[t], first += sizes[t], second += sizes[t];
    }
}
