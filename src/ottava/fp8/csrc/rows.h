/* What a decoder computes for rows of tokens: products, norms, attention; what the kernels of rows*.c share.
 *
 * A row's result depends on that row, the weights and its own cache alone: not on the other rows, the threads or the
 * instruction set. Every version gives the same bits; all sums are float32, in these orders:
 *
 *   product    the output's sum from +0 takes the columns in pairs: fma(w[j+1], x[j+1], sum), then fma(w[j], x[j], sum),
 *              each rounded once, subnormal numbers (of w, x and the sum) flushed to zero. That is what the instruction
 *              vdpbf16ps does, with 16 outputs side by side.
 *   norm, score, softmax's sum   lane l of 16 takes the columns (or keys) j = l (mod 16) in rising order, by fma; then
 *              s[i] += s[i + h] for h = 8, 4, 2, 1.
 *   value      the keys in rising order, by fma, then times 1 / softmax's sum.
 *
 * Weights of a product lie in groups of GROUP_OF outputs, each in blocks of BLOCK columns (the last may be shorter) as
 * [4 panels][pairs of columns][16 outputs][2]; outputs are padded with zeros, the number of columns is even. They are
 * E4M3 codes with a scale byte for each group and block, or BF16, with the same limits as in matmul.h.
 * Activations are BF16 or float32 (`wide`). */
#ifndef OTTAVA_ROWS_H
#define OTTAVA_ROWS_H

#include "matmul.h"

enum { GROUP_OF = 64, PANELS = 4 }; /* outputs of a group; panels of 16 in it */

struct panels {
    const uint8_t *codes, *scales; /* NULL where the weights are BF16 */
    const uint16_t *bf16;
    const void *x;
    float *y;
    size_t x_row, y_row, rows, outputs, columns; /* x_row, y_row: elements from one row to the next */
    int wide;
};

/* x += add (unless NULL), then out = x / rms(x) * weight, for each head of `width` columns of each row. */
struct norm {
    float *x;
    const float *add, *weight;
    void *out;
    size_t x_row, add_row, out_row, heads, width;
    int wide; /* of out */
    float epsilon;
};

/* out = silu(x[:width]) * x[width:] */
struct silu {
    const float *x;
    void *out;
    size_t x_row, out_row, width;
    int wide;
};

/* Each row's queries over the first `counts[row]` positions of its cache, which is pieces of [lengths[row], size] numbers:
 * head h has its keys in piece h, its values in piece `values + h`. `group` queries share a head. */
struct attention {
    const float *q;
    void *out;
    const size_t *caches, *lengths, *counts;
    size_t q_row, out_row, heads, group, width, value_width, values, size;
    int wide; /* of out and cache */
    float scale;
};

struct row_kernels { /* bodies for parallel_for: over groups, rows, rows, rows * heads; sigmoid in place */
    parallel_body product, norm, silu, attention;
    void (*sigmoid)(float *x, size_t count);
};

extern const struct row_kernels rows_portable, rows_avx2, rows_avx512, rows_avx512_bf16;

#endif
