"""pq and tbq of qvac-fabric: a thread per block, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.qvac`.
"""

from __future__ import annotations

from functools import cache

import numpy as np

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
from cuda_port.fields import Fields
from cuda_port.groups import Plan, bit_coder, coder, hadamard, plan_of, put_half
from cuda_port.port import Port
from cuda_port.unroll import by_eights
from tbq.families.qvac import TINY, UnitCells
from tbq.numerics import word_signs

INFINITY = np.float32(np.inf)
POSITIVE = np.float32(2.0**-149)  # what is greater than zero is at least this


@cache
def body(plan: Plan, turn):
    """Return what encodes a block; `turn` precedes the residual's signs, None if there are none."""
    width, size, place, signed = plan.width, plan.fields.size, plan.scale, turn is not None
    measure, code = sums.squares(width, "ordered"), coder(plan, "levels")
    store_signs = bit_coder(width, size, place + 2)
    turned = turn if signed else measure

    @device
    def encode(v, row, packed, group, extra, lut):
        norm = abs(sqrt(measure(v)))
        if norm < TINY:
            for k in range(size // 2):
                put_half(packed, group * size, 2 * k, 0)
            return
        inverse = div(ONE, norm)
        for j in range(width):
            row[j] = mul(v[j], inverse)
        code(row, packed, group, lut)
        half = fp16_bits(norm)
        put_half(packed, group * size, place, half)
        if signed:
            d = fp16_value(half)
            for j in range(width):
                v[j] = add(v[j], -mul(row[j], d))
            rest = abs(sqrt(measure(v)))
            turned(v)
            for j in range(width):
                row[j] = v[j]
            store_signs(row, INFINITY if rest < TINY else POSITIVE, packed, group)
            put_half(packed, group * size, size - 2, fp16_bits(rest))

    return encode


@cache
def levels_of(fields: Fields, bits: int):
    """Return what makes `levels`: centroids times the scale, zeros where that is tiny."""

    @cache
    def of(n: int):
        at = fields.starts(n)[-1]

        @device
        def eight(first, words, v, place, lut):
            d = fp16_value(take(words, at, 16))
            for k in range(first, first + 8):
                level = mul(lut[index(take(words, bits * k, bits))], d)
                v[place + k] = ZERO if abs(d) < TINY else level

        return by_eights(n, eight)

    return of


def port(codec: UnitCells) -> Port | None:
    """Return the kernels of a format of qvac-fabric; None for wrong kernels."""
    if codec.corrected or codec.total != "ordered":
        return None
    cells, ones = codec.cells, np.ones(codec.block_values, np.float32)
    turn = hadamard(word_signs(codec.signs), ones) if codec.signs else None
    plan = plan_of(codec, cells.bits)
    table = table_of(cells.levels, cells.edges)
    return Port(
        kernels.encoder(plan.width, body(plan, turn), table, 2),
        plan.fields,
        levels_of(plan.fields, cells.bits),
        table[: 1 << cells.bits],
    )
