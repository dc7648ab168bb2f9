"""Numba kernels of `tbq.families.pr21089_first`: dense matrices, four blocks at a time.

As in `tbq.kernels.pr21089` the lanes of a vector are outputs, never parts of one sum, and each
element of a matrix that is loaded serves four blocks.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tbq.codec import RowKernels
from tbq.families.dense import gaussian_matrix, qr_rotation
from tbq.families.pr21089_first import (
    MIN_NORM,
    QK_K,
    SCALE_DOWN,
    SCALE_UP,
    SHARE,
    DenseResidual,
)
from tbq.kernels.bitpack import pack
from tbq.kernels.compile import jit
from tbq.kernels.dense import chooser, multiplier, norms_of_four, tiles
from tbq.kernels.numerics import load_fp16, store_fp16
from tbq.kernels.rotated import code_reader
from tbq.kernels.simd import level_table, search_table

BLOCKS = 4
SIZE = BLOCKS * QK_K
SIGNS = QK_K // 8
ZERO, ONE = np.float32(0.0), np.float32(1.0)
ZERO_CODE, ONE_CODE = np.int32(0), np.int32(1)

_multiply = multiplier(QK_K)
_read_signs = code_reader(1)
SIGN_LEVELS = level_table(np.array([-1, 1], np.float32))


@cache
def _quantizer(bits: int):
    choose = chooser(bits, SIZE, SCALE_UP)

    @jit
    def quantize(x, matrices, edges, levels, packed):
        """Quantise x (n, 256) to packed (n, bytes); matrices are tiles of Q, Q', S."""
        forward, back, projection = matrices
        v, m = np.zeros(SIZE, np.float32), np.empty(SIZE, np.float32)
        turned = np.empty(SIZE, np.float32)
        codes = np.empty(SIZE, np.int32)
        norm, gamma = np.empty(BLOCKS, np.float32), np.empty(BLOCKS, np.float32)
        at = QK_K * bits // 8
        for start in range(0, x.shape[0], BLOCKS):
            count = min(BLOCKS, x.shape[0] - start)
            for b in range(count):
                for j in range(QK_K):
                    v[b * QK_K + j] = x[start + b, j]
            norms_of_four(v.reshape(BLOCKS, QK_K), norm)
            for b in range(BLOCKS):
                norm[b] = MIN_NORM if norm[b] < MIN_NORM else norm[b]
                for j in range(b * QK_K, (b + 1) * QK_K):
                    v[j] /= norm[b]
            _multiply(forward, v, turned)
            choose(turned, edges, codes)
            for i in range(SIZE):
                m[i] = levels[codes[i]]
            for b in range(count):
                pack(codes[b * QK_K : (b + 1) * QK_K], bits, packed[start + b, :at])
            _multiply(back, m, turned)
            for i in range(SIZE):
                v[i] -= turned[i]
            norms_of_four(v.reshape(BLOCKS, QK_K), gamma)
            _multiply(projection, v, turned)
            for i in range(SIZE):
                codes[i] = ONE_CODE if turned[i] >= ZERO else ZERO_CODE
            for b in range(count):
                out = packed[start + b]
                pack(codes[b * QK_K : (b + 1) * QK_K], 1, out[at : at + SIGNS])
                store_fp16(norm[b], out, at + SIGNS)
                store_fp16(gamma[b], out, at + SIGNS + 2)

    return quantize


@cache
def _dequantizer(bits: int):
    read_codes = code_reader(bits)

    @jit
    def dequantize(packed, first, second, levels, restores, y):
        """Set y (n, 256) to d times the sum of centroids and what the residual's signs add.

        What restores multiplies centroids by the transpose of Q, first, and signs by that of S,
        second; what does not leaves the centroids, and multiplies the latter product by Q, which
        is first then.
        """
        m, s = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
        t, u = np.empty(SIZE, np.float32), np.empty(SIZE, np.float32)
        at = QK_K * bits // 8
        for start in range(0, packed.shape[0], BLOCKS):
            count = min(BLOCKS, packed.shape[0] - start)
            for b in range(count):
                block = packed[start + b]
                own = slice(b * QK_K, (b + 1) * QK_K)
                read_codes(block, levels, ONE, m[own])
                _read_signs(block[at:], SIGN_LEVELS, ONE, s[own])
            _multiply(second, s, u)
            for b in range(count):
                share = SHARE * load_fp16(packed[start + b], at + SIGNS + 2)
                for j in range(b * QK_K, (b + 1) * QK_K):
                    u[j] *= share
            if restores:
                _multiply(first, m, t)
            else:
                _multiply(first, u, t)
                for j in range(SIZE):
                    u[j] = m[j]
            for b in range(count):
                d, own = load_fp16(packed[start + b], at + SIGNS), b * QK_K
                for j in range(QK_K):
                    y[start + b, j] = d * (t[own + j] + u[own + j])

    return dequantize


@jit
def _rotate(matrix, x):
    v, turned = np.zeros(SIZE, np.float32), np.empty(SIZE, np.float32)
    for start in range(0, x.shape[0], BLOCKS):
        count = min(BLOCKS, x.shape[0] - start)
        for b in range(count):
            for j in range(QK_K):
                v[b * QK_K + j] = x[start + b, j]
        _multiply(matrix, v, turned)
        for b in range(count):
            for j in range(QK_K):
                x[start + b, j] = turned[b * QK_K + j]


def kernels(codec: DenseResidual) -> RowKernels:
    """Return the kernels of tbqp3_0 or tbqp4_0."""
    right = codec.rotated and codec.projected and codec.positive and codec.used
    if codec.transposed or codec.corrected or codec.size != QK_K or not right:
        raise NotImplementedError("kernels do what the pull request does; others are mutants")
    bits, size = codec.cells.bits, codec.block_bytes
    q, s = qr_rotation(QK_K), gaussian_matrix()
    forward, back, projection, spread = tiles(q), tiles(q.T), tiles(s), tiles(s.T)
    encode, decode = _quantizer(bits), _dequantizer(bits)
    edges = search_table(codec.cells.edges)
    table = level_table(codec.cells.levels * SCALE_DOWN)

    def quantize(x, packed, first):
        matrices = (forward, back, projection)
        encode(x.reshape(-1, QK_K), matrices, edges, table, packed.reshape(-1, size))

    def dequantize(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, QK_K)
        decode(blocks, back, spread, table, True, values)

    def levels(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, QK_K)
        decode(blocks, forward, spread, table, False, values)

    def rotate(x, blocks):
        _rotate(forward, x)

    def unrotate(x, blocks):
        _rotate(back, x)

    return RowKernels(quantize, dequantize, levels, rotate, unrotate)
