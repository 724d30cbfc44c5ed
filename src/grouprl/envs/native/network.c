/* The network as one function, and its gradient as another: what stands in the place of layers in autograd's graph. */
#include "layers.h"

/* The part of `hidden` that belongs to rows from r on; it holds each layer's rows one after the other. */
static void places(const Work *w, size_t rows, size_t r, float *hidden, float **at) {
    for (int l = 0; l < w->last; l++) {
        at[l] = hidden + r * w->columns[l + 1];
        hidden += rows * w->columns[l + 1];
    }
}

/* out [rows][last width] of x [rows][first width]. hidden: room for what each layer but the last gives, one after the
   other, each [rows][width rounded up to 16]. 0, or 1 if there is no memory. */
int grouprl_mlp(const Mlp *net, size_t rows, const float *x, float *hidden, float *out) {
    Work w;
    float *at[DEEPEST];
    if (start_work(&w, net, 0)) return 1;
    int n = net->width[w.last + 1], columns = w.columns[w.last + 1];
    for (size_t r = 0; r < rows; r += ROWS) {
        int m = least(rows - r, ROWS);
        places(&w, rows, r, hidden, at);
        forwards(&w, m, x + r * net->width[0], at);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) out[(r + i) * n + j] = w.out[(size_t)i * columns + j];
    }
    stop_work(&w);
    return 0;
}

/* The gradient, from that of out: [out][in] and [out] of each layer, one after the other; and of x, unless dx is NULL.
   0, or 1 if there is no memory. */
int grouprl_mlp_gradient(
    const Mlp *net, size_t rows, const float *x, float *hidden, const float *dout, float *gradient, float *dx
) {
    Work w;
    float *at[DEEPEST];
    if (start_work(&w, net, 1)) return 1;
    int k = net->width[0], n = net->width[w.last + 1], padded = w.last ? n : w.columns[1];
    for (size_t r = 0; r < rows; r += ROWS) {
        int m = least(rows - r, ROWS);
        const float *g = dout + r * n;
        if (n < padded) { /* the first layer's are taken by whole vectors: w.out holds zeros beyond n */
            for (int i = 0; i < m; i++) memcpy(w.out + (size_t)i * padded, g + (size_t)i * n, n * sizeof(float));
            g = w.out;
        }
        places(&w, rows, r, hidden, at);
        backwards(&w, m, x + r * k, at, g, padded, dx ? dx + r * k : NULL);
    }
    gradients_of(&w, gradient);
    stop_work(&w);
    return 0;
}
