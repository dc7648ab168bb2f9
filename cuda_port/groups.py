"""Codecs with cells: a group is scaled to a unit vector, mixed, and its coordinates are coded.

What a thread does is what one lane of `tbq.kernels.rotated` does. What differs between codecs is in
a `Plan`, numbers that the compiler sees, and in `mix`, a device function (v) that turns a group;
see `cuda_port.kernels` for how threads come by their values.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, uint32

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
    sqrt,
    take,
)
from cuda_port.fields import Fields, writer
from cuda_port.kernels import SLICE
from cuda_port.port import Kernel
from cuda_port.unroll import by_eights
from tbq.codec import Codec

TINY = np.float32(1e-10)
# How the values of a group become a unit vector, `least` being a number of the codec's: times 1/n,
# or 0 if n is no more than `least`; over n, which is at least `least`; over |n| + `least`.
MULTIPLIED, DIVIDED, DIVIDED_BY_MORE = range(3)


class Plan(NamedTuple):
    """What kernels know of a codec.

    Attributes:
        width: values of a group.
        blocks: of a group.
        fields: codes, or their low two bits and then their third; then the scale.
        bits: of a code.
        scale: where the scale is.
        pad: where zeros are written, and how many bytes.
        order: of sums, one of `cuda_port.sums.ORDERS`.
        scaling: MULTIPLIED, DIVIDED or DIVIDED_BY_MORE, by what is above `least`.
        least: see there.
        clears: whether a norm that is NaN makes the values zeros.
        last: whether NaN goes to the last cell, not to the first.
        corrected: whether the norm is divided by that of the centroids.
        scaled_first: whether the decoder multiplies by the scale before it mixes.
    """

    width: int
    blocks: int
    fields: Fields
    bits: int
    scale: int
    pad: tuple[int, int]
    order: str
    scaling: int
    least: Any
    clears: bool
    last: bool
    corrected: bool
    scaled_first: bool


def plan_of(
    codec: Codec,
    bits: int,
    *,
    least: Any = TINY,
    total: str = "ordered",
    scaling: int = MULTIPLIED,
    clears: bool = False,
    last: bool = True,
    corrected: bool = True,
    scaled_first: bool = False,
    third: str | None = None,
) -> Plan:
    """Return the plan of a codec; `third` is the field of third bits."""
    layout = codec.layout
    codes, scale = layout.offset(layout.codes[0]), layout.offset(layout.scales[0])
    parts = ((codes, 2), (layout.offset(third), 1)) if third else ((codes, bits),)
    pad = layout.span(layout.padding[0]) if layout.padding else slice(0, 0)
    return Plan(
        codec.group_values,
        codec.group_blocks,
        Fields(codec.block_bytes, codec.block_values, parts, ((scale, 2),)),
        bits,
        scale,
        (pad.start, pad.stop - pad.start),
        *(total, scaling, np.float32(least), clears, last, corrected, scaled_first),
    )


def exceeding(edges: np.ndarray) -> np.ndarray:
    """Return the least float32 above each edge: what is not below that exceeds the edge."""
    return np.nextafter(edges, np.float32(np.inf))


# --- one group, v[:n] ----------------------------------------------------------------------------


@device
def scale(v, n, factor):
    """Multiply v[:n] by a factor."""
    for j in range(n):
        v[j] = mul(v[j], factor)


@device
def inverse_norm(norm, least):
    """Return 1/norm, 0 if it is no more than `least`."""
    return div(ONE, norm) if norm > least else ZERO


@cache
def normaliser(plan: Plan):
    """Return the device function (v, norm): v a unit vector; the norm, raised to its floor."""
    n, scaling, least, clears = plan.width, plan.scaling, plan.least, plan.clears

    @device
    def multiply(v, norm):
        scale(v, n, inverse_norm(norm, least))
        if clears and norm != norm:
            for j in range(n):
                v[j] = ZERO
        return norm

    @device
    def divide(v, norm):
        if scaling == DIVIDED:
            if norm < least:
                norm = least
            divisor = norm
        else:
            norm = abs(norm)  # see `tbq.families.vllm`
            divisor = add(norm, least)
        for j in range(n):
            v[j] = div(v[j], divisor)
        return norm

    return multiply if scaling == MULTIPLIED else divide


def hadamard(first: np.ndarray, second: np.ndarray):
    """Return the `mix` that multiplies by `first`, transforms, and multiplies by `second`."""
    n, before, after = len(first), np.float32(first), np.float32(second)
    transform = sums.transform(n)
    first_does, second_does = bool((before != ONE).any()), bool((after != ONE).any())

    @device
    def mix(v):
        if first_does:
            for j in range(n):
                v[j] = mul(v[j], before[j])
        transform(v)
        if second_does:
            for j in range(n):
                v[j] = mul(v[j], after[j])

    return mix


# --- codes ---------------------------------------------------------------------------------------


@cache
def coder(plan: Plan, leaves: str):
    """Return the device function (row, packed, group, lut) that codes the coordinates in row.

    In row it leaves "levels", or the "rest" above them, or "nothing"; it returns the sum of
    squares of the levels, in order.
    """
    bits, third, n = plan.bits, len(plan.fields.parts) > 1, SLICE
    fields = plan.fields._replace(whole=())
    write, cell, count = writer(fields, n), finder(bits, plan.last), fields.words(n)
    low, high_at = 2 if third else bits, fields.starts(n)[-1]
    per_block, blocks, slices = fields.values // n, plan.blocks, plan.width // n
    levels, rest = leaves == "levels", leaves == "rest"

    @device
    def eight(first, words, row, at, lut, sums):
        for k in range(first, first + 8):
            j = index(at + k)
            u = row[j]
            code = cell(u, lut)
            level = lut[index(code)]
            sums[0] = add(sums[0], mul(level, level))
            if levels:
                row[j] = level
            if rest:
                row[j] = add(u, -level)
            if third:
                put(words, high_at + k, 1, code >> 2)
                code &= 3
            put(words, low * k, low, code)

    code_slice = by_eights(n, eight)

    @device
    def code_all(row, packed, group, lut):
        words = cuda.local.array(count, uint32)
        total = cuda.local.array(1, float32)
        total[0] = ZERO
        for s in range(slices):
            for k in range(count):
                words[k] = 0
            code_slice(words, row, s * n, lut, total)
            write(words, packed, group * blocks + s // per_block, s % per_block)
        return total[0]

    return code_all


@cache
def bit_coder(n: int, size: int, at: int):
    """Return the device function (v, least, packed, group): a bit for each of v[:n].

    It is set where the value is `least` or more; n a multiple of 16; at: where bits are in a block.
    """

    @device
    def code_bits(v, least, packed, group):
        base = (group * size + at) // 2
        for g in range(n // 16):
            word = 0
            for k in range(16):
                if v[index(16 * g + k)] >= least:
                    word |= 1 << k
            packed[index(base + g)] = word

    return code_bits


@device
def put_half(packed, base, at, value):
    """Write 16 bits to byte `at` of the block at byte `base`; both are even."""
    packed[index((base + at) // 2)] = value


# --- kernels -------------------------------------------------------------------------------------


@cache
def encoding_body(plan: Plan, mix):
    """Return what encodes a group of a codec with cells."""
    n, size, blocks, at = plan.width, plan.fields.size, plan.blocks, plan.scale
    pad, pads = plan.pad
    measure, normalise = sums.norm(n, plan.order), normaliser(plan)
    ordered, corrects = plan.order == "ordered", plan.corrected
    code = coder(plan, "levels" if corrects and not ordered else "nothing")
    total = sums.squares(n, plan.order)

    @device
    def body(v, row, packed, group, extra, lut):
        norm = normalise(v, measure(v, row))
        mix(v)
        for j in range(n):
            row[j] = v[j]
        squares = code(row, packed, group, lut)
        if corrects:
            if not ordered:
                for j in range(n):
                    v[j] = row[j]
                squares = total(v)
            norm = corrected(norm, sqrt(squares), TINY)
        half = fp16_bits(norm)
        for b in range(blocks):
            base = (group * blocks + b) * size
            put_half(packed, base, at, half)
            for k in range(pads // 2):
                put_half(packed, base, pad + 2 * k, 0)

    return body


def encoding(plan: Plan, mix, edges: np.ndarray, levels: np.ndarray) -> Kernel:
    """Return the encoder of a codec with cells."""
    return kernels.encoder(plan.width, encoding_body(plan, mix), table_of(levels, edges), 2)


def decoding(plan: Plan, mix, levels: np.ndarray) -> Kernel:
    """Return the decoder of a codec with cells: centroids mixed, times scale."""
    return kernels.decoder(
        plan.width,
        plan.fields,
        SLICE,
        levels_of(plan, plan.scaled_first)(SLICE),
        finisher(plan, mix),
        np.float32(levels).reshape(-1),
    )


@cache
def finisher(plan: Plan, mix):
    """Return what a decoder does to the levels of a group: mix them, scale them if they are not."""
    n, scaled, at = plan.width, plan.scaled_first, plan.fields.starts(SLICE)[-1]

    @device
    def finish(words, v):
        mix(v)
        if not scaled:
            scale(v, n, fp16_value(take(words, at, 16)))

    return finish


@cache
def levels_of(plan: Plan, scaled: bool = True):
    """Return what makes, for slices of n, the device function `levels` of `cuda_port.kernels`."""
    bits, fields, third = plan.bits, plan.fields, len(plan.fields.parts) > 1
    low = 2 if third else bits

    @cache
    def of(n: int):
        starts = fields.starts(n)
        high_at, at_scale = starts[1], starts[-1]

        @device
        def eight(first, words, v, at, lut):
            d = fp16_value(take(words, at_scale, 16))
            for k in range(first, first + 8):
                code = take(words, low * k, low)
                if third:
                    code |= take(words, high_at + k, 1) << 2
                level = lut[index(code)]
                v[at + k] = mul(level, d) if scaled else level

        return by_eights(n, eight)

    return of
