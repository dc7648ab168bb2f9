"""Kernels of `tbq.families.tcq`: one block after the other, its states side by side.

All states that share their predecessors differ by what they add to the least of their costs, so a
step takes the least of each group of 2^K costs, notes the first that attains it, and adds the
squared errors of all states to those minima. A value decodes from its own L bits of the stream.
"""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.tcq import AFTER, BEFORE, QK, SCALE, TINY, TrellisCoded, final_order
from tbq.families.turbo import R
from tbq.kernels.compile import jit
from tbq.kernels.numerics import load_fp16, store_fp16

ZERO, ONE = np.float32(0.0), np.float32(1.0)
HEAD = 2  # bytes of the norm


@jit
def tree_norm(v, terms):
    """Return the L2 norm of v (128,), summed by halves."""
    for i in range(QK):
        terms[i] = v[i] * v[i]
    half = QK // 2
    while half > 0:
        for i in range(half):
            terms[i] += terms[i + half]
        half //= 2
    return np.sqrt(terms[0])


@jit
def transform(v):
    """Walsh-Hadamard transform v (128,), unnormalised, lengths ascending."""
    length = 1
    while length < QK:
        for start in range(0, QK, 2 * length):
            for i in range(start, start + length):
                a, b = v[i], v[i + length]
                v[i], v[i + length] = a + b, a - b
        length *= 2


@jit
def rotate_block(v, first, second):
    """Rotate v (128,) in place: signs, transform, factor, signs."""
    for i in range(QK):
        v[i] *= first[i]
    transform(v)
    for i in range(QK):
        v[i] = v[i] * SCALE * second[i]


@jit
def rotate(x, first, second):
    """Rotate each row of x (n, 128) in place."""
    for row in x:
        rotate_block(row, first, second)


def _make_step(bits: int, state_bits: int):
    """Return one step of the search with its sizes as constants, so that its loops are vectors."""
    groups, fan = 1 << (state_bits - bits), 1 << bits

    @jit
    def step(value, table, spread, least, first, cost):
        """Set least and first (groups,), then spread[p, g], the cost of state g * fan + p."""
        for g in range(groups):
            least[g], first[g] = spread[g], np.int32(0)
        for p in range(1, fan):
            for g in range(groups):
                other = spread[p * groups + g]
                better = other < least[g]
                least[g] = other if better else least[g]
                first[g] = np.int32(p) if better else first[g]
        for e in range(fan):
            for g in range(groups):
                error = value - table[e * groups + g]
                cost[e * groups + g] = least[g] + error * error
        for p in range(fan):
            for g in range(groups):
                spread[p * groups + g] = cost[g * fan + p]

    return step


_step1, _step2, _step3 = _make_step(1, 8), _make_step(2, 8), _make_step(3, 9)


@jit
def search(u, table, bits, order, scratch, chosen, states):
    """Set states (129,) to the best walk for u (128,)."""
    cost, spread, least = scratch
    groups = least.size
    spread[:] = ZERO
    for t in range(QK):
        if bits == 1:
            _step1(u[t], table, spread, least, chosen[t], cost)
        elif bits == 2:
            _step2(u[t], table, spread, least, chosen[t], cost)
        else:
            _step3(u[t], table, spread, least, chosen[t], cost)
    last = order[0]
    for s in order:
        if cost[s] < cost[last]:
            last = s
    states[QK] = last
    for back in range(QK):
        t = QK - 1 - back
        g = states[t + 1] % groups
        states[t] = (g << bits) + chosen[t, g]


@jit
def store_walk(states, bits, prefix, block):
    """Write the upper bits of the first state, then the emissions."""
    word = np.uint64(states[0] >> bits)
    filled, at = prefix, HEAD
    for t in range(QK):
        word |= np.uint64(states[t + 1] >> prefix) << np.uint64(filled)
        filled += bits
        while filled >= 8:
            block[at] = np.uint8(word & np.uint64(0xFF))
            word >>= np.uint64(8)
            filled -= 8
            at += 1
    if filled > 0:
        block[at] = np.uint8(word & np.uint64(0xFF))


@jit
def encode(x, table, bits, prefix, order, first, second, packed):
    """Quantise x (n, 128) to packed (n, block_bytes)."""
    u, terms = np.empty(QK, np.float32), np.empty(QK, np.float32)
    states = np.empty(QK + 1, np.int64)
    groups = table.size >> bits
    cost, spread = np.empty(table.size, np.float32), np.empty(table.size, np.float32)
    scratch = (cost, spread, np.empty(groups, np.float32))
    chosen = np.empty((QK, groups), np.int32)
    for b in range(x.shape[0]):
        block = packed[b]
        block[:] = 0
        norm = tree_norm(x[b], terms)
        inverse = ONE / norm if norm > TINY else ZERO
        for i in range(QK):
            u[i] = x[b, i] * inverse
        rotate_block(u, first, second)
        search(u, table, bits, order, scratch, chosen, states)
        store_walk(states, bits, prefix, block)
        for t in range(QK):
            u[t] = table[states[t + 1]]
        restored = tree_norm(u, terms)
        store_fp16(norm / restored if restored > TINY else norm, block, 0)


def _make_decode(bits: int, state_bits: int):
    """Return the decoder of one width: eight values from one word."""
    n_bytes = (7 * bits + state_bits + 7) // 8
    mask = np.uint32((1 << state_bits) - 1)

    @jit
    def decode(packed, table, scaled, y):
        for b in range(packed.shape[0]):
            d = load_fp16(packed[b], 0) if scaled else ONE
            for g in range(QK // 8):
                word = np.uint32(0)
                for k in range(n_bytes):
                    word |= np.uint32(packed[b, HEAD + bits * g + k]) << np.uint32(8 * k)
                for i in range(8):
                    y[b, 8 * g + i] = table[(word >> np.uint32(bits * i)) & mask] * d

    return decode


DECODERS = {bits: _make_decode(bits, state) for bits, state in ((1, 8), (2, 8), (3, 9))}


@jit
def multiply_by_norms(packed, y):
    """Multiply each row of y (n, 128) by the norm of its block."""
    for b in range(packed.shape[0]):
        d = load_fp16(packed[b], 0)
        for i in range(QK):
            y[b, i] *= d


def kernels(codec: TrellisCoded) -> RowKernels:
    """Return the kernels of a trellis-coded turbo format."""
    if codec.rotation != R or codec.walk_from != "any":
        raise NotImplementedError("kernels rotate right and find the best walk; others are mutants")
    bits, size, table = codec.bits, codec.block_bytes, codec.levels_of_states
    order, decode = final_order(codec.state_bits), DECODERS[bits]

    def quantize(x, packed, first):
        groups, blocks = x.reshape(-1, QK), packed.reshape(-1, size)
        encode(groups, table, bits, codec.prefix_bits, order, BEFORE, AFTER, blocks)

    def dequantize(packed, y):
        decode(packed.reshape(-1, size), table, True, y.reshape(-1, QK))

    def restore(packed, y):
        blocks, groups = packed.reshape(-1, size), y.reshape(-1, QK)
        decode(blocks, table, bits == 1, groups)
        rotate(groups, AFTER, BEFORE)
        if bits > 1:
            multiply_by_norms(blocks, groups)

    def rotate_rows(x, blocks):
        rotate(x, BEFORE, AFTER)

    def unrotate_rows(x, blocks):
        rotate(x, AFTER, BEFORE)

    return RowKernels(quantize, dequantize, dequantize, rotate_rows, unrotate_rows, restore)
