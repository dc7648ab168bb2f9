"""Numba kernels of `tbq.families.vtq`: encoding sixteen blocks at a time, decoding row by row."""

from __future__ import annotations

from functools import cache

import numpy as np

from tbq.codec import RowKernels
from tbq.families.ktq import QK, SCALE, TINY
from tbq.families.vtq import CODEBOOKS, Distance, MixedBlocks, PlainBlocks
from tbq.kernels.compile import jit
from tbq.kernels.lanes import (
    GROUPS,
    I32,
    LANES,
    SIZE,
    WORDS,
    ZERO,
    code_storer,
    correct,
    expander,
    finder,
    invert,
    load,
    multiply,
    norms,
    store_half,
    store_word,
    word_expander,
)
from tbq.kernels.numerics import load_fp16
from tbq.kernels.simd import Lanes, Tables, level_table, on_lanes, on_words, search_table
from tbq.nearest import absolute, squared, thresholds


@cache
def _quantizer(bits: int):
    find, expand, store_codes = finder(bits), expander(bits), code_storer(bits)

    @jit
    def quantize(x, limits, levels, packed):
        """Quantise x (n, 32) to packed (n, block_bytes)."""
        n = x.shape[0]
        v, words = np.empty(SIZE, np.float32), np.empty(WORDS, np.int32)
        norm, rn = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        inverse, half = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
        for start in range(0, n, LANES):
            count = min(LANES, n - start)
            load(x, start, count, v)
            norms(v, norm)
            invert(norm, inverse)
            multiply(v, inverse)
            find(v, limits, words)
            expand(words, levels, v)
            norms(v, rn)
            correct(norm, rn, half)
            for lane in range(count):
                out = packed[start + lane]
                out[:] = 0
                store_half(half[lane], out, 0)
                if not norm[lane] < TINY:
                    store_codes(words, lane, out)

    return quantize


@cache
def _dequantizer(bits: int):
    expand = word_expander(bits)

    @jit
    def dequantize(packed, levels, y):
        """Dequantise packed (n, block_bytes) to y (n, 32)."""
        for b in range(packed.shape[0]):
            block = packed[b]
            d = load_fp16(block, 0)
            if d < TINY:
                y[b] = ZERO
                continue
            for g in range(GROUPS):
                word = I32(0)
                for k in range(bits):
                    word |= I32(block[2 + bits * g + k]) << I32(8 * k)
                expand((I32(word),), (levels,), d, y, b * QK + 8 * g)

    return dequantize


@on_lanes(LANES, "fine", "coarse")
def _find_mixed(v: Lanes, fine: Tables, coarse: Tables, words: Lanes) -> None:
    """Set words (3 * LANES,) to the eight fine codes, and to 24 coarse ones from bit 2 on."""
    found: list = [None, None, None]
    for j in range(QK):
        if j % 4 == 0:
            word, code = 0, fine.search(3, v[j], ">=") << 3 * (j // 4)
        else:
            slot = j - j // 4
            word, code = 1 + slot // 16, coarse.search(2, v[j], ">=") << 2 * (slot % 16)
        found[word] = code if found[word] is None else found[word] + code
    for k in range(3):
        words[k] = -found[k]


@on_lanes(LANES, "fine", "coarse")
def _expand_mixed(words: Lanes, fine: Tables, coarse: Tables, v: Lanes) -> None:
    """Set lanes v to the levels of such words."""
    for j in range(QK):
        slot = j - j // 4
        if j % 4 == 0:
            v[j] = fine.look_up(0, words[0].unsigned_shift(3 * (j // 4)))
        else:
            v[j] = coarse.look_up(0, words[1 + slot // 16].unsigned_shift(2 * (slot % 16)))


@jit
def _quantize_mixed(x, fine_limits, coarse_limits, fine, coarse, packed):
    """Quantise x (n, 32) to vtq_mixed blocks; j%4 == 0 is fine (3 bits), the rest coarse (2)."""
    v, words = np.empty(SIZE, np.float32), np.empty(3 * LANES, np.int32)
    norm, rn = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    inverse, half = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        norms(v, norm)
        invert(norm, inverse)
        multiply(v, inverse)
        _find_mixed(v, fine_limits, coarse_limits, words)
        _expand_mixed(words, fine, coarse, v)
        norms(v, rn)
        correct(norm, rn, half)
        for lane in range(count):
            out = packed[start + lane]
            out[:] = 0
            store_half(half[lane], out, 0)
            if not norm[lane] < TINY:
                store_word(words[lane + 2 * LANES] << 8, out, 8)
                store_word(words[lane + LANES], out, 5)
                for k in range(3):
                    out[2 + k] = np.uint8((words[lane] >> (8 * k)) & 0xFF)


@on_words
def _expand_mixed_row(words, tables, factor):
    """Return two fine levels, each before three coarse ones."""
    fine, coarse = words
    first = tables[0].look_up(0, fine.unsigned_shift([0, 0, 0, 0, 3, 0, 0, 0]))
    rest = tables[1].look_up(0, coarse.unsigned_shift([0, 0, 2, 4, 0, 6, 8, 10]))
    return first.blend(rest, [0, 1, 1, 1, 0, 1, 1, 1]) * factor


@jit
def _dequantize_mixed(packed, fine, coarse, y):
    """Dequantise packed (n, 12) to y (n, 32)."""
    for b in range(packed.shape[0]):
        block = packed[b]
        d = load_fp16(block, 0)
        if d < TINY:
            y[b] = ZERO
            continue
        word, slots = np.uint64(0), np.uint64(0)
        for k in range(3):
            word |= np.uint64(block[2 + k]) << np.uint64(8 * k)
        for k in range(7):
            slots |= np.uint64(block[5 + k]) << np.uint64(8 * k)
        for g in range(GROUPS):
            six = np.int32((word >> np.uint64(6 * g)) & np.uint64(63))
            twelve = np.int32((slots >> np.uint64(12 * g + 2)) & np.uint64(0xFFF))
            _expand_mixed_row((six, twelve), (fine, coarse), d, y, b * QK + 8 * g)


def table(bits: int, distance: Distance) -> tuple[np.ndarray, np.ndarray]:
    """Return the levels of a codebook and the thresholds between them."""
    levels = CODEBOOKS[bits] * SCALE
    if distance == "absolute":
        return levels, thresholds(levels, absolute)
    return levels, thresholds(levels, squared) if bits > 1 else np.zeros(1, np.float32)


def kernels(codec: PlainBlocks | MixedBlocks) -> RowKernels:
    """Return the kernels of a vtq*_1 format of either dialect, or of vtq_mixed."""
    return _mixed(codec) if isinstance(codec, MixedBlocks) else _plain(codec)


def _plain(codec: PlainBlocks) -> RowKernels:
    bits, size = codec.bits, codec.block_bytes
    levels, limits = table(bits, codec.distance)
    search, lookup = search_table(limits), level_table(levels)
    encode, decode = _quantizer(bits), _dequantizer(bits)

    def quantize(x, packed, first):
        encode(x.reshape(-1, QK), search, lookup, packed.reshape(-1, size))

    def dequantize(packed, y):
        decode(packed.reshape(-1, size), lookup, y.reshape(-1, QK))

    return RowKernels(quantize, dequantize, dequantize)


def _mixed(codec: MixedBlocks) -> RowKernels:
    size = codec.block_bytes
    tables = [table(3, codec.distance), table(2, codec.distance)]
    limits = [search_table(limits) for _, limits in tables]
    fine, coarse = (level_table(levels) for levels, _ in tables)

    def quantize(x, packed, first):
        _quantize_mixed(x.reshape(-1, QK), *limits, fine, coarse, packed.reshape(-1, size))

    def dequantize(packed, y):
        _dequantize_mixed(packed.reshape(-1, size), fine, coarse, y.reshape(-1, QK))

    return RowKernels(quantize, dequantize, dequantize)
