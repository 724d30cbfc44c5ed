/* The gradient of a minibatch's loss in one pass: network, distribution of actions, surrogate, and back again, a few
   rows at a time; where the network is the user's, only from its outputs to the loss. The formulas are those of
   grouprl.objective.loss.policy_loss and grouprl.envs.distributions; tests hold the two to each other. */
#include "layers.h"

enum { CLIP, DUAL_CLIP, SPO };
enum { LARGEST_LOG_RATIO = 20 };

typedef struct {
    int32_t surrogate, gaussian; /* else categorical */
    float low, high, dual;       /* the clip range is 1 - low .. 1 + high; bound of the dual clip */
    float entropy;               /* weight of the bonus */
    const float *log_std;        /* [actions] of the normal distributions */
} Objective;

/* The loss of a step and its derivative by the log-probability. */
static float surrogate(const Objective *o, float logp, float old, float a, float *slope) {
    float difference = logp - old, rho = expf(difference > LARGEST_LOG_RATIO ? LARGEST_LOG_RATIO : difference);
    if (o->surrogate == SPO) {
        float steep = fabsf(a) / o->low;
        *slope = -rho * (a - steep * (rho - 1.0f));
        return -(rho * a - 0.5f * steep * (rho - 1.0f) * (rho - 1.0f));
    }
    float bounded = rho < 1.0f - o->low ? 1.0f - o->low : rho > 1.0f + o->high ? 1.0f + o->high : rho;
    float loss = -(rho * a);
    *slope = loss;
    if (bounded * a < rho * a) loss = -(bounded * a), *slope = 0.0f;
    if (o->surrogate == DUAL_CLIP && a < 0.0f && -o->dual * a < loss) loss = -o->dual * a, *slope = 0.0f;
    return loss;
}

/* Log-probabilities of `action` under logits z [m][ld]; z becomes probabilities. */
static void categorical(int m, int n, float *z, int ld, const int64_t *action, float *logp) {
    for (int i = 0; i < m; i++) {
        float *row = z + (size_t)i * ld, most = row[0], total = 0.0f, chosen = row[action[i]];
        for (int j = 1; j < n; j++) most = row[j] > most ? row[j] : most;
        for (int j = 0; j < n; j++) total += row[j] = expf(row[j] - most);
        for (int j = 0; j < n; j++) row[j] /= total;
        logp[i] = chosen - most - logf(total);
    }
}

typedef struct {
    const float *x, *old, *advantages; /* x is not looked at where outputs are given */
    const void *actions;               /* int64 [S], or float [S][actions] */
    const int64_t *index;
} Batch;

/* Sums over steps, and what normal distributions have in common. */
typedef struct {
    double loss, entropy, *d_log_std;
    float *inverse, constant, spread; /* 1 / standard deviations; what log-probability and entropy begin with */
} Sums;

/* 0, or 1 if there is no memory; n actions. */
static int start_sums(Sums *s, const Objective *o, int n) {
    *s = (Sums){.d_log_std = calloc(n, sizeof(double)), .inverse = malloc(n * sizeof(float))};
    if (!s->d_log_std || !s->inverse) return 1;
    for (int j = 0; j < n && o->gaussian; j++) {
        s->inverse[j] = expf(-o->log_std[j]);
        s->constant -= o->log_std[j] + 0.91893853f; /* log(2 pi) / 2 */
        s->spread += o->log_std[j] + 1.41893853f;   /* the entropy of a normal distribution */
    }
    return 0;
}

static void stop_sums(Sums *s) { free(s->d_log_std), free(s->inverse); }

/* Of m <= ROWS steps: z [m][ld], what the network gave, becomes the gradient of share * (surrogate - entropy bonus). */
static void differentiate(
    const Objective *o, const Batch *b, Sums *s, int m, int n, const int64_t *index, float share, float *z, int ld
) {
    float logp[ROWS];
    int64_t chosen[ROWS];
    if (o->gaussian) {
        for (int i = 0; i < m; i++) {
            const float *action = (const float *)b->actions + index[i] * n;
            float *row = z + (size_t)i * ld, square = 0.0f;
            for (int j = 0; j < n; j++) {
                row[j] = (action[j] - row[j]) * s->inverse[j];
                square += row[j] * row[j];
            }
            logp[i] = s->constant - 0.5f * square;
        }
    } else {
        for (int i = 0; i < m; i++) chosen[i] = ((const int64_t *)b->actions)[index[i]];
        categorical(m, n, z, ld, chosen, logp);
    }
    for (int i = 0; i < m; i++) {
        float slope, *row = z + (size_t)i * ld;
        s->loss += surrogate(o, logp[i], b->old[index[i]], b->advantages[index[i]], &slope);
        slope *= share;
        if (o->gaussian) {
            for (int j = 0; j < n; j++) {
                s->d_log_std[j] += slope * (row[j] * row[j] - 1.0f) - o->entropy * share;
                row[j] *= slope * s->inverse[j];
            }
            s->entropy += s->spread;
            continue;
        }
        float h = 0.0f;
        if (o->entropy > 0.0f)
            for (int j = 0; j < n; j++)
                if (row[j] > 0.0f) h -= row[j] * logf(row[j]);
        s->entropy += h;
        for (int j = 0; j < n; j++) {
            float p = row[j], bonus = o->entropy > 0.0f && p > 0.0f ? o->entropy * share * p * (logf(p) + h) : 0.0f;
            row[j] = slope * ((j == chosen[i]) - p) + bonus;
        }
    }
}

/* The gradient of (sum over the indexed steps of surrogate - entropy bonus) / denominator by log_std, where there is
   one, and all weights and biases; sums gets that of the surrogate and that of the entropies, each over denominator. 0,
   or 1 if there is no memory. */
int grouprl_objective(
    const Mlp *net, const Objective *o, const Batch *b, size_t rows, double denominator, float *gradient, double *sums
) {
    Work w;
    if (start_work(&w, net, 1)) return 1;
    int k = net->width[0], n = net->width[w.last + 1], ld = w.columns[w.last + 1];
    size_t size = (size_t)ROWS * k;
    for (int l = 0; l < w.last; l++) size += (size_t)ROWS * w.columns[l + 1];
    float *room, *hidden[DEEPEST] = {0};
    Sums s;
    int failed = start_sums(&s, o, n);
    if (posix_memalign((void **)&room, 64, size * sizeof(float))) failed = 1, room = NULL;
    float *x = room;
    for (int l = 0; l < w.last && !failed; l++) hidden[l] = x, x += (size_t)ROWS * w.columns[l + 1];
    for (size_t r = 0; r < rows && !failed; r += ROWS) {
        int m = least(rows - r, ROWS);
        const int64_t *index = b->index + r;
        for (int i = 0; i < m; i++) memcpy(x + (size_t)i * k, b->x + index[i] * k, k * sizeof(float));
        forwards(&w, m, x, hidden);
        differentiate(o, b, &s, m, n, index, (float)(1.0 / denominator), w.out, ld);
        backwards(&w, m, x, hidden, w.out, ld, NULL);
    }
    if (!failed) {
        for (int j = 0; j < n && o->gaussian; j++) *gradient++ = (float)s.d_log_std[j];
        gradients_of(&w, gradient);
        sums[0] = s.loss / denominator, sums[1] = s.entropy / denominator;
    }
    free(room);
    stop_sums(&s);
    stop_work(&w);
    return failed;
}

/* The same behind any network: z [rows][n] of the indexed steps becomes the gradient by z, d_log_std [n] that by the
   logarithms of the standard deviations, where there are such. */
int grouprl_objective_of(
    const Objective *o, const Batch *b, size_t rows, int n, double denominator, float *z, float *d_log_std, double *sums
) {
    Sums s;
    int failed = start_sums(&s, o, n);
    for (size_t r = 0; r < rows && !failed; r += ROWS)
        differentiate(o, b, &s, least(rows - r, ROWS), n, b->index + r, (float)(1.0 / denominator), z + r * n, n);
    for (int j = 0; j < n && o->gaussian && !failed; j++) d_log_std[j] = (float)s.d_log_std[j];
    sums[0] = s.loss / denominator, sums[1] = s.entropy / denominator;
    stop_sums(&s);
    return failed;
}
