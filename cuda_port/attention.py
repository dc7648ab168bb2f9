"""`scores` and `weighted_sum` of `tbq.attention` on the device: the same sums in the same order.

Both read every block once, where it lies, for up to four queries or sets of weights, and keep its
levels in registers; dequantised keys or values are never in memory. Where a level takes more than
its own code and scales, the scaled levels of a chunk of rows are, and they are read like blocks.

Scores: a thread adds up one group of one key, neighbours having neighbouring groups, and one thread
of each key adds the groups in order. Queries lie in shared memory. Blocks that carry signs are
compared with those of the first key, by whose signs the queries were rotated; a thread that finds
others rotates its own.

Weighted sums: a thread has a slice of values and a run of keys, and reads four keys ahead.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import config, cuda, float32, uint32

from cuda_port.device import ZERO, add, barrier, block, device, float_of, index, mul, take, thread
from cuda_port.fields import Fields, reader
from cuda_port.kernels import LUT_FLOATS, SLICE, load_lut
from cuda_port.port import FLOATS, FLOATS2, FLOATS3, WORDS, Kernel, port_of
from cuda_port.unroll import by_eights, by_ones
from tbq.attention import RUN_KEYS
from tbq.codec import Codec

THREADS = 128
SETS = (1, 4)  # queries or sets of weights that a kernel handles at a time
QUERY_FLOATS = 8448  # of queries in shared memory: 33 KiB
BATCHES = 16  # of keys, at most, that a block of threads handles with the same queries
AHEAD = 4
PAD = 4  # floats between groups of queries: four are read at once, by lanes in different banks
ALIGNMENT = None if config.ENABLE_CUDASIM else 16


def float_fields(values: int) -> Fields:
    """Return fields of blocks of float32, which are levels already."""
    return Fields(4 * values, values, ((0, 32),))


@cache
def float_levels(n: int):
    """Return `levels` of such blocks."""

    @device
    def eight(first, words, v, at, lut):
        for k in range(first, first + 8):
            v[at + k] = float_of(words[k])

    return by_eights(n, eight)


@cache
def _read(codec: Codec) -> tuple[Fields, Any, int]:
    """Return fields, what makes `levels`, and the length of their table."""
    port = port_of(codec)
    if port.leveler is not None:
        return float_fields(codec.block_values), float_levels, 1
    return port.fields, port.levels, len(port.table)


# --- scores --------------------------------------------------------------------------------------


def score_layout(width: int, sets: int, row_groups: int) -> tuple[int, int]:
    """Return how many groups of a row a block of threads has at a time, and of how many keys."""
    groups = min(row_groups, THREADS, max(1, QUERY_FLOATS // ((width + PAD) * sets)))
    return groups, THREADS // groups


@cache
def score_kernel(codec: Codec, sets: int) -> Kernel:
    """Return the kernel of scores for so many queries at a time.

    Arguments: packed; table; queries, rotated: float32 (sets, n), as given and rotated;
    first_signs: the bits of the first key's blocks, or anything; groups: see `score_layout`;
    batches: of keys per block of threads; out: float32 (sets, keys).
    """
    fields, levels_of, n_table = _read(codec)
    width, signs = codec.group_values, port_of(codec).signs
    n, unit = min(SLICE, fields.values), fields.unit(min(SLICE, fields.values))
    read, levels, count = reader(fields, n), levels_of(n), fields.words(n)
    per_block, blocks = max(1, fields.values // n), max(1, width // fields.values)
    slices, small, pitch = width // n, n_table <= LUT_FLOATS, width + PAD
    n_lut = n_table if small else 1
    read_signs = read
    if signs:
        whole = ((signs.at, 4),)
        read_signs = reader(Fields(fields.size, fields.values, (), whole, word=unit), n)
    rotate = signs.rotate if signs else None
    signed, threads = signs is not None, THREADS

    @device
    def add_query(q, v, shared, at, stride, partial):
        total = partial[q]
        for k in range(n):
            total = add(total, mul(shared[index(at + q * stride + k)], v[k]))
        partial[q] = total

    @device
    def turn_query(q, v, own, bits, queries, g, partial):
        for k in range(n):
            own[k] = queries[q, index(g * n + k)]
        rotate(own, bits)
        total = ZERO
        for k in range(n):
            total = add(total, mul(own[k], v[k]))
        partial[q] = total

    add_all, turn_all = by_ones(sets, add_query), by_ones(sets, turn_query)

    @device
    def dot(packed, table, group, at, shared, stride, partial):
        """Set the partial sums of a group; its part of the queries starts at shared[at]."""
        words = cuda.local.array(count, uint32)
        v = cuda.local.array(n, float32)
        for s in range(slices):
            read(packed, group * blocks + s // per_block, s % per_block, words)
            levels(words, v, 0, table)
            add_all(v, shared, at + s * n, stride, partial)

    @device
    def turned_dot(packed, table, group, g, queries, partial):
        """Do the same for a block with signs of its own."""
        words = cuda.local.array(count, uint32)
        v = cuda.local.array(n, float32)
        own = cuda.local.array(n, float32)
        read_signs(packed, group, 0, words)
        bits = take(words, 0, 32)
        read(packed, group, 0, words)
        levels(words, v, 0, table)
        turn_all(v, own, bits, queries, g, partial)

    @device
    def has_signs(packed, group, expected):
        words = cuda.local.array(count, uint32)
        read_signs(packed, group, 0, words)
        return take(words, 0, 32) == expected

    @device
    def load_queries(rotated, shared, start, length, t, stride):
        """Copy part of the queries to rows of `width`, PAD floats apart."""
        for q in range(sets):
            k = t
            while k < length:
                shared[index(q * stride + k // width * pitch + k % width)] = rotated[
                    q, index(start + k)
                ]
                k += threads

    @cuda.jit
    def score(packed, table, queries, rotated, first_signs, groups, batches, out):
        shared = cuda.shared.array(QUERY_FLOATS, float32, alignment=ALIGNMENT)
        lut = cuda.shared.array(n_lut, float32)
        sums = cuda.shared.array((sets, threads), float32)
        partial = cuda.local.array(sets, float32)
        total = cuda.local.array(sets, float32)
        t = thread()
        row_groups = rotated.shape[1] // width
        keys = threads // groups
        lane, mine = t % groups, t // groups
        if small:
            load_lut(table, lut, t, threads, n_table)
        for batch in range(batches):
            first = (block() * batches + batch) * keys
            if first < out.shape[1]:
                for q in range(sets):
                    total[q] = ZERO
                start = 0
                while start < row_groups:
                    here = min(groups, row_groups - start)
                    if batch == 0 or groups < row_groups:
                        barrier()
                        load_queries(
                            rotated, shared, start * width, here * width, t, groups * pitch
                        )
                        barrier()
                    for q in range(sets):
                        partial[q] = ZERO
                    if mine < keys and first + mine < out.shape[1] and lane < here:
                        g = start + lane
                        group = (first + mine) * row_groups + g
                        lutted = lut if small else table
                        same = True
                        if signed:
                            same = has_signs(packed, group, np.int64(first_signs[g]))
                        if same:
                            dot(
                                packed, lutted, group, lane * pitch, shared, groups * pitch, partial
                            )
                        elif signed:
                            turned_dot(packed, lutted, group, g, queries, partial)
                    for q in range(sets):
                        sums[q, t] = partial[q]
                    barrier()
                    if t < keys:
                        for q in range(sets):
                            for k in range(here):
                                total[q] = add(total[q], sums[q, index(t * groups + k)])
                    barrier()
                    start += groups
                if t < keys and first + t < out.shape[1]:
                    for q in range(sets):
                        out[q, index(first + t)] = total[q]

    types = (WORDS[unit], FLOATS, FLOATS2, FLOATS2, WORDS[4], "i8", "i8", FLOATS2)
    return Kernel(score, THREADS, 0, types)


@cache
def sign_rotator(codec: Codec) -> Kernel:
    """Return the kernel (packed, queries, rotated, first_signs) and its types; a group per thread.

    It rotates queries, float32 (sets, n), by the signs of the first key, and keeps these.
    """
    signs, width = port_of(codec).signs, codec.group_values
    fields = Fields(codec.block_bytes, width, (), ((signs.at, 4),))
    read, count, unit = reader(fields, width), fields.words(width), fields.unit(width)
    rotate = signs.rotate

    @cuda.jit
    def turn(packed, queries, rotated, first_signs):
        words = cuda.local.array(count, uint32)
        v = cuda.local.array(width, float32)
        g = block() * THREADS + thread()
        if g * width < queries.shape[1]:
            read(packed, g, 0, words)
            bits = take(words, 0, 32)
            first_signs[g] = bits
            for q in range(queries.shape[0]):
                for k in range(width):
                    v[k] = queries[q, index(g * width + k)]
                rotate(v, bits)
                for k in range(width):
                    rotated[q, index(g * width + k)] = v[k]

    return Kernel(turn, THREADS, THREADS * width, (WORDS[unit], FLOATS2, FLOATS2, WORDS[4]))


# --- weighted sums -------------------------------------------------------------------------------


@cache
def sum_slice(codec: Codec) -> int:
    """Return the values that a thread of `sum_kernel` has."""
    return _read(codec)[0].least_slice()


@cache
def sum_kernel(codec: Codec, sets: int) -> Kernel:
    """Return the kernel (packed, table, weights, partial) as launched.

    weights: float32 (sets, keys); partial: float32 (runs, sets, n). Blocks of threads are those of
    a run's slices, run by run.
    """
    fields, levels_of, n_table = _read(codec)
    n = fields.least_slice()
    read, levels, count = reader(fields, n), levels_of(n), fields.words(n)
    per_block, small, values = max(1, fields.values // n), n_table <= LUT_FLOATS, fields.values
    n_lut, threads, room = n_table if small else 1, THREADS, sets * n

    @device
    def gather(words, v, lut, weights, t, total):
        """Add a key's levels, times its weights."""
        levels(words, v, 0, lut)
        for q in range(sets):
            p = weights[q, index(t)]
            for k in range(n):
                total[q * n + k] = add(total[q * n + k], mul(p, v[k]))

    @cuda.jit
    def weighted(packed, table, weights, partial):
        lut = cuda.shared.array(n_lut, float32)
        w0 = cuda.local.array(count, uint32)
        w1 = cuda.local.array(count, uint32)
        w2 = cuda.local.array(count, uint32)
        w3 = cuda.local.array(count, uint32)
        v = cuda.local.array(n, float32)
        total = cuda.local.array(room, float32)
        if small:
            load_lut(table, lut, thread(), threads, n_table)
            barrier()
        columns = partial.shape[2] // n
        per_run = (columns + threads - 1) // threads
        run, column = block() // per_run, block() % per_run * threads + thread()
        if column < columns:
            levelled = lut if small else table
            row_blocks = partial.shape[2] // values
            place, s = column // per_block, column % per_block
            for k in range(room):
                total[k] = ZERO
            t = run * RUN_KEYS
            stop = min(t + RUN_KEYS, weights.shape[1])
            while t + AHEAD <= stop:
                read(packed, t * row_blocks + place, s, w0)
                read(packed, (t + 1) * row_blocks + place, s, w1)
                read(packed, (t + 2) * row_blocks + place, s, w2)
                read(packed, (t + 3) * row_blocks + place, s, w3)
                gather(w0, v, levelled, weights, t, total)
                gather(w1, v, levelled, weights, t + 1, total)
                gather(w2, v, levelled, weights, t + 2, total)
                gather(w3, v, levelled, weights, t + 3, total)
                t += AHEAD
            while t < stop:
                read(packed, t * row_blocks + place, s, w0)
                gather(w0, v, levelled, weights, t, total)
                t += 1
            for q in range(sets):
                for k in range(n):
                    partial[index(run), q, index(column * n + k)] = total[q * n + k]

    types = (WORDS[fields.unit(n)], FLOATS, FLOATS2, FLOATS3)
    return Kernel(weighted, THREADS, 0, types)


@cache
def gather_kernel() -> Kernel:
    """Return the kernel (partial, total) that adds runs to total (sets, n), in order."""

    @cuda.jit
    def gather(partial, total):
        i = block() * THREADS + thread()
        n = total.shape[1]
        if i < total.shape[0] * n:
            q, k = i // n, i % n
            found = total[index(q), index(k)]
            for run in range(partial.shape[0]):
                found = add(found, partial[index(run), index(q), index(k)])
            total[index(q), index(k)] = found

    return Kernel(gather, THREADS, THREADS, (FLOATS3, FLOATS2))
