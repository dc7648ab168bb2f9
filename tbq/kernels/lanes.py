"""Sixteen 32-value blocks side by side, value j of lane k at [16 j + k] of a flat array.

Every operation is a vector then. Lanes never mix, and within a lane each sum and butterfly happens
in the order of the C code. Inner loops are long, or have long straight-line bodies: short ones are
unrolled before the compiler looks for vectors.
"""

from __future__ import annotations

import numpy as np

from tbq.kernels.compile import jit
from tbq.kernels.mirrored import SIGN

QK = 32
LANES = 16
SIZE = QK * LANES
WORDS = 4 * LANES  # of eight codes each
ZERO, ONE = np.float32(0.0), np.float32(1.0)
I32 = np.int32


@jit
def load(x, start, count, v):
    """Set lanes v to blocks [start, start + count) of x (n, 32), the rest to zero."""
    if count < LANES:
        v[:] = ZERO
    for lane in range(count):
        for j in range(QK):
            v[j * LANES + lane] = x[start + lane, j]


@jit
def store(v, start, count, y):
    """Write the first lanes of v to blocks [start, start + count) of y (n, 32)."""
    for lane in range(count):
        for j in range(QK):
            y[start + lane, j] = v[j * LANES + lane]


@jit
def norms(v, norm):
    """Set norm (LANES,) to the L2 norm of each lane, summed in index order."""
    for lane in range(LANES):
        norm[lane] = ZERO
    for g in range(4):
        own = v[8 * g * LANES : (8 * g + 8) * LANES]
        for lane in range(LANES):
            total = norm[lane]
            for i in range(8):
                total += own[i * LANES + lane] * own[i * LANES + lane]
            norm[lane] = total
    for lane in range(LANES):
        norm[lane] = np.sqrt(norm[lane])


@jit
def multiply(v, factor):
    """Multiply each lane of v by its factor (LANES,)."""
    for g in range(4):
        own = v[8 * g * LANES : (8 * g + 8) * LANES]
        for lane in range(LANES):
            f = factor[lane]
            for i in range(8):
                own[i * LANES + lane] *= f


@jit
def give_signs(v, words):
    """Negate value j of each lane whose word, of words (LANES,) int32, has bit j not set."""
    bits = v.view(np.int32)
    for g in range(4):
        own = bits[8 * g * LANES : (8 * g + 8) * LANES]
        for lane in range(LANES):
            word = I32(~words[lane])
            for i in range(8):
                sign = I32(I32(word << I32(31 - 8 * g - i)) & SIGN)
                own[i * LANES + lane] = I32(own[i * LANES + lane] ^ sign)


@jit
def _hadamard4(a, b, c, d):
    a, b, c, d = a + b, a - b, c + d, c - d
    return a + c, b + d, a - c, b - d


@jit
def fwht(v, scale):
    """Transform each lane of v: butterflies of length 1 to 16, then times scale."""
    n = LANES
    for start in range(0, SIZE, 8 * n):  # lengths 1, 2 and 4
        for k in range(start, start + n):
            p0, p1, p2, p3 = _hadamard4(v[k], v[k + n], v[k + 2 * n], v[k + 3 * n])
            m = k + 4 * n
            q0, q1, q2, q3 = _hadamard4(v[m], v[m + n], v[m + 2 * n], v[m + 3 * n])
            v[k], v[k + n], v[k + 2 * n], v[k + 3 * n] = p0 + q0, p1 + q1, p2 + q2, p3 + q3
            v[m], v[m + n], v[m + 2 * n], v[m + 3 * n] = p0 - q0, p1 - q1, p2 - q2, p3 - q3
    n = 8 * LANES
    for k in range(n):  # lengths 8 and 16
        a, b, c, d = _hadamard4(v[k], v[k + n], v[k + 2 * n], v[k + 3 * n])
        v[k], v[k + n], v[k + 2 * n], v[k + 3 * n] = a * scale, b * scale, c * scale, d * scale


@jit
def count_above(v, limits, codes):
    """Set codes, int32 like v, to how many limits are not above each value."""
    for k in range(SIZE):
        r, code = v[k], I32(0)
        for limit in limits:
            code += I32(1) if r >= limit else I32(0)
        codes[k] = code


@jit
def load_word(data, at):
    """Return the four bytes data[at : at + 4], low byte first."""
    return np.int32(
        np.int64(data[at])
        | np.int64(data[at + 1]) << 8
        | np.int64(data[at + 2]) << 16
        | np.int64(data[at + 3]) << 24
    )


@jit
def store_word(word, out, at):
    """Write a word to out[at : at + 4], low byte first."""
    for k in range(4):
        out[at + k] = np.uint8((word >> (8 * k)) & 0xFF)


def _packing(bits: int):
    """Return the loops over words of eight codes of so many bits, as constants: they unroll."""

    @jit
    def pack(codes, words):
        for g in range(4):
            for lane in range(LANES):
                word, k = I32(0), 8 * g * LANES + lane
                for i in range(8):
                    word |= codes[k + i * LANES] << (bits * i)
                words[g * LANES + lane] = word

    @jit
    def load_codes(block, words, lane):
        for g in range(4):
            word = I32(0)
            for k in range(bits):
                word |= I32(block[2 + bits * g + k]) << I32(8 * k)
            words[g * LANES + lane] = word

    @jit
    def store_codes(words, lane, block):
        for g in range(4):
            word = words[g * LANES + lane]
            for k in range(bits):
                block[2 + bits * g + k] = np.uint8((word >> (8 * k)) & 0xFF)

    return pack, load_codes, store_codes


_pack1, _load1, _store1 = _packing(1)
_pack2, _load2, _store2 = _packing(2)
_pack3, _load3, _store3 = _packing(3)
_pack4, _load4, _store4 = _packing(4)


@jit
def pack(codes, bits, words):
    """Pack codes (SIZE,) int32 of 1 to 4 bits into words (WORDS,) of eight codes each."""
    if bits == 1:
        _pack1(codes, words)
    elif bits == 2:
        _pack2(codes, words)
    elif bits == 3:
        _pack3(codes, words)
    else:
        _pack4(codes, words)


@jit
def load_codes(block, bits, words, lane):
    """Set a lane of words (WORDS,) to the codes of a block, which start at byte 2."""
    if bits == 1:
        _load1(block, words, lane)
    elif bits == 2:
        _load2(block, words, lane)
    elif bits == 3:
        _load3(block, words, lane)
    else:
        _load4(block, words, lane)


@jit
def store_codes(words, lane, bits, block):
    """Write a lane of words (WORDS,) to the codes of a block, which start at byte 2."""
    if bits == 1:
        _store1(words, lane, block)
    elif bits == 2:
        _store2(words, lane, block)
    elif bits == 3:
        _store3(words, lane, block)
    else:
        _store4(words, lane, block)
