"""Numba kernels of `tbq.families.pr21089`.

The rotation is where the time goes. Each output is a sum over 128 inputs in index order, so the
lanes of a vector are outputs, never parts of one sum, see `tbq.kernels.dense`. Two blocks, four
128-value halves, share each loaded matrix element.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tbq.codec import RowKernels
from tbq.families.dense import QR_SIZE, qr_rotation
from tbq.families.pr21089 import (
    BOUNDARIES,
    CODEBOOKS,
    MIN_NORM,
    QK_K,
    SCALE_DOWN,
    SCALE_UP,
    DenseRotated,
)
from tbq.kernels.bitpack import pack
from tbq.kernels.compile import jit
from tbq.kernels.dense import chooser, multiplier, norms_of_four, tiles
from tbq.kernels.numerics import load_fp16, store_fp16
from tbq.kernels.rotated import code_reader
from tbq.kernels.simd import level_table, search_table

PAIR = 2 * QK_K  # values of two blocks
ZERO, ONE = np.float32(0.0), np.float32(1.0)

# Each half of two blocks is a vector.
rotate_pair = multiplier(QR_SIZE)


@jit
def _norm(x):
    total = ZERO
    for j in range(QK_K):
        total += x[j] * x[j]
    return np.sqrt(total)


@cache
def _quantizer(bits: int):
    choose = chooser(bits, QK_K, SCALE_UP)

    @jit
    def quantize(x, forward, edges, packed):
        """Quantise x float32 (n, 256) to uint8 (n, block_bytes); edges is a `search_table`."""
        n = x.shape[0]
        norm = np.empty(4, np.float32)
        unit = np.zeros(PAIR, np.float32)
        rotated = np.empty(PAIR, np.float32)
        codes = np.empty(QK_K, np.int32)
        for b in range(n):
            k = b % 4
            if k == 0:
                if b + 4 <= n:
                    norms_of_four(x[b : b + 4], norm)
                else:
                    for i in range(n - b):
                        norm[i] = _norm(x[b + i])
            clamped = MIN_NORM if norm[k] < MIN_NORM else norm[k]
            start = (b % 2) * QK_K
            for j in range(QK_K):
                unit[start + j] = x[b, j] / clamped
            store_fp16(clamped, packed[b], packed.shape[1] - 2)
            if b % 2 or b == n - 1:
                rotate_pair(forward, unit, rotated)
                for block in range(b - b % 2, b + 1):
                    start = (block % 2) * QK_K
                    choose(rotated[start : start + QK_K], edges, codes)
                    pack(codes, bits, packed[block])

    return quantize


@cache
def _dequantizer(bits: int):
    read_codes = code_reader(bits)

    @jit
    def dequantize(packed, back, levels, y):
        """Dequantise uint8 (n, block_bytes) to y float32 (n, 256); levels a `level_table`."""
        n = packed.shape[0]
        r = np.zeros(PAIR, np.float32)
        u = np.empty(PAIR, np.float32)
        for b in range(n):
            start = (b % 2) * QK_K
            read_codes(packed[b], levels, ONE, r[start : start + QK_K])
            if b % 2 or b == n - 1:
                rotate_pair(back, r, u)
                for block in range(b - b % 2, b + 1):
                    start = (block % 2) * QK_K
                    d = load_fp16(packed[block], packed.shape[1] - 2)
                    for j in range(QK_K):
                        y[block, j] = u[start + j] * d

    return dequantize


@cache
def _leveller(bits: int):
    read_codes = code_reader(bits)

    @jit
    def read_levels(packed, levels, y):
        """Set y float32 (n, 256) to the scaled levels of uint8 (n, block_bytes), still rotated."""
        for b in range(packed.shape[0]):
            d = load_fp16(packed[b], packed.shape[1] - 2)
            read_codes(packed[b], levels, d, y[b])

    return read_levels


@jit
def _rotate(matrix, x):
    """Set each row of x (n, 256) to the product of its halves with the matrix, in place."""
    halves = np.zeros(PAIR, np.float32)
    turned = np.empty(PAIR, np.float32)
    for b in range(x.shape[0]):
        start = (b % 2) * QK_K
        for i in range(QK_K):
            halves[start + i] = x[b, i]
        if b % 2 or b == x.shape[0] - 1:
            rotate_pair(matrix, halves, turned)
            for block in range(b - b % 2, b + 1):
                start = (block % 2) * QK_K
                for i in range(QK_K):
                    x[block, i] = turned[start + i]


def kernels(codec: DenseRotated) -> RowKernels:
    """Return the kernels of tbq3_0 or tbq4_0."""
    bits, size = codec.bits, codec.block_bytes
    forward, back = tiles(qr_rotation()), tiles(qr_rotation().T)
    encode, decode, read_levels = _quantizer(bits), _dequantizer(bits), _leveller(bits)
    edges = search_table(BOUNDARIES[bits])
    levels = level_table(CODEBOOKS[bits] * SCALE_DOWN)

    def quantize(x, packed, first):
        blocks = packed.reshape(-1, size)
        encode(x.reshape(-1, QK_K), forward, edges, blocks)

    def dequantize(packed, y):
        decode(packed.reshape(-1, size), back, levels, y.reshape(-1, QK_K))

    def scaled_levels(packed, y):
        read_levels(packed.reshape(-1, size), levels, y.reshape(-1, QK_K))

    def rotate(x, blocks):
        _rotate(forward, x)

    def unrotate(x, blocks):
        _rotate(back, x)

    return RowKernels(quantize, dequantize, scaled_levels, rotate, unrotate)
