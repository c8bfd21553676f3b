/* What the kernels share: instruction sets, threads, and how arguments arrive.
 *
 * Python passes addresses and sizes that ottava.fp8.kernels has checked; nothing here checks them again.
 * Every function comes in up to three versions that give the same bits: AVX-512, AVX2 and portable C. */
#ifndef OTTAVA_KERNELS_H
#define OTTAVA_KERNELS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define OTTAVA_X86 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2")))
#else
#define OTTAVA_X86 0
#endif

/* Levels as Python names them; a level may be asked for only where isa_best() reaches it. */
enum isa { ISA_PORTABLE = 0, ISA_AVX2 = 1, ISA_AVX512 = 2 };

enum isa isa_best(void);

/* Calls body(context, first, last) so that all of 0..count is covered once, on at most `threads` threads: those
 * of the OpenMP runtime that torch has loaded, where there is one, else on this thread alone. The cut depends on
 * count and threads only. Call it without the GIL. */
typedef void (*parallel_body)(void *context, size_t first, size_t last);
void parallel_for(size_t count, int threads, parallel_body body, void *context);

extern PyMethodDef codec_methods[];
extern PyMethodDef matmul_methods[];
extern PyMethodDef rows_methods[];

#endif
