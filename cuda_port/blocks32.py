"""Kernels of ktq*_1, vtq*_1 and vtq_mixed: 32 values, a thread each, four blocks side by side.

The arithmetic is that of `tbq.families.ktq` and `tbq.families.vtq`; ktq adds the signed Hadamard
transform on either side. Threads of a block meet in shared memory, so every one of them reaches
every barrier, those beyond the last block too.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, float32, int32

from cuda_port.device import (
    ONE,
    TINY,
    ZERO,
    add,
    barrier,
    device,
    div,
    load_code,
    load_fp16,
    mul,
    ordered_norm,
    packed_byte,
    store_fp16,
)
from tbq.families.ktq import SCALE

QK = 32
GROUPS = 4
THREADS = QK * GROUPS


@device
def transform(v, group, lane):
    """Transform v[group] in place, lengths 1 to 16; all threads of the CUDA block take part."""
    length = 1
    while length < QK:
        mine, other = v[group, lane], v[group, lane ^ length]
        barrier()
        if lane & length:
            v[group, lane] = add(other, -mine)
        else:
            v[group, lane] = add(mine, other)
        barrier()
        length *= 2


@device
def nearest(r, limits, first, last):
    """Return how many of limits[first:last] are not above r."""
    code = 0
    for k in range(first, last):
        if r >= limits[k]:
            code += 1
    return code


@cache
def encoder(size: int, bits: int, sb: int, mixed: bool):
    """Return the kernel (x, signs, levels, limits, packed): flat float32 to flat uint8.

    size: bytes of a block; bits: per code; sb: where the signs are, 0 if there are none; mixed:
    whether it is vtq_mixed.
    """
    signed = sb > 0

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


@device
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


def level_at(bits: int, mixed: bool):
    """Return the device function (packed, base, i, levels): the scaled level of value i."""

    @device
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
