"""Numba kernels of `tbq.families.pr21089`.

The rotation is where the time goes. Each output is a sum over 128 inputs in index order, so the
lanes of a vector are outputs, never parts of one sum. Two blocks, four 128-value halves, share each
loaded matrix element, and eight inputs are consumed per pass over the accumulators.
"""

from __future__ import annotations

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
from tbq.kernels.bitpack import pack, unpack
from tbq.kernels.compile import jit
from tbq.kernels.numerics import load_fp16, store_fp16

PAIR = 2 * QK_K  # values of two blocks
H1, H2, H3 = QR_SIZE, 2 * QR_SIZE, 3 * QR_SIZE  # where the second, third and fourth half start
ZERO = np.float32(0.0)
ZERO_CODE, ONE_CODE = np.int32(0), np.int32(1)


@jit
def rotate_pair(columns, x, y):
    """Set each half of y (512,) to the sum over j, ascending, of columns[j] * x_j of that half."""
    for i in range(PAIR):
        y[i] = ZERO
    for j in range(0, QR_SIZE, 4):
        a0, a1, a2, a3 = x[j], x[j + 1], x[j + 2], x[j + 3]
        b0, b1, b2, b3 = x[H1 + j], x[H1 + j + 1], x[H1 + j + 2], x[H1 + j + 3]
        c0, c1, c2, c3 = x[H2 + j], x[H2 + j + 1], x[H2 + j + 2], x[H2 + j + 3]
        d0, d1, d2, d3 = x[H3 + j], x[H3 + j + 1], x[H3 + j + 2], x[H3 + j + 3]
        for i in range(QR_SIZE):
            q0, q1, q2, q3 = columns[j, i], columns[j + 1, i], columns[j + 2, i], columns[j + 3, i]
            y[i] = (((y[i] + q0 * a0) + q1 * a1) + q2 * a2) + q3 * a3
            y[H1 + i] = (((y[H1 + i] + q0 * b0) + q1 * b1) + q2 * b2) + q3 * b3
            y[H2 + i] = (((y[H2 + i] + q0 * c0) + q1 * c1) + q2 * c2) + q3 * c3
            y[H3 + i] = (((y[H3 + i] + q0 * d0) + q1 * d1) + q2 * d2) + q3 * d3


@jit
def _norms(x, norm):
    """Set norm (4,) to the L2 norms of four rows of x (4, 256): four chains hide the latency."""
    s0 = s1 = s2 = s3 = ZERO
    for j in range(QK_K):
        s0 += x[0, j] * x[0, j]
        s1 += x[1, j] * x[1, j]
        s2 += x[2, j] * x[2, j]
        s3 += x[3, j] * x[3, j]
    norm[0], norm[1], norm[2], norm[3] = np.sqrt(s0), np.sqrt(s1), np.sqrt(s2), np.sqrt(s3)


@jit
def _norm(x):
    total = ZERO
    for j in range(QK_K):
        total += x[j] * x[j]
    return np.sqrt(total)


@jit
def _quantize(x, columns, boundaries, bits, packed):
    """Quantise x float32 (n, 256) to uint8 (n, block_bytes); boundaries is a tuple of float32."""
    n = x.shape[0]
    norm = np.empty(4, np.float32)
    unit = np.zeros(PAIR, np.float32)
    rotated = np.empty(PAIR, np.float32)
    codes = np.empty(QK_K, np.int32)  # as wide as the floats, or the comparisons do not vectorise
    for b in range(n):
        k = b % 4
        if k == 0:
            if b + 4 <= n:
                _norms(x[b : b + 4], norm)
            else:
                for i in range(n - b):
                    norm[i] = _norm(x[b + i])
        clamped = MIN_NORM if norm[k] < MIN_NORM else norm[k]
        start = (b % 2) * QK_K
        for j in range(QK_K):
            unit[start + j] = x[b, j] / clamped
        store_fp16(clamped, packed[b], packed.shape[1] - 2)
        if b % 2 or b == n - 1:
            rotate_pair(columns, unit, rotated)
            for block in range(b - b % 2, b + 1):
                start = (block % 2) * QK_K
                for i in range(QK_K):
                    v = rotated[start + i] * SCALE_UP
                    code = np.int32(0)
                    for boundary in boundaries:
                        code += ZERO_CODE if v < boundary else ONE_CODE
                    codes[i] = code
                pack(codes, bits, packed[block])


@jit
def _dequantize(packed, rows, levels, bits, y):
    """Dequantise uint8 (n, block_bytes) to y float32 (n, 256); levels is codebook * SCALE_DOWN."""
    n = packed.shape[0]
    r = np.zeros(PAIR, np.float32)
    u = np.empty(PAIR, np.float32)
    codes = np.empty(QK_K, np.uint8)
    for b in range(n):
        start = (b % 2) * QK_K
        unpack(packed[b], bits, codes)
        for i in range(QK_K):
            r[start + i] = levels[codes[i]]
        if b % 2 or b == n - 1:
            rotate_pair(rows, r, u)
            for block in range(b - b % 2, b + 1):
                start = (block % 2) * QK_K
                d = load_fp16(packed[block], packed.shape[1] - 2)
                for j in range(QK_K):
                    y[block, j] = u[start + j] * d


@jit
def _levels(packed, levels, bits, y):
    """Set y float32 (n, 256) to the scaled levels of uint8 (n, block_bytes), still rotated."""
    codes = np.empty(QK_K, np.uint8)
    for b in range(packed.shape[0]):
        unpack(packed[b], bits, codes)
        d = load_fp16(packed[b], packed.shape[1] - 2)
        for i in range(QK_K):
            y[b, i] = levels[codes[i]] * d


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
    columns = np.ascontiguousarray(qr_rotation().T)
    boundaries = tuple(BOUNDARIES[bits])
    levels = CODEBOOKS[bits] * SCALE_DOWN

    def quantize(x, packed, first):
        blocks = packed.reshape(-1, size)
        _quantize(x.reshape(-1, QK_K), columns, boundaries, bits, blocks)

    def dequantize(packed, y):
        _dequantize(packed.reshape(-1, size), qr_rotation(), levels, bits, y.reshape(-1, QK_K))

    def scaled_levels(packed, y):
        _levels(packed.reshape(-1, size), levels, bits, y.reshape(-1, QK_K))

    def rotate(x, blocks):
        _rotate(columns, x)

    def unrotate(x, blocks):
        _rotate(qr_rotation(), x)

    return RowKernels(quantize, dequantize, scaled_levels, rotate, unrotate)
