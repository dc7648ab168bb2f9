"""`scores` and `weighted_sum` of `tbq.attention` on the device: the same sums in the same order.

A thread owns one sum: one key and query, or one value and run of keys. It reads codes and scales
straight from the packed rows; dequantised keys or values are never in memory. Where a level takes
more than its own code and scales, the scaled levels of a chunk of rows are, and it reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from numba import cuda

from cuda_port.device import ZERO, add, device, mul
from tbq.attention import RUN_KEYS


@device
def level_there(scaled, base, i, unused):
    """Return value i of the block at scaled[base], where all levels are written out."""
    return scaled[base + i]


def value_decoder(level: Callable, block_values: int, block_bytes: int):
    """Return the kernel (packed, table, y) that writes the level of each value, a thread each."""

    @cuda.jit
    def decode(packed, table, y):
        n = cuda.grid(1)
        if n < y.size:
            y[n] = level(packed, n // block_values * block_bytes, n % block_values, table)

    return decode


def score_kernel(level: Callable, block_values: int, block_bytes: int, group_blocks: int):
    """Return the kernel (packed, table, queries, which, out); a thread per key, grid y: queries.

    queries: float32 (queries, row groups, sign patterns, group values), rotated; which: int32
    (keys, row groups), the pattern of each group; out: float32 (queries, keys).
    """

    @cuda.jit
    def score(packed, table, queries, which, out):
        t, q = cuda.grid(1), cuda.blockIdx.y
        if t < out.shape[1]:
            row_groups = which.shape[1]
            total = ZERO
            for g in range(row_groups):
                query = queries[q, g, which[t, g]]
                partial = ZERO
                for b in range(group_blocks):
                    base = ((t * row_groups + g) * group_blocks + b) * block_bytes
                    for i in range(block_values):
                        value = level(packed, base, i, table)
                        partial = add(partial, mul(query[b * block_values + i], value))
                total = add(total, partial)
            out[q, t] = total

    return score


def sign_checker(block_bytes: int, at: int, n_bytes: int):
    """Return the kernel (packed, row_bytes, differs) that sets differs if signs are not row 0's."""

    @cuda.jit
    def check(packed, row_bytes, differs):
        block = cuda.grid(1)
        if block * block_bytes < packed.size:
            for k in range(n_bytes):
                mine = packed[block * block_bytes + at + k]
                if mine != packed[(block * block_bytes) % row_bytes + at + k]:
                    differs[0] = 1

    return check


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
