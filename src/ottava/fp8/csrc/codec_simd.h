/* The codec in vectors, included once for each vector width; codec_avx2.c and codec_avx512.c say what the words mean.
 *
 * Weights are mostly normal codes: whether a vector holds any other is one test, and only then the rest is done.
 * Scales at which subnormal numbers or saturation could matter are left to the portable version. */
#include <string.h>

#define GROUP sizeof(V)            /* codes at a time */
#define L32 (sizeof(V) / 4)        /* lanes */
#define L16 (sizeof(V) / 2)
#define SET_16(x) I(set1_epi16)((short)(x))
#define SET_32(x) I(set1_epi32)((int)(x))
#define AND(a, b) SI(and)(a, b)
#define OR(a, b) SI(or)(a, b)

/* BF16 to codes in 16-bit lanes. k in 11..245, and no value above 464 * 2^(k - 127). */
FN V encode_16(V x, int k) {
    V magnitude = AND(x, SET_16(0x7FFF)), sign = AND(I(srli_epi16)(x, 8), SET_16(0x80));
    V r = I(sub_epi16)(magnitude, SET_16((k - 7) * 128)); /* its bits above 4 are the code where that is normal */
    V odd = AND(I(srli_epi16)(r, 4), SET_16(1));
    V code = I(srli_epi16)(I(add_epi16)(I(add_epi16)(r, SET_16(7)), odd), 4);
    if (__builtin_expect(ANY_LESS_16(r, SET_16(128)), 0)) {
        /* significand * 2^(exponent - 5), where exponent <= 0; from -4 down that is below one half */
        const V powers = TABLE_8(_mm_setr_epi8(0, 1, 2, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
        V index = I(add_epi16)(I(max_epi16)(I(srai_epi16)(r, 7), SET_16(-4)), SET_16(4));
        V significand = OR(AND(magnitude, SET_16(0x7F)), SET_16(0x80));
        V fixed = I(mullo_epi16)(significand, I(shuffle_epi8)(powers, index)); /* 8 bits of fraction */
        V tie = AND(I(srli_epi16)(fixed, 8), SET_16(1));
        V small = I(srli_epi16)(I(add_epi16)(I(add_epi16)(fixed, SET_16(127)), tie), 8);
        code = IF_LESS_16(r, SET_16(128), small, code);
    }
    return OR(code, sign);
}

/* The same for float32 in 32-bit lanes. */
FN V encode_32(V x, int k) {
    V magnitude = AND(x, SET_32(0x7FFFFFFF)), sign = AND(I(srli_epi32)(x, 24), SET_32(0x80)), one = SET_32(1);
    V r = I(sub_epi32)(magnitude, SET_32((k - 7) * (1 << 23)));
    V odd = AND(I(srli_epi32)(r, 20), one);
    V code = I(srli_epi32)(I(add_epi32)(I(add_epi32)(r, SET_32(0x7FFFF)), odd), 20);
    if (__builtin_expect(ANY_LESS_32(r, SET_32(1 << 23)), 0)) {
        V significand = OR(AND(magnitude, SET_32(0x7FFFFF)), SET_32(1 << 23));
        V shift = I(min_epi32)(I(sub_epi32)(SET_32(21), I(srai_epi32)(r, 23)), SET_32(25)); /* 25: below one half */
        V below_half = I(sub_epi32)(I(sllv_epi32)(one, I(sub_epi32)(shift, one)), one);
        V tie = AND(I(srlv_epi32)(significand, shift), one);
        V small = I(srlv_epi32)(I(add_epi32)(I(add_epi32)(significand, below_half), tie), shift);
        code = IF_LESS_32(r, SET_32(1 << 23), small, code);
    }
    return OR(code, sign);
}

/* Codes, sign-extended to 16-bit lanes, to BF16, where they are normal and no NaN. k from 10. */
FN V decode_normal_16(V code, int k) {
    return I(add_epi16)(AND(I(slli_epi16)(code, 4), SET_16(0x87F0)), SET_16((k - 7) * 128));
}

FN V decode_normal_32(V code, int k) {
    return I(add_epi32)(AND(I(slli_epi32)(code, 20), SET_32(0x87F00000)), SET_32((k - 7) * (1 << 23)));
}

/* Any codes, in lanes that may hold anything above bit 7. */
FN V decode_16(V code, int k) {
    const __m128i ones = _mm_setr_epi16(0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60); /* c * 2^-9 */
    const __m128i octaves = _mm_set1_epi16((short)((k - 127) * 128));
    V small = TABLE_8(_mm_add_epi16(ones, _mm_andnot_si128(_mm_cmpeq_epi16(ones, _mm_setzero_si128()), octaves)));
    V magnitude = AND(code, SET_16(0x7F)), sign = AND(I(slli_epi16)(code, 8), SET_16(0x8000));
    V value = I(add_epi16)(I(slli_epi16)(magnitude, 4), SET_16((k - 7) * 128));
    V bytes = I(add_epi16)(I(mullo_epi16)(magnitude, SET_16(0x0202)), SET_16(0x0100));
    value = IF_LESS_16(magnitude, SET_16(8), I(shuffle_epi8)(small, bytes), value);
    return OR(IF_LESS_16(SET_16(0x7E), magnitude, SET_16(0x7FC0), value), sign);
}

FN V decode_32(V code, int k) {
    const __m256i ones = _mm256_setr_epi32(0, 0x3B000000, 0x3B800000, 0x3BC00000, 0x3C000000, 0x3C200000, 0x3C400000,
                                           0x3C600000);
    const __m256i octaves = _mm256_set1_epi32((k - 127) * (1 << 23)), zero = _mm256_setzero_si256();
    __m256i small = _mm256_add_epi32(ones, _mm256_andnot_si256(_mm256_cmpeq_epi32(ones, zero), octaves));
    V magnitude = AND(code, SET_32(0x7F)), sign = AND(I(slli_epi32)(code, 24), SET_32(0x80000000));
    V value = I(add_epi32)(I(slli_epi32)(magnitude, 20), SET_32((k - 7) * (1 << 23)));
    value = IF_LESS_32(magnitude, SET_32(8), TABLE_32(small, magnitude), value);
    return OR(IF_LESS_32(SET_32(0x7E), magnitude, SET_32(0x7FC00000), value), sign);
}

FN V load_32(const char *p, int type) {
    if (type == F32)
        return LOAD(p);
    return type == F16 ? HALVES_32(p) : I(slli_epi32)(WORDS_32(p), 16);
}

FN void store_32(char *p, V value, int type) {
    if (type == F32)
        STORE(p, value);
    else
        STORE_HALF(p, type == F16 ? NARROW_HALVES(value) : NARROW_WORDS(I(srli_epi32)(value, 16)));
}

FN void put(char *p, V value, int stream) {
    if (stream)
        STREAM(p, value);
    else
        STORE(p, value);
}

/* Each of these handles GROUP columns. */

FN void quantise_group(const char *w, uint8_t *codes, int k, int type, int stream) {
    size_t step = L32 * width(type);
    V bytes;
    if (type == BF16)
        bytes = pack_16(encode_16(LOAD(w), k), encode_16(LOAD(w + sizeof(V)), k));
    else
        bytes = pack_32(encode_32(load_32(w, type), k), encode_32(load_32(w + step, type), k),
                        encode_32(load_32(w + 2 * step, type), k), encode_32(load_32(w + 3 * step, type), k));
    put((char *)codes, bytes, stream);
}

FN void dequantise_group(const uint8_t *codes, char *out, int k, int type, int stream) {
    V above = I(add_epi8)(AND(LOAD(codes), I(set1_epi8)(0x7F)), I(set1_epi8)(1)); /* NaN becomes -128 */
    int special = ANY_LESS_8(above, I(set1_epi8)(9));
    if (type == BF16)
        for (size_t i = 0; i < 2; i++) {
            V code = BYTES_16(codes + i * sizeof(V) / 2);
            put(out + i * sizeof(V), special ? decode_16(code, k) : decode_normal_16(code, k), stream);
        }
    else
        for (size_t i = 0; i < 4; i++) {
            V code = BYTES_32(codes + i * L32), value = special ? decode_32(code, k) : decode_normal_32(code, k);
            if (type == F32)
                put(out + i * sizeof(V), value, stream);
            else
                store_32(out + i * sizeof(V) / 2, value, type);
        }
}

FN void project_group(const char *w, char *out, int k, int type) {
    for (size_t i = 0; i < (type == BF16 ? 2 : 4); i++) {
        const char *p = w + i * sizeof(V);
        if (type == BF16)
            STORE(out + i * sizeof(V), decode_16(encode_16(LOAD(p), k), k));
        else
            STORE(out + i * sizeof(V), decode_32(encode_32(LOAD(p), k), k));
    }
}

/* GROUP columns. unit: 1 / scale, so that the sums neither overflow nor vanish. Sum a's lane l belongs to column
 * column_of(a, l, type) of LANES. */

FN size_t column_of(size_t a, size_t l, int type) {
    return type == BF16 ? a / 2 * L16 + 2 * l + a % 2 : a * L32 + l; /* BF16 widens to even and odd columns */
}

FN void add_squares(V exact, V value, FLOATS unit, FLOATS *signal, FLOATS *noise) {
    FLOATS x = I(mul_ps)(AS_FLOATS(exact), unit);
    FLOATS off = I(mul_ps)(I(sub_ps)(AS_FLOATS(exact), AS_FLOATS(value)), unit);
    *signal = I(add_ps)(*signal, I(mul_ps)(x, x));
    *noise = I(add_ps)(*noise, I(mul_ps)(off, off));
}

FN int measure_group(const char *w, const uint8_t *codes, char *out, int k, int type, FLOATS unit, FLOATS *signal,
                     FLOATS *noise) {
    V above = I(add_epi8)(AND(LOAD(codes), I(set1_epi8)(0x7F)), I(set1_epi8)(1));
    int changed = 0, special = ANY_LESS_8(above, I(set1_epi8)(9));
    for (size_t i = 0; type == BF16 && i < GROUP / L16; i++) {
        V exact = LOAD(w + i * sizeof(V)), code = BYTES_16(codes + i * L16), high = SET_32(0xFFFF0000);
        V value = special ? decode_16(code, k) : decode_normal_16(code, k);
        size_t a = i % (LANES / L16) * 2;
        changed += DIFFERENT_16(exact, value);
        add_squares(I(slli_epi32)(exact, 16), I(slli_epi32)(value, 16), unit, signal + a, noise + a);
        add_squares(AND(exact, high), AND(value, high), unit, signal + a + 1, noise + a + 1);
        if (out)
            STORE(out + i * sizeof(V), value);
    }
    for (size_t i = 0; type != BF16 && i < GROUP / L32; i++) {
        V exact = load_32(w + i * L32 * width(type), type), code = BYTES_32(codes + i * L32);
        V value = special ? decode_32(code, k) : decode_normal_32(code, k);
        size_t a = i % (LANES / L32);
        changed += DIFFERENT_32(exact, value);
        add_squares(exact, value, unit, signal + a, noise + a);
        if (out)
            store_32(out + i * L32 * 2, value, BF16);
    }
    return changed;
}

/* Whole tiles, by value: what is stored might otherwise be the tile, for all the compiler knows. A group that would
 * pass the end of a row is copied to where there is room. */

FN void quantise_rows(const struct tile t, int type, int stream, size_t columns) {
    char w[GROUP * 4] = {0};
    uint8_t codes[GROUP];
    for (size_t i = 0; i < t.rows; i++) {
        const char *from = t.w + i * t.w_row;
        uint8_t *to = t.codes + i * t.codes_row;
        size_t j = 0;
        if (t.next)
            for (size_t b = 0; b < columns * width(type); b += 64)
                __builtin_prefetch(t.next + i * t.w_row + b);
        for (; j + GROUP <= columns; j += GROUP)
            quantise_group(from + j * width(type), to + j, t.k, type, stream);
        if (j < columns) {
            memcpy(w, from + j * width(type), (columns - j) * width(type));
            quantise_group(w, codes, t.k, type, 0);
            memcpy(to + j, codes, columns - j);
        }
    }
}

FN void quantise_as(const struct tile t, int type, int stream) {
    if (t.columns == BLOCK)
        quantise_rows(t, type, stream, BLOCK); /* the compiler unrolls what it knows the length of */
    else
        quantise_rows(t, type, stream, t.columns);
}

FN void dequantise_part(const uint8_t *from, char *to, size_t columns, int k, int type, int stream) {
    size_t j = 0;
    for (; j + GROUP <= columns; j += GROUP)
        dequantise_group(from + j, to + j * width(type), k, type, stream);
    if (j < columns) {
        uint8_t codes[GROUP] = {0};
        char out[GROUP * 4];
        memcpy(codes, from + j, columns - j);
        dequantise_group(codes, out, k, type, 0);
        memcpy(to + j * width(type), out, (columns - j) * width(type));
    }
}

FN void dequantise_as(const struct tile t, int type, int stream) {
    for (size_t j = 0, columns; j < t.columns; j += columns) {
        size_t block = j / t.part, last = block;
        int k = t.scales[block];
        while (t.part < GROUP && (last + 1) * t.part < t.columns && t.scales[last + 1] == k)
            last++; /* narrow blocks are often pieces of a wide one */
        columns = (last + 1) * t.part < t.columns ? (last + 1) * t.part - j : t.columns - j;
        if (k < BYTE_MIN) {
            struct tile slow = {.codes = t.codes + j, .out = t.out + j * width(type), .columns = columns, .part = t.part,
                                .rows = 1, .type = t.type, .scales = t.scales + block};
            codec_portable.dequantise(&slow);
        } else if (columns == BLOCK)
            dequantise_part(t.codes + j, t.out + j * width(type), BLOCK, k, type, stream);
        else
            dequantise_part(t.codes + j, t.out + j * width(type), columns, k, type, stream);
    }
}

FN void project_as(const struct tile t, int type) {
    char w[GROUP * 4] = {0};
    for (size_t i = 0; i < t.rows; i++) {
        const char *from = t.w + i * t.w_row;
        char *to = t.out + i * t.out_row;
        size_t j = 0;
        for (; j + GROUP <= t.columns; j += GROUP)
            project_group(from + j * width(type), to + j * width(type), t.k, type);
        if (j < t.columns) {
            memcpy(w, from + j * width(type), (t.columns - j) * width(type));
            project_group(w, w, t.k, type);
            memcpy(to + j * width(type), w, (t.columns - j) * width(type));
        }
    }
}

FN void measure_rows(const struct tile t, sums result, int type, size_t columns) {
    FLOATS signal[LANES / L32], noise[LANES / L32], unit = I(set1_ps)(unit_of(t.k));
    float lanes[2][LANES];
    char w[GROUP * 4] = {0}, out[GROUP * 2];
    uint8_t codes[GROUP] = {0};
    long changed = 0;
    for (size_t i = 0; i < LANES / L32; i++)
        signal[i] = noise[i] = I(setzero_ps)();
    for (size_t i = 0; i < t.rows; i++) {
        const char *exact = t.w + i * t.w_row;
        const uint8_t *from = t.codes + i * t.codes_row;
        char *to = t.out ? t.out + i * t.out_row : NULL;
        size_t j = 0;
        for (; j + GROUP <= columns; j += GROUP)
            changed += measure_group(exact + j * width(type), from + j, to ? to + 2 * j : NULL, t.k, type, unit, signal,
                                     noise);
        if (j < columns) { /* what is behind the end counts as zeros */
            memcpy(w, exact + j * width(type), (columns - j) * width(type));
            memcpy(codes, from + j, columns - j);
            changed += measure_group(w, codes, out, t.k, type, unit, signal, noise);
            if (to)
                memcpy(to + 2 * j, out, 2 * (columns - j));
        }
    }
    for (size_t a = 0; a < LANES / L32; a++) {
        float sums[2][L32];
        I(storeu_ps)(sums[0], signal[a]);
        I(storeu_ps)(sums[1], noise[a]);
        for (size_t l = 0; l < L32; l++)
            for (size_t i = 0; i < 2; i++)
                lanes[i][column_of(a, l, type)] = sums[i][l];
    }
    fold(lanes, changed, t.k, result);
}

FN void measure_as(const struct tile t, sums result, int type) {
    if (t.columns == BLOCK)
        measure_rows(t, result, type, BLOCK);
    else
        measure_rows(t, result, type, t.columns);
}

/* The largest magnitude's bits in the type itself; F16 is ordered as BF16 is. */
FN uint32_t amax_rows(const struct tile t, int type, size_t bytes) {
    V mask = type == F32 ? SET_32(0x7FFFFFFF) : SET_16(0x7FFF), most = SI(setzero)(), other = most;
    uint32_t result = 0, lanes[L32];
#define MOST(a, p) (type == F32 ? I(max_epu32)(a, AND(mask, LOAD(p))) : I(max_epu16)(a, AND(mask, LOAD(p))))
    for (size_t i = 0; i < t.rows; i++) {
        const char *row = t.w + i * t.w_row;
        size_t j = 0;
        for (; j + 2 * sizeof(V) <= bytes; j += 2 * sizeof(V)) {
            most = MOST(most, row + j);
            other = MOST(other, row + j + sizeof(V));
        }
        if (j < bytes) {
            char end[2 * sizeof(V)] = {0};
            memcpy(end, row + j, bytes - j);
            most = MOST(most, end);
            other = MOST(other, end + sizeof(V));
        }
    }
    most = type == F32 ? I(max_epu32)(most, other) : I(max_epu16)(most, other);
#undef MOST
    STORE(lanes, most);
    for (size_t i = 0; i < L32; i++) {
        uint32_t low = type == F32 ? lanes[i] : lanes[i] & 0xFFFF, high = type == F32 ? 0 : lanes[i] >> 16;
        result = low > result ? low : result;
        result = high > result ? high : result;
    }
    return result;
}

FN uint32_t amax_as(const struct tile t, int type) {
    if (t.columns == BLOCK)
        return amax_rows(t, type, BLOCK * width(type));
    return amax_rows(t, type, t.columns * width(type));
}

/* Entries: each with its type and manner of storing known to the compiler. */

ENTRY uint32_t amax(const struct tile *t) {
    return widen(t->type == F32 ? amax_as(*t, F32) : amax_as(*t, BF16), t->type);
}

ENTRY void quantise(const struct tile *t) {
    if (t->k <= BYTE_MIN || t->k >= BYTE_MAX)
        codec_portable.quantise(t);
    else if (t->type == BF16 && t->stream)
        quantise_as(*t, BF16, 1);
    else if (t->type == BF16)
        quantise_as(*t, BF16, 0);
    else if (t->type == F16)
        quantise_as(*t, F16, 0);
    else
        quantise_as(*t, F32, t->stream);
}

ENTRY void dequantise(const struct tile *t) {
    if (t->type == BF16 && t->stream)
        dequantise_as(*t, BF16, 1);
    else if (t->type == BF16)
        dequantise_as(*t, BF16, 0);
    else if (t->type == F32 && t->stream)
        dequantise_as(*t, F32, 1);
    else if (t->type == F16)
        dequantise_as(*t, F16, 0);
    else
        dequantise_as(*t, F32, 0);
}

ENTRY void project(const struct tile *t) {
    if (t->k <= BYTE_MIN || t->k >= BYTE_MAX)
        codec_portable.project(t);
    else if (t->type == F32)
        project_as(*t, F32);
    else
        project_as(*t, BF16);
}

ENTRY void measure(const struct tile *t, sums result) {
    if (t->k < BYTE_MIN)
        codec_portable.measure(t, result);
    else if (t->type == BF16)
        measure_as(*t, result, BF16);
    else if (t->type == F16)
        measure_as(*t, result, F16);
    else
        measure_as(*t, result, F32);
}

const struct codec SET = {amax, quantise, dequantise, project, measure};
