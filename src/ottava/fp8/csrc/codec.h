/* The codec's inner functions, one set for each instruction set; codec.c chooses and cuts the work up.
 *
 * Codes, values, scales and counts are made by integer work on bit patterns: no rounding mode and no flushing of
 * subnormals changes them. The sums of squares in `measure` alone are float32 arithmetic, which both can change. A
 * scale is given as its E8M0 byte k. `type` is how values are stored; amax returns the bits of a float32. */
#ifndef OTTAVA_CODEC_H
#define OTTAVA_CODEC_H

#include "kernels.h"

enum type { BF16 = 0, F16 = 1, F32 = 2 };

#define BLOCK 128
#define LANES 32 /* columns side by side in sums of squares: reference.LANES */
#define STREAM_FROM ((size_t)8 << 20) /* bytes written from which they pass the caches */
#define INFINITY_BITS 0x7F800000u
#define BYTE_MIN 10 /* spec.BYTE_MIN: from here on every value is zero or a normal number, in BF16 and F32 */
#define BYTE_MAX 246
#define BYTE_ZERO 127

static inline size_t width(int type) { return type == F32 ? 4 : 2; }

/* A block of rows x columns that share scale k; for dequantise one row, with a scale for each `part` columns. Strides
 * are in bytes. */
struct tile {
    const char *w, *next; /* values; where the next tile's values begin, to be fetched in time, or NULL */
    uint8_t *codes;
    const uint8_t *scales;
    char *out;
    size_t w_row, codes_row, out_row, rows, columns, part;
    int k, type, stream; /* stream: write past the caches; then rows are whole, aligned cache lines */
};

/* changed, signal, noise of one block */
typedef double sums[3];

struct codec {
    uint32_t (*amax)(const struct tile *tile);
    void (*quantise)(const struct tile *tile);   /* w to codes */
    void (*dequantise)(const struct tile *tile); /* codes to out */
    void (*project)(const struct tile *tile);    /* w to out */
    void (*measure)(const struct tile *tile, sums out); /* w against codes; BF16 values to out unless NULL */
};

extern const struct codec codec_portable, codec_avx2, codec_avx512;

/* Shared by all levels: the largest magnitude's bits in type to those of a float32; one element at a time. */
uint32_t widen(uint32_t bits, int type);

/* Also shared: 1 / scale, and the end of a block's sums, taken in units of its scale in float32. */
float unit_of(int k);
void fold(float lanes[2][LANES], long changed, int k, sums out);

#endif
