"""q4_0, q4_1, q5_0, q5_1, q8_0 and iq4_nl of ggml: 32 values under one scale, nothing rotated.

What it is
    q4_0, q5_0: steps of a scale that the value of largest magnitude sets, with its sign. q4_1,
    q5_1: steps above the least value, which is stored too. q8_0: signed bytes. iq4_nl: sixteen
    levels that are not evenly spaced, under a scale of weighted least square. What a KV cache and
    llama-quantize write is the same, but for two: the CPU code of caches rounds q8_0 otherwise,
    and llama-quantize searches the scale of iq4_nl.

Block, all fields little-endian
    q4_0, iq4_nl    offset 0    d       float16
                    offset 2    qs      16 bytes: the codes of values j and j + 16, the first low
    q4_1            offset 0    d       float16
                    offset 2    m       float16
                    offset 4    qs      16 bytes, as above
    q5_0            offset 0    d       float16
                    offset 2    qh      4 bytes: bit j is the fifth of code j
                    offset 6    qs      16 bytes, the low four bits
    q5_1            offset 0    d       float16
                    offset 2    m       float16
                    offset 4    qh      4 bytes
                    offset 8    qs      16 bytes
    q8_0            offset 0    d       float16
                    offset 2    qs      32 bytes, int8

Quantise; every step is rounded to float32, and d and m to float16 when they are stored
    q4_0, q5_0; h is 8 or 16
        1. m = the value of largest magnitude with its sign, the first of equal ones, NaN left out;
           0 if there is none. d = m / -h: -0 for zeros. i = 1/d, or 0 if d is 0.
        2. code_j = x_j * i + (h + 0.5) without its fraction, at most 2h - 1; 0 if that is no
           finite number.
    q4_1, q5_1; t is 15 or 31
        1. m = the least value below FLT_MAX, else FLT_MAX; M = the largest above -FLT_MAX, else
           -FLT_MAX; NaN left out, of zeros the first. d = (M - m) / t; i = 1/d, or 0 if d is 0.
        2. code_j = (x_j - m) * i + 0.5 without its fraction, at most t; 0 if that is no finite
           number.
    q8_0
        1. a = max |x_j|: a is kept while it is larger, so that values before a NaN are forgotten,
           and a NaN at the end stays. d = a / 127; i = 1/d, or 0 if d is 0.
        2. code_j = x_j * i to the nearest whole number, halves away from zero: the low byte of it
           as 32 bits, 0 if it is no number or does not fit these.
    q8_0 of the CPU code of caches, AVX2
        1. a = max |x_j|, max(p, q) being p if p > q, else q, NaN or not: eight lanes take every
           eighth value as q; with q = lane i, p is lane i + 4; then q is lane i + 2 of four, and
           of the two left the second. d = a / 127; i = 127 / a, or 0 if a is 0.
        2. code_j = x_j * i to the nearest whole number, halves to even, at least -128 and at most
           127; -128 if it is no number or does not fit 32 bits.
    iq4_nl; the levels k are in LEVELS; the code of u is the number of midpoints between levels
    that are not above u, 15 for NaN
        1. m = the value of largest magnitude with its sign, the first of equal ones, NaN left out.
           If it is below 1e-15: d = 0, and the codes are those of zeros. C leaves the codes of such
           blocks as the stack held them: nothing says what they are.
        2. i = 1 / (m / -127). c_j = code of i * x_j, k_j = its level, w_j = x_j * x_j. In order
           u += (w_j k_j) x_j and v += (w_j k_j) k_j. d = u / v if v > 0, else 0.
    iq4_nl of llama-quantize, without an importance matrix
        1. As above, but i = 1 / (-m / -127). best = d u.
        2. For t = -7 to 7: i = (t - 127) / m, u and v as above. If v > 0 and u u > best v:
           d = u / v, best = d u.
        3. Codes are those of (1/d) x_j; of 0 x_j if d is 0.

Dequantise
    q4_0, q5_0: (code - h) * d. q4_1, q5_1: code * d + m, the product rounded first. q8_0:
    code * d. iq4_nl: level * d.

Source
    ggml-org/llama.cpp @ f112d6de7: ggml/src/ggml-quants.c; the AVX2 code of q8_0,
    ggml/src/ggml-cpu/arch/x86/quants.c. Conversions of what does not fit are undefined in C: they
    are here what x86-64 makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from tbq.codec import Codec, Layout, Stages
from tbq.numerics import fp16_bits

QK = 32
HALF_QK = QK // 2
FLT_MAX = np.finfo(np.float32).max
BYTE_STEPS = np.float32(127)
# source: ggml-common.h, kvalues_iq4nl
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MIDPOINTS = tuple((a + b) / 2 for a, b in zip(LEVELS, LEVELS[1:], strict=False))
ZERO_LEVEL = 8  # the code of zero
LEAST_LIVE = np.float32(1e-15)
TRIES = 7


def halves(codes: np.ndarray, apart: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes (n, 32) that share bytes: j and j + 16, or 2j and 2j + 1."""
    if apart:
        return codes[:, :HALF_QK], codes[:, HALF_QK:]
    return codes[:, ::2], codes[:, 1::2]


def joined(first: np.ndarray, second: np.ndarray, apart: bool = True) -> np.ndarray:
    """Undo `halves`."""
    if apart:
        return np.concatenate([first, second], axis=1)
    return np.stack([first, second], axis=2).reshape(len(first), -1)


def signed_largest(x: np.ndarray) -> np.ndarray:
    """Return the first value of largest magnitude of each row (n,), NaN left out; 0 if none is."""
    size = np.where(np.isnan(x), np.float32(0), np.abs(x))
    largest = x[np.arange(len(x)), size.argmax(axis=1)]
    return np.where(size.any(axis=1), largest, np.float32(0))


def inverse(d: np.ndarray) -> np.ndarray:
    """Return 1/d, 0 where d is 0."""
    return np.where(d != 0, np.float32(1) / d, np.float32(0))


def signed_steps(x: np.ndarray, count: float) -> tuple[np.ndarray, np.ndarray]:
    """Return d (n,), of which the largest magnitude is -count steps, and x (n, values) in steps."""
    d = signed_largest(x) / np.float32(-count)
    return d, x * inverse(d)[:, None]


def later(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the larger of two, q if one is NaN."""
    return np.where(p > q, p, q)


def largest_of_lanes(size: np.ndarray) -> np.ndarray:
    """Return the largest of magnitudes (rows, n), (rows,), as eight lanes of AVX2 find it."""
    lanes = np.zeros((len(size), 8), np.float32)
    for start in range(0, size.shape[1], 8):
        lanes = later(lanes, size[:, start : start + 8])
    four = later(lanes[:, 4:], lanes[:, :4])
    two = later(four[:, :2], four[:, 2:])
    return later(two[:, 0], two[:, 1])


def cut(steps: np.ndarray, top: int) -> np.ndarray:
    """Return steps without their fraction, at most top; 0 for what is no finite number."""
    whole = np.where(np.isfinite(steps), steps, np.float32(0))
    return np.clip(np.trunc(whole), 0, top).astype(np.uint8)


@dataclass(frozen=True)
class Nibbles(Codec):
    """What q4_0, q4_1, q5_0, q5_1 and iq4_nl share: codes of 4 or 5 bits.

    Attributes:
        bits: per code.
        apart: whether a byte holds codes j and j + 16 (in kernels that are wrong: 2j and 2j + 1).
    """

    bits: int = 4
    apart: bool = True

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    signed_scales: ClassVar[bool] = True
    scales: ClassVar[tuple[str, ...]] = ("d",)

    @cached_property
    def layout(self) -> Layout:
        """The block."""
        fields = [(name, "<f2") for name in self.scales]
        fields += [("qh", "u1", 4)] if self.bits == 5 else []
        codes = ("qh", "qs") if self.bits == 5 else ("qs",)
        return Layout(np.dtype([*fields, ("qs", "u1", HALF_QK)]), self.scales, codes)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Whole numbers."""
        return {"codes": np.arange(1.0, self.top + 1)}

    def _blocks(self, codes: np.ndarray, **scales: np.ndarray) -> np.ndarray:
        blocks = np.zeros(len(codes), self.layout.dtype)
        first, second = halves(codes, self.apart)
        blocks["qs"] = first & 15 | (second & 15) << 4
        if self.bits == 5:
            blocks["qh"] = np.packbits(joined(first, second) >> 4, axis=1, bitorder="little")
        for name, scale in scales.items():
            blocks[name] = fp16_bits(scale).view(np.float16)
        return blocks

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        first, second = blocks["qs"] & 15, blocks["qs"] >> 4
        if self.bits == 5:
            high = np.unpackbits(blocks["qh"], axis=1, bitorder="little") << 4
            first, second = first | high[:, :HALF_QK], second | high[:, HALF_QK:]
        return {"codes": (joined(first, second, self.apart), self.top + 1)}

    def _stored(self, blocks: np.ndarray) -> np.ndarray:
        return self.codes(blocks)["codes"][0]

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that pair neighbours."""
        yield "codes paired as neighbours", "", replace(self, apart=not self.apart)


@dataclass(frozen=True)
class Signed(Nibbles):
    """q4_0 and q5_0.

    Attributes:
        rounds: whether a half is added before fractions are cut (in kernels that are wrong: not).
    """

    rounds: bool = True

    @property
    def middle(self) -> int:
        """The code of zero, and the steps to the value of largest magnitude."""
        return 1 << (self.bits - 1)

    def _steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d, steps = signed_steps(x, self.middle)
        return d, steps + np.float32(self.middle + (0.5 if self.rounds else 0))

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 32) to blocks (n,)."""
        with np.errstate(all="ignore"):
            d, steps = self._steps(x)
            return self._blocks(cut(steps, self.top), d=d)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the largest magnitude, steps before they are cut, and d of float32 (n, 32)."""
        with np.errstate(all="ignore"):
            d, steps = self._steps(x)
            return Stages(np.abs(d * np.float32(self.middle)), {"codes": steps}, {"d": d})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 32)."""
        steps = self._stored(blocks).astype(np.float32) - np.float32(self.middle)
        with np.errstate(all="ignore"):
            return steps * blocks["d"].astype(np.float32)[:, None]

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that pair neighbours, or cut where C rounds."""
        yield from super().mutants()
        yield "fractions cut, not rounded", "", replace(self, rounds=False)


@dataclass(frozen=True)
class AboveMinimum(Nibbles):
    """q4_1 and q5_1.

    Attributes:
        rounds: as of `Signed`.
    """

    rounds: bool = True

    scales: ClassVar[tuple[str, ...]] = ("d", "m")

    def _steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, high = _first_least(x), -_first_least(-x)
        d = (high - low) / np.float32(self.top)
        steps = (x - low[:, None]) * inverse(d)[:, None]
        return d, low, steps + np.float32(0.5 if self.rounds else 0)

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 32) to blocks (n,)."""
        with np.errstate(all="ignore"):
            d, low, steps = self._steps(x)
            return self._blocks(cut(steps, self.top), d=d, m=low)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the width of the range, steps before they are cut, d and m of float32 (n, 32)."""
        with np.errstate(all="ignore"):
            d, low, steps = self._steps(x)
            return Stages(d * np.float32(self.top), {"codes": steps}, {"d": d, "m": low})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 32)."""
        d, low = (blocks[name].astype(np.float32)[:, None] for name in self.scales)
        with np.errstate(all="ignore"):
            return self._stored(blocks).astype(np.float32) * d + low

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that pair neighbours, or cut where C rounds."""
        yield from super().mutants()
        yield "fractions cut, not rounded", "", replace(self, rounds=False)


def _first_least(x: np.ndarray) -> np.ndarray:
    """Return the first of the least values of rows below FLT_MAX, (n,); FLT_MAX if none is."""
    known = np.where(np.isnan(x), np.float32(np.inf), x)
    least = known[np.arange(len(x)), known.argmin(axis=1)]
    return np.where(least < FLT_MAX, least, FLT_MAX)


@dataclass(frozen=True)
class SignedBytes(Codec):
    """q8_0.

    Attributes:
        avx2: whether it is what the CPU code of caches writes.
        other_ties: whether halves round as the other of the two has it (in kernels that are wrong).
        divides: whether values are divided by d, not multiplied by its inverse (likewise).
    """

    avx2: bool = False
    other_ties: bool = False
    divides: bool = False

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    layout: ClassVar[Layout] = Layout(np.dtype([("d", "<f2"), ("qs", "i1", QK)]))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Halves between whole numbers, codes being counted from -128."""
        return {"codes": np.arange(-127.0, 128) - 0.5}

    @property
    def content(self) -> SignedBytes:
        """Whoever rounded, it means the same."""
        return SignedBytes()

    def _steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = np.abs(x)
        largest = largest_of_lanes(size) if self.avx2 else largest_in_order(size)
        d = largest / BYTE_STEPS
        if self.divides:
            return d, np.where(d[:, None] != 0, x / d[:, None], x * np.float32(0))
        if self.avx2:
            of = np.where(largest != 0, BYTE_STEPS / largest, np.float32(0))
        else:
            of = inverse(d)
        return d, x * of[:, None]

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 32) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            d, steps = self._steps(x)
            whole = _whole(steps, self.avx2 != self.other_ties)
        blocks["d"] = fp16_bits(d).view(np.float16)
        if self.avx2:
            blocks["qs"] = np.clip(whole, -128, 127)
        else:
            low = np.where(whole == OUT_OF_RANGE, 0, whole) & 255
            blocks["qs"] = low.astype(np.uint8).view(np.int8)
        return blocks

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the largest magnitude, steps before they are rounded, and d of float32 (n, 32)."""
        with np.errstate(all="ignore"):
            d, steps = self._steps(x)
            return Stages(d * BYTE_STEPS, {"codes": steps}, {"d": d})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 32)."""
        with np.errstate(all="ignore"):
            return blocks["qs"].astype(np.float32) * blocks["d"].astype(np.float32)[:, None]

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,), counted from -128."""
        return {"codes": (blocks["qs"].view(np.uint8) ^ np.uint8(128), 256)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that round ties otherwise, or divide."""
        yield "another tie rule", "", replace(self, other_ties=True)
        yield "values divided by the scale", "", replace(self, divides=True)


OUT_OF_RANGE = -(2**31)


def largest_in_order(size: np.ndarray) -> np.ndarray:
    """Return the largest of magnitudes (n, values), (n,): what was found while it is larger."""
    largest = np.zeros(len(size), np.float32)
    for column in size.T:
        largest = later(largest, column)
    return largest


def _whole(steps: np.ndarray, to_even: bool) -> np.ndarray:
    """Return steps to the nearest whole number, int64, OUT_OF_RANGE beyond 32 bits."""
    near = np.trunc(steps)
    if to_even:
        near = np.rint(steps)
    else:
        near += np.where(np.abs(steps - near) >= 0.5, np.copysign(np.float32(1), steps), 0)
    fits = np.abs(near) < -np.float32(OUT_OF_RANGE)
    return np.where(fits, near, OUT_OF_RANGE).astype(np.int64)


@dataclass(frozen=True)
class Uneven(Nibbles):
    """iq4_nl.

    Attributes:
        searches_scale: whether it is what llama-quantize writes.
        weighted: whether values count by their squares (in kernels that are wrong: alike).
    """

    searches_scale: bool = False
    weighted: bool = True

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Midpoints between levels."""
        return {"codes": np.array(MIDPOINTS)}

    @property
    def content(self) -> Nibbles:
        """Whoever found the scale, it means the same."""
        return replace(self, searches_scale=False)

    def _scaled(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the largest magnitude, d, and what codes are chosen by, of float32 (n, 32)."""
        m = signed_largest(x)
        live = np.abs(m) >= LEAST_LIVE
        first = np.float32(LEVELS[0])
        of = np.float32(1) / ((-m if self.searches_scale else m) / first)
        u, v = self._sums(x, of)
        d = np.where(v > 0, u / v, np.float32(0))
        best = d * u
        for t in range(-TRIES, TRIES + 1) if self.searches_scale else ():
            u, v = self._sums(x, (np.float32(t) + first) / m)
            better = (v > 0) & (u * u > best * v)
            d = np.where(better, u / v, d)
            best = np.where(better, d * u, best)
        d = np.where(live, d, np.float32(0))
        if self.searches_scale:
            of = inverse(d)
        steps = np.where(live[:, None] | self.searches_scale, x * of[:, None], np.float32(0))
        return np.where(live, np.abs(m), np.float32(0)), d, steps

    def _sums(self, x: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, v = np.zeros(len(x), np.float32), np.zeros(len(x), np.float32)
        for column in x.T:
            k = np.array(LEVELS, np.float32)[_code_of(of * column)]
            wk = (column * column) * k if self.weighted else k
            u += wk * column
            v += wk * k
        return u, v

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 32) to blocks (n,)."""
        with np.errstate(all="ignore"):
            _, d, steps = self._scaled(x)
            return self._blocks(_code_of(steps), d=d)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the largest magnitude, what codes are chosen by, and d of float32 (n, 32)."""
        with np.errstate(all="ignore"):
            largest, d, steps = self._scaled(x)
        return Stages(largest, {"codes": steps}, {"d": d})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 32)."""
        levels = np.array(LEVELS, np.float32)[self._stored(blocks)]
        with np.errstate(all="ignore"):
            return levels * blocks["d"].astype(np.float32)[:, None]

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that pair neighbours, or weigh values alike."""
        yield from super().mutants()
        yield "values not weighted", "", replace(self, weighted=False)


def _code_of(u: np.ndarray) -> np.ndarray:
    """Return the codes of scaled values: the number of midpoints that are not above, 15 for NaN."""
    codes = np.zeros(u.shape, np.uint8)
    for midpoint in np.array(MIDPOINTS, np.float32):
        codes += ~(u < midpoint)
    return codes
