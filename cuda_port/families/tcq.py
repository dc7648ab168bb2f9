"""turbo3_tcq, turbo2_tcq and turbo1_tcq: a warp per block searches, any value decodes alone.

The arithmetic is that of `tbq.families.tcq`. The states of a step are shared out by their
predecessors: who has a group of 2^K states finds the least of their costs, notes the first that
attains it, and adds the squared errors of the 2^K states that follow. Norms, of which the sums are
trees, and the transform are shared out too; one thread retraces the walk.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32, int32, uint8

from cuda_port import kernels
from cuda_port.cells import corrected
from cuda_port.device import (
    ZERO,
    add,
    barrier,
    block,
    device,
    fp16_bits,
    fp16_value,
    index,
    mul,
    sqrt,
    take,
    thread,
)
from cuda_port.fields import Fields
from cuda_port.groups import hadamard, inverse_norm
from cuda_port.port import FLOATS, INTS, WORDS, Kernel, Port
from cuda_port.unroll import by_eights
from tbq.families.tcq import AFTER, BEFORE, QK, SCALE, TINY, TrellisCoded, final_order

THREADS = 32
WALK = QK + 1  # states of a walk; shared arrays need their sizes as constants
HEAD = 2  # bytes of the norm


# --- what all threads of a block do together -----------------------------------------------------


@device
def tree_norm(u, squares, t):
    """Return the L2 norm of u[:128], added as a tree; squares: room for as many."""
    for j in range(t, QK, THREADS):
        squares[index(j)] = mul(u[index(j)], u[index(j)])
    half = QK // 2
    while half > 0:
        barrier()
        for j in range(t, half, THREADS):
            squares[index(j)] = add(squares[index(j)], squares[index(j + half)])
        half //= 2
    barrier()
    return sqrt(squares[0])


@device
def transform(u, t):
    """Transform u[:128]; it is whole after each of the barriers."""
    length = 1
    while length < QK:
        barrier()
        for i in range(t, QK // 2, THREADS):
            j = 2 * i - i % length
            a, b = u[index(j)], u[index(j + length)]
            u[index(j)] = add(a, b)
            u[index(j + length)] = add(a, -b)
        length *= 2
    barrier()


@device
def search(i, u, table, old, new, chosen, groups, bits, t):
    """Do step i of the search: costs of all states from those before."""
    for g in range(t, groups, THREADS):
        least, first = old[index(g << bits)], 0
        for p in range(1, 1 << bits):
            other = old[index((g << bits) + p)]
            if other < least:
                least, first = other, p
        chosen[index(i * groups + g)] = first
        for e in range(1 << bits):
            s = e * groups + g
            error = add(u, -table[index(s)])
            new[index(s)] = add(least, mul(error, error))


@device
def find_last(cost, order, states, costs, places, t):
    """Set places[0] to where in `order` the first least cost is."""
    least, place = cost[index(order[index(t)])], t
    for k in range(t, states, THREADS):
        other = cost[index(order[index(k)])]
        if other < least:
            least, place = other, k
    costs[t], places[t] = least, place
    barrier()
    half = THREADS // 2
    while half > 0:
        if t < half:
            other, later = costs[t + half], places[t + half]
            if other < costs[t] or (other == costs[t] and later < places[t]):
                costs[t], places[t] = other, later
        barrier()
        half //= 2


@cache
def encoder(bits: int, state_bits: int, size: int):
    """Return the kernel (x, levels, order, before, after, packed): flat float32 to flat uint16."""
    states_of_step, groups = 1 << state_bits, 1 << (state_bits - bits)
    choices = QK * groups

    @cuda.jit
    def encode(x, levels, order, before, after, packed):
        u = cuda.shared.array(QK, float32)
        squares = cuda.shared.array(QK, float32)
        table = cuda.shared.array(states_of_step, float32)
        even = cuda.shared.array(states_of_step, float32)
        odd = cuda.shared.array(states_of_step, float32)
        chosen = cuda.shared.array(choices, uint8)
        states = cuda.shared.array(WALK, int32)
        costs = cuda.shared.array(THREADS, float32)
        places = cuda.shared.array(THREADS, int32)
        t, number = thread(), block()
        for j in range(t, QK, THREADS):
            u[index(j)] = x[index(number * QK + j)]
        for s in range(t, states_of_step, THREADS):
            even[index(s)] = ZERO
            table[index(s)] = levels[index(s)]
        norm = tree_norm(u, squares, t)
        inverse = inverse_norm(norm, TINY)
        for j in range(t, QK, THREADS):
            u[index(j)] = mul(mul(u[index(j)], inverse), before[index(j)])
        transform(u, t)
        for j in range(t, QK, THREADS):
            u[index(j)] = mul(u[index(j)], after[index(j)])
        barrier()
        for i in range(0, QK, 2):
            search(i, u[index(i)], table, even, odd, chosen, groups, bits, t)
            barrier()
            search(i + 1, u[index(i + 1)], table, odd, even, chosen, groups, bits, t)
            barrier()
        find_last(even, order, states_of_step, costs, places, t)
        if t == 0:
            states[QK] = order[index(places[0])]
            for back in range(QK):
                i = QK - 1 - back
                g = states[index(i + 1)] % groups
                states[index(i)] = (g << bits) + chosen[index(i * groups + g)]
        barrier()
        for j in range(t, QK, THREADS):
            u[index(j)] = table[index(states[index(j + 1)])]
        barrier()
        restored = tree_norm(u, squares, t)
        base = number * (size // 2)
        if t == 0:
            packed[index(base)] = fp16_bits(corrected(norm, restored, TINY))
        for k in range(t, (size - HEAD) // 2, THREADS):
            packed[index(base + 1 + k)] = walk_word(states, bits, state_bits - bits, k)

    return encode


@device
def walk_word(states, bits, prefix, k):
    """Return 16 bits of: the first state's upper bits, the emissions of the others, zeros."""
    word = 0
    for b in range(16):
        p = 16 * k + b
        if p < prefix:
            word |= ((states[0] >> (bits + p)) & 1) << b
        elif p < prefix + QK * bits:
            p -= prefix
            word |= ((states[index(p // bits + 1)] >> (prefix + p % bits)) & 1) << b
    return word


@cache
def levels_of(fields: Fields, bits: int, state_bits: int):
    """Return what makes `levels`: that of state i + 1 times norm."""

    @cache
    def of(n: int):
        at_norm = fields.starts(n)[-1]

        @device
        def eight(first, words, v, at, table):
            d = fp16_value(take(words, at_norm, 16))
            for k in range(first, first + 8):
                v[at + k] = mul(table[index(take(words, bits * k, state_bits))], d)

        return by_eights(n, eight)

    return of


def port(codec: TrellisCoded) -> Port | None:
    """Return the kernels of a trellis-coded turbo format; None for wrong kernels."""
    if codec != TrellisCoded(codec.bits, codec.table):
        return None
    bits, table, size = codec.bits, codec.levels_of_states, codec.block_bytes
    order, after = final_order(codec.state_bits).astype(np.int32), AFTER * SCALE
    types = (FLOATS, FLOATS, INTS, FLOATS, FLOATS, WORDS[2])
    function = encoder(bits, codec.state_bits, size)
    fields = Fields(size, QK, ((HEAD, bits),), ((0, HEAD),), overlap=2)
    return Port(
        Kernel(function, THREADS, QK, types, (table, order, BEFORE, after), turns=0),
        fields,
        levels_of(fields, bits, codec.state_bits),
        table,
        rotate=kernels.rotator(QK, hadamard(BEFORE, after)),
    )
