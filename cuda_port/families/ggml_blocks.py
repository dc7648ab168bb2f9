"""q4_0, q4_1, q5_0, q5_1, q8_0 and iq4_nl, a thread per block.

The arithmetic is that of `tbq.families.ggml_blocks`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32

from cuda_port.device import HALF, ONE, ZERO, add, device, div, load_fp16, mul, rint, store_fp16
from cuda_port.port import BYTES, FLOATS, VALUE_THREADS, Kernel, Port
from tbq.codec import Codec
from tbq.families.ggml_blocks import (
    BYTE_STEPS,
    FLT_MAX,
    HALF_QK,
    LEAST_LIVE,
    LEVELS,
    MIDPOINTS,
    QK,
    TRIES,
    ZERO_LEVEL,
    AboveMinimum,
    Signed,
    SignedBytes,
    Uneven,
)

FAR = np.float32(2.0**31)
LEAST_BYTE, MOST_BYTE = np.float32(-128), np.float32(127)
FIRST_LEVEL = np.float32(LEVELS[0])
ZERO_CODES = ZERO_LEVEL * 17
MIDPOINTS_COUNT = len(MIDPOINTS)
TABLE = np.array([*LEVELS, *MIDPOINTS], np.float32)  # levels, and what is between them


@device
def signed_largest(x, at):
    """Return the first value of largest magnitude of x[at : at + 32], NaN left out."""
    largest = ZERO
    for j in range(QK):
        if abs(x[at + j]) > abs(largest):
            largest = x[at + j]
    return largest


@device
def later(p, q):
    """Return the larger of two, q if one is NaN."""
    return p if p > q else q


@device
def cut(steps, top):
    """Return steps without their fraction, at most top; 0 for what is no finite number."""
    if not (abs(steps) < FAR and steps > ZERO):
        return 0
    return min(int(steps), top)


# --- q4_0, q5_0, q4_1, q5_1 ----------------------------------------------------------------------


@cache
def _nibbles(codec: Signed | AboveMinimum):
    """Return the encoder, and what reads a level, of codes of 4 or 5 bits."""
    size, above = codec.block_bytes, isinstance(codec, AboveMinimum)
    low_at, top, five = codec.layout.offset("qs"), codec.top, codec.bits == 5
    high_at = codec.layout.offset("qh") if five else 0
    steps = np.float32(codec.top if above else -(1 << (codec.bits - 1)))
    offset = np.float32(0.5 if above else codec.middle + 0.5)

    @device
    def code_of(value, least, inverse):
        return cut(add(mul(add(value, -least), inverse), offset), top)

    @cuda.jit
    def encode(x, packed):
        block = cuda.grid(1)
        if block * QK < x.size:
            at, base = block * QK, block * size
            least = ZERO
            if above:
                least, most = FLT_MAX, -FLT_MAX
                for j in range(QK):
                    least = x[at + j] if x[at + j] < least else least
                    most = x[at + j] if x[at + j] > most else most
                d = div(add(most, -least), steps)
                store_fp16(least, packed, base + 2)
            else:
                d = div(signed_largest(x, at), steps)
            inverse = div(ONE, d) if d != ZERO else ZERO
            store_fp16(d, packed, base)
            for i in range(HALF_QK // 8 if five else 0):
                near, far = 0, 0
                for k in range(8):
                    j = at + 8 * i + k
                    near |= (code_of(x[j], least, inverse) >> 4) << k
                    far |= (code_of(x[j + HALF_QK], least, inverse) >> 4) << k
                packed[base + high_at + i] = near
                packed[base + high_at + 2 + i] = far
            for j in range(HALF_QK):
                first = code_of(x[at + j], least, inverse)
                second = code_of(x[at + HALF_QK + j], least, inverse)
                packed[base + low_at + j] = first & 15 | (second & 15) << 4

    @device
    def level(packed, base, i, levels):
        code = (packed[base + low_at + i % HALF_QK] >> (4 * (i // HALF_QK))) & 15
        if five:
            code |= ((packed[base + high_at + i // 8] >> (i % 8)) & 1) << 4
        value = mul(levels[code], load_fp16(packed, base))
        return add(value, load_fp16(packed, base + 2)) if above else value

    first = 0 if above else codec.middle
    return encode, level, np.arange(top + 1, dtype=np.float32) - np.float32(first)


# --- q8_0 ----------------------------------------------------------------------------------------


@device
def lane(x, at, k):
    """Return what lane k of eight finds in x[at : at + 32]."""
    largest = ZERO
    for i in range(4):
        largest = later(largest, abs(x[at + 8 * i + k]))
    return largest


@device
def four(x, at, k):
    """Return the larger of lanes k and k + 4."""
    return later(lane(x, at, k + 4), lane(x, at, k))


@device
def largest_of_lanes(x, at):
    """Return the largest magnitude of x[at : at + 32] as AVX2 finds it."""
    return later(
        later(four(x, at, 0), four(x, at, 2)),
        later(four(x, at, 1), four(x, at, 3)),
    )


@device
def away_from_zero(x):
    """Return a float32 rounded, halves away from zero; 0 for NaN and beyond 32 bits."""
    if not abs(x) < FAR:
        return 0
    whole = int(x)
    rest = add(x, -float32(whole))
    if rest >= HALF:
        return whole + 1
    return whole - 1 if rest <= -HALF else whole


@cuda.jit
def encode_bytes(x, packed):
    """Quantise flat float32 to q8_0."""
    block = cuda.grid(1)
    if block * QK < x.size:
        at, base, largest = block * QK, block * (QK + 2), ZERO
        for j in range(QK):
            largest = later(largest, abs(x[at + j]))
        d = div(largest, BYTE_STEPS)
        inverse = div(ONE, d) if d != ZERO else ZERO
        store_fp16(d, packed, base)
        for j in range(QK):
            packed[base + 2 + j] = away_from_zero(mul(x[at + j], inverse)) & 255


@cuda.jit
def encode_bytes_avx2(x, packed):
    """Quantise flat float32 to q8_0 as the CPU code of caches does."""
    block = cuda.grid(1)
    if block * QK < x.size:
        at, base = block * QK, block * (QK + 2)
        largest = largest_of_lanes(x, at)
        inverse = div(BYTE_STEPS, largest) if largest != ZERO else ZERO
        store_fp16(div(largest, BYTE_STEPS), packed, base)
        for j in range(QK):
            steps = rint(mul(x[at + j], inverse))
            if not (abs(steps) < FAR and steps > LEAST_BYTE):
                steps = LEAST_BYTE
            packed[base + 2 + j] = int(min(steps, MOST_BYTE)) & 255


@device
def byte_level(packed, base, i, levels):
    """Return value i of a block of q8_0."""
    return mul(levels[packed[base + 2 + i]], load_fp16(packed, base))


# --- iq4_nl --------------------------------------------------------------------------------------


@device
def code_of(u, table):
    """Return the number of midpoints that are not above a scaled value."""
    code = 0
    for i in range(MIDPOINTS_COUNT):
        code += 0 if u < table[16 + i] else 1
    return code


@device
def sums(x, at, of, table):
    """Return both sums of x[at : at + 32] under the scale whose inverse is of."""
    u, v = ZERO, ZERO
    for j in range(QK):
        value = x[at + j]
        k = table[code_of(mul(of, value), table)]
        wk = mul(mul(value, value), k)
        u = add(u, mul(wk, value))
        v = add(v, mul(wk, k))
    return u, v


@cache
def _uneven(searches_scale: bool):
    """Return the encoder of iq4_nl."""

    @cuda.jit
    def encode(x, table, packed):
        block = cuda.grid(1)
        if block * QK < x.size:
            at, base, d, of = block * QK, block * (HALF_QK + 2), ZERO, ZERO
            largest = signed_largest(x, at)
            live = abs(largest) >= LEAST_LIVE
            if live:
                of = div(ONE, div(-largest if searches_scale else largest, FIRST_LEVEL))
                u, v = sums(x, at, of, table)
                d = div(u, v) if v > ZERO else ZERO
                best = mul(d, u)
                for t in range(-TRIES, TRIES + 1 if searches_scale else -TRIES):
                    u, v = sums(x, at, div(add(float32(t), FIRST_LEVEL), largest), table)
                    if v > ZERO and mul(u, u) > mul(best, v):
                        d = div(u, v)
                        best = mul(d, u)
            if searches_scale:
                of = div(ONE, d) if d != ZERO else ZERO
            store_fp16(d, packed, base)
            for j in range(HALF_QK):
                first = code_of(mul(of, x[at + j]), table)
                second = code_of(mul(of, x[at + HALF_QK + j]), table)
                known = live or searches_scale
                packed[base + 2 + j] = first | second << 4 if known else ZERO_CODES

    return encode


@device
def uneven_level(packed, base, i, levels):
    """Return value i of a block of iq4_nl."""
    code = (packed[base + 2 + i % HALF_QK] >> (4 * (i // HALF_QK))) & 15
    return mul(levels[code], load_fp16(packed, base))


def _port(encode, level, levels: np.ndarray, tables: tuple[np.ndarray, ...] = ()) -> Port:
    types = (FLOATS, *(FLOATS for _ in tables), BYTES)
    return Port(Kernel(encode, VALUE_THREADS, VALUE_THREADS * QK, types, tables), level, levels)


def port(codec: Codec) -> Port | None:
    """Return the kernels of a codec; None for wrong ones."""
    if codec in (Signed(4), Signed(5), AboveMinimum(4), AboveMinimum(5)):
        return _port(*_nibbles(codec))
    if codec in (SignedBytes(), SignedBytes(avx2=True)):
        encode = encode_bytes_avx2 if codec.avx2 else encode_bytes
        return _port(encode, byte_level, np.arange(256).astype(np.int8).astype(np.float32))
    if codec in (Uneven(), Uneven(searches_scale=True)):
        return _port(_uneven(codec.searches_scale), uneven_level, TABLE, (TABLE,))
    return None
