"""q6_0 and q8_KV of ik_llama.cpp: steps of one scale, with nothing rotated.

What it is
    q6_0: 32 values share a scale that the value of largest magnitude sets and a weighted least
    square refines. q8_KV: a whole row shares one scale, which stands in front of it with the sum
    of the codes; the row is that of all heads of one token.

Block, all fields little-endian
    q6_0
        offset 0    d       float16
        offset 2    qh      8 bytes: the high two bits of four codes each, see below
        offset 10   qs      16 bytes: the low nibbles of codes j and j + 16
    q8_KV, a row of n values
        offset 0    d       float32
        offset 4    sum     int32, of the codes
        offset 8    qs      n bytes, int8

Quantise, q6_0
    1. m = the value of largest magnitude with its sign, the first of equal ones, NaN left out.
       s = m / -32; i = 1/s, or 0 if s is 0.
    2. a_j = x_j * i; code_j = a_j + 32.5 without its fraction, at most 63; 0 if that is no number.
    3. p_j = code_j - 32, w_j = a_j * a_j. Over j = 0 to 15, the two terms added first:
       u += (w_j x_j) p_j + (w_k x_k) p_k and v += (w_j p_j) p_j + (w_k p_k) p_k, k = j + 16.
       d = fp16(u / v) if v > 0, else fp16(s).
    4. qs[j] = low nibble of code j, low nibble of code j + 16. The high bits of both, h = high_j +
       4 high_k, are the low nibble of qh[j] for j < 8, and the high one of qh[j - 8] for the rest.

Quantise, q8_KV
    1. m = max |x_j|, max(p, q) being p if p > q, else q, NaN or not: eight lanes from 0 take every
       eighth value as q; with q = lane i, p is lane i + 4; then q is lane i + 2 of four, and of
       the two left the second. If m is 0 the whole row is zero.
    2. d = m / 127; q_j = x_j * (1/d), to the nearest whole number, ties to even; -2^31 if that is
       no number or beyond 32 bits.
    3. sum = sum of q_j modulo 2^32. Codes are q_j, at least -128 and at most 127.

Dequantise
    q6_0: d * (code - 32). q8_KV: d * code.

Source
    ikawrakow/ik_llama.cpp @ 8337e4cd3: ggml/src/iqk/iqk_quantize.cpp, ggml/src/ggml-quants.c; of
    q8_KV the AVX2 code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tbq.codec import Codec, Layout, Stages
from tbq.families.ggml_blocks import HALF_QK, QK, halves, joined, largest_of_lanes, signed_steps
from tbq.numerics import fp16_bits

STEPS = np.float32(-32)
OFFSET = np.float32(32.5)
TOP = 63


@dataclass(frozen=True)
class SixBits(Codec):
    """q6_0.

    Attributes:
        refined: whether the scale is the least square's (in kernels that are wrong: not).
        apart: whether a byte holds codes j and j + 16 (in kernels that are wrong: 2j and 2j + 1).
    """

    refined: bool = True
    apart: bool = True

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    signed_scales: ClassVar[bool] = True
    layout: ClassVar[Layout] = Layout(
        np.dtype([("d", "<f2"), ("qh", "u1", 8), ("qs", "u1", HALF_QK)]), codes=("qh", "qs")
    )

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Whole numbers."""
        return {"codes": np.arange(1.0, TOP + 1)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 32) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            s, a = signed_steps(x, -STEPS)
            codes = np.fmin(np.fmax(a + OFFSET, np.float32(0)), np.float32(TOP)).astype(np.uint8)
            codes[~np.isfinite(a)] = 0
            d = self._scale(x, s, a, codes)
        first, second = halves(codes, self.apart)
        high = first >> 4 | (second >> 4) << 2
        blocks["d"] = fp16_bits(d).view(np.float16)
        blocks["qs"] = first & 15 | (second & 15) << 4
        blocks["qh"] = high[:, :8] | high[:, 8:] << 4
        return blocks

    def _scale(self, x: np.ndarray, s: np.ndarray, a: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return what is stored as d, before it is rounded."""
        if not self.refined:
            return s
        w, p = a * a, codes.astype(np.float32) - np.float32(32)
        u, v = (w * x) * p, (w * p) * p
        sums = []
        for terms in (u[:, :HALF_QK] + u[:, HALF_QK:], v[:, :HALF_QK] + v[:, HALF_QK:]):
            total = np.zeros(len(x), np.float32)
            for j in range(HALF_QK):
                total += terms[:, j]
            sums.append(total)
        return np.where(sums[1] > 0, sums[0] / sums[1], s)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the largest magnitude, steps before they are cut, and d of float32 (n, 32)."""
        with np.errstate(all="ignore"):
            s, a = signed_steps(x, -STEPS)
            d = self._scale(x, s, a, self.codes(blocks)["codes"][0])
            return Stages(np.abs(s * STEPS), {"codes": a + OFFSET}, {"d": d})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 32)."""
        steps = self.codes(blocks)["codes"][0].astype(np.float32) - np.float32(32)
        with np.errstate(all="ignore"):
            return blocks["d"].astype(np.float32)[:, None] * steps

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        low, high = blocks["qs"], np.concatenate([blocks["qh"] & 15, blocks["qh"] >> 4], axis=1)
        first, second = low & 15 | (high & 3) << 4, low >> 4 | (high >> 2) << 4
        return {"codes": (joined(first, second, self.apart), TOP + 1)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that leave the scale as it is, or pair neighbours."""
        yield "scale not refined", "", replace(self, refined=False)
        yield "codes paired as neighbours", "", replace(self, apart=False)


@dataclass(frozen=True)
class RowSteps(Codec):
    """q8_KV. A group that is quantised alone is a row of 32 values.

    Attributes:
        to_even: how ties round (in kernels that are wrong: away from zero).
        divides: whether values are divided by d, not multiplied by its inverse (in kernels that
            are wrong).
    """

    to_even: bool = True
    divides: bool = False

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    layout: ClassVar[Layout] = Layout(
        np.dtype([("d", "<f4"), ("sum", "<i4"), ("qs", "i1", QK)]),
        derived=("sum",),
        per_row=("d", "sum"),
    )

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Halves between whole numbers."""
        return {"codes": np.arange(-127.0, 128) - 0.5}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (g, 32), rows of 32 values, to blocks (g,)."""
        return self._quantized(x).reshape(-1)

    def quantize_rows(self, x: np.ndarray, first: int = 0) -> np.ndarray:
        """Quantise float32 (rows, n) to uint8 (rows, 8 + n)."""
        return self.rows(self._quantized(x))

    def _quantized(self, x: np.ndarray) -> np.ndarray:
        """Return the blocks (rows, n / 32) of float32 (rows, n)."""
        with np.errstate(all="ignore"):
            m = largest_of_lanes(np.abs(x))
            d = m / np.float32(127)
            steps = self._rounded(self._steps(x, d[:, None]))
            fits = (steps >= -(2.0**31)) & (steps < 2.0**31)
            whole = np.where(fits, steps, -(2.0**31)).astype(np.int64)
        blocks = np.zeros((len(x), x.shape[1] // QK), self.layout.dtype)
        blocks["d"] = d[:, None]
        total = whole.sum(axis=1, keepdims=True).astype(np.uint64).astype(np.uint32)
        blocks["sum"] = total.view(np.int32)
        blocks["qs"] = np.clip(whole, -128, 127).reshape(*blocks.shape, QK)
        blocks[m == 0] = 0
        return blocks

    def _steps(self, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        return x / d if self.divides else x * (np.float32(1) / d)

    def _rounded(self, steps: np.ndarray) -> np.ndarray:
        if self.to_even:
            return np.rint(steps)
        return np.trunc(steps + np.copysign(np.float32(0.5), steps))

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return d of the blocks' rows, as the norm too, and steps before they are rounded."""
        with np.errstate(all="ignore"):
            steps = self._steps(x, blocks["d"][:, None])
        return Stages(blocks["d"], {"codes": steps}, {"d": blocks["d"]})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 32)."""
        with np.errstate(all="ignore"):
            return blocks["d"][:, None] * blocks["qs"].astype(np.float32)

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,), counted from -128."""
        return {"codes": (blocks["qs"].view(np.uint8) ^ np.uint8(128), 256)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that round ties otherwise, or divide."""
        yield "another tie rule", "away from zero", replace(self, to_even=False)
        yield "values divided by the scale", "", replace(self, divides=True)
