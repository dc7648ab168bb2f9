"""Kernels of `tbq.attention`: ordered float32 sums over rows of scaled levels."""

from __future__ import annotations

import numpy as np

from tbq.kernels.compile import jit

ZERO = np.float32(0.0)


@jit
def dot_blocks(levels, queries, which, out):
    """Set out[q, t] to the dot product of key t with query q, block sums first, in index order.

    levels: float32 (keys, blocks, values); queries: float32 (queries, blocks, variants, values),
    the query as rotated for each sign pattern of a block; which: intp (keys, blocks), the pattern.
    """
    for t in range(levels.shape[0]):
        for q in range(queries.shape[0]):
            total = ZERO
            for b in range(levels.shape[1]):
                query, key = queries[q, b, which[t, b]], levels[t, b]
                partial = ZERO
                for i in range(key.size):
                    partial += query[i] * key[i]
                total += partial
            out[q, t] = total


@jit
def add_weighted(weights, levels, out):
    """Add to out (queries, n) each row of levels (keys, n) times its weight, keys in order."""
    for t in range(levels.shape[0]):
        for q in range(weights.shape[0]):
            w = weights[q, t]
            for i in range(levels.shape[1]):
                out[q, i] += w * levels[t, i]
