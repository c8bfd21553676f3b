/* Matrix products with FP8 weights: the way in from Python, packing of x, and the portable kernel; see matmul.h. */
#include "matmul.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const uint16_t subnormal_codes[32] = {0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60};

static float widen(uint16_t bf16) {
    uint32_t bits = (uint32_t)bf16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t bf16_of(uint8_t code, uint8_t scale) {
    unsigned magnitude = code & 0x7Fu, bits = 0;
    if (magnitude >= 8)
        bits = (magnitude << 4) + (scale - 7u) * 128;
    else if (magnitude)
        bits = subnormal_codes[magnitude] + (scale - 127u) * 128;
    return (uint16_t)((bits & 0x7FFFu) | (code & 0x80u) << 8);
}

static float sum_tree(float *lane) {
    for (int i = 0; i < 16; i++)
        lane[i] = lane[2 * i] + lane[2 * i + 1];
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

void fma_portable(void *product, size_t first, size_t last) {
    const struct product *p = product;
    const size_t across = (p->columns + BLOCK - 1) / BLOCK;
    for (size_t r = first * PANEL; r < last * PANEL && r < p->rows; r++)
        for (size_t b = 0; b < p->batch; b++) {
            const float *x = (const float *)p->x + b * p->padded;
            float lane[32] = {0};
            for (size_t j = 0; j < p->padded; j++) {
                uint16_t w = 0;
                if (j < p->columns)
                    w = p->codes ? bf16_of(p->codes[r * p->columns + j], p->scales[r / BLOCK * across + j / BLOCK])
                                 : p->bf16[r * p->columns + j];
                lane[j % 32] = fmaf(widen(w), x[j], lane[j % 32]);
            }
            p->y[b * p->rows + r] = sum_tree(lane);
        }
}

/* FP32, padded; `split` puts the even columns of each 32 before the odd ones, as fma_avx512 unpacks BF16. */
static void pack_fma(float *out, const struct product *p, const void *x, int bf16, int split) {
    for (size_t b = 0; b < p->batch; b++, out += p->padded) {
        const size_t at = b * p->columns;
        for (size_t j = 0; j < p->columns; j++) {
            const size_t to = split ? (j & ~(size_t)31) + (j % 2) * 16 + j % 32 / 2 : j;
            out[to] = bf16 ? widen(((const uint16_t *)x)[at + j]) : ((const float *)x)[at + j];
        }
    }
}

static void pack_dot(uint16_t *out, const struct product *p, const uint16_t *x) {
    for (size_t b = 0; b < p->batch; b++)
        memcpy(out + b * p->padded, x + b * p->columns, p->columns * sizeof *x);
}

/* Groups of 16 rows of x, each as the tiles of its 32-column chunks: [pair of columns][row][2]. */
static void pack_amx(uint16_t *out, const struct product *p, const uint16_t *x) {
    for (size_t b = 0; b < p->batch; b++)
        for (size_t j = 0; j < p->columns; j++)
            out[(b / 16 * p->padded + j / 2 * 2) * 16 + b % 16 * 2 + j % 2] = x[b * p->columns + j];
}

static int run(struct product *p, enum order order, enum isa level, const void *x, int bf16, int threads) {
    static const parallel_body bodies[] = {
        fma_portable,
#if OTTAVA_X86
        fma_avx2, fma_avx512,
#endif
    };
    parallel_body body = bodies[level];
    p->padded = (p->columns + STEP - 1) / STEP * STEP;
    const size_t lines = order == ORDER_AMX ? (p->batch + 31) / 32 * 32 : p->batch;
    const size_t bytes = lines * p->padded * (order == ORDER_FMA ? sizeof(float) : sizeof(uint16_t));
    void *packed = aligned_alloc(64, bytes);
    if (!packed)
        return -1;
    memset(packed, 0, bytes);
    if (order == ORDER_FMA)
        pack_fma(packed, p, x, bf16, level == ISA_AVX512);
    else if (order == ORDER_DOT)
        pack_dot(packed, p, x);
    else
        pack_amx(packed, p, x);
    p->x = packed;
#if OTTAVA_X86
    if (order != ORDER_FMA)
        body = order == ORDER_DOT ? dot_avx512 : sum_amx;
#endif
    parallel_for((p->rows + PANEL - 1) / PANEL, threads, body, p);
    free(packed);
    return 0;
}

/* matmul(order, level, x, x_is_bf16, weight, scales, y, batch, rows, columns, threads); scales 0: weight is BF16. */
static PyObject *matmul(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    size_t value[11];
    if (count != 11) {
        PyErr_SetString(PyExc_TypeError, "matmul takes 11 arguments");
        return NULL;
    }
    for (int i = 0; i < 11; i++) {
        value[i] = PyLong_AsSize_t(args[i]);
        if (value[i] == (size_t)-1 && PyErr_Occurred())
            return NULL;
    }
    struct product p = {.scales = (const uint8_t *)value[5], .y = (float *)value[6]};
    p.codes = p.scales ? (const uint8_t *)value[4] : NULL;
    p.bf16 = p.scales ? NULL : (const uint16_t *)value[4];
    p.batch = value[7], p.rows = value[8], p.columns = value[9];
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run(&p, (enum order)value[0], (enum isa)value[1], (const void *)value[2], value[3] != 0, (int)value[10]);
    Py_END_ALLOW_THREADS
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* The orders of this machine; the kernel is asked for the AMX registers here, once for the whole process. */
static PyObject *orders(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    long found = 1 << ORDER_FMA;
#if OTTAVA_X86
    if (isa_best() == ISA_AVX512 && __builtin_cpu_supports("avx512bf16")) {
        found |= 1 << ORDER_DOT;
        if (amx_granted())
            found |= 1 << ORDER_AMX;
    }
#endif
    return PyLong_FromLong(found);
}

PyMethodDef matmul_methods[] = {
    {"matmul", (PyCFunction)(void (*)(void))matmul, METH_FASTCALL, "y = x w^T; see matmul.h."},
    {"matmul_orders", orders, METH_NOARGS, "Bits of the orders of summation here: 1 fma, 2 dot, 4 amx."},
    {NULL, NULL, 0, NULL},
};
