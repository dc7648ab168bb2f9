"""vtq*_2, vtq*_3 and vtq3_v8: any value decodes alone; encoding is a Viterbi search per block.

The arithmetic is that of `tbq.families.trellis`. Decoding: value i depends on the 16 bits of
start‖emissions that end with emission i, so there is a thread per value. Encoding: all 2^K states
that share their predecessors differ by what they add, and rounding is monotone, so a step needs

    least[g] = the least cost of the 2^K states (g << K) + j, over j
    cost of state s after step i = f32(least_i[s mod G] + f32((u_i - code[s])^2)),  G = 2^(16-K)

A block of threads shares the groups of one step; the minima of all steps stay in global memory, and
one thread retraces the walk by the C code's own rule, the first predecessor that attains the sum.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32, float64, int32

from cuda_port.device import (
    ONE,
    TINY,
    ZERO,
    add,
    add64,
    device,
    div,
    load_fp16,
    mul,
    mul64,
    sqrt64,
    store_fp16,
)
from cuda_port.port import BYTES, FLOATS, FLOATS2, Kernel, Port
from tbq.families.trellis import FLT_MAX, QK, Trellis, code_table

THREADS = 512
STATE_BITS = 16
WALK = QK + 1  # states of a walk; shared arrays need their sizes as constants
F64_ZERO = np.float64(0.0)


def scratch_values(bits: int, state_bits: int = STATE_BITS) -> int:
    """Return the float32 values of scratch that one block of threads needs."""
    return WALK << (state_bits - bits)


@device
def branch(u, code):
    """Return the cost of giving u the level `code`."""
    difference = add(u, -code)
    return mul(difference, difference)


def offsets(codec: Trellis) -> tuple[int, int, int]:
    """Return where a block keeps its emissions, the outliers' positions and their values."""
    layout = codec.layout
    if not codec.outliers:
        return layout.offset("qs"), codec.block_bytes, codec.block_bytes
    return layout.offset("qs"), layout.offset("pos"), layout.offset("val")


@cache
def encoder(codec: Trellis, state_bits: int = STATE_BITS, threads: int = THREADS):
    """Return the kernel (x, table, scratch, packed): flat float32 to flat uint8.

    table holds the level of each state; scratch is float32 (blocks of threads, scratch_values), and
    each of them walks through the blocks in strides. `state_bits` is 16 but in tests.
    """
    size, bits, count = codec.block_bytes, codec.bits, codec.outliers
    groups = 1 << (state_bits - bits)
    qs, pos, val = offsets(codec)

    @cuda.jit
    def encode(x, table, scratch, packed):
        u = cuda.shared.array(QK, float32)
        states = cuda.shared.array(WALK, int32)
        picked = cuda.shared.array(8, int32)
        shared = cuda.shared.array(2, float32)  # inverse of the norm, norm
        best_cost = cuda.shared.array(threads, float32)
        best_order = cuda.shared.array(threads, int32)
        t = cuda.threadIdx.x
        least = scratch[cuda.blockIdx.x]
        for block in range(cuda.blockIdx.x, x.size // QK, cuda.gridDim.x):
            base = block * size
            for i in range(t, QK, threads):
                u[i] = x[block * QK + i]
            cuda.syncthreads()
            if t == 0:
                pick(u, count, picked, packed, base, pos, val)
                total = F64_ZERO
                for i in range(QK):
                    wide = float64(u[i])
                    total = add64(total, mul64(wide, wide))
                norm = float32(sqrt64(total))
                shared[0], shared[1] = div(ONE, norm), norm
            cuda.syncthreads()
            norm = shared[1]
            for i in range(t, QK, threads):
                u[i] = mul(u[i], shared[0])
            cuda.syncthreads()
            # least[i * groups + g] is the least cost of a state of group g before step i
            for g in range(t, groups, threads):
                least[g] = ZERO
            cuda.syncthreads()
            for i in range(QK - 1):
                for g in range(t, groups, threads):
                    smallest = FLT_MAX
                    for j in range(1 << bits):
                        s = (g << bits) + j
                        cost = add(least[i * groups + s % groups], branch(u[i], table[s]))
                        if cost < smallest:
                            smallest = cost
                    least[(i + 1) * groups + g] = smallest
                cuda.syncthreads()
            # the end: the first least cost in the order of s mod groups, then of s // groups
            last = (QK - 1) * groups
            smallest, order = FLT_MAX, -1
            for g in range(t, groups, threads):
                for e in range(1 << bits):
                    cost = add(least[last + g], branch(u[QK - 1], table[e * groups + g]))
                    if cost < smallest:
                        smallest, order = cost, (g << bits) + e
            best_cost[t], best_order[t] = smallest, order
            cuda.syncthreads()
            if t == 0:
                for k in range(threads):
                    nearer = best_cost[k] < smallest
                    earlier = best_cost[k] == smallest and 0 <= best_order[k] < order
                    if nearer or earlier:
                        smallest, order = best_cost[k], best_order[k]
                state = 0
                if order >= 0:
                    state = (order & ((1 << bits) - 1)) * groups + (order >> bits)
                states[QK] = state
                for back in range(QK):
                    i = QK - 1 - back
                    states[i] = predecessor(u, table, least, i, states[i + 1], bits, groups)
                store(packed, base, norm, states, table, bits, qs, state_bits)
            cuda.syncthreads()

    return encode


@device
def pick(u, count, picked, packed, base, pos, val):
    """Move the `count` largest |u| out of u into the block, positions ascending."""
    found = 0
    for _ in range(count):
        best, largest = -1, -ONE
        for i in range(QK):
            taken = False
            for k in range(found):
                taken = taken or picked[k] == i
            if not taken and abs(u[i]) > largest:
                best, largest = i, abs(u[i])
        if best >= 0:
            k = found  # insert in order
            while k > 0 and picked[k - 1] > best:
                picked[k] = picked[k - 1]
                k -= 1
            picked[k] = best
            found += 1
    for k in range(count):
        packed[base + pos + k] = picked[k] if k < found else 0
        store_fp16(u[picked[k]] if k < found else ZERO, packed, base + val + 2 * k)
    for k in range(found):
        u[picked[k]] = ZERO


@device
def cost_before(u, table, least, i, s, groups):
    """Return the cost of state s before step i."""
    if i == 0:
        return ZERO
    cost = add(least[(i - 1) * groups + s % groups], branch(u[i - 1], table[s]))
    return cost if cost < FLT_MAX else FLT_MAX


@device
def predecessor(u, table, least, i, s, bits, groups):
    """Return the first predecessor of state s after step i that attains the least sum."""
    step = branch(u[i], table[s])
    first = (s % groups) << bits
    best, smallest = first, FLT_MAX
    for j in range(1 << bits):
        cost = add(cost_before(u, table, least, i, first + j, groups), step)
        if cost < smallest:
            best, smallest = first + j, cost
    return best


@device
def store(packed, base, norm, states, table, bits, qs, state_bits):
    """Write scale, start and emissions of a walk; zeros for a zero block."""
    dead = norm < TINY
    total = F64_ZERO
    for i in range(QK):
        wide = float64(table[states[i + 1]])
        total = add64(total, mul64(wide, wide))
    restored = float32(sqrt64(total))
    d = div(norm, restored) if restored > TINY else norm
    store_fp16(ZERO if dead else d, packed, base)
    packed[base + 2] = 0 if dead else states[0] & 0xFF
    packed[base + 3] = 0 if dead else states[0] >> 8
    for k in range(16 * bits):
        byte = 0
        for t in range(8):
            p = 8 * k + t
            emitted = states[p // bits + 1] >> (state_bits - bits)
            byte |= ((emitted >> (p % bits)) & 1) << t
        packed[base + qs + k] = 0 if dead else byte


def level_at(codec: Trellis):
    """Return the device function (packed, base, i, table): value i, outliers in their places."""
    bits, count = codec.bits, codec.outliers
    _, pos, val = offsets(codec)

    @device
    def level(packed, base, i, table):
        first = bits * (i + 1)
        byte, shift = base + 2 + first // 8, first % 8
        word = np.int64(packed[byte]) | (np.int64(packed[byte + 1]) << 8)
        if shift:
            word |= np.int64(packed[byte + 2]) << 16
        d = load_fp16(packed, base)
        value = ZERO if d == ZERO else mul(table[(word >> shift) & 0xFFFF], d)
        for k in range(count):
            if packed[base + pos + k] == i:
                value = load_fp16(packed, base + val + 2 * k)
        return value

    return level


def port(codec: Trellis) -> Port:
    """Return the kernels of a trellis format."""
    table = np.array(code_table())
    types = (FLOATS, FLOATS, FLOATS2, BYTES)
    scratch = scratch_values(codec.bits)
    encode = Kernel(encoder(codec), THREADS, QK, types, (table,), scratch_values=scratch)
    return Port(encode, level_at(codec), table)
