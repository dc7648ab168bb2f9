"""Numba kernels of `tbq.families.ktq`: sixteen blocks at a time, see `tbq.kernels.lanes`."""

from __future__ import annotations

from functools import cache

import numpy as np

from tbq.bitpack import pack
from tbq.families.ktq import CODEBOOKS, CUDA, QK, SCALE, TINY, code_bits, sign_bits
from tbq.format import Format, RowKernels
from tbq.kernels.bitpack import unpack
from tbq.kernels.compile import jit
from tbq.kernels.lanes import (
    LANES,
    ONE,
    ZERO,
    expand,
    fwht,
    load,
    load_codes,
    load_word,
    norms,
    store_codes,
    store_word,
)
from tbq.kernels.lanes import pack as pack_lanes
from tbq.kernels.nearest import count_thresholds, squared, thresholds
from tbq.kernels.numerics import corrected_scale, load_fp16, store_fp16

WORD_STEP = np.float32(1.0 / 65536.0)


@cache
def sign_words() -> np.ndarray:
    """Return the 32 sign bits of each of the 65536 seeds, int32."""
    parts = np.array_split(np.arange(1 << 16), 16)  # keeps the temporaries small
    return np.concatenate([pack(sign_bits(part), 1).view("<i4")[:, 0] for part in parts])


@jit
def block_seed(index):
    """Return the 16-bit seed of a block index: FNV-1a over its four bytes."""
    h = np.uint32(2166136261)
    for shift in (0, 8, 16, 24):
        h = np.uint32((h ^ np.uint32((index >> shift) & 0xFF)) * np.uint32(16777619))
    return h & np.uint32(0xFFFF)


@jit
def _philox6(counter, key):
    low, high = np.uint64(counter), np.uint64(key)
    for i in range(1, 7):
        product = low * np.uint64(0xD2511F53)
        round_key = np.uint64(0x9E3779B9) * np.uint64(i) & np.uint64(0xFFFFFFFF)
        low = (product >> np.uint64(32)) ^ high ^ round_key
        high = product & np.uint64(0xFFFFFFFF)
    return low


@jit
def _choose_nearest(r, limits, codes):
    for j in range(QK):
        for lane in range(LANES):
            codes[j, lane] = count_thresholds(r[j, lane], limits)


@jit
def _draw(r, word, levels):
    """Draw between the two nearest levels, as the CUDA encoder does."""
    u = np.float32(word & np.uint64(0xFFFF)) * WORD_STEP
    if levels.size == 2:
        p1 = (r - levels[0]) / (levels[1] - levels[0])
        p1 = min(max(p1, ZERO), ONE)
        return np.int32(1) if u < p1 else np.int32(0)
    b1 = b2 = np.float32(np.inf)
    first = second = np.int32(0)
    for c in range(levels.size):
        distance = abs(r - levels[c])
        if distance < b1:
            b1, b2 = distance, b1
            first, second = np.int32(c), first
        elif distance < b2:
            b2, second = distance, np.int32(c)
    total = b1 + b2
    return second if total > TINY and u >= b2 / total else first


@jit
def _quantize(x, first, row_blocks, signs, levels, limits, stochastic, bits, packed):
    """Quantise x (n, 32) to packed (n, block_bytes); block b has index first + b % row_blocks."""
    n = x.shape[0]
    v = np.empty((QK, LANES), np.float32)
    codes = np.empty((QK, LANES), np.int32)
    words = np.empty((4, LANES), np.int32)
    sign_word = np.zeros(LANES, np.int32)
    seed = np.zeros(LANES, np.uint32)
    norm, rn = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    for start in range(0, n, LANES):
        count = min(LANES, n - start)
        load(x, start, count, v)
        norms(v, norm)
        for lane in range(count):
            seed[lane] = block_seed(first + (start + lane) % row_blocks)
            sign_word[lane] = signs[seed[lane]]
        for lane in range(LANES):
            inverse[lane] = ONE / norm[lane]
        for j in range(QK):
            mask = np.int32(1 << j)
            for lane in range(LANES):
                signed = inverse[lane] if sign_word[lane] & mask else -inverse[lane]
                v[j, lane] *= signed  # (x * inverse) * -1 has the same bits
        fwht(v, SCALE)
        if stochastic:
            for j in range(QK):
                for lane in range(count):
                    codes[j, lane] = _draw(v[j, lane], _philox6(QK + j, seed[lane]), levels)
        else:
            _choose_nearest(v, limits, codes)
        pack_lanes(codes, bits, words)
        expand(words, bits, levels, v)
        fwht(v, SCALE)  # the signs do not matter to the norm
        norms(v, rn)
        for lane in range(count):
            out = packed[start + lane]
            if norm[lane] < TINY:
                out[:] = 0
                store_fp16(norm[lane], out, 0)
            else:
                store_fp16(corrected_scale(norm[lane], rn[lane]), out, 0)
                store_codes(words, lane, bits, out)
                store_word(sign_word[lane], out, 2 + 4 * bits)


@jit
def _dequantize(packed, levels, flip, bits, y):
    """Dequantise packed (n, block_bytes) to y (n, 32); flip is xored to the sign bits."""
    n = packed.shape[0]
    v = np.empty((QK, LANES), np.float32)
    words = np.zeros((4, LANES), np.int32)
    sign_word = np.zeros(LANES, np.int32)
    d = np.zeros(LANES, np.float32)
    for start in range(0, n, LANES):
        count = min(LANES, n - start)
        for lane in range(count):
            block = packed[start + lane]
            d[lane] = load_fp16(block, 0)
            load_codes(block, bits, words, lane)
            sign_word[lane] = load_word(block, 2 + 4 * bits) ^ flip
        expand(words, bits, levels, v)
        fwht(v, SCALE)
        for j in range(QK):
            mask = np.int32(1 << j)
            for lane in range(LANES):
                v[j, lane] *= d[lane] if sign_word[lane] & mask else -d[lane]
        for lane in range(count):
            if d[lane] < TINY:
                y[start + lane] = ZERO
            else:
                for j in range(QK):
                    y[start + lane, j] = v[j, lane]


@jit
def _levels(packed, levels, bits, y):
    """Set y (n, 32) to the scaled levels of packed (n, block_bytes), still rotated."""
    codes = np.empty(QK, np.uint8)
    for b in range(packed.shape[0]):
        d = load_fp16(packed[b], 0)
        unpack(packed[b, 2:], bits, codes)
        for j in range(QK):
            y[b, j] = ZERO if d < TINY else levels[codes[j]] * d


def kernels(fmt: Format) -> RowKernels:
    """Return the kernels of a ktq format of either dialect."""
    bits = code_bits(fmt)
    levels = CODEBOOKS[bits] * SCALE
    limits = thresholds(levels, squared) if bits > 1 else np.zeros(1, np.float32)
    stochastic = fmt.dialect == CUDA
    flip = np.int32(-1 if fmt.dialect == CUDA else 0)

    def quantize(x, packed, first_block):
        row_blocks = x.shape[-1] // QK if fmt.block_index == "row" else x.size + 1
        blocks = packed.reshape(-1, fmt.block_bytes)
        args = (first_block, row_blocks, sign_words(), levels, tuple(limits), stochastic, bits)
        _quantize(x.reshape(-1, QK), *args, blocks)

    def dequantize(packed, y):
        blocks = packed.reshape(-1, fmt.block_bytes)
        _dequantize(blocks, levels, flip, bits, y.reshape(-1, QK))

    def scaled_levels(packed, y):
        _levels(packed.reshape(-1, fmt.block_bytes), levels, bits, y.reshape(-1, QK))

    return RowKernels(quantize, dequantize, scaled_levels)
