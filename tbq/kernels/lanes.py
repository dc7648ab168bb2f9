"""Sixteen blocks side by side, value j of lane k at [16 j + k] of a flat array.

Every operation is a vector then, see `tbq.kernels.simd`. Lanes never mix, and within a lane each
sum and butterfly happens in the order of the C code. Most of what is here is for blocks of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np

from tbq.families.ktq import SCALE, TINY
from tbq.kernels.compile import jit
from tbq.kernels.simd import Lanes, Tables, Vector, on_lanes, on_words
from tbq.kernels.transpose import SIDE, transpose8

QK = 32
LANES = 16
SIZE = QK * LANES
GROUPS = QK // 8  # of eight codes, which fill a word
WORDS = GROUPS * LANES
ZERO, ONE = np.float32(0.0), np.float32(1.0)
I32 = np.int32
SIGN = -(1 << 31)
FACTOR = float(SCALE)  # of the transform


@jit
def load(x, start, count, v):
    """Set lanes v (n * LANES,) to the first n values of rows [start, start + count) of x.

    n is a multiple of eight; lanes without a row are set to zero.
    """
    width = x.shape[1]
    whole = count // SIDE * SIDE
    for lane in range(0, whole, SIDE):
        for j in range(0, v.size // LANES, SIDE):
            transpose8(x, (start + lane) * width + j, width, v, j * LANES + lane, LANES)
    for lane in range(whole, LANES):
        for j in range(v.size // LANES):
            v[j * LANES + lane] = x[start + lane, j] if lane < count else ZERO


@jit
def store(v, start, count, y):
    """Write the first lanes of v (n * LANES,) to the first n values of rows of y from start on."""
    width = y.shape[1]
    whole = count // SIDE * SIDE
    for lane in range(0, whole, SIDE):
        for j in range(0, v.size // LANES, SIDE):
            transpose8(v, j * LANES + lane, LANES, y, (start + lane) * width + j, width)
    for lane in range(whole, count):
        for j in range(v.size // LANES):
            y[start + lane, j] = v[j * LANES + lane]


@on_lanes(LANES)
def norms(v: Lanes, norm: Lanes) -> None:
    """Set norm (LANES,) to the L2 norm of each lane, summed in index order."""
    total = v[0] * v[0]  # plus zero, which makes no difference to a square
    for j in range(1, QK):
        total = total + v[j] * v[j]
    norm[0] = total.sqrt()


@on_lanes(LANES)
def invert(norm: Lanes, inverse: Lanes) -> None:
    """Set inverse (LANES,) to one over the norms."""
    inverse[0] = norm[0].reciprocal()


@on_lanes(LANES)
def multiply(v: Lanes, factor: Lanes) -> None:
    """Multiply each lane of v by its factor (LANES,)."""
    for j in range(QK):
        v[j] = v[j] * factor[0]


def _with_sign(value: Vector, words: Vector, j: int) -> Vector:
    """Negate a value where bit j of words is not set."""
    top = words << (31 - j) if j < 31 else words
    return (value.bits() ^ (~top & SIGN)).floats()


@on_lanes(LANES)
def give_signs(v: Lanes, words: Lanes) -> None:
    """Negate value j of each lane whose word, of words (LANES,) int32, has bit j not set."""
    for j in range(QK):
        v[j] = _with_sign(v[j], words[0], j)


# --- the Hadamard transform: butterflies of length 1 to 16, then a factor ------------------------


def butterflies(x: Sequence[Vector]) -> list[Vector]:
    """Return the transform of a few vectors, a power of two, without a factor."""
    length = 1
    while length < len(x):
        pairs = [(x[i ^ (i & length)], x[i | length], i & length) for i in range(len(x))]
        x = [a - b if below else a + b for a, b, below in pairs]
        length *= 2
    return list(x)


def transform(v: Lanes, own: Iterable[int], after: Lanes | None = None) -> None:
    """Set those rows of v to their transform, times the same rows of after."""
    own = list(own)
    for k, y in zip(own, butterflies([v[k] for k in own]), strict=True):
        v[k] = y if after is None else y * after[k]


def first_lengths(v: Lanes, values: Callable[[int], Vector]) -> None:
    """Set 32 rows of v to what values(j) is after butterflies of length 1, 2 and 4."""
    for start in range(0, 32, 8):
        for i, y in enumerate(butterflies([values(start + i) for i in range(8)])):
            v[start + i] = y


def _second_half(v: Lanes, j: int) -> list[tuple[int, Vector]]:
    """Return values j, j + 8 ... transformed, with their indices."""
    own = range(j, QK, 8)
    return [(k, y * FACTOR) for k, y in zip(own, butterflies([v[k] for k in own]), strict=True)]


@on_lanes(LANES)
def _begin(v: Lanes) -> None:
    first_lengths(v, lambda j: v[j])


@on_lanes(LANES)
def begin_signed(v: Lanes, words: Lanes, factor: Lanes) -> None:
    """Multiply by factor, give signs, and do the first half of a transform."""
    first_lengths(v, lambda j: _with_sign(v[j] * factor[0], words[0], j))


@on_lanes(LANES)
def end(v: Lanes) -> None:
    """Do the second half of a transform."""
    for j in range(8):
        for k, y in _second_half(v, j):
            v[k] = y


@on_lanes(LANES)
def end_signed(v: Lanes, words: Lanes, factor: Lanes) -> None:
    """Do the second half of a transform, give signs, and multiply by factor."""
    for j in range(8):
        for k, y in _second_half(v, j):
            v[k] = _with_sign(y, words[0], k) * factor[0]


@jit
def fwht(v):
    """Transform each lane of v."""
    _begin(v)
    end(v)


# --- codes: eight of `bits` each are a word ------------------------------------------------------


def joined(parts: Iterable[tuple[int, Vector]]) -> Vector:
    """Return a word of parts, each shifted to the left by its number of bits."""
    (shift, word), *others = parts
    word = word << shift
    for shift, part in others:
        word = word | part << shift
    return word


@cache
def packer(bits: int, rows: int = QK):
    """Return pack(codes, words): int32 codes of so many bits, in so many rows, to words."""

    @on_lanes(LANES, times=rows // 8, codes=8, words=1)
    def pack(codes: Lanes, words: Lanes) -> None:
        words[0] = joined((bits * i, codes[i]) for i in range(8))

    return pack


@cache
def chooser(bits: int, rule: str, rows: int):
    """Return choose(v, edges, table, codes, s): codes of so many bits by a rule of `Tables.search`.

    edges is a `search_table`; s is set to the entries of the cells in a `level_table`.
    """

    @on_lanes(LANES, "edges", "table", times=rows // 8, v=8, codes=8, s=8)
    def choose(v: Lanes, edges: Tables, table: Tables, codes: Lanes, s: Lanes) -> None:
        for i in range(8):
            codes[i] = -edges.search(bits, v[i], rule)
            s[i] = table.look_up_level(bits, codes[i])

    return choose


@cache
def finder(bits: int):
    """Return find(v, limits, words): words of how many limits are not above each value.

    limits is a `search_table` of as many as there are codes but one.
    """

    @on_lanes(LANES, "limits")
    def find(v: Lanes, limits: Tables, words: Lanes) -> None:
        for g in range(GROUPS):
            word = limits.search(bits, v[8 * g], ">=")
            for i in range(1, 8):
                word = word + (limits.search(bits, v[8 * g + i], ">=") << bits * i)
            words[g] = -word

    return find


@cache
def end_finder(bits: int):
    """Return find(v, limits, words): `finder` after the second half of a transform."""

    @on_lanes(LANES, "limits")
    def find(v: Lanes, limits: Tables, words: Lanes) -> None:
        word: list = [None] * GROUPS
        for j in range(8):
            for k, y in _second_half(v, j):
                code = limits.search(bits, y, ">=") << bits * j
                word[k // 8] = word[k // 8] + code if j else code
        for g in range(GROUPS):
            words[g] = -word[g]

    return find


@cache
def expander(bits: int, rows: int = QK):
    """Return expand(words, levels, v): so many rows v are the levels, a `level_table`, of words."""

    @on_lanes(LANES, "levels", times=rows // 8, words=1, v=8)
    def expand(words: Lanes, levels: Tables, v: Lanes) -> None:
        for i in range(8):
            v[i] = levels.look_up_level(bits, words[0] >> bits * i)

    return expand


@cache
def expander_and_begin(bits: int):
    """Return expand(words, levels, v): `expander`, and the first half of a transform."""

    @on_lanes(LANES, "levels")
    def expand(words: Lanes, levels: Tables, v: Lanes) -> None:
        word = [words[g] for g in range(GROUPS)]
        first_lengths(v, lambda j: levels.look_up_level(bits, word[j // 8] >> bits * (j % 8)))

    return expand


@cache
def word_expander(bits: int):
    """Return the intrinsic that sets eight values of a row to levels of a word times a factor."""

    @on_words
    def expand(words, tables, factor):
        codes = words[0].unsigned_shift(range(0, 8 * bits, bits))
        return tables[0].look_up_level(bits, codes) * factor

    return expand


# --- blocks in memory ----------------------------------------------------------------------------


@on_lanes(LANES)
def widen(half: Lanes, d: Lanes) -> None:
    """Set d (LANES,) to the values of binary16 bits, int32; see `tbq.kernels.numerics`."""
    sign, magnitude = (half[0] & 0x8000) << 16, (half[0] & 0x7FFF) << 13
    scaled = (magnitude.floats() * 2.0**112).bits()
    special = magnitude >= 0x0F800000  # infinity or NaN
    d[0] = (special.where(magnitude | 0x7F800000, scaled) | sign).floats()


@on_lanes(LANES)
def correct(norm: Lanes, reconstructed: Lanes, half: Lanes) -> None:
    """Set half (LANES,) to the binary16 bits of the scales that keep the norms of blocks.

    A norm below TINY is stored as it is; see `tbq.kernels.numerics.corrected_scale`.
    """
    n, r = norm[0], reconstructed[0]
    alive = n.not_below(float(TINY))
    half[0] = narrow((r > float(TINY)).where(alive.where(n / r, n), n))


def narrow(x: Vector) -> Vector:
    """Return the binary16 bits of floats as int32; see `tbq.numerics.fp16_bits`."""
    sign, magnitude = x.bits().unsigned_shift(16) & 0x8000, x.bits() & 0x7FFFFFFF
    shifted = (magnitude.floats() + 0.5).bits() - 0x3F000000  # rounds to what is subnormal
    odd = magnitude.unsigned_shift(13) & 1
    rebiased = (magnitude - 0x38000000 + 0xFFF + odd).unsigned_shift(13)
    half = (magnitude >= 0x38800000).where(rebiased, shifted)
    infinite = magnitude * 0 + 0x7C00
    half = (magnitude >= 0x477FF000).where(infinite, half)
    return (magnitude > 0x7F800000).where(infinite + 0x200, half) | sign


@jit
def store_half(half, out, at):
    """Write two bytes to out[at : at + 2], low byte first."""
    out[at], out[at + 1] = np.uint8(half & 0xFF), np.uint8(half >> 8)


@jit
def load_half(data, at):
    """Return the two bytes data[at : at + 2], low byte first."""
    return I32(I32(data[at]) | I32(I32(data[at + 1]) << I32(8)))


@jit
def load_word(data, at):
    """Return the four bytes data[at : at + 4], low byte first."""
    return np.int32(
        np.int64(data[at])
        | np.int64(data[at + 1]) << 8
        | np.int64(data[at + 2]) << 16
        | np.int64(data[at + 3]) << 24
    )


@jit
def store_word(word, out, at):
    """Write a word to out[at : at + 4], low byte first."""
    for k in range(4):
        out[at + k] = np.uint8((word >> (8 * k)) & 0xFF)


@cache
def code_loader(bits: int):
    """Return load_codes(block, words, lane): a lane of words is a block's codes, from byte 2 on."""

    @jit
    def load_codes(block, words, lane):
        for g in range(GROUPS):
            word = I32(0)
            for k in range(bits):
                word |= I32(block[2 + bits * g + k]) << I32(8 * k)
            words[g * LANES + lane] = word

    return load_codes


@cache
def code_storer(bits: int):
    """Return store_codes(words, lane, block), which does the opposite."""

    @jit
    def store_codes(words, lane, block):
        for g in range(GROUPS):
            word = words[g * LANES + lane]
            for k in range(bits):
                block[2 + bits * g + k] = np.uint8((word >> (8 * k)) & 0xFF)

    return store_codes
