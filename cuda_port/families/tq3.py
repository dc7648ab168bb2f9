"""tq3_0 of unixsysdev and of animehacker: a thread per block, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.tq3`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, uint32

from cuda_port import kernels
from cuda_port.cells import finder, table_of
from cuda_port.device import ONE, ZERO, add, device, div, fp16_bits, index, mul, put
from cuda_port.fields import writer
from cuda_port.groups import Plan, decoding, hadamard, levels_of, plan_of
from cuda_port.port import Port
from cuda_port.unroll import by_eights
from tbq.families.tq3 import QK, SCALE, PeakCells
from tbq.numerics import word_signs


@cache
def body(plan: Plan, turn):
    """Return what encodes a block: the least level times d is its peak."""
    splits, fields = plan.bits == 3, plan.fields
    write, count = writer(fields, QK), fields.words(QK)
    _, high_at, at = fields.starts(QK)
    cell, outermost = finder(3 if splits else 2, True), (1 << plan.bits) - 1

    @device
    def eight(first, v, words, d, inverse, lut):
        for j in range(first, first + 8):
            code = cell(mul(v[j], inverse), lut)
            bit = code >> 2
            if not splits:
                bit = 1 if add(v[j], -mul(d, lut[index(code)])) >= ZERO else 0
            put(words, 2 * j, 2, code & 3)
            put(words, high_at + j, 1, bit)

    code_all = by_eights(QK, eight)

    @device
    def encode(v, row, packed, group, extra, lut):
        words = cuda.local.array(count, uint32)
        for k in range(count):
            words[k] = 0
        turn(v)
        peak = ZERO
        for j in range(QK):
            if abs(v[j]) > peak:
                peak = abs(v[j])
        d = div(peak, lut[outermost])
        code_all(v, words, d, div(ONE, d) if d > ZERO else ZERO, lut)
        put(words, at, 16, fp16_bits(d))
        write(words, packed, group, 0)

    return encode


def port(codec: PeakCells) -> Port | None:
    """Return the kernels of tq3_0; None for wrong kernels."""
    if codec.width != QK or not codec.outermost:
        return None
    cells, third = codec.cells, "qr" if codec.splits else None
    signs, ones = word_signs((codec.signs,)), np.ones(QK, np.float32)
    plan = plan_of(codec, cells.bits, scaled_first=True, third=third)
    turn, back = (
        hadamard(signs, ones * np.float32(SCALE)),
        hadamard(ones, signs * np.float32(SCALE)),
    )
    qs, qr = codec.layout.offset("qs"), codec.layout.offset("qr")
    written = plan._replace(fields=plan.fields._replace(parts=((qs, 2), (qr, 1))))
    table = table_of(cells.levels, cells.edges)
    return Port(
        kernels.encoder(QK, body(written, turn), table, 2),
        plan.fields,
        levels_of(plan),
        table[: 1 << cells.bits],
        decoding(plan, back, cells.levels),
        kernels.rotator(QK, turn),
        kernels.rotator(QK, back),
    )
