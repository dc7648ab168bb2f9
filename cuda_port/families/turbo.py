"""turbo2, turbo3, turbo4, turbo8 and Excidos' kin: a thread per group, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.turbo`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, uint32

from cuda_port import kernels, sums
from cuda_port.cells import corrected, finder, table_of
from cuda_port.device import (
    ONE,
    ZERO,
    add,
    device,
    div,
    fp16_bits,
    fp16_value,
    index,
    mul,
    put,
    rint,
    settle,
    sqrt,
    take,
)
from cuda_port.fields import Fields, writer
from cuda_port.groups import (
    SLICE,
    TINY,
    Plan,
    bit_coder,
    coder,
    decoding,
    encoding,
    hadamard,
    inverse_norm,
    levels_of,
    plan_of,
    put_half,
    scale,
)
from cuda_port.kernels import rotator
from cuda_port.port import Kernel, Port
from cuda_port.unroll import by_eights
from tbq.codec import Codec
from tbq.families.turbo import (
    GROUP,
    QJL,
    THREE,
    THREE_UNIT,
    OverwrittenCodes,
    ResidualSigns,
    RotatedGrid,
    Rotation,
    grid,
)
from tbq.numerics import word_signs

HALF_STEPS, TOP = np.float32(127.5), np.float32(255.0)
ORDERED = sums.squares(GROUP, "ordered")


def forward(rotation: Rotation):
    """Return the `mix` of R."""
    after = word_signs(rotation.after) * np.float32(rotation.scale)
    return hadamard(word_signs(rotation.before), after)


def backward(rotation: Rotation):
    """Return the `mix` of the inverse of R."""
    after = word_signs(rotation.before) * np.float32(rotation.scale)
    return hadamard(word_signs(rotation.after), after)


def port(codec: Codec) -> Port | None:
    """Return the kernels of a codec of the family; None for wrong kernels."""
    if codec.rotation.width != GROUP:
        return None
    if isinstance(codec, RotatedGrid):
        return grid_port(codec) if codec.peaked else None
    if isinstance(codec, ResidualSigns):
        return residual_port(codec) if codec.residual.width == GROUP else None
    if isinstance(codec, OverwrittenCodes):
        return overwritten_port(codec)
    third = "signs" if codec.cells.bits == 3 else None
    plan = plan_of(
        codec,
        codec.cells.bits,
        total=codec.total,
        clears=codec.clears_nan,
        corrected=codec.corrected,
        third=third,
    )
    levels, turn = codec.cells.levels, forward(codec.rotation)
    encode = encoding(plan, turn, codec.cells.edges, levels)
    return cells_port(codec, plan, encode, levels, turn)


def cells_port(codec: Codec, plan: Plan, encode: Kernel, levels: np.ndarray, turn) -> Port:
    """Return the port of what decodes as cells do; without a decoder if the graph turns back."""
    rotate, own = rotator(GROUP, turn), ()
    if codec.gives != "rotated":
        back = backward(codec.rotation)
        own = decoding(plan, back, levels), rotate, rotator(GROUP, back)
    own = own or (None, rotate)
    return Port(encode, plan.fields, levels_of(plan), np.float32(levels).reshape(-1), *own)


# --- turbo8 --------------------------------------------------------------------------------------


@cache
def grid_body(order: str, turn):
    """Return what encodes a group of turbo8."""
    measure = sums.norm(GROUP, order)
    fields = Fields(GROUP + 2, GROUP, ((2, 8),))
    write, count = writer(fields, SLICE), fields.words(SLICE)

    @device
    def body(v, row, packed, group, extra, lut):
        norm = measure(v, row)
        scale(v, GROUP, inverse_norm(norm, TINY))
        turn(v)
        peak = TINY
        for j in range(GROUP):
            row[j] = v[j]
            if abs(v[j]) > peak:
                peak = abs(v[j])
        inverse = div(ONE, peak)
        words = cuda.local.array(count, uint32)
        for s in range(GROUP // SLICE):
            for k in range(count):
                words[k] = 0
            for k in range(SLICE):
                u = row[index(SLICE * s + k)]
                steps = rint(add(mul(mul(u, inverse), HALF_STEPS), HALF_STEPS))
                steps = steps if steps > ZERO else ZERO  # NaN too
                put(words, 8 * k, 8, int(steps if steps < TOP else TOP))
            write(words, packed, group, s)
        put_half(packed, group * (GROUP + 2), 0, fp16_bits(mul(norm, peak)))

    return body


def grid_port(codec: RotatedGrid) -> Port:
    """Return the kernels of turbo8."""
    plan, turn = plan_of(codec, 8, total=codec.total), forward(codec.rotation)
    encode = kernels.encoder(GROUP, grid_body(codec.total, turn), np.zeros(1, np.float32), 2)
    return cells_port(codec, plan, encode, grid(), turn)


# --- turbo4 of March 2026 ------------------------------------------------------------------------


@device
def exchange_eight(first, v, row, inverse):
    """Put coordinates in row, and what was there, scaled, in v: not all of both at a time."""
    for j in range(first, first + 8):
        x = row[j]
        row[j] = v[j]
        v[j] = mul(x, inverse)
    settle()


@device
def move_eight(first, v, row, shift):
    """Put the residual's coordinates in row, and the levels that were there, moved, in v."""
    for j in range(first, first + 8):
        level = row[j]
        row[j] = v[j]
        v[j] = add(level, shift if v[j] >= ZERO else -shift)
    settle()


@cache
def residual_body(plan: Plan, turn, turn_residual):
    """Return what encodes a group of turbo4 of March 2026; row keeps what is not rotated."""
    size, code = plan.fields.size, coder(plan, "levels")
    exchange, move = by_eights(GROUP, exchange_eight), by_eights(GROUP, move_eight)
    store_signs = bit_coder(GROUP, size, ResidualSigns.layout.offset("signs"))

    @device
    def body(v, row, packed, group, extra, lut):
        norm = sqrt(ORDERED(v))
        inverse = inverse_norm(norm, TINY)
        scale(v, GROUP, inverse)
        turn(v)
        exchange(v, row, inverse)
        code(row, packed, group, lut)
        for j in range(GROUP):
            v[j] = add(v[j], -row[j])
        rest = sqrt(ORDERED(v))
        turn_residual(v)
        shift = mul(QJL, rest)
        move(v, row, shift)
        store_signs(row, ZERO, packed, group)
        norm = corrected(norm, sqrt(ORDERED(v)), TINY)
        put_half(packed, group * size, 0, fp16_bits(norm))
        put_half(packed, group * size, 2, fp16_bits(rest))

    return body


@cache
def moved_levels(fields: Fields):
    """Return what makes `levels`: centroids, moved by the residual's share, times the norm."""

    @cache
    def of(n: int):
        _, signs, at_norm, at_rest = fields.starts(n)

        @device
        def eight(first, words, v, at, lut):
            norm = fp16_value(take(words, at_norm, 16))
            shift = mul(QJL, fp16_value(take(words, at_rest, 16)))
            for k in range(first, first + 8):
                moved = shift if take(words, signs + k, 1) else -shift
                v[at + k] = mul(add(lut[index(take(words, 3 * k, 3))], moved), norm)

        return by_eights(n, eight)

    return of


def residual_port(codec: ResidualSigns) -> Port:
    """Return the kernels of turbo4 of March 2026."""
    layout, turn = codec.layout, forward(codec.rotation)
    parts = ((layout.offset("qs"), 3), (layout.offset("signs"), 1))
    plan = plan_of(codec, 3)
    body = residual_body(plan, turn, forward(codec.residual))
    encode = kernels.encoder(GROUP, body, table_of(THREE.levels, THREE.edges), 2)
    fields = Fields(codec.block_bytes, GROUP, parts, ((0, 2), (2, 2)))
    levels = np.float32(THREE.levels).reshape(-1)
    return Port(encode, fields, moved_levels(fields), levels, None, rotator(GROUP, turn))


# --- tbq3_0 of Excidos ---------------------------------------------------------------------------


@cache
def overwritten_body(size: int, turn):
    """Return what encodes tbq3_0 of Excidos, whose packer loses codes."""
    cell, fields = finder(3, True), Fields(size, GROUP, ((2, 3),))
    write, count = writer(fields, SLICE), fields.words(SLICE)

    @device
    def body(v, row, packed, group, extra, lut):
        norm = sqrt(ORDERED(v))
        if norm < TINY:
            norm = TINY
        for j in range(GROUP):
            v[j] = div(v[j], norm)
        turn(v)
        for j in range(GROUP):
            row[j] = v[j]
        total = ZERO
        words = cuda.local.array(count, uint32)
        for s in range(GROUP // SLICE):
            for k in range(count):
                words[k] = 0
            for g in range(SLICE // 8):
                byte = 0
                for k in range(8):
                    code = cell(row[index(SLICE * s + 8 * g + k)], lut)
                    level = lut[index(code)]
                    total = add(total, mul(level, level))
                    byte |= code << (3 * k if k < 3 else 0)
                put(words, 24 * g, 8, byte & 0xFF)
            write(words, packed, group, s)
        restored = sqrt(total)
        norm = div(norm, TINY if restored < TINY else restored)
        put_half(packed, group * size, 0, fp16_bits(norm))

    return body


def overwritten_port(codec: OverwrittenCodes) -> Port:
    """Return the kernels of tbq3_0 of Excidos."""
    plan, turn = plan_of(codec, 3), forward(codec.rotation)
    table = table_of(THREE_UNIT.levels, THREE_UNIT.edges)
    encode = kernels.encoder(GROUP, overwritten_body(codec.block_bytes, turn), table, 2)
    return cells_port(codec, plan, encode, THREE_UNIT.levels, turn)
