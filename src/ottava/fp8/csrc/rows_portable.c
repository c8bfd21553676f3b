/* The kernels of rows.h in plain C. */
#include "rows.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define FN static inline
#define BODY static
#define ROWS 1

typedef struct {
    float at[16];
} lanes;

#define EACH(expression)                                                                                             \
    lanes out;                                                                                                       \
    for (int i = 0; i < 16; i++)                                                                                     \
        out.at[i] = (expression);                                                                                    \
    return out

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float flushed(float x) { return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x; }

FN lanes zero_(void) { EACH(0.0f); }
FN lanes set_(float x) { EACH(x); }
FN lanes load_(const float *x) { EACH(x[i]); }
FN void store_(float *out, lanes x) { memcpy(out, x.at, sizeof x.at); }
FN lanes widen_(const uint16_t *x) { EACH(float_of((uint32_t)x[i] << 16)); }
FN lanes even_(const uint16_t *w) { EACH(float_of((uint32_t)w[2 * i] << 16)); }
FN lanes odd_(const uint16_t *w) { EACH(float_of((uint32_t)w[2 * i + 1] << 16)); }
FN lanes add_(lanes a, lanes b) { EACH(a.at[i] + b.at[i]); }
FN lanes sub_(lanes a, lanes b) { EACH(a.at[i] - b.at[i]); }
FN lanes mul_(lanes a, lanes b) { EACH(a.at[i] * b.at[i]); }
FN lanes div_(lanes a, lanes b) { EACH(a.at[i] / b.at[i]); }
FN lanes max_(lanes a, lanes b) { EACH(a.at[i] > b.at[i] ? a.at[i] : b.at[i]); } /* the second of NaNs, as x86 has it */
FN lanes min_(lanes a, lanes b) { EACH(a.at[i] < b.at[i] ? a.at[i] : b.at[i]); }
FN lanes fma_(lanes a, lanes b, lanes c) { EACH(fmaf(a.at[i], b.at[i], c.at[i])); }
FN lanes times_(lanes a, lanes b, lanes c) { EACH(flushed(fmaf(flushed(a.at[i]), flushed(b.at[i]), c.at[i]))); }
FN lanes raise_(lanes x, lanes power) { EACH(float_of(bits_of(x.at[i]) + (bits_of(power.at[i]) << 23))); }

FN void narrow_(uint16_t *out, lanes x) {
    for (int i = 0; i < 16; i++) {
        const uint32_t bits = bits_of(x.at[i]);
        out[i] = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
}

FN float sum_(lanes s) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            s.at[i] += s.at[i + half];
    return s.at[0];
}

FN lanes each_sum_(const lanes *x) { EACH(sum_(x[i])); }

FN float largest_(lanes s) {
    for (int i = 1; i < 16; i++)
        s.at[0] = s.at[i] > s.at[0] ? s.at[i] : s.at[0];
    return s.at[0];
}

FN unsigned flushing(void) { return 0; }
FN void restored(unsigned mode) { (void)mode; }

FN void decode_all(uint16_t *out, const uint8_t *codes, size_t count, uint8_t scale) {
    for (size_t j = 0; j < count; j++) {
        const unsigned magnitude = codes[j] & 0x7Fu, power = (unsigned)scale * 128;
        unsigned bits = magnitude >= 8 ? (magnitude << 4) + power - 7 * 128 : 0;
        if (magnitude && magnitude < 8)
            bits = subnormal_codes[magnitude] + power - 127 * 128;
        out[j] = (uint16_t)((bits & 0x7FFFu) | (codes[j] & 0x80u) << 8);
    }
}

#include "rows_simd.h"

const struct row_kernels rows_portable = {product, norm, silu, attention, sigmoid};
