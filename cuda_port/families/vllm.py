"""key3, key4, value3 and value4 of vLLM: a thread per block, keys as in `cuda_port.groups`.

The arithmetic is that of `tbq.families.vllm`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32

from cuda_port.device import (
    HALF,
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
    DIVIDED_BY_MORE,
    EIGHTS,
    HADAMARD,
    SCALE,
    SIZE,
    encoding,
    grouped,
    load_levels,
    plan_of,
    scale,
    store_word,
    threads_for,
    total_of_squares,
)
from cuda_port.port import BYTES, FLOATS, INTS, VALUE_THREADS, Kernel, Port
from tbq.codec import Codec
from tbq.families.vllm import HEAD, K128, LEAST_SCALE, LEAST_SQUARE, TINY, StepValues, UnitKeys

PITCH = HEAD + 1
THREADS = threads_for(PITCH)
INFINITY = np.float32(np.inf)


def port(codec: Codec) -> Port | None:
    """Return the kernels of a key or value format; None for wrong kernels."""
    if isinstance(codec, UnitKeys):
        return keys_port(codec) if codec == UnitKeys(codec.cells) else None
    return values_port(codec) if codec.rounded else None


# --- keys ----------------------------------------------------------------------------------------


@cuda.jit
def decode_keys(packed, plan, levels, y):
    """Set y to centroids of length one times the norm."""
    rows = cuda.shared.array((THREADS, PITCH), float32)
    block = cuda.grid(1)
    if block * HEAD < y.size:
        v, base = rows[cuda.threadIdx.x], block * int(plan[SIZE])
        load_levels(packed, base, levels, plan, HEAD, v)
        length = sqrt(add(total_of_squares(v, HEAD, EIGHTS), LEAST_SQUARE))
        load_levels(packed, base, levels, plan, HEAD, v)
        scale(v, HEAD, div(ONE, length))
        norm = load_fp16(packed, base + int(plan[SCALE]))
        for j in range(HEAD):
            y[block * HEAD + j] = mul(v[j], norm)


def keys_port(codec: UnitKeys) -> Port:
    """Return the kernels of key3 or key4."""
    cells, ones = codec.cells, np.ones(HEAD, np.float32)
    plan = plan_of(
        codec,
        cells.bits,
        total=codec.total,
        scaling=DIVIDED_BY_MORE,
        last=False,
        corrected=False,
    )
    turn = ones, ones * K128
    encode = encoding(codec, plan, HADAMARD, TINY, turn, cells.edges, cells.levels)
    types = (BYTES, INTS, FLOATS, FLOATS)
    decode = grouped(decode_keys, PITCH, HEAD, types, (plan, cells.levels))
    return Port(encode, None, cells.levels, leveler=decode)


# --- values --------------------------------------------------------------------------------------


@cache
def steps_encoder(bits: int, size: int):
    """Return the kernel (x, packed) of values: codes, then scale and least value."""
    top = np.float32((1 << bits) - 1)

    @cuda.jit
    def encode(x, packed):
        block = cuda.grid(1)
        if block * HEAD < x.size:
            at, base = block * HEAD, block * size
            lo, hi = INFINITY, -INFINITY
            for j in range(HEAD):
                lo = x[at + j] if x[at + j] < lo else lo
                hi = x[at + j] if x[at + j] > hi else hi
            step = div(add(hi, -lo), top)
            step = step if step > LEAST_SCALE else LEAST_SCALE  # NaN too
            for g in range(HEAD // 8):
                word = 0
                for k in range(8):
                    steps = add(div(add(x[at + 8 * g + k], -lo), step), HALF)
                    steps = steps if steps > ZERO else ZERO  # NaN too
                    word |= int(steps if steps < top else top) << (bits * k)
                store_word(word, bits, packed, base + bits * g)
            store_fp16(step, packed, base + size - 4)
            store_fp16(lo, packed, base + size - 2)

    return encode


@cache
def step_at(bits: int, at: int):
    """Return the device function (packed, base, i, levels): value i; levels are whole numbers."""

    @device
    def step(packed, base, i, levels):
        steps = levels[load_code(packed, base, bits, i)]
        return add(mul(steps, load_fp16(packed, base + at)), load_fp16(packed, base + at + 2))

    return step


def values_port(codec: StepValues) -> Port:
    """Return the kernels of value3 or value4."""
    function = steps_encoder(codec.bits, codec.block_bytes)
    encode = Kernel(function, VALUE_THREADS, VALUE_THREADS * HEAD, (FLOATS, BYTES))
    levels = np.arange(1 << codec.bits, dtype=np.float32)
    return Port(encode, step_at(codec.bits, codec.layout.offset("scale")), levels)
