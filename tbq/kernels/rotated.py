"""Numba kernels for groups of 128 values between sign vectors and a Hadamard transform.

Sixteen groups lie side by side, value j of lane k at [16 j + k] of a flat array, so that every
operation is a vector: inner loops run over lanes or over values of all lanes, lanes never mix, and
within a lane every sum and butterfly happens in the order of the C code.

A sign commutes with a factor next to it without rounding, so both are one factor here.

Codes are handled eight at a time, as a word of `bits` bytes; `places` says where in a group each of
those bytes is stored, which is all that the kernels know of the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from tbq.cells import Cells
from tbq.codec import Codec
from tbq.kernels.compile import jit
from tbq.kernels.lanes import (
    chooser,
    expander,
    first_lengths,
    joined,
    load,
    packer,
    store,
    transform,
    word_expander,
)
from tbq.kernels.numerics import load_fp16, store_fp16
from tbq.kernels.simd import (
    Lanes,
    Tables,
    Vector,
    level_table,
    on_lanes,
    on_words,
    search_table,
)

GROUP = 128
LANES = 16
SIZE = GROUP * LANES
TILE = 8 * LANES
WORDS = GROUP // 8
QUARTERS, QUARTER = 4, GROUP // 4  # blocks of 32 values have a norm each
ORDERS = {"ordered": 0, "tree": 1, "warps": 2}
TREE, WARPS = ORDERS["tree"], ORDERS["warps"]
TINY = np.float32(1e-10)
ZERO, ONE = np.float32(0.0), np.float32(1.0)
ZERO_CODE, ONE_CODE, ALL_BITS = np.int32(0), np.int32(1), np.int32(-1)


class Plan(NamedTuple):
    """What an encoder does, in numbers.

    Attributes:
        divides: whether values are divided by the norm or multiplied by its inverse, which is 0
            for norms that are tiny.
        floor: the least norm.
        corrected: whether the norm is divided by that of the centroids.
        clears_nan: whether a norm that is NaN turns the values to zeros.
        before: float32 (SIZE,), signs before the transform, each for all lanes.
        after: the same, factors behind it; or what another transform needs.
        edges: boundaries between cells, a `search_table`.
        squares: of the centroids, a `level_table`.
        scales, places, zeros: where in a group the norms, bytes of codes and zeros are stored.
    """

    divides: bool
    floor: np.float32
    corrected: bool
    clears_nan: bool
    before: np.ndarray
    after: np.ndarray
    edges: np.ndarray
    squares: np.ndarray
    scales: np.ndarray
    places: np.ndarray
    zeros: np.ndarray


def cell_tables(cells: Cells) -> dict:
    """Return the fields of a plan that say what the cells are."""
    if not 2 <= cells.bits <= 4:
        raise NotImplementedError(f"kernels choose among 4 to 16 cells, not among those of {cells}")
    return {
        "edges": search_table(cells.edges),
        "squares": level_table(cells.levels * cells.levels),
    }


def stored(codec: Codec, *fields: str) -> np.ndarray:
    """Return where in a group the fields' bytes are, those of eight codes after one another."""
    layout, per_block = codec.layout, codec.block_values // 8
    spans = [np.arange(layout.dtype.itemsize)[layout.span(name)] for name in fields]
    spans = [span.reshape(per_block, -1) for span in spans]
    block = np.concatenate(spans, axis=1).reshape(-1)
    return (np.arange(codec.group_blocks)[:, None] * codec.block_bytes + block).reshape(-1)


def scale_places(codec: Codec) -> np.ndarray:
    """Return where in a group the norm of each quarter of its values is, (QUARTERS,)."""
    first = codec.layout.offset(codec.layout.scales[0])
    places = np.arange(codec.group_blocks) * codec.block_bytes + first
    return np.repeat(places, QUARTERS // codec.group_blocks)


def zero_places(codec: Codec) -> np.ndarray:
    """Return where in a group the encoder writes zeros."""
    spans = [np.arange(codec.block_bytes)[codec.layout.span(f)] for f in codec.layout.padding]
    return np.concatenate([np.zeros(0, np.int64), *spans])


def in_lanes(factors: np.ndarray) -> np.ndarray:
    """Return the factors of values, each for all lanes."""
    return np.repeat(factors, LANES)


# --- lanes ---------------------------------------------------------------------------------------


def _tree(terms: list[Vector]) -> Vector:
    """Return the sum of 32 terms: term i takes term i + h, h = 16 ... 1."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [a + b for a, b in zip(terms[:half], terms[half:], strict=True)]
    return terms[0]


def _sum(term: Callable[[int], Vector], order: int) -> Vector:
    """Return the sum of 128 terms that are not negative: that sums start at zero is nothing."""
    if order == TREE:
        n = GROUP // 4
        return _tree(
            [(term(k) + term(k + 2 * n)) + (term(k + n) + term(k + 3 * n)) for k in range(n)]
        )
    if order == WARPS:
        parts = [_tree([term(32 * part + k) for k in range(32)]) for part in range(4)]
    else:
        parts = [term(j) for j in range(GROUP)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@cache
def norming(order: int):
    """Return norms(v, norm): the L2 norm of each lane of v, its squares summed in an order."""

    @on_lanes(LANES)
    def norms(v: Lanes, norm: Lanes) -> None:
        norm[0] = _sum(lambda j: v[j] * v[j], order).sqrt()

    return norms


@cache
def correcting(order: int):
    """Return correct(norm, s, r): norm (LANES,) over the root of sums of squares s.

    A root that is nothing changes nothing; r (LANES,) is scratch.
    """

    @on_lanes(LANES)
    def set_roots(s: Lanes, root: Lanes) -> None:
        root[0] = _sum(lambda j: s[j], order).sqrt()

    @jit
    def correct(norm, s, r):
        set_roots(s, r)
        for lane in range(LANES):
            norm[lane] = norm[lane] / r[lane] if r[lane] > TINY else norm[lane]

    return correct


@on_lanes(LANES, times=4, v=32)
def _begin_alone(v: Lanes) -> None:
    first_lengths(v, lambda j: v[j])


@on_lanes(LANES, times=4, v=32, before=32)
def begin_times(v: Lanes, before: Lanes) -> None:
    """Multiply v by before (SIZE,), and do butterflies of length 1, 2 and 4."""
    first_lengths(v, lambda j: v[j] * before[j])


@on_lanes(LANES, times=4, v=32)
def _middle(v: Lanes) -> None:
    """Do butterflies of length 8 and 16."""
    for j in range(8):
        transform(v, range(j, 32, 8))


@on_lanes(LANES, times=4, v=8, after=8)
def _end(v: Lanes, after: Lanes) -> None:
    """Do butterflies of length 32 and 64, and multiply by after."""
    for j in range(8):
        transform(v, range(j, GROUP, 32), after)


@jit
def end(v, after):
    """Do butterflies of length 8 to 64, and multiply by after (SIZE,)."""
    _middle(v)
    _end(v, after)


@jit
def fwht(v, after):
    """Transform each lane of v: butterflies of length 1 to 64, then times after (SIZE,)."""
    _begin_alone(v)
    end(v, after)


@on_lanes(LANES, times=GROUP // 8, v=8, signs=8)
def give_signs(v: Lanes, signs: Lanes) -> None:
    """Multiply v by signs (SIZE,)."""
    for j in range(8):
        v[j] = v[j] * signs[j]


def _multiplied(v: Lanes, factor: Lanes, signs: Lanes, kept: Lanes, j: int) -> Vector:
    return ((v[j] * (factor[0] * signs[j])).bits() & kept[0]).floats()


def _divided(v: Lanes, divisor: Lanes, signs: Lanes, kept: Lanes, j: int) -> Vector:
    return ((v[j] / (divisor[0] * signs[j])).bits() & kept[0]).floats()


@on_lanes(LANES, times=4, v=32, signs=32)
def _multiply(v: Lanes, factor: Lanes, signs: Lanes, kept: Lanes) -> None:
    """Multiply by a factor of each lane with signs (SIZE,); zeros where kept, int32, is 0."""
    for j in range(32):
        v[j] = _multiplied(v, factor, signs, kept, j)


@on_lanes(LANES, times=4, v=32, signs=32)
def _divide(v: Lanes, divisor: Lanes, signs: Lanes, kept: Lanes) -> None:
    """Divide by a divisor of each lane with signs (SIZE,); zeros where kept, int32, is 0."""
    for j in range(32):
        v[j] = _divided(v, divisor, signs, kept, j)


@on_lanes(LANES, times=4, v=32, signs=32)
def _begin_multiplied(v: Lanes, factor: Lanes, signs: Lanes, kept: Lanes) -> None:
    first_lengths(v, lambda j: _multiplied(v, factor, signs, kept, j))


@on_lanes(LANES, times=4, v=32, signs=32)
def _begin_divided(v: Lanes, divisor: Lanes, signs: Lanes, kept: Lanes) -> None:
    first_lengths(v, lambda j: _divided(v, divisor, signs, kept, j))


@jit
def _prepare(norm, plan, factor, kept):
    """Raise norm to its floor, or set factor to its inverse; kept is 0 for lanes to clear."""
    for lane in range(LANES):
        kept[lane] = ZERO_CODE if plan.clears_nan and np.isnan(norm[lane]) else ALL_BITS
        if plan.divides:
            norm[lane] = plan.floor if norm[lane] < plan.floor else norm[lane]
        else:
            factor[lane] = ONE / norm[lane] if norm[lane] > TINY else ZERO


@jit
def normalise(v, norm, plan, factor, kept):
    """Turn lanes v into unit vectors with the signs of plan.before; norm is raised to its floor.

    factor (LANES,) float32 and kept (LANES,) int32 are scratch.
    """
    _prepare(norm, plan, factor, kept)
    if plan.divides:
        _divide(v, norm, plan.before, kept)
    else:
        _multiply(v, factor, plan.before, kept)


@jit
def turn(v, norm, plan, factor, kept):
    """Do what `normalise` does, and transform."""
    _prepare(norm, plan, factor, kept)
    if plan.divides:
        _begin_divided(v, norm, plan.before, kept)
    else:
        _begin_multiplied(v, factor, plan.before, kept)
    end(v, plan.after)


@jit
def turn_back(v, before, after):
    """Multiply lanes v by before (SIZE,), transform them, and multiply them by after."""
    begin_times(v, before)
    end(v, after)


@jit
def rotate(x, before, after):
    """Multiply x (n, 128) by signs (SIZE,), transform it, multiply it by after, in place."""
    v = np.empty(SIZE, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        turn_back(v, before, after)
        store(v, start, count, x)


# --- words of eight codes ------------------------------------------------------------------------

# How eight codes make up a word of 2, 3 or 4 bytes.
STREAM2, STREAM3, STREAM4, SPLIT, OVERWRITTEN = range(5)
STREAMS = {2: STREAM2, 3: STREAM3, 4: STREAM4}
BYTES = {STREAM2: 2, STREAM3: 3, STREAM4: 4, SPLIT: 3, OVERWRITTEN: 3}


@on_lanes(LANES, times=WORDS, codes=8, words=1)
def _pack_split(codes: Lanes, words: Lanes) -> None:
    """Pack low bits, then third bits, of 3-bit codes."""
    low = joined((2 * i, codes[i] & 3) for i in range(8))
    words[0] = low | joined((16 + i, codes[i] >> 2) for i in range(8))


@on_lanes(LANES, times=WORDS, codes=8, words=1)
def _pack_overwritten(codes: Lanes, words: Lanes) -> None:
    """Pack as Excidos' packer does: later 3-bit codes fall on the first byte."""
    shifts = [0, 3, 6, 0, 0, 0, 0, 0]
    words[0] = joined((shift, codes[i]) for i, shift in enumerate(shifts)) & 255


@on_lanes(LANES, "levels", times=WORDS, words=1, v=8)
def _expand_split(words: Lanes, levels: Tables, v: Lanes) -> None:
    for i in range(8):
        code = words[0] >> 2 * i & 3 | (words[0] >> 16 + i & 1) << 2
        v[i] = levels.look_up_level(3, code)


@on_words
def _expand_split_word(words, tables, factor):
    low, high = words[0].unsigned_shift(range(0, 16, 2)), words[0].unsigned_shift(range(16, 24))
    return tables[0].look_up_level(3, low & 3 | (high & 1) << 2) * factor


@cache
def writer(kind: int):
    """Return write(codes, start, count, places, words, packed): lanes to groups from start on."""
    bits = BYTES[kind]

    own = {SPLIT: _pack_split, OVERWRITTEN: _pack_overwritten}
    pack = own.get(kind) or packer(bits, GROUP)

    @jit
    def write(codes, start, count, places, words, packed):
        pack(codes, words)
        for lane in range(count):
            out = packed[start + lane]
            for g in range(WORDS):
                word = words[g * LANES + lane]
                for k in range(bits):
                    out[places[bits * g + k]] = np.uint8((word >> (8 * k)) & 255)

    return write


@cache
def reader(kind: int):
    """Return read(packed, start, count, places, levels, words, v): groups to lanes of levels.

    levels is a `level_table`; words (WORDS * LANES,) is scratch.
    """
    bits = BYTES[kind]

    expand = _expand_split if kind == SPLIT else expander(bits, GROUP)

    @jit
    def read(packed, start, count, places, levels, words, v):
        for lane in range(count):
            block = packed[start + lane]
            for g in range(WORDS):
                word = ZERO_CODE
                for k in range(bits):
                    word |= np.int32(block[places[bits * g + k]]) << np.int32(8 * k)
                words[g * LANES + lane] = word
        expand(words, levels, v)

    return read


@cache
def row_reader(kind: int):
    """Return read_row(block, places, levels, first, count, factor, y, at).

    It sets y, flat from `at` on, to the levels of `count` words of a group times factor.
    """
    bits = BYTES[kind]

    expand_word = _expand_split_word if kind == SPLIT else word_expander(bits)

    @jit
    def read_row(block, places, levels, first, count, factor, y, at):
        for g in range(first, first + count):
            word = ZERO_CODE
            for k in range(bits):
                word |= np.int32(block[places[bits * g + k]]) << np.int32(8 * k)
            expand_word((np.int32(word),), (levels,), factor, y, at + 8 * g)

    return read_row


@cache
def code_reader(bits: int):
    """Return read_codes(data, levels, factor, out): codes of so many bits, one after the other.

    out, contiguous, is set to levels, a `level_table`, times a factor.
    """
    expand_word = word_expander(bits)

    @jit
    def read_codes(data, levels, factor, out):
        for g in range(out.size // 8):
            word = ZERO_CODE
            for k in range(bits):
                word |= np.int32(data[bits * g + k]) << np.int32(8 * k)
            expand_word((np.int32(word),), (levels,), factor, out, 8 * g)

    return read_codes


# --- codecs of cells -----------------------------------------------------------------------------


@cache
def quantizer(kind: int, bits: int, rule: str, order: int, turning=turn):
    """Return quantize(x, plan, packed) of x (n, 128) to packed (n, bytes of a group).

    turning: a kernel that does what `turn` does, with other rotations.
    """
    norms, correct = norming(order), correcting(order)
    choose, write = chooser(bits, rule, GROUP), writer(kind)

    @jit
    def quantize(x, plan, packed):
        v, s = np.empty(SIZE, np.float32), np.empty(SIZE, np.float32)
        codes, words = np.empty(SIZE, np.int32), np.empty(WORDS * LANES, np.int32)
        norm, scratch = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        kept = np.empty(LANES, np.int32)
        for start in range(0, x.shape[0], LANES):
            count = min(LANES, x.shape[0] - start)
            load(x, start, count, v)
            norms(v, norm)
            turning(v, norm, plan, scratch, kept)
            choose(v, plan.edges, plan.squares, codes, s)
            if plan.corrected:
                correct(norm, s, scratch)
            write(codes, start, count, plan.places, words, packed)
            for lane in range(count):
                out = packed[start + lane]
                for at in plan.scales:
                    store_fp16(norm[lane], out, at)
                for at in plan.zeros:
                    out[at] = 0

    return quantize


@cache
def leveller(kind: int):
    """Return levels(packed, places, scales, table, y): y (n, 128) is centroid times norm."""
    read_row = row_reader(kind)

    @jit
    def levels(packed, places, scales, table, y):
        count = WORDS // QUARTERS
        for b in range(packed.shape[0]):
            for part in range(QUARTERS):
                norm = load_fp16(packed[b], scales[part])
                read_row(packed[b], places, table, part * count, count, norm, y, b * GROUP)

    return levels


@jit
def store_scaled(v, start, count, packed, scales, y):
    """Write the first lanes of v times the norms of packed to groups [start, start + count)."""
    store(v, start, count, y)
    for lane in range(count):
        block, out = packed[start + lane], y[start + lane]
        for part in range(QUARTERS):
            norm = load_fp16(block, scales[part])
            own = out[part * QUARTER : (part + 1) * QUARTER]
            for j in range(QUARTER):
                own[j] *= norm


@cache
def restorer(kind: int, turning=turn_back):
    """Return restore(packed, places, scales, table, before, after, y).

    It sets y (n, 128) to the centroids, rotated back, times norm.
    """
    read = reader(kind)

    @jit
    def restore(packed, places, scales, table, before, after, y):
        v, words = np.empty(SIZE, np.float32), np.zeros(WORDS * LANES, np.int32)
        for start in range(0, packed.shape[0], LANES):
            count = min(LANES, packed.shape[0] - start)
            read(packed, start, count, places, table, words, v)
            turning(v, before, after)
            store_scaled(v, start, count, packed, scales, y)

    return restore


@jit
def rotate_and_scale(packed, scales, before, after, y):
    """Rotate y (n, 128) as `rotate` does, then multiply it by the norms, in place."""
    v = np.empty(SIZE, np.float32)
    for start in range(0, packed.shape[0], LANES):
        count = min(LANES, packed.shape[0] - start)
        load(y, start, count, v)
        turn_back(v, before, after)
        store_scaled(v, start, count, packed, scales, y)
