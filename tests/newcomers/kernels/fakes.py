"""Kernels of the newcomers: one value after the other, by no shared code."""

from __future__ import annotations

import numpy as np

from newcomers.families.fakes import (
    EDGES,
    K128,
    ROOT64,
    ROOT128,
    SIGNS,
    TABLE,
    TWO_BITS,
    TWO_EDGES,
    ByHead,
    OddNames,
    Quad,
    TwoScales,
)
from tbq.codec import RowKernels
from tbq.kernels.compile import jit
from tbq.kernels.numerics import load_fp16, store_fp16

ZERO, ONE = np.float32(0.0), np.float32(1.0)


@jit
def _norm(x):
    total = ZERO
    for value in x:
        total += value * value
    return np.sqrt(total)


@jit
def _largest(x):
    largest = ZERO
    for value in x:
        if abs(value) > largest:
            largest = abs(value)
    return largest


@jit
def _inverse(n):
    return ONE / n if n > ZERO else ZERO


@jit
def _at_least(v, edges):
    code = 0
    for edge in edges:
        if v >= edge:
            code += 1
    return code


@jit
def _transform(v):
    length = 1
    while length < v.size:
        for start in range(0, v.size, 2 * length):
            for i in range(start, start + length):
                a, b = v[i], v[i + length]
                v[i], v[i + length] = a + b, a - b
        length *= 2


@jit
def _quad_rotate(x, back):
    for row in x:
        if not back:
            for i in range(128):
                row[i] *= SIGNS[i]
        _transform(row)
        for i in range(128):
            row[i] = row[i] * K128 * SIGNS[i] if back else row[i] * K128


@jit
def _quad_encode(x, packed):
    v = np.empty((1, 128), np.float32)
    for g in range(x.shape[0]):
        n = _norm(x[g])
        scale = _inverse(n)
        for i in range(128):
            v[0, i] = x[g, i] * scale
        _quad_rotate(v, False)
        for b in range(4):
            block = packed[4 * g + b]
            block[:] = 0
            store_fp16(n * K128, block, 8)
            for i in range(32):
                code = _at_least(v[0, 32 * b + i] * ROOT128, EDGES)
                block[i // 4] |= np.uint8((code & 3) << (2 * (i % 4)))
                block[10 + i // 8] |= np.uint8((code >> 2) << (i % 8))


@jit
def _quad_decode(packed, y):
    for b in range(packed.shape[0]):
        block = packed[b]
        d = load_fp16(block, 8)
        for i in range(32):
            code = (block[i // 4] >> (2 * (i % 4))) & 3
            code |= ((block[10 + i // 8] >> (i % 8)) & 1) << 2
            y[b, i] = TABLE[code] * d


def _quad(codec: Quad) -> RowKernels:
    def quantize(x, packed, first):
        _quad_encode(x.reshape(-1, 128), packed.reshape(-1, 14))

    def dequantize(packed, y):
        _quad_decode(packed.reshape(-1, 14), y.reshape(-1, 32))

    def rotate(x, blocks):
        _quad_rotate(x, False)

    def unrotate(x, blocks):
        _quad_rotate(x, True)

    return RowKernels(quantize, dequantize, dequantize, rotate, unrotate)


@jit
def _two_encode(x, packed):
    for g in range(x.shape[0]):
        block = packed[g]
        block[:] = 0
        n = _norm(x[g])
        scale = _inverse(n)
        total = ZERO
        for i in range(64):
            u = x[g, i] * scale * ROOT64
            code = _at_least(u, TWO_EDGES)
            rest = u - TWO_BITS[code]
            total += abs(rest)
            block[4 + i // 4] |= np.uint8(code << (2 * (i % 4)))
            if rest >= ZERO:
                block[20 + i // 8] |= np.uint8(1 << (i % 8))
        store_fp16(n / ROOT64, block, 0)
        store_fp16(total / np.float32(64) * (n / ROOT64), block, 2)


@jit
def _two_decode(packed, y):
    for g in range(packed.shape[0]):
        block = packed[g]
        a, b = load_fp16(block, 0), load_fp16(block, 2)
        for i in range(64):
            level = TWO_BITS[(block[4 + i // 4] >> (2 * (i % 4))) & 3] * a
            sign = (block[20 + i // 8] >> (i % 8)) & 1
            y[g, i] = level + (b if sign else -b)


def _two(codec: TwoScales) -> RowKernels:
    def quantize(x, packed, first):
        _two_encode(x.reshape(-1, 64), packed.reshape(-1, 28))

    def dequantize(packed, y):
        _two_decode(packed.reshape(-1, 28), y.reshape(-1, 64))

    return RowKernels(quantize, dequantize, dequantize)


@jit
def _hash(index):
    h = np.uint32(2166136261)
    for shift in (0, 8, 16, 24):
        h = np.uint32((h ^ np.uint32((index >> shift) & 0xFF)) * np.uint32(16777619))
    return h


@jit
def _odd_encode(x, row_blocks, edges, packed):
    for g in range(x.shape[0]):
        block = packed[g]
        block[:] = 0
        n = _largest(x[g])
        scale = _inverse(n)
        word = _hash(g % row_blocks)
        for i in range(32):
            v = x[g, i] if (word >> i) & 1 else -x[g, i]
            block[i // 2] |= np.uint8(_at_least(v * scale, edges) << (4 * (i % 2)))
        store_fp16(n, block, 18)
        for k in range(4):
            block[20 + k] = np.uint8((word >> (8 * k)) & 0xFF)


@jit
def _odd_decode(packed, table, signed, y):
    for g in range(packed.shape[0]):
        block = packed[g]
        d = load_fp16(block, 18)
        for i in range(32):
            value = table[(block[i // 2] >> (4 * (i % 2))) & 15] * d
            plus = (block[20 + i // 8] >> (i % 8)) & 1
            y[g, i] = value if plus or not signed else -value


@jit
def _odd_signs(x, blocks):
    for g in range(x.shape[0]):
        for i in range(32):
            if not (blocks[g, 20 + i // 8] >> (i % 8)) & 1:
                x[g, i] = -x[g, i]


def _odd(codec: OddNames) -> RowKernels:
    edges = codec.boundaries["codes"].astype(np.float32)

    def quantize(x, packed, first):
        _odd_encode(x.reshape(-1, 32), x.shape[-1] // 32, edges, packed.reshape(-1, 24))

    def dequantize(packed, y):
        _odd_decode(packed.reshape(-1, 24), codec.table, True, y.reshape(-1, 32))

    def levels(packed, y):
        _odd_decode(packed.reshape(-1, 24), codec.table, False, y.reshape(-1, 32))

    return RowKernels(quantize, dequantize, levels, _odd_signs, _odd_signs)


@jit
def _head_encode(x, unit, edges, packed):
    for g in range(x.shape[0]):
        block = packed[g]
        block[:] = 0
        n = _largest(x[g]) / unit
        scale = _inverse(n)
        for i in range(64):
            code = _at_least(x[g, i] * scale, edges)
            block[2 + i // 2] |= np.uint8(code << (4 * (i % 2)))
        store_fp16(n, block, 0)


@jit
def _head_decode(packed, table, y):
    for g in range(packed.shape[0]):
        d = load_fp16(packed[g], 0)
        for i in range(64):
            y[g, i] = table[(packed[g, 2 + i // 2] >> (4 * (i % 2))) & 15] * d


def _head(codec: ByHead) -> RowKernels:
    edges, unit = codec.boundaries["codes"].astype(np.float32), np.float32(codec.unit)

    def quantize(x, packed, first):
        _head_encode(x.reshape(-1, 64), unit, edges, packed.reshape(-1, 34))

    def dequantize(packed, y):
        _head_decode(packed.reshape(-1, 34), codec.table, y.reshape(-1, 64))

    return RowKernels(quantize, dequantize, dequantize)


KERNELS = {Quad: _quad, TwoScales: _two, OddNames: _odd, ByHead: _head}


def kernels(codec) -> RowKernels:
    """Return the kernels of a newcomer."""
    return KERNELS[type(codec)](codec)
