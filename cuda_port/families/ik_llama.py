"""q6_0 of ik_llama.cpp, a thread per block; q8_KV is no format.

The arithmetic is that of `tbq.families.ik_llama`.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, float32, uint32

from cuda_port import kernels
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
    take,
)
from cuda_port.fields import whole_block, write_unit, writer
from cuda_port.port import Port
from cuda_port.unroll import by_eights
from tbq.families.ik_llama import HALF_QK, OFFSET, QK, STEPS, TOP, SixBits

SIZE = SixBits.layout.dtype.itemsize
HIGH, LOW = 8 * SixBits.layout.offset("qh"), 8 * SixBits.layout.offset("qs")
SCALE_AT = 8 * SixBits.layout.offset("d")
BLOCK = whole_block(SIZE, QK)
WRITE, COUNT = writer(BLOCK, QK), BLOCK.words(QK)
MIDDLE, LIMIT, INFINITY = np.float32(32), np.float32(TOP), np.float32(np.inf)


@device
def code_of(a):
    """Return the code of a value in steps."""
    steps = add(a, OFFSET)
    if not (abs(a) < INFINITY and steps > ZERO):
        return 0
    return int(steps if steps < LIMIT else LIMIT)


@device
def high_at(j):
    """Return at which bit the upper two bits of code j are."""
    i = j % HALF_QK
    return HIGH + 8 * (i % 8) + 4 * (i // 8) + 2 * (j // HALF_QK)


@device
def stored_scale(v, s, inverse):
    """Return the scale of least square for v[:32], s where there is none."""
    u, w = ZERO, ZERO
    for j in range(HALF_QK):
        x0, x1 = v[j], v[j + HALF_QK]
        a0, a1 = mul(x0, inverse), mul(x1, inverse)
        p0 = add(float32(code_of(a0)), -MIDDLE)
        p1 = add(float32(code_of(a1)), -MIDDLE)
        w0, w1 = mul(a0, a0), mul(a1, a1)
        u = add(u, add(mul(mul(w0, x0), p0), mul(mul(w1, x1), p1)))
        w = add(w, add(mul(mul(w0, p0), p0), mul(mul(w1, p1), p1)))
    return div(u, w) if w > ZERO else s


@device
def code_eight(first, v, words, inverse):
    """Put eight codes."""
    for j in range(first, first + 8):
        code = code_of(mul(v[j], inverse))
        put(words, LOW + 8 * (j % HALF_QK) + 4 * (j // HALF_QK), 4, code & 15)
        put(words, high_at(j), 2, code >> 4)


CODE = by_eights(QK, code_eight)


@device
def body(v, row, packed, group, extra, lut):
    """Encode a block."""
    words = cuda.local.array(COUNT, uint32)
    for k in range(COUNT):
        words[k] = 0
    largest = ZERO
    for j in range(QK):
        if abs(v[j]) > abs(largest):
            largest = v[j]
    s = div(largest, STEPS)
    inverse = div(ONE, s) if s != ZERO else ZERO
    CODE(v, words, inverse)
    put(words, SCALE_AT, 16, fp16_bits(stored_scale(v, s, inverse)))
    WRITE(words, packed, group, 0)


@device
def level_eight(first, words, v, at, lut):
    """Set eight values of a block."""
    d = fp16_value(take(words, SCALE_AT, 16))
    for j in range(first, first + 8):
        code = take(words, LOW + 8 * (j % HALF_QK) + 4 * (j // HALF_QK), 4)
        code |= take(words, high_at(j), 2) << 4
        v[at + j] = mul(d, lut[index(code)])


LEVELS = by_eights(QK, level_eight)


def port(codec: SixBits) -> Port | None:
    """Return the kernels of q6_0; None for wrong kernels."""
    if codec != SixBits():
        return None
    levels = np.arange(TOP + 1, dtype=np.float32) - MIDDLE
    encode = kernels.encoder(QK, body, np.zeros(1, np.float32), write_unit(BLOCK))
    return Port(encode, BLOCK, lambda n: LEVELS, levels)
