"""mxfp4, nvfp4 and f8_e4m3 of ggml: values and scales that are floats of four or eight bits.

What it is
    mxfp4 (of OCP): 32 values of E2M1 under a power of two. nvfp4: 16 values of E2M1 under a scale
    of E4M3 without sign, four such in a block. f8_e4m3: a value is a byte, and nothing else.

Block
    mxfp4   offset 0    e       uint8, the exponent of the scale
            offset 1    qs      16 bytes: the codes of values j and j + 16, the first low
    nvfp4   offset 0    d       4 bytes, E4M3 without sign: the scale of 16 values each
            offset 4    qs      32 bytes, eight for each scale: values j and j + 8, the first low
    f8_e4m3 offset 0    x       uint8: sign, four bits of exponent (bias 7), three of mantissa

Quantise; every step is rounded to float32
    mxfp4, nvfp4
        1. a = the largest magnitude of 32 or 16 values, NaN left out.
        2. mxfp4: e = floor(log2 a) + 125 modulo 256, the logarithm rounded to float32 before it is
           cut; 0 if a is 0 or infinite. s = 2^(e - 128).
           nvfp4: d = a / 6 as E4M3: 0 if that is not positive; below 2^-6, 512 d + 0.5 without its
           fraction, at most 7; else the mantissa is cut to three bits and bit 19 added to it; if
           that makes 256 or more, 448 (0x7E). s = half of what d means.
        3. code_j = the first k of 0 to 15 for which |LEVELS[k] * s - x_j| is least, 0 for NaN.
           Code 8, -0, is never written.
    f8_e4m3
        Each value to the nearest, ties to the even mantissa; from 464 on, and infinity, 448; NaN is
        0x7F with its sign.

Dequantise
    mxfp4, nvfp4: LEVELS[code] * s; s is 0 for the d of nvfp4 that are 0 or 0x7F. The sign bit of d
    is read as part of nothing. f8_e4m3: what the byte means; 0x7F and 0xFF are NaN.

Source
    ggml-org/llama.cpp @ d99724f2: ggml/src/ggml-quants.c, ggml-impl.h. f8_e4m3: a test of gguf-py
    after 2026-09, which has values and ties; what C makes of values beyond 448 was not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tbq.codec import Codec, Layout, Stages

# Twice E2M1. source: ggml-common.h, kvalues_mxfp4
LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
LEVELS32 = np.array(LEVELS, np.float32)
LARGEST_LEVEL = np.float32(6)
LARGEST_E4M3, NAN_E4M3 = 0x7E, 0x7F
NEVER_WRITTEN = 0x78  # as a scale: 256, and what is above but for 448


def exponents(largest: np.ndarray) -> np.ndarray:
    """Return the exponent bytes of blocks by their largest magnitudes (n,)."""
    log = np.log2(largest.astype(np.float64)).astype(np.float32)
    whole = np.where(np.isfinite(log), np.floor(log) + np.float32(125), np.float32(0))
    return (whole.astype(np.int64) & 255).astype(np.uint8)


def power_of_two(e: np.ndarray) -> np.ndarray:
    """Return 2^(e - 128) of exponent bytes."""
    return np.ldexp(np.float32(1), e.astype(np.int32) - 128).astype(np.float32)


def unsigned_e4m3(x: np.ndarray) -> np.ndarray:
    """Return the scales of nvfp4, uint8, that are nearest to float32; halves go up."""
    x = np.where(x > 0, np.minimum(x, np.float32(448)), np.float32(0))
    bits = x.view(np.uint32).astype(np.int64)
    exponent = (bits >> 23) - 120
    small = np.minimum(x * np.float32(512) + np.float32(0.5), 7).astype(np.int64)
    normal = (exponent << 3) + (bits >> 20 & 7) + (bits >> 19 & 1)
    normal = np.where(normal >= NEVER_WRITTEN, LARGEST_E4M3, normal)
    return np.where(exponent <= 0, small, normal).astype(np.uint8)


def half_of_e4m3(d: np.ndarray) -> np.ndarray:
    """Return half of what scales of nvfp4 mean, float32."""
    magnitude = E4M3[d & 0x7F] * np.float32(0.5)
    return np.where((d == 0) | (d == NAN_E4M3), np.float32(0), magnitude)


def _e4m3_table() -> np.ndarray:
    byte = np.arange(128)
    exponent, mantissa = byte >> 3, byte & 7
    value = np.where(
        exponent == 0,
        np.ldexp(mantissa.astype(np.float64), -9),
        np.ldexp(1 + mantissa / 8, exponent - 7),
    )
    table = value.astype(np.float32)
    table.setflags(write=False)
    return table


# What 0 to 0x7F mean; the last would be 480, and is NaN where bytes are values.
E4M3 = _e4m3_table()


def nearest_levels(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Return the codes (n, values) of x (n, values) under scales (n,)."""
    best = np.abs(LEVELS32[0] * s[:, None] - x)
    codes = np.zeros(x.shape, np.uint8)
    for k in range(1, len(LEVELS)):
        error = np.abs(LEVELS32[k] * s[:, None] - x)
        better = error < best
        codes[better], best = k, np.where(better, error, best)
    return codes


def largest(x: np.ndarray) -> np.ndarray:
    """Return the largest magnitude of each row (n,), NaN left out."""
    return np.where(np.isnan(x), np.float32(0), np.abs(x)).max(axis=1)


@dataclass(frozen=True)
class FourBits(Codec):
    """What mxfp4 and nvfp4 share.

    Attributes:
        apart: whether a byte holds codes that are half of a scale's values apart (in kernels that
            are wrong: neighbours).
        doubles: whether scales are read as twice what they are (in kernels that are wrong).
    """

    apart: bool = True
    doubles: bool = False

    spare_codes: ClassVar[frozenset[int]] = frozenset({8})
    scaled_values: ClassVar[int]
    exponent_field: ClassVar[str]

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, block_values) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        runs = x.reshape(-1, self.scaled_values)
        with np.errstate(all="ignore"):
            scales = self._scales(largest(runs))
            codes = nearest_levels(runs, self._means(scales))
        blocks[self.exponent_field] = scales.reshape(blocks[self.exponent_field].shape)
        half = self.scaled_values // 2
        first, second = (
            (codes[:, :half], codes[:, half:]) if self.apart else (codes[:, ::2], codes[:, 1::2])
        )
        blocks["qs"] = (first | second << 4).reshape(len(x), -1)
        return blocks

    def _scales(self, largest: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _means(self, scales: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _read(self, blocks: np.ndarray) -> np.ndarray:
        """Return the scale of each value, (n, block_values)."""
        means = self._means(blocks[self.exponent_field].reshape(len(blocks), -1))
        means = means * np.float32(2) if self.doubles else means
        return np.repeat(means, self.scaled_values, axis=1)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the largest magnitude and values in halves of their scale."""
        with np.errstate(all="ignore"):
            return Stages(largest(x), {"codes": x / self._read(blocks)}, {})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, block_values)."""
        with np.errstate(all="ignore"):
            return LEVELS32[self.codes(blocks)["codes"][0]] * self._read(blocks)

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        runs = blocks["qs"].reshape(-1, self.scaled_values // 2)
        first, second = runs & 15, runs >> 4
        codes = np.stack([first, second], axis=1 if self.apart else 2)
        return {"codes": (codes.reshape(len(blocks), self.block_values), 16)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that pair neighbours, or take levels for E2M1 itself."""
        yield "codes paired as neighbours", "", replace(self, apart=False)
        yield "scales twice what they are", "", replace(self, doubles=True)


@dataclass(frozen=True)
class PowerOfTwo(FourBits):
    """mxfp4."""

    block_values: ClassVar[int] = 32
    group_values: ClassVar[int] = 32
    scaled_values: ClassVar[int] = 32
    exponent_field: ClassVar[str] = "e"
    layout: ClassVar[Layout] = Layout(
        np.dtype([("e", "u1"), ("qs", "u1", 16)]), scales=(), small_scales=("e",)
    )

    def _scales(self, largest: np.ndarray) -> np.ndarray:
        return exponents(largest)

    def _means(self, scales: np.ndarray) -> np.ndarray:
        return power_of_two(scales)


@dataclass(frozen=True)
class SmallScale(FourBits):
    """nvfp4."""

    block_values: ClassVar[int] = 64
    group_values: ClassVar[int] = 64
    scaled_values: ClassVar[int] = 16
    exponent_field: ClassVar[str] = "d"
    layout: ClassVar[Layout] = Layout(
        np.dtype([("d", "u1", 4), ("qs", "u1", 32)]), scales=(), small_scales=("d",)
    )

    def _scales(self, largest: np.ndarray) -> np.ndarray:
        return unsigned_e4m3(largest / LARGEST_LEVEL)

    def _means(self, scales: np.ndarray) -> np.ndarray:
        return half_of_e4m3(scales)


@dataclass(frozen=True)
class OneByte(Codec):
    """f8_e4m3.

    Attributes:
        to_even: how ties round (in kernels that are wrong: away from zero).
    """

    to_even: bool = True

    block_values: ClassVar[int] = 1
    group_values: ClassVar[int] = 1
    layout: ClassVar[Layout] = Layout(np.dtype([("x", "u1")]), scales=(), codes=("x",))

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 1) to blocks (n,)."""
        value = x[:, 0]
        size = np.abs(value)
        middle = (E4M3[:NAN_E4M3].astype(np.float64)[1:] + E4M3[: NAN_E4M3 - 1]) / 2
        below = np.searchsorted(middle, size, side="left")  # a tie stays below
        tie = np.isin(size, middle) & ((below & 1 == 1) if self.to_even else True)
        code = np.where(np.isnan(value), NAN_E4M3, below + tie)
        blocks = np.zeros(len(x), self.layout.dtype)
        blocks["x"] = code | np.signbit(value) << 7
        return blocks

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return magnitudes of float32 (n, 1); nothing else is computed."""
        return Stages(np.abs(x[:, 0]), {}, {})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 1)."""
        magnitude = E4M3[blocks["x"] & 0x7F]
        value = np.where(blocks["x"] & 0x80, -magnitude, magnitude)
        return np.where(blocks["x"] & 0x7F == NAN_E4M3, np.float32(np.nan), value)[:, None]

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the bytes of blocks (n,)."""
        return {"codes": (blocks["x"].reshape(-1, 1), 256)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that round ties away from zero."""
        yield "another tie rule", "away from zero", replace(self, to_even=False)
