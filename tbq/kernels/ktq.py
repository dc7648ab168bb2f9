"""Numba kernels of `tbq.families.ktq`: sixteen blocks at a time, see `tbq.kernels.lanes`."""

from __future__ import annotations

from functools import cache

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
    begin_signed,
    code_loader,
    code_storer,
    correct,
    end,
    end_finder,
    end_signed,
    expander_and_begin,
    fwht,
    give_signs,
    invert,
    load,
    load_half,
    load_word,
    norms,
    packer,
    store,
    store_half,
    store_word,
    widen,
)
from tbq.kernels.numerics import corrected_scale, load_fp16, store_fp16
from tbq.kernels.simd import level_table, search_table
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
def _fill_draws(seeds, draws):
    """Set draws (n + LANES, 32) to those of n blocks, from 0 up to 1, and again from the first."""
    for b in range(seeds.size):
        own, key = draws[b], seeds[b]
        for j in range(QK):
            word = _philox6(QK + j, key)
            own[j] = np.float32(np.int32(word & np.uint64(0xFFFF))) * WORD_STEP
    for b in range(seeds.size, draws.shape[0]):
        for j in range(QK):
            draws[b, j] = draws[b - seeds.size, j]


@jit
def _draw_of_two(v, u, levels, codes):
    """Set codes to the upper level as often as lanes v are near it."""
    low, high = levels
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


def _drawing(bits: int):
    """Return the choice of codes by chance."""
    pack = packer(bits)

    @jit
    def draw(v, parts, draws, place, u, codes, words):
        end(v)
        load(draws, place, LANES, u)
        if bits == 1:
            _draw_of_two(v, u, parts, codes)
        else:
            _draw_of_many(v, u, parts, codes)
        pack(codes, words)

    return draw


def _choosing(bits: int):
    """Return the choice of the nearest codes."""
    find = end_finder(bits)

    @jit
    def choose(v, limits, draws, place, u, codes, words):
        find(v, limits, words)

    return choose


@cache
def _quantizer(bits: int, stochastic: bool):
    """Return the encoder; its `choice` is what the codes are chosen by."""
    choose = _drawing(bits) if stochastic else _choosing(bits)
    expand, store_codes = expander_and_begin(bits), code_storer(bits)

    @jit
    def quantize(x, first, row_blocks, signs, choice, levels, packed):
        """Quantise x (n, 32) to packed (n, bytes); block b has index first + b % row_blocks."""
        n, place = x.shape[0], 0
        seeds = np.empty(min(row_blocks, n), np.uint32)  # they repeat from row to row
        for b in range(seeds.size):
            seeds[b] = block_seed(first + b)
        draws = np.empty((seeds.size + LANES if stochastic else 0, QK), np.float32)
        if stochastic:
            _fill_draws(seeds, draws)
        v, u = np.empty(SIZE, np.float32), np.empty(SIZE, np.float32)
        codes, words = np.zeros(SIZE, np.int32), np.empty(WORDS, np.int32)
        sign_word = np.zeros(LANES, np.int32)
        norm, rn = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        inverse, half = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
        for start in range(0, n, LANES):
            count = min(LANES, n - start)
            load(x, start, count, v)
            norms(v, norm)
            began = place
            for lane in range(count):
                sign_word[lane] = signs[seeds[place]]
                place = place + 1 if place + 1 < seeds.size else 0
            invert(norm, inverse)
            begin_signed(v, sign_word, inverse)
            choose(v, choice, draws, began, u, codes, words)
            expand(words, levels, v)
            end(v)  # the signs do not matter to the norm
            norms(v, rn)
            correct(norm, rn, half)
            for lane in range(count):
                out = packed[start + lane]
                if norm[lane] < TINY:
                    out[:] = 0
                else:
                    store_codes(words, lane, out)
                    store_word(sign_word[lane], out, 2 + 4 * bits)
                store_half(half[lane], out, 0)

    return quantize


@jit
def _clear_tiny(d, start, count, y):
    """Set the blocks from start on whose scale d (LANES,) is tiny to zeros."""
    for lane in range(count):
        if d[lane] < TINY:
            y[start + lane] = ZERO


@cache
def _dequantizer(bits: int):
    expand, load_codes = expander_and_begin(bits), code_loader(bits)

    @jit
    def dequantize(packed, levels, flip, y):
        """Dequantise packed (n, block_bytes) to y (n, 32); flip is xored to the sign bits."""
        n = packed.shape[0]
        v, words = np.empty(SIZE, np.float32), np.zeros(WORDS, np.int32)
        sign_word, half = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
        d = np.zeros(LANES, np.float32)
        for start in range(0, n, LANES):
            count = min(LANES, n - start)
            for lane in range(count):
                block = packed[start + lane]
                half[lane] = load_half(block, 0)
                load_codes(block, words, lane)
                sign_word[lane] = load_word(block, 2 + 4 * bits) ^ flip
            widen(half, d)
            expand(words, levels, v)
            end_signed(v, sign_word, d)
            store(v, start, count, y)
            _clear_tiny(d, start, count, y)

    return dequantize


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
        fwht(v)
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


@cache
def _paired(bits: int):
    """Return the kernels of blocks that borrow the codes of others."""
    expand, load_codes = expander_and_begin(bits), code_loader(bits)

    @jit
    def half_expanded(siblings, start, count, levels, words, v):
        """Set lanes v to the siblings' codes, unsigned and unscaled, half transformed."""
        words[:] = 0
        for lane in range(count):
            load_codes(siblings[start + lane], words, lane)
        expand(words, levels, v)

    @jit
    def quantize(x, siblings, levels, packed):
        """Quantise x (n, 32) beside the lender's blocks to packed (n, block_bytes)."""
        v = np.empty(SIZE, np.float32)
        words = np.zeros(WORDS, np.int32)
        norm, rn = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        for start in range(0, x.shape[0], LANES):
            count = min(LANES, x.shape[0] - start)
            load(x, start, count, v)
            norms(v, norm)
            half_expanded(siblings, start, count, levels, words, v)
            end(v)
            norms(v, rn)
            for lane in range(count):
                dead = norm[lane] < TINY
                scale = norm[lane] if dead else corrected_scale(norm[lane], rn[lane])
                packed[start + lane] = 0
                store_fp16(scale, packed[start + lane], 0)

    @jit
    def dequantize(packed, siblings, levels, y):
        """Dequantise packed (n, block_bytes) beside the lender's blocks to y (n, 32)."""
        v, words = np.empty(SIZE, np.float32), np.zeros(WORDS, np.int32)
        sign_word, d = np.zeros(LANES, np.int32), np.zeros(LANES, np.float32)
        for start in range(0, y.shape[0], LANES):
            count = min(LANES, y.shape[0] - start)
            half_expanded(siblings, start, count, levels, words, v)
            for lane in range(count):
                d[lane] = load_fp16(packed[start + lane], 0)
                sign_word[lane] = load_word(siblings[start + lane], 2 + 4 * bits)
            end_signed(v, sign_word, d)
            store(v, start, count, y)
            _clear_tiny(d, start, count, y)

    return quantize, dequantize


def _halves(levels: np.ndarray) -> tuple[tuple, tuple]:
    """Return levels in two parts: the compiler unrolls loops over tuples of up to eight."""
    middle = len(levels) // 2
    return tuple(levels[:middle]), tuple(levels[middle:])


def kernels(codec: SignedBlocks | BorrowedCodes) -> RowKernels:
    """Return the kernels of a ktq format, or of xktq2_1 alone."""
    return _borrowed(codec) if isinstance(codec, BorrowedCodes) else _signed(codec)


def _signed(codec: SignedBlocks) -> RowKernels:
    bits, size = codec.bits, codec.block_bytes
    levels = CODEBOOKS[bits] * SCALE
    table = level_table(levels)
    stochastic = codec.draw == "stochastic"
    if stochastic:
        choice = (levels[0], levels[1]) if bits == 1 else _halves(levels)
    else:
        choice = search_table(thresholds(levels, squared) if bits > 1 else np.zeros(1, np.float32))
    encode, decode = _quantizer(bits, stochastic), _dequantizer(bits)
    flip = np.int32(0 if codec.plus_bit else -1)
    at = codec.layout.offset("sb")

    def quantize(x, packed, first):
        row_blocks = x.shape[-1] // QK if codec.position == "row" else x.size + 1
        args = (first, row_blocks, sign_words(), choice, table)
        encode(x.reshape(-1, QK), *args, packed.reshape(-1, size))

    def dequantize(packed, y):
        decode(packed.reshape(-1, size), table, flip, y.reshape(-1, QK))

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
    levels = level_table(CODEBOOKS[codec.lender.bits] * SCALE)
    encode, decode = _paired(codec.lender.bits)

    def quantize(x, siblings, packed):
        encode(x, siblings, levels, packed)

    def dequantize(packed, siblings, y):
        decode(packed, siblings, levels, y)

    return quantize, dequantize
