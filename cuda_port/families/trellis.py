"""vtq*_2, vtq*_3 and vtq3_v8: any value decodes alone; encoding is a Viterbi search per block.

The arithmetic is that of `tbq.families.trellis`. Decoding: value i depends on the 16 bits of
start‖emissions that end with emission i. Encoding: all 2^K states that share their predecessors
differ by what they add, and rounding is monotone, so a step needs

    least[g] = the least cost of the 2^K states (g << K) + j, over j;  G = 2^(16-K) of them
    cost of state s after step i = f32(least_i[s mod G] + f32((u_i - code[s])^2))

The 2^K groups m, m + G/2^K, ... have the same 2^K predecessors, so a thread that has them reads
2^K costs for 4^K states. Levels are read from a table in which neighbouring threads' lie side by
side. The minima of all steps stay in global memory, where a step finds those before it in the
cache, and one thread retraces the walk by the C code's own rule, the first predecessor that
attains the sum.
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
    barrier,
    block,
    bounded,
    device,
    div,
    fp16_bits,
    fp16_value,
    index,
    lesser,
    mul,
    mul64,
    sqrt64,
    take,
    thread,
)
from cuda_port.fields import Fields
from cuda_port.port import FLOATS, FLOATS2, WORDS, Kernel, Port
from cuda_port.unroll import by_eights
from tbq.families.trellis import FLT_MAX, QK, Trellis, code_table

THREADS = 256
RESIDENT = 2  # blocks of threads that a multiprocessor's registers have to be enough for
STATE_BITS = 16
WALK = QK + 1  # states of a walk; shared arrays need their sizes as constants
MOST_OUTLIERS = 8
F64_ZERO = np.float64(0.0)


def scratch_values(bits: int, state_bits: int = STATE_BITS) -> int:
    """Return the float32 values of scratch that one block of threads needs."""
    return QK << (state_bits - bits)


def side_by_side(table: np.ndarray, bits: int) -> np.ndarray:
    """Return the levels of states (g << bits) + j at j * G + g."""
    return np.ascontiguousarray(table.reshape(-1, 1 << bits).T).reshape(-1)


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


# --- encoder -------------------------------------------------------------------------------------


@cache
def encoder(codec: Trellis, state_bits: int = STATE_BITS, threads: int = THREADS):
    """Return the kernel (x, table, by_group, scratch, packed): flat float32 to flat uint16.

    table holds the level of each state, by_group the same `side_by_side`; scratch is float32
    (blocks of threads, scratch_values), and each of them walks through the blocks in strides.
    `state_bits` is 16 but in tests.
    """
    halves, bits, count = codec.block_bytes // 2, codec.bits, codec.outliers
    groups = 1 << (state_bits - bits)
    qs, pos, val = offsets(codec)
    step, prefix, n_emitted = _step(bits, groups, threads), state_bits - bits, QK * bits // 16

    @bounded(threads, RESIDENT)
    def encode(x, table, by_group, scratch, packed):
        u = cuda.shared.array(QK, float32)
        states = cuda.shared.array(WALK, int32)
        picked = cuda.shared.array(MOST_OUTLIERS, int32)
        shared = cuda.shared.array(2, float32)  # inverse of the norm, norm
        costs = cuda.shared.array(threads, float32)
        orders = cuda.shared.array(threads, int32)
        t = thread()
        least = scratch[index(block())]
        number = block()
        while number * QK < x.size:
            base = number * halves
            for i in range(t, QK, threads):
                u[index(i)] = x[index(number * QK + i)]
            barrier()
            if t == 0:
                pick(u, count, picked, packed, base, pos // 2, val // 2)
                norm = float32(length(u))
                shared[0], shared[1] = div(ONE, norm), norm
            barrier()
            for i in range(t, QK, threads):
                u[index(i)] = mul(u[index(i)], shared[0])
            for g in range(t, groups, threads):
                least[index(g)] = ZERO
            barrier()
            for i in range(QK - 1):
                step(u[index(i)], i * groups, least, by_group, t)
                barrier()
            find_end(u[QK - 1], least, table, bits, groups, threads, costs, orders, t)
            if t == 0:
                order, state = orders[0], 0
                if order >= 0:
                    state = (order & ((1 << bits) - 1)) * groups + (order >> bits)
                states[QK] = state
                for back in range(QK):
                    i = QK - 1 - back
                    s = states[index(i + 1)]
                    states[index(i)] = predecessor(u, table, least, i, s, bits, groups)
                store_scale(packed, base, shared[1], states, table)
            barrier()
            for k in range(t, n_emitted, threads):
                word = emitted(states, bits, prefix, k)
                packed[index(base + qs // 2 + k)] = 0 if shared[1] < TINY else word
            barrier()
            number += cuda.gridDim.x

    return encode


def _step(bits: int, groups: int, threads: int):
    """Return the device function (u, at, least, by_group, t): the minima of one step.

    least[at : at + groups] are those before it, and those after it follow.
    """
    choices, apart = 1 << bits, groups >> bits
    parts = max(1, threads // apart)  # threads that share predecessors
    each = choices // parts

    @device
    def step(u, at, least, by_group, t):
        before = cuda.local.array(choices, float32)
        for item in range(t, apart * parts, threads):
            m, first = item % apart, item // apart * each
            for j in range(choices):
                before[j] = least[index(at + (m << bits) + j)]
            for e in range(each):
                g, smallest = m + (first + e) * apart, FLT_MAX
                for j in range(choices):
                    cost = add(before[j], branch(u, by_group[index(g + j * groups)]))
                    smallest = lesser(smallest, cost)
                least[index(at + groups + g)] = smallest

    return step


@device
def length(u):
    """Return the L2 norm of u, products and sum in double."""
    total = F64_ZERO
    for i in range(QK):
        wide = float64(u[i])
        total = add64(total, mul64(wide, wide))
    return sqrt64(total)


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
        if k >= found:
            picked[k] = 0
        packed[index(base + val + k)] = fp16_bits(u[picked[k]] if k < found else ZERO)
    for k in range(count // 2):
        packed[index(base + pos + k)] = picked[2 * k] | picked[2 * k + 1] << 8
    for k in range(found):
        u[picked[k]] = ZERO


@device
def find_end(u, least, table, bits, groups, threads, costs, orders, t):
    """Set orders[0] to the first least cost, in the order of s mod groups, then of s // groups.

    It is s // groups + 2^bits (s mod groups); -1 if no cost is below FLT_MAX.
    """
    last = (QK - 1) * groups
    smallest, order = FLT_MAX, -1
    for g in range(t, groups, threads):
        for e in range(1 << bits):
            cost = add(least[index(last + g)], branch(u, table[index(e * groups + g)]))
            if cost < smallest:
                smallest, order = cost, (g << bits) + e
    costs[t], orders[t] = smallest, order
    barrier()
    half = threads // 2
    while half > 0:
        if t < half:
            other, later = costs[t + half], orders[t + half]
            earlier = other == costs[t] and 0 <= later < orders[t]
            if other < costs[t] or earlier:
                costs[t], orders[t] = other, later
        barrier()
        half //= 2


@device
def cost_before(u, table, least, i, s, groups):
    """Return the cost of state s before step i."""
    if i == 0:
        return ZERO
    cost = add(least[index((i - 1) * groups + s % groups)], branch(u[i - 1], table[index(s)]))
    return cost if cost < FLT_MAX else FLT_MAX


@device
def predecessor(u, table, least, i, s, bits, groups):
    """Return the first predecessor of state s after step i that attains the least sum."""
    step = branch(u[i], table[index(s)])
    first = (s % groups) << bits
    best, smallest = first, FLT_MAX
    for j in range(1 << bits):
        cost = add(cost_before(u, table, least, i, first + j, groups), step)
        if cost < smallest:
            best, smallest = first + j, cost
    return best


@device
def store_scale(packed, base, norm, states, table):
    """Write scale and start of a walk; zeros for a zero block."""
    total = F64_ZERO
    for i in range(QK):
        wide = float64(table[index(states[i + 1])])
        total = add64(total, mul64(wide, wide))
    restored = float32(sqrt64(total))
    d = div(norm, restored) if restored > TINY else norm
    packed[index(base)] = fp16_bits(ZERO if norm < TINY else d)
    packed[index(base + 1)] = 0 if norm < TINY else states[0]


@device
def emitted(states, bits, prefix, k):
    """Return word k, of 16 bits, of the emissions: the upper bits of the states after the first."""
    word = 0
    for b in range(16):
        p = 16 * k + b
        word |= ((states[index(p // bits + 1)] >> (prefix + p % bits)) & 1) << b
    return word


# --- levels --------------------------------------------------------------------------------------


@cache
def levels_of(fields: Fields, bits: int, count: int):
    """Return what makes `levels`: those of states times scale, outliers in their places."""

    @cache
    def of(n: int):
        _, at_scale, *rest = fields.starts(n)
        at_pos, at_val = rest or (0, 0)
        number = fields.words(n) - 1

        @device
        def eight(first, words, v, at, table):
            d = fp16_value(take(words, at_scale, 16))
            place = np.int64(words[number]) * n
            for k in range(first, first + 8):
                level = mul(table[index(take(words, bits * (k + 1), 16))], d)
                value = ZERO if d == ZERO else level
                for c in range(count):
                    if take(words, at_pos + 8 * c, 8) == place + k:
                        value = fp16_value(take(words, at_val + 16 * c, 16))
                v[at + k] = value

        return by_eights(n, eight)

    return of


def port(codec: Trellis) -> Port:
    """Return the kernels of a trellis format."""
    bits, count, size = codec.bits, codec.outliers, codec.block_bytes
    _, pos, val = offsets(codec)
    outliers = ((pos, count), (val, 2 * count)) if count else ()
    fields = Fields(size, QK, ((2, bits),), ((0, 2), *outliers), overlap=2)
    table = np.array(code_table())
    encode = Kernel(
        encoder(codec),
        THREADS,
        QK,
        (FLOATS, FLOATS, FLOATS, FLOATS2, WORDS[2]),
        (table, side_by_side(table, bits)),
        scratch_bytes=4 * scratch_values(bits),
    )
    return Port(encode, fields, levels_of(fields, bits, count), table)
