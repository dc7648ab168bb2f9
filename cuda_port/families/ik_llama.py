"""q6_0 of ik_llama.cpp, a thread per block; q8_KV is no format.

The arithmetic is that of `tbq.families.ik_llama`.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, float32

from cuda_port.device import ONE, ZERO, add, device, div, load_fp16, mul, store_fp16
from cuda_port.port import BYTES, FLOATS, VALUE_THREADS, Kernel, Port
from tbq.families.ik_llama import HALF_QK, OFFSET, QK, STEPS, TOP, SixBits

SIZE = SixBits.layout.dtype.itemsize
HIGH, LOW = SixBits.layout.offset("qh"), SixBits.layout.offset("qs")
MIDDLE, LIMIT, INFINITY = np.float32(32), np.float32(TOP), np.float32(np.inf)


@device
def code_of(a):
    """Return the code of a value in steps."""
    steps = add(a, OFFSET)
    if not (abs(a) < INFINITY and steps > ZERO):
        return 0
    return int(steps if steps < LIMIT else LIMIT)


@device
def stored_scale(x, at, s, inverse):
    """Return the scale of least square for x[at : at + 32], s where there is none."""
    u, v = ZERO, ZERO
    for j in range(HALF_QK):
        x0, x1 = x[at + j], x[at + HALF_QK + j]
        a0, a1 = mul(x0, inverse), mul(x1, inverse)
        p0 = add(float32(code_of(a0)), -MIDDLE)
        p1 = add(float32(code_of(a1)), -MIDDLE)
        w0, w1 = mul(a0, a0), mul(a1, a1)
        u = add(u, add(mul(mul(w0, x0), p0), mul(mul(w1, x1), p1)))
        v = add(v, add(mul(mul(w0, p0), p0), mul(mul(w1, p1), p1)))
    return div(u, v) if v > ZERO else s


@cuda.jit
def encode(x, packed):
    """Quantise flat float32 to q6_0."""
    block = cuda.grid(1)
    if block * QK < x.size:
        at, base = block * QK, block * SIZE
        largest = ZERO
        for j in range(QK):
            if abs(x[at + j]) > abs(largest):
                largest = x[at + j]
        s = div(largest, STEPS)
        inverse = div(ONE, s) if s != ZERO else ZERO
        for j in range(HALF_QK // 2):
            high = 0
            for part in range(2):
                k = j + part * HALF_QK // 2
                first = code_of(mul(x[at + k], inverse))
                second = code_of(mul(x[at + HALF_QK + k], inverse))
                packed[base + LOW + k] = first & 15 | (second & 15) << 4
                high |= (first >> 4 | (second >> 4) << 2) << (4 * part)
            packed[base + HIGH + j] = high
        store_fp16(stored_scale(x, at, s, inverse), packed, base)


@device
def level(packed, base, i, levels):
    """Return value i of a block."""
    j, half = i % HALF_QK, i // HALF_QK
    low = (packed[base + LOW + j] >> (4 * half)) & 15
    high = (packed[base + HIGH + j % 8] >> (4 * (j // 8) + 2 * half)) & 3
    return mul(load_fp16(packed, base), levels[low | high << 4])


def port(codec: SixBits) -> Port | None:
    """Return the kernels of q6_0; None for wrong kernels."""
    if codec != SixBits():
        return None
    levels = np.arange(TOP + 1, dtype=np.float32) - MIDDLE
    return Port(Kernel(encode, VALUE_THREADS, VALUE_THREADS * QK, (FLOATS, BYTES)), level, levels)
