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
from functools import cache
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
from tbq.kernels import lanes
from tbq.kernels.bitpack import pack
from tbq.kernels.compile import jit
from tbq.kernels.lanes import (
    LANES,
    ONE,
    ZERO,
    butterflies,
    first_lengths,
    load,
    store,
    transform,
)
from tbq.kernels.numerics import load_fp16, store_fp16
from tbq.kernels.simd import Lanes, level_table, on_lanes, search_table

ZERO_CODE, ONE_CODE = np.int32(0), np.int32(1)
NONE, DIRECT, PROJECTED = range(3)
SIGN_LEVELS = level_table(np.array([-1, 1], np.float32))
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
        twice: whether there are two transforms.
        before: float32 (LANES * width,), signs before the first, each for all lanes.
        between: those before the second.
        projected: the same, before the residual's transform.
        edges, levels: boundaries between cells, a `search_table`, and centroids, a `level_table`.
        block_bytes: bytes of a block; the blocks of a group stand one after the other.
    """

    rms: bool
    scales: int
    residual: int
    twice: bool
    before: np.ndarray
    between: np.ndarray
    projected: np.ndarray
    edges: np.ndarray
    levels: np.ndarray
    block_bytes: int


class Reverse(NamedTuple):
    """What a decoder does, in numbers.

    Attributes:
        residual: NONE, DIRECT or PROJECTED.
        levels: what codes stand for, a `level_table`.
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
    levels: np.ndarray
    twice: bool
    before: np.ndarray
    between: np.ndarray
    after: np.ndarray
    projected: np.ndarray
    share: np.float32
    unit: np.float32
    block_bytes: int


# --- lanes, a chunk of 64 values at a time -------------------------------------------------------


@on_lanes(LANES, times=2, v=32)
def _chunk_begin(v: Lanes) -> None:
    """Do butterflies of length 1, 2 and 4 over a chunk."""
    first_lengths(v, lambda j: v[j])


@on_lanes(LANES)
def _chunk_end(v: Lanes) -> None:
    """Do butterflies of length 8, 16 and 32 over a chunk."""
    for j in range(8):
        transform(v, range(j, WIDTH, 8))


@on_lanes(LANES, times=WIDTH // 8, a=8, b=8)
def _join2(a: Lanes, b: Lanes) -> None:
    _join([a, b])


@on_lanes(LANES, times=WIDTH // 8, a=8, b=8, c=8, d=8)
def _join4(a: Lanes, b: Lanes, c: Lanes, d: Lanes) -> None:
    _join([a, b, c, d])


def _join(chunks: list[Lanes]) -> None:
    """Do the butterflies between eight rows of chunks."""
    for i in range(8):
        for chunk, y in zip(chunks, butterflies([c[i] for c in chunks]), strict=True):
            chunk[i] = y


@jit
def fwht(v):
    """Transform each lane of v, 64, 128, 256 or 512 values of it."""
    for start in range(0, v.size, CHUNK):
        own = v[start : start + CHUNK]
        _chunk_begin(own)
        _chunk_end(own)
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


@on_lanes(LANES, times=WIDTH // 8, v=8)
def _add_squares(v: Lanes, total: Lanes) -> None:
    for i in range(8):
        total[0] = total[0] + v[i] * v[i]


@on_lanes(LANES, times=WIDTH // 8, v=8)
def _add_sizes_of_chunk(v: Lanes, total: Lanes) -> None:
    for i in range(8):
        total[0] = total[0] + (v[i].bits() & 0x7FFFFFFF).floats()


@jit
def add_squares(v, total):
    """Set total (LANES,) to the sum of squares of each lane of v, in order."""
    total[:] = ZERO
    for start in range(0, v.size, CHUNK):
        _add_squares(v[start : start + CHUNK], total)


@jit
def _add_sizes(v, total):
    """Set total (LANES,) to the sum of absolute values of each lane of v, in order."""
    total[:] = ZERO
    for start in range(0, v.size, CHUNK):
        _add_sizes_of_chunk(v[start : start + CHUNK], total)


@on_lanes(LANES, times=WIDTH // 8, v=8)
def _scale_chunk(v: Lanes, factor: Lanes) -> None:
    for i in range(8):
        v[i] = v[i] * factor[0]


@jit
def _scale(v, factor):
    """Multiply each lane of v by its factor (LANES,)."""
    for start in range(0, v.size, CHUNK):
        _scale_chunk(v[start : start + CHUNK], factor)


@jit
def _give_signs(v, signs):
    """Multiply v by signs, which are as many."""
    for k in range(v.size):
        v[k] *= signs[k]


@jit
def _coordinates(v, plan, scale, inverse):
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
        add_squares(own, scale[part])
        for lane in range(LANES):
            scale[part, lane] = np.sqrt(scale[part, lane] / count)
            inverse[lane] = ONE / scale[part, lane]
        _scale(own, inverse)
    if not plan.rms:
        fwht(v)


@cache
def chooser(bits: int):
    """Return choose(v, edges, levels, codes, s).

    It sets codes to the first cell with v below its upper edge, and s to its centroid.
    """
    find = lanes.chooser(bits, "not <", WIDTH)

    @jit
    def choose(v, edges, levels, codes, s):
        for start in range(0, v.size, CHUNK):
            find(v[start:], edges, levels, codes[start:], s[start:])

    return choose


@jit
def _choose_signs(v, codes):
    for k in range(v.size):
        codes[k] = ONE_CODE if v[k] >= ZERO else ZERO_CODE


@cache
def writer(bits: int):
    """Return write(codes, start, count, block_bytes, at, words, packed).

    It writes codes (lanes) to groups from start on, in blocks of up to 32 words.
    """
    pack_chunk = lanes.packer(bits, WIDTH)

    @jit
    def write(codes, start, count, block_bytes, at, words, packed):
        n = codes.size // (8 * LANES)
        for g in range(0, n, 8):
            pack_chunk(codes[8 * g * LANES :], words[g * LANES :])
        for lane in range(count):
            out = packed[start + lane]
            for first in range(0, n, PER_BLOCK):
                place = first // PER_BLOCK * block_bytes + at
                for g in range(first, min(first + PER_BLOCK, n)):
                    word = words[g * LANES + lane]
                    for k in range(bits):
                        out[place + k] = np.uint8((word >> (8 * k)) & 255)
                    place += bits

    return write


@cache
def _quantizer(bits: int, has_residual: bool):
    choose, write, write_signs = chooser(bits), writer(bits), writer(1)

    @jit
    def quantize(x, plan, packed):
        """Quantise groups, rows of x, to rows of packed."""
        size = plan.before.size
        width, parts = size // LANES, max(1, size // LANES // 256)
        v, codes = np.empty(size, np.float32), np.empty(size, np.int32)
        words = np.empty(width // 8 * LANES, np.int32)
        scale, second = np.zeros((2, LANES), np.float32), np.empty(LANES, np.float32)
        inverse, s = np.empty(LANES, np.float32), np.empty(size, np.float32)
        first_code = 2 if not has_residual else 4
        first_sign = first_code + min(width, 256) // 8 * bits
        for start in range(0, x.shape[0], LANES):
            count = min(LANES, x.shape[0] - start)
            load(x, start, count, v)
            _give_signs(v, plan.before)
            _coordinates(v, plan, scale, inverse)
            choose(v, plan.edges, plan.levels, codes, s)
            write(codes, start, count, plan.block_bytes, first_code, words, packed)
            if has_residual:
                for k in range(size):
                    v[k] -= s[k]
                _residual(v, plan, second)
                _choose_signs(v, codes)
                write_signs(codes, start, count, plan.block_bytes, first_sign, words, packed)
            for lane in range(count):
                out = packed[start + lane]
                for part in range(parts):
                    own = scale[part if plan.scales > 1 else 0, lane]
                    at = part * plan.block_bytes
                    if own < TINY:
                        out[at : at + plan.block_bytes] = 0
                        continue
                    store_fp16(abs(own), out, at)  # see the specification
                    if has_residual:
                        store_fp16(abs(second[lane] * own), out, at + 2)

    return quantize


@jit
def _residual(v, plan, second):
    """Set second (LANES,) to the sizes of residuals v, and v to what has the signs."""
    if plan.residual == DIRECT:
        _add_sizes(v, second)
        for lane in range(LANES):
            second[lane] /= np.float32(v.size // LANES)
        return
    add_squares(v, second)
    for lane in range(LANES):
        second[lane] = np.sqrt(second[lane])
    _give_signs(v, plan.projected)
    fwht(v)


# --- decoder -------------------------------------------------------------------------------------


@cache
def _lane_reader(bits: int):
    """Return the loop that sets lanes to the levels of codes that start at a byte of each block."""
    expand_chunk = lanes.expander(bits, WIDTH)

    @jit
    def read(packed, start, count, block_bytes, at, levels, words, v):
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
        for g in range(0, n, 8):
            expand_chunk(words[g * LANES :], levels, v[8 * g * LANES :])

    return read


@cache
def _expander(bits: int, has_residual: bool):
    read, read_signs = _lane_reader(bits), _lane_reader(1)

    @jit
    def unscaled(packed, start, count, plan, buffers, v):
        """Set lanes v to what groups [start, start + count) hold before it is transformed."""
        e, words, tile, factor = buffers
        width, size = v.size // LANES, plan.block_bytes
        parts = max(1, width // 256)
        n = v.size // parts
        read(packed, start, count, size, 4 if has_residual else 2, plan.levels, words, v)
        for part in range(parts):
            for lane in range(count):
                factor[lane] = load_fp16(packed[start + lane], part * size)
            _scale(v[part * n : (part + 1) * n], factor)
        if not has_residual:
            return
        at = 4 + min(width, 256) // 8 * bits
        read_signs(packed, start, count, size, at, SIGN_LEVELS, words, e)
        if plan.residual == DIRECT:
            for part in range(parts):
                for lane in range(count):
                    factor[lane] = load_fp16(packed[start + lane], part * size + 2)
                _scale(e[part * n : (part + 1) * n], factor)
            for k in range(v.size):
                v[k] += e[k]
            return
        fwht(e)
        for lane in range(count):
            second = load_fp16(packed[start + lane], 2)
            factor[lane] = (second * plan.share) / np.float32(width)
        for k in range(TILE):
            tile[k] = factor[k % LANES]
        for first in range(0, v.size, TILE):
            own, more = v[first : first + TILE], e[first : first + TILE]
            signs = plan.projected[first : first + TILE]
            for k in range(TILE):
                own[k] += (tile[k] * signs[k]) * more[k]

    return unscaled


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
    """Return scratch of `_expander` for lanes of so many values in all."""
    words = np.zeros(size // 8, np.int32)
    return (
        np.empty(size, np.float32),
        words,
        np.empty(TILE, np.float32),
        np.zeros(LANES, np.float32),
    )


@cache
def _decoders(bits: int, has_residual: bool):
    """Return dequantize and levels."""
    unscaled = _expander(bits, has_residual)

    @jit
    def dequantize(packed, plan, y):
        """Dequantise groups, rows of packed, to the first values of rows of y."""
        size = plan.after.size
        v, buffers = np.empty(size, np.float32), _buffers(size)
        for start in range(0, packed.shape[0], LANES):
            count = min(LANES, packed.shape[0] - start)
            unscaled(packed, start, count, plan, buffers, v)
            _transform(v, plan, plan.after)
            store(v, start, count, y)

    @jit
    def levels(packed, plan, y):
        """Set rows of y to what groups hold, as an orthogonal transform leaves it."""
        size = plan.after.size
        v, buffers = np.empty(size, np.float32), _buffers(size)
        for start in range(0, packed.shape[0], LANES):
            count = min(LANES, packed.shape[0] - start)
            unscaled(packed, start, count, plan, buffers, v)
            for k in range(size):
                v[k] *= plan.unit
            store(v, start, count, y)

    return dequantize, levels


@jit
def _unrotate(x, plan):
    """Transform the first values of rows of x, so that lengths remain."""
    size = plan.after.size
    v = np.empty(size, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        _transform(v, plan, plan.before)
        for k in range(size):
            v[k] *= plan.unit
        store(v, start, count, x)


@jit
def _rotate(x, plan):
    """Undo `_unrotate`."""
    size = plan.after.size
    v = np.empty(size, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        _give_signs(v, plan.before)
        fwht(v)
        if plan.twice:
            _give_signs(v, plan.between)
            fwht(v)
        for k in range(size):
            v[k] *= plan.unit
        store(v, start, count, x)


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
    signs = codec.transform.signs
    return Plan(
        rms=codec.measured == "rms",
        scales=codec.scales,
        residual=_kind(codec),
        twice=len(signs) > 1,
        before=np.repeat(byte_signs(signs[0]), LANES),
        between=np.repeat(byte_signs(signs[-1]), LANES),
        projected=np.repeat(_projected(codec), LANES),
        edges=search_table(codec.cells.edges),
        levels=level_table(codec.cells.levels),
        block_bytes=codec.block_bytes,
    )


def _reverse(codec: HadamardCells) -> Reverse:
    transform, cells, residual = codec.transform, codec.cells, codec.residual
    before = np.repeat(byte_signs(transform.signs[0]), LANES)
    return Reverse(
        residual=_kind(codec),
        levels=level_table(cells.levels),
        twice=len(transform.signs) > 1,
        before=before,
        between=np.repeat(byte_signs(transform.signs[-1]), LANES),
        after=before / np.float32(transform.divisor),
        projected=np.repeat(_projected(codec), LANES),
        share=np.float32(residual.share if residual else 0),
        unit=transform.scale,
        block_bytes=codec.block_bytes,
    )


def _compiled(codec: HadamardCells):
    """Return the encoder, the decoder, and what reads levels."""
    bits, has_residual = codec.cells.bits, codec.residual is not None
    return _quantizer(bits, has_residual), *_decoders(bits, has_residual)


def _alone(codec: HadamardCells) -> RowKernels:
    _check(codec)
    width, size = codec.group_values, codec.block_bytes * codec.group_blocks
    plan, reverse = _plan(codec), _reverse(codec)
    encode, decode, read_levels = _compiled(codec)

    def quantize(x, packed, first):
        encode(x.reshape(-1, width), plan, packed.reshape(-1, size))

    def dequantize(packed, y):
        decode(packed.reshape(-1, size), reverse, y.reshape(-1, width))

    def levels(packed, y):
        read_levels(packed.reshape(-1, size), reverse, y.reshape(-1, width))

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
    encode, decode, read_levels = _compiled(codec.latent)

    def quantize(x, packed, first):
        rows, blocks = x.reshape(-1, n), packed.reshape(-1, size)
        encode(rows, plan, blocks)
        _store_rope(rows, blocks, width, at)

    def dequantize(packed, y):
        blocks = packed.reshape(-1, size)
        decode(blocks, reverse, y.reshape(-1, n))
        _load_rope(blocks, at, y.reshape(-1, n), width)

    def levels(packed, y):
        blocks = packed.reshape(-1, size)
        read_levels(blocks, reverse, y.reshape(-1, n))
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
    encode, decode, read_levels = _compiled(codec.cells)
    frequency, edges = frequencies(), tuple(np.array(RADIUS_EDGES, np.float32))
    polar = (np.array(RADII, np.float32), *phase_points(), np.float32(codec.penalty))

    def quantize(x, packed, first):
        rows, blocks = x.reshape(-1, width), packed.reshape(-1, size)
        encode(rows, plan, blocks)
        _quantize_pairs(rows, first, x.shape[-1] // width, frequency, edges, polar, blocks)

    def dequantize(packed, y):
        decode(packed.reshape(-1, size), reverse, y.reshape(-1, width))

    def levels(packed, y):
        read_levels(packed.reshape(-1, size), reverse, y.reshape(-1, width))

    return RowKernels(quantize, dequantize, levels, alone.rotate, alone.unrotate)
