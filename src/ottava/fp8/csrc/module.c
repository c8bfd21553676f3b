/* The Python module: which instruction sets there are, threads, and the functions of the other files. */
#define _GNU_SOURCE
#include "kernels.h"

#include <dlfcn.h>

enum isa isa_best(void) {
#if OTTAVA_X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return ISA_AVX512;
    if (avx2)
        return ISA_AVX2;
#endif
    return ISA_PORTABLE;
}

/* A second OpenMP runtime would put its threads in the way of torch's, which spin between operations; so the one
 * that torch has loaded for the whole process is looked up by name. */
typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*omp_query)(void);

struct region {
    size_t count;
    parallel_body body;
    void *context;
    omp_query thread, threads;
};

static void share(void *argument) {
    const struct region *region = argument;
    size_t thread = (size_t)region->thread(), threads = (size_t)region->threads();
    size_t first = region->count * thread / threads, last = region->count * (thread + 1) / threads;
    if (first < last)
        region->body(region->context, first, last);
}

void parallel_for(size_t count, int threads, parallel_body body, void *context) {
    if (threads > 1 && count > 1) {
        gomp_parallel start = (gomp_parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
        struct region region = {count, body, context, (omp_query)dlsym(RTLD_DEFAULT, "omp_get_thread_num"),
                                (omp_query)dlsym(RTLD_DEFAULT, "omp_get_num_threads")};
        if (start && region.thread && region.threads) {
            start(share, &region, (unsigned)threads, 0);
            return;
        }
    }
    if (count)
        body(context, 0, count);
}

static PyObject *best(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(isa_best());
}

static PyMethodDef methods[] = {
    {"best", best, METH_NOARGS, "The highest instruction set here: 0 portable, 1 AVX2, 2 AVX-512."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernels", "Kernels of ottava.fp8, by address; see ottava.fp8.kernels.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void) {
    PyObject *module = PyModule_Create(&definition);
    if (module && (PyModule_AddFunctions(module, codec_methods) || PyModule_AddFunctions(module, matmul_methods) ||
                   PyModule_AddFunctions(module, rows_methods))) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
