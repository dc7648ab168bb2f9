"""Numba kernels of `tbq.families.turbo_cpu`.

Nearly all the time goes to the dense matrix, for which `tbq.kernels.pr21089.rotate_pair` takes four
groups at once. Norms and sums of centroids run over sixteen lanes, see `tbq.kernels.rotated`.

A code of 8 bits is looked up: the line is cut into steps so short that at most one boundary lies in
each, so one comparison decides. Rounding does not matter, since the step of a value is a monotone
function of it.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tbq.codec import RowKernels
from tbq.families.turbo_cpu import EDGES, GROUP, LEVELS, DenseCells, matrix
from tbq.kernels.compile import jit
from tbq.kernels.dense import tiles
from tbq.kernels.lanes import chooser, load
from tbq.kernels.numerics import load_fp16, store_fp16
from tbq.kernels.pr21089 import PAIR, rotate_pair
from tbq.kernels.rotated import (
    LANES,
    ONE,
    ONE_CODE,
    ORDERS,
    SIZE,
    TINY,
    ZERO,
    ZERO_CODE,
    correcting,
    norming,
)
from tbq.kernels.simd import level_table, search_table

_norms, _divide_by_root = norming(ORDERS["ordered"]), correcting(ORDERS["ordered"])
_choose4 = chooser(4, "not <", GROUP)
STEPS = 1024
STEP_SCALE, STEP_ORIGIN = np.float32(1500.0), np.float32(STEPS / 2)
LAST_STEP = np.float32(STEPS - 1)
LAST_CODE = np.int32(255)


@jit
def step(v):
    """Return the number of the step that v lies in, 0 to STEPS - 1, NaN in 0."""
    place = v * STEP_SCALE + STEP_ORIGIN
    place = place if place > ZERO else ZERO
    return np.int32(place if place < LAST_STEP else LAST_STEP)


@cache
def step_starts() -> np.ndarray:
    """Return the number of boundaries in the steps before each, int32 (STEPS,)."""
    steps = np.array([step(edge) for edge in EDGES[8]])
    if (np.diff(steps) == 0).any():
        raise AssertionError("two boundaries in one step")
    return np.searchsorted(steps, np.arange(STEPS)).astype(np.int32)


@jit
def _choose(v, starts, edges, steps, codes):
    """Set codes to the number of edges (256,), the last NaN, that are not above v; NaN: to 255."""
    for k in range(SIZE):
        steps[k] = step(v[k])
    for k in range(SIZE):
        code = starts[steps[k]]
        code += ONE_CODE if v[k] >= edges[code] else ZERO_CODE
        codes[k] = code if v[k] == v[k] else LAST_CODE


@jit
def _multiply(m, x, y):
    for k in range(0, SIZE, PAIR):
        rotate_pair(m, x[k : k + PAIR], y[k : k + PAIR])


@jit
def _unit_rows(x, start, count, v, norm, rows):
    """Set rows (LANES, 128) to unit vectors, zeros for norms that are tiny or NaN."""
    load(x, start, count, v)
    _norms(v, norm)
    for lane in range(LANES):
        live = norm[lane] > TINY
        inverse = ONE / norm[lane]
        for j in range(GROUP):
            rows[lane, j] = v[j * LANES + lane] * inverse if live else ZERO


@jit
def _correct(c, v, norm, scratch):
    """Divide norm (LANES,) by the norms of centroids c (LANES, 128)."""
    load(c, 0, LANES, v)
    for k in range(SIZE):
        v[k] *= v[k]
    _divide_by_root(norm, v, scratch)


@jit
def _quantize(x, forward, cells, starts, edges, table, bits, corrected, packed):
    """Quantise x (n, 128); cells are what `_choose4` takes, the rest is for 8."""
    v, s = np.empty(SIZE, np.float32), np.empty(SIZE, np.float32)
    rows, turned = np.empty((LANES, GROUP), np.float32), np.empty(SIZE, np.float32)
    codes, steps = np.empty(SIZE, np.int32), np.empty(SIZE, np.int32)
    norm, scratch = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        _unit_rows(x, start, count, v, norm, rows)
        _multiply(forward, rows.reshape(SIZE), turned)
        if bits == 8:
            _choose(turned, starts, edges, steps, codes)
            for k in range(SIZE):
                turned[k] = table[codes[k]]
        else:
            _choose4(turned, cells[0], cells[1], codes, s)
            for k in range(SIZE):
                turned[k] = s[k]
        if corrected:
            _correct(turned.reshape(LANES, GROUP), v, norm, scratch)
        for lane in range(count):
            out, own = packed[start + lane], codes[lane * GROUP : (lane + 1) * GROUP]
            store_fp16(norm[lane], out, 0)
            if bits == 8:
                for j in range(GROUP):
                    out[2 + j] = np.uint8(own[j])
            else:
                for j in range(GROUP // 2):
                    out[2 + j] = np.uint8(own[2 * j] | own[2 * j + 1] << 4)


@jit
def _expand(packed, start, count, table, bits, c):
    """Set c (2048,) to the centroids of groups [start, start + count)."""
    for lane in range(count):
        block, own = packed[start + lane], c[lane * GROUP : (lane + 1) * GROUP]
        if bits == 8:
            for j in range(GROUP):
                own[j] = table[block[2 + j]]
        else:
            for j in range(GROUP // 2):
                own[2 * j], own[2 * j + 1] = table[block[2 + j] & 15], table[block[2 + j] >> 4]


@jit
def _dequantize(packed, m, turns, table, bits, y):
    """Set y (n, 128) to centroids, multiplied by m if it turns, times norm."""
    c, turned = np.zeros(SIZE, np.float32), np.empty(SIZE, np.float32)
    for start in range(0, packed.shape[0], LANES):
        count = min(LANES, packed.shape[0] - start)
        _expand(packed, start, count, table, bits, c)
        if turns:
            _multiply(m, c, turned)
        else:
            for k in range(SIZE):
                turned[k] = c[k]
        for lane in range(count):
            norm = load_fp16(packed[start + lane], 0)
            for j in range(GROUP):
                y[start + lane, j] = turned[lane * GROUP + j] * norm


@jit
def _rotate(m, x):
    rows, turned = np.zeros(SIZE, np.float32), np.empty(SIZE, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        for lane in range(count):
            for j in range(GROUP):
                rows[lane * GROUP + j] = x[start + lane, j]
        _multiply(m, rows, turned)
        for lane in range(count):
            for j in range(GROUP):
                x[start + lane, j] = turned[lane * GROUP + j]


def kernels(codec: DenseCells) -> RowKernels:
    """Return the kernels of turbo4 or turbo8 of the CPU code."""
    if codec.transposed or not codec.rotated:
        raise NotImplementedError("kernels have the right matrix; others are mutants")
    bits, size = codec.bits, codec.block_bytes
    table, edges, starts = LEVELS[bits], np.append(EDGES[8], np.float32(np.nan)), step_starts()
    cells = (search_table(EDGES[4]), level_table(LEVELS[4]))
    forward, back = tiles(matrix()), tiles(matrix().T)

    def quantize(x, packed, first):
        blocks = packed.reshape(-1, size)
        args = (forward, cells, starts, edges, table, bits, codec.corrected)
        _quantize(x.reshape(-1, GROUP), *args, blocks)

    def dequantize(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, GROUP)
        _dequantize(blocks, back, True, table, bits, values)

    def levels(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, GROUP)
        _dequantize(blocks, back, False, table, bits, values)

    def rotate(x, blocks):
        _rotate(forward, x)

    def unrotate(x, blocks):
        _rotate(back, x)

    return RowKernels(quantize, dequantize, levels, rotate, unrotate)
