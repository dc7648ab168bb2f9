"""turbo3_tcq, turbo2_tcq and turbo1_tcq: a warp per block searches, any value decodes alone.

The arithmetic is that of `tbq.families.tcq`. The states of a step are shared out by their
predecessors: who has a group of 2^K states finds the least of their costs, notes the first that
attains it, and adds the squared errors of the 2^K states that follow. One thread does what comes
before and after the search.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32, int32, uint8

from cuda_port.device import (
    ZERO,
    add,
    barrier,
    device,
    load_bits,
    load_fp16,
    mul,
    sqrt,
    store_fp16,
)
from cuda_port.groups import (
    TREE,
    corrected,
    hadamard,
    inverse_norm,
    load_and_measure,
    scale,
    total_of_squares,
)
from cuda_port.port import BYTES, FLOATS, INTS, Kernel, Port
from tbq.families.tcq import AFTER, BEFORE, QK, SCALE, TINY, TrellisCoded, final_order

THREADS = 32
WALK = QK + 1  # states of a walk; shared arrays need their sizes as constants
HEAD = 2  # bytes of the norm


@cache
def encoder(bits: int, state_bits: int, size: int):
    """Return the kernel (x, levels, order, before, after, packed): flat float32 to flat uint8."""
    states_of_step, groups = 1 << state_bits, 1 << (state_bits - bits)
    choices = QK * groups

    @cuda.jit
    def encode(x, levels, order, before, after, packed):
        u = cuda.shared.array(QK, float32)
        table = cuda.shared.array(states_of_step, float32)
        cost = cuda.shared.array((2, states_of_step), float32)
        chosen = cuda.shared.array(choices, uint8)
        states = cuda.shared.array(WALK, int32)
        t, block = cuda.threadIdx.x, cuda.blockIdx.x
        base, norm = block * size, ZERO
        if t == 0:
            norm = load_and_measure(x, block * QK, QK, TREE, u)
            scale(u, QK, inverse_norm(norm, TINY))
            hadamard(u, QK, before, after)
        for s in range(t, states_of_step, THREADS):
            cost[0, s], table[s] = ZERO, levels[s]
        barrier()
        for i in range(QK):
            old, new = cost[i % 2], cost[(i + 1) % 2]
            for g in range(t, groups, THREADS):
                least, first = old[g << bits], 0
                for p in range(1, 1 << bits):
                    other = old[(g << bits) + p]
                    if other < least:
                        least, first = other, p
                chosen[i * groups + g] = first
                for s in range(g, states_of_step, groups):
                    error = add(u[i], -table[s])
                    new[s] = add(least, mul(error, error))
            barrier()
        if t == 0:
            last = order[0]  # of equal costs that of the first state in this order
            for k in range(states_of_step):
                if cost[QK % 2, order[k]] < cost[QK % 2, last]:
                    last = order[k]
            states[QK] = last
            for back in range(QK):
                i = QK - 1 - back
                u[i] = table[states[i + 1]]
                g = states[i + 1] % groups
                states[i] = (g << bits) + chosen[i * groups + g]
            norm = corrected(norm, sqrt(total_of_squares(u, QK, TREE)))
            store_fp16(norm, packed, base)
        barrier()
        for k in range(t, size - HEAD, THREADS):
            packed[base + HEAD + k] = walk_byte(states, bits, state_bits - bits, k)

    return encode


@device
def walk_byte(states, bits, prefix, k):
    """Return byte k of the upper bits of the first state, the emissions of all others and zeros."""
    byte = 0
    for b in range(8):
        p = 8 * k + b
        if p < prefix:
            byte |= ((states[0] >> (bits + p)) & 1) << b
        elif p < prefix + QK * bits:
            p -= prefix
            byte |= ((states[p // bits + 1] >> (prefix + p % bits)) & 1) << b
    return byte


@cache
def level_at(bits: int, state_bits: int):
    """Return the device function (packed, base, i, table): the level of state i + 1 times norm."""

    @device
    def level(packed, base, i, table):
        state = load_bits(packed, base + HEAD, bits * i, state_bits)
        return mul(table[state], load_fp16(packed, base))

    return level


def port(codec: TrellisCoded) -> Port | None:
    """Return the kernels of a trellis-coded turbo format; None for wrong kernels."""
    if codec != TrellisCoded(codec.bits, codec.table):
        return None
    bits, table = codec.bits, codec.levels_of_states
    order = final_order(codec.state_bits).astype(np.int32)
    function = encoder(bits, codec.state_bits, codec.block_bytes)
    types = (FLOATS, FLOATS, INTS, FLOATS, FLOATS, BYTES)
    encode = Kernel(function, THREADS, QK, types, (table, order, BEFORE, AFTER * SCALE))
    return Port(encode, level_at(bits, codec.state_bits), table)
