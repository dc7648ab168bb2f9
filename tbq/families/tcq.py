"""turbo3_tcq, turbo2_tcq and turbo1_tcq of buun: keys and values coded by a trained trellis.

What it is
    128 values are rotated, and share a walk through a shift register of L bits. Each value shifts
    in K bits at the top, and the register's state selects its level from a trained table of 2^L, so
    any value can be decoded from the L bits of the stream that end with its own. The encoder finds
    the walk with the least squared error (exact Viterbi, open start). The decoder leaves it to the
    graph to rotate back.

    The tables (`tbq.families.tcq_tables`) were trained by spiritbuun, to whom credit is due. They
    were replaced several times; since 2026-06-25 keys and values have tables of their own. A block
    says neither which table wrote it nor on which side it stood.

Block, all fields little-endian
    offset 0   norm     float16 scale
    offset 2   qs       K = 3: L = 9, 49 bytes; K = 2: L = 8, 33 bytes; K = 1: L = 8, 17 bytes
               pad[1]   never written by the fork, 0 here
    qs is one bit string: the upper L - K bits of the state before the first value, then 128
    emissions of K bits, then zeros. State number t is its L bits from bit K*t on.

Rotation (k = fp32(0.08838834764831845), the signs s1 and s2 below)
    R(v) = (FWHT(v*s1)*k)*s2, butterflies of length 1, 2, ... 64; its inverse swaps s1 and s2.

Quantise (sums by halves: slot i += slot i + h for h = 64, 32, ... 1)
    1. n = sqrt(sum of x_j^2); i = 1/n if n > 1e-10, else 0; u = R(x*i).
    2. cost_0[s] = 0; cost_{t+1}[s] = m + d*d, where m is the least cost_t of the predecessors
       ((s mod 2^(L-K)) << K) + p and d = u_t - table[s]. Of equal predecessors the lowest p is
       taken.
    3. The walk ends in the state of least cost; of equal ones in the one with the least reversed
       upper bits (s >> 5), then the least reversed lower five: the order in which the lanes and
       warps of the fork's reduction keep their own.
    4. r = sqrt(sum of table[s_t]^2); norm = fp16(n/r) if r > 1e-10, else fp16(n).
    NaN and infinities make every u_t NaN; then no cost is less than another, and all bits of qs
    are 0. (The fork's code does the same by the text; no vector covers it.)

Dequantise
    y_t = table[s_t]*norm, rotated.
    Keys, where the fork decodes them to float16 in the original domain: (FWHT(c*s2)*k)*s1 of the
    table's c, then times norm; K = 1: of c*norm, not scaled again. Values, likewise to float16 but
    rotated: c*(norm*alpha), alpha a constant of the decoder that no block holds (DECODE_ALPHA).

Not reproduced
    A scale for each channel (InnerQ), another encode factor than 1, tables from files: all of them
    are off in the fork unless environment variables ask for them, and blocks do not tell.

Source
    spiritbuun/buun-llama-cpp, ggml/src/ggml-cuda/turbo-quant-cuda.cuh, set-rows.cu, fattn.cu, at
    1c4788192 (2026-05) and in the tree of 7939b6c47 (2026-07): CUDA code with IEEE operations. A
    build with -use_fast_math, which is the fork's own, can differ in ties and last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import ClassVar, Literal

import numpy as np

from tbq.codec import Codec, Domain, Layout, Stages
from tbq.families.tcq_tables import TABLES, values
from tbq.families.turbo import K128, S1, S2, R, Rotation
from tbq.numerics import fp16_bits, tree_sum, word_signs

QK = 128
SCALE = np.float32(K128)
TINY = np.float32(1e-10)
STATE_BITS = {3: 9, 2: 8, 1: 8}
# What the fork's decoder multiplies norms of V by, since 2026-06-25 (K = 1: since 2026-07-05).
DECODE_ALPHA = {3: np.float32(1.02), 2: np.float32(1.06), 1: np.float32(1.26)}
CHUNK = 1024  # blocks searched side by side, to bound the memory

# Bit i of the words is value i; 1 means -1.
BEFORE, AFTER = word_signs(S1), word_signs(S2)


@cache
def final_order(state_bits: int) -> np.ndarray:
    """Return the states in the order in which equal final costs are preferred."""
    upper = state_bits - 5
    states = range(1 << state_bits)
    return np.array(sorted(states, key=lambda s: (_reversed(s >> 5, upper), _reversed(s & 31, 5))))


def _reversed(value: int, bits: int) -> int:
    return int(f"{value:0{bits}b}"[::-1], 2)


def viterbi(u: np.ndarray, table: np.ndarray, bits: int, from_zero: bool = False) -> np.ndarray:
    """Return the states (n, 129) of the best walks for rotated values u (n, 128).

    They start anywhere; from_zero: in state 0, as no right kernel does.
    """
    n, groups = len(u), len(table) >> bits
    cost = np.zeros((n, len(table)), np.float32)
    cost[:, 1:] = np.inf if from_zero else 0
    chosen = np.zeros((QK, n, groups), np.uint8)
    for t in range(QK):
        before = cost.reshape(n, groups, -1)  # [block, g, p] for predecessor g*2^K + p
        chosen[t] = before.argmin(axis=-1)
        error = (u[:, t, None] - table).reshape(n, -1, groups)  # [block, e, g] for e*groups + g
        cost = (before.min(axis=-1)[:, None] + error * error).reshape(n, -1)
    order = final_order(len(table).bit_length() - 1)
    states = np.empty((n, QK + 1), np.int64)
    states[:, QK] = order[cost[:, order].argmin(axis=-1)]
    for t in reversed(range(QK)):
        group = states[:, t + 1] % groups
        states[:, t] = (group << bits) + chosen[t, np.arange(n), group]
    return states


def greedy(u: np.ndarray, table: np.ndarray, bits: int) -> np.ndarray:
    """Return the states (n, 129) of walks from state 0 that take the nearest level each time.

    Wrong kernels do this; for tables (2^L,) of any length.
    """
    groups = len(table) >> bits
    states = np.zeros((len(u), u.shape[1] + 1), np.int64)
    for t in range(u.shape[1]):
        reached = (states[:, t] >> bits)[:, None] + np.arange(1 << bits) * groups
        error = u[:, t, None] - table[reached]
        nearest = (error * error).argmin(axis=1)
        states[:, t + 1] = reached[np.arange(len(u)), nearest]
    return states


@dataclass(frozen=True)
class TrellisCoded(Codec):
    """turbo3_tcq, turbo2_tcq, turbo1_tcq.

    Attributes:
        bits: K, per emission: 3, 2 or 1.
        table: key of the table, see `tbq.families.tcq_tables`.
        rotation: R.
        walk_from: "any" state, or in kernels that are wrong "zero", or "zero, greedily": each
            step then takes the nearest level that it can reach.
    """

    bits: int
    table: str
    rotation: Rotation = R
    walk_from: Literal["any", "zero", "zero, greedily"] = "any"

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    rotation_values: ClassVar[int] = QK
    takes: ClassVar[Domain] = "original"
    gives: ClassVar[Domain] = "rotated"
    searches: ClassVar[bool] = True

    @cached_property
    def layout(self) -> Layout:
        """Scale, bit string, one byte that the fork does not write."""
        stream = (self.prefix_bits + QK * self.bits + 7) // 8
        fields = [("norm", "<f2"), ("qs", "u1", stream), ("pad", "u1", (1,))]
        return Layout(np.dtype(fields), scales=("norm",), padding=("pad",), unwritten=("pad",))

    @property
    def state_bits(self) -> int:
        """L, the bits of a state."""
        return STATE_BITS[self.bits]

    @property
    def prefix_bits(self) -> int:
        """L - K, the bits of the stream before the first emission."""
        return self.state_bits - self.bits

    @property
    def levels_of_states(self) -> np.ndarray:
        """The table, float32 (2^L,)."""
        return values(self.table)

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n,); the block index does not matter."""
        blocks = np.zeros(len(x), self.layout.dtype)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            with np.errstate(all="ignore"):
                norm, u = self._coordinates(x[part])
                states = self._walked(u)
                scale = self._scale(norm, states[:, 1:])
            blocks["qs"][part] = self._pack(states)
            blocks["norm"][part] = fp16_bits(scale).view(np.float16)
        return blocks

    def _walked(self, u: np.ndarray) -> np.ndarray:
        if self.walk_from == "zero, greedily":
            return greedy(u, self.levels_of_states, self.bits)
        return viterbi(u, self.levels_of_states, self.bits, self.walk_from == "zero")

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, rotated values and scale of float32 (n, 128)."""
        with np.errstate(all="ignore"):
            norm, u = self._coordinates(x)
            scale = self._scale(norm, self.walk(blocks))
        return Stages(norm, {"emissions": u}, {"norm": scale})

    def _coordinates(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        norm = np.sqrt(tree_sum(x * x))
        inverse = np.where(norm > TINY, np.float32(1) / norm, np.float32(0))
        return norm, self.rotate(x * inverse[:, None], None)

    def _scale(self, norm: np.ndarray, walk: np.ndarray) -> np.ndarray:
        level = self.levels_of_states[walk]
        r = np.sqrt(tree_sum(level * level))
        return np.where(r > TINY, norm / r, norm)

    def _pack(self, states: np.ndarray) -> np.ndarray:
        """Return the bit strings of walks (n, 129)."""
        prefix = states[:, :1] >> np.arange(self.bits, self.state_bits)
        emitted = states[:, 1:] >> self.prefix_bits
        codes = (emitted[..., None] >> np.arange(self.bits)).reshape(len(states), -1)
        bits = np.concatenate([prefix, codes], axis=1) & 1
        return np.packbits(bits.astype(np.uint8), axis=1, bitorder="little")

    def walk(self, blocks: np.ndarray) -> np.ndarray:
        """Return the states (n, 128) after each emission: windows of the bit string."""
        bits = np.unpackbits(blocks["qs"], axis=1, bitorder="little").astype(np.int64)
        first = self.bits * (np.arange(QK) + 1) - self.bits
        return sum(bits[:, first + j] << j for j in range(self.state_bits))

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 128), rotated."""
        return self.attention_values(blocks, np.float32(1))

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return what `dequantize` does: the decoder undoes no rotation."""
        return self.dequantize(blocks)

    def attention_values(self, blocks: np.ndarray, alpha: np.float32) -> np.ndarray:
        """Return the rotated values that attention reads before it rounds them to float16.

        alpha is the decoder's: DECODE_ALPHA for V, 1 for K.
        """
        with np.errstate(all="ignore"):
            norm = blocks["norm"].astype(np.float32) * alpha
            return self.levels_of_states[self.walk(blocks)] * norm[:, None]

    def restore(self, blocks: np.ndarray) -> np.ndarray:
        """Return values (n, 128) rotated back, in the order of operations of the fork's keys."""
        if self.bits == 1:
            return self.unrotate(self.dequantize(blocks), blocks)
        with np.errstate(all="ignore"):
            level = self.unrotate(self.levels_of_states[self.walk(blocks)], blocks)
            return level * blocks["norm"].astype(np.float32)[:, None]

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Rotate float32 (n, 128); no block matters."""
        with np.errstate(all="ignore"):
            return self.rotation.forward(x)

    def unrotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Undo `rotate`."""
        with np.errstate(all="ignore"):
            return self.rotation.inverse(x)

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the emissions of blocks (n,)."""
        emitted = self.walk(blocks) >> self.prefix_bits
        return {"emissions": (emitted.astype(np.uint8), 1 << self.bits)}

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find blocks (n,) with bits after the last emission."""
        used = (self.prefix_bits + QK * self.bits) % 8
        return {"padding bits that are not zero": blocks["qs"][:, -1] >> used != 0}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels with another table, that rotate wrongly, or find another walk."""
        mine = TABLES[self.table]
        others = [t for t in TABLES.values() if t.bits == self.bits and t is not mine]
        for other in reversed(others):
            same_date = other.date == mine.date
            bug = "the other side's table" if same_date else "another release's table"
            yield bug, other.key, replace(self, table=other.key)
        for bug, detail, rotation in self.rotation.wrong():
            yield bug, detail, replace(self, rotation=rotation)
        yield "walk from one state", "0", replace(self, walk_from="zero")
        bug = "greedy instead of a search"
        yield bug, "from state 0", replace(self, walk_from="zero, greedily")
