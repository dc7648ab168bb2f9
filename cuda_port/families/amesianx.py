"""tbq and tbqp of AmesianX: a thread per group, see `cuda_port.groups`; amx3_1 is not ported.

The arithmetic is that of `tbq.families.amesianx`. A sign, and a division by a power of two, commute
with a factor next to them without rounding, so they are one factor here. Levels of a projected
residual take the whole group, so attention reads levels that are written out.

The second half of an amx3_1 block follows from sine, cosine and arc tangent in double, rounded as
the C library does. The device has its own, which may round otherwise, so no bytes can be promised.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32

from cuda_port.device import (
    ONE,
    ZERO,
    add,
    device,
    div,
    load_code,
    load_fp16,
    mul,
    sqrt,
    store_fp16,
)
from cuda_port.groups import (
    BITS,
    BLOCKS,
    HADAMARD,
    ORDERED,
    SIZE,
    VALUES,
    load,
    load_levels,
    plan_of,
    rotating,
    scale,
    store_bits,
    store_cells,
    threads_for,
    total_of_squares,
    transform,
)
from cuda_port.port import BYTES, FLOATS, FLOATS2, INTS, Kernel, Port
from tbq.codec import Codec
from tbq.families.amesianx import (
    QJL,
    ROPE,
    TINY,
    HadamardCells,
    LatentAndRope,
    Residual,
    byte_signs,
)

NONE, DIRECT, PROJECTED = range(3)
# Places in a plan, after those of `cuda_port.groups`. A cell is what the codec encodes together:
# one group, or one or two and the rotary values.
FIRST = 15
(
    RMS,  # whether the scale is taken of the coordinates
    SCALES,  # of a group
    RESIDUAL,  # NONE, DIRECT or PROJECTED
    TWICE,  # whether there are two transforms
    SIGNS,  # where the residual's signs are in a block
    GROUPS,  # of a cell
    CELL_VALUES,
    CELL_BYTES,
    ROPE_AT,  # where the rotary values are in a cell, -1 if there are none
) = range(FIRST, FIRST + 9)


def cell_plan(codec: HadamardCells, cell: Codec) -> np.ndarray:
    """Return the plan of groups in the cells of a codec, which may be itself."""
    plan = plan_of(codec, codec.cells.bits)
    roped = cell is not codec
    groups = (cell.group_values - ROPE) // codec.group_values if roped else 1
    residual = codec.residual
    kind = NONE if not residual else PROJECTED if residual.projected else DIRECT
    more = [
        *(codec.measured == "rms", codec.scales, kind, len(codec.transform.signs) > 1),
        codec.layout.offset("qjl") if residual else 0,
        *(groups, cell.group_values, cell.block_bytes * cell.group_blocks),
        cell.layout.offset("rope") if roped else -1,
    ]
    assert len(plan) == FIRST
    return np.concatenate([plan, np.array(more, np.int32)])


def sign_table(codec: HadamardCells) -> np.ndarray:
    """Return signs before the first transform, between the two, and before the residual's."""
    signs, residual = codec.transform.signs, codec.residual
    projected = byte_signs(residual.projected) if residual and residual.projected else None
    before, between = byte_signs(signs[0]), byte_signs(signs[-1])
    return np.stack([before, between, before if projected is None else projected])


@device
def give_signs(v, n, signs):
    """Multiply v[:n] by signs."""
    for j in range(n):
        v[j] = mul(v[j], signs[j])


@device
def turn(v, n, between, twice):
    """Transform v[:n], once or twice."""
    transform(v, n)
    if twice:
        give_signs(v, n, between)
        transform(v, n)


@device
def turn_twice(v, n, between, last):
    """Transform v[:n] twice, with factors in between and after it: a `mix`."""
    turn(v, n, between, True)
    give_signs(v, n, last)


@device
def store_rope(x, at, packed, base):
    """Write rotary values as float16."""
    for j in range(ROPE):
        store_fp16(x[at + j], packed, base + 2 * j)


@device
def load_rope(packed, base, y, at):
    """Set y to rotary values."""
    for j in range(ROPE):
        y[at + j] = load_fp16(packed, base + 2 * j)


@device
def residual_size(v, n, kind):
    """Return the mean of |v|, or, of what is to be projected, the norm."""
    if kind == PROJECTED:
        return sqrt(total_of_squares(v, n, ORDERED))
    total = ZERO
    for j in range(n):
        total = add(total, abs(v[j]))
    return div(total, float32(n))


@cache
def encoder(width: int):
    """Return the kernel (x, plan, signs, edges, levels, packed) for groups of so many values."""
    pitch = width + 1
    threads = threads_for(pitch)

    @cuda.jit
    def encode(x, plan, signs, edges, levels, packed):
        rows = cuda.shared.array((threads, pitch), float32)
        scales = cuda.shared.array((threads, 2), float32)
        groups, cell_values = int(plan[GROUPS]), int(plan[CELL_VALUES])
        number = cuda.grid(1)
        cell, part = number // groups, number % groups
        if cell * cell_values < x.size:
            v, own = rows[cuda.threadIdx.x], scales[cuda.threadIdx.x]
            size, blocks, kind = int(plan[SIZE]), int(plan[BLOCKS]), int(plan[RESIDUAL])
            start = cell * int(plan[CELL_BYTES])
            base = start + part * blocks * size
            load(x, cell * cell_values + part * width, width, v)
            give_signs(v, width, signs[0])
            coordinates(v, width, plan, signs[1], own)
            store_cells(v, width, edges, levels, plan, packed, base, kind != NONE)
            second = ZERO
            if kind != NONE:
                second = residual_size(v, width, kind)
                if kind == PROJECTED:
                    give_signs(v, width, signs[2])
                    transform(v, width)
            for b in range(blocks):
                mine = own[b if plan[SCALES] > 1 else 0]
                at, values = base + b * size, int(plan[VALUES])
                if mine < TINY:
                    for k in range(size):
                        packed[at + k] = 0
                else:
                    store_fp16(abs(mine), packed, at)  # see the specification
                    if kind != NONE:
                        store_fp16(abs(mul(second, mine)), packed, at + 2)
                        signs_of = v[b * values : (b + 1) * values]
                        store_bits(signs_of, values, ZERO, packed, at + int(plan[SIGNS]))
            if plan[ROPE_AT] >= 0 and part == 0:
                store_rope(x, (cell + 1) * cell_values - ROPE, packed, start + int(plan[ROPE_AT]))

    return encode


@device
def coordinates(v, n, plan, between, scales):
    """Turn v[:n], which has its signs, into coordinates; set the scales."""
    count = int(plan[SCALES])
    if plan[RMS]:
        turn(v, n, between, plan[TWICE])
    size = n // count
    divisor = float32(size) if plan[RMS] else ONE
    for k in range(count):
        own = v[k * size : (k + 1) * size]
        scales[k] = sqrt(div(total_of_squares(own, size, ORDERED), divisor))
        scale(own, size, div(ONE, scales[k]))
    if not plan[RMS]:
        transform(v, n)


@device
def load_unscaled(packed, base, levels, plan, projected, n, v):
    """Set v[:n] to what the group at packed[base] holds before it is transformed."""
    kind, values, size = int(plan[RESIDUAL]), int(plan[VALUES]), int(plan[SIZE])
    if kind == NONE:
        load_levels(packed, base, levels, plan, n, v)
        for j in range(n):
            v[j] = mul(v[j], load_fp16(packed, base + j // values * size))
        return
    for j in range(n):
        at = base + j // values * size
        v[j] = ONE if load_code(packed, at + int(plan[SIGNS]), 1, j % values) else -ONE
    if kind == PROJECTED:
        transform(v, n)
    for j in range(n):
        at = base + j // values * size
        code = load_code(packed, at + 4, int(plan[BITS]), j % values)
        level = mul(levels[code], load_fp16(packed, at))
        share = load_fp16(packed, at + 2)
        if kind == PROJECTED:
            share = div(mul(load_fp16(packed, base + 2), QJL), float32(n))
            share = mul(share, projected[j])
        v[j] = add(level, mul(share, v[j]))


@cache
def decoder(width: int, restores: bool):
    """Return the kernel (packed, plan, signs, factors, levels, y): values, or scaled levels.

    signs: as for the encoder; factors: those after all transforms.
    """
    pitch = width + 1
    threads = threads_for(pitch)

    @cuda.jit
    def decode(packed, plan, signs, factors, levels, y):
        rows = cuda.shared.array((threads, pitch), float32)
        groups, cell_values = int(plan[GROUPS]), int(plan[CELL_VALUES])
        number = cuda.grid(1)
        cell, part = number // groups, number % groups
        if cell * cell_values < y.size:
            v, start = rows[cuda.threadIdx.x], cell * int(plan[CELL_BYTES])
            base = start + part * int(plan[BLOCKS]) * int(plan[SIZE])
            load_unscaled(packed, base, levels, plan, signs[2], width, v)
            if restores:
                turn(v, width, signs[1], plan[TWICE])
            for j in range(width):
                y[cell * cell_values + part * width + j] = mul(v[j], factors[j])
            if plan[ROPE_AT] >= 0 and part == 0:
                load_rope(packed, start + int(plan[ROPE_AT]), y, (cell + 1) * cell_values - ROPE)

    return decode


def right(codec: HadamardCells) -> bool:
    """Tell whether kernels do what a codec says; others are those of wrong kernels."""
    transform, residual = codec.transform, codec.residual
    if transform.width != transform.size or transform.gain != 1 or codec.corrected:
        return False
    return not residual or (residual == Residual(residual.projected))


def port(codec: Codec) -> Port | None:
    """Return the kernels of a codec of the family; None for amx3_1 and for wrong kernels."""
    inner = codec.latent if isinstance(codec, LatentAndRope) else codec
    if not isinstance(inner, HadamardCells) or not right(inner):
        return None
    width, plan, signs = inner.group_values, cell_plan(inner, codec), sign_table(inner)
    levels, unit = inner.cells.levels, inner.transform.scale
    per_group = codec.group_values // int(plan[GROUPS])

    def kernel(function, types, tables) -> Kernel:
        threads = threads_for(width + 1)
        return Kernel(function, threads, threads * per_group, types, tables)

    types = (FLOATS, INTS, FLOATS2, FLOATS, FLOATS, BYTES)
    encode = kernel(encoder(width), types, (plan, signs, inner.cells.edges, levels))
    types = (BYTES, INTS, FLOATS2, FLOATS, FLOATS, FLOATS)
    after = signs[0] / np.float32(inner.transform.divisor)
    decode = kernel(decoder(width, True), types, (plan, signs, after, levels))
    flat = np.full(width, unit, np.float32)
    leveler = kernel(decoder(width, False), types, (plan, signs, flat, levels))
    return Port(encode, None, levels, decode, rotation_back(inner, codec), leveler)


def rotation_back(inner: HadamardCells, codec: Codec) -> Kernel | None:
    """Return the kernel of `unrotate`; None for latent vectors, which are keys only."""
    if inner is not codec:
        return None
    before, *between = map(byte_signs, inner.transform.signs)
    last = before * inner.transform.scale
    if between:
        return rotating(codec, (turn_twice, 1), (between[0], last))
    return rotating(codec, HADAMARD, (np.ones_like(before), last))
