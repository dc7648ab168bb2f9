"""tbq and tbqp of AmesianX: a thread per cell, see `cuda_port.kernels`; amx3_1 is not ported.

The arithmetic is that of `tbq.families.amesianx`. A cell is what the codec encodes together: a
group, or the one or two of a latent vector and its rotary values. A sign, and a division by a power
of two, commute with a factor next to them without rounding, so they are one factor here. Levels of
a projected residual take the whole group, so attention reads levels that are written out.

The second half of an amx3_1 block follows from sine, cosine and arc tangent in double, rounded as
the C library does. The device has its own, which may round otherwise, so no bytes can be promised.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda, float32, uint32

from cuda_port import kernels, sums
from cuda_port.cells import table_of
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
    sqrt,
    take,
)
from cuda_port.fields import Fields, reader
from cuda_port.groups import SLICE, Plan, coder, plan_of, put_half
from cuda_port.port import Kernel, Port
from cuda_port.unroll import by_eights, by_ones, chain
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


class Shape(NamedTuple):
    """Where the groups of a cell are.

    Attributes:
        plan: of the codec of a group.
        kind: of its residual: NONE, DIRECT or PROJECTED.
        rms: whether the scale is taken of the coordinates.
        scales: of a group.
        twice: whether there are two transforms.
        signs: where the residual's signs are in a block.
        values, size: of a cell, and its bytes.
        groups: of a cell.
        rope: where the rotary values are, -1 if there are none.
    """

    plan: Plan
    kind: int
    rms: bool
    scales: int
    twice: bool
    signs: int
    values: int
    size: int
    groups: int
    rope: int

    def block_fields(self, number: int, parts=None, whole=()) -> Fields:
        """Return fields of block `number` of a cell; parts: its codes, if they are not given."""
        at = number * self.plan.fields.size
        moved = tuple((at + offset, n) for offset, n in parts or self.plan.fields.parts)
        return Fields(self.size, self.values, moved, tuple((at + o, n) for o, n in whole))


def shape_of(codec: HadamardCells, cell: Codec) -> Shape:
    """Return the shape of a cell of groups of a codec, which may be itself."""
    residual, roped = codec.residual, cell is not codec
    return Shape(
        plan_of(codec, codec.cells.bits),
        NONE if not residual else PROJECTED if residual.projected else DIRECT,
        codec.measured == "rms",
        codec.scales,
        len(codec.transform.signs) > 1,
        codec.layout.offset("qjl") if residual else 0,
        cell.group_values,
        cell.block_bytes * cell.group_blocks,
        (cell.group_values - ROPE) // codec.group_values if roped else 1,
        cell.layout.offset("rope") if roped else -1,
    )


def each(count: int, one, unrolled: bool):
    """Return the device function (...) that calls one(k, ...) for k < count."""
    if unrolled:
        return by_ones(count, one)

    @device
    def run(*args):
        for k in range(count):
            one(k, *args)

    return run


@cache
def turns(width: int, digits: tuple[str, ...]):
    """Return the device function (v): a transform, or two with signs in between."""
    transform, twice = sums.transform(width), len(digits) > 1
    between = byte_signs(digits[-1])

    @device
    def turn(v):
        transform(v)
        if twice:
            give_signs(v, width, between)
            transform(v)

    return turn


@device
def give_signs(v, n, signs):
    """Multiply v[:n] by factors."""
    for j in range(n):
        v[j] = mul(v[j], signs[j])


@device
def ordered_squares(v, first, n):
    """Return the sum of squares of v[first : first + n]."""
    total = ZERO
    for j in range(first, first + n):
        total = add(total, mul(v[j], v[j]))
    return total


# --- encoder -------------------------------------------------------------------------------------


@cache
def group_coder(codec: HadamardCells, shape: Shape, group: int):
    """Return the device function (v, row, packed, cell, lut) that encodes a group of a cell."""
    plan, kind, rms, scales = shape.plan, shape.kind, shape.rms, shape.scales
    width, values, blocks = plan.width, plan.fields.values, plan.blocks
    before, turn = byte_signs(codec.transform.signs[0]), turns(width, codec.transform.signs)
    transform, part = sums.transform(width), width // scales
    divisor, counted = np.float32(part if rms else 1), np.float32(width)
    projected = before if kind != PROJECTED else byte_signs(codec.residual.projected)
    numbers = range(group * blocks, (group + 1) * blocks)
    code_all = chain(_block_coder(shape, number, group) for number in numbers)
    store_all = chain(_block_storer(shape, number, group) for number in numbers)
    assert values * blocks == width

    @device
    def encode(v, row, packed, cell, lut):
        own = cuda.local.array(2, float32)
        give_signs(v, width, before)
        if rms:
            turn(v)
        for k in range(scales):
            own[k] = sqrt(div(ordered_squares(v, k * part, part), divisor))
            inverse = div(ONE, own[k])
            for j in range(k * part, (k + 1) * part):
                v[j] = mul(v[j], inverse)
        if not rms:
            turn(v)
        for j in range(width):
            row[j] = v[j]
        code_all(row, packed, cell, lut)
        second = ZERO
        if kind != NONE:
            for j in range(width):
                v[j] = row[j]
        if kind == PROJECTED:
            second = sqrt(ordered_squares(v, 0, width))
            give_signs(v, width, projected)
            transform(v)
            for j in range(width):
                row[j] = v[j]
        if kind == DIRECT:
            for j in range(width):
                second = add(second, abs(v[j]))
            second = div(second, counted)
        store_all(row, packed, cell, own, second)

    return encode


def _block_coder(shape: Shape, number: int, group: int):
    """Return the device function (row, packed, cell, lut) that codes a block's coordinates."""
    values, blocks = shape.plan.fields.values, shape.plan.blocks
    first, fields = number % blocks * values, shape.block_fields(number)
    plan = shape.plan._replace(width=values, blocks=1, fields=fields)
    code = coder(plan, "nothing" if shape.kind == NONE else "rest")

    @device
    def code_block(row, packed, cell, lut):
        code(row[first : first + values], packed, cell, lut)

    return code_block


def _block_storer(shape: Shape, number: int, group: int):
    """Return the device function (row, packed, cell, own, second): scales and residual signs."""
    plan, kind = shape.plan, shape.kind
    values, size, blocks = plan.fields.values, plan.fields.size, plan.blocks
    first, scale = number % blocks * values, number % blocks if shape.scales > 1 else 0
    signs, cell_size = shape.signs, shape.size

    @device
    def store(row, packed, cell, own, second):
        mine, base = own[scale], cell * cell_size + number * size
        if mine < TINY:
            for k in range(size // 2):
                put_half(packed, base, 2 * k, 0)
        else:
            put_half(packed, base, 0, fp16_bits(abs(mine)))  # see the specification
            if kind != NONE:
                put_half(packed, base, 2, fp16_bits(abs(mul(second, mine))))
                for g in range(values // 16):
                    word = 0
                    for k in range(16):
                        if row[index(first + 16 * g + k)] >= ZERO:
                            word |= 1 << k
                    put_half(packed, base, signs + 2 * g, word)

    return store


@cache
def body(codec: HadamardCells, shape: Shape):
    """Return what encodes a cell."""
    size, rope, values = shape.size, shape.rope, shape.values
    code_all = chain(_group_body(codec, shape, group) for group in range(shape.groups))

    @device
    def encode(v, row, packed, cell, extra, lut):
        if rope >= 0:
            for j in range(ROPE):
                place = fp16_bits(row[index(values - ROPE + j)])
                put_half(packed, cell * size, rope + 2 * j, place)
        code_all(v, row, packed, cell, lut)

    return encode


def _group_body(codec: HadamardCells, shape: Shape, group: int):
    width, lone = shape.plan.width, shape.groups == 1 and shape.rope < 0
    encode = group_coder(codec, shape, group)

    @device
    def encode_group(v, row, packed, cell, lut):
        if lone:
            encode(v, row, packed, cell, lut)
        else:
            part = row[group * width : (group + 1) * width]
            encode(part, part, packed, cell, lut)

    return encode_group


# --- decoder -------------------------------------------------------------------------------------


@cache
def slice_levels(fields: Fields, bits: int, kind: int, unit):
    """Return what makes `levels` where they are a slice's own: unscaled ones, times `unit`."""

    @cache
    def of(n: int):
        starts = fields.starts(n)
        at_signs, at_scale, at_second = starts[1], starts[len(fields.parts)], starts[-1]

        @device
        def eight(first, words, v, at, lut):
            d = fp16_value(take(words, at_scale, 16))
            for k in range(first, first + 8):
                level = mul(lut[index(take(words, bits * k, bits))], d)
                if kind == DIRECT:
                    share = fp16_value(take(words, at_second, 16))
                    level = add(level, share if take(words, at_signs + k, 1) else -share)
                v[index(at + k)] = mul(level, unit)

        return by_eights(n, eight)

    return of


def slice_fields(shape: Shape, number: int) -> Fields:
    """Return codes, signs of a residual, and scales of block `number` of a cell."""
    if shape.kind == NONE:
        return shape.block_fields(number, whole=((0, 2),))
    parts = (*shape.plan.fields.parts, (shape.signs, 1))
    return shape.block_fields(number, parts, ((0, 2), (2, 2)))


@cache
def group_filler(codec: HadamardCells, shape: Shape, group: int, restores: bool):
    """Return the device function (packed, cell, v, lut): v the values of a group, or its levels."""
    plan, signs = shape.plan, codec.transform.signs
    width, blocks, registers = plan.width, plan.blocks, shape.values <= kernels.REGISTER_VALUES
    numbers = range(group * blocks, (group + 1) * blocks)
    if shape.kind == PROJECTED:
        fill = _projected_filler(codec, shape, group, numbers, registers)
    else:
        fill = chain(_block_filler(shape, number, registers) for number in numbers)
    turn = turns(width, signs[::-1] if len(signs) < 2 else (signs[0], signs[1]))
    after = byte_signs(signs[0]) / np.float32(codec.transform.divisor)
    unit = np.float32(codec.transform.scale)

    @device
    def decode(packed, cell, v, lut):
        fill(packed, cell, v, lut)
        if restores:
            turn(v)
            give_signs(v, width, after)
        else:
            for j in range(width):
                v[j] = mul(v[j], unit)

    return decode


def _block_filler(shape: Shape, number: int, registers: bool):
    """Return the device function (packed, cell, v, lut) that sets v to unscaled levels."""
    values, fields = shape.plan.fields.values, slice_fields(shape, number)
    read, count = reader(fields, SLICE), fields.words(SLICE)
    first = number % shape.plan.blocks * values
    levels = slice_levels(fields, shape.plan.bits, shape.kind, ONE)(SLICE)

    @device
    def one(s, packed, cell, v, lut):
        words = cuda.local.array(count, uint32)
        read(packed, cell, s, words)
        levels(words, v, first + s * SLICE, lut)

    return each(values // SLICE, one, registers)


def _projected_filler(codec, shape: Shape, group: int, numbers, registers: bool):
    """Return the same where the residual's signs are transformed first."""
    width, values, blocks = shape.plan.width, shape.plan.fields.values, shape.plan.blocks
    transform, counted = sums.transform(width), np.float32(width)
    signs_of = chain(_sign_filler(shape, number, registers) for number in numbers)
    projected = byte_signs(codec.residual.projected)
    add_all = chain(_level_adder(shape, number, projected, registers) for number in numbers)
    second = shape.block_fields(group * blocks, whole=((2, 2),))._replace(parts=())
    read, count = reader(second, shape.values), second.words(shape.values)
    assert values * blocks == width

    @device
    def fill(packed, cell, v, lut):
        words = cuda.local.array(count, uint32)
        signs_of(packed, cell, v)
        transform(v)
        read(packed, cell, 0, words)
        share = div(mul(fp16_value(take(words, 0, 16)), QJL), counted)
        add_all(packed, cell, v, lut, share)

    return fill


def _sign_filler(shape: Shape, number: int, registers: bool):
    """Return the device function (packed, cell, v) that sets v to the residual's signs."""
    values, fields = shape.plan.fields.values, shape.block_fields(number, ((shape.signs, 1),))
    read, count, first = reader(fields, SLICE), fields.words(SLICE), number % shape.plan.blocks
    at = first * values

    @device
    def eight(first, words, v, place):
        for k in range(first, first + 8):
            v[index(place + k)] = ONE if take(words, k, 1) else -ONE

    all_signs = by_eights(SLICE, eight)

    @device
    def one(s, packed, cell, v):
        words = cuda.local.array(count, uint32)
        read(packed, cell, s, words)
        all_signs(words, v, at + s * SLICE)

    return each(values // SLICE, one, registers)


def _level_adder(shape: Shape, number: int, projected: np.ndarray, registers: bool):
    """Return the device function (packed, cell, v, lut, share): v levels and shares of signs."""
    values, fields = shape.plan.fields.values, shape.block_fields(number, whole=((0, 2),))
    read, count, bits = reader(fields, SLICE), fields.words(SLICE), shape.plan.bits
    at_scale, at = fields.starts(SLICE)[-1], number % shape.plan.blocks * values

    @device
    def eight(first, words, v, place, lut, share):
        d = fp16_value(take(words, at_scale, 16))
        for k in range(first, first + 8):
            j = index(place + k)
            level = mul(lut[index(take(words, bits * k, bits))], d)
            v[j] = add(level, mul(mul(share, projected[j]), v[j]))

    levels = by_eights(SLICE, eight)

    @device
    def one(s, packed, cell, v, lut, share):
        words = cuda.local.array(count, uint32)
        read(packed, cell, s, words)
        levels(words, v, at + s * SLICE, lut, share)

    return each(values // SLICE, one, registers)


@device
def rope_eight(first, words, v, at):
    """Set eight rotary values."""
    for j in range(first, first + 8):
        v[index(at + j)] = fp16_value(take(words, 16 * j, 16))


load_rope = by_eights(ROPE, rope_eight)


@cache
def filler(codec: HadamardCells, shape: Shape, restores: bool):
    """Return the device function (packed, cell, v, lut) that decodes a cell."""
    rope, values = shape.rope, shape.values
    whole = Fields(shape.size, values, (), ((rope, 2 * ROPE),) if rope >= 0 else ())
    read, count = reader(whole, values), whole.words(values)
    fill_all = chain(_group_part(codec, shape, k, restores) for k in range(shape.groups))

    @device
    def fill(packed, cell, v, lut):
        fill_all(packed, cell, v, lut)
        if rope >= 0:
            words = cuda.local.array(count, uint32)
            read(packed, cell, 0, words)
            load_rope(words, v, values - ROPE)

    return fill


def _group_part(codec: HadamardCells, shape: Shape, group: int, restores: bool):
    width, lone = shape.plan.width, shape.groups == 1 and shape.rope < 0
    fill = group_filler(codec, shape, group, restores)

    @device
    def fill_part(packed, cell, v, lut):
        if lone:
            fill(packed, cell, v, lut)
        else:
            fill(packed, cell, v[group * width : (group + 1) * width], lut)

    return fill_part


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
    shape = shape_of(inner, codec)
    levels = np.float32(inner.cells.levels).reshape(-1)
    table = table_of(levels, inner.cells.edges)
    encode = kernels.encoder(shape.values, body(inner, shape), table, 2)

    def decoder(restores: bool) -> Kernel:
        unit = slice_fields(shape, 0).unit(SLICE)
        return kernels.group_decoder(shape.values, filler(inner, shape, restores), levels, unit)

    own = own_levels(inner, shape) if inner is codec else (None, None)
    leveler = None if own[0] else decoder(False)
    turns = rotations(inner) if inner is codec else (None, None)
    return Port(encode, *own, levels, decoder(True), *turns, leveler=leveler)


def own_levels(codec: HadamardCells, shape: Shape):
    """Return fields and `levels` where slices have their own; None where the whole group counts."""
    if shape.kind == PROJECTED:
        return None, None
    alone = shape._replace(values=shape.plan.fields.values, size=shape.plan.fields.size)
    fields = slice_fields(alone, 0)
    unit = np.float32(codec.transform.scale)
    return fields, slice_levels(fields, shape.plan.bits, shape.kind, unit)


def rotations(codec: HadamardCells) -> tuple[Kernel, Kernel]:
    """Return the kernels of `rotate` and `unrotate`."""
    width, signs, scale = codec.group_values, codec.transform.signs, codec.transform.scale
    before, turn = byte_signs(signs[0]), turns(width, signs)
    last = before * np.float32(scale)
    unit = np.full(width, scale, np.float32)

    @device
    def rotate(v):
        give_signs(v, width, before)
        turn(v)
        give_signs(v, width, unit)

    @device
    def unrotate(v):
        turn(v)
        give_signs(v, width, last)

    return kernels.rotator(width, rotate), kernels.rotator(width, unrotate)
