"""Numba kernels of `tbq.families.ggml_blocks`.

Largest and least values are found among bits, as integers: those of floats of one sign are in
order, and their maximum can be taken in any order, which makes vectors of the loops: their
lengths are those of the arrays, as loops of constant length would be unrolled into a chain. Blocks
with a NaN take the way of the specification.
"""

from __future__ import annotations

import numpy as np

from tbq.codec import Codec, RowKernels
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
from tbq.kernels.compile import jit
from tbq.kernels.lanes import ONE, ZERO
from tbq.kernels.numerics import HALF, load_fp16, store_fp16

MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITE = np.int32(0x7F800000)
MOST, LEAST = np.int32(2**31 - 1), np.int32(-(2**31))
NONE, ONE_MORE = np.int32(0), np.int32(1)
MIDDLE4, MIDDLE5 = np.float32(8), np.float32(16)
OFFSET4, OFFSET5 = np.float32(8.5), np.float32(16.5)
TOP4, TOP5 = np.float32(15), np.float32(31)
FAR = np.float32(2.0**31)
LEAST_BYTE, MOST_BYTE = np.float32(-128), np.float32(127)
LEVELS32 = np.array(LEVELS, np.float32)
MIDPOINTS32 = np.array(MIDPOINTS, np.float32)
RISES = np.diff(LEVELS32)
FIRST_LEVEL = np.float32(LEVELS[0])
MIDPOINTS_COUNT = len(MIDPOINTS)
ZERO_CODES = np.uint8(ZERO_LEVEL * 17)


# --- largest values ------------------------------------------------------------------------------


@jit
def largest_bits(bits):
    """Return the largest magnitude of a row of float32 bits, int32 (n,), as bits."""
    top = NONE
    for j in range(bits.size):
        size = np.int32(bits[j] & MAGNITUDE)
        top = max(top, size)
    return top


@jit
def as_float(bits):
    """Return the float32 of bits."""
    return np.int32(bits).view(np.float32)


@jit
def later(p, q):
    """Return the larger of two, q if one is NaN."""
    return p if p > q else q


@jit
def largest_of_row(row, lanes):
    """Return the largest magnitude of a row; lanes (8,) is scratch."""
    lanes[:] = ZERO
    for start in range(0, row.size, 8):
        own = row[start : start + 8]
        for k in range(8):
            lanes[k] = later(lanes[k], abs(own[k]))
    for k in range(4):
        lanes[k] = later(lanes[k + 4], lanes[k])
    return later(later(lanes[0], lanes[2]), later(lanes[1], lanes[3]))


@jit
def largest_in_order(row, bits):
    """Return the largest magnitude of a row: what was found while it is larger, NaN or not."""
    top = largest_bits(bits)
    if top <= INFINITE:
        return as_float(top)
    largest = ZERO
    for j in range(row.size):
        largest = later(largest, abs(row[j]))
    return largest


@jit
def _ordered(bits):
    """Return bits of which the order as integers is that of the floats; its own inverse."""
    return np.int32(bits ^ ((bits >> 31) & MAGNITUDE))


@jit
def _ends(bits):
    """Return the least and the largest value of a row of float32 bits; NaN is beyond infinity."""
    low, high = MOST, LEAST
    for j in range(bits.size):
        key = _ordered(bits[j])
        low, high = min(low, key), max(high, key)
    return as_float(_ordered(low)), as_float(_ordered(high))


@jit
def _signed_largest(row, bits):
    """Return the first value of largest magnitude of a row, NaN left out; 0 if there is none."""
    least, most = _ends(bits)
    largest = most if most > -least else least
    if least == least and most == most and most != -least:
        return largest
    largest = ZERO
    for j in range(QK):
        largest = row[j] if abs(row[j]) > abs(largest) else largest
    return largest


@jit
def _range(row, bits):
    """Return the first of the least values of a row, and a largest one; NaN left out."""
    least, most = _ends(bits)
    if not (least == least and most == most and least != ZERO):  # of zeros the first counts
        least, most = FLT_MAX, -FLT_MAX
        for j in range(QK):
            least = row[j] if row[j] < least else least
            most = row[j] if row[j] > most else most
    return min(least, FLT_MAX), max(most, -FLT_MAX)


# --- q4_0, q5_0, q4_1, q5_1 ----------------------------------------------------------------------


@jit
def _cut(steps, top):
    """Return steps without their fraction, at most top; 0 for what is no finite number."""
    steps = steps if abs(steps) < FAR else ZERO
    steps = steps if steps > ZERO else ZERO
    return np.int32(steps if steps < top else top)


@jit
def _encode4(row, low, inverse, offset, out):
    for j in range(out.size):
        first = _cut((row[j] - low) * inverse + offset, TOP4)
        second = _cut((row[j + HALF_QK] - low) * inverse + offset, TOP4)
        out[j] = np.uint8(first | second << 4)


@jit
def _encode5(row, low, inverse, offset, out):
    """Write the fifth bits of a row to out[:4], and the others behind them."""
    codes = out[4:]
    high = np.uint32(0)
    for j in range(codes.size):
        first = _cut((row[j] - low) * inverse + offset, TOP5)
        second = _cut((row[j + HALF_QK] - low) * inverse + offset, TOP5)
        codes[j] = np.uint8(first & 15 | (second & 15) << 4)
        both = np.uint32(first >> 4 | (second >> 4) << HALF_QK)
        high |= np.uint32(both << np.uint32(j))
    for k in range(4):
        out[k] = np.uint8((high >> np.uint32(8 * k)) & np.uint32(255))


@jit
def _quantize_signed4(x, bits, packed):
    """Quantise x (n, 32) to packed (n, 18); bits are those of x, int32."""
    for b in range(x.shape[0]):
        d = _signed_largest(x[b], bits[b]) / -MIDDLE4
        store_fp16(d, packed[b], 0)
        # what is subtracted is +0: it changes nothing, not even a sign that matters
        _encode4(x[b], ZERO, ONE / d if d != ZERO else ZERO, OFFSET4, packed[b, 2:])


@jit
def _quantize_signed5(x, bits, packed):
    """Quantise x (n, 32) to packed (n, 22); bits are those of x, int32."""
    for b in range(x.shape[0]):
        d = _signed_largest(x[b], bits[b]) / -MIDDLE5
        store_fp16(d, packed[b], 0)
        _encode5(x[b], ZERO, ONE / d if d != ZERO else ZERO, OFFSET5, packed[b, 2:])


@jit
def _quantize_above4(x, bits, packed):
    """Quantise x (n, 32) to packed (n, 20); bits are those of x, int32."""
    for b in range(x.shape[0]):
        low, high = _range(x[b], bits[b])
        d = (high - low) / TOP4
        store_fp16(d, packed[b], 0)
        store_fp16(low, packed[b], 2)
        _encode4(x[b], low, ONE / d if d != ZERO else ZERO, HALF, packed[b, 4:])


@jit
def _quantize_above5(x, bits, packed):
    """Quantise x (n, 32) to packed (n, 24); bits are those of x, int32."""
    for b in range(x.shape[0]):
        low, high = _range(x[b], bits[b])
        d = (high - low) / TOP5
        store_fp16(d, packed[b], 0)
        store_fp16(low, packed[b], 2)
        _encode5(x[b], low, ONE / d if d != ZERO else ZERO, HALF, packed[b, 4:])


@jit
def _fifth_bits(block, at):
    word = np.uint32(0)
    for k in range(4):
        word |= np.uint32(block[at + k]) << np.uint32(8 * k)
    return word


@jit
def _dequantize_signed4(packed, y):
    """Set y (n, 32) to d times the steps from the middle of packed (n, 18)."""
    for b in range(packed.shape[0]):
        d, codes, out = load_fp16(packed[b], 0), packed[b, 2:], y[b]
        for j in range(codes.size):
            pair = np.int32(codes[j])
            out[j] = np.float32(np.int32((pair & 15) - 8)) * d
            out[j + HALF_QK] = np.float32(np.int32((pair >> 4) - 8)) * d


@jit
def _dequantize_signed5(packed, y):
    """Set y (n, 32) to d times the steps from the middle of packed (n, 22)."""
    for b in range(packed.shape[0]):
        d, codes, out = load_fp16(packed[b], 0), packed[b, 6:], y[b]
        high = _fifth_bits(packed[b], 2)
        for j in range(codes.size):
            pair, bits = np.int32(codes[j]), np.int32(high >> np.uint32(j))
            out[j] = np.float32(np.int32((pair & 15 | (bits & 1) << 4) - 16)) * d
            far = np.int32(pair >> 4 | (bits >> 12) & 16)
            out[j + HALF_QK] = np.float32(np.int32(far - 16)) * d


@jit
def _dequantize_above4(packed, y):
    """Set y (n, 32) to d times the codes, plus m, of packed (n, 20)."""
    for b in range(packed.shape[0]):
        d, low, codes, out = load_fp16(packed[b], 0), load_fp16(packed[b], 2), packed[b, 4:], y[b]
        for j in range(codes.size):
            pair = np.int32(codes[j])
            out[j] = np.float32(np.int32(pair & 15)) * d + low
            out[j + HALF_QK] = np.float32(np.int32(pair >> 4)) * d + low


@jit
def _dequantize_above5(packed, y):
    """Set y (n, 32) to d times the codes, plus m, of packed (n, 24)."""
    for b in range(packed.shape[0]):
        d, low, codes, out = load_fp16(packed[b], 0), load_fp16(packed[b], 2), packed[b, 8:], y[b]
        high = _fifth_bits(packed[b], 4)
        for j in range(codes.size):
            pair, bits = np.int32(codes[j]), np.int32(high >> np.uint32(j))
            out[j] = np.float32(np.int32(pair & 15 | (bits & 1) << 4)) * d + low
            far = np.int32(pair >> 4 | (bits >> 12) & 16)
            out[j + HALF_QK] = np.float32(far) * d + low


# --- q8_0 ----------------------------------------------------------------------------------------


@jit
def away_from_zero(x):
    """Return float32 rounded to int32, halves away from zero; 0 for NaN and beyond 32 bits."""
    x = x if abs(x) < FAR else ZERO
    whole = np.int32(x)
    rest = x - np.float32(whole)
    return np.int32(whole + np.int32(rest >= HALF) - np.int32(rest <= -HALF))


@jit
def _quantize_bytes(x, bits, packed):
    """Quantise x (n, 32) to packed (n, 34); bits are those of x, int32."""
    for b in range(x.shape[0]):
        row, codes = x[b], packed[b, 2:]
        d = largest_in_order(row, bits[b]) / BYTE_STEPS
        inverse = ONE / d if d != ZERO else ZERO
        store_fp16(d, packed[b], 0)
        for j in range(QK):
            codes[j] = np.uint8(away_from_zero(row[j] * inverse) & 255)


@jit
def _quantize_bytes_avx2(x, bits, packed):
    """Quantise x (n, 32) to packed (n, 34) as the CPU code of caches does."""
    lanes = np.empty(8, np.float32)
    for b in range(x.shape[0]):
        row, codes = x[b], packed[b, 2:]
        top = largest_bits(bits[b])
        largest = as_float(top) if top <= INFINITE else largest_of_row(row, lanes)
        inverse = BYTE_STEPS / largest if largest != ZERO else ZERO
        store_fp16(largest / BYTE_STEPS, packed[b], 0)
        for j in range(QK):
            steps = np.rint(row[j] * inverse)
            steps = steps if abs(steps) < FAR else LEAST_BYTE
            steps = steps if steps > LEAST_BYTE else LEAST_BYTE
            codes[j] = np.uint8(np.int32(steps if steps < MOST_BYTE else MOST_BYTE) & 255)


@jit
def _dequantize_bytes(packed, y):
    """Set y (n, 32) to d times the codes of packed (n, 34)."""
    for b in range(packed.shape[0]):
        d, codes, out = load_fp16(packed[b], 0), packed[b, 2:], y[b]
        for j in range(codes.size):
            out[j] = np.float32(np.int8(codes[j])) * d


# --- iq4_nl --------------------------------------------------------------------------------------


@jit
def _level(u):
    """Return the level of a scaled value: that behind the midpoints that are not above."""
    level = FIRST_LEVEL
    for i in range(MIDPOINTS_COUNT):
        level += ZERO if u < MIDPOINTS32[i] else RISES[i]
    return level


@jit
def _code(u):
    """Return the number of midpoints that are not above a scaled value."""
    code = NONE
    for i in range(MIDPOINTS_COUNT):
        code += NONE if u < MIDPOINTS32[i] else ONE_MORE
    return np.int32(code)


@jit
def _sums(row, of, left, right):
    """Return both sums of a row under the scale whose inverse is of; left and right are scratch."""
    for j in range(row.size):
        value = row[j]
        k = _level(of * value)
        wk = (value * value) * k
        left[j] = wk * value
        right[j] = wk * k
    u, v = ZERO, ZERO
    for j in range(QK):
        u += left[j]
        v += right[j]
    return u, v


@jit
def _searched(row, largest, d, u, left, right):
    """Return a better scale than d, whose first sum is u, if there is one."""
    best = d * u
    for t in range(-TRIES, TRIES + 1):
        u, v = _sums(row, (np.float32(t) + FIRST_LEVEL) / largest, left, right)
        if v > ZERO and u * u > best * v:
            d = u / v
            best = d * u
    return d


@jit
def _encode_uneven(row, of, codes, out):
    for j in range(row.size):
        codes[j] = _code(of * row[j])
    for j in range(HALF_QK):
        out[j] = np.uint8(codes[j] | codes[j + HALF_QK] << 4)


@jit
def _quantize_uneven(x, bits, packed):
    """Quantise x (n, 32) to packed (n, 18)."""
    left, right = np.empty(QK, np.float32), np.empty(QK, np.float32)
    codes = np.empty(QK, np.int32)
    for b in range(x.shape[0]):
        row, largest = x[b], _signed_largest(x[b], bits[b])
        if abs(largest) < LEAST_LIVE:
            packed[b, :2], packed[b, 2:] = 0, ZERO_CODES
            continue
        of = ONE / (largest / FIRST_LEVEL)
        u, v = _sums(row, of, left, right)
        store_fp16(u / v if v > ZERO else ZERO, packed[b], 0)
        _encode_uneven(row, of, codes, packed[b, 2:])


@jit
def _quantize_searched(x, bits, packed):
    """Quantise x (n, 32) to packed (n, 18), the scale searched."""
    left, right = np.empty(QK, np.float32), np.empty(QK, np.float32)
    codes = np.empty(QK, np.int32)
    for b in range(x.shape[0]):
        row, largest, d = x[b], _signed_largest(x[b], bits[b]), ZERO
        if abs(largest) >= LEAST_LIVE:
            u, v = _sums(row, ONE / (-largest / FIRST_LEVEL), left, right)
            d = u / v if v > ZERO else ZERO
            d = _searched(row, largest, d, u, left, right)
        store_fp16(d, packed[b], 0)
        _encode_uneven(row, ONE / d if d != ZERO else ZERO, codes, packed[b, 2:])


@jit
def _dequantize_uneven(packed, y):
    """Set y (n, 32) to d times the levels of packed (n, 18)."""
    level = np.empty(16, np.float32)
    for b in range(packed.shape[0]):
        d, codes, out = load_fp16(packed[b], 0), packed[b, 2:], y[b]
        for k in range(16):
            level[k] = LEVELS32[k] * d
        for j in range(codes.size):
            pair = codes[j]
            out[j] = level[pair & 15]
            out[j + HALF_QK] = level[pair >> 4]


ENCODERS = {
    Signed(4): _quantize_signed4,
    Signed(5): _quantize_signed5,
    AboveMinimum(4): _quantize_above4,
    AboveMinimum(5): _quantize_above5,
    SignedBytes(): _quantize_bytes,
    SignedBytes(avx2=True): _quantize_bytes_avx2,
    Uneven(): _quantize_uneven,
    Uneven(searches_scale=True): _quantize_searched,
}
DECODERS = {
    Signed(4): _dequantize_signed4,
    Signed(5): _dequantize_signed5,
    AboveMinimum(4): _dequantize_above4,
    AboveMinimum(5): _dequantize_above5,
    SignedBytes(): _dequantize_bytes,
    Uneven(): _dequantize_uneven,
}


def kernels(codec: Signed | AboveMinimum | SignedBytes | Uneven) -> RowKernels:
    """Return the kernels of a codec; NotImplementedError for wrong ones."""
    if codec not in ENCODERS:
        raise NotImplementedError("kernels do what ggml does; others are mutants")
    return block_kernels(codec, ENCODERS[codec], DECODERS[codec.content])


def block_kernels(codec: Codec, encode, decode) -> RowKernels:
    """Return kernels of rows: encode(x, bits of x, packed) and decode(packed, y) take blocks."""
    values, size = codec.block_values, codec.block_bytes

    def quantize(x, packed, first):
        blocks = x.reshape(-1, values)
        encode(blocks, blocks.view(np.int32), packed.reshape(-1, size))

    def dequantize(packed, y):
        decode(packed.reshape(-1, size), y.reshape(-1, values))

    return RowKernels(quantize, dequantize, dequantize)
