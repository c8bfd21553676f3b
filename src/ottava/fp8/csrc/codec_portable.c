/* The codec in plain C: for machines without AVX2, for scales below BYTE_MIN, and to read beside the fast ones. */
#include "codec.h"

#include <math.h>
#include <string.h>

static uint32_t load(const char *p, size_t i, int type) {
    uint32_t wide;
    uint16_t narrow;
    if (type == F32)
        memcpy(&wide, p + 4 * i, 4);
    else {
        memcpy(&narrow, p + 2 * i, 2);
        wide = narrow;
    }
    return wide;
}

static void store(char *p, size_t i, int type, uint32_t bits) {
    uint16_t narrow = (uint16_t)bits;
    if (type == F32)
        memcpy(p + 4 * i, &bits, 4);
    else
        memcpy(p + 2 * i, &narrow, 2);
}

static inline int top_bit(uint32_t x) {
    int n = 0;
    while (x >>= 1)
        n++;
    return n;
}

float unit_of(int k) { return ldexpf(1.0f, 127 - k); }

void fold(float lanes[2][LANES], long changed, int k, sums out) {
    for (size_t half = LANES / 2; half; half /= 2)
        for (size_t i = 0; i < half; i++) {
            lanes[0][i] += lanes[0][i + half];
            lanes[1][i] += lanes[1][i + half];
        }
    out[0] = (double)changed;
    out[1] = ldexp((double)lanes[0][0], 2 * (k - 127));
    out[2] = ldexp((double)lanes[1][0], 2 * (k - 127));
}

uint32_t widen(uint32_t bits, int type) {
    if (type == F32)
        return bits;
    if (type == BF16)
        return bits << 16;
    uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
    if (magnitude >= 0x7C00u)
        return sign | INFINITY_BITS | (magnitude & 0x3FFu) << 13;
    if (magnitude >= 0x400u)
        return sign | ((magnitude << 13) + (112u << 23));
    if (!magnitude)
        return sign;
    int n = top_bit(magnitude); /* a subnormal: magnitude * 2^-24 */
    return sign | (uint32_t)(n + 103) << 23 | ((magnitude << (23 - n)) & 0x7FFFFFu);
}

/* The code nearest to a float32 divided by 2^(k - 127), ties to even. */
static uint8_t encode(uint32_t bits, int k) {
    uint32_t magnitude = bits & 0x7FFFFFFFu, sign = bits >> 24 & 0x80u, code;
    int32_t r = (int32_t)magnitude - (k - 7) * (1 << 23); /* its bits above 20 are the code where that is normal */
    if (magnitude < 1u << 23) /* subnormal: only at k = 10 may it pass half of the smallest code, 2^-127 */
        code = k == BYTE_MIN && magnitude > 1u << 22;
    else if (r >= 1 << 23)
        code = (uint32_t)(r + 0x7FFFF + (r >> 20 & 1)) >> 20;
    else {
        int shift = 21 - (r >> 23);
        uint32_t significand = (magnitude & 0x7FFFFFu) | 1u << 23;
        code = shift > 24 ? 0 : (significand + (1u << (shift - 1)) - 1 + (significand >> shift & 1)) >> shift;
    }
    return (uint8_t)(sign | (code < 0x7E ? code : 0x7E));
}

/* The bits of code * 2^(k - 127), which must be exact in a type with this exponent bias and fraction. */
static uint32_t decode(unsigned code, int k, int type) {
    int bias = type == F16 ? 15 : 127, fraction = type == F32 ? 23 : type == F16 ? 10 : 7;
    uint32_t sign = (uint32_t)(code >> 7) << (type == F32 ? 31 : 15), ones = ((type == F16 ? 32u : 256u) - 1) << fraction;
    unsigned magnitude = code & 0x7F;
    if (magnitude == 0x7F)
        return sign | ones | 1u << (fraction - 1);
    if (!magnitude)
        return sign;
    unsigned whole = magnitude < 8 ? magnitude : 8 | (magnitude & 7); /* the value is whole * 2^unit */
    int unit = (magnitude < 8 ? 1 : (int)(magnitude >> 3)) - 10 + k - 127, n = top_bit(whole);
    int exponent = unit + n + bias;
    if (exponent >= 1)
        return sign | (uint32_t)exponent << fraction | ((whole << (fraction - n)) & ((1u << fraction) - 1));
    return sign | whole << (unit + bias - 1 + fraction);
}

/* All codes at one scale. */
static void decode_all(uint32_t table[256], int k, int type) {
    for (unsigned code = 0; code < 256; code++)
        table[code] = decode(code, k, type);
}

static uint32_t amax(const struct tile *t) {
    uint32_t mask = t->type == F32 ? 0x7FFFFFFFu : 0x7FFFu, most = 0;
    for (size_t i = 0; i < t->rows; i++)
        for (size_t j = 0; j < t->columns; j++) {
            uint32_t bits = load(t->w + i * t->w_row, j, t->type) & mask;
            most = bits > most ? bits : most;
        }
    return widen(most, t->type);
}

static void quantise(const struct tile *t) {
    for (size_t i = 0; i < t->rows; i++)
        for (size_t j = 0; j < t->columns; j++)
            t->codes[i * t->codes_row + j] = encode(widen(load(t->w + i * t->w_row, j, t->type), t->type), t->k);
}

static void dequantise(const struct tile *t) {
    for (size_t j = 0; j < t->columns; j++)
        store(t->out, j, t->type, decode(t->codes[j], t->scales[j / t->part], t->type));
}

static void project(const struct tile *t) {
    uint32_t table[256];
    decode_all(table, t->k, t->type);
    for (size_t i = 0; i < t->rows; i++)
        for (size_t j = 0; j < t->columns; j++) {
            uint32_t bits = widen(load(t->w + i * t->w_row, j, t->type), t->type);
            store(t->out + i * t->out_row, j, t->type, table[encode(bits, t->k)]);
        }
}

static void measure(const struct tile *t, sums out) {
    uint32_t table[256];
    float lanes[2][LANES] = {0}, unit = unit_of(t->k);
    long changed = 0;
    decode_all(table, t->k, F32);
    for (size_t i = 0; i < t->rows; i++)
        for (size_t j = 0; j < t->columns; j++) {
            uint32_t bits = widen(load(t->w + i * t->w_row, j, t->type), t->type);
            uint32_t value = table[t->codes[i * t->codes_row + j]];
            float w, q;
            memcpy(&w, &bits, 4);
            memcpy(&q, &value, 4);
            float x = w * unit, off = (w - q) * unit;
            changed += bits != value;
            lanes[0][j % LANES] += x * x;
            lanes[1][j % LANES] += off * off;
            if (t->out)
                store(t->out + i * t->out_row, j, BF16, value >> 16);
        }
    fold(lanes, changed, t->k, out);
}

const struct codec codec_portable = {amax, quantise, dequantise, project, measure};
