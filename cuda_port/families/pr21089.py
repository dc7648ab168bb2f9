"""tbq3_0 and tbq4_0: 256 values in two halves of 128, rotated by a dense matrix, a thread per row.

The arithmetic is that of `tbq.families.pr21089`. Thread i owns output i of both halves and adds its
128 products in the order of the C code; neighbouring threads read neighbouring matrix elements.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32, int32

from cuda_port.device import (
    ZERO,
    add,
    device,
    div,
    load_code,
    load_fp16,
    mul,
    ordered_norm,
    packed_byte,
    store_fp16,
)
from cuda_port.port import BYTES, FLOATS, FLOATS2, Kernel, Port
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

THREADS = QR_SIZE


def matrices() -> tuple[np.ndarray, np.ndarray]:
    """Return Q and its transpose, float32 (128, 128): row j holds what input j adds to each output.

    The first rotates back, the second rotates.
    """
    return np.ascontiguousarray(qr_rotation()), np.ascontiguousarray(qr_rotation().T)


@device
def rotate(matrix, v, half, i):
    """Return output i of a half: the sum over j, in order, of matrix[j, i] * v[0, 128 half + j]."""
    total = ZERO
    for j in range(QR_SIZE):
        total = add(total, mul(matrix[j, i], v[0, QR_SIZE * half + j]))
    return total


@device
def load_halves(x, block, v, i):
    """Let thread i put its value of each half of a block into v[0]; a barrier has to follow."""
    for half in range(2):
        v[0, QR_SIZE * half + i] = x[block * QK_K + QR_SIZE * half + i]


@cache
def encoder(size: int, bits: int):
    """Return the kernel (x, transposed, boundaries, packed): flat float32 to flat uint8."""

    @cuda.jit
    def encode(x, transposed, boundaries, packed):
        v = cuda.shared.array((1, QK_K), float32)
        codes = cuda.shared.array((1, QK_K), int32)
        i, block = cuda.threadIdx.x, cuda.blockIdx.x
        load_halves(x, block, v, i)
        cuda.syncthreads()
        norm = ordered_norm(v, 0, QK_K)
        if norm < MIN_NORM:
            norm = MIN_NORM
        cuda.syncthreads()
        for half in range(2):
            v[0, QR_SIZE * half + i] = div(v[0, QR_SIZE * half + i], norm)
        cuda.syncthreads()
        for half in range(2):
            r = mul(rotate(transposed, v, half, i), SCALE_UP)
            code = 0
            for k in range(boundaries.size):
                if not r < boundaries[k]:  # NaN goes right
                    code += 1
            codes[0, QR_SIZE * half + i] = code
        cuda.syncthreads()
        if i < size - 2:
            packed[block * size + i] = packed_byte(codes, 0, bits, i)
        if i == 0:
            store_fp16(norm, packed, block * size + size - 2)

    return encode


@cache
def decoder(size: int, bits: int):
    """Return the kernel (packed, matrix, levels, y): flat uint8 to flat float32."""

    @cuda.jit
    def decode(packed, matrix, levels, y):
        v = cuda.shared.array((1, QK_K), float32)
        i, block = cuda.threadIdx.x, cuda.blockIdx.x
        base = block * size
        for half in range(2):
            j = QR_SIZE * half + i
            v[0, j] = levels[load_code(packed, base, bits, j)]
        cuda.syncthreads()
        d = load_fp16(packed, base + size - 2)
        for half in range(2):
            y[block * QK_K + QR_SIZE * half + i] = mul(rotate(matrix, v, half, i), d)

    return decode


@cache
def rotator():
    """Return the kernel (x, matrix, y) that rotates each half of flat float32 blocks of 256."""

    @cuda.jit
    def rotate_blocks(x, matrix, y):
        v = cuda.shared.array((1, QK_K), float32)
        i, block = cuda.threadIdx.x, cuda.blockIdx.x
        load_halves(x, block, v, i)
        cuda.syncthreads()
        for half in range(2):
            y[block * QK_K + QR_SIZE * half + i] = rotate(matrix, v, half, i)

    return rotate_blocks


def level_at(size: int, bits: int):
    """Return the device function (packed, base, i, levels): the scaled level of value i."""

    @device
    def level(packed, base, i, levels):
        code = load_code(packed, base, bits, i)
        return mul(levels[code], load_fp16(packed, base + size - 2))

    return level


def port(codec: DenseRotated) -> Port | None:
    """Return the kernels of tbq3_0 or tbq4_0; None for wrong kernels."""
    if codec != DenseRotated(codec.bits):
        return None
    size, bits = codec.block_bytes, codec.bits
    matrix, transposed = matrices()
    levels = CODEBOOKS[bits] * SCALE_DOWN
    limits = np.asarray(BOUNDARIES[bits], np.float32)
    return Port(
        Kernel(
            encoder(size, bits),
            THREADS,
            QK_K,
            (FLOATS, FLOATS2, FLOATS, BYTES),
            (transposed, limits),
        ),
        level_at(size, bits),
        levels,
        Kernel(
            decoder(size, bits), THREADS, QK_K, (BYTES, FLOATS2, FLOATS, FLOATS), (matrix, levels)
        ),
        Kernel(rotator(), THREADS, QK_K, (FLOATS, FLOATS2, FLOATS), (matrix,)),
    )
