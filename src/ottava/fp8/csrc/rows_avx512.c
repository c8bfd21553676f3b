/* The kernels of rows.h in AVX-512; products of BF16 activations in AVX-512 BF16 where that is there. */
#include "rows.h"

#if OTTAVA_X86
#define FN CORE AVX512
enum { AHEAD = 16384 }; /* bytes of weights fetched before they are needed */
#define BODY static AVX512
#define ROWS 4

typedef __m512 lanes;

FN lanes zero_(void) { return _mm512_setzero_ps(); }
FN lanes set_(float x) { return _mm512_set1_ps(x); }
FN lanes load_(const float *x) { return _mm512_loadu_ps(x); }
FN void store_(float *out, lanes x) { _mm512_storeu_ps(out, x); }
FN lanes add_(lanes a, lanes b) { return _mm512_add_ps(a, b); }
FN lanes sub_(lanes a, lanes b) { return _mm512_sub_ps(a, b); }
FN lanes mul_(lanes a, lanes b) { return _mm512_mul_ps(a, b); }
FN lanes div_(lanes a, lanes b) { return _mm512_div_ps(a, b); }
FN lanes max_(lanes a, lanes b) { return _mm512_max_ps(a, b); }
FN lanes min_(lanes a, lanes b) { return _mm512_min_ps(a, b); }
FN lanes fma_(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
#define times_ fma_

FN lanes widen_(const uint16_t *x) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

FN lanes even_(const uint16_t *w) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(w), 16)); }

FN lanes odd_(const uint16_t *w) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(w), _mm512_set1_epi32(-0x10000)));
}

FN void narrow_(uint16_t *out, lanes x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), tie);
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}

FN lanes raise_(lanes x, lanes power) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(power), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), exponent));
}

FN float sum_(lanes s) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* The halves of x and of y are added, and lie in the halves of the result. */
FN lanes halves(lanes x, lanes y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
}

FN lanes quarters(lanes x, lanes y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
}

FN lanes each_sum_(const lanes *x) {
    lanes four[4], two[2];
    for (int i = 0; i < 4; i++)
        four[i] = quarters(halves(x[i], x[i + 4]), halves(x[i + 8], x[i + 12]));
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_add_ps(_mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0x44),
                               _mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0xEE));
    return _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xDD));
}

FN float largest_(lanes s) { return _mm512_reduce_max_ps(s); }

FN unsigned flushing(void) {
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040); /* results and operands that are subnormal count as zero */
    return mode;
}

FN void restored(unsigned mode) { _mm_setcsr(mode); }

/* count is a multiple of 64. Two codes in three vectors of a hundred are subnormal, so that is looked for first. */
FN void decode_all(uint16_t *out, const uint8_t *codes, size_t count, uint8_t scale) {
    const struct fold fold = fold_of(scale);
    for (size_t j = 0; j < count; j += 64) {
        const __m512i all = _mm512_loadu_si512(codes + j);
        _mm_prefetch((const char *)codes + j + AHEAD, _MM_HINT_T0);
        const __m256i low = _mm512_castsi512_si256(all), high = _mm512_extracti64x4_epi64(all, 1);
        if (!_mm512_testn_epi8_mask(all, _mm512_set1_epi8(0x78))) {
            _mm512_store_si512(out + j, decode_normal(low, fold));
            _mm512_store_si512(out + j + 32, decode_normal(high, fold));
        } else {
            _mm512_store_si512(out + j, decode(low, fold));
            _mm512_store_si512(out + j + 32, decode(high, fold));
        }
    }
}

#include "rows_simd.h"

enum { DOT_ROWS = 6 };

CORE AVX512_BF16 void dot_tile(const struct strip *s, size_t b, const int rows) {
    const uint16_t *x = (const uint16_t *)s->x + b * s->x_row;
    float *y = s->y + b * s->y_row;
    __m512 sum[DOT_ROWS][PANELS];
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < PANELS; c++)
            sum[i][c] = s->first ? _mm512_setzero_ps() : _mm512_loadu_ps(y + (size_t)i * s->y_row + 16 * c);
    for (size_t j = 0; j < s->pairs; j++) {
        __m512bh w[PANELS];
        for (int c = 0; c < PANELS; c++)
            w[c] = (__m512bh)_mm512_loadu_si512(s->w + ((size_t)c * s->pairs + j) * 32);
        for (int i = 0; i < rows; i++) {
            int pair;
            memcpy(&pair, x + (size_t)i * s->x_row + 2 * j, sizeof pair);
            for (int c = 0; c < PANELS; c++)
                sum[i][c] = _mm512_dpbf16_ps(sum[i][c], w[c], (__m512bh)_mm512_set1_epi32(pair));
        }
    }
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < PANELS; c++)
            _mm512_storeu_ps(y + (size_t)i * s->y_row + 16 * c, sum[i][c]);
}

AVX512_BF16 static void dot_strip(const struct strip *s, size_t rows, int wide) {
    (void)wide;
    for (size_t b = 0; b < rows; b += DOT_ROWS)
        switch (rows - b) {
        case 1: dot_tile(s, b, 1); break;
        case 2: dot_tile(s, b, 2); break;
        case 3: dot_tile(s, b, 3); break;
        case 4: dot_tile(s, b, 4); break;
        case 5: dot_tile(s, b, 5); break;
        default: dot_tile(s, b, DOT_ROWS);
        }
}

AVX512_BF16 static void dot_product(void *context, size_t first, size_t last) {
    const struct panels *p = context;
    if (p->wide)
        product(context, first, last);
    else
        groups(p, first, last, dot_strip);
}

const struct row_kernels rows_avx512 = {product, norm, silu, attention, sigmoid};
const struct row_kernels rows_avx512_bf16 = {dot_product, norm, silu, attention, sigmoid};
#endif
