/* Lays out weights, and multiplies many rows by them. */
#include "linear.h"

#include <omp.h>

void grouprl_pack(const void *w, int is_bf16, int low, int out, int k, void *packed, int first, int stride) {
    pack_weight(w, is_bf16, low, out, k, packed, first, stride);
}

void grouprl_pack_turned(const void *w, int is_bf16, int n, int columns, int at, int places, bf16 *packed) {
    pack_turned(w, is_bf16, n, columns, at, places, packed);
}

/* Whether bfloat16 products use the bfloat16 vector instructions of the processor, and not its matrix unit. */
int grouprl_vectors(void) {
#if defined(__AVX512BF16__) && !defined(GROUPRL_TILES)
    return 1;
#else
    return 0;
#endif
}

/* y [rows, out] = x [rows, k] W^T + b; x is bfloat16 if x_low, y if y_low; their rows lie so many elements apart. What
   else than STORE becomes of it: ADD adds it to y (float32); GATE takes W for gate's and up's, and
   y [rows, out / 2] = silu(gate) * up. 0, or 1 if there is no memory. */
int grouprl_linear(
    int low, int rows, const void *x, int x_low, int x_apart, const Linear *l, void *y, int y_low, int y_apart, int what
) {
    enum { STORE, ADD, GATE };
    int k = l->k, there = x_low == low && x_apart == k ? rows / GROUP * GROUP : 0; /* rows to be read where they are */
    size_t n = (size_t)(rows - there) * k;
    void *made = room_for_rows(low, rows - there, k);
    if (!made) return 1;
    Output o = {y, what == GATE ? l->out / 2 : l->out, y_low, y_apart}, rest = o;
    rest.y = (void *)element(y_low, y, (size_t)there * y_apart);
    Use use = what == ADD ? use_residual : what == GATE ? use_gate : use_output;
#pragma omp parallel
    {
        int me = omp_get_thread_num(), threads = omp_get_num_threads();
#pragma omp for schedule(static)
        for (size_t i = 0; i < n; i += W) put(low, made, i, get(x_low, x, (there + i / k) * x_apart + i % k));
        start_products();
        product(low, there, x, l, me, threads, use, &o);
        product(low, rows - there, made, l, me, threads, use, &rest);
        stop_products();
    }
    free(made);
    return 0;
}
