"""Kernels of codecs with cells: a thread per group of values, which it keeps in shared memory.

What a thread does is what one lane of `tbq.kernels.rotated` does: the sums have an order that no
two threads could share, so every thread of a warp adds up a group of its own. Groups lie in rows
of an odd length, so that equal steps of neighbouring threads are in different banks. No thread
waits for another.

What differs between codecs is in an array of int32, `plan`, at the places that are named below;
what turns the values is a device function, `mix` (v, n, first, second), which has two tables.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32

from cuda_port.device import (
    ONE,
    ZERO,
    add,
    device,
    div,
    load_code,
    load_fp16,
    mul,
    sqrt,
    store_fp16,
)
from cuda_port.port import BYTES, FLOATS, INTS, Kernel
from tbq.codec import Codec

TINY = np.float32(1e-10)
SHARED_FLOATS = 8448  # 33 KiB: 32 groups of 256 values in rows of 264 and less

# --- plans ---------------------------------------------------------------------------------------

# How the values of a group become a unit vector, `least` being a number of the codec's: times 1/n,
# or 0 if n is no more than `least`; over n, which is at least `least`; over |n| + `least`.
MULTIPLIED, DIVIDED, DIVIDED_BY_MORE = range(3)
ORDERS = {"ordered": 0, "tree": 1, "warps": 2, "eights": 3}
ORDERED, TREE, EIGHTS = ORDERS["ordered"], ORDERS["tree"], ORDERS["eights"]
WARP = 32  # terms that a warp adds as a tree

(
    ORDER,  # of sums, a value of ORDERS
    SCALING,  # MULTIPLIED, DIVIDED or DIVIDED_BY_MORE
    CLEARS,  # whether a norm that is NaN makes the values zeros
    LAST,  # whether NaN goes to the last cell, not to the first
    CORRECTED,  # whether the norm is divided by that of the centroids
    SCALED_FIRST,  # whether the decoder multiplies by the scale before it mixes
    BITS,  # of a code
    THIRD,  # where the third bits of codes are, -1 if they are with the others
    CODES,  # where the codes are
    SCALE,  # where the scale is
    SIZE,  # bytes of a block
    VALUES,  # of a block
    BLOCKS,  # of a group
    PAD,  # where zeros are written
    PADS,  # how many
) = range(15)


def plan_of(
    codec: Codec,
    bits: int,
    *,
    total: str = "ordered",
    scaling: int = MULTIPLIED,
    clears: bool = False,
    last: bool = True,
    corrected: bool = True,
    scaled_first: bool = False,
    third: str | None = None,
) -> np.ndarray:
    """Return the plan of a codec; `third` is the field of third bits."""
    layout = codec.layout
    codes, scale = layout.offset(layout.codes[0]), layout.offset(layout.scales[0])
    pad = layout.span(layout.padding[0]) if layout.padding else slice(0, 0)
    plan = [
        *(ORDERS[total], scaling, clears, last, corrected, scaled_first),
        *(bits, layout.offset(third) if third else -1, codes, scale),
        *(codec.block_bytes, codec.block_values, codec.group_blocks),
        *(pad.start, pad.stop - pad.start),
    ]
    return np.array(plan, np.int32)


def exceeding(edges: np.ndarray) -> np.ndarray:
    """Return the least float32 above each edge: what is not below that exceeds the edge."""
    return np.nextafter(edges, np.float32(np.inf))


def threads_for(pitch: int) -> int:
    """Return how many groups in rows of `pitch` floats a block of threads can have."""
    return min(32, 1 << (SHARED_FLOATS // pitch).bit_length() - 1)


# --- one group, v[:n] ----------------------------------------------------------------------------


@device
def load(x, at, n, v):
    """Set v[:n] to x[at : at + n]."""
    for j in range(n):
        v[j] = x[at + j]


@device
def total_of_squares(v, n, order):
    """Return the sum of squares of v[:n], of which nothing is left but where order is ordered."""
    total = ZERO
    if order == ORDERED:
        for j in range(n):
            total = add(total, mul(v[j], v[j]))
    elif order == EIGHTS:
        for j in range(n):
            square = mul(v[j], v[j])
            v[j] = add(v[j - 8], square) if j >= 8 else square
        a = add(add(v[n - 8], v[n - 7]), add(v[n - 6], v[n - 5]))
        total = add(a, add(add(v[n - 4], v[n - 3]), add(v[n - 2], v[n - 1])))
    else:
        for j in range(n):
            v[j] = mul(v[j], v[j])
        part = n if order == TREE else WARP
        for first in range(0, n, part):
            half = part // 2
            while half > 0:
                for j in range(first, first + half):
                    v[j] = add(v[j], v[j + half])
                half //= 2
            total = add(total, v[first])
    return total


@device
def load_and_measure(x, at, n, order, v):
    """Set v[:n] to x[at : at + n] and return its L2 norm."""
    load(x, at, n, v)
    norm = sqrt(total_of_squares(v, n, order))
    load(x, at, n, v)
    return norm


@device
def inverse_norm(norm, least):
    """Return 1/norm, 0 if it is no more than `least`."""
    return div(ONE, norm) if norm > least else ZERO


@device
def scale(v, n, factor):
    """Multiply v[:n] by a factor."""
    for j in range(n):
        v[j] = mul(v[j], factor)


@device
def normalise(v, n, norm, plan, least):
    """Turn v[:n] into a unit vector and return the norm, raised to its floor if it has one."""
    if plan[SCALING] == MULTIPLIED:
        scale(v, n, inverse_norm(norm, least))
        if plan[CLEARS] and norm != norm:
            for j in range(n):
                v[j] = ZERO
        return norm
    divisor = norm
    if plan[SCALING] == DIVIDED:
        if norm < least:
            norm = least
        divisor = norm
    else:
        norm = abs(norm)  # see `tbq.families.vllm`
        divisor = add(norm, least)
    for j in range(n):
        v[j] = div(v[j], divisor)
    return norm


@device
def transform(v, n):
    """Transform v[:n], butterflies of length 1, 2, ... n/2."""
    length = 1
    while length < n:
        for i in range(n // 2):
            j = 2 * i - i % length
            a, b = v[j], v[j + length]
            v[j], v[j + length] = add(a, b), add(a, -b)
        length *= 2


@device
def hadamard(v, n, first, second):
    """Multiply v[:n] by `first`, transform it and multiply it by `second`: a `mix`."""
    for j in range(n):
        v[j] = mul(v[j], first[j])
    transform(v, n)
    for j in range(n):
        v[j] = mul(v[j], second[j])


@device
def dense(v, n, columns, unused):
    """Multiply v[:n] by a matrix, given flat and by columns: a `mix` that needs v[n : 2n] too."""
    for i in range(n):
        total = ZERO
        for j in range(n):
            total = add(total, mul(columns[n * j + i], v[j]))
        v[n + i] = total
    for i in range(n):
        v[i] = v[n + i]


@device
def cell(u, edges, bits, last):
    """Return how many of the 2^bits - 1 edges are not above u; NaN: all of them, or none."""
    code, step = 0, 1 << (bits - 1)
    while step > 0:
        if u >= edges[code + step - 1] or (last and u != u):
            code += step
        step >>= 1
    return code


@device
def store_word(word, n_bytes, packed, at):
    """Write the low bytes of a word to packed[at : at + n_bytes]."""
    for k in range(n_bytes):
        packed[at + k] = (word >> (8 * k)) & 0xFF


@device
def store_cells(v, n, edges, levels, plan, packed, base, subtracts):
    """Write the codes of v[:n] to the group at packed[base].

    In v they leave the centroids, or, if it subtracts, what exceeds them.
    """
    bits, third, last = int(plan[BITS]), int(plan[THIRD]), plan[LAST] != 0
    values, low = int(plan[VALUES]), 2 if plan[THIRD] >= 0 else int(plan[BITS])
    for g in range(n // 8):
        word, high = 0, 0
        for k in range(8):
            code = cell(v[8 * g + k], edges, bits, last)
            level = levels[code]
            v[8 * g + k] = add(v[8 * g + k], -level) if subtracts else level
            if third >= 0:
                high |= (code >> 2) << k
                code &= 3
            word |= code << (low * k)
        at, w = base + 8 * g // values * int(plan[SIZE]), 8 * g % values // 8
        store_word(word, low, packed, at + int(plan[CODES]) + low * w)
        if third >= 0:
            packed[at + third + w] = high


@device
def store_bits(v, n, least, packed, at):
    """Write a bit for each of v[:n], set where it is `least` or more."""
    for g in range(n // 8):
        byte = 0
        for k in range(8):
            if v[8 * g + k] >= least:
                byte |= 1 << k
        packed[at + g] = byte


@device
def corrected(norm, restored):
    """Return a norm over that of the centroids, or as it is where that is nothing."""
    return div(norm, restored) if restored > TINY else norm


@device
def load_levels(packed, base, levels, plan, n, v):
    """Set v[:n] to the centroids of the codes of the group at packed[base]."""
    bits, third, codes = int(plan[BITS]), int(plan[THIRD]), int(plan[CODES])
    values, size = int(plan[VALUES]), int(plan[SIZE])
    for j in range(n):
        at, i = base + j // values * size, j % values
        v[j] = levels[code_at(packed, at, bits, third, codes, i)]


@device
def code_at(packed, base, bits, third, codes, i):
    """Return code i of the block at packed[base]."""
    if third < 0:
        return load_code(packed, base + codes, bits, i)
    return load_code(packed, base + codes, 2, i) | load_code(packed, base + third, 1, i) << 2


# --- kernels -------------------------------------------------------------------------------------


@cache
def encoder(width: int, mix, room: int):
    """Return the kernel (x, plan, least, first, second, edges, levels, packed)."""
    pitch = room + 1
    threads = threads_for(pitch)

    @cuda.jit
    def encode(x, plan, least, first, second, edges, levels, packed):
        rows = cuda.shared.array((threads, pitch), float32)
        group = cuda.grid(1)
        if group * width < x.size:
            v, size = rows[cuda.threadIdx.x], int(plan[SIZE])
            base = group * size * int(plan[BLOCKS])
            norm = load_and_measure(x, group * width, width, plan[ORDER], v)
            norm = normalise(v, width, norm, plan, least[0])
            mix(v, width, first, second)
            store_cells(v, width, edges, levels, plan, packed, base, False)
            if plan[CORRECTED]:
                norm = corrected(norm, sqrt(total_of_squares(v, width, plan[ORDER])))
            for b in range(int(plan[BLOCKS])):
                store_fp16(norm, packed, base + b * size + int(plan[SCALE]))
                for k in range(int(plan[PADS])):
                    packed[base + b * size + int(plan[PAD]) + k] = 0

    return encode


@cache
def decoder(width: int, mix, room: int):
    """Return the kernel (packed, plan, first, second, levels, y): centroids mixed, times scale."""
    pitch = room + 1
    threads = threads_for(pitch)

    @cuda.jit
    def decode(packed, plan, first, second, levels, y):
        rows = cuda.shared.array((threads, pitch), float32)
        group = cuda.grid(1)
        if group * width < y.size:
            v = rows[cuda.threadIdx.x]
            base = group * int(plan[SIZE]) * int(plan[BLOCKS])
            load_levels(packed, base, levels, plan, width, v)
            d = load_fp16(packed, base + int(plan[SCALE]))
            if plan[SCALED_FIRST]:
                scale(v, width, d)
            mix(v, width, first, second)
            if not plan[SCALED_FIRST]:
                scale(v, width, d)
            for j in range(width):
                y[group * width + j] = v[j]

    return decode


@cache
def rotator(width: int, mix, room: int):
    """Return the kernel (x, first, second, y) that mixes groups of float32."""
    pitch = room + 1
    threads = threads_for(pitch)

    @cuda.jit
    def rotate(x, first, second, y):
        rows = cuda.shared.array((threads, pitch), float32)
        group = cuda.grid(1)
        if group * width < x.size:
            v = rows[cuda.threadIdx.x]
            load(x, group * width, width, v)
            mix(v, width, first, second)
            for j in range(width):
                y[group * width + j] = v[j]

    return rotate


def grouped(function, pitch: int, width: int, types: tuple[str, ...], tables) -> Kernel:
    """Return a kernel of groups of so many values, in rows of `pitch` floats."""
    threads = threads_for(pitch)
    return Kernel(function, threads, threads * width, types, tuple(map(on_device, tables)))


def on_device(table) -> np.ndarray:
    """Return a table as kernels read it: flat where it is one of floats."""
    return np.ascontiguousarray(table) if table.dtype == np.int32 else np.float32(table).reshape(-1)


# what mixes, and the room that it takes in values of a group
HADAMARD, DENSE = (hadamard, 1), (dense, 2)


def encoding(codec: Codec, plan, how, least, tables, edges, levels) -> Kernel:
    """Return the encoder of a codec with cells; `tables` are those of its `mix`."""
    mix, rooms = how
    width = codec.group_values
    types = (FLOATS, INTS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, BYTES)
    tables = (plan, np.array([least]), *tables, edges, levels)
    return grouped(encoder(width, mix, rooms * width), rooms * width + 1, width, types, tables)


def decoding(codec: Codec, plan, how, tables, levels) -> Kernel:
    """Return the decoder of a codec with cells; `tables` are those of its `mix` back."""
    mix, rooms = how
    width = codec.group_values
    types = (BYTES, INTS, FLOATS, FLOATS, FLOATS, FLOATS)
    function = decoder(width, mix, rooms * width)
    return grouped(function, rooms * width + 1, width, types, (plan, *tables, levels))


def rotating(codec: Codec, how, tables) -> Kernel:
    """Return the kernel that mixes groups of a codec with these tables."""
    mix, rooms = how
    width = codec.group_values
    types = (FLOATS, FLOATS, FLOATS, FLOATS)
    function = rotator(width, mix, rooms * width)
    return grouped(function, rooms * width + 1, width, types, tables)


@cache
def level_at(bits: int, third: int, codes: int, at: int):
    """Return the device function (packed, base, i, levels): the centroid of value i times scale."""

    @device
    def level(packed, base, i, levels):
        code = code_at(packed, base, bits, third, codes, i)
        return mul(levels[code], load_fp16(packed, base + at))

    return level


def level_of(plan: np.ndarray):
    """Return `level_at` of a plan."""
    return level_at(*(int(plan[k]) for k in (BITS, THIRD, CODES, SCALE)))
