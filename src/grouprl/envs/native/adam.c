/* One step of Adam on n numbers: p -= rate * first / (sqrt(second) * scale + eps), after both moments moved towards g.
 */
#include <math.h>
#include <stddef.h>

void grouprl_adam(
    size_t n, float *restrict p, const float *restrict g, float *restrict first, float *restrict second, float beta1,
    float beta2, float rate, float scale, float eps
) {
    for (size_t i = 0; i < n; i++) {
        first[i] += (1.0f - beta1) * (g[i] - first[i]);
        second[i] = beta2 * second[i] + (1.0f - beta2) * g[i] * g[i];
        p[i] -= rate * first[i] / (sqrtf(second[i]) * scale + eps);
    }
}
