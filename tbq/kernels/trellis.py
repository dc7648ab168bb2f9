"""Numba kernels of `tbq.families.trellis`: an exact Viterbi search at a fraction of the work.

Write P = 2^K and G = 2^(16-K). The P successors of a state share their P predecessors, a group of
consecutive states, so the 65536 states of a step have only G groups of predecessors.

Why the search is exact. C computes cost'[s'] = min over j of f32(cost[j] + t(s')), t the branch
cost of s'. Rounding is monotone, so this minimum equals f32(m + t(s')) with m = min over j of
cost[j]: the forward pass needs nothing but the minimum of each group, G floats per step, and never
the identity of the predecessor. Only the walk that wins needs those, 128 of them. The backward pass
takes them one at a time by C's own rule, the first j below all earlier f32(cost[j] + t(s')), which
is where two predecessors of different cost can tie after rounding. The costs it compares are
recomputed from the stored minima with the very operations of the forward pass. Minima are kept for
every second step and recomputed in between, 4.2 MB at K = 2. Costs that are NaN or not below
FLT_MAX never win, as in C, and leave predecessor 0.

The decoder reads each state as a 16-bit window of the stream; no value waits for another.
"""

from __future__ import annotations

import threading
from functools import cache

import numpy as np

from tbq.codec import RowKernels
from tbq.families.trellis import (
    FLT_MAX,
    QK,
    STATES,
    TINY,
    Trellis,
    code_table,
)
from tbq.kernels.compile import jit
from tbq.kernels.numerics import corrected_scale, load_fp16, store_fp16
from tbq.kernels.transpose import SIDE, transpose4, transpose8

ONE = np.float32(1.0)
HEAD = 4  # bytes of d and start

# The search reads 2P streams at once. Without these paddings (in floats) their distances would be
# multiples of 4 KiB, all streams would fall into one set of the L1 cache and evict each other.
CODE_PAD, MINIMA_PAD = 80, 16


def _make_step(bits: int):
    """Return the two halves of a step of the search with K as a constant, so that loops unroll."""
    fan, groups = 1 << bits, STATES >> bits
    heads = groups // fan  # groups whose states share their top K bits
    code_stride, stride = groups + CODE_PAD, heads + MINIMA_PAD
    width = 256

    @jit
    def minimise(u, by_branch, spread, minima):
        for chunk in range(0, heads, width):  # which stays in the L1 cache for all values of top
            for top in range(fan):
                first = top * heads + chunk
                for h in range(width):
                    least = FLT_MAX
                    for j in range(fan):
                        error = u - by_branch[j * code_stride + first + h]
                        cost = spread[j * stride + chunk + h] + error * error
                        least = cost if cost < least else least
                    minima[first + h] = least

    @jit
    def reorder(minima, spread):
        for h in range(0, heads, SIDE):
            if fan == 4:
                transpose4(minima, h * fan, fan, spread, h, stride)
            else:
                for j in range(0, fan, SIDE):
                    transpose8(minima, h * fan + j, fan, spread, j * stride + h, stride)

    return minimise, reorder


_minimise2, _reorder2 = _make_step(2)
_minimise3, _reorder3 = _make_step(3)
_minimise4, _reorder4 = _make_step(4)


@jit
def step(u, by_branch, bits, spread, minima):
    """Set minima (G,) to the least cost of each group after u.

    by_branch holds code[g*P + j] as [j, g], spread the minimum of group h*P + j as [j, h], both
    flat and padded: before the call that of the step before, after it that of this one. Every
    access of the loop is then contiguous over g and h.
    """
    if bits == 2:
        _minimise2(u, by_branch, spread, minima)
        _reorder2(minima, spread)
    elif bits == 3:
        _minimise3(u, by_branch, spread, minima)
        _reorder3(minima, spread)
    else:
        _minimise4(u, by_branch, spread, minima)
        _reorder4(minima, spread)


@jit
def branch(u, code, s):
    """Return the branch cost of entering state s with value u."""
    error = u - code[s]
    return error * error


@jit
def group_minimum(u, code, minima, bits, g):
    """Return the least cost of group g after the step of u, from the minima (G,) before it."""
    least = FLT_MAX
    for s in range(g << bits, (g + 1) << bits):
        cost = minima[s % minima.size] + branch(u, code, s)
        least = cost if cost < least else least
    return least


@jit
def group_costs(i, u, code, kept, bits, g, costs):
    """Set costs (P,) to cost_i of the states of group g; kept[k] holds the minima at step 2k."""
    for j in range(costs.size):
        s = (g << bits) + j
        m = s % kept.shape[1]
        if i == 0:
            costs[j] = np.float32(0.0)
            continue
        if i % 2:
            minimum = kept[i // 2, m]
        else:
            minimum = group_minimum(u[i - 2], code, kept[i // 2 - 1], bits, m)
        cost = minimum + branch(u[i - 1], code, s)
        costs[j] = cost if cost < FLT_MAX else FLT_MAX


@jit
def first_best(costs, t):
    """Return the first j below all earlier f32(costs[j] + t), as C picks a predecessor."""
    best, choice = FLT_MAX, 0
    for j in range(costs.size):
        cost = costs[j] + t
        if cost < best:
            best, choice = cost, j
    return choice


@jit
def last_state(u, code, minima, bits, least):
    """Return the first least state in the order of C's list: low bits first, then the top K.

    least (G,) is scratch.
    """
    least[:] = FLT_MAX
    for top in range(1 << bits):
        for g in range(minima.size):
            cost = minima[g] + branch(u, code, top * minima.size + g)
            least[g] = cost if cost < least[g] else least[g]
    best, low = FLT_MAX, 0
    for g in range(minima.size):
        if least[g] < best:
            best, low = least[g], g
    for top in range(1 << bits):
        s = top * minima.size + low
        if minima[low] + branch(u, code, s) == best:
            return s
    return 0  # no cost was below FLT_MAX


@jit
def search(u, code, by_branch, bits, scratch, states):
    """Set states (129,) to the best walk for u (128,); scratch is what `make_scratch` returns.

    kept[k] receives the group minima at step 2k; those of odd steps pass through `odd`.
    """
    kept, odd, spread = scratch
    spread[:] = np.float32(0.0)
    kept[0] = np.float32(0.0)
    for i in range(QK - 1):
        after = kept[(i + 1) // 2] if i % 2 else odd
        step(u[i], by_branch, bits, spread, after)
    states[QK] = last_state(u[QK - 1], code, odd, bits, spread)
    costs = np.empty(1 << bits, np.float32)
    for i in range(QK - 1, -1, -1):
        s = states[i + 1]
        g = s % odd.size
        group_costs(i, u, code, kept, bits, g, costs)
        states[i] = (g << bits) + first_best(costs, branch(u[i], code, s))


@cache
def _by_branch(bits: int) -> np.ndarray:
    """Return the code table as the search reads it: [j, g] = code[g*P + j], padded and flat."""
    table = np.pad(code_table().reshape(-1, 1 << bits).T, ((0, 0), (0, CODE_PAD))).reshape(-1)
    table.setflags(write=False)
    return table


def make_scratch(bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the arrays that one search writes to: kept minima, odd minima, spread minima."""
    fan, groups = 1 << bits, STATES >> bits
    spread = np.empty(fan * (groups // fan + MINIMA_PAD), np.float32)
    return np.empty((QK // 2, groups), np.float32), np.empty(groups, np.float32), spread


class _Scratch(threading.local):
    """The scratch of each thread, kept between calls, so that its pages are touched only once."""

    def __init__(self) -> None:
        self.by_bits: dict[int, tuple[np.ndarray, ...]] = {}

    def get(self, bits: int) -> tuple[np.ndarray, ...]:
        if bits not in self.by_bits:
            self.by_bits[bits] = make_scratch(bits)
        return self.by_bits[bits]


_scratch = _Scratch()


@jit
def _sort(places):
    """Sort a few numbers by insertion: NumPy's sort takes a second to compile."""
    for k in range(1, places.size):
        own, i = places[k], k
        while i > 0 and places[i - 1] > own:
            places[i] = places[i - 1]
            i -= 1
        places[i] = own


@jit
def pick_outliers(x, picked):
    """Set picked (n,) to the ascending positions of the largest |x| and return how many."""
    found = 0
    for _ in range(picked.size):
        best, largest = -1, np.float32(-1.0)
        for j in range(QK):
            taken = False
            for k in range(found):
                taken = taken or picked[k] == j
            if not taken and abs(x[j]) > largest:
                best, largest = j, abs(x[j])
        if best < 0:
            break
        picked[found] = best
        found += 1
    _sort(picked[:found])
    return found


@jit
def _norm(x):
    """Return f32(sqrt(sum of x^2)), summed in double."""
    total = np.float64(0.0)
    for j in range(x.size):
        total += np.float64(x[j]) * np.float64(x[j])
    return np.float32(np.sqrt(total))


@jit
def _extract_outliers(x, at, picked, block):
    """Move the largest values of x (128,) to the block's fields at `at`, leaving zeros."""
    n = picked.size
    for k in range(pick_outliers(x, picked)):
        position = picked[k]
        block[at + k] = np.uint8(position)
        store_fp16(x[position], block, at + n + 2 * k)
        x[position] = np.float32(0.0)


@jit
def _store_walk(states, code, norm, bits, block):
    """Write scale, start and emissions of a walk."""
    block[2], block[3] = np.uint8(states[0] & 0xFF), np.uint8(states[0] >> 8)
    total = np.float64(0.0)
    for i in range(QK):
        level = np.float64(code[states[i + 1]])
        total += level * level
        bit = bits * i
        word = (states[i + 1] >> (16 - bits)) << (bit & 7)
        block[HEAD + (bit >> 3)] |= np.uint8(word & 0xFF)
        if word > 0xFF:
            block[HEAD + (bit >> 3) + 1] |= np.uint8(word >> 8)
    store_fp16(corrected_scale(norm, np.float32(np.sqrt(total))), block, 0)


@jit
def _quantize(x, code, by_branch, bits, count, scratch, packed):
    """Quantise x (n, 128) to packed (n, block_bytes)."""
    u = np.empty(QK, np.float32)
    states = np.empty(QK + 1, np.int64)
    picked = np.empty(count, np.int64)
    for b in range(x.shape[0]):
        block = packed[b]
        block[:] = 0
        for j in range(QK):
            u[j] = x[b, j]
        if count:
            _extract_outliers(u, HEAD + QK * bits // 8, picked, block)
        norm = _norm(u)
        if norm < TINY:
            continue
        inverse = ONE / norm
        for j in range(QK):
            u[j] *= inverse
        search(u, code, by_branch, bits, scratch, states)
        _store_walk(states, code, norm, bits, block)


def _reader(bits: int):
    """Return the loop over a block's windows, with bits as a constant: it unrolls."""

    @jit
    def read(block, code, d, out):
        # Eight emissions fill K bytes: the window of number k ends K*(k+1) bits further on.
        for group in range(QK // 8):
            stream = np.uint64(0)
            for k in range(2 + bits):
                stream |= np.uint64(block[2 + bits * group + k]) << np.uint64(8 * k)
            for k in range(8):
                state = (stream >> np.uint64(bits * (k + 1))) & np.uint64(0xFFFF)
                out[8 * group + k] = code[state] * d

    return read


_read2, _read3, _read4 = (_reader(bits) for bits in (2, 3, 4))


@jit
def _dequantize(packed, code, bits, count, y):
    """Dequantise packed (n, block_bytes) to y (n, 128); return the first corrupt block, or -1."""
    at = HEAD + QK * bits // 8
    corrupt = -1
    for b in range(packed.shape[0]):
        block, out = packed[b], y[b]
        d = load_fp16(block, 0)
        if d == np.float32(0.0):
            out[:] = np.float32(0.0)
        elif bits == 2:
            _read2(block, code, d, out)
        elif bits == 3:
            _read3(block, code, d, out)
        else:
            _read4(block, code, d, out)
        for k in range(count):
            if block[at + k] < QK:
                out[block[at + k]] = load_fp16(block, at + count + 2 * k)
            elif corrupt < 0:
                corrupt = b
    return corrupt


def kernels(codec: Trellis) -> RowKernels:
    """Return the kernels of a trellis format."""
    bits, count, size = codec.bits, codec.outliers, codec.block_bytes
    code = code_table()

    def quantize(x, packed, first):
        tables = (code, _by_branch(bits), bits, count, _scratch.get(bits))
        _quantize(x.reshape(-1, QK), *tables, packed.reshape(-1, size))

    def dequantize(packed, y):
        return _dequantize(packed.reshape(-1, size), code, bits, count, y.reshape(-1, QK))

    return RowKernels(quantize, dequantize, dequantize)
