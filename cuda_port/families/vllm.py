"""key3, key4, value3 and value4 of vLLM: a thread per block, keys as in `cuda_port.groups`.

The arithmetic is that of `tbq.families.vllm`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numba import cuda, float32, uint32

from cuda_port import kernels, sums
from cuda_port.device import (
    HALF,
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
    sqrt,
    take,
)
from cuda_port.fields import Fields, writer
from cuda_port.groups import (
    DIVIDED_BY_MORE,
    SLICE,
    Plan,
    encoding,
    hadamard,
    levels_of,
    plan_of,
    put_half,
)
from cuda_port.port import Port
from cuda_port.unroll import by_eights
from tbq.codec import Codec
from tbq.families.vllm import HEAD, K128, LEAST_SCALE, LEAST_SQUARE, TINY, StepValues, UnitKeys

INFINITY = np.float32(np.inf)


def port(codec: Codec) -> Port | None:
    """Return the kernels of a key or value format; None for wrong kernels."""
    if isinstance(codec, UnitKeys):
        return keys_port(codec) if codec == UnitKeys(codec.cells) else None
    return values_port(codec) if codec.rounded else None


# --- keys ----------------------------------------------------------------------------------------


@cache
def lengthened(plan: Plan):
    """Return what makes of centroids v those of length one, times the norm."""
    total, at = sums.squares(HEAD, "eights"), plan.fields.starts(SLICE)[-1]

    @device
    def finish(words, v):
        copy = cuda.local.array(HEAD, float32)
        for j in range(HEAD):
            copy[j] = v[j]
        inverse = div(ONE, sqrt(add(total(copy), LEAST_SQUARE)))
        norm = fp16_value(take(words, at, 16))
        for j in range(HEAD):
            v[j] = mul(mul(v[j], inverse), norm)

    return finish


def keys_port(codec: UnitKeys) -> Port:
    """Return the kernels of key3 or key4."""
    cells, ones = codec.cells, np.ones(HEAD, np.float32)
    plan = plan_of(
        codec,
        cells.bits,
        least=TINY,
        total=codec.total,
        scaling=DIVIDED_BY_MORE,
        last=False,
        corrected=False,
    )
    turn, table = hadamard(ones, ones * K128), np.float32(cells.levels).reshape(-1)
    leveler = kernels.decoder(
        HEAD, plan.fields, SLICE, levels_of(plan, False)(SLICE), lengthened(plan), table
    )
    encode = encoding(plan, turn, cells.edges, cells.levels)
    return Port(encode, None, None, table, rotate=kernels.rotator(HEAD, turn), leveler=leveler)


# --- values --------------------------------------------------------------------------------------


@cache
def steps_body(bits: int, size: int):
    """Return what encodes values: codes, then scale and least value."""
    top, fields = np.float32((1 << bits) - 1), Fields(size, HEAD, ((0, bits),))
    write, count = writer(fields, SLICE), fields.words(SLICE)

    @device
    def eight(first, words, row, at, lo, step):
        for k in range(first, first + 8):
            steps = add(div(add(row[index(at + k)], -lo), step), HALF)
            steps = steps if steps > ZERO else ZERO  # NaN too
            put(words, bits * k, bits, int(steps if steps < top else top))

    code = by_eights(SLICE, eight)

    @device
    def body(v, row, packed, group, extra, lut):
        words = cuda.local.array(count, uint32)
        lo, hi = INFINITY, -INFINITY
        for j in range(HEAD):
            lo = v[j] if v[j] < lo else lo
            hi = v[j] if v[j] > hi else hi
        step = div(add(hi, -lo), top)
        step = step if step > LEAST_SCALE else LEAST_SCALE  # NaN too
        for s in range(HEAD // SLICE):
            for k in range(count):
                words[k] = 0
            code(words, row, s * SLICE, lo, step)
            write(words, packed, group, s)
        put_half(packed, group * size, size - 4, fp16_bits(step))
        put_half(packed, group * size, size - 2, fp16_bits(lo))

    return body


@cache
def step_levels(fields: Fields, bits: int):
    """Return what makes `levels` of values."""

    @cache
    def of(n: int):
        _, at_scale, at_least = fields.starts(n)

        @device
        def eight(first, words, v, at, lut):
            step = fp16_value(take(words, at_scale, 16))
            lo = fp16_value(take(words, at_least, 16))
            for k in range(first, first + 8):
                v[at + k] = add(mul(lut[index(take(words, bits * k, bits))], step), lo)

        return by_eights(n, eight)

    return of


def values_port(codec: StepValues) -> Port:
    """Return the kernels of value3 or value4."""
    bits, size, at = codec.bits, codec.block_bytes, codec.layout.offset("scale")
    encode = kernels.encoder(HEAD, steps_body(bits, size), np.zeros(1, np.float32), 2)
    encode = replace(encode, turns=0)  # divisions branch within its loop
    fields = Fields(size, HEAD, ((0, bits),), ((at, 2), (at + 2, 2)))
    return Port(encode, fields, step_levels(fields, bits), np.arange(1 << bits, dtype=np.float32))
