"""q1_0, q2_0, tq1_0 and tq2_0 of ggml, and PrismML's groups of 128: one or two bits, or a trit.

What it is
    q1_0: the signs of 128 values under their mean magnitude. q2_0: -1, 0, 1 or 2 times a scale,
    the largest magnitude, for 64 values; PrismML's has 128. tq1_0, tq2_0: -1, 0 or 1 times the
    largest magnitude of 256 values, five to a byte or four.

Block, all fields little-endian
    q1_0    offset 0    d       float16
            offset 2    qs      16 bytes: bit j is set for +, from the low bit up
    q2_0    offset 0    d       float16
            offset 2    qs      16 bytes (32 of 128 values): two bits each, from the low ones up
    tq1_0   offset 0    qs      48 bytes, see below
            offset 48   qh      4 bytes
            offset 52   d       float16
    tq2_0   offset 0    qs      64 bytes: bits 2n of byte m are code 32n + m of the first 128
                                values; bytes from 32 on hold the others alike
            offset 64   d       float16

Quantise
    q1_0
        1. d = (|x_0| + |x_1| + ..., in order from 0) / 128.
        2. Bit j is set if x_j >= 0: for -0 too, not for NaN.
    q2_0
        1. a = the largest magnitude, NaN left out. d = a; i = 1/a, or 0 if a is 0.
        2. code_j = x_j * i to the nearest whole number, halves away from zero, plus 1, at least 0
           and at most 3; 0 if the product is no finite number. The encoder never writes 3.
    tq1_0, tq2_0
        1. a = max |x_j|: a is kept while it is larger, so that values before a NaN are forgotten,
           and a NaN at the end stays. d = a; i = 1/a, or 0 if a is 0.
        2. code_j = x_j * i to the nearest whole number, halves away from zero, plus 1; 1 if the
           product is no number or does not fit 32 bits. Only the low byte matters below, which is
           1 too where C has more of such a number.
        3. tq2_0 stores the low two bits. tq1_0 makes bytes of five codes, or four and a 0:
           q = 3 (3 (3 (3 c_0 + c_1) + c_2) + c_3) + c_4 modulo 256 at each step, and stores
           (256 q + 242) / 243 without its fraction. Bytes m < 32 of qs hold values m + 32 n; bytes
           32 + m, m < 16, hold 160 + m + 16 n; bytes m < 4 of qh hold 240 + m + 4 n, n < 4.

Dequantise
    q1_0: d or -d. Others: (code - 1) * d. Trit n of a byte b is ((b 3^n modulo 256) * 3) / 256
    without its fraction.

Source
    q1_0, q2_0: ggml-org/llama.cpp @ d99724f2: ggml/src/ggml-quants.c. tq1_0, tq2_0: the same file
    @ f112d6de7, read. PrismML-Eng/llama.cpp @ 811dce5d5, read: the same arithmetic. Conversions of
    what does not fit are undefined in C: they are here what x86-64 makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.codec import Codec, Layout, Stages
from tbq.families.ggml_blocks import inverse, largest_in_order
from tbq.numerics import fp16_bits, ordered_sum

TERNARY_VALUES = 256
TRITS = 5
# Where tq1_0 has its trits: the first value, values, and how far apart those of a byte are.
RUNS = ((0, 160, 32), (160, 80, 16), (240, 16, 4))
POWERS = tuple(3**n for n in range(TRITS))
FAR = 2.0**31


def away_from_zero(x: np.ndarray) -> np.ndarray:
    """Return float32 rounded to whole numbers, halves away from zero."""
    near = np.trunc(x)
    return near + np.where(np.abs(x - near) >= 0.5, np.copysign(np.float32(1), x), np.float32(0))


@dataclass(frozen=True)
class Signs(Codec):
    """q1_0.

    Attributes:
        zero_is_plus: whether zeros are (in kernels that are wrong: not).
    """

    zero_is_plus: bool = True

    block_values: ClassVar[int] = 128
    group_values: ClassVar[int] = 128
    layout: ClassVar[Layout] = Layout(np.dtype([("d", "<f2"), ("qs", "u1", 16)]))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Zero."""
        return {"codes": np.zeros(1)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            plus = x >= 0 if self.zero_is_plus else x > 0
            blocks["d"] = fp16_bits(self._mean(x)).view(np.float16)
        blocks["qs"] = pack(plus.astype(np.uint8), 1)
        return blocks

    def _mean(self, x: np.ndarray) -> np.ndarray:
        return ordered_sum(np.abs(x)) / np.float32(self.block_values)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the sum of magnitudes, the values themselves and d of float32 (n, 128)."""
        with np.errstate(all="ignore"):
            d = self._mean(x)
            return Stages(d * np.float32(self.block_values), {"codes": x}, {"d": d})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 128)."""
        d = blocks["d"].astype(np.float32)[:, None]
        return np.where(unpack(blocks["qs"], 1) == 1, d, -d)

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        return {"codes": (unpack(blocks["qs"], 1), 2)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that take zero for negative."""
        yield "another tie rule", "", replace(self, zero_is_plus=False)


@dataclass(frozen=True)
class TwoBits(Codec):
    """q2_0.

    Attributes:
        block_values: values per block.
        to_even: how halves round (in kernels that are wrong: to even).
    """

    block_values: int = 64
    to_even: bool = False

    spare_codes: ClassVar[frozenset[int]] = frozenset({3})

    @property
    def group_values(self) -> int:
        """One block."""
        return self.block_values

    @cached_property
    def layout(self) -> Layout:
        """The block."""
        return Layout(np.dtype([("d", "<f2"), ("qs", "u1", self.block_values // 4)]))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Halves between whole numbers."""
        return {"codes": np.array([-0.5, 0.5, 1.5])}

    def _steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = np.where(np.isnan(x), np.float32(0), np.abs(x)).max(axis=1)
        return d, x * inverse(d)[:, None]

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, block_values) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            d, steps = self._steps(x)
            near = np.rint(steps) if self.to_even else away_from_zero(steps)
            near = np.where(np.isfinite(near), near, np.float32(-1))
        blocks["d"] = fp16_bits(d).view(np.float16)
        blocks["qs"] = pack(np.clip(near + 1, 0, 3).astype(np.uint8), 2)
        return blocks

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the largest magnitude, values in units of it, and d."""
        with np.errstate(all="ignore"):
            d, steps = self._steps(x)
        return Stages(d, {"codes": steps}, {"d": d})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, block_values)."""
        steps = unpack(blocks["qs"], 2).astype(np.float32) - np.float32(1)
        with np.errstate(all="ignore"):
            return steps * blocks["d"].astype(np.float32)[:, None]

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        return {"codes": (unpack(blocks["qs"], 2), 4)}

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find codes that decoders know and no encoder writes."""
        return {"codes of twice the scale": (unpack(blocks["qs"], 2) == 3).any(axis=1)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that round halves to even."""
        yield "another tie rule", "", replace(self, to_even=True)


@dataclass(frozen=True)
class Trits(Codec):
    """tq1_0 and tq2_0.

    Attributes:
        dense: whether five share a byte, not four.
        to_even: how halves round (in kernels that are wrong: to even).
    """

    dense: bool
    to_even: bool = False

    block_values: ClassVar[int] = TERNARY_VALUES
    group_values: ClassVar[int] = TERNARY_VALUES
    spare_codes: ClassVar[frozenset[int]] = frozenset({3})

    @cached_property
    def layout(self) -> Layout:
        """The block."""
        if self.dense:
            fields = [("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")]
            return Layout(np.dtype(fields), codes=("qs", "qh"))
        return Layout(np.dtype([("qs", "u1", 64), ("d", "<f2")]))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Halves between whole numbers."""
        return {"codes": np.array([-0.5, 0.5])}

    def _steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = largest_in_order(np.abs(x))
        return d, x * inverse(d)[:, None]

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 256) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            d, steps = self._steps(x)
            near = np.rint(steps) if self.to_even else away_from_zero(steps)
            fits = np.abs(near) < FAR
            codes = np.where(fits, near, np.float32(0)).astype(np.int64) + 1
        blocks["d"] = fp16_bits(d).view(np.float16)
        if self.dense:
            packed = np.concatenate([_pack_trits(codes, *run) for run in RUNS], axis=1)
            blocks["qs"], blocks["qh"] = packed[:, :48], packed[:, 48:]
        else:
            of = (codes & 3).astype(np.uint8).reshape(len(x), 2, 4, 32)
            blocks["qs"] = sum(of[:, :, n] << (2 * n) for n in range(4)).reshape(len(x), 64)
        return blocks

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the largest magnitude, values in units of it, and d of float32 (n, 256)."""
        with np.errstate(all="ignore"):
            d, steps = self._steps(x)
        return Stages(d, {"codes": steps}, {"d": d})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 256)."""
        steps = self.codes(blocks)["codes"][0].astype(np.float32) - np.float32(1)
        with np.errstate(all="ignore"):
            return steps * blocks["d"].astype(np.float32)[:, None]

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        if not self.dense:
            of = blocks["qs"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
            return {"codes": ((of & 3).reshape(-1, TERNARY_VALUES), 4)}
        packed = np.concatenate([blocks["qs"], blocks["qh"]], axis=1)
        found, at = [], 0
        for _, values, step in RUNS:
            found.append(_unpack_trits(packed[:, at : at + step], values // step))
            at += step
        return {"codes": (np.concatenate(found, axis=1), 3)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that round halves to even."""
        yield "another tie rule", "", replace(self, to_even=True)


def _pack_trits(codes: np.ndarray, start: int, values: int, step: int) -> np.ndarray:
    """Return the bytes (n, step) of codes that lie `step` apart."""
    q = np.zeros((len(codes), step), np.int64)
    for n in range(TRITS):
        at = start + n * step
        own = codes[:, at : at + step] if n * step < values else 0
        q = (q * 3 + own) & 255
    return ((q * 256 + 242) // 243).astype(np.uint8)


def _unpack_trits(packed: np.ndarray, count: int) -> np.ndarray:
    """Return the trits (n, count * bytes) of bytes, the first of all bytes first."""
    shifted = [packed.astype(np.uint16) * POWERS[n] & 255 for n in range(count)]
    return np.concatenate([(q * 3 >> 8).astype(np.uint8) for q in shifted], axis=1)
