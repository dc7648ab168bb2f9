"""Numba kernels of `tbq.families.ktq`: sixteen blocks at a time, see `tbq.kernels.lanes`."""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.ktq import (
    CODEBOOKS,
    QK,
    SCALE,
    TINY,
    BorrowedCodes,
    SignedBlocks,
    sign_words,
)
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
from tbq.kernels.nearest import count_thresholds
from tbq.kernels.numerics import corrected_scale, load_fp16, store_fp16
from tbq.nearest import squared, thresholds

WORD_STEP = np.float32(1.0 / 65536.0)


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


@jit
def _rotate(x, blocks, at, flip, before):
    """Transform x (n, 32) in place, the signs of blocks (n, bytes) coming before it or after."""
    v = np.empty((QK, LANES), np.float32)
    word = np.zeros(LANES, np.int32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        for lane in range(count):
            word[lane] = load_word(blocks[start + lane], at) ^ flip
        if before:
            _give_signs(v, word)
        fwht(v, SCALE)
        if not before:
            _give_signs(v, word)
        for lane in range(count):
            for j in range(QK):
                x[start + lane, j] = v[j, lane]


@jit
def _give_signs(v, word):
    for j in range(QK):
        mask = np.int32(1 << j)
        for lane in range(LANES):
            v[j, lane] = v[j, lane] if word[lane] & mask else -v[j, lane]


@jit
def _quantize_alone(x, packed):
    v = np.empty((QK, LANES), np.float32)
    norm = np.empty(LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        norms(v, norm)
        for lane in range(count):
            packed[start + lane] = 0
            store_fp16(norm[lane], packed[start + lane], 0)


@jit
def _expand_siblings(siblings, start, count, levels, bits, words, v):
    """Set v (32, LANES) to the transform of the siblings' codes, unsigned and unscaled."""
    words[:] = 0
    for lane in range(count):
        load_codes(siblings[start + lane], bits, words, lane)
    expand(words, bits, levels, v)
    fwht(v, SCALE)


@jit
def _quantize_paired(x, siblings, levels, bits, packed):
    """Quantise x (n, 32) beside the lender's blocks to packed (n, block_bytes)."""
    v = np.empty((QK, LANES), np.float32)
    words = np.zeros((4, LANES), np.int32)
    norm, rn = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        norms(v, norm)
        _expand_siblings(siblings, start, count, levels, bits, words, v)
        norms(v, rn)
        for lane in range(count):
            dead = norm[lane] < TINY
            scale = norm[lane] if dead else corrected_scale(norm[lane], rn[lane])
            packed[start + lane] = 0
            store_fp16(scale, packed[start + lane], 0)


@jit
def _dequantize_paired(packed, siblings, levels, bits, y):
    """Dequantise packed (n, block_bytes) beside the lender's blocks to y (n, 32)."""
    v = np.empty((QK, LANES), np.float32)
    words = np.zeros((4, LANES), np.int32)
    for start in range(0, y.shape[0], LANES):
        count = min(LANES, y.shape[0] - start)
        _expand_siblings(siblings, start, count, levels, bits, words, v)
        for lane in range(count):
            d = load_fp16(packed[start + lane], 0)
            signs = load_word(siblings[start + lane], 2 + 4 * bits)
            for j in range(QK):
                signed = d if signs & np.int32(1 << j) else -d
                y[start + lane, j] = ZERO if d < TINY else v[j, lane] * signed


def kernels(codec: SignedBlocks | BorrowedCodes) -> RowKernels:
    """Return the kernels of a ktq format, or of xktq2_1 alone."""
    return _borrowed(codec) if isinstance(codec, BorrowedCodes) else _signed(codec)


def _signed(codec: SignedBlocks) -> RowKernels:
    bits, size = codec.bits, codec.block_bytes
    levels = CODEBOOKS[bits] * SCALE
    limits = thresholds(levels, squared) if bits > 1 else np.zeros(1, np.float32)
    stochastic = codec.draw == "stochastic"
    flip = np.int32(0 if codec.plus_bit else -1)
    at = codec.layout.offset("sb")

    def quantize(x, packed, first):
        row_blocks = x.shape[-1] // QK if codec.position == "row" else x.size + 1
        args = (first, row_blocks, sign_words(), levels, tuple(limits), stochastic, bits)
        _quantize(x.reshape(-1, QK), *args, packed.reshape(-1, size))

    def dequantize(packed, y):
        _dequantize(packed.reshape(-1, size), levels, flip, bits, y.reshape(-1, QK))

    def scaled_levels(packed, y):
        _levels(packed.reshape(-1, size), levels, bits, y.reshape(-1, QK))

    def rotate(x, blocks):
        _rotate(x, blocks, at, flip, True)

    def unrotate(x, blocks):
        _rotate(x, blocks, at, flip, False)

    return RowKernels(quantize, dequantize, scaled_levels, rotate, unrotate)


def _borrowed(codec: BorrowedCodes) -> RowKernels:
    def quantize(x, packed, first):
        _quantize_alone(x.reshape(-1, QK), packed.reshape(-1, codec.block_bytes))

    def dequantize(packed, y):
        y[:] = ZERO

    return RowKernels(quantize, dequantize, dequantize)


def paired_kernels(codec: BorrowedCodes):
    """Return quantize(x, siblings, packed) and dequantize(packed, siblings, y) over blocks."""
    bits = codec.lender.bits
    levels = CODEBOOKS[bits] * SCALE

    def quantize(x, siblings, packed):
        _quantize_paired(x, siblings, levels, bits, packed)

    def dequantize(packed, siblings, y):
        _dequantize_paired(packed, siblings, levels, bits, y)

    return quantize, dequantize
