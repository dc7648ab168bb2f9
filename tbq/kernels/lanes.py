"""Sixteen 32-value blocks side by side: arrays [value, lane], so that every operation is a vector.

Lanes never mix. Within a lane each sum and butterfly happens in the order of the C code. Loops over
lanes are innermost and their bodies straight-line, which is what the compiler turns into vectors.
"""

from __future__ import annotations

import numpy as np

from tbq.kernels.compile import jit

QK = 32
LANES = 16
ZERO, ONE = np.float32(0.0), np.float32(1.0)


@jit
def load(x, start, count, lanes):
    """Set lanes (32, LANES) to blocks [start, start + count) of x (n, 32), the rest to zero."""
    for lane in range(LANES):
        if lane < count:
            for j in range(QK):
                lanes[j, lane] = x[start + lane, j]
        else:
            for j in range(QK):
                lanes[j, lane] = ZERO


@jit
def norms(lanes, norm):
    """Set norm (LANES,) to the L2 norm of each lane, summed in index order."""
    for lane in range(LANES):
        total = ZERO
        for j in range(QK):
            total += lanes[j, lane] * lanes[j, lane]
        norm[lane] = np.sqrt(total)


@jit
def _hadamard4(a, b, c, d):
    a, b, c, d = a + b, a - b, c + d, c - d
    return a + c, b + d, a - c, b - d


@jit
def fwht(v, scale):
    """Transform each lane of v (32, LANES): butterflies of length 1 to 16, then times scale."""
    for i in range(0, QK, 8):  # lengths 1, 2 and 4
        for k in range(LANES):
            p0, p1, p2, p3 = _hadamard4(v[i, k], v[i + 1, k], v[i + 2, k], v[i + 3, k])
            q0, q1, q2, q3 = _hadamard4(v[i + 4, k], v[i + 5, k], v[i + 6, k], v[i + 7, k])
            v[i, k], v[i + 1, k], v[i + 2, k], v[i + 3, k] = p0 + q0, p1 + q1, p2 + q2, p3 + q3
            v[i + 4, k], v[i + 5, k], v[i + 6, k], v[i + 7, k] = p0 - q0, p1 - q1, p2 - q2, p3 - q3
    for i in range(8):  # lengths 8 and 16
        for k in range(LANES):
            a, b, c, d = _hadamard4(v[i, k], v[i + 8, k], v[i + 16, k], v[i + 24, k])
            v[i, k], v[i + 8, k] = a * scale, b * scale
            v[i + 16, k], v[i + 24, k] = c * scale, d * scale


@jit
def _pack(codes, bits, words):
    for group in range(4):
        for lane in range(LANES):
            word = np.int32(0)
            for k in range(8):
                word = (word << bits) | codes[8 * group + 7 - k, lane]
            words[group, lane] = word


@jit
def _expand(words, bits, levels, v):
    mask = np.int32((1 << bits) - 1)
    for group in range(4):
        for lane in range(LANES):
            word = words[group, lane]
            for k in range(8):
                v[8 * group + k, lane] = levels[word & mask]
                word = word >> bits


@jit
def pack(codes, bits, words):
    """Pack codes (32, LANES) of 1 to 4 bits into words (4, LANES) of eight codes each."""
    if bits == 1:  # literal widths, so that the loops unroll
        _pack(codes, 1, words)
    elif bits == 2:
        _pack(codes, 2, words)
    elif bits == 3:
        _pack(codes, 3, words)
    else:
        _pack(codes, 4, words)


@jit
def expand(words, bits, levels, v):
    """Set v (32, LANES) to the levels of the codes in words (4, LANES), the inverse of `pack`."""
    if bits == 1:
        _expand(words, 1, levels, v)
    elif bits == 2:
        _expand(words, 2, levels, v)
    elif bits == 3:
        _expand(words, 3, levels, v)
    else:
        _expand(words, 4, levels, v)


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


@jit
def _load_codes(block, bits, words, lane):
    for group in range(4):
        word = np.int64(0)
        for k in range(bits):
            word |= np.int64(block[2 + bits * group + k]) << (8 * k)
        words[group, lane] = np.int32(word)


@jit
def _store_codes(words, lane, bits, block):
    for group in range(4):
        for k in range(bits):
            block[2 + bits * group + k] = np.uint8((words[group, lane] >> (8 * k)) & 0xFF)


@jit
def load_codes(block, bits, words, lane):
    """Set words[:, lane] to the codes of a block, which start at byte 2."""
    if bits == 1:
        _load_codes(block, 1, words, lane)
    elif bits == 2:
        _load_codes(block, 2, words, lane)
    elif bits == 3:
        _load_codes(block, 3, words, lane)
    else:
        _load_codes(block, 4, words, lane)


@jit
def store_codes(words, lane, bits, block):
    """Write words[:, lane] to the codes of a block, which start at byte 2."""
    if bits == 1:
        _store_codes(words, lane, 1, block)
    elif bits == 2:
        _store_codes(words, lane, 2, block)
    elif bits == 3:
        _store_codes(words, lane, 3, block)
    else:
        _store_codes(words, lane, 4, block)
