"""vtq2_2 ... vtq4_2, vtq2_3 ... vtq4_3 and vtq3_v8 of llama-tq: trellis-coded values.

What it is
    128 rotated values share a walk through a 16-bit shift register. Each value shifts in K bits,
    and the register's state selects its level from a table of 65536 Gaussian quantiles, so any
    value can be decoded from the 16 bits of the stream that end with its own. The encoder finds
    the walk with the least squared error (exact Viterbi, open start). The types *_3 and v8 keep
    the 4 or 2 largest values as float16 outside the walk.

Block, all fields little-endian
    offset 0   d        float16 scale
    offset 2   start    uint16, the state before the first value
    offset 4   qs[16K]  128 K-bit emissions, number i at bit K*i of a little-endian bit string
               pos[n]   uint8 positions of the outliers, ascending; n = 4 (*_3), 2 (v8), 0 (*_2)
               val[n]   float16 outliers

Table (T) and step
    h = (s*0x9E3779B1 + 0x7F4A7C15) mod 2^32; p = ((h >> 1) + 0.5)/2^31 in double, clamped to
    [1e-12, 1 - 1e-12]; T[s] = f32(the inverse normal distribution at p by Acklam's approximation).
    code[s] = f32(T[s] * S), S = 1/sqrtf(128). Emitting e: s' = (s >> K) | (e << (16 - K)).

Quantise
    1. Types with outliers: pick the n largest |x|, an earlier position winning ties and NaN never
       picked; missing ones are position 0, value 0. Sort by position, store fp16(x), and go on with
       a copy in which the picked positions are 0.
    2. norm = f32(sqrt(sum of x_j^2)), products and sum in double. If norm < 1e-30: all 0.
    3. u_j = x_j * f32(1/norm).
    4. cost_0[s] = 0; cost_{i+1}[s'] = the least f32(cost_i[s] + f32(f32(u_i - code[s'])^2)) over
       the predecessors s = ((s' mod 2^(16-K)) << K) + j, the first j that attains it. Two
       predecessors of different cost can be equal after the addition; the first still wins.
    5. The walk ends in the first least cost_128[s], in the order of s mod 2^(16-K), then of
       s >> (16-K), and in state 0 if none is below FLT_MAX.
    6. rn = f32(sqrt(sum of code[s_i]^2)), products and sum in double, in order;
       d = fp16(norm/rn) if rn > 1e-30, else fp16(norm).

Dequantise
    y_i = (T[s_{i+1}] * S) * d, zeros if d == 0; then y[pos] = val, in stored order. A position of
    128 or more, which no encoder writes, makes C write out of bounds; here it is an error.

Source
    LL4nc33/llama-tq @ 0f57a4ee6: ggml/src/ggml-trellis.c, ggml-quants.c.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import ClassVar

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.codec import Codec, Domain, Layout, Stages
from tbq.families.tcq import greedy
from tbq.numerics import fp16_bits

QK = 128
STATES = 1 << 16
SCALE = np.float32(1.0) / np.sqrt(np.float32(128.0))
TINY = np.float32(1e-30)
FLT_MAX = np.finfo(np.float32).max

# Acklam's coefficients: central numerator and denominator, tail numerator and denominator.
ACKLAM_A = (
    -3.969683028665376e01,
    2.209460984245205e02,
    -2.759285104469687e02,
    1.383577518672690e02,
    -3.066479806614716e01,
    2.506628277459239e00,
)
ACKLAM_B = (
    -5.447609879822406e01,
    1.615858368580409e02,
    -1.556989798598866e02,
    6.680131188771972e01,
    -1.328068155288572e01,
    1.0,
)
ACKLAM_C = (
    -7.784894002430293e-03,
    -3.223964580411365e-01,
    -2.400758277161838e00,
    -2.549732539343734e00,
    4.374664141464968e00,
    2.938163982698783e00,
)
ACKLAM_D = (
    7.784695709041462e-03,
    3.224671290700398e-01,
    2.445134137142996e00,
    3.754408661907416e00,
    1.0,
)
ACKLAM_LOW = 0.02425


def _horner(coefficients: tuple[float, ...], x: float) -> float:
    total = coefficients[0]
    for c in coefficients[1:]:
        total = total * x + c
    return total


def _inverse_normal(p: float) -> float:
    """Acklam's approximation, in double, without a refinement step."""
    if p < ACKLAM_LOW:
        q = math.sqrt(-2.0 * math.log(p))
        return _horner(ACKLAM_C, q) / _horner(ACKLAM_D, q)
    if p > 1.0 - ACKLAM_LOW:
        q = math.sqrt(-2.0 * math.log(1.0 - p))
        return -_horner(ACKLAM_C, q) / _horner(ACKLAM_D, q)
    q = p - 0.5
    r = q * q
    return _horner(ACKLAM_A, r) * q / _horner(ACKLAM_B, r)


@cache
def code_table() -> np.ndarray:
    """Return code[s] = f32(T[s] * S) for all 65536 states, read-only."""
    table = np.empty(STATES, np.float32)
    for s in range(STATES):
        h = (s * 0x9E3779B1 + 0x7F4A7C15) & 0xFFFFFFFF
        p = ((h >> 1) + 0.5) / 2147483648.0
        table[s] = _inverse_normal(min(max(p, 1e-12), 1.0 - 1e-12))
    table *= SCALE
    table.setflags(write=False)
    return table


def viterbi(u: np.ndarray, bits: int) -> np.ndarray:
    """Return the states (129,) of the best walk for normalised values u (128,)."""
    code = code_table()
    groups = STATES >> bits
    cost = np.zeros(STATES, np.float32)
    chosen = np.zeros((QK, STATES), np.uint8)
    for i in range(QK):
        branch = ((u[i] - code) * (u[i] - code)).reshape(-1, groups)  # [e, g] for s' = e*groups + g
        total = cost.reshape(groups, -1) + branch[..., None]  # [e, g, j]
        total = np.where(total < FLT_MAX, total, FLT_MAX)
        chosen[i] = total.argmin(axis=-1).reshape(-1)
        cost = total.min(axis=-1).reshape(-1)
    in_list_order = cost.reshape(-1, groups).T
    best = int(in_list_order.argmin())
    states = np.empty(QK + 1, np.int64)
    states[QK] = (best & ((1 << bits) - 1)) * groups + (best >> bits)
    for i in reversed(range(QK)):
        states[i] = ((states[i + 1] % groups) << bits) + chosen[i, states[i + 1]]
    return states


def pick_outliers(x: np.ndarray, count: int) -> list[int]:
    """Return the positions of the `count` largest |x| in ascending order; 0 for missing ones."""
    picked: list[int] = []
    for _ in range(count):
        best, largest = -1, np.float32(-1)
        for j in range(QK):
            if j not in picked and np.abs(x[j]) > largest:
                best, largest = j, np.abs(x[j])
        if best < 0:
            break
        picked.append(best)
    return sorted(picked)


@dataclass(frozen=True)
class Trellis(Codec):
    """vtq*_2, vtq*_3 and vtq3_v8.

    Attributes:
        bits: K, per emission.
        outliers: how many values are kept outside the walk.
        restored: whether the decoder puts them back; always, but in kernels that are wrong.
        greedy: likewise whether each step takes the nearest level that it can reach from state 0.
    """

    bits: int
    outliers: int = 0
    restored: bool = True
    greedy: bool = False

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    takes: ClassVar[Domain] = "rotated"
    gives: ClassVar[Domain] = "rotated"
    searches: ClassVar[bool] = True

    @property
    def slow(self) -> bool:
        """Whether it searches through all states."""
        return not self.greedy

    @cached_property
    def layout(self) -> Layout:
        """Scale, start of the walk, emissions, outliers."""
        fields = [("d", "<f2"), ("start", "<u2"), ("qs", "u1", QK * self.bits // 8)]
        if not self.outliers:
            return Layout(np.dtype(fields), state="start")
        fields += [("pos", "u1", self.outliers), ("val", "<f2", self.outliers)]
        return Layout(np.dtype(fields), state="start", outliers=("pos", "val"))

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n,); the block index does not matter."""
        blocks = np.zeros(len(x), self.layout.dtype)
        for block, row in zip(blocks, x.copy(), strict=True):
            if self.outliers:
                picked = pick_outliers(row, self.outliers)
                block["pos"][: len(picked)] = picked
                block["val"][: len(picked)] = fp16_bits(row[picked]).view(np.float16)
                row[picked] = 0
            with np.errstate(all="ignore"):
                norm = _norm(row)
                if norm < TINY:
                    continue
                states = self._walked(row * (np.float32(1) / norm))
                rn = _norm(code_table()[states[1:]])
                d = norm / rn if rn > TINY else norm
            block["start"] = states[0]
            block["qs"] = pack(states[1:] >> (16 - self.bits), self.bits)
            block["d"] = fp16_bits(d).view(np.float16)
        return blocks

    def _walked(self, u: np.ndarray) -> np.ndarray:
        if self.greedy:
            return greedy(u[None], code_table(), self.bits)[0]
        return viterbi(u, self.bits)

    def walk(self, blocks: np.ndarray) -> np.ndarray:
        """Return the states (n, 128) after each emission: 16-bit windows of the stream."""
        start = blocks["start"].astype("<u2").view(np.uint8).reshape(-1, 2)
        stream = np.concatenate([start, blocks["qs"]], axis=1)
        first_bit = self.bits * (np.arange(QK) + 1)
        padded = np.pad(stream, ((0, 0), (0, 2))).astype(np.uint32)
        byte = first_bit // 8
        window = padded[:, byte] | padded[:, byte + 1] << 8 | padded[:, byte + 2] << 16
        return (window >> (first_bit % 8).astype(np.uint32)) & 0xFFFF

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, normalised values and scale of float32 (n, 128)."""
        rest = x.copy()
        for row in rest if self.outliers else ():
            row[pick_outliers(row, self.outliers)] = 0
        with np.errstate(all="ignore"):
            norm, rn = _norm(rest), _norm(code_table()[self.walk(blocks)])
            scale = np.where(rn > TINY, norm / rn, norm)
            u = rest * (np.float32(1) / norm)[:, None]
        return Stages(norm, {"emissions": u}, {"d": np.where(norm < TINY, np.float32(0), scale)})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 128)."""
        with np.errstate(all="ignore"):
            d = blocks["d"].astype(np.float32)[:, None]
            y = np.where(d == 0, np.float32(0), code_table()[self.walk(blocks)] * d)
            for k in range(self.outliers if self.restored else 0):
                y[np.arange(len(y)), blocks["pos"][:, k]] = blocks["val"][:, k].astype(np.float32)
        return y

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the emissions of blocks (n,)."""
        return {"emissions": (unpack(blocks["qs"], self.bits), 1 << self.bits)}

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find blocks (n,) whose outliers are out of bounds or out of order."""
        if not self.outliers:
            return {}
        pos = blocks["pos"].astype(np.int16)
        missing = pos[:, 1:] == 0  # fewer outliers than slots: position 0 fills up
        unordered = ((pos[:, 1:] <= pos[:, :-1]) & ~missing).any(axis=-1)
        return {
            "outliers beyond the block": (pos >= QK).any(axis=-1),
            "outliers out of order": unordered,
        }

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that decode the walk alone, or do not search for it."""
        yield "greedy instead of a search", "from state 0", replace(self, greedy=True)
        if self.outliers:
            yield "outliers left out", "", replace(self, restored=False)


def _norm(values: np.ndarray) -> np.ndarray:
    """Return f32(sqrt(sum of squares)) over the last axis, products and sum in double, in order."""
    total = (values.astype(np.float64) ** 2).cumsum(axis=-1)[..., -1]
    return np.sqrt(total).astype(np.float32)
