"""ktq*_1, xktq2_1, vtq*_1, vtq_mixed: blocks of 32, a thread per value, four blocks side by side.

The arithmetic is that of `tbq.families.ktq` and `tbq.families.vtq`; ktq adds the signed Hadamard
transform on either side. Threads of a block meet in shared memory, so every one of them reaches
every barrier, those beyond the last block too.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32, int32

from cuda_port.device import (
    ONE,
    TINY,
    ZERO,
    add,
    div,
    load_code,
    load_fp16,
    mul,
    ordered_norm,
    packed_byte,
    sqrt,
    store_fp16,
)
from tbq.families import ktq, vtq
from tbq.format import Format
from tbq.kernels.ktq import sign_words
from tbq.kernels.nearest import squared, thresholds

QK = 32
GROUPS = 4
THREADS = QK * GROUPS
SCALE = ktq.SCALE


@cuda.jit(device=True)
def transform(v, group, lane):
    """Transform v[group] in place, lengths 1 to 16; all threads of the CUDA block take part."""
    length = 1
    while length < QK:
        mine, other = v[group, lane], v[group, lane ^ length]
        cuda.syncthreads()
        if lane & length:
            v[group, lane] = add(other, -mine)
        else:
            v[group, lane] = add(mine, other)
        cuda.syncthreads()
        length *= 2


@cuda.jit(device=True)
def nearest(r, limits, first, last):
    """Return how many of limits[first:last] are not above r."""
    code = 0
    for k in range(first, last):
        if r >= limits[k]:
            code += 1
    return code


def tables(fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Return the levels of a format's codes and the thresholds between them; mixed: both tables."""
    if fmt.sibling:
        return np.zeros(1, np.float32), np.zeros(1, np.float32)
    if vtq.is_mixed(fmt):
        pairs = [_table(vtq.CODEBOOKS[bits], bits) for bits in (3, 2)]
        return tuple(np.concatenate(parts) for parts in zip(*pairs, strict=True))
    bits = ktq.code_bits(fmt)
    codebooks = ktq.CODEBOOKS if "sb" in fmt.block.names else vtq.CODEBOOKS
    return _table(codebooks[bits], bits)


def _table(codebook: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    levels = codebook * SCALE
    return levels, thresholds(levels, squared) if bits > 1 else np.zeros(1, np.float32)


def row_signs(fmt: Format, row_blocks: int) -> np.ndarray:
    """Return the 32 sign bits of each block of a row, int32 (row_blocks,); zeros without signs."""
    if "sb" not in fmt.block.names:
        return np.zeros(1, np.int32)
    return sign_words()[ktq.block_seed(np.arange(row_blocks))]


@cache
def encoder(fmt: Format):
    """Return the kernel (x, signs, levels, limits, packed): flat float32 to flat uint8."""
    size, signed, mixed = fmt.block_bytes, "sb" in fmt.block.names, vtq.is_mixed(fmt)
    bits = 2 if mixed else ktq.code_bits(fmt)
    sb = 2 + 4 * bits  # where the signs are, if there are any

    @cuda.jit
    def encode(x, signs, levels, limits, packed):
        v = cuda.shared.array((GROUPS, QK), float32)
        codes = cuda.shared.array((GROUPS, QK), int32)
        group, lane = cuda.threadIdx.x // QK, cuda.threadIdx.x % QK
        block = cuda.blockIdx.x * GROUPS + group
        inside = block * QK < x.size
        value = x[block * QK + lane] if inside else ZERO
        v[group, lane] = value
        cuda.syncthreads()
        norm = ordered_norm(v, group, QK)
        cuda.syncthreads()
        inverse = div(ONE, norm)
        word = signs[block % signs.size]
        if signed and not (word >> lane) & 1:
            inverse = -inverse
        v[group, lane] = mul(value, inverse)
        cuda.syncthreads()
        if signed:
            transform(v, group, lane)
            v[group, lane] = mul(v[group, lane], SCALE)
        if mixed:
            fine = lane % 4 == 0
            code = nearest(v[group, lane], limits, 0 if fine else 7, 7 if fine else 10)
            level = levels[code if fine else 8 + code]
        else:
            code = nearest(v[group, lane], limits, 0, limits.size)
            level = levels[code]
        cuda.syncthreads()
        codes[group, lane] = code
        v[group, lane] = level
        cuda.syncthreads()
        if signed:
            transform(v, group, lane)
            v[group, lane] = mul(v[group, lane], SCALE)
            cuda.syncthreads()
        restored = ordered_norm(v, group, QK)
        dead = norm < TINY
        base = block * size
        if inside and lane < size - 2:
            byte = 0
            if mixed:
                byte = mixed_byte(codes, group, lane)
            elif lane < 4 * bits:
                byte = packed_byte(codes, group, bits, lane)
            elif signed:
                byte = (word >> (8 * (lane - (sb - 2)))) & 0xFF
            packed[base + 2 + lane] = 0 if dead else byte
        if inside and lane == 0:
            corrected = div(norm, restored) if restored > TINY and not dead else norm
            store_fp16(corrected, packed, base)

    return encode


@cuda.jit(device=True)
def mixed_byte(codes, group, k):
    """Return byte k of vtq_mixed's ten: three of 3-bit codes, then 2-bit codes from slot 1 on."""
    byte = 0
    for t in range(8):
        if k < 3:
            p = 8 * k + t
            bit = (codes[group, 4 * (p // 3)] >> (p % 3)) & 1
        else:
            p = 8 * (k - 3) + t
            slot = p // 2
            bit = 0
            if 1 <= slot <= 24:
                bit = (codes[group, 4 * ((slot - 1) // 3) + (slot - 1) % 3 + 1] >> (p % 2)) & 1
        byte |= bit << t
    return byte


@cache
def norm_encoder(fmt: Format):
    """Return the kernel (x, packed) of xktq2_1 alone: the norm of each block, a thread each."""
    size = fmt.block_bytes

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


@cache
def sign_checker(fmt: Format):
    """Return the kernel (packed, row_bytes, differs) that sets differs if signs are not row 0's."""
    size, sb = fmt.block_bytes, 2 + 4 * ktq.code_bits(fmt)

    @cuda.jit
    def check(packed, row_bytes, differs):
        block = cuda.grid(1)
        if block * size < packed.size:
            at = block * size + sb
            for k in range(4):
                if packed[at + k] != packed[(block * size) % row_bytes + sb + k]:
                    differs[0] = 1

    return check


def nothing_at(packed, base, i, levels):
    """Value i of an xktq2_1 block without its sibling."""
    return ZERO


def level_at(fmt: Format):
    """Return the device function (packed, base, i, levels): the scaled level of value i."""
    if fmt.sibling:
        return cuda.jit(device=True)(nothing_at)
    mixed, bits = vtq.is_mixed(fmt), 2 if vtq.is_mixed(fmt) else ktq.code_bits(fmt)

    @cuda.jit(device=True)
    def level(packed, base, i, levels):
        d = load_fp16(packed, base)
        if d < TINY:
            return ZERO
        if mixed:
            if i % 4 == 0:
                return mul(levels[load_code(packed, base + 2, 3, i // 4)], d)
            return mul(levels[8 + load_code(packed, base + 5, 2, i - i // 4)], d)
        return mul(levels[load_code(packed, base + 2, bits, i)], d)

    return level


@cache
def signed_decoder(fmt: Format):
    """Return the kernel (packed, levels, y) of a ktq format: flat uint8 to flat float32."""
    size, bits = fmt.block_bytes, ktq.code_bits(fmt)

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
        plus = (packed[base + 2 + 4 * bits + lane // 8] >> (lane % 8)) & 1
        if inside:
            value = mul(mul(v[group, lane], SCALE), d if plus else -d)
            y[block * QK + lane] = ZERO if d < TINY else value

    return decode
