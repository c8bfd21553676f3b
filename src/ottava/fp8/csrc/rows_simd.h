/* The kernels of rows.h in lanes of 16, included once for each instruction set; rows_*.c say what the words mean:
 * FN an inlined function, BODY one that is called, SET the name of the result, and on `lanes` of 16 float32
 * zero_, set_, load_, store_, widen_ (BF16), narrow_ (to BF16, to nearest even), even_ and odd_ (of 16 pairs of BF16), add_,
 * sub_, mul_, div_, max_, min_, fma_, raise_ (by a power of two), sum_, each_sum_ (of 16 lanes), largest_; ROWS rows of a product at a time; decode,
 * and flushing (mode of the arithmetic; times_ where there is none). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

FN lanes some_(const float *x, size_t count) { /* the first `count`, then 0 */
    if (count >= 16)
        return load_(x);
    float part[16] = {0};
    memcpy(part, x, count * sizeof *x);
    return load_(part);
}

FN lanes cached(const void *base, size_t at, size_t count, const int wide) {
    if (wide)
        return some_((const float *)base + at, count);
    const uint16_t *x = (const uint16_t *)base + at;
    if (count >= 16)
        return widen_(x);
    uint16_t part[16] = {0};
    memcpy(part, x, count * sizeof *x);
    return widen_(part);
}

FN void keep(void *base, size_t at, lanes value, size_t count, const int wide) {
    if (wide) {
        float part[16], *out = (float *)base + at;
        store_(count >= 16 ? out : part, value);
        if (count < 16)
            memcpy(out, part, count * sizeof *part);
    } else {
        uint16_t part[16], *out = (uint16_t *)base + at;
        narrow_(count >= 16 ? out : part, value);
        if (count < 16)
            memcpy(out, part, count * sizeof *part);
    }
}

/* exp, within 2 units in the last place, for x in [-87, 88]; what is below or above counts as the bound. */
FN lanes exp_(lanes x) {
    const lanes shift = set_(12582912.0f); /* 1.5 * 2^23: what is added to it is rounded to an integer */
    x = min_(max_(x, set_(-87.0f)), set_(88.0f));
    const lanes t = fma_(x, set_(1.44269504f), shift), n = sub_(t, shift);
    lanes r = fma_(n, set_(-0.693145752f), x), p = set_(1.0f / 5040);
    r = fma_(n, set_(-1.42860677e-6f), r);
    p = fma_(p, r, set_(1.0f / 720));
    p = fma_(p, r, set_(1.0f / 120));
    p = fma_(p, r, set_(1.0f / 24));
    p = fma_(p, r, set_(1.0f / 6));
    p = fma_(p, r, set_(0.5f));
    p = fma_(p, r, set_(1.0f));
    return raise_(fma_(p, r, set_(1.0f)), t);
}

FN lanes sigmoid_(lanes x) { return div_(set_(1.0f), add_(set_(1.0f), exp_(sub_(zero_(), x)))); }

/* ---- products */

FN float pair_of(const void *x, size_t j, const int odd, const int wide) {
    if (wide)
        return ((const float *)x)[j + odd];
    const uint32_t bits = (uint32_t)((const uint16_t *)x)[j + odd] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

struct strip { /* one block of columns of one group of outputs */
    const uint16_t *w;
    const void *x;
    float *y;
    size_t pairs, x_row, y_row;
    int first;
};

FN void tile(const struct strip *s, size_t b, const int rows, const int wide) {
    const size_t size = wide ? sizeof(float) : sizeof(uint16_t);
    const char *x = (const char *)s->x + b * s->x_row * size;
    float *y = s->y + b * s->y_row;
    lanes sum[ROWS][PANELS];
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < PANELS; c++)
            sum[i][c] = s->first ? zero_() : load_(y + (size_t)i * s->y_row + 16 * c);
    for (size_t j = 0; j < s->pairs; j++)
        for (int c = 0; c < PANELS; c++) {
            const uint16_t *w = s->w + ((size_t)c * s->pairs + j) * 32;
            const lanes odd = odd_(w), even = even_(w);
            for (int i = 0; i < rows; i++) {
                const char *line = x + (size_t)i * s->x_row * size;
                sum[i][c] = times_(odd, set_(pair_of(line, 2 * j, 1, wide)), sum[i][c]);
                sum[i][c] = times_(even, set_(pair_of(line, 2 * j, 0, wide)), sum[i][c]);
            }
        }
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < PANELS; c++)
            store_(y + (size_t)i * s->y_row + 16 * c, sum[i][c]);
}

BODY void strip_of(const struct strip *s, size_t rows, int wide) {
    size_t b = 0;
    for (; b + ROWS <= rows; b += ROWS)
        if (wide)
            tile(s, b, ROWS, 1);
        else
            tile(s, b, ROWS, 0);
    for (; b < rows; b++)
        if (wide)
            tile(s, b, 1, 1);
        else
            tile(s, b, 1, 0);
}

/* multiply: strip_of, or a faster one with the same bits. */
FN void groups(const struct panels *p, size_t first, size_t last,
               void (*multiply)(const struct strip *, size_t, int)) {
    _Alignas(64) uint16_t decoded[GROUP_OF * BLOCK];
    const size_t across = (p->columns + BLOCK - 1) / BLOCK;
    float *edge = NULL;
    for (size_t g = first; g < last; g++) {
        struct strip s = {NULL, NULL, p->y + g * GROUP_OF, 0, p->x_row, p->y_row, 1};
        const size_t outputs = p->outputs - g * GROUP_OF;
        if (outputs < GROUP_OF) { /* the last group: what lies beyond its outputs is not ours to write */
            edge = malloc(p->rows * GROUP_OF * sizeof *edge);
            if (!edge)
                abort();
            s.y = edge, s.y_row = GROUP_OF;
        }
        for (size_t j = 0; j < p->columns; j += BLOCK, s.first = 0) {
            const size_t at = (g * p->columns + j) * GROUP_OF;
            s.pairs = (p->columns - j < BLOCK ? p->columns - j : BLOCK) / 2;
            s.x = (const char *)p->x + j * (p->wide ? sizeof(float) : sizeof(uint16_t));
            s.w = p->codes ? decoded : p->bf16 + at;
            if (p->codes)
                decode_all(decoded, p->codes + at, s.pairs * 2 * GROUP_OF, p->scales[g * across + j / BLOCK]);
            multiply(&s, p->rows, p->wide);
        }
        if (edge)
            for (size_t b = 0; b < p->rows; b++)
                memcpy(p->y + b * p->y_row + g * GROUP_OF, edge + b * GROUP_OF, outputs * sizeof *edge);
        free(edge);
        edge = NULL;
    }
}

BODY __attribute__((noinline)) void all_groups(const struct panels *p, size_t first, size_t last) {
    groups(p, first, last, strip_of);
}

BODY void product(void *context, size_t first, size_t last) { /* the calls keep arithmetic on its side of the mode */
    const unsigned mode = flushing();
    all_groups(context, first, last);
    restored(mode);
}

/* ---- a row at a time */

BODY void norm(void *context, size_t first, size_t last) {
    const struct norm *p = context;
    for (size_t r = first; r < last; r++)
        for (size_t h = 0; h < p->heads; h++) {
            float *x = p->x + r * p->x_row + h * p->width;
            lanes squares = zero_();
            for (size_t j = 0; j < p->width; j += 16) {
                const size_t count = p->width - j;
                lanes v = some_(x + j, count);
                if (p->add) {
                    v = add_(v, some_(p->add + r * p->add_row + h * p->width + j, count));
                    keep(x, j, v, count, 1);
                }
                squares = fma_(v, v, squares);
            }
            const lanes scale = set_(1.0f / sqrtf(sum_(squares) / (float)p->width + p->epsilon));
            for (size_t j = 0; j < p->width; j += 16) {
                const lanes v = mul_(mul_(some_(x + j, p->width - j), scale), some_(p->weight + j, p->width - j));
                if (p->wide)
                    keep(p->out, r * p->out_row + h * p->width + j, v, p->width - j, 1);
                else
                    keep(p->out, r * p->out_row + h * p->width + j, v, p->width - j, 0);
            }
        }
}

BODY void silu(void *context, size_t first, size_t last) {
    const struct silu *p = context;
    for (size_t r = first; r < last; r++)
        for (size_t j = 0; j < p->width; j += 16) {
            const float *x = p->x + r * p->x_row + j;
            const lanes gate = some_(x, p->width - j), up = some_(x + p->width, p->width - j);
            const lanes y = mul_(mul_(gate, sigmoid_(gate)), up);
            if (p->wide)
                keep(p->out, r * p->out_row + j, y, p->width - j, 1);
            else
                keep(p->out, r * p->out_row + j, y, p->width - j, 0);
        }
}

BODY void sigmoid(float *x, size_t count) {
    for (size_t j = 0; j < count; j += 16)
        keep(x, j, sigmoid_(some_(x + j, count - j)), count - j, 1);
}

/* ---- attention */

enum { TOGETHER = 4 }; /* queries that meet a key as it is read */

/* Scores of `queries` queries (each `padded` numbers, zeros at the end) over n keys, into lines of `line` numbers. */
FN void scores(float *out, size_t line, const float *q, size_t padded, const void *cache, size_t at, size_t n,
               const struct attention *p, const int queries, const int wide) {
    const int whole = p->width % 16 == 0;
    for (size_t k = 0; k < n; k += 16) {
        lanes sums[TOGETHER][16];
        const size_t count = n - k < 16 ? n - k : 16;
        for (size_t i = 0; i < count; i++, at += p->size) {
            lanes sum[TOGETHER];
            for (int g = 0; g < queries; g++)
                sum[g] = zero_();
            for (size_t j = 0; j < p->width; j += 16) {
                const lanes key = cached(cache, at + j, whole ? 16 : p->width - j, wide);
                for (int g = 0; g < queries; g++)
                    sum[g] = fma_(load_(q + (size_t)g * padded + j), key, sum[g]);
            }
            for (int g = 0; g < queries; g++)
                sums[g][i] = sum[g];
        }
        for (int g = 0; g < queries; g++) {
            for (size_t i = count; i < 16; i++)
                sums[g][i] = zero_();
            store_(out + (size_t)g * line + k, mul_(each_sum_(sums[g]), set_(p->scale)));
        }
    }
}

/* Scores to their exponentials, zeros at the end of the line; returns 1 / their sum. */
FN float softmax(float *scores, size_t line, size_t n) {
    lanes most = set_(-INFINITY), sum = zero_();
    for (size_t k = n; k < line; k++)
        scores[k] = -INFINITY;
    for (size_t k = 0; k < line; k += 16)
        most = max_(most, load_(scores + k));
    most = set_(largest_(most));
    for (size_t k = 0; k < line; k += 16)
        store_(scores + k, exp_(sub_(load_(scores + k), most)));
    for (size_t k = n; k < line; k++)
        scores[k] = 0.0f;
    for (size_t k = 0; k < line; k += 16)
        sum = add_(sum, load_(scores + k));
    return 1.0f / sum_(sum);
}

/* `chunks` times 16 columns of the values, for `queries` queries. */
FN void values(const struct attention *p, size_t out, size_t column, const float *shares, size_t line,
               const float *inverse, const void *cache, size_t at, size_t n, const int queries, const int chunks,
               const int wide) {
    lanes sum[TOGETHER][4];
    const size_t left = p->value_width - column;
    for (int g = 0; g < queries; g++)
        for (int c = 0; c < chunks; c++)
            sum[g][c] = zero_();
    for (size_t k = 0; k < n; k++, at += p->size)
        for (int c = 0; c < chunks; c++) {
            const lanes value = cached(cache, at + column + 16 * (size_t)c, chunks > 1 ? 16 : left, wide);
            for (int g = 0; g < queries; g++)
                sum[g][c] = fma_(set_(shares[(size_t)g * line + k]), value, sum[g][c]);
        }
    for (int g = 0; g < queries; g++)
        for (int c = 0; c < chunks; c++)
            keep(p->out, out + (size_t)g * p->value_width + column + 16 * (size_t)c, mul_(sum[g][c], set_(inverse[g])),
                 left - 16 * (size_t)c, wide);
}

FN void attend(const struct attention *p, size_t row, size_t head, size_t query, float *room, size_t line,
               const int queries, const int wide) {
    const size_t n = p->counts[row], padded = (p->width + 15) / 16 * 16, first = head * p->group + query;
    const void *cache = (const void *)p->caches[row];
    const size_t piece = p->lengths[row] * p->size, out = row * p->out_row + first * p->value_width;
    const size_t at = (p->values + head) * piece;
    float *q = room + TOGETHER * line, inverse[TOGETHER];
    memset(q, 0, TOGETHER * padded * sizeof *q);
    for (int g = 0; g < queries; g++)
        memcpy(q + (size_t)g * padded, p->q + row * p->q_row + (first + (size_t)g) * p->width, p->width * sizeof *q);
    scores(room, line, q, padded, cache, head * piece, n, p, queries, wide);
    for (int g = 0; g < queries; g++)
        inverse[g] = softmax(room + (size_t)g * line, line, n);
    size_t column = 0;
    for (; column + 64 <= p->value_width; column += 64)
        values(p, out, column, room, line, inverse, cache, at, n, queries, 4, wide);
    for (; column < p->value_width; column += 16)
        values(p, out, column, room, line, inverse, cache, at, n, queries, 1, wide);
}

FN void attend_some(const struct attention *p, size_t row, size_t head, size_t query, float *room, size_t line,
                    const int wide) {
    switch (p->group - query) {
    case 1: attend(p, row, head, query, room, line, 1, wide); break;
    case 2: attend(p, row, head, query, room, line, 2, wide); break;
    case 3: attend(p, row, head, query, room, line, 3, wide); break;
    default: attend(p, row, head, query, room, line, TOGETHER, wide);
    }
}

BODY void attention(void *context, size_t first, size_t last) {
    const struct attention *p = context;
    size_t most = 0;
    for (size_t i = first; i < last; i++)
        if (p->counts[i / p->heads] > most)
            most = p->counts[i / p->heads];
    const size_t padded = (p->width + 15) / 16 * 16, all = (most + 15) / 16 * 16;
    float *room = aligned_alloc(64, TOGETHER * (all + padded) * sizeof *room);
    if (!room)
        abort();
    for (size_t i = first; i < last; i++) {
        const size_t row = i / p->heads, head = i % p->heads, line = (p->counts[row] + 15) / 16 * 16;
        for (size_t query = 0; query < p->group; query += TOGETHER)
            if (p->wide)
                attend_some(p, row, head, query, room, line, 1);
            else
                attend_some(p, row, head, query, room, line, 0);
    }
    free(room);
}
