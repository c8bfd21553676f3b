/* The kernels of rows.h: the way in from Python, and what needs no lanes. */
#include "rows.h"

#include <string.h>

enum { MOST = 20 };

static const struct row_kernels *level_of(size_t level) {
#if OTTAVA_X86
    static const struct row_kernels *const all[] = {&rows_portable, &rows_avx2, &rows_avx512, &rows_avx512_bf16};
    return all[level];
#else
    (void)level;
    return &rows_portable;
#endif
}

/* `count` integers (addresses, sizes, flags), then a number where `number` is not NULL. */
static int given(PyObject *const *args, Py_ssize_t got, size_t *value, Py_ssize_t count, float *number) {
    if (got != count + (number != NULL)) {
        PyErr_Format(PyExc_TypeError, "%zd arguments are wanted", count + (number != NULL));
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        value[i] = PyLong_AsSize_t(args[i]);
        if (value[i] == (size_t)-1 && PyErr_Occurred())
            return 0;
    }
    if (number)
        *number = (float)PyFloat_AsDouble(args[count]);
    return !PyErr_Occurred();
}

#define ENTRY(NAME) static PyObject *NAME(PyObject *self, PyObject *const *args, Py_ssize_t got)
#define ARGUMENTS(COUNT, NUMBER)                                                                                     \
    size_t v[MOST];                                                                                                  \
    (void)self;                                                                                                      \
    if (!given(args, got, v, COUNT, NUMBER))                                                                         \
    return NULL
#define RUN(COUNT, BODY, CONTEXT)                                                                                    \
    Py_BEGIN_ALLOW_THREADS parallel_for(COUNT, (int)v[1], level_of(v[0])->BODY, CONTEXT);                            \
    Py_END_ALLOW_THREADS Py_RETURN_NONE

/* (level, threads, x, x_row, wide, weight, scales, y, y_row, rows, outputs, columns); scales 0: weight is BF16 */
ENTRY(rows_product) {
    ARGUMENTS(12, NULL);
    struct panels p = {.scales = (const uint8_t *)v[6], .x = (const void *)v[2], .y = (float *)v[7]};
    p.codes = p.scales ? (const uint8_t *)v[5] : NULL;
    p.bf16 = p.scales ? NULL : (const uint16_t *)v[5];
    p.x_row = v[3], p.wide = v[4] != 0, p.y_row = v[8], p.rows = v[9], p.outputs = v[10], p.columns = v[11];
    RUN((p.outputs + GROUP_OF - 1) / GROUP_OF, product, &p);
}

/* (level, threads, x, x_row, add, add_row, weight, out, out_row, wide, rows, heads, width, epsilon) */
ENTRY(rows_norm) {
    float epsilon;
    ARGUMENTS(13, &epsilon);
    struct norm p = {(float *)v[2], (const float *)v[4], (const float *)v[6], (void *)v[7], v[3],
                     v[5],          v[8],                v[11],               v[12],        v[9] != 0, epsilon};
    RUN(v[10], norm, &p);
}

/* (level, threads, x, x_row, out, out_row, wide, rows, width) */
ENTRY(rows_silu) {
    ARGUMENTS(9, NULL);
    struct silu p = {(const float *)v[2], (void *)v[4], v[3], v[5], v[8], v[6] != 0};
    RUN(v[7], silu, &p);
}

/* (level, threads, q, q_row, out, out_row, wide, caches, lengths, counts, rows, heads, group, width, value_width, values,
 * size, scale) */
ENTRY(rows_attention) {
    float scale;
    ARGUMENTS(17, &scale);
    struct attention p = {(const float *)v[2], (void *)v[4], (const size_t *)v[7], (const size_t *)v[8],
                          (const size_t *)v[9], v[3], v[5], v[11], v[12], v[13], v[14], v[15], v[16], v[6] != 0, scale};
    RUN(v[10] * p.heads, attention, &p);
}

/* (level, x, count): in place */
ENTRY(rows_sigmoid) {
    ARGUMENTS(3, NULL);
    Py_BEGIN_ALLOW_THREADS level_of(v[0])->sigmoid((float *)v[1], v[2]);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

/* (x, x_row, rows, heads, head, half, cos, sin, positions, interleaved): turns, in place, the first 2 * half of the
 * `head` numbers of each head; pairs are neighbours or `half` apart, the result is halves. */
ENTRY(rows_turn) {
    ARGUMENTS(10, NULL);
    const size_t half = v[5];
    float pair[2][512];
    if (half > 512) {
        PyErr_SetString(PyExc_ValueError, "more than 1024 rotary dimensions");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS for (size_t r = 0; r < v[2]; r++) {
        const size_t position = ((const size_t *)v[8])[r];
        const float *cos = (const float *)v[6] + position * half, *sin = (const float *)v[7] + position * half;
        for (size_t h = 0; h < v[3]; h++) {
            float *x = (float *)v[0] + r * v[1] + h * v[4];
            for (size_t i = 0; i < half; i++) {
                pair[0][i] = v[9] ? x[2 * i] : x[i];
                pair[1][i] = v[9] ? x[2 * i + 1] : x[half + i];
            }
            for (size_t i = 0; i < half; i++) {
                x[i] = pair[0][i] * cos[i] - pair[1][i] * sin[i];
                x[half + i] = pair[1][i] * cos[i] + pair[0][i] * sin[i];
            }
        }
    }
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

/* (x, x_row, rows, pieces, size, caches, lengths, positions, wide): each `size` of a row's numbers to its position of the
 * next piece of its cache. */
ENTRY(rows_put) {
    ARGUMENTS(9, NULL);
    for (size_t i = 0; i < v[2] * v[3]; i++) {
        const size_t r = i / v[3], piece = i % v[3], cache = ((const size_t *)v[5])[r];
        const size_t at = (piece * ((const size_t *)v[6])[r] + ((const size_t *)v[7])[r]) * v[4];
        const float *x = (const float *)v[0] + r * v[1] + piece * v[4];
        uint16_t *narrow = (uint16_t *)cache + at;
        if (v[8]) {
            memcpy((float *)cache + at, x, v[4] * sizeof *x);
            continue;
        }
        for (size_t j = 0; j < v[4]; j++) {
            uint32_t bits;
            memcpy(&bits, x + j, sizeof bits);
            narrow[j] = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
        }
    }
    Py_RETURN_NONE;
}

/* The levels of `levels()` here, and one more where AVX-512 BF16 is: the number of the best. */
static PyObject *rows_best(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    long best = isa_best();
#if OTTAVA_X86
    best += best == ISA_AVX512 && __builtin_cpu_supports("avx512bf16");
#endif
    return PyLong_FromLong(best);
}

#define METHOD(NAME) {#NAME, (PyCFunction)(void (*)(void))NAME, METH_FASTCALL, "See rows.h and rows.c."}

PyMethodDef rows_methods[] = {
    METHOD(rows_product), METHOD(rows_norm), METHOD(rows_silu), METHOD(rows_attention), METHOD(rows_sigmoid),
    METHOD(rows_turn),    METHOD(rows_put),  {"rows_best", rows_best, METH_NOARGS, "The number of the best level."},
    {NULL, NULL, 0, NULL},
};
