/* tbq_vectors.h: load golden vectors and compare, in C99 or C++, without dependencies.
 *
 *     tbqv_set set;
 *     if (tbqv_open(&set, "vectors") != 0) { fputs(set.error, stderr); return 3; }
 *     for (int i = 0; i < set.n_cases; i++) {
 *         tbqv_case *c = &set.cases[i];
 *         if (strcmp(c->op, "dequantize") || strcmp(c->format, "pr21089:tbq3_0")) continue;
 *         if (tbqv_load(&set, c) != 0) { fputs(set.error, stderr); return 3; }
 *         const tbqv_file *in = tbqv_find(c, "packed"), *out = tbqv_output(c);
 *         float *y = (float *) malloc(out->n_bytes);
 *         my_kernel(in->data, y, out->count);
 *         tbqv_result r = tbqv_compare(c, y);
 *         printf("%s: %s\n", c->id, r.text);
 *         free(y);
 *         tbqv_unload(c);
 *     }
 *     tbqv_close(&set);
 *
 * Write y to DIR/<out->path> instead, and `tbq-vectors check VECTORS DIR` says what is wrong with it.
 * Files are little-endian; so must be the machine. CC0-1.0, like the vectors.
 */
#ifndef TBQ_VECTORS_H
#define TBQ_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TBQV_FILES 12
#define TBQV_LINE 1024

typedef struct {
    char    kind[8];  /* in, out, tap or mask */
    char    role[32]; /* x, packed, y, q, p, sibling, scores, sum, norm, coordinates, codes, ... */
    char    path[256];
    int     is_float; /* float32, else bytes */
    size_t  count;    /* values in the file */
    size_t  group;    /* values that are compared together: a block, a row, a head */
    size_t  n_bytes;
    void  * data;     /* after tbqv_load */
} tbqv_file;

typedef struct {
    char      id[256];
    char      op[32];
    char      format[64];
    char      match[16]; /* exact, boundary, cost or nmse */
    double    limit;
    int       n_files;
    tbqv_file files[TBQV_FILES];
} tbqv_case;

typedef struct {
    char        folder[512];
    int         n_cases;
    tbqv_case * cases;
    char        error[TBQV_LINE + 512];
} tbqv_set;

/* verdict 0: exact; 1: within the case's rule; 2: wrong */
typedef struct {
    int    verdict;
    size_t n_wrong; /* bytes or values outside the rule */
    size_t first;   /* the first of them */
    double nmse;    /* of floats: the largest of any group */
    char   text[160];
} tbqv_result;

static int tbqv__fail(tbqv_set * set, const char * what, const char * name) {
    snprintf(set->error, sizeof(set->error), "%s: %.*s\n", what, TBQV_LINE, name);
    return -1;
}

static void tbqv_unload(tbqv_case * c) {
    for (int i = 0; i < c->n_files; i++) {
        free(c->files[i].data);
        c->files[i].data = NULL;
    }
}

static void tbqv_close(tbqv_set * set) {
    for (int i = 0; i < set->n_cases; i++) {
        tbqv_unload(&set->cases[i]);
    }
    free(set->cases);
    set->cases = NULL;
    set->n_cases = 0;
}

/* Read the list of cases, not their files. Returns 0, or -1 with a message in set->error. */
static int tbqv_open(tbqv_set * set, const char * folder) {
    char path[768], line[TBQV_LINE];
    memset(set, 0, sizeof(*set));
    if (strlen(folder) >= sizeof(set->folder)) {
        return tbqv__fail(set, "name too long", folder);
    }
    strcpy(set->folder, folder);
    snprintf(path, sizeof(path), "%s/cases.tsv", folder);
    FILE * f = fopen(path, "rb");
    if (!f) {
        return tbqv__fail(set, "cannot open", path);
    }
    while (fgets(line, sizeof(line), f)) {
        char id[256], op[32], format[64], kind[8], role[32], file[256], dtype[8], match[16];
        unsigned long long count, group;
        double limit;
        const int n = sscanf(line,
            "%255[^\t]\t%31[^\t]\t%63[^\t]\t%7[^:]:%31[^\t]\t%255[^\t]\t%7[^\t]\t%llu\t%llu\t%15[^\t]\t%lf",
            id, op, format, kind, role, file, dtype, &count, &group, match, &limit);
        if (n != 11) {
            fclose(f);
            tbqv_close(set);
            return tbqv__fail(set, "not a line of a table of cases", line);
        }
        if (set->n_cases == 0 || strcmp(set->cases[set->n_cases - 1].id, id) != 0) {
            tbqv_case * more = (tbqv_case *) realloc(set->cases, (set->n_cases + 1) * sizeof(tbqv_case));
            if (!more) {
                fclose(f);
                tbqv_close(set);
                return tbqv__fail(set, "out of memory at", id);
            }
            set->cases = more;
            tbqv_case * c = &set->cases[set->n_cases++];
            memset(c, 0, sizeof(*c));
            strcpy(c->id, id);
            strcpy(c->op, op);
            strcpy(c->format, format);
            strcpy(c->match, match);
            c->limit = limit;
        }
        tbqv_case * c = &set->cases[set->n_cases - 1];
        if (c->n_files == TBQV_FILES) {
            fclose(f);
            tbqv_close(set);
            return tbqv__fail(set, "too many files in case", id);
        }
        tbqv_file * entry = &c->files[c->n_files++];
        strcpy(entry->kind, kind);
        strcpy(entry->role, role);
        strcpy(entry->path, file);
        entry->is_float = strcmp(dtype, "f32") == 0;
        entry->count = (size_t) count;
        entry->group = (size_t) group;
        entry->n_bytes = (size_t) count * (entry->is_float ? 4 : 1);
    }
    fclose(f);
    return 0;
}

/* Read the files of one case. Returns 0, or -1 with a message in set->error. */
static int tbqv_load(tbqv_set * set, tbqv_case * c) {
    char path[800];
    for (int i = 0; i < c->n_files; i++) {
        tbqv_file * entry = &c->files[i];
        if (entry->data) {
            continue;
        }
        snprintf(path, sizeof(path), "%s/%s", set->folder, entry->path);
        FILE * f = fopen(path, "rb");
        if (!f) {
            return tbqv__fail(set, "cannot open", path);
        }
        entry->data = malloc(entry->n_bytes ? entry->n_bytes : 1);
        const size_t n = entry->data ? fread(entry->data, 1, entry->n_bytes, f) : 0;
        const int more = fgetc(f) != EOF;
        fclose(f);
        if (!entry->data || n != entry->n_bytes || more) {
            return tbqv__fail(set, "wrong size", path);
        }
    }
    return 0;
}

/* The file of a role, or NULL. */
static const tbqv_file * tbqv_find(const tbqv_case * c, const char * role) {
    for (int i = 0; i < c->n_files; i++) {
        if (strcmp(c->files[i].role, role) == 0) {
            return &c->files[i];
        }
    }
    return NULL;
}

/* The file of the expected result. */
static const tbqv_file * tbqv_output(const tbqv_case * c) {
    for (int i = 0; i < c->n_files; i++) {
        if (strcmp(c->files[i].kind, "out") == 0) {
            return &c->files[i];
        }
    }
    return NULL;
}

/* Compare a result, laid out as the expected file, by the case's own rule. Two NaN are equal. The
 * rule "cost" (another walk of a trellis that is as good) needs a decoder: check it with tbq-vectors. */
static tbqv_result tbqv_compare(const tbqv_case * c, const void * actual) {
    tbqv_result r;
    memset(&r, 0, sizeof(r));
    const tbqv_file * out = tbqv_output(c);
    const tbqv_file * mask = tbqv_find(c, "mask");
    size_t n_different = 0;
    double error = 0, total = 0; /* of the current group */
    for (size_t i = 0; i < out->count; i++) {
        int wrong;
        if (out->is_float) {
            const float a = ((const float *) actual)[i], e = ((const float *) out->data)[i];
            const int same = a == e || (a != a && e != e);
            n_different += !same;
            if (isfinite(e) && isfinite(a)) {
                error += ((double) a - e) * ((double) a - e);
                total += (double) e * e;
                wrong = 0;
            } else {
                wrong = isfinite(e) || isfinite(a); /* NaN and infinities are alike */
            }
            if (i + 1 == out->count || (i + 1) % out->group == 0) {
                const double nmse = total > 0 ? error / total : error > 0 ? 1.0 : 0.0;
                wrong |= nmse > c->limit;
                r.nmse = nmse > r.nmse ? nmse : r.nmse;
                error = total = 0;
            }
        } else {
            const uint8_t d = ((const uint8_t *) actual)[i] ^ ((const uint8_t *) out->data)[i];
            n_different += d != 0;
            wrong = (d & ~(mask ? ((const uint8_t *) mask->data)[i] : 0)) != 0;
        }
        if (wrong && r.n_wrong++ == 0) {
            r.first = i;
        }
    }
    r.verdict = n_different == 0 ? 0 : r.n_wrong == 0 ? 1 : 2;
    if (r.verdict == 0) {
        snprintf(r.text, sizeof(r.text), "exact");
    } else if (out->is_float) {
        snprintf(r.text, sizeof(r.text), "%s: NMSE %.3g, the rule allows %.3g",
                 r.verdict == 1 ? "explained by rounding" : "wrong", r.nmse, c->limit);
    } else if (r.verdict == 1) {
        snprintf(r.text, sizeof(r.text), "explained by rounding: %zu bytes differ", n_different);
    } else {
        snprintf(r.text, sizeof(r.text), "wrong: %zu bytes, the first is number %zu%s", r.n_wrong, r.first,
                 strcmp(c->match, "cost") == 0 ? " (or another walk: tbq-vectors check tells)" : "");
    }
    return r;
}

#endif
