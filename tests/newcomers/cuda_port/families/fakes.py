"""The newcomers on a device, a thread per group."""

from __future__ import annotations

import numpy as np
from numba import cuda, float32

from cuda_port.device import ONE, ZERO, add, device, div, fp16_bits, fp16_value, mul, sqrt, take
from cuda_port.fields import Fields
from cuda_port.port import FLOATS, WORDS, Kernel, Port, Signs
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
BYTES = WORDS[1]


@cuda.jit(device=True)
def store_fp16(x, packed, at):
    h = fp16_bits(x)
    packed[at] = h & 0xFF
    packed[at + 1] = h >> 8


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


QUAD = Fields(14, 32, ((0, 2), (10, 1)), ((8, 2),))


def quad_levels(n):
    _, high, scale = QUAD.starts(n)

    @device
    def levels(words, v, at, lut):
        for k in range(n):
            code = take(words, 2 * k, 2) | take(words, high + k, 1) << 2
            v[at + k] = mul(lut[code], fp16_value(take(words, scale, 16)))

    return levels


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


TWO = Fields(28, 64, ((4, 2), (20, 1)), ((0, 2), (2, 2)))


def two_levels(n):
    _, signs, first, second = TWO.starts(n)

    @device
    def levels(words, v, at, lut):
        a, b = fp16_value(take(words, first, 16)), fp16_value(take(words, second, 16))
        for k in range(n):
            level = mul(lut[take(words, 2 * k, 2)], a)
            v[at + k] = add(level, b if take(words, signs + k, 1) else -b)

    return levels


@cuda.jit
def odd_encode(x, words, edges, packed):
    g = cuda.grid(1)
    if g * 32 < x.size:
        n = largest(x, g * 32, 32)
        scale = inverse(n)
        word = np.int64(words[g % words.size])
        for k in range(24):
            packed[g * 24 + k] = 0
        for i in range(32):
            v = x[g * 32 + i] if (word >> i) & 1 else -x[g * 32 + i]
            packed[g * 24 + i // 2] |= at_least(mul(v, scale), edges) << (4 * (i % 2))
        store_fp16(n, packed, g * 24 + 18)
        for k in range(4):
            packed[g * 24 + 20 + k] = (word >> (8 * k)) & 0xFF


def four_bits(fields):
    def of(n):
        scale = fields.starts(n)[-1]

        @device
        def levels(words, v, at, lut):
            for k in range(n):
                d = fp16_value(take(words, scale, 16))
                v[at + k] = mul(lut[take(words, 4 * k, 4)], d)

        return levels

    return of


ODD = Fields(24, 32, ((0, 4),), ((18, 2),))


@device
def give_signs(v, signs):
    for k in range(32):
        v[k] = v[k] if (signs >> k) & 1 else -v[k]


@cuda.jit
def odd_decode(packed, levels, y):
    n = cuda.grid(1)
    if n < y.size:
        base, i = n // 32 * 24, n % 32
        code = (packed[base + i // 2] >> (4 * (i % 2))) & 15
        d = fp16_value(np.int64(packed[base + 18]) | np.int64(packed[base + 19]) << 8)
        value = mul(levels[code], d)
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


HEAD = Fields(34, 64, ((2, 4),), ((0, 2),))


def row_words(row_blocks: int) -> tuple[np.ndarray, ...]:
    bits = np.packbits(seeded(np.arange(row_blocks)), axis=1, bitorder="little")
    return (bits.view("<u4").reshape(-1),)


def port(codec) -> Port:
    """Return the kernels of a newcomer."""
    three = (FLOATS, FLOATS, FLOATS, BYTES)
    if isinstance(codec, Quad):
        encode = Kernel(quad_encode, THREADS, THREADS * 128, three, (SIGNS, EDGES))
        return Port(encode, QUAD, quad_levels, TABLE)
    if isinstance(codec, TwoScales):
        encode = Kernel(two_encode, THREADS, THREADS * 64, three, (TWO_BITS, TWO_EDGES))
        return Port(encode, TWO, two_levels, TWO_BITS)
    edges = codec.boundaries["codes"].astype(np.float32)
    if isinstance(codec, OddNames):
        types = (FLOATS, WORDS[4], FLOATS, BYTES)
        encode = Kernel(odd_encode, THREADS, THREADS * 32, types, (edges,), row_words)
        decode = Kernel(odd_decode, THREADS, THREADS, (BYTES, FLOATS, FLOATS), (codec.table,))
        signs = Signs(20, give_signs)
        return Port(encode, ODD, four_bits(ODD), codec.table, decode, signs=signs)
    assert isinstance(codec, ByHead)
    kernel = head_encoder(np.float32(codec.unit))
    encode = Kernel(kernel, THREADS, THREADS * 64, (FLOATS, FLOATS, BYTES), (edges,))
    return Port(encode, HEAD, four_bits(HEAD), codec.table)
