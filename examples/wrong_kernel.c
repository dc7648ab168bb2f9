/* A q4_0 decoder as somebody might write it for a GPU, with one bug: it takes the nibbles of a byte
 * for neighbours, where they belong to the two halves of the block. */
#include <stdio.h>
#include <sys/stat.h>

#include "tbq_vectors.h"

static float half(const unsigned char * p) {
    const unsigned h = p[0] | p[1] << 8, e = h >> 10 & 31, m = h & 1023;
    const float v = e == 0 ? ldexpf((float) m, -24) : e == 31 ? (m ? NAN : INFINITY) : ldexpf((float) (m | 1024), (int) e - 25);
    return h >> 15 ? -v : v;
}

static void dequantize(const unsigned char * block, float * y, size_t n) {
    for (size_t b = 0; b < n / 32; b++, block += 18, y += 32) {
        for (int i = 0; i < 16; i++) {
            y[2 * i] = half(block) * ((block[2 + i] & 15) - 8);     /* wrong: y[i] */
            y[2 * i + 1] = half(block) * ((block[2 + i] >> 4) - 8); /* wrong: y[i + 16] */
        }
    }
}

static int write_actual(const char * folder, const tbqv_file * out, const void * data) {
    char path[1024], * slash = path;
    snprintf(path, sizeof path, "%s/%s", folder, out->path);
    while ((slash = strchr(slash + 1, '/'))) { *slash = 0; mkdir(path, 0777); *slash = '/'; }
    FILE * file = fopen(path, "wb");
    if (file == NULL) return -1;
    const size_t n = fwrite(data, 1, out->n_bytes, file);
    return fclose(file) == 0 && n == out->n_bytes ? 0 : -1;
}

int main(int argc, char ** argv) {
    tbqv_set set;
    if (argc != 3 || tbqv_open(&set, argv[1]) != 0) return 3;
    int differ = 0;
    for (int i = 0; i < set.n_cases; i++) {
        tbqv_case * c = &set.cases[i];
        if (strcmp(c->op, "dequantize") || tbqv_load(&set, c) != 0) continue;
        const tbqv_file * in = tbqv_find(c, "packed"), * out = tbqv_output(c);
        float * y = malloc(out->n_bytes);
        dequantize(in->data, y, out->count);
        const tbqv_result r = tbqv_compare(c, y);
        printf("%s: %s\n", c->id, r.text);
        differ += memcmp(out->data, y, out->n_bytes) != 0;
        if (write_actual(argv[2], out, y) != 0) return 3;
        free(y);
        tbqv_unload(c);
    }
    tbqv_close(&set);
    return differ > 0;
}
