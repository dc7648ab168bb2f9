"""pq and tbq of qvac-fabric: a thread per block, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.qvac`.
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
    ORDERED,
    SCALE,
    SIZE,
    grouped,
    hadamard,
    load_and_measure,
    plan_of,
    scale,
    store_bits,
    store_cells,
    threads_for,
    total_of_squares,
)
from cuda_port.port import BYTES, FLOATS, INTS, Port
from tbq.families.qvac import TINY, UnitCells
from tbq.numerics import word_signs

INFINITY = np.float32(np.inf)
POSITIVE = np.float32(2.0**-149)  # what is greater than zero is at least this


@cache
def encoder(width: int, has_signs: bool):
    """Return the kernel (x, plan, signs, ones, edges, levels, packed) for so many values."""
    pitch = width + 1
    threads = threads_for(pitch)

    @cuda.jit
    def encode(x, plan, signs, ones, edges, levels, packed):
        rows = cuda.shared.array((threads, pitch), float32)
        block = cuda.grid(1)
        if block * width < x.size:
            v, at, base = rows[cuda.threadIdx.x], block * width, block * int(plan[SIZE])
            norm = abs(load_and_measure(x, at, width, ORDERED, v))
            if norm < TINY:
                for k in range(int(plan[SIZE])):
                    packed[base + k] = 0
                return
            scale(v, width, div(ONE, norm))
            store_cells(v, width, edges, levels, plan, packed, base, False)
            place = base + int(plan[SCALE])
            store_fp16(norm, packed, place)
            if has_signs:
                d = load_fp16(packed, place)
                for j in range(width):
                    v[j] = add(x[at + j], -mul(v[j], d))
                rest = abs(sqrt(total_of_squares(v, width, ORDERED)))
                hadamard(v, width, signs, ones)
                least = INFINITY if rest < TINY else POSITIVE
                store_bits(v, width, least, packed, place + 2)
                store_fp16(rest, packed, base + int(plan[SIZE]) - 2)

    return encode


@cache
def level_at(bits: int, at: int):
    """Return the device function (packed, base, i, levels): the scaled level of value i."""

    @device
    def level(packed, base, i, levels):
        d = load_fp16(packed, base + at)
        return ZERO if abs(d) < TINY else mul(levels[load_code(packed, base, bits, i)], d)

    return level


def port(codec: UnitCells) -> Port | None:
    """Return the kernels of a format of qvac-fabric; None for wrong kernels."""
    if codec.corrected or codec.total != "ordered":
        return None
    width, cells, ones = codec.block_values, codec.cells, np.ones(codec.block_values, np.float32)
    signs = word_signs(codec.signs) if codec.signs else ones
    types = (FLOATS, INTS, FLOATS, FLOATS, FLOATS, FLOATS, BYTES)
    tables = (plan_of(codec, cells.bits), signs, ones, cells.edges, cells.levels)
    encode = grouped(encoder(width, bool(codec.signs)), width + 1, width, types, tables)
    return Port(encode, level_at(cells.bits, codec.layout.offset("d")), cells.levels)
