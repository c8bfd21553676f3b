/* The kernels of rows.h in AVX2: 16 lanes are two registers. */
#include "rows.h"

#if OTTAVA_X86
#define FN CORE AVX2
#define BODY static AVX2
#define ROWS 1

typedef struct {
    __m256 a, b;
} lanes;

FN lanes zero_(void) { return (lanes){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FN lanes set_(float x) { return (lanes){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FN lanes load_(const float *x) { return (lanes){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
FN void store_(float *out, lanes x) { _mm256_storeu_ps(out, x.a), _mm256_storeu_ps(out + 8, x.b); }
#define EACH(name, op) \
    FN lanes name(lanes x, lanes y) { return (lanes){op(x.a, y.a), op(x.b, y.b)}; }
EACH(add_, _mm256_add_ps)
EACH(sub_, _mm256_sub_ps)
EACH(mul_, _mm256_mul_ps)
EACH(div_, _mm256_div_ps)
EACH(max_, _mm256_max_ps)
EACH(min_, _mm256_min_ps)
FN lanes fma_(lanes x, lanes y, lanes z) {
    return (lanes){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
#define times_ fma_

FN __m256 widen8(const uint16_t *x) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FN lanes widen_(const uint16_t *x) { return (lanes){widen8(x), widen8(x + 8)}; }

FN __m256 even8(const uint16_t *w) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)w), 16));
}
FN __m256 odd8(const uint16_t *w) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)w);
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
}
FN lanes even_(const uint16_t *w) { return (lanes){even8(w), even8(w + 16)}; }
FN lanes odd_(const uint16_t *w) { return (lanes){odd8(w), odd8(w + 16)}; }

FN __m256i narrow8(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
    const __m256i tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), tie), 16);
}
FN void narrow_(uint16_t *out, lanes x) {
    const __m256i mixed = _mm256_packus_epi32(narrow8(x.a), narrow8(x.b));
    _mm256_storeu_si256((__m256i *)out, _mm256_permute4x64_epi64(mixed, 0xD8));
}

FN __m256 raise8(__m256 x, __m256 power) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(power), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
}
FN lanes raise_(lanes x, lanes power) { return (lanes){raise8(x.a, power.a), raise8(x.b, power.b)}; }

FN float sum_(lanes s) {
    const __m256 eight = _mm256_add_ps(s.a, s.b);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

FN lanes each_sum_(const lanes *x) {
    float sums[16];
    for (int i = 0; i < 16; i++)
        sums[i] = sum_(x[i]);
    return load_(sums);
}

FN float largest_(lanes s) {
    float x[8];
    _mm256_storeu_ps(x, _mm256_max_ps(s.a, s.b));
    for (int i = 1; i < 8; i++)
        x[0] = x[i] > x[0] ? x[i] : x[0];
    return x[0];
}

FN unsigned flushing(void) {
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040); /* results and operands that are subnormal count as zero */
    return mode;
}

FN void restored(unsigned mode) { _mm_setcsr(mode); }

/* 8 codes at a time (count is a multiple of 64). E4M3 << 7 is FP16 with 2^-8 of the value, subnormal codes included; as
 * FP16 subnormals become normal numbers in the conversion, flushing does not touch them. */
FN void decode_all(uint16_t *out, const uint8_t *codes, size_t count, uint8_t scale) {
    const __m256 power = _mm256_castsi256_ps(_mm256_set1_epi32((scale + 8) << 23));
    for (size_t j = 0; j < count; j += 8) {
        const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(codes + j)));
        const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xBF80));
        const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtph_ps(half), power));
        const __m256i high = _mm256_srli_epi32(bits, 16);
        _mm_storeu_si128((__m128i *)(out + j),
                         _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
    }
}

#include "rows_simd.h"

const struct row_kernels rows_avx2 = {product, norm, silu, attention, sigmoid};
#endif
