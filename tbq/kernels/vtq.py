"""Numba kernels of `tbq.families.vtq`: encoding sixteen blocks at a time, decoding row by row."""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.ktq import QK, SCALE, TINY
from tbq.families.vtq import CODEBOOKS, Distance, MixedBlocks, PlainBlocks
from tbq.kernels.bitpack import pack
from tbq.kernels.compile import jit
from tbq.kernels.lanes import (
    LANES,
    ONE,
    SIZE,
    WORDS,
    ZERO,
    count_above,
    load,
    multiply,
    norms,
    store_codes,
)
from tbq.kernels.lanes import pack as pack_lanes
from tbq.kernels.mirrored import choose, upper_levels
from tbq.kernels.nearest import count_thresholds
from tbq.kernels.numerics import corrected_scale, load_fp16, store_fp16
from tbq.nearest import absolute, squared, thresholds


@jit
def _quantize(x, upper, limits, bits, packed):
    """Quantise x (n, 32) to packed (n, block_bytes)."""
    n = x.shape[0]
    v = np.empty(SIZE, np.float32)
    codes, words = np.empty(SIZE, np.int32), np.empty(WORDS, np.int32)
    norm, rn = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    for start in range(0, n, LANES):
        count = min(LANES, n - start)
        load(x, start, count, v)
        norms(v, norm)
        for lane in range(LANES):
            inverse[lane] = ONE / norm[lane]
        multiply(v, inverse)
        count_above(v, limits, codes)
        pack_lanes(codes, bits, words)
        choose(words, bits, upper, v)
        norms(v, rn)
        for lane in range(count):
            out = packed[start + lane]
            out[:] = 0
            if norm[lane] < TINY:
                store_fp16(norm[lane], out, 0)
            else:
                store_fp16(corrected_scale(norm[lane], rn[lane]), out, 0)
                store_codes(words, lane, bits, out)


@jit
def _dequantize_bits(packed, levels, bits, y):
    scaled = np.empty(levels.size, np.float32)
    mask = np.uint64((1 << bits) - 1)
    for b in range(packed.shape[0]):
        d = load_fp16(packed[b], 0)
        for c in range(levels.size):
            scaled[c] = ZERO if d < TINY else levels[c] * d
        for group in range(4):
            word = np.uint64(0)
            for k in range(bits):
                word |= np.uint64(packed[b, 2 + bits * group + k]) << np.uint64(8 * k)
            for k in range(8):
                y[b, 8 * group + k] = scaled[(word >> np.uint64(bits * k)) & mask]


@jit
def _dequantize(packed, levels, bits, y):
    """Dequantise packed (n, block_bytes) to y (n, 32)."""
    if bits == 1:  # literal widths, so that the loops unroll
        _dequantize_bits(packed, levels, 1, y)
    elif bits == 2:
        _dequantize_bits(packed, levels, 2, y)
    elif bits == 3:
        _dequantize_bits(packed, levels, 3, y)
    else:
        _dequantize_bits(packed, levels, 4, y)


@jit
def _quantize_mixed(x, fine_levels, fine_limits, coarse_levels, coarse_limits, packed):
    """Quantise x (n, 32) to vtq_mixed blocks; j%4 == 0 is fine (3 bits), the rest coarse (2)."""
    fine = np.empty(8, np.uint8)
    slots = np.zeros(25, np.uint8)  # slot 0 is never used
    for b in range(x.shape[0]):
        total = ZERO
        for j in range(QK):
            total += x[b, j] * x[b, j]
        norm = np.sqrt(total)
        packed[b] = 0
        if norm < TINY:
            store_fp16(norm, packed[b], 0)
            continue
        inverse = ONE / norm
        total = ZERO
        for j in range(QK):
            h = x[b, j] * inverse
            if j % 4 == 0:
                fine[j // 4] = count_thresholds(h, fine_limits)
                level = fine_levels[fine[j // 4]]
            else:
                slots[j - j // 4] = count_thresholds(h, coarse_limits)
                level = coarse_levels[slots[j - j // 4]]
            total += level * level
        pack(fine, 3, packed[b, 2:5])
        pack(slots[:24], 2, packed[b, 5:11])
        packed[b, 11] = slots[24]
        store_fp16(corrected_scale(norm, np.sqrt(total)), packed[b], 0)


@jit
def _dequantize_mixed(packed, fine_levels, coarse_levels, y):
    """Dequantise packed (n, 12) to y (n, 32), through tables of levels times the block's scale."""
    fine, coarse = np.empty(8, np.float32), np.empty(4, np.float32)
    for b in range(packed.shape[0]):
        block, row = packed[b], y[b]
        d = load_fp16(block, 0)
        for c in range(8):
            fine[c] = ZERO if d < TINY else fine_levels[c] * d
        for c in range(4):
            coarse[c] = ZERO if d < TINY else coarse_levels[c] * d
        word, slots = np.uint64(0), np.uint64(0)
        for k in range(3):
            word |= np.uint64(block[2 + k]) << np.uint64(8 * k)
        for k in range(7):
            slots |= np.uint64(block[5 + k]) << np.uint64(8 * k)
        for i in range(8):
            row[4 * i] = fine[(word >> np.uint64(3 * i)) & np.uint64(7)]
            three = slots >> np.uint64(6 * i + 2)
            for k in range(3):
                row[4 * i + 1 + k] = coarse[(three >> np.uint64(2 * k)) & np.uint64(3)]


def table(bits: int, distance: Distance) -> tuple[np.ndarray, tuple]:
    """Return the levels of a codebook and the thresholds between them."""
    levels = CODEBOOKS[bits] * SCALE
    if distance == "absolute":
        return levels, tuple(thresholds(levels, absolute))
    limits = thresholds(levels, squared) if bits > 1 else np.zeros(1, np.float32)
    return levels, tuple(limits)


def kernels(codec: PlainBlocks | MixedBlocks) -> RowKernels:
    """Return the kernels of a vtq*_1 format of either dialect, or of vtq_mixed."""
    return _mixed(codec) if isinstance(codec, MixedBlocks) else _plain(codec)


def _plain(codec: PlainBlocks) -> RowKernels:
    bits, size = codec.bits, codec.block_bytes
    levels, limits = table(bits, codec.distance)
    upper = upper_levels(levels)

    def quantize(x, packed, first):
        _quantize(x.reshape(-1, QK), upper, limits, bits, packed.reshape(-1, size))

    def dequantize(packed, y):
        _dequantize(packed.reshape(-1, size), levels, bits, y.reshape(-1, QK))

    return RowKernels(quantize, dequantize, dequantize)


def _mixed(codec: MixedBlocks) -> RowKernels:
    size = codec.block_bytes
    fine, coarse = table(3, codec.distance), table(2, codec.distance)

    def quantize(x, packed, first):
        _quantize_mixed(x.reshape(-1, QK), *fine, *coarse, packed.reshape(-1, size))

    def dequantize(packed, y):
        _dequantize_mixed(packed.reshape(-1, size), fine[0], coarse[0], y.reshape(-1, QK))

    return RowKernels(quantize, dequantize, dequantize)
