/* The codec's face to Python: arguments, the choice of instruction set, and the cut into blocks and threads. */
#include "codec.h"

static const struct codec *set_of(int level) {
#if OTTAVA_X86
    if (level == ISA_AVX512)
        return &codec_avx512;
    if (level == ISA_AVX2)
        return &codec_avx2;
#endif
    (void)level;
    return &codec_portable;
}

/* A tensor [batch, rows, columns]: an address, and bytes from one matrix and one row to the next. */
struct array {
    unsigned long long address;
    Py_ssize_t matrix, row;
};

static char *at(const struct array *a, size_t matrix, size_t row) {
    return (char *)(uintptr_t)a->address + (Py_ssize_t)matrix * a->matrix + (Py_ssize_t)row * a->row;
}

struct work {
    const struct codec *set;
    int level, threads, type, stream, bad;
    Py_ssize_t batch, rows, columns, block_rows, block_columns;
    size_t down, across; /* blocks in a matrix */
    struct array w, codes, out;
    unsigned long long scales, sums;
};

static int begin(struct work *work) {
    work->set = set_of(work->level);
    work->down = ((size_t)work->rows + (size_t)work->block_rows - 1) / (size_t)work->block_rows;
    work->across = ((size_t)work->columns + (size_t)work->block_columns - 1) / (size_t)work->block_columns;
    return (int)work->level <= (int)isa_best();
}

static size_t blocks(const struct work *work) { return (size_t)work->batch * work->down * work->across; }

static struct tile tile_of(const struct work *work, size_t block) {
    size_t matrix = block / (work->down * work->across), i = block / work->across % work->down, j = block % work->across;
    size_t row = i * (size_t)work->block_rows, column = j * (size_t)work->block_columns;
    size_t rows = (size_t)work->rows - row, columns = (size_t)work->columns - column;
    struct tile tile = {
        .w_row = (size_t)work->w.row,
        .codes_row = (size_t)work->codes.row,
        .out_row = (size_t)work->out.row,
        .rows = rows < (size_t)work->block_rows ? rows : (size_t)work->block_rows,
        .columns = columns < (size_t)work->block_columns ? columns : (size_t)work->block_columns,
        .type = work->type,
        .stream = work->stream,
    };
    if (work->w.address)
        tile.w = at(&work->w, matrix, row) + column * width(work->type);
    if (work->codes.address)
        tile.codes = (uint8_t *)at(&work->codes, matrix, row) + column;
    if (work->out.address) /* what is measured is written in BF16, whatever was read */
        tile.out = at(&work->out, matrix, row) + column * (work->sums ? 2 : width(work->type));
    return tile;
}

static uint8_t *scale_of(const struct work *work, size_t block) { return (uint8_t *)(uintptr_t)work->scales + block; }

/* spec.scale_byte; 0 where the largest magnitude is infinity or NaN. */
static int scale_byte(uint32_t amax) {
    if (amax >= INFINITY_BITS)
        return 0;
    if (amax <= 1u << 22) /* 2^-127 */
        return BYTE_ZERO;
    /* 464 is 1.8125 * 2^8: a larger fraction carries into the exponent */
    int k = (int)((amax + (0x7FFFFF - 0x680000)) >> 23) - 8;
    return k < BYTE_MIN ? BYTE_MIN : k > BYTE_MAX ? BYTE_MAX : k;
}

static void finish_streams(const struct work *work) {
#if OTTAVA_X86
    if (work->stream)
        _mm_sfence();
#else
    (void)work;
#endif
}

static void find_scales(void *context, size_t first, size_t last) {
    struct work *work = context;
    for (size_t block = first; block < last; block++) {
        struct tile tile = tile_of(work, block);
        int k = scale_byte(work->set->amax(&tile));
        if (!k)
            __atomic_store_n(&work->bad, 1, __ATOMIC_RELAXED);
        *scale_of(work, block) = (uint8_t)k;
    }
}

static void quantise_blocks(void *context, size_t first, size_t last) {
    struct work *work = context;
    struct tile tile = tile_of(work, first), next;
    for (size_t block = first; block < last; block++, tile = next) {
        next = tile_of(work, block + 1 < last ? block + 1 : block);
        tile.next = block + 1 < last ? next.w : NULL;
        tile.k = scale_byte(work->set->amax(&tile));
        if (!tile.k) {
            __atomic_store_n(&work->bad, 1, __ATOMIC_RELAXED);
            break;
        }
        *scale_of(work, block) = (uint8_t)tile.k;
        work->set->quantise(&tile);
        if (work->sums)
            work->set->measure(&tile, ((sums *)(uintptr_t)work->sums)[block]);
    }
    finish_streams(work);
}

static void project_blocks(void *context, size_t first, size_t last) {
    struct work *work = context;
    for (size_t block = first; block < last; block++) {
        struct tile tile = tile_of(work, block);
        tile.k = *scale_of(work, block);
        work->set->project(&tile);
    }
}

static void measure_blocks(void *context, size_t first, size_t last) {
    struct work *work = context;
    for (size_t block = first; block < last; block++) {
        struct tile tile = tile_of(work, block);
        tile.k = *scale_of(work, block);
        work->set->measure(&tile, ((sums *)(uintptr_t)work->sums)[block]);
    }
}

/* Row by row, as memory lies: the scales are known. */
static void dequantise_rows(void *context, size_t first, size_t last) {
    struct work *work = context;
    for (size_t row = first; row < last; row++) {
        size_t matrix = row / (size_t)work->rows, i = row % (size_t)work->rows;
        size_t block = (matrix * work->down + i / (size_t)work->block_rows) * work->across;
        struct tile tile = tile_of(work, block);
        tile.codes = (uint8_t *)at(&work->codes, matrix, i);
        tile.out = at(&work->out, matrix, i);
        tile.rows = 1;
        tile.columns = (size_t)work->columns;
        tile.part = (size_t)work->block_columns;
        tile.scales = scale_of(work, block);
        work->set->dequantise(&tile);
    }
    finish_streams(work);
}

static PyObject *outcome(struct work *work, parallel_body first, parallel_body second, size_t count) {
    Py_BEGIN_ALLOW_THREADS
    parallel_for(count, work->threads, first, work);
    if (second && !work->bad)
        parallel_for(count, work->threads, second, work);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(!work->bad);
}

static PyObject *no_level(void) {
    PyErr_SetString(PyExc_ValueError, "this machine lacks that instruction set");
    return NULL;
}

/* Whether whole aligned cache lines are written, and so many bytes that the caches would not keep them. */
static int worth_streaming(const struct array *out, size_t row_bytes, size_t bytes) {
    return bytes >= STREAM_FROM && out->address % 64 == 0 && out->matrix % 64 == 0 && out->row % 64 == 0 &&
           row_bytes % 64 == 0;
}

#define SIZES &work.level, &work.threads, &work.batch, &work.rows, &work.columns, &work.type
#define ARRAY(a) &work.a.address, &work.a.matrix, &work.a.row

static PyObject *quantise(PyObject *self, PyObject *arguments) {
    struct work work = {.block_rows = BLOCK, .block_columns = BLOCK};
    (void)self;
    if (!PyArg_ParseTuple(arguments, "ii(nnn)i(Knn)(Knn)K", SIZES, ARRAY(w), ARRAY(codes), &work.scales))
        return NULL;
    if (!begin(&work))
        return no_level();
    size_t bytes = (size_t)work.batch * (size_t)work.rows * (size_t)work.columns;
    work.stream = worth_streaming(&work.codes, (size_t)work.columns, bytes);
    return outcome(&work, quantise_blocks, NULL, blocks(&work));
}

static PyObject *dequantise(PyObject *self, PyObject *arguments) {
    struct work work = {0};
    (void)self;
    if (!PyArg_ParseTuple(arguments, "ii(nnn)i(Knn)K(Knn)nn", SIZES, ARRAY(codes), &work.scales, ARRAY(out),
                          &work.block_rows, &work.block_columns))
        return NULL;
    if (!begin(&work))
        return no_level();
    size_t rows = (size_t)work.batch * (size_t)work.rows, row_bytes = (size_t)work.columns * width(work.type);
    work.stream = worth_streaming(&work.out, row_bytes, rows * row_bytes) &&
                  (size_t)work.block_columns * width(work.type) % 64 == 0; /* each block starts a cache line too */
    return outcome(&work, dequantise_rows, NULL, rows);
}

static PyObject *project(PyObject *self, PyObject *arguments) {
    struct work work = {.block_rows = BLOCK, .block_columns = BLOCK};
    (void)self;
    if (!PyArg_ParseTuple(arguments, "ii(nnn)i(Knn)(Knn)K", SIZES, ARRAY(w), ARRAY(out), &work.scales))
        return NULL;
    if (!begin(&work))
        return no_level();
    return outcome(&work, find_scales, project_blocks, blocks(&work));
}

static PyObject *errors(const struct work *work) {
    double total[3] = {0};
    for (size_t block = 0; block < blocks(work); block++)
        for (int i = 0; i < 3; i++)
            total[i] += ((const sums *)(uintptr_t)work->sums)[block][i];
    return Py_BuildValue("Ldd", (long long)total[0], total[1], total[2]);
}

static PyObject *measured(PyObject *arguments, parallel_body body) {
    struct work work = {.block_rows = BLOCK, .block_columns = BLOCK};
    if (!PyArg_ParseTuple(arguments, "ii(nnn)i(Knn)(Knn)K(Knn)K", SIZES, ARRAY(w), ARRAY(codes), &work.scales,
                          ARRAY(out), &work.sums))
        return NULL;
    if (!begin(&work))
        return no_level();
    Py_DECREF(outcome(&work, body, NULL, blocks(&work)));
    if (work.bad)
        Py_RETURN_NONE;
    return errors(&work);
}

static PyObject *quantise_measured(PyObject *self, PyObject *arguments) {
    (void)self;
    return measured(arguments, quantise_blocks);
}

static PyObject *measure(PyObject *self, PyObject *arguments) {
    (void)self;
    return measured(arguments, measure_blocks);
}

static PyObject *byte_range(PyObject *self, PyObject *arguments) {
    unsigned long long address;
    Py_ssize_t count;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "Kn", &address, &count))
        return NULL;
    const uint8_t *bytes = (const uint8_t *)(uintptr_t)address;
    uint8_t least = 255, most = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        least = bytes[i] < least ? bytes[i] : least;
        most = bytes[i] > most ? bytes[i] : most;
    }
    return Py_BuildValue("ii", least, most);
}

PyMethodDef codec_methods[] = {
    {"quantise", quantise, METH_VARARGS, "(level, threads, sizes, type, w, codes, scales) -> whether all was finite"},
    {"dequantise", dequantise, METH_VARARGS, "(level, threads, sizes, type, codes, scales, out, rows, columns)"},
    {"project", project, METH_VARARGS, "(level, threads, sizes, type, w, out, scales) -> whether all was finite"},
    {"quantise_measured", quantise_measured, METH_VARARGS,
     "(level, threads, sizes, type, w, codes, scales, out, sums) -> (changed, signal, noise), or None as quantise False"},
    {"measure", measure, METH_VARARGS,
     "(level, threads, sizes, type, w, codes, scales, out, sums) -> (changed, signal, noise)"},
    {"byte_range", byte_range, METH_VARARGS, "(address, count) -> (least, most)"},
    {NULL, NULL, 0, NULL},
};
