"""`scores` and `weighted_sum` of `tbq.attention` on the device: the same sums in the same order.

A thread owns one sum: one key and query, or one value and run of keys. It reads codes and scales
straight from the packed rows; dequantised keys or values are never in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from numba import cuda

from cuda_port.device import ZERO, add, mul
from tbq.attention import RUN_KEYS


def value_decoder(level: Callable, block_values: int, block_bytes: int):
    """Return the kernel (packed, table, y) that writes the level of each value, a thread each."""

    @cuda.jit
    def decode(packed, table, y):
        n = cuda.grid(1)
        if n < y.size:
            y[n] = level(packed, n // block_values * block_bytes, n % block_values, table)

    return decode


def score_kernel(level: Callable, block_values: int, block_bytes: int):
    """Return the kernel (packed, table, queries, which, out); a thread per key, grid y: queries.

    queries: float32 (queries, row blocks, sign patterns, block_values), rotated; which: int32
    (keys, row blocks), the pattern of each block; out: float32 (queries, keys).
    """

    @cuda.jit
    def score(packed, table, queries, which, out):
        t, q = cuda.grid(1), cuda.blockIdx.y
        if t < out.shape[1]:
            row_blocks = which.shape[1]
            total = ZERO
            for b in range(row_blocks):
                base = (t * row_blocks + b) * block_bytes
                query = queries[q, b, which[t, b]]
                partial = ZERO
                for i in range(block_values):
                    partial = add(partial, mul(query[i], level(packed, base, i, table)))
                total = add(total, partial)
            out[q, t] = total

    return score


def sum_kernel(level: Callable, block_values: int, block_bytes: int):
    """Return the kernel (packed, table, weights, partial); a thread per value and run of keys.

    Grid x: values, y: sets of weights, z: runs; partial: float32 (runs, weights, values).
    """

    @cuda.jit
    def weighted(packed, table, weights, partial):
        n, q, run = cuda.grid(1), cuda.blockIdx.y, cuda.blockIdx.z
        if n < partial.shape[2]:
            row_bytes = partial.shape[2] // block_values * block_bytes
            base = n // block_values * block_bytes
            total = ZERO
            for t in range(run * RUN_KEYS, min((run + 1) * RUN_KEYS, weights.shape[1])):
                value = level(packed, t * row_bytes + base, n % block_values, table)
                total = add(total, mul(weights[q, t], value))
            partial[run, q, n] = total

    return weighted


@cache
def gather_kernel():
    """Return the kernel (partial, total) that adds runs to total (weights, values), in order."""

    @cuda.jit
    def gather(partial, total):
        n, q = cuda.grid(1), cuda.blockIdx.y
        if n < total.shape[1]:
            for run in range(partial.shape[0]):
                total[q, n] = add(total[q, n], partial[run, q, n])

    return gather
