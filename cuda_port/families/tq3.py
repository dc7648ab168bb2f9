"""tq3_0 of unixsysdev and of animehacker: a thread per block, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.tq3`.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, float32

from cuda_port.device import ONE, ZERO, add, div, mul, store_fp16
from cuda_port.groups import (
    HADAMARD,
    THIRD,
    cell,
    decoding,
    grouped,
    hadamard,
    level_of,
    load,
    plan_of,
    rotating,
    store_word,
    threads_for,
)
from cuda_port.port import BYTES, FLOATS, INTS, Port
from tbq.families.tq3 import QK, SCALE, PeakCells
from tbq.numerics import word_signs

PITCH = QK + 1
THREADS = threads_for(PITCH)
SIZE = PeakCells.layout.dtype.itemsize
HIGH, GAMMA = PeakCells.layout.offset("qr"), PeakCells.layout.offset("gamma")


@cuda.jit
def encode(x, plan, signs, factors, edges, levels, packed):
    """Quantise flat float32 to tq3_0."""
    rows = cuda.shared.array((THREADS, PITCH), float32)
    block = cuda.grid(1)
    if block * QK < x.size:
        v, base, splits = rows[cuda.threadIdx.x], block * SIZE, plan[THIRD] >= 0
        load(x, block * QK, QK, v)
        hadamard(v, QK, signs, factors)
        peak = ZERO
        for j in range(QK):
            if abs(v[j]) > peak:
                peak = abs(v[j])
        d = div(peak, levels[levels.size - 1])
        inverse = div(ONE, d) if d > ZERO else ZERO
        for g in range(QK // 8):
            word, high = 0, 0
            for k in range(8):
                u = v[8 * g + k]
                code = cell(mul(u, inverse), edges, 3 if splits else 2, True)
                bit = code >> 2
                if not splits:
                    bit = 1 if add(u, -mul(d, levels[code])) >= ZERO else 0
                word |= (code & 3) << (2 * k)
                high |= bit << k
            store_word(word, 2, packed, base + 2 * g)
            packed[base + HIGH + g] = high
        store_fp16(d, packed, base + GAMMA)


def port(codec: PeakCells) -> Port | None:
    """Return the kernels of tq3_0; None for wrong kernels."""
    if codec.width != QK or not codec.outermost:
        return None
    levels, third = codec.cells.levels, "qr" if codec.splits else None
    signs, ones = word_signs((codec.signs,)), np.ones(QK, np.float32)
    plan = plan_of(codec, codec.cells.bits, scaled_first=True, third=third)
    back = ones, signs * np.float32(SCALE)
    types = (FLOATS, INTS, FLOATS, FLOATS, FLOATS, FLOATS, BYTES)
    tables = (plan, signs, ones * np.float32(SCALE), codec.cells.edges, levels)
    return Port(
        grouped(encode, PITCH, QK, types, tables),
        level_of(plan),
        levels,
        decoding(codec, plan, HADAMARD, back, levels),
        rotating(codec, HADAMARD, back),
    )
