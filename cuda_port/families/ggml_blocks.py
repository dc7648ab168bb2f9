"""q4_0, q4_1, q5_0, q5_1, q8_0 and iq4_nl, a thread per block, see `cuda_port.kernels`.

The arithmetic is that of `tbq.families.ggml_blocks`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32, uint32

from cuda_port import kernels
from cuda_port.device import (
    HALF,
    ONE,
    ZERO,
    add,
    device,
    div,
    float_of,
    fp16_bits,
    fp16_value,
    index,
    mul,
    put,
    rint,
    take,
)
from cuda_port.fields import Fields, whole_block, write_unit, writer
from cuda_port.port import Port
from cuda_port.unroll import by_eights
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
MIDPOINTS_COUNT = len(MIDPOINTS)
TABLE = np.array([*LEVELS, *MIDPOINTS], np.float32)  # levels, and what is between them


@device
def signed_largest(v):
    """Return the first value of largest magnitude of v[:32], NaN left out."""
    largest = ZERO
    for j in range(QK):
        if abs(v[j]) > abs(largest):
            largest = v[j]
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


@device
def clear(words, count):
    """Set words to zeros."""
    for k in range(count):
        words[k] = 0


# --- q4_0, q5_0, q4_1, q5_1 ----------------------------------------------------------------------


@device
def nibble_at(low_at, j):
    """Return at which bit the low bits of code j are, if codes start at byte low_at."""
    return 8 * (low_at + j % HALF_QK) + 4 * (j // HALF_QK)


@cache
def _nibbles(codec: Signed | AboveMinimum):
    """Return the encoder, and what reads a level, of codes of 4 or 5 bits."""
    size, above = codec.block_bytes, isinstance(codec, AboveMinimum)
    low_at, top, five = codec.layout.offset("qs"), codec.top, codec.bits == 5
    high_at = codec.layout.offset("qh") if five else 0
    steps = np.float32(codec.top if above else -(1 << (codec.bits - 1)))
    offset = np.float32(0.5 if above else codec.middle + 0.5)
    fields = whole_block(size, QK)
    write, count = writer(fields, QK), fields.words(QK)

    @device
    def code_of(value, least, inverse):
        return cut(add(mul(add(value, -least), inverse), offset), top)

    @device
    def eight(first, v, words, least, inverse):
        for j in range(first, first + 8):
            code = code_of(v[j], least, inverse)
            put(words, nibble_at(low_at, j), 4, code & 15)
            if five:
                put(words, 8 * high_at + j, 1, code >> 4)

    code_all = by_eights(QK, eight)

    @device
    def encode(v, row, packed, group, extra, lut):
        words = cuda.local.array(count, uint32)
        clear(words, count)
        least = ZERO
        if above:
            least, most = FLT_MAX, -FLT_MAX
            for j in range(QK):
                least = v[j] if v[j] < least else least
                most = v[j] if v[j] > most else most
            d = div(add(most, -least), steps)
            put(words, 16, 16, fp16_bits(least))
        else:
            d = div(signed_largest(v), steps)
        inverse = div(ONE, d) if d != ZERO else ZERO
        put(words, 0, 16, fp16_bits(d))
        code_all(v, words, least, inverse)
        write(words, packed, group, 0)

    @device
    def level_eight(first, words, v, at, lut):
        d = fp16_value(take(words, 0, 16))
        for j in range(first, first + 8):
            code = take(words, nibble_at(low_at, j), 4)
            if five:
                code |= take(words, 8 * high_at + j, 1) << 4
            value = mul(lut[index(code)], d)
            v[at + j] = add(value, fp16_value(take(words, 16, 16))) if above else value

    level = by_eights(QK, level_eight)
    first = 0 if above else codec.middle
    return encode, level, np.arange(top + 1, dtype=np.float32) - np.float32(first)


# --- q8_0 ----------------------------------------------------------------------------------------


@device
def lane(v, k):
    """Return what lane k of eight finds in v[:32]."""
    largest = ZERO
    for i in range(4):
        largest = later(largest, abs(v[8 * i + k]))
    return largest


@device
def four(v, k):
    """Return the larger of lanes k and k + 4."""
    return later(lane(v, k + 4), lane(v, k))


@device
def largest_of_lanes(v):
    """Return the largest magnitude of v[:32] as AVX2 finds it."""
    return later(later(four(v, 0), four(v, 2)), later(four(v, 1), four(v, 3)))


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


# The float32 with these bits and a byte's is 2^23 and the byte: no conversion, which is slow.
BYTE_BITS, BYTE_OFFSET = 0x4B000000, np.float32(2.0**23 + 128)
BYTES_BLOCK = Fields(QK + 2, QK, ((2, 8),), ((0, 2),))
WRITE_BYTES, BYTE_WORDS = writer(BYTES_BLOCK, QK), BYTES_BLOCK.words(QK)


@device
def round_eight(first, v, words, inverse):
    """Put eight codes of q8_0."""
    for j in range(first, first + 8):
        put(words, 8 * j, 8, away_from_zero(mul(v[j], inverse)) & 255)


@device
def round_eight_avx2(first, v, words, inverse):
    """Put eight codes as the CPU code of caches does."""
    for j in range(first, first + 8):
        steps = rint(mul(v[j], inverse))
        if not (abs(steps) < FAR and steps > LEAST_BYTE):
            steps = LEAST_BYTE
        put(words, 8 * j, 8, int(min(steps, MOST_BYTE)) & 255)


ROUND, ROUND_AVX2 = by_eights(QK, round_eight), by_eights(QK, round_eight_avx2)


@device
def encode_bytes(v, row, packed, group, extra, lut):
    """Encode a block of q8_0."""
    words = cuda.local.array(BYTE_WORDS, uint32)
    clear(words, BYTE_WORDS)
    largest = ZERO
    for j in range(QK):
        largest = later(largest, abs(v[j]))
    d = div(largest, BYTE_STEPS)
    put(words, 8 * QK, 16, fp16_bits(d))
    ROUND(v, words, div(ONE, d) if d != ZERO else ZERO)
    WRITE_BYTES(words, packed, group, 0)


@device
def encode_bytes_avx2(v, row, packed, group, extra, lut):
    """Encode a block of q8_0 as the CPU code of caches does."""
    words = cuda.local.array(BYTE_WORDS, uint32)
    clear(words, BYTE_WORDS)
    largest = largest_of_lanes(v)
    put(words, 8 * QK, 16, fp16_bits(div(largest, BYTE_STEPS)))
    ROUND_AVX2(v, words, div(BYTE_STEPS, largest) if largest != ZERO else ZERO)
    WRITE_BYTES(words, packed, group, 0)


@cache
def byte_levels(n: int):
    """Return `levels` of q8_0."""

    @device
    def eight(first, words, v, at, lut):
        d = fp16_value(take(words, 8 * n, 16))
        for k in range(first, first + 8):
            whole = add(float_of(BYTE_BITS | take(words, 8 * k, 8) ^ 128), -BYTE_OFFSET)
            v[at + k] = mul(whole, d)

    return by_eights(n, eight)


# --- iq4_nl --------------------------------------------------------------------------------------


SIZE = HALF_QK + 2
BLOCK = whole_block(SIZE, QK)
WRITE, COUNT = writer(BLOCK, QK), BLOCK.words(QK)


@device
def code_of(u, table):
    """Return the number of midpoints that are not above a scaled value."""
    code = 0
    for i in range(MIDPOINTS_COUNT):
        code += 0 if u < table[16 + i] else 1
    return code


@device
def sums(v, of, table):
    """Return both sums of v[:32] under the scale whose inverse is of."""
    u, w = ZERO, ZERO
    for j in range(QK):
        value = v[index(j)]
        k = table[index(code_of(mul(of, value), table))]
        wk = mul(mul(value, value), k)
        u = add(u, mul(wk, value))
        w = add(w, mul(wk, k))
    return u, w


@device
def uneven_eight(first, v, words, of, known, table):
    """Put eight codes of iq4_nl."""
    for j in range(first, first + 8):
        code = code_of(mul(of, v[j]), table) if known else ZERO_LEVEL
        put(words, nibble_at(2, j), 4, code)


CODE_UNEVEN = by_eights(QK, uneven_eight)


@cache
def _uneven(searches_scale: bool):
    """Return what encodes a block of iq4_nl; the sums are taken of its row in shared memory."""

    @device
    def encode(v, row, packed, group, extra, lut):
        words = cuda.local.array(COUNT, uint32)
        clear(words, COUNT)
        d, of = ZERO, ZERO
        largest = signed_largest(v)
        live = abs(largest) >= LEAST_LIVE
        if live:
            of = div(ONE, div(-largest if searches_scale else largest, FIRST_LEVEL))
            u, w = sums(row, of, lut)
            d = div(u, w) if w > ZERO else ZERO
            best = mul(d, u)
            for t in range(-TRIES, TRIES + 1 if searches_scale else -TRIES):
                u, w = sums(row, div(add(float32(t), FIRST_LEVEL), largest), lut)
                if w > ZERO and mul(u, u) > mul(best, w):
                    d = div(u, w)
                    best = mul(d, u)
        if searches_scale:
            of = div(ONE, d) if d != ZERO else ZERO
        put(words, 0, 16, fp16_bits(d))
        CODE_UNEVEN(v, words, of, live or searches_scale, lut)
        WRITE(words, packed, group, 0)

    return encode


@device
def uneven_level_eight(first, words, v, at, lut):
    """Set eight values of a block of iq4_nl."""
    d = fp16_value(take(words, 0, 16))
    for j in range(first, first + 8):
        v[at + j] = mul(lut[index(take(words, nibble_at(2, j), 4))], d)


UNEVEN_LEVELS = by_eights(QK, uneven_level_eight)


def _port(body, fields: Fields, levels_of, levels: np.ndarray, table=None) -> Port:
    table = np.zeros(1, np.float32) if table is None else table
    unit = write_unit(fields)
    return Port(kernels.encoder(QK, body, table, unit), fields, levels_of, levels)


def port(codec: Codec) -> Port | None:
    """Return the kernels of a codec; None for wrong ones."""
    if codec in (Signed(4), Signed(5), AboveMinimum(4), AboveMinimum(5)):
        body, level, levels = _nibbles(codec)
        return _port(body, whole_block(codec.block_bytes, QK), lambda n: level, levels)
    if codec in (SignedBytes(), SignedBytes(avx2=True)):
        body = encode_bytes_avx2 if codec.avx2 else encode_bytes
        return _port(body, BYTES_BLOCK, byte_levels, np.zeros(1, np.float32))
    if codec in (Uneven(), Uneven(searches_scale=True)):
        body = _uneven(codec.searches_scale)
        return _port(body, BLOCK, lambda n: UNEVEN_LEVELS, TABLE, TABLE)
    return None
