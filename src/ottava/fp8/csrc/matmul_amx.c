/* The order `amx`: tiles of 16 rows of weights by 16 rows of x, 32 columns at a time. */
#define _GNU_SOURCE
#include "matmul.h"

#if OTTAVA_X86
#include <cpuid.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX                                                                                                          \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2")))

/* GCC does not know that tile instructions read memory behind the address they are given. */
#define IN_MEMORY(POINTER) __asm__ volatile("" ::"r"(POINTER) : "memory")

int amx_granted(void) {
#ifdef SYS_arch_prctl
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) /* AMX-BF16, AMX-TILE */
        return 0;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

struct tile_config {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

/* A block of 32 rows and up to 128 columns as BF16 tiles, [chunk of 32 columns][row][32]; what is outside is 0. */
AMX static void decode_block(uint16_t *out, const struct product *p, size_t r0, size_t j0, size_t width) {
    const size_t across = (p->columns + BLOCK - 1) / BLOCK;
    const struct fold fold = fold_of(p->codes ? p->scales[r0 / BLOCK * across + j0 / BLOCK] : 127);
    for (size_t i = 0; i < PANEL; i++)
        for (size_t c = 0; c < width; c += 32) {
            const size_t j = j0 + c, at = (r0 + i) * p->columns + j;
            size_t left = r0 + i < p->rows && j < p->columns ? p->columns - j : 0;
            const __mmask32 mask = left < 32 ? (1u << left) - 1 : 0xFFFFFFFF;
            __m512i bits;
            if (p->codes) {
                _mm_prefetch((const char *)(p->codes + at) + 512, _MM_HINT_T1);
                bits = decode(_mm256_maskz_loadu_epi8(mask, p->codes + at), fold);
            } else {
                bits = _mm512_maskz_loadu_epi16(mask, p->bf16 + at);
            }
            _mm512_store_si512(out + (c * PANEL + i * 32), bits);
        }
}

AMX static void store(const struct product *p, size_t r0, size_t b0, const float (*sums)[16]) {
    for (size_t b = 0; b < 16 && b0 + b < p->batch; b++)
        for (size_t i = 0; i < PANEL && r0 + i < p->rows; i++)
            p->y[(b0 + b) * p->rows + r0 + i] = sums[i][b];
}

/* One panel of weights and 32 rows of x from b: sums in tiles 0 to 3, weights in 4 and 5, x in 6 and 7. */
AMX static void panel(const struct product *p, size_t r, size_t b) {
    _Alignas(64) uint16_t blocks[2][PANEL * BLOCK];
    _Alignas(64) float sums[PANEL][16];
    const int both = b + 16 < p->batch;
    const uint16_t *x = (const uint16_t *)p->x + b * p->padded, *y = x + 16 * p->padded;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t j = 0; j < p->padded; j += BLOCK) {
        const size_t width = p->padded - j < BLOCK ? p->padded - j : BLOCK;
        uint16_t *block = blocks[j / BLOCK % 2];
        decode_block(block, p, r, j, width);
        IN_MEMORY(block);
        for (size_t c = 0; c < width; c += 32) {
            _tile_loadd(4, block + c * PANEL, 64);
            _tile_loadd(5, block + c * PANEL + 16 * 32, 64);
            _tile_loadd(6, x + (j + c) * 16, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (both) {
                _tile_loadd(7, y + (j + c) * 16, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 16, 64);
    IN_MEMORY(sums);
    store(p, r, b, (const float(*)[16])sums);
    if (both) {
        _tile_stored(2, sums, 64);
        _tile_stored(3, sums + 16, 64);
        IN_MEMORY(sums);
        store(p, r, b + 16, (const float(*)[16])sums);
    }
}

AMX void sum_amx(void *product, size_t first, size_t last) {
    const struct product *p = product;
    struct tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++)
        config.bytes[i] = 64, config.rows[i] = 16;
    IN_MEMORY(&config);
    _tile_loadconfig(&config);
    for (size_t r = first * PANEL; r < last * PANEL && r < p->rows; r += PANEL)
        for (size_t b = 0; b < p->batch; b += 32)
            panel(p, r, b);
    _tile_release();
}
#endif
