"""Numba kernels for groups of 128 values between sign vectors and a Hadamard transform.

Sixteen groups lie side by side, value j of lane k at [16 j + k] of a flat array, so that every
operation is a vector: inner loops run over lanes or over values of all lanes, lanes never mix, and
within a lane every sum and butterfly happens in the order of the C code.

A sign commutes with a factor next to it without rounding, so both are one factor here.

Codes are handled eight at a time, as a word of `bits` bytes; `places` says where in a group each of
those bytes is stored, which is all that the kernels know of the layout.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tbq.cells import Cells
from tbq.codec import Codec
from tbq.kernels.compile import jit
from tbq.kernels.mirrored import choose_levels, choose_split_levels
from tbq.kernels.numerics import load_fp16, store_fp16

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
ZERO_CODE, ONE_CODE = np.int32(0), np.int32(1)


class Plan(NamedTuple):
    """What an encoder does, in numbers.

    Attributes:
        order: of sums, a value of ORDERS.
        divides: whether values are divided by the norm or multiplied by its inverse, which is 0
            for norms that are tiny.
        floor: the least norm.
        corrected: whether the norm is divided by that of the centroids.
        clears_nan: whether a norm that is NaN turns the values to zeros.
        before: float32 (SIZE,), signs before the transform, each for all lanes.
        after: float32 (128,), factors behind it.
        upper: whether a value on a boundary, or NaN, goes up.
        edges, squares: boundaries between cells, and the square of the centroid above each, in
            two halves: the compiler unrolls loops over tuples of up to eight.
        first_square: that of the lowest centroid.
        scales, places, zeros: where in a group the norms, bytes of codes and zeros are stored.
    """

    order: int
    divides: bool
    floor: np.float32
    corrected: bool
    clears_nan: bool
    before: np.ndarray
    after: np.ndarray
    upper: bool
    edges: tuple[tuple, tuple]
    squares: tuple[tuple, tuple]
    first_square: np.float32
    scales: np.ndarray
    places: np.ndarray
    zeros: np.ndarray


def halves(table: np.ndarray) -> tuple[tuple, tuple]:
    """Return what belongs to the boundaries below zero, and to the others."""
    middle = len(table) // 2
    return tuple(table[:middle]), tuple(table[middle:])


def split_cells(cells: Cells) -> dict:
    """Return the fields of a plan that say what the cells are."""
    squares = cells.levels * cells.levels
    return {
        "edges": halves(cells.edges),
        "squares": halves(squares[1:]),
        "first_square": squares[0],
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


@jit
def load(x, start, count, v):
    """Set lanes v to groups [start, start + count) of x (n, 128), the rest to zero."""
    if count < LANES:
        v[:] = ZERO
    for lane in range(count):
        for j in range(GROUP):
            v[j * LANES + lane] = x[start + lane, j]


@jit
def store(v, start, count, y):
    """Write the first lanes of v to groups [start, start + count) of y (n, 128)."""
    for lane in range(count):
        for j in range(GROUP):
            y[start + lane, j] = v[j * LANES + lane]


@jit
def _add_tree(s, first, total):
    """Add to total the sum of 32 slots from `first`: slot i takes slot i + h, h = 16 ... 1."""
    n = LANES
    for k in range(first * n, (first + 8) * n):
        s[k] = (s[k] + s[k + 16 * n]) + (s[k + 8 * n] + s[k + 24 * n])
    for lane in range(LANES):
        k = first * n + lane
        even = (s[k] + s[k + 4 * n]) + (s[k + 2 * n] + s[k + 6 * n])
        k += n
        total[lane] += even + ((s[k] + s[k + 4 * n]) + (s[k + 2 * n] + s[k + 6 * n]))


@jit
def add_up(s, order, total):
    """Set total (LANES,) to the sums of squares s, which do not survive."""
    n = LANES
    for lane in range(LANES):
        total[lane] = ZERO
    if order == TREE:
        for k in range(32 * n):
            s[k] = (s[k] + s[k + 64 * n]) + (s[k + 32 * n] + s[k + 96 * n])
        _add_tree(s, 0, total)
    elif order == WARPS:
        _add_tree(s, 0, total)  # four calls: in a loop this does not become vectors
        _add_tree(s, 32, total)
        _add_tree(s, 64, total)
        _add_tree(s, 96, total)
    else:
        for i in range(0, GROUP, 8):
            for lane in range(LANES):
                k = i * n + lane
                half = total[lane] + s[k] + s[k + n] + s[k + 2 * n] + s[k + 3 * n]
                k += 4 * n
                total[lane] = half + s[k] + s[k + n] + s[k + 2 * n] + s[k + 3 * n]


@jit
def norms(v, order, s, norm):
    """Set norm (LANES,) to the L2 norm of each lane of v; s is scratch like v."""
    for k in range(SIZE):
        s[k] = v[k] * v[k]
    add_up(s, order, norm)
    for lane in range(LANES):
        norm[lane] = np.sqrt(norm[lane])


@jit
def _hadamard4(a, b, c, d):
    a, b, c, d = a + b, a - b, c + d, c - d
    return a + c, b + d, a - c, b - d


@jit
def fwht(v, after):
    """Transform each lane of v: butterflies of length 1 to 64, then times after (128,)."""
    n = LANES
    for start in range(0, SIZE, 8 * n):  # lengths 1, 2 and 4
        for k in range(start, start + n):
            p0, p1, p2, p3 = _hadamard4(v[k], v[k + n], v[k + 2 * n], v[k + 3 * n])
            m = k + 4 * n
            q0, q1, q2, q3 = _hadamard4(v[m], v[m + n], v[m + 2 * n], v[m + 3 * n])
            v[k], v[k + n], v[k + 2 * n], v[k + 3 * n] = p0 + q0, p1 + q1, p2 + q2, p3 + q3
            v[m], v[m + n], v[m + 2 * n], v[m + 3 * n] = p0 - q0, p1 - q1, p2 - q2, p3 - q3
    n = 8 * LANES
    for start in range(0, SIZE, 4 * n):  # lengths 8 and 16
        for k in range(start, start + n):
            p0, p1, p2, p3 = _hadamard4(v[k], v[k + n], v[k + 2 * n], v[k + 3 * n])
            v[k], v[k + n], v[k + 2 * n], v[k + 3 * n] = p0, p1, p2, p3
    n = 32 * LANES
    for j in range(32):  # lengths 32 and 64
        a0, a1, a2, a3 = after[j], after[j + 32], after[j + 64], after[j + 96]
        for k in range(j * LANES, (j + 1) * LANES):
            p0, p1, p2, p3 = _hadamard4(v[k], v[k + n], v[k + 2 * n], v[k + 3 * n])
            v[k], v[k + n], v[k + 2 * n], v[k + 3 * n] = p0 * a0, p1 * a1, p2 * a2, p3 * a3


@jit
def spread(factor, tile):
    """Repeat the factor of each lane (LANES,) throughout tile (TILE,)."""
    for start in range(0, TILE, LANES):
        tile[start : start + LANES] = factor


@jit
def give_signs(v, signs):
    """Multiply v by signs (SIZE,)."""
    for k in range(SIZE):
        v[k] *= signs[k]


@jit
def normalise(v, norm, plan, factor, tile):
    """Turn lanes v into unit vectors with the signs of plan.before; norm is raised to its floor.

    factor (LANES,) and tile (TILE,) are scratch.
    """
    if plan.divides:
        for lane in range(LANES):
            norm[lane] = plan.floor if norm[lane] < plan.floor else norm[lane]
        spread(norm, tile)
    else:
        for lane in range(LANES):
            factor[lane] = ONE / norm[lane] if norm[lane] > TINY else ZERO
        spread(factor, tile)
    for start in range(0, SIZE, TILE):
        own, signs = v[start : start + TILE], plan.before[start : start + TILE]
        if plan.divides:
            for k in range(TILE):
                own[k] /= tile[k] * signs[k]
        else:
            for k in range(TILE):
                own[k] *= tile[k] * signs[k]
    if plan.clears_nan:
        for lane in range(LANES):
            if np.isnan(norm[lane]):
                for j in range(GROUP):
                    v[j * LANES + lane] = ZERO


@jit
def choose_upper(v, edges, above, first, codes, s):
    """Set codes to the first cell with v below its upper edge, s to what belongs to the cell."""
    low, high = edges
    low_above, high_above = above
    for k in range(SIZE):
        u, code, found = v[k], ZERO_CODE, first
        for edge, value in zip(low, low_above):  # noqa: B905 (Numba has no strict)
            code += ZERO_CODE if u < edge else ONE_CODE
            found = found if u < edge else value
        for edge, value in zip(high, high_above):  # noqa: B905
            code += ZERO_CODE if u < edge else ONE_CODE
            found = found if u < edge else value
        codes[k], s[k] = code, found


@jit
def choose_lower(v, edges, above, first, codes, s):
    """Set codes to the number of edges that v exceeds, s to what belongs to the cell."""
    low, high = edges
    low_above, high_above = above
    for k in range(SIZE):
        u, code, found = v[k], ZERO_CODE, first
        for edge, value in zip(low, low_above):  # noqa: B905
            code += ONE_CODE if u > edge else ZERO_CODE
            found = value if u > edge else found
        for edge, value in zip(high, high_above):  # noqa: B905
            code += ONE_CODE if u > edge else ZERO_CODE
            found = value if u > edge else found
        codes[k], s[k] = code, found


@jit
def correct(norm, order, s, r):
    """Divide norm (LANES,) by the root of the sum of squares s, unless that is nothing."""
    add_up(s, order, r)
    for lane in range(LANES):
        root = np.sqrt(r[lane])
        norm[lane] = norm[lane] / root if root > TINY else norm[lane]


@jit
def rotate(x, before, after):
    """Multiply x (n, 128) by signs (SIZE,), transform it, multiply it by after (128,), in place."""
    v = np.empty(SIZE, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        give_signs(v, before)
        fwht(v, after)
        store(v, start, count, x)


# --- words of eight codes ------------------------------------------------------------------------

# How eight codes make up a word of 2, 3 or 4 bytes.
STREAM2, STREAM3, STREAM4, SPLIT, OVERWRITTEN = range(5)
STREAMS = {2: STREAM2, 3: STREAM3, 4: STREAM4}
BYTES = {STREAM2: 2, STREAM3: 3, STREAM4: 4, SPLIT: 3, OVERWRITTEN: 3}


@jit
def _gather(codes, k, bits):
    """Return a word with code i at bit bits*i."""
    word = ZERO_CODE
    for i in range(8):
        word |= codes[k + i * LANES] << (bits * i)
    return word


@jit
def _gather_split(codes, k):
    """Return a word with the low two bits of eight 3-bit codes, then their third bits."""
    word = ZERO_CODE
    for i in range(8):
        code = codes[k + i * LANES]
        word |= (code & 3) << (2 * i) | (code >> 2) << (16 + i)
    return word


@jit
def _gather_overwritten(codes, k):
    """Return the byte that Excidos' packer makes of eight 3-bit codes."""
    word = codes[k] | codes[k + LANES] << 3 | codes[k + 2 * LANES] << 6
    for i in range(3, 8):
        word |= codes[k + i * LANES]
    return word & 255


@jit
def _pair(word, i, bits):
    return (word >> (2 * bits * i)) & ((1 << (2 * bits)) - 1)


@jit
def _pair_split(word, i):
    """Return two pairs of low bits and above them two third bits."""
    return (word >> (4 * i)) & 15 | ((word >> (16 + 2 * i)) & 3) << 4


def pair_table(levels: np.ndarray, kind: int) -> np.ndarray:
    """Return the two levels of each pair of codes, flat, as the decoders look them up."""
    n = len(levels)
    pairs = np.arange(n * n)
    first, second = pairs % n, pairs // n
    if kind == SPLIT:
        first, second = pairs & 3 | (pairs >> 4 & 1) << 2, pairs >> 2 & 3 | pairs >> 5 << 2
    return np.stack([levels[first], levels[second]], axis=1).reshape(-1)


def _make(kind: int):
    """Return the loops over words of one kind, with its numbers as constants: they unroll."""
    bits = BYTES[kind]

    @jit
    def write(codes, start, count, places, words, packed):
        for g in range(WORDS):
            for lane in range(LANES):
                k = 8 * g * LANES + lane
                if kind == SPLIT:
                    words[g * LANES + lane] = _gather_split(codes, k)
                elif kind == OVERWRITTEN:
                    words[g * LANES + lane] = _gather_overwritten(codes, k)
                else:
                    words[g * LANES + lane] = _gather(codes, k, bits)
        for lane in range(count):
            out = packed[start + lane]
            for g in range(WORDS):
                word = words[g * LANES + lane]
                for k in range(bits):
                    out[places[bits * g + k]] = np.uint8((word >> (8 * k)) & 255)

    @jit
    def expand(block, places, pairs, first, count, factor, out):
        for g in range(first, first + count):
            word = np.int64(0)
            for k in range(bits):
                word |= np.int64(block[places[bits * g + k]]) << (8 * k)
            for i in range(4):
                at = 2 * (_pair_split(word, i) if kind == SPLIT else _pair(word, i, bits))
                low, high = pairs[at] * factor, pairs[at + 1] * factor
                out[8 * g + 2 * i], out[8 * g + 2 * i + 1] = low, high

    return write, expand


_write2, _expand2 = _make(STREAM2)
_write3, _expand3 = _make(STREAM3)
_write4, _expand4 = _make(STREAM4)
_write_split, _expand_split = _make(SPLIT)
_write_overwritten, _ = _make(OVERWRITTEN)


@jit
def write(codes, start, count, kind, places, words, packed):
    """Write codes (lanes) to groups [start, start + count) of packed (n, bytes)."""
    if kind == STREAM2:
        _write2(codes, start, count, places, words, packed)
    elif kind == STREAM3:
        _write3(codes, start, count, places, words, packed)
    elif kind == STREAM4:
        _write4(codes, start, count, places, words, packed)
    elif kind == SPLIT:
        _write_split(codes, start, count, places, words, packed)
    else:
        _write_overwritten(codes, start, count, places, words, packed)


@jit
def expand(block, kind, places, pairs, first, count, factor, out):
    """Set out to the levels of words [first, first + count) of a group, times factor."""
    if kind == STREAM2:
        _expand2(block, places, pairs, first, count, factor, out)
    elif kind == STREAM4:
        _expand4(block, places, pairs, first, count, factor, out)
    elif kind == SPLIT:
        _expand_split(block, places, pairs, first, count, factor, out)
    else:
        _expand3(block, places, pairs, first, count, factor, out)


def _row_reader(bits: int):
    """Return the loop that sets a row to levels of packed codes times a factor."""

    @jit
    def expand(data, pairs, factor, out):
        mask = (1 << (2 * bits)) - 1
        for g in range(out.size // 8):
            word = np.uint32(0)
            for k in range(bits):
                word |= np.uint32(data[bits * g + k]) << np.uint32(8 * k)
            own = out[8 * g : 8 * g + 8]
            for i in range(4):
                pair = 2 * ((word >> np.uint32(2 * bits * i)) & np.uint32(mask))
                own[2 * i], own[2 * i + 1] = pairs[pair] * factor, pairs[pair + 1] * factor

    return expand


_row1, _row2, _row3, _row4 = (_row_reader(bits) for bits in (1, 2, 3, 4))


@jit
def read_codes(data, bits, pairs, factor, out):
    """Set out to the levels of codes times a factor; pairs has those of two codes each."""
    if bits == 1:
        _row1(data, pairs, factor, out)
    elif bits == 2:
        _row2(data, pairs, factor, out)
    elif bits == 3:
        _row3(data, pairs, factor, out)
    else:
        _row4(data, pairs, factor, out)


# --- codecs of cells -----------------------------------------------------------------------------


@jit
def quantize(x, plan, kind, packed):
    """Quantise x (n, 128) to packed (n, bytes of a group)."""
    v, s = np.empty(SIZE, np.float32), np.empty(SIZE, np.float32)
    codes, words = np.empty(SIZE, np.int32), np.empty(WORDS * LANES, np.int32)
    norm, scratch = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    tile = np.empty(TILE, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        norms(v, plan.order, s, norm)
        normalise(v, norm, plan, scratch, tile)
        fwht(v, plan.after)
        if plan.upper:
            choose_upper(v, plan.edges, plan.squares, plan.first_square, codes, s)
        else:
            choose_lower(v, plan.edges, plan.squares, plan.first_square, codes, s)
        if plan.corrected:
            correct(norm, plan.order, s, scratch)
        write(codes, start, count, kind, plan.places, words, packed)
        for lane in range(count):
            out = packed[start + lane]
            for at in plan.scales:
                store_fp16(norm[lane], out, at)
            for at in plan.zeros:
                out[at] = 0


@jit
def levels(packed, kind, places, scales, pairs, y):
    """Set y (n, 128) to centroid times norm of packed (n, bytes of a group)."""
    count = WORDS // QUARTERS
    for b in range(packed.shape[0]):
        for part in range(QUARTERS):
            norm = load_fp16(packed[b], scales[part])
            expand(packed[b], kind, places, pairs, part * count, count, norm, y[b])


def _restorer(kind: int):
    """Return the decoder of words of one kind, with its number of bytes as a constant."""
    bits = BYTES[kind]
    choose = choose_split_levels if kind == SPLIT else choose_levels[bits]

    @jit
    def read(packed, start, count, places, upper, words, v):
        for lane in range(count):
            block = packed[start + lane]
            for g in range(WORDS):
                word = ZERO_CODE
                for k in range(bits):
                    word |= np.int32(block[places[bits * g + k]]) << np.int32(8 * k)
                words[g * LANES + lane] = word
        choose(words, upper, v)

    return read


_read2, _read3, _read4 = (_restorer(kind) for kind in (STREAM2, STREAM3, STREAM4))
_read_split = _restorer(SPLIT)


@jit
def read(packed, start, count, kind, places, upper, words, v):
    """Set the first lanes of v to the levels of groups [start, start + count) of packed.

    upper is what `tbq.kernels.mirrored.upper_levels` returns; words (WORDS * LANES,) is scratch.
    """
    if kind == STREAM2:
        _read2(packed, start, count, places, upper, words, v)
    elif kind == STREAM4:
        _read4(packed, start, count, places, upper, words, v)
    elif kind == SPLIT:
        _read_split(packed, start, count, places, upper, words, v)
    else:
        _read3(packed, start, count, places, upper, words, v)


@jit
def store_scaled(v, start, count, packed, scales, y):
    """Write the first lanes of v times the norms of packed to groups [start, start + count)."""
    for lane in range(count):
        block, out = packed[start + lane], y[start + lane]
        for part in range(QUARTERS):
            norm = load_fp16(block, scales[part])
            for j in range(part * QUARTER, (part + 1) * QUARTER):
                out[j] = v[j * LANES + lane] * norm


@jit
def restore(packed, kind, places, scales, upper, before, after, y):
    """Set y (n, 128) to the centroids, rotated back, times norm."""
    v, words = np.empty(SIZE, np.float32), np.zeros(WORDS * LANES, np.int32)
    for start in range(0, packed.shape[0], LANES):
        count = min(LANES, packed.shape[0] - start)
        read(packed, start, count, kind, places, upper, words, v)
        give_signs(v, before)
        fwht(v, after)
        store_scaled(v, start, count, packed, scales, y)


@jit
def rotate_and_scale(packed, scales, before, after, y):
    """Rotate y (n, 128) as `rotate` does, then multiply it by the norms, in place."""
    v = np.empty(SIZE, np.float32)
    for start in range(0, packed.shape[0], LANES):
        count = min(LANES, packed.shape[0] - start)
        load(y, start, count, v)
        give_signs(v, before)
        fwht(v, after)
        store_scaled(v, start, count, packed, scales, y)
