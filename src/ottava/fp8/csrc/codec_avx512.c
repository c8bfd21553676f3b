/* The codec in AVX-512 (F, BW, VL, DQ): what codec_simd.h needs to be written once for two vector widths. */
#include "codec.h"

#if OTTAVA_X86
#define FN static inline AVX512 __attribute__((always_inline))
#define ENTRY static AVX512
#define SET codec_avx512

typedef __m512i V;
typedef __m256i HALF;
typedef __m512 FLOATS;

#define I(name) _mm512_##name
#define SI(name) _mm512_##name##_si512
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define STREAM(p, v) _mm512_stream_si512((void *)(p), v)
#define STORE_HALF(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define BYTES_16(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define BYTES_32(p) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define WORDS_32(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define HALVES_32(p) _mm512_castps_si512(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define NARROW_HALVES(v) _mm512_cvtps_ph(_mm512_castsi512_ps(v), _MM_FROUND_TO_NEAREST_INT)
#define NARROW_WORDS(v) _mm512_cvtepi32_epi16(v)
#define TABLE_8(t) _mm512_broadcast_i32x4(t)
#define TABLE_32(t, i) _mm512_permutexvar_epi32(i, _mm512_broadcast_i64x4(t))
#define AS_FLOATS(v) _mm512_castsi512_ps(v)

#define ANY_LESS_8(a, b) (_mm512_cmplt_epi8_mask(a, b) != 0)
#define ANY_LESS_16(a, b) (_mm512_cmplt_epi16_mask(a, b) != 0)
#define ANY_LESS_32(a, b) (_mm512_cmplt_epi32_mask(a, b) != 0)
#define IF_LESS_16(a, b, yes, no) _mm512_mask_mov_epi16(no, _mm512_cmplt_epi16_mask(a, b), yes)
#define IF_LESS_32(a, b, yes, no) _mm512_mask_mov_epi32(no, _mm512_cmplt_epi32_mask(a, b), yes)
#define DIFFERENT_16(a, b) __builtin_popcount(_mm512_cmpneq_epi16_mask(a, b))
#define DIFFERENT_32(a, b) __builtin_popcount(_mm512_cmpneq_epi32_mask(a, b))

/* Lanes of 16 or 32 bits with values 0..255 to bytes, in order. */
FN V pack_16(V a, V b) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packus_epi16(a, b));
}

FN V pack_32(V a, V b, V c, V d) {
    const V order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    V bytes = _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
    return _mm512_permutexvar_epi32(order, bytes);
}

#include "codec_simd.h"
#endif
