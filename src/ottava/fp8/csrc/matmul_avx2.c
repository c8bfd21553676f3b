/* The order `fma` in AVX2: each row of weights becomes FP32 in a buffer, then meets every row of x. */
#include "matmul.h"

#if OTTAVA_X86
#include <stdlib.h>
#include <string.h>

/* 8 codes. E4M3 << 7 is FP16 with 2^-8 of the value, subnormal codes included; the conversion is exact. */
AVX2 static __m256 decode8(const uint8_t *codes, __m256 power) {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)codes));
    const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xBF80));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), power);
}

AVX2 static __m256 widen8(const uint16_t *bf16) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)bf16)), 16));
}

AVX2 static __m256 read8(const struct product *p, size_t at, uint8_t scale) {
    if (!p->codes)
        return widen8(p->bf16 + at);
    return decode8(p->codes + at, _mm256_castsi256_ps(_mm256_set1_epi32((scale + 8) << 23)));
}

AVX2 static void decode_row(float *out, const struct product *p, size_t r) {
    const uint8_t *scales = p->codes ? p->scales + r / BLOCK * ((p->columns + BLOCK - 1) / BLOCK) : NULL;
    const size_t at = r * p->columns;
    size_t j = 0;
    for (; j + 8 <= p->columns; j += 8)
        _mm256_store_ps(out + j, read8(p, at + j, scales ? scales[j / BLOCK] : 0));
    if (j < p->columns) {
        uint8_t codes[8] = {0};
        uint16_t bf16[8] = {0};
        const struct product tail = {.codes = p->codes ? codes : NULL, .bf16 = bf16};
        if (p->codes)
            memcpy(codes, p->codes + at + j, p->columns - j);
        else
            memcpy(bf16, p->bf16 + at + j, (p->columns - j) * sizeof *bf16);
        _mm256_store_ps(out + j, read8(&tail, 0, scales ? scales[j / BLOCK] : 0));
        j += 8;
    }
    memset(out + j, 0, (p->padded - j) * sizeof *out);
}

AVX2 static float dot(const float *w, const float *x, size_t padded) {
    __m256 lane[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t j = 0; j < padded; j += 32)
        for (int i = 0; i < 4; i++)
            lane[i] = _mm256_fmadd_ps(_mm256_load_ps(w + j + 8 * i), _mm256_load_ps(x + j + 8 * i), lane[i]);
    /* Pairs first: s0 s1 s4 s5 | s2 s3 s6 s7 and the same of s8 to s15, hence the tree's next steps within halves. */
    __m256 sums = _mm256_add_ps(_mm256_hadd_ps(lane[0], lane[1]), _mm256_hadd_ps(lane[2], lane[3]));
    sums = _mm256_add_ps(sums, _mm256_permute_ps(sums, 0x4E));
    const __m128 two = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

AVX2 void fma_avx2(void *product, size_t first, size_t last) {
    const struct product *p = product;
    float *row = aligned_alloc(64, p->padded * sizeof *row);
    if (!row) {
        fma_portable(product, first, last);
        return;
    }
    for (size_t r = first * PANEL; r < last * PANEL && r < p->rows; r++) {
        decode_row(row, p, r);
        for (size_t b = 0; b < p->batch; b++)
            p->y[b * p->rows + r] = dot(row, (const float *)p->x + b * p->padded, p->padded);
    }
    free(row);
}
#endif
