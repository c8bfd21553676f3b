/* The orders `fma` and `dot` in AVX-512.
 *
 * Up to four rows of x meet a row of weights as it is decoded, in registers. More rows of x meet two rows of weights
 * that were decoded into a buffer first, four at a time. */
#include "matmul.h"

#if OTTAVA_X86
#include <stdlib.h>
#include <string.h>

enum { AHEAD = 8192, GROUP = 4 }; /* bytes of weights fetched before they are needed; rows of x at once */

/* A row of weights: codes with the scales of its blocks, or BF16. */
struct line {
    const uint8_t *codes, *scales;
    const uint16_t *bf16;
};

static struct line line_of(const struct product *p, size_t r) {
    const size_t across = (p->columns + BLOCK - 1) / BLOCK;
    if (p->codes)
        return (struct line){p->codes + r * p->columns, p->scales + r / BLOCK * across, NULL};
    return (struct line){NULL, NULL, p->bf16 + r * p->columns};
}

/* 32 weights from column j as BF16; where `whole` is false, those from `columns` on are 0. normal: none of the codes is
 * subnormal. */
CORE AVX512 __m512i fetch(const struct line *w, size_t j, size_t columns, int fp8, int whole, struct fold fold,
                          int normal) {
    __mmask32 mask = 0xFFFFFFFF;
    if (!whole)
        mask = j >= columns ? 0 : columns - j < 32 ? (1u << (columns - j)) - 1 : mask;
    if (fp8) {
        const __m256i *codes = (const __m256i *)(w->codes + j);
        if (normal)
            return decode_normal(_mm256_loadu_si256(codes), fold);
        return decode(whole ? _mm256_loadu_si256(codes) : _mm256_maskz_loadu_epi8(mask, codes), fold);
    }
    return whole ? _mm512_loadu_si512(w->bf16 + j) : _mm512_maskz_loadu_epi16(mask, w->bf16 + j);
}

/* Of 64 codes. Weights that are roughly normal have few subnormal codes: about one vector in a hundred holds one. */
CORE AVX512 int all_normal(const uint8_t *codes) {
    return !_mm512_testn_epi8_mask(_mm512_loadu_si512(codes), _mm512_set1_epi8(0x78));
}

CORE AVX512 float sum_tree(__m512 s) {
    const __m256 high = _mm512_extractf32x8_ps(s, 1);
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(s), high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* The body of a step of 64 columns, and the loop over steps, once for each order: an intrinsic can be used only in a
 * function that has its target. even/odd are the two halves of the lanes: columns of that parity (fma), or the first
 * and second 32 columns (dot). */
#define KERNEL(NAME, TARGET, VALUE, TIMES)                                                                           \
    CORE TARGET void NAME##_step(__m512 (*even)[GROUP], __m512 (*odd)[GROUP], const struct line *w, const int lines,  \
                                 const VALUE *x, const int count, const struct product *p, size_t j, const int fp8,   \
                                 const int whole, const struct fold *fold) {                                          \
        for (int l = 0; l < lines; l++) {                                                                             \
            const int normal = fp8 && whole && all_normal(w[l].codes + j);                                            \
            const __m512i first = fetch(w + l, j, p->columns, fp8, whole, *fold, normal);                             \
            const __m512i second = fetch(w + l, j + 32, p->columns, fp8, whole, *fold, normal);                       \
            for (int i = 0; i < count; i++)                                                                           \
                TIMES(even[l][i], odd[l][i], first, second, x + i * p->padded + j);                                   \
        }                                                                                                             \
    }                                                                                                                 \
    CORE TARGET void NAME##_tile(const struct product *p, const struct line *w, const size_t *r, const int lines,     \
                                 size_t b, const int count, const int fp8) {                                          \
        const VALUE *x = (const VALUE *)p->x + b * p->padded;                                                         \
        __m512 even[2][GROUP], odd[2][GROUP];                                                                         \
        for (int l = 0; l < lines; l++)                                                                               \
            for (int i = 0; i < count; i++)                                                                           \
                even[l][i] = odd[l][i] = _mm512_setzero_ps();                                                         \
        struct fold fold = {0};                                                                                       \
        size_t j = 0;                                                                                                 \
        for (; j + STEP <= p->columns; j += STEP) {                                                                   \
            if (fp8 && j % BLOCK == 0)                                                                                \
                fold = fold_of(w->scales[j / BLOCK]);                                                                 \
            if (fp8)                                                                                                  \
                _mm_prefetch((const char *)(w->codes + j) + AHEAD, _MM_HINT_T1);                                      \
            NAME##_step(even, odd, w, lines, x, count, p, j, fp8, 1, &fold);                                          \
        }                                                                                                             \
        if (fp8 && j < p->columns && j % BLOCK == 0)                                                                  \
            fold = fold_of(w->scales[j / BLOCK]);                                                                     \
        if (j < p->columns)                                                                                           \
            NAME##_step(even, odd, w, lines, x, count, p, j, fp8, 0, &fold);                                          \
        for (int l = 0; l < lines; l++)                                                                               \
            for (int i = 0; i < count; i++)                                                                           \
                p->y[(b + (size_t)i) * p->rows + r[l]] = sum_tree(_mm512_add_ps(even[l][i], odd[l][i]));              \
    }                                                                                                                 \
    CORE TARGET void NAME##_tiles(const struct product *p, const struct line *w, const size_t *r, const int lines,    \
                                  size_t b, const int fp8) {                                                          \
        switch (p->batch - b) {                                                                                       \
        case 1: NAME##_tile(p, w, r, lines, b, 1, fp8); break;                                                        \
        case 2: NAME##_tile(p, w, r, lines, b, 2, fp8); break;                                                        \
        case 3: NAME##_tile(p, w, r, lines, b, 3, fp8); break;                                                        \
        default: NAME##_tile(p, w, r, lines, b, GROUP, fp8);                                                          \
        }                                                                                                             \
    }                                                                                                                 \
    TARGET void NAME##_avx512(void *product, size_t first, size_t last) {                                             \
        const struct product *p = product;                                                                            \
        const size_t end = last * PANEL < p->rows ? last * PANEL : p->rows;                                           \
        uint16_t *buffer = p->batch > GROUP ? aligned_alloc(64, 2 * p->padded * sizeof *buffer) : NULL;               \
        for (size_t r = first * PANEL; r < end; r += buffer ? 2 : 1) {                                                \
            const size_t at[2] = {r, r + 1 < end ? r + 1 : r};                                                        \
            struct line w[2] = {line_of(p, at[0]), line_of(p, at[1])};                                                \
            if (buffer) {                                                                                             \
                decode_line(buffer, w, p);                                                                            \
                decode_line(buffer + p->padded, w + 1, p);                                                            \
                w[0] = (struct line){NULL, NULL, buffer}, w[1] = (struct line){NULL, NULL, buffer + p->padded};       \
            }                                                                                                         \
            for (size_t b = 0; b < p->batch; b += GROUP) {                                                            \
                if (buffer)                                                                                           \
                    NAME##_tiles(p, w, at, 2, b, 0);                                                                  \
                else if (w->codes)                                                                                    \
                    NAME##_tiles(p, w, at, 1, b, 1);                                                                  \
                else                                                                                                  \
                    NAME##_tiles(p, w, at, 1, b, 0);                                                                  \
            }                                                                                                         \
        }                                                                                                             \
        free(buffer);                                                                                                 \
    }

AVX512 static void decode_line(uint16_t *out, const struct line *w, const struct product *p) {
    for (size_t j = 0; j < p->padded; j += 32) {
        __m512i bits;
        if (w->codes)
            bits = fetch(w, j, p->columns, 1, 0, fold_of(j < p->columns ? w->scales[j / BLOCK] : 127), 0);
        else
            bits = fetch(w, j, p->columns, 0, 0, (struct fold){0}, 0);
        _mm512_store_si512(out + j, bits);
    }
}

CORE AVX512 void fma_half(__m512 *even, __m512 *odd, __m512i w, const float *x) {
    const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(-0x10000)));
    *even = _mm512_fmadd_ps(low, _mm512_load_ps(x), *even);
    *odd = _mm512_fmadd_ps(high, _mm512_load_ps(x + 16), *odd);
}

#define FMA(EVEN, ODD, FIRST, SECOND, X)                                                                             \
    fma_half(&EVEN, &ODD, FIRST, X), fma_half(&EVEN, &ODD, SECOND, (X) + 32)
#define DOT(EVEN, ODD, FIRST, SECOND, X)                                                                             \
    EVEN = _mm512_dpbf16_ps(EVEN, (__m512bh)FIRST, (__m512bh)_mm512_load_si512(X)),                                   \
    ODD = _mm512_dpbf16_ps(ODD, (__m512bh)SECOND, (__m512bh)_mm512_load_si512((X) + 32))

KERNEL(fma, AVX512, float, FMA)
KERNEL(dot, AVX512_BF16, uint16_t, DOT)
#endif
