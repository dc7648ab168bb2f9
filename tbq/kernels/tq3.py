"""Numba kernels of `tbq.families.tq3`: sixteen blocks at a time, see `tbq.kernels.lanes`.

A sign commutes with a factor next to it without rounding, so both are one factor here.
"""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.tq3 import QK, PeakCells
from tbq.kernels.compile import jit
from tbq.kernels.lanes import LANES, ONE, SIZE, WORDS, ZERO, fwht, load, packer, store
from tbq.kernels.numerics import load_fp16, store_fp16
from tbq.numerics import word_signs

HIGH, GAMMA = 8, 12  # where fields start
GROUPS = 4  # of eight codes
ZERO_CODE, ONE_CODE = np.int32(0), np.int32(1)
_pack1, _pack2 = packer(1), packer(2)


@jit
def _give_signs(v, signs):
    """Multiply v by signs (SIZE,)."""
    for k in range(SIZE):
        v[k] *= signs[k]


@jit
def _scales(v, outermost, d, inverse):
    """Set d (LANES,) to the largest coordinate over the outermost centroid, and its inverse."""
    for lane in range(LANES):
        d[lane] = ZERO
    for j in range(QK):
        for lane in range(LANES):
            size = abs(v[j * LANES + lane])
            d[lane] = size if size > d[lane] else d[lane]
    for lane in range(LANES):
        d[lane] /= outermost
        inverse[lane] = ONE / d[lane] if d[lane] > ZERO else ZERO


@jit
def _choose(v, inverse, edges, codes):
    for j in range(QK):
        for lane in range(LANES):
            scaled, code = v[j * LANES + lane] * inverse[lane], ZERO_CODE
            for edge in edges:
                code += ZERO_CODE if scaled < edge else ONE_CODE
            codes[j * LANES + lane] = code


@jit
def _split(v, d, levels, splits, codes, bits):
    """Set bits to the codes' third bits or to residual signs, and leave two bits of the codes."""
    for j in range(QK):
        for lane in range(LANES):
            k = j * LANES + lane
            code = codes[k]
            if splits:
                bits[k] = code >> 2
            else:
                residual = v[k] - d[lane] * levels[code]
                bits[k] = ONE_CODE if residual >= ZERO else ZERO_CODE
            codes[k] = code & 3


@jit
def _quantize(x, signs, edges, levels, splits, packed):
    """Quantise x (n, 32) to packed (n, 14)."""
    v = np.empty(SIZE, np.float32)
    codes, bits = np.empty(SIZE, np.int32), np.empty(SIZE, np.int32)
    low, high = np.empty(WORDS, np.int32), np.empty(WORDS, np.int32)
    d, inverse = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        _give_signs(v, signs)
        fwht(v)
        _scales(v, levels[-1], d, inverse)
        _choose(v, inverse, edges, codes)
        _split(v, d, levels, splits, codes, bits)
        _pack2(codes, low)
        _pack1(bits, high)
        for lane in range(count):
            out = packed[start + lane]
            for g in range(GROUPS):
                word = low[g * LANES + lane]
                out[2 * g], out[2 * g + 1] = np.uint8(word & 0xFF), np.uint8((word >> 8) & 0xFF)
                out[HIGH + g] = np.uint8(high[g * LANES + lane])
            store_fp16(d[lane], out, GAMMA)


@jit
def _levels(packed, levels, splits, y):
    """Set y (n, 32) to gamma times centroid."""
    for b in range(packed.shape[0]):
        block, row = packed[b], y[b]
        gamma = load_fp16(block, GAMMA)
        for g in range(GROUPS):
            low, high = np.int64(block[2 * g]) | np.int64(block[2 * g + 1]) << 8, block[HIGH + g]
            for k in range(8):
                code = (low >> (2 * k)) & 3
                if splits:
                    code |= ((high >> k) & 1) << 2
                row[8 * g + k] = gamma * levels[code]


@jit
def _rotate(x, before, after):
    """Multiply x (n, 32) by signs (SIZE,), transform it, multiply it by signs, in place."""
    v = np.empty(SIZE, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        _give_signs(v, before)
        fwht(v)
        _give_signs(v, after)
        store(v, start, count, x)


def kernels(codec: PeakCells) -> RowKernels:
    """Return the kernels of tq3_0."""
    if codec.width != QK or not codec.outermost:
        raise NotImplementedError("kernels rotate 32 values and scale right; others are mutants")
    signs = np.repeat(word_signs((codec.signs,)), LANES)
    ones = np.ones(SIZE, np.float32)
    edges, table, splits = tuple(codec.cells.edges), codec.cells.levels, codec.splits
    size = codec.block_bytes

    def quantize(x, packed, first):
        _quantize(x.reshape(-1, QK), signs, edges, table, splits, packed.reshape(-1, size))

    def levels(packed, y):
        _levels(packed.reshape(-1, size), table, splits, y.reshape(-1, QK))

    def dequantize(packed, y):
        levels(packed, y)
        _rotate(y.reshape(-1, QK), ones, signs)

    def rotate(x, blocks):
        _rotate(x, signs, ones)

    def unrotate(x, blocks):
        _rotate(x, ones, signs)

    return RowKernels(quantize, dequantize, levels, rotate, unrotate)
