"""The newcomers on a device, a thread per group."""

from __future__ import annotations

import numpy as np
from numba import cuda, float32

from cuda_port.device import ONE, ZERO, add, div, load_fp16, mul, sqrt, store_fp16
from cuda_port.port import BYTES, FLOATS, INTS, Kernel, Port
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
    seeded,
)

THREADS = 32


@cuda.jit(device=True)
def inverse(n):
    return div(ONE, n) if n > ZERO else ZERO


@cuda.jit(device=True)
def at_least(v, edges):
    code = 0
    for k in range(edges.size):
        if v >= edges[k]:
            code += 1
    return code


@cuda.jit(device=True)
def norm(x, start, n):
    total = ZERO
    for i in range(n):
        total = add(total, mul(x[start + i], x[start + i]))
    return sqrt(total)


@cuda.jit(device=True)
def largest(x, start, n):
    found = ZERO
    for i in range(n):
        if abs(x[start + i]) > found:
            found = abs(x[start + i])
    return found


@cuda.jit(device=True)
def transform(v, n):
    length = 1
    while length < n:
        for i in range(n):
            if i & length == 0:
                a, b = v[i], v[i + length]
                v[i], v[i + length] = add(a, b), add(a, -b)
        length *= 2


@cuda.jit
def quad_encode(x, signs, edges, packed):
    g = cuda.grid(1)
    if g * 128 < x.size:
        v = cuda.local.array(128, float32)
        n = norm(x, g * 128, 128)
        scale = inverse(n)
        for i in range(128):
            v[i] = mul(mul(x[g * 128 + i], scale), signs[i])
        transform(v, 128)
        for b in range(4):
            at = (4 * g + b) * 14
            for k in range(14):
                packed[at + k] = 0
            store_fp16(mul(n, K128), packed, at + 8)
            for i in range(32):
                code = at_least(mul(mul(v[32 * b + i], K128), ROOT128), edges)
                packed[at + i // 4] |= (code & 3) << (2 * (i % 4))
                packed[at + 10 + i // 8] |= (code >> 2) << (i % 8)


@cuda.jit(device=True)
def quad_level(packed, base, i, levels):
    code = (packed[base + i // 4] >> (2 * (i % 4))) & 3
    code |= ((packed[base + 10 + i // 8] >> (i % 8)) & 1) << 2
    return mul(levels[code], load_fp16(packed, base + 8))


@cuda.jit
def two_encode(x, levels, edges, packed):
    g = cuda.grid(1)
    if g * 64 < x.size:
        n = norm(x, g * 64, 64)
        scale, total = inverse(n), ZERO
        for k in range(28):
            packed[g * 28 + k] = 0
        for i in range(64):
            u = mul(mul(x[g * 64 + i], scale), ROOT64)
            code = at_least(u, edges)
            rest = add(u, -levels[code])
            total = add(total, abs(rest))
            packed[g * 28 + 4 + i // 4] |= code << (2 * (i % 4))
            if rest >= ZERO:
                packed[g * 28 + 20 + i // 8] |= 1 << (i % 8)
        store_fp16(div(n, ROOT64), packed, g * 28)
        mean = div(total, np.float32(64))
        store_fp16(mul(mean, div(n, ROOT64)), packed, g * 28 + 2)


@cuda.jit(device=True)
def two_level(packed, base, i, levels):
    a, b = load_fp16(packed, base), load_fp16(packed, base + 2)
    level = mul(levels[(packed[base + 4 + i // 4] >> (2 * (i % 4))) & 3], a)
    plus = (packed[base + 20 + i // 8] >> (i % 8)) & 1
    return add(level, b if plus else -b)


@cuda.jit
def odd_encode(x, words, edges, packed):
    g = cuda.grid(1)
    if g * 32 < x.size:
        n = largest(x, g * 32, 32)
        scale = inverse(n)
        word = np.int64(words[g % words.size]) & 0xFFFFFFFF
        for k in range(24):
            packed[g * 24 + k] = 0
        for i in range(32):
            v = x[g * 32 + i] if (word >> i) & 1 else -x[g * 32 + i]
            packed[g * 24 + i // 2] |= at_least(mul(v, scale), edges) << (4 * (i % 2))
        store_fp16(n, packed, g * 24 + 18)
        for k in range(4):
            packed[g * 24 + 20 + k] = (word >> (8 * k)) & 0xFF


@cuda.jit(device=True)
def odd_level(packed, base, i, levels):
    code = (packed[base + i // 2] >> (4 * (i % 2))) & 15
    return mul(levels[code], load_fp16(packed, base + 18))


@cuda.jit
def odd_decode(packed, levels, y):
    n = cuda.grid(1)
    if n < y.size:
        base, i = n // 32 * 24, n % 32
        value = odd_level(packed, base, i, levels)
        y[n] = value if (packed[base + 20 + i // 8] >> (i % 8)) & 1 else -value


def head_encoder(unit: np.float32):
    @cuda.jit
    def encode(x, edges, packed):
        g = cuda.grid(1)
        if g * 64 < x.size:
            n = div(largest(x, g * 64, 64), unit)
            scale = inverse(n)
            for k in range(34):
                packed[g * 34 + k] = 0
            for i in range(64):
                code = at_least(mul(x[g * 64 + i], scale), edges)
                packed[g * 34 + 2 + i // 2] |= code << (4 * (i % 2))
            store_fp16(n, packed, g * 34)

    return encode


@cuda.jit(device=True)
def head_level(packed, base, i, levels):
    code = (packed[base + 2 + i // 2] >> (4 * (i % 2))) & 15
    return mul(levels[code], load_fp16(packed, base))


def row_words(row_blocks: int) -> tuple[np.ndarray, ...]:
    bits = np.packbits(seeded(np.arange(row_blocks)), axis=1, bitorder="little")
    return (bits.view("<i4").reshape(-1),)


def port(codec) -> Port:
    """Return the kernels of a newcomer."""
    three = (FLOATS, FLOATS, FLOATS, BYTES)
    if isinstance(codec, Quad):
        encode = Kernel(quad_encode, THREADS, THREADS * 128, three, (SIGNS, EDGES))
        return Port(encode, quad_level, TABLE)
    if isinstance(codec, TwoScales):
        encode = Kernel(two_encode, THREADS, THREADS * 64, three, (TWO_BITS, TWO_EDGES))
        return Port(encode, two_level, TWO_BITS)
    edges = codec.boundaries["codes"].astype(np.float32)
    if isinstance(codec, OddNames):
        types = (FLOATS, INTS, FLOATS, BYTES)
        encode = Kernel(odd_encode, THREADS, THREADS * 32, types, (edges,), row_words)
        decode = Kernel(odd_decode, THREADS, THREADS, (BYTES, FLOATS, FLOATS), (codec.table,))
        return Port(encode, odd_level, codec.table, decode)
    assert isinstance(codec, ByHead)
    kernel = head_encoder(np.float32(codec.unit))
    encode = Kernel(kernel, THREADS, THREADS * 64, (FLOATS, FLOATS, BYTES), (edges,))
    return Port(encode, head_level, codec.table)
