/* The codec in AVX2 (and F16C): what codec_simd.h needs to be written once for two vector widths. */
#include "codec.h"

#if OTTAVA_X86
#define FN static inline AVX2 __attribute__((always_inline))
#define ENTRY static AVX2
#define SET codec_avx2

typedef __m256i V;
typedef __m128i HALF;
typedef __m256 FLOATS;

#define I(name) _mm256_##name
#define SI(name) _mm256_##name##_si256
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define STREAM(p, v) _mm256_stream_si256((__m256i *)(p), v)
#define STORE_HALF(p, v) _mm_storeu_si128((__m128i *)(p), v)
#define BYTES_16(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define BYTES_32(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define WORDS_32(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define HALVES_32(p) _mm256_castps_si256(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define NARROW_HALVES(v) _mm256_cvtps_ph(_mm256_castsi256_ps(v), _MM_FROUND_TO_NEAREST_INT)
#define NARROW_WORDS(v) _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08))
#define TABLE_8(t) _mm256_broadcastsi128_si256(t)
#define TABLE_32(t, i) _mm256_permutevar8x32_epi32(t, i)
#define AS_FLOATS(v) _mm256_castsi256_ps(v)

#define ANY_LESS_8(a, b) (_mm256_movemask_epi8(_mm256_cmpgt_epi8(b, a)) != 0)
#define ANY_LESS_16(a, b) (_mm256_movemask_epi8(_mm256_cmpgt_epi16(b, a)) != 0)
#define ANY_LESS_32(a, b) (_mm256_movemask_epi8(_mm256_cmpgt_epi32(b, a)) != 0)
#define IF_LESS_16(a, b, yes, no) _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi16(b, a))
#define IF_LESS_32(a, b, yes, no) _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(b, a))
#define DIFFERENT_16(a, b) (16 - __builtin_popcount((unsigned)_mm256_movemask_epi8(_mm256_cmpeq_epi16(a, b))) / 2)
#define DIFFERENT_32(a, b) (8 - __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)))))

/* Lanes of 16 or 32 bits with values 0..255 to bytes, in order. */
FN V pack_16(V a, V b) { return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8); }

FN V pack_32(V a, V b, V c, V d) {
    V bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

#include "codec_simd.h"
#endif
