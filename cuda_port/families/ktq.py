"""ktq1_1 ... ktq4_1 and xktq2_1, see `cuda_port.blocks32`.

The arithmetic is that of `tbq.families.ktq`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32

from cuda_port.blocks32 import GROUPS, QK, SCALE, THREADS, encoder, level_at, transform
from cuda_port.device import TINY, ZERO, add, device, load_code, load_fp16, mul, sqrt, store_fp16
from cuda_port.port import BYTES, FLOATS, INTS, VALUE_THREADS, Kernel, Port
from tbq.families.ktq import CODEBOOKS, BorrowedCodes, SignedBlocks, block_seed, sign_words
from tbq.nearest import squared, thresholds


def row_signs(row_blocks: int) -> tuple[np.ndarray, ...]:
    """Return the 32 sign bits of each block of a row, int32 (row_blocks,)."""
    return (sign_words()[block_seed(np.arange(row_blocks))],)


@cache
def norm_encoder(size: int):
    """Return the kernel (x, packed) of xktq2_1 alone: the norm of each block, a thread each."""

    @cuda.jit
    def encode(x, packed):
        block = cuda.grid(1)
        if block * QK < x.size:
            total = ZERO
            for j in range(QK):
                total = add(total, mul(x[block * QK + j], x[block * QK + j]))
            for k in range(2, size):
                packed[block * size + k] = 0
            store_fp16(sqrt(total), packed, block * size)

    return encode


def nothing_at(packed, base, i, levels):
    """Value i of an xktq2_1 block without its sibling."""
    return ZERO


@cache
def signed_decoder(size: int, bits: int, sb: int):
    """Return the kernel (packed, levels, y) of a ktq format: flat uint8 to flat float32."""

    @cuda.jit
    def decode(packed, levels, y):
        v = cuda.shared.array((GROUPS, QK), float32)
        group, lane = cuda.threadIdx.x // QK, cuda.threadIdx.x % QK
        block = cuda.blockIdx.x * GROUPS + group
        inside = block * QK < y.size
        base = block * size if inside else 0
        v[group, lane] = levels[load_code(packed, base + 2, bits, lane)]
        cuda.syncthreads()
        transform(v, group, lane)
        d = load_fp16(packed, base)
        plus = (packed[base + sb + lane // 8] >> (lane % 8)) & 1
        if inside:
            value = mul(mul(v[group, lane], SCALE), d if plus else -d)
            y[block * QK + lane] = ZERO if d < TINY else value

    return decode


def port(codec: SignedBlocks | BorrowedCodes) -> Port | None:
    """Return the kernels of a ktq format; None for the CUDA code's own random draws."""
    if isinstance(codec, BorrowedCodes):
        encode = Kernel(
            norm_encoder(codec.block_bytes), VALUE_THREADS, VALUE_THREADS * QK, (FLOATS, BYTES)
        )
        return Port(encode, device(nothing_at), np.zeros(1, np.float32))
    if codec != SignedBlocks(codec.bits):
        return None
    bits, size, sb = codec.bits, codec.block_bytes, codec.layout.offset("sb")
    levels = CODEBOOKS[bits] * SCALE
    limits = thresholds(levels, squared) if bits > 1 else np.zeros(1, np.float32)
    types = (FLOATS, INTS, FLOATS, FLOATS, BYTES)
    return Port(
        Kernel(
            encoder(size, bits, sb, False), THREADS, GROUPS * QK, types, (levels, limits), row_signs
        ),
        level_at(bits, False),
        levels,
        Kernel(
            signed_decoder(size, bits, sb), THREADS, GROUPS * QK, (BYTES, FLOATS, FLOATS), (levels,)
        ),
    )
