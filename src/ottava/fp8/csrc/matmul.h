/* Matrix products with FP8 weights: what the kernels of matmul*.c share.
 *
 * y[b][r] is the sum over j of x[b][j] * w[r][j]. Three orders of summation exist; an order gives the same bits at
 * every batch size, on any number of threads and on every instruction set that has it:
 *
 *   fma  x in FP32 (BF16 is widened). Columns are padded with zeros to a multiple of 64. Lane l of 32 takes the
 *        columns j = l (mod 32) in rising order, lane = fma(w, x, lane) from +0. Then s[i] = lane[2i] + lane[2i+1]
 *        for 16 sums, and s[i] += s[i + h] for h = 8, 4, 2, 1.
 *   dot  x in BF16; the instruction vdpbf16ps. In each 64 columns lane (c, i), c < 2, i < 16, takes the pair at
 *        32c + 2i: lane += w1 * x1, then lane += w0 * x0, each rounded once, subnormal numbers flushed to zero. Then
 *        s[i] = lane[0][i] + lane[1][i], and the same tree.
 *   amx  x in BF16; the instruction tdpbf16ps. In each 32 columns the 16 even products are summed in rising order
 *        from 0, so are the odd ones, and y += even + odd; subnormal numbers are flushed to zero.
 *
 * Weights are E4M3 codes with E8M0 scales or plain BF16. Codes are turned into the BF16 numbers that they stand for
 * (the power of two goes into the exponent) before anything is computed, so both kinds give the same bits. Scale
 * bytes must lie in [10, 246], where those numbers are normal or zero, and no code may be NaN. */
#ifndef OTTAVA_MATMUL_H
#define OTTAVA_MATMUL_H

#include "kernels.h"

enum order { ORDER_FMA = 0, ORDER_DOT = 1, ORDER_AMX = 2 };
enum { BLOCK = 128, STEP = 64, PANEL = 32 }; /* a scale's columns; columns that x is padded to; rows a thread takes */

struct product {
    const uint8_t *codes;  /* E4M3 [rows, columns], or NULL */
    const uint16_t *bf16;  /* BF16 [rows, columns], where codes is NULL */
    const uint8_t *scales; /* E8M0 [ceil(rows / 128), ceil(columns / 128)] */
    const void *x;         /* packed as the kernel wants it */
    float *y;              /* [batch, rows] */
    size_t batch, rows, columns, padded;
};

/* BF16 patterns of the codes 0 to 7, which are subnormal in E4M3, at scale 1. */
extern const uint16_t subnormal_codes[32];

/* Bodies for parallel_for, over panels of PANEL rows. */
void fma_portable(void *product, size_t first, size_t last);
#if OTTAVA_X86
#define AVX512_BF16                                                                                                  \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,bmi,bmi2")))
#define CORE static inline __attribute__((always_inline))

void fma_avx2(void *product, size_t first, size_t last);
void fma_avx512(void *product, size_t first, size_t last);
void dot_avx512(void *product, size_t first, size_t last);
void sum_amx(void *product, size_t first, size_t last);
int amx_granted(void);

/* What a scale adds to the BF16 patterns of its block: to normal codes, and as the table of subnormal ones. */
struct fold {
    __m512i normal, subnormal;
};

CORE AVX512 struct fold fold_of(uint8_t scale) {
    const __m512i table = _mm512_loadu_si512(subnormal_codes);
    const __m512i power = _mm512_set1_epi16((short)((scale - 127) * 128));
    return (struct fold){_mm512_add_epi16(power, _mm512_set1_epi16(120 * 128)),
                         _mm512_mask_add_epi16(table, 0xFE, table, power)};
}

/* 32 codes as BF16, none of them subnormal. */
CORE AVX512 __m512i decode_normal(__m256i codes, struct fold fold) {
    const __m512i shifted = _mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 4);
    return _mm512_add_epi16(_mm512_and_si512(shifted, _mm512_set1_epi16((short)0x87F0)), fold.normal);
}

/* 32 codes as BF16. */
CORE AVX512 __m512i decode(__m256i codes, struct fold fold) {
    const __m512i wide = _mm512_cvtepi8_epi16(codes);
    __m512i out = _mm512_and_si512(_mm512_slli_epi16(wide, 4), _mm512_set1_epi16(0x07F0));
    out = _mm512_add_epi16(out, fold.normal);
    out = _mm512_mask_permutexvar_epi16(out, _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(0x78)), wide,
                                        fold.subnormal);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(-0x8000), wide, out, 0xCA); /* the sign from wide */
}
#endif
#endif
