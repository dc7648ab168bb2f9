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
    SIZE,
    WORDS,
    ZERO,
    count_above,
    fwht,
    give_signs,
    load,
    load_codes,
    load_word,
    multiply,
    norms,
    store,
    store_codes,
    store_word,
)
from tbq.kernels.lanes import pack as pack_lanes
from tbq.kernels.mirrored import choose, upper_levels
from tbq.kernels.numerics import corrected_scale, load_fp16, store_fp16
from tbq.kernels.rotated import halves
from tbq.nearest import squared, thresholds

WORD_STEP = np.float32(1.0 / 65536.0)
INFINITY = np.float32(np.inf)
I32 = np.int32


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
def _draw_uniform(seed, u):
    """Set u, lanes, to the draws of sixteen blocks, from 0 up to 1, by their seeds (LANES,)."""
    for j in range(QK):
        own = u[j * LANES : (j + 1) * LANES]
        for lane in range(LANES):
            word = _philox6(QK + j, seed[lane])
            own[lane] = np.float32(np.int32(word & np.uint64(0xFFFF))) * WORD_STEP


@jit
def _draw_of_two(v, u, levels, codes):
    """Set codes to the upper level as often as lanes v are near it."""
    low, high = levels[0], levels[1]
    for k in range(SIZE):
        p1 = (v[k] - low) / (high - low)
        p1 = min(max(p1, ZERO), ONE)
        codes[k] = I32(1) if u[k] < p1 else I32(0)


@jit
def _two_nearest(r, level, code, found):
    """Return the two least distances and their codes, with one level more."""
    b1, b2, first, second = found
    distance = abs(r - level)
    nearest, next_nearest = distance < b1, distance < b2
    second = first if nearest else (code if next_nearest else second)
    b2 = b1 if nearest else (distance if next_nearest else b2)
    return distance if nearest else b1, b2, code if nearest else first, second


@jit
def _draw_of_many(v, u, levels, codes):
    """Set codes to one of the two levels nearest to each of lanes v; levels are in two halves."""
    low, high = levels
    for k in range(SIZE):
        r, code = v[k], I32(0)
        found = (INFINITY, INFINITY, I32(0), I32(0))
        for level in low:
            found = _two_nearest(r, level, code, found)
            code = I32(code + I32(1))
        for level in high:
            found = _two_nearest(r, level, code, found)
            code = I32(code + I32(1))
        b1, b2, first, second = found
        total = b1 + b2
        taken = second if u[k] >= b2 / total else first
        codes[k] = taken if total > TINY else first


@jit
def _quantize(x, first, row_blocks, signs, cells, stochastic, bits, packed):
    """Quantise x (n, 32) to packed (n, block_bytes); block b has index first + b % row_blocks."""
    levels, parts, limits, upper = cells
    n, place = x.shape[0], 0
    seeds = np.empty(min(row_blocks, n), np.uint32)  # they repeat from row to row
    for b in range(seeds.size):
        seeds[b] = block_seed(first + b)
    v, u = np.empty(SIZE, np.float32), np.empty(SIZE, np.float32)
    codes, words = np.zeros(SIZE, np.int32), np.empty(WORDS, np.int32)
    sign_word, seed = np.zeros(LANES, np.int32), np.zeros(LANES, np.uint32)
    norm, rn = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    for start in range(0, n, LANES):
        count = min(LANES, n - start)
        load(x, start, count, v)
        norms(v, norm)
        for lane in range(count):
            seed[lane] = seeds[place]
            sign_word[lane] = signs[seed[lane]]
            place = place + 1 if place + 1 < seeds.size else 0
        for lane in range(LANES):
            inverse[lane] = ONE / norm[lane]
        multiply(v, inverse)
        give_signs(v, sign_word)
        fwht(v, SCALE)
        if stochastic:
            _draw_uniform(seed, u)
            if bits == 1:
                _draw_of_two(v, u, levels, codes)
            else:
                _draw_of_many(v, u, parts, codes)
        else:
            count_above(v, limits, codes)
        pack_lanes(codes, bits, words)
        choose(words, bits, upper, v)
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
def _clear_tiny(d, start, count, y):
    """Set the blocks from start on whose scale d (LANES,) is tiny to zeros."""
    for lane in range(count):
        if d[lane] < TINY:
            y[start + lane] = ZERO


@jit
def _dequantize(packed, upper, flip, bits, y):
    """Dequantise packed (n, block_bytes) to y (n, 32); flip is xored to the sign bits."""
    n = packed.shape[0]
    v, words = np.empty(SIZE, np.float32), np.zeros(WORDS, np.int32)
    sign_word, d = np.zeros(LANES, np.int32), np.zeros(LANES, np.float32)
    for start in range(0, n, LANES):
        count = min(LANES, n - start)
        for lane in range(count):
            block = packed[start + lane]
            d[lane] = load_fp16(block, 0)
            load_codes(block, bits, words, lane)
            sign_word[lane] = load_word(block, 2 + 4 * bits) ^ flip
        choose(words, bits, upper, v)
        fwht(v, SCALE)
        give_signs(v, sign_word)
        multiply(v, d)
        store(v, start, count, y)
        _clear_tiny(d, start, count, y)


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
    v, word = np.empty(SIZE, np.float32), np.zeros(LANES, np.int32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        for lane in range(count):
            word[lane] = load_word(blocks[start + lane], at) ^ flip
        if before:
            give_signs(v, word)
        fwht(v, SCALE)
        if not before:
            give_signs(v, word)
        store(v, start, count, x)


@jit
def _quantize_alone(x, packed):
    v = np.empty(SIZE, np.float32)
    norm = np.empty(LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        norms(v, norm)
        for lane in range(count):
            packed[start + lane] = 0
            store_fp16(norm[lane], packed[start + lane], 0)


@jit
def _expand_siblings(siblings, start, count, upper, bits, words, v):
    """Set lanes v to the transform of the siblings' codes, unsigned and unscaled."""
    words[:] = 0
    for lane in range(count):
        load_codes(siblings[start + lane], bits, words, lane)
    choose(words, bits, upper, v)
    fwht(v, SCALE)


@jit
def _quantize_paired(x, siblings, upper, bits, packed):
    """Quantise x (n, 32) beside the lender's blocks to packed (n, block_bytes)."""
    v = np.empty(SIZE, np.float32)
    words = np.zeros(WORDS, np.int32)
    norm, rn = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        norms(v, norm)
        _expand_siblings(siblings, start, count, upper, bits, words, v)
        norms(v, rn)
        for lane in range(count):
            dead = norm[lane] < TINY
            scale = norm[lane] if dead else corrected_scale(norm[lane], rn[lane])
            packed[start + lane] = 0
            store_fp16(scale, packed[start + lane], 0)


@jit
def _dequantize_paired(packed, siblings, upper, bits, y):
    """Dequantise packed (n, block_bytes) beside the lender's blocks to y (n, 32)."""
    v, words = np.empty(SIZE, np.float32), np.zeros(WORDS, np.int32)
    sign_word, d = np.zeros(LANES, np.int32), np.zeros(LANES, np.float32)
    for start in range(0, y.shape[0], LANES):
        count = min(LANES, y.shape[0] - start)
        _expand_siblings(siblings, start, count, upper, bits, words, v)
        for lane in range(count):
            d[lane] = load_fp16(packed[start + lane], 0)
            sign_word[lane] = load_word(siblings[start + lane], 2 + 4 * bits)
        give_signs(v, sign_word)
        multiply(v, d)
        store(v, start, count, y)
        _clear_tiny(d, start, count, y)


def kernels(codec: SignedBlocks | BorrowedCodes) -> RowKernels:
    """Return the kernels of a ktq format, or of xktq2_1 alone."""
    return _borrowed(codec) if isinstance(codec, BorrowedCodes) else _signed(codec)


def _signed(codec: SignedBlocks) -> RowKernels:
    bits, size = codec.bits, codec.block_bytes
    levels = CODEBOOKS[bits] * SCALE
    upper = upper_levels(levels)
    limits = thresholds(levels, squared) if bits > 1 else np.zeros(1, np.float32)
    stochastic = codec.draw == "stochastic"
    flip = np.int32(0 if codec.plus_bit else -1)
    at = codec.layout.offset("sb")

    def quantize(x, packed, first):
        row_blocks = x.shape[-1] // QK if codec.position == "row" else x.size + 1
        cells = (levels, halves(levels), tuple(limits), upper)
        args = (first, row_blocks, sign_words(), cells, stochastic, bits)
        _quantize(x.reshape(-1, QK), *args, packed.reshape(-1, size))

    def dequantize(packed, y):
        _dequantize(packed.reshape(-1, size), upper, flip, bits, y.reshape(-1, QK))

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
    upper = upper_levels(CODEBOOKS[bits] * SCALE)

    def quantize(x, siblings, packed):
        _quantize_paired(x, siblings, upper, bits, packed)

    def dequantize(packed, siblings, y):
        _dequantize_paired(packed, siblings, upper, bits, y)

    return quantize, dequantize
