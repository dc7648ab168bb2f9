"""Numba kernels of `tbq.families.amesianx`.

Sixteen groups stand side by side, value j of lane k at [16 j + k] of a flat array, so that every
operation is a vector; lanes never mix, and within a lane every sum and butterfly happens in the
order of the C code.

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
from tbq.kernels.mirrored import choose_levels, upper_levels
from tbq.kernels.numerics import load_fp16, store_fp16
from tbq.kernels.rotated import halves

LANES = 16
ZERO, ONE = np.float32(0.0), np.float32(1.0)
ZERO_CODE, ONE_CODE = np.int32(0), np.int32(1)
NONE, DIRECT, PROJECTED = range(3)
SIGN_LEVEL = upper_levels(np.array([-1, 1], np.float32))
WIDTH = 64  # values of a chunk of lanes
CHUNK = WIDTH * LANES
TILE = 8 * LANES
PER_BLOCK = 32  # words of eight codes of the blocks of a group of two


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
        upper: what the upper half of the codes stand for, see `tbq.kernels.mirrored`.
        twice: whether there are two transforms.
        before, between: signs of values, and those between the transforms.
        after: the first over what the transforms multiply values by.
        projected: factors after the residual's transform.
        share: what a projected sign stands for.
        unit: what makes the transform orthogonal.
        block_bytes: bytes of a block.

    Factors are float32 (LANES * width,), each for all lanes.
    """

    residual: int
    bits: int
    upper: tuple
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
        _write1(codes, start, count, PER_BLOCK, size, at, words, packed)
    elif bits == 2:
        _write2(codes, start, count, PER_BLOCK, size, at, words, packed)
    elif bits == 3:
        _write3(codes, start, count, PER_BLOCK, size, at, words, packed)
    else:
        _write4(codes, start, count, PER_BLOCK, size, at, words, packed)


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


@jit
def _store(v, start, count, y):
    """Write the first lanes of v to the first values of rows [start, start + count) of y."""
    for lane in range(count):
        for first in range(0, v.size // LANES, WIDTH):
            row = y[start + lane, first : first + WIDTH]
            own = v[first * LANES : (first + WIDTH) * LANES]
            for j in range(WIDTH):
                row[j] = own[j * LANES + lane]


def _lane_reader(bits: int):
    """Return the loop that sets lanes to the levels of codes that start at a byte of each block."""
    choose = choose_levels[bits]

    @jit
    def read(packed, start, count, block_bytes, at, upper, words, v):
        n = v.size // (8 * LANES)
        for lane in range(count):
            row = packed[start + lane]
            for first in range(0, n, PER_BLOCK):
                place = first // PER_BLOCK * block_bytes + at
                for g in range(first, min(first + PER_BLOCK, n)):
                    word = ZERO_CODE
                    for k in range(bits):
                        word |= np.int32(row[place + k]) << np.int32(8 * k)
                    words[g * LANES + lane] = word
                    place += bits
        choose(words[: n * LANES], upper, v)

    return read


_lanes1, _lanes2, _lanes3, _lanes4 = (_lane_reader(bits) for bits in (1, 2, 3, 4))


@jit
def _read_lanes(packed, start, count, plan, words, v):
    """Set the first lanes of v to the levels of groups [start, start + count)."""
    at = 2 if plan.residual == NONE else 4
    size, upper = plan.block_bytes, plan.upper
    if plan.bits == 2:
        _lanes2(packed, start, count, size, at, upper, words, v)
    elif plan.bits == 3:
        _lanes3(packed, start, count, size, at, upper, words, v)
    else:
        _lanes4(packed, start, count, size, at, upper, words, v)


@jit
def _unscaled(packed, start, count, plan, buffers, v):
    """Set lanes v to what groups [start, start + count) hold before it is transformed."""
    e, words, tile, factor = buffers
    width, size = v.size // LANES, plan.block_bytes
    parts = max(1, width // 256)
    n = v.size // parts
    _read_lanes(packed, start, count, plan, words, v)
    for part in range(parts):
        for lane in range(count):
            factor[lane] = load_fp16(packed[start + lane], part * size)
        _scale(v[part * n : (part + 1) * n], factor, tile)
    if plan.residual == NONE:
        return
    at = 4 + min(width, 256) // 8 * plan.bits
    _lanes1(packed, start, count, size, at, SIGN_LEVEL, words, e)
    if plan.residual == DIRECT:
        for part in range(parts):
            for lane in range(count):
                factor[lane] = load_fp16(packed[start + lane], part * size + 2)
            _scale(e[part * n : (part + 1) * n], factor, tile)
        for k in range(v.size):
            v[k] += e[k]
        return
    fwht(e)
    for lane in range(count):
        second = load_fp16(packed[start + lane], 2)
        factor[lane] = (second * plan.share) / np.float32(width)
    for j in range(0, TILE, LANES):
        tile[j : j + LANES] = factor
    for first in range(0, v.size, TILE):
        own, more = v[first : first + TILE], e[first : first + TILE]
        signs = plan.projected[first : first + TILE]
        for k in range(TILE):
            own[k] += (tile[k] * signs[k]) * more[k]


@jit
def _transform(v, plan, after):
    """Transform lanes v, with the signs in between, and multiply them by what comes after."""
    fwht(v)
    if plan.twice:
        _give_signs(v, plan.between)
        fwht(v)
    _give_signs(v, after)


@jit
def _buffers(size):
    """Return scratch of `_unscaled` for lanes of so many values in all."""
    words = np.zeros(size // 8, np.int32)
    return (
        np.empty(size, np.float32),
        words,
        np.empty(TILE, np.float32),
        np.zeros(LANES, np.float32),
    )


@jit
def _dequantize(packed, plan, y):
    """Dequantise groups, rows of packed, to the first values of rows of y."""
    size = plan.after.size
    v, buffers = np.empty(size, np.float32), _buffers(size)
    for start in range(0, packed.shape[0], LANES):
        count = min(LANES, packed.shape[0] - start)
        _unscaled(packed, start, count, plan, buffers, v)
        _transform(v, plan, plan.after)
        _store(v, start, count, y)


@jit
def _levels(packed, plan, y):
    """Set rows of y to what groups, rows of packed, hold, as an orthogonal transform leaves it."""
    size = plan.after.size
    v, buffers = np.empty(size, np.float32), _buffers(size)
    for start in range(0, packed.shape[0], LANES):
        count = min(LANES, packed.shape[0] - start)
        _unscaled(packed, start, count, plan, buffers, v)
        for k in range(size):
            v[k] *= plan.unit
        _store(v, start, count, y)


@jit
def _unrotate(x, plan):
    """Transform the first values of rows of x, so that lengths remain."""
    size = plan.after.size
    v, ones = np.empty(size, np.float32), np.ones(size // LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, ones, v)
        _transform(v, plan, plan.before)
        for k in range(size):
            v[k] *= plan.unit
        _store(v, start, count, x)


@jit
def _rotate(x, plan):
    """Undo `_unrotate`."""
    size = plan.after.size
    v, ones = np.empty(size, np.float32), np.ones(size // LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, ones, v)
        _give_signs(v, plan.before)
        fwht(v)
        if plan.twice:
            _give_signs(v, plan.between)
            fwht(v)
        for k in range(size):
            v[k] *= plan.unit
        _store(v, start, count, x)


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
    before = np.repeat(byte_signs(transform.signs[0]), LANES)
    return Reverse(
        residual=_kind(codec),
        bits=cells.bits,
        upper=upper_levels(cells.levels),
        twice=len(transform.signs) > 1,
        before=before,
        between=np.repeat(byte_signs(transform.signs[-1]), LANES),
        after=before / np.float32(transform.divisor),
        projected=np.repeat(_projected(codec), LANES),
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
        _dequantize(packed.reshape(-1, size), reverse, y.reshape(-1, width))

    def levels(packed, y):
        _levels(packed.reshape(-1, size), reverse, y.reshape(-1, width))

    def rotate(x, blocks):
        _rotate(x.reshape(-1, width), reverse)

    def unrotate(x, blocks):
        _unrotate(x.reshape(-1, width), reverse)

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
        _dequantize(blocks, reverse, y.reshape(-1, n))
        _load_rope(blocks, at, y.reshape(-1, n), width)

    def levels(packed, y):
        blocks = packed.reshape(-1, size)
        _levels(blocks, reverse, y.reshape(-1, n))
        _load_rope(blocks, at, y.reshape(-1, n), width)

    def rotate(x, blocks):
        _rotate(x.reshape(-1, n), reverse)

    def unrotate(x, blocks):
        _unrotate(x.reshape(-1, n), reverse)

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
        _dequantize(packed.reshape(-1, size), reverse, y.reshape(-1, width))

    def levels(packed, y):
        _levels(packed.reshape(-1, size), reverse, y.reshape(-1, width))

    return RowKernels(quantize, dequantize, levels, alone.rotate, alone.unrotate)
