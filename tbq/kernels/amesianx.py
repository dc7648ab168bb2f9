"""Numba kernels of `tbq.families.amesianx`.

Encoders have sixteen groups side by side, value j of lane k at [16 j + k] of a flat array, so that
every operation is a vector; lanes never mix, and within a lane every sum and butterfly happens in
the order of the C code. Decoders transform rows in place, where no sum has an order to keep.

A sign, and a division by a power of two, commute with a factor next to them without rounding, so
they are one factor here.

A row of an array is a group, the two blocks of a group one after the other; what follows them, as
the rotary values of _4 do, is none of the kernels' business.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tbq.codec import Codec, RowKernels
from tbq.families.amesianx import (
    HALF,
    LEAST_SIGMA,
    PAIRS,
    PHASES,
    PI,
    RADII,
    RADIUS_EDGES,
    REACH,
    ROPE,
    TINY,
    TWO_PI,
    HadamardCells,
    LatentAndRope,
    PolarPairs,
    byte_signs,
    frequencies,
    phase_points,
)
from tbq.kernels.bitpack import pack
from tbq.kernels.compile import jit
from tbq.kernels.numerics import load_fp16, store_fp16
from tbq.kernels.rotated import STREAMS, halves, pair_table

LANES = 16
ZERO, ONE = np.float32(0.0), np.float32(1.0)
ZERO_CODE, ONE_CODE = np.int32(0), np.int32(1)
NONE, DIRECT, PROJECTED = range(3)
SIGN_PAIRS = np.array([-1, -1, 1, -1, -1, 1, 1, 1], np.float32)
WIDTH = 64  # values of a chunk of lanes
CHUNK = WIDTH * LANES
TILE = 8 * LANES
ROW_TILE = 512  # values of groups that are decoded at a time


class Plan(NamedTuple):
    """What an encoder does, in numbers.

    Attributes:
        rms: whether the scale is taken of the coordinates.
        scales: how many a group has.
        residual: NONE, DIRECT or PROJECTED.
        bits: of a code.
        twice: whether there are two transforms.
        before: float32 (width,), signs before the first.
        between: float32 (LANES * width,), those before the second, each for all lanes.
        projected: the same, before the residual's transform.
        edges, levels: boundaries between cells, and the centroid above each, in two halves: the
            compiler unrolls loops over tuples of up to eight.
        lowest: the lowest centroid.
        block_bytes: bytes of a block; the blocks of a group stand one after the other.
    """

    rms: bool
    scales: int
    residual: int
    bits: int
    twice: bool
    before: np.ndarray
    between: np.ndarray
    projected: np.ndarray
    edges: tuple[tuple, tuple]
    levels: tuple[tuple, tuple]
    lowest: np.float32
    block_bytes: int


class Reverse(NamedTuple):
    """What a decoder does, in numbers.

    Attributes:
        residual: NONE, DIRECT or PROJECTED.
        bits: of a code.
        pairs, sign_pairs: what each pair of codes, and of signs, stands for, flat.
        twice: whether there are two transforms.
        before, between: signs of values, and those between the transforms.
        after: the first over what the transforms multiply values by.
        projected: factors after the residual's transform.
        share: what a projected sign stands for.
        unit: what makes the transform orthogonal.
        block_bytes: bytes of a block.

    Factors are float32 (ROW_TILE,), repeated as often as groups go into that.
    """

    residual: int
    bits: int
    pairs: np.ndarray
    sign_pairs: np.ndarray
    twice: bool
    before: np.ndarray
    between: np.ndarray
    after: np.ndarray
    projected: np.ndarray
    share: np.float32
    unit: np.float32
    block_bytes: int


# --- lanes, 64 values at a time: with constant bounds the compiler makes vectors -----------------


@jit
def _hadamard4(a, b, c, d):
    a, b, c, d = a + b, a - b, c + d, c - d
    return a + c, b + d, a - c, b - d


def _eight(length: int):
    """Return the butterflies of three lengths, this one, twice and four times it, over a chunk."""
    n = length * LANES

    @jit
    def butterflies(v):
        for start in range(0, CHUNK, 8 * n):
            for k in range(start, start + n):
                p0, p1, p2, p3 = _hadamard4(v[k], v[k + n], v[k + 2 * n], v[k + 3 * n])
                m = k + 4 * n
                q0, q1, q2, q3 = _hadamard4(v[m], v[m + n], v[m + 2 * n], v[m + 3 * n])
                v[k], v[k + n], v[k + 2 * n], v[k + 3 * n] = p0 + q0, p1 + q1, p2 + q2, p3 + q3
                v[m], v[m + n], v[m + 2 * n], v[m + 3 * n] = p0 - q0, p1 - q1, p2 - q2, p3 - q3

    return butterflies


_eight1, _eight8 = _eight(1), _eight(8)


@jit
def _join2(a, b):
    for k in range(CHUNK):
        a[k], b[k] = a[k] + b[k], a[k] - b[k]


@jit
def _join4(a, b, c, d):
    for k in range(CHUNK):
        a[k], b[k], c[k], d[k] = _hadamard4(a[k], b[k], c[k], d[k])


@jit
def fwht(v):
    """Transform each lane of v, 64, 128, 256 or 512 values of it."""
    for start in range(0, v.size, CHUNK):
        own = v[start : start + CHUNK]
        _eight1(own)
        _eight8(own)
    chunks = v.size // CHUNK
    if chunks == 2:
        _join2(v[:CHUNK], v[CHUNK:])
    for start in range(0, v.size if chunks >= 4 else 0, 4 * CHUNK):
        half = start + 2 * CHUNK
        a, b = v[start : start + CHUNK], v[start + CHUNK : half]
        _join4(a, b, v[half : half + CHUNK], v[half + CHUNK : half + 2 * CHUNK])
    if chunks == 8:
        for start in range(0, 4 * CHUNK, CHUNK):
            far = start + 4 * CHUNK
            _join2(v[start : start + CHUNK], v[far : far + CHUNK])


# --- encoder -------------------------------------------------------------------------------------


@jit
def load(x, start, count, signs, v):
    """Set lanes v to rows [start, start + count) of x times signs, lanes without a row to zero."""
    if count < LANES:
        v[:] = ZERO
    for lane in range(count):
        for first in range(0, v.size // LANES, WIDTH):
            row = x[start + lane, first : first + WIDTH]
            own = v[first * LANES : (first + WIDTH) * LANES]
            sign = signs[first : first + WIDTH]
            for j in range(WIDTH):
                own[j * LANES + lane] = row[j] * sign[j]


@jit
def _add_up(s):
    """Add the terms behind the first LANES of s (LANES + CHUNK,) to these, in order."""
    for start in range(0, CHUNK, 8 * LANES):
        for k in range(start, start + LANES):
            n = LANES
            half = (((s[k] + s[k + n]) + s[k + 2 * n]) + s[k + 3 * n]) + s[k + 4 * n]
            m = k + 4 * n
            s[k + 8 * n] = (((half + s[m + n]) + s[m + 2 * n]) + s[m + 3 * n]) + s[m + 4 * n]
    for k in range(LANES):
        s[k] = s[k + CHUNK]


@jit
def add_squares(v, s, total):
    """Set total (LANES,) to the sum of squares of each lane of v; s is scratch."""
    s[:LANES] = ZERO
    for start in range(0, v.size, CHUNK):
        own, terms = v[start : start + CHUNK], s[LANES:]
        for k in range(CHUNK):
            terms[k] = own[k] * own[k]
        _add_up(s)
    total[:] = s[:LANES]


@jit
def _add_sizes(v, s, total):
    """Set total (LANES,) to the sum of absolute values of each lane of v; s is scratch."""
    s[:LANES] = ZERO
    for start in range(0, v.size, CHUNK):
        own, terms = v[start : start + CHUNK], s[LANES:]
        for k in range(CHUNK):
            terms[k] = abs(own[k])
        _add_up(s)
    total[:] = s[:LANES]


@jit
def _scale(v, factor, s):
    """Multiply each lane of v by its factor (LANES,); s is scratch."""
    for j in range(0, TILE, LANES):
        s[j : j + LANES] = factor
    for start in range(0, v.size, TILE):
        own = v[start : start + TILE]
        for k in range(TILE):
            own[k] *= s[k]


@jit
def _give_signs(v, signs):
    """Multiply v by signs, which are as many."""
    for k in range(v.size):
        v[k] *= signs[k]


@jit
def _coordinates(v, plan, s, scale, inverse):
    """Turn lanes v, which have their signs, into coordinates; set scale (scales, LANES)."""
    if plan.rms:
        fwht(v)
        if plan.twice:
            _give_signs(v, plan.between)
            fwht(v)
    size = v.size // plan.scales
    count = np.float32(size // LANES) if plan.rms else ONE
    for part in range(plan.scales):
        own = v[part * size : (part + 1) * size]
        add_squares(own, s, scale[part])
        for lane in range(LANES):
            scale[part, lane] = np.sqrt(scale[part, lane] / count)
            inverse[lane] = ONE / scale[part, lane]
        _scale(own, inverse, s)
    if not plan.rms:
        fwht(v)


@jit
def _choose(v, edges, codes):
    """Set codes to the first cell with v below its upper edge."""
    low, high = edges
    for k in range(v.size):
        u, code = v[k], ZERO_CODE
        for edge in low:
            code += ZERO_CODE if u < edge else ONE_CODE
        for edge in high:
            code += ZERO_CODE if u < edge else ONE_CODE
        codes[k] = code


@jit
def _choose_and_subtract(v, edges, levels, lowest, codes):
    """As `_choose`, and leave of v what exceeds the centroid."""
    low, high = edges
    low_levels, high_levels = levels
    for k in range(v.size):
        u, code, found = v[k], ZERO_CODE, lowest
        for edge, level in zip(low, low_levels):  # noqa: B905 (Numba has no strict)
            code += ZERO_CODE if u < edge else ONE_CODE
            found = found if u < edge else level
        for edge, level in zip(high, high_levels):  # noqa: B905
            code += ZERO_CODE if u < edge else ONE_CODE
            found = found if u < edge else level
        codes[k], v[k] = code, u - found


@jit
def _choose_signs(v, codes):
    for k in range(v.size):
        codes[k] = ONE_CODE if v[k] >= ZERO else ZERO_CODE


def _writer(bits: int):
    """Return the loop that packs codes of so many bits, as a constant: it unrolls."""

    @jit
    def write(codes, start, count, per_block, block_bytes, at, words, packed):
        n = codes.size // (8 * LANES)
        for g in range(n):
            for lane in range(LANES):
                word = ZERO_CODE
                for i in range(8):
                    word |= codes[(8 * g + i) * LANES + lane] << (bits * i)
                words[g * LANES + lane] = word
        for lane in range(count):
            out = packed[start + lane]
            for first in range(0, n, per_block):
                place = first // per_block * block_bytes + at
                for g in range(first, min(first + per_block, n)):
                    word = words[g * LANES + lane]
                    for k in range(bits):
                        out[place + k] = np.uint8((word >> (8 * k)) & 255)
                    place += bits

    return write


_write1, _write2, _write3, _write4 = (_writer(bits) for bits in (1, 2, 3, 4))


@jit
def write_codes(codes, start, count, bits, size, at, words, packed):
    """Write codes (lanes) to groups [start, start + count), in blocks of up to 32 words."""
    if bits == 1:
        _write1(codes, start, count, 32, size, at, words, packed)
    elif bits == 2:
        _write2(codes, start, count, 32, size, at, words, packed)
    elif bits == 3:
        _write3(codes, start, count, 32, size, at, words, packed)
    else:
        _write4(codes, start, count, 32, size, at, words, packed)


@jit
def _quantize(x, plan, packed):
    """Quantise groups, rows of x, to rows of packed."""
    size = plan.before.size * LANES
    width, parts = size // LANES, max(1, size // LANES // 256)
    v, codes = np.empty(size, np.float32), np.empty(size, np.int32)
    words = np.empty(width // 8 * LANES, np.int32)
    scale, second = np.zeros((2, LANES), np.float32), np.empty(LANES, np.float32)
    inverse, s = np.empty(LANES, np.float32), np.empty(LANES + CHUNK, np.float32)
    first_code = 2 if plan.residual == NONE else 4
    first_sign = first_code + min(width, 256) // 8 * plan.bits
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, plan.before, v)
        _coordinates(v, plan, s, scale, inverse)
        if plan.residual == NONE:
            _choose(v, plan.edges, codes)
        else:
            _choose_and_subtract(v, plan.edges, plan.levels, plan.lowest, codes)
        write_codes(codes, start, count, plan.bits, plan.block_bytes, first_code, words, packed)
        if plan.residual != NONE:
            _residual(v, plan, s, second)
            _choose_signs(v, codes)
            write_codes(codes, start, count, 1, plan.block_bytes, first_sign, words, packed)
        for lane in range(count):
            out = packed[start + lane]
            for part in range(parts):
                own = scale[part if plan.scales > 1 else 0, lane]
                at = part * plan.block_bytes
                if own < TINY:
                    out[at : at + plan.block_bytes] = 0
                    continue
                store_fp16(abs(own), out, at)  # see the specification
                if plan.residual != NONE:
                    store_fp16(abs(second[lane] * own), out, at + 2)


@jit
def _residual(v, plan, s, second):
    """Set second (LANES,) to the sizes of residuals v, and v to what has the signs."""
    if plan.residual == DIRECT:
        _add_sizes(v, s, second)
        for lane in range(LANES):
            second[lane] /= np.float32(v.size // LANES)
        return
    add_squares(v, s, second)
    for lane in range(LANES):
        second[lane] = np.sqrt(second[lane])
    _give_signs(v, plan.projected)
    fwht(v)


# --- decoder -------------------------------------------------------------------------------------


def _reader(bits: int):
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


_read1, _read2, _read3, _read4 = (_reader(bits) for bits in (1, 2, 3, 4))


@jit
def read_codes(data, bits, pairs, factor, out):
    """Set out to the levels of codes times a factor; pairs has those of two codes each."""
    if bits == 1:
        _read1(data, pairs, factor, out)
    elif bits == 2:
        _read2(data, pairs, factor, out)
    elif bits == 3:
        _read3(data, pairs, factor, out)
    else:
        _read4(data, pairs, factor, out)


@jit
def _row_chunk(v):
    """Do the butterflies of lengths 1 to 32 over 64 values."""
    for i in range(0, WIDTH, 8):
        p0, p1, p2, p3 = _hadamard4(v[i], v[i + 1], v[i + 2], v[i + 3])
        q0, q1, q2, q3 = _hadamard4(v[i + 4], v[i + 5], v[i + 6], v[i + 7])
        v[i], v[i + 1], v[i + 2], v[i + 3] = p0 + q0, p1 + q1, p2 + q2, p3 + q3
        v[i + 4], v[i + 5], v[i + 6], v[i + 7] = p0 - q0, p1 - q1, p2 - q2, p3 - q3
    for k in range(8):
        p0, p1, p2, p3 = _hadamard4(v[k], v[k + 8], v[k + 16], v[k + 24])
        q0, q1, q2, q3 = _hadamard4(v[k + 32], v[k + 40], v[k + 48], v[k + 56])
        v[k], v[k + 8], v[k + 16], v[k + 24] = p0 + q0, p1 + q1, p2 + q2, p3 + q3
        v[k + 32], v[k + 40], v[k + 48], v[k + 56] = p0 - q0, p1 - q1, p2 - q2, p3 - q3


@jit
def _row_join2(a, b):
    for k in range(WIDTH):
        a[k], b[k] = a[k] + b[k], a[k] - b[k]


@jit
def _row_join4(a, b, c, d):
    for k in range(WIDTH):
        a[k], b[k], c[k], d[k] = _hadamard4(a[k], b[k], c[k], d[k])


@jit
def _row_fwht(v, width):
    """Transform runs of so many values of v: 64, 128, 256 or 512."""
    n = WIDTH
    for start in range(0, v.size, n):
        _row_chunk(v[start : start + n])
    if width == 128:
        for start in range(0, v.size, 2 * n):
            _row_join2(v[start : start + n], v[start + n : start + 2 * n])
    if width >= 256:
        for start in range(0, v.size, 4 * n):
            half = start + 2 * n
            a, b = v[start : start + n], v[start + n : half]
            _row_join4(a, b, v[half : half + n], v[half + n : half + 2 * n])
    if width == 512:
        for start in range(0, v.size, 8 * n):
            for near in range(start, start + 4 * n, n):
                far = near + 4 * n
                _row_join2(v[near : near + n], v[far : far + n])


@jit
def _multiply(v, factors):
    """Multiply v by the first factors."""
    for k in range(v.size):
        v[k] *= factors[k]


@jit
def _unscaled(packed, plan, width, e, v):
    """Set v to what groups, rows of packed, hold before it is transformed; e is scratch."""
    parts, size = max(1, width // 256), plan.block_bytes
    n = width // parts
    first_code = 2 if plan.residual == NONE else 4
    first_sign = first_code + n // 8 * plan.bits
    for b in range(packed.shape[0]):
        for part in range(parts):
            block = packed[b, part * size : (part + 1) * size]
            at = b * width + part * n
            d, codes = load_fp16(block, 0), block[first_code:first_sign]
            read_codes(codes, plan.bits, plan.pairs, d, v[at : at + n])
            if plan.residual != NONE:
                factor = load_fp16(block, 2) if plan.residual == DIRECT else ONE
                _read1(block[first_sign:], plan.sign_pairs, factor, e[at : at + n])
    if plan.residual == PROJECTED:
        _row_fwht(e[: v.size], width)
        for b in range(packed.shape[0]):
            share = (load_fp16(packed[b], 2) * plan.share) / np.float32(width)
            own, more = v[b * width : (b + 1) * width], e[b * width : (b + 1) * width]
            for k in range(width):
                own[k] += (share * plan.projected[k]) * more[k]
    elif plan.residual == DIRECT:
        for k in range(v.size):
            v[k] += e[k]


@jit
def _transform(v, width, plan, after):
    """Transform runs of values of v, with the signs in between, and what comes after."""
    _row_fwht(v, width)
    if plan.twice:
        _multiply(v, plan.between)
        _row_fwht(v, width)
    _multiply(v, after)


@jit
def _dequantize(packed, width, stride, plan, y):
    """Dequantise groups, rows of packed, to y; a group starts every stride values."""
    e = np.empty(ROW_TILE, np.float32)
    step = ROW_TILE // width if stride == width else 1
    for b in range(0, packed.shape[0], step):
        rows = packed[b : b + step]
        v = y[b * stride : b * stride + len(rows) * width]
        _unscaled(rows, plan, width, e, v)
        _transform(v, width, plan, plan.after)


@jit
def _levels(packed, width, stride, plan, y):
    """Set y to what groups, rows of packed, hold, as an orthogonal transform leaves it."""
    e = np.empty(ROW_TILE, np.float32)
    step = ROW_TILE // width if stride == width else 1
    for b in range(0, packed.shape[0], step):
        rows = packed[b : b + step]
        v = y[b * stride : b * stride + len(rows) * width]
        _unscaled(rows, plan, width, e, v)
        for k in range(v.size):
            v[k] *= plan.unit


@jit
def _unrotate(x, width, stride, plan):
    """Transform groups in x, which start every stride values, so that lengths remain."""
    for start in range(0, x.size, stride):
        v = x[start : start + width]
        _transform(v, width, plan, plan.before)
        for k in range(width):
            v[k] *= plan.unit


@jit
def _rotate(x, width, stride, plan):
    """Undo `_unrotate`."""
    for start in range(0, x.size, stride):
        v = x[start : start + width]
        _multiply(v, plan.before)
        _row_fwht(v, width)
        if plan.twice:
            _multiply(v, plan.between)
            _row_fwht(v, width)
        for k in range(width):
            v[k] *= plan.unit


# --- rotary values and pairs ---------------------------------------------------------------------


@jit
def _store_rope(x, packed, start, at):
    for b in range(x.shape[0]):
        for j in range(ROPE):
            store_fp16(x[b, start + j], packed[b], at + 2 * j)


@jit
def _load_rope(packed, at, y, start):
    for b in range(packed.shape[0]):
        for j in range(ROPE):
            y[b, start + j] = load_fp16(packed[b], at + 2 * j)


@jit
def _turned(kx, ky, theta):
    """Return a pair without its position; sine and cosine are rounded from double."""
    theta = theta - TWO_PI * np.floor(theta / TWO_PI + HALF)
    c, s = np.float32(math.cos(np.float64(theta))), np.float32(math.sin(np.float64(theta)))
    return c * kx + s * ky, -s * kx + c * ky


@jit
def _nearest(x, y, sigma, edges):
    """Return the codes of radius and phase where the search starts."""
    size, r0 = np.sqrt(x * x + y * y) / sigma, 0
    for edge in edges:
        r0 += 0 if size < edge else 1
    angle = np.float32(math.atan2(np.float64(y), np.float64(x)))
    turn = np.floor((angle + PI) / TWO_PI * np.float32(PHASES))
    if not turn > ZERO:  # NaN too
        return r0, 0
    return r0, PHASES - 1 if turn > PHASES - 1 else int(turn)


@jit
def _search(x, y, sigma, start, polar):
    """Return the codes of radius and phase that score best."""
    radii, points_x, points_y, penalty = polar
    best, r0, p0 = np.float32(-np.inf), start[0], start[1]
    found = start
    for r in range(max(0, r0 - REACH), min(len(radii), r0 + REACH + 1)):
        length = sigma * radii[r]
        for dp in range(-REACH, REACH + 1):
            phase = (p0 + dp) % PHASES
            qx, qy = length * points_x[phase], length * points_y[phase]
            ex, ey = qx - x, qy - y
            score = (qx * x + qy * y) - penalty * (ex * ex + ey * ey)
            if score > best:
                best, found = score, (r, phase)
    return found


@jit
def _quantize_pairs(x, first, row_groups, frequency, edges, polar, packed):
    """Write the bytes from 50 on of blocks of cells first + row; x (n, 128), packed (n, 108)."""
    radii, phases = np.empty(PAIRS, np.uint8), np.empty(PAIRS, np.uint8)
    for b in range(x.shape[0]):
        row, out, total = x[b], packed[b], ZERO
        for p in range(PAIRS):
            total += row[p] * row[p] + row[PAIRS + p] * row[PAIRS + p]
        sigma = np.sqrt(total / np.float32(2 * PAIRS))
        sigma = LEAST_SIGMA if sigma < LEAST_SIGMA else sigma
        cell = np.float32(first + b // row_groups)
        for p in range(PAIRS):
            kx, ky = _turned(row[p], row[PAIRS + p], cell * frequency[p])
            radii[p], phases[p] = _search(kx, ky, sigma, _nearest(kx, ky, sigma, edges), polar)
        store_fp16(abs(sigma), out, 50)
        pack(radii, 3, out[52:76])
        pack(phases, 4, out[76:108])


# --- codecs --------------------------------------------------------------------------------------


def kernels(codec: Codec) -> RowKernels:
    """Return the kernels of a codec of the family."""
    if isinstance(codec, PolarPairs):
        return _pairs(codec)
    return _latent(codec) if isinstance(codec, LatentAndRope) else _alone(codec)


def _check(codec: HadamardCells) -> None:
    transform, residual = codec.transform, codec.residual
    right = transform.width == transform.size and transform.gain == 1 and not codec.corrected
    if not right or (residual and not (residual.positive and residual.used)):
        raise NotImplementedError("kernels do what the fork does; others are mutants")


def _kind(codec: HadamardCells) -> int:
    if not codec.residual:
        return NONE
    return PROJECTED if codec.residual.projected else DIRECT


def _projected(codec: HadamardCells) -> np.ndarray:
    if _kind(codec) == PROJECTED:
        return byte_signs(codec.residual.projected)
    return np.ones(codec.group_values, np.float32)


def _plan(codec: HadamardCells) -> Plan:
    signs, levels = codec.transform.signs, codec.cells.levels
    return Plan(
        rms=codec.measured == "rms",
        scales=codec.scales,
        residual=_kind(codec),
        bits=codec.cells.bits,
        twice=len(signs) > 1,
        before=byte_signs(signs[0]),
        between=np.repeat(byte_signs(signs[-1]), LANES),
        projected=np.repeat(_projected(codec), LANES),
        edges=halves(codec.cells.edges),
        levels=halves(levels[1:]),
        lowest=levels[0],
        block_bytes=codec.block_bytes,
    )


def _reverse(codec: HadamardCells) -> Reverse:
    transform, cells, residual = codec.transform, codec.cells, codec.residual
    times = ROW_TILE // codec.group_values
    before = np.tile(byte_signs(transform.signs[0]), times)
    return Reverse(
        residual=_kind(codec),
        bits=cells.bits,
        pairs=pair_table(cells.levels, STREAMS[cells.bits]),
        sign_pairs=SIGN_PAIRS,
        twice=len(transform.signs) > 1,
        before=before,
        between=np.tile(byte_signs(transform.signs[-1]), times),
        after=before / np.float32(transform.divisor),
        projected=np.tile(_projected(codec), times),
        share=np.float32(residual.share if residual else 0),
        unit=transform.scale,
        block_bytes=codec.block_bytes,
    )


def _alone(codec: HadamardCells) -> RowKernels:
    _check(codec)
    width, size = codec.group_values, codec.block_bytes * codec.group_blocks
    plan, reverse = _plan(codec), _reverse(codec)

    def quantize(x, packed, first):
        _quantize(x.reshape(-1, width), plan, packed.reshape(-1, size))

    def dequantize(packed, y):
        _dequantize(packed.reshape(-1, size), width, width, reverse, y.reshape(-1))

    def levels(packed, y):
        _levels(packed.reshape(-1, size), width, width, reverse, y.reshape(-1))

    def rotate(x, blocks):
        _rotate(x.reshape(-1), width, width, reverse)

    def unrotate(x, blocks):
        _unrotate(x.reshape(-1), width, width, reverse)

    return RowKernels(quantize, dequantize, levels, rotate, unrotate)


def _latent(codec: LatentAndRope) -> RowKernels:
    """Return kernels that do the latent vector where it stands, or its halves in a copy."""
    if codec.latent.group_values != codec.group_values - ROPE:
        return _latent_halves(codec)
    _check(codec.latent)
    n, size, at = codec.group_values, codec.block_bytes, codec.layout.offset("rope")
    width, plan, reverse = codec.latent.group_values, _plan(codec.latent), _reverse(codec.latent)

    def quantize(x, packed, first):
        rows, blocks = x.reshape(-1, n), packed.reshape(-1, size)
        _quantize(rows, plan, blocks)
        _store_rope(rows, blocks, width, at)

    def dequantize(packed, y):
        blocks = packed.reshape(-1, size)
        _dequantize(blocks, width, n, reverse, y.reshape(-1))
        _load_rope(blocks, at, y.reshape(-1, n), width)

    def levels(packed, y):
        blocks = packed.reshape(-1, size)
        _levels(blocks, width, n, reverse, y.reshape(-1))
        _load_rope(blocks, at, y.reshape(-1, n), width)

    def rotate(x, blocks):
        _rotate(x.reshape(-1), width, n, reverse)

    def unrotate(x, blocks):
        _unrotate(x.reshape(-1), width, n, reverse)

    return RowKernels(quantize, dequantize, levels, rotate, unrotate)


def _latent_halves(codec: LatentAndRope) -> RowKernels:
    inner, n, size = codec.latent.kernels, codec.group_values, codec.block_bytes
    at, width = codec.layout.offset("rope"), codec.group_values - ROPE

    def quantize(x, packed, first):
        rows, blocks = x.reshape(-1, n), packed.reshape(-1, size)
        halves_of_rows = np.empty((len(rows), at), np.uint8)
        inner.quantize(np.ascontiguousarray(rows[:, :width]), halves_of_rows, first)
        blocks[:, :at] = halves_of_rows
        _store_rope(rows, blocks, width, at)

    def decoder(kernel):
        def run(packed, y):
            blocks, rows = packed.reshape(-1, size), y.reshape(-1, n)
            values = np.empty((len(rows), width), np.float32)
            kernel(np.ascontiguousarray(blocks[:, :at]), values)
            rows[:, :width] = values
            _load_rope(blocks, at, rows, width)

        return run

    def rotation(kernel):
        def run(x, blocks):
            values = np.ascontiguousarray(x[:, :width])
            kernel(values, blocks)
            x[:, :width] = values

        return run

    both = rotation(inner.rotate), rotation(inner.unrotate)
    return RowKernels(quantize, decoder(inner.dequantize), decoder(inner.levels), *both)


def _pairs(codec: PolarPairs) -> RowKernels:
    """Return kernels of a block whose first bytes are one of `_alone`."""
    _check(codec.cells)
    if not codec.turned or codec.reach != REACH:
        raise NotImplementedError("kernels undo the position and search; others are mutants")
    width, size = codec.group_values, codec.block_bytes
    plan, reverse, alone = _plan(codec.cells), _reverse(codec.cells), codec.cells.kernels
    frequency, edges = frequencies(), tuple(np.array(RADIUS_EDGES, np.float32))
    polar = (np.array(RADII, np.float32), *phase_points(), np.float32(codec.penalty))

    def quantize(x, packed, first):
        rows, blocks = x.reshape(-1, width), packed.reshape(-1, size)
        _quantize(rows, plan, blocks)
        _quantize_pairs(rows, first, x.shape[-1] // width, frequency, edges, polar, blocks)

    def dequantize(packed, y):
        _dequantize(packed.reshape(-1, size), width, width, reverse, y.reshape(-1))

    def levels(packed, y):
        _levels(packed.reshape(-1, size), width, width, reverse, y.reshape(-1))

    return RowKernels(quantize, dequantize, levels, alone.rotate, alone.unrotate)
