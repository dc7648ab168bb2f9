"""The inputs of test vectors: from a seed and integers only, so the same on every machine."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tbq.format import Format
from tbq.vectors.notes import HEAD_DIMS

UNIFORMS = 12  # their sum is near enough to a Gaussian, and exact


def stream(seed: int, name: str) -> np.random.PCG64:
    """Return a generator of raw bits for one case; NumPy guarantees its output for ever."""
    return np.random.PCG64([seed, zlib.crc32(name.encode())])


def raw_bytes(bits: np.random.PCG64, n: int) -> np.ndarray:
    """Return n random bytes."""
    return bits.random_raw(-(-n // 8)).astype("<u8").view(np.uint8)[:n]


def gaussian(bits: np.random.PCG64, *shape: int) -> np.ndarray:
    """Return float32 values of mean 0 and variance 1: twelve exact uniforms each."""
    n = math.prod(shape)
    words = raw_bytes(bits, 2 * UNIFORMS * n).view("<u2").reshape(n, UNIFORMS).astype(np.int64)
    centred = 2 * words.sum(axis=1) - UNIFORMS * 65535
    return (centred / 131072).astype(np.float32).reshape(shape)


@dataclass(frozen=True)
class Input:
    """One input: float32 (..., n) for a format, and what it is for."""

    name: str
    flags: tuple[str, ...]
    comment: str
    make: Callable[[Format, np.random.PCG64], np.ndarray]


def unit(fmt: Format) -> int:
    """Return the values of a group; of 32 where a value stands for itself."""
    return max(fmt.group_values, 32)


def _width(fmt: Format) -> int:
    """Return a row of an odd number of groups, so that tiles of two do not cover it."""
    return 3 * unit(fmt)


def _one_hot(fmt: Format, bits: np.random.PCG64) -> np.ndarray:
    n = unit(fmt)
    x = np.zeros((8, n), np.float32)
    for row, position in zip(x, (0, 1, 2, 5, n // 2 - 1, n // 2, n - 2, n - 1), strict=True):
        row[position] = 1
    return x


def _ramp(fmt: Format, bits: np.random.PCG64) -> np.ndarray:
    n = unit(fmt)
    up = (2 * np.arange(n, dtype=np.float32) - (n - 1)) / np.float32(n)
    return np.stack([up, up[::-1]])


def _zeros(fmt: Format, bits: np.random.PCG64) -> np.ndarray:
    x = gaussian(bits, 3, _width(fmt))
    x[0, : unit(fmt)] = 0
    x[1] = 0
    x[2, -unit(fmt) :] = -0.0
    return x


def _ties(fmt: Format, bits: np.random.PCG64) -> np.ndarray:
    n = unit(fmt)
    x = np.zeros((6, n), np.float32)
    x[0], x[1] = 1, -1
    x[2, ::2] = 1
    x[3, :2] = 1
    x[4, 4:8] = -2
    x[5, ::4], x[5, 1::4] = 1, -1
    return x


def _nan(fmt: Format, bits: np.random.PCG64) -> np.ndarray:
    x = gaussian(bits, 4, _width(fmt))
    x[0, 3] = np.nan
    x[1, unit(fmt)] = np.inf
    x[2, -1] = -np.inf
    x[3, [0, 1]] = np.inf, -np.inf
    return x


def _outlier(fmt: Format, bits: np.random.PCG64) -> np.ndarray:
    x = gaussian(bits, 3, _width(fmt))
    x[0, 7] *= 60
    x[1, :: unit(fmt)] = -40
    x[2, -5:] = 25, -25, 25, 0, 25
    return x


def _scaled(*factors: float) -> Callable[[Format, np.random.PCG64], np.ndarray]:
    def make(fmt: Format, bits: np.random.PCG64) -> np.ndarray:
        x = gaussian(bits, len(factors), unit(fmt))
        return x * np.array(factors, np.float32)[:, None]

    return make


def _head(width: int) -> Callable[[Format, np.random.PCG64], np.ndarray]:
    return lambda fmt, bits: gaussian(bits, 2, math.lcm(width, unit(fmt)))


def inputs(size: str) -> Iterator[Input]:
    """Yield the inputs of a set, "small" or "full"."""
    rows = 4 if size == "small" else 64

    def normal(fmt: Format, bits: np.random.PCG64) -> np.ndarray:
        return gaussian(bits, rows, _width(fmt))

    flags = ("normal", "row_index", "tail", "distinct_lanes")
    yield Input("normal", flags, f"{rows} rows of three blocks", normal)
    yield Input("one_hot", ("one_hot",), "unit vectors", _one_hot)
    yield Input("ramp", ("ramp",), "ascending and descending values", _ramp)
    yield Input("zeros", ("zero", "row_index"), "zero blocks before, between, after others", _zeros)
    yield Input("ties", ("tie",), "equal values, whose coordinates fall on boundaries", _ties)
    yield Input("overflow", ("fp16_overflow",), "norms about 65504", _scaled(900, 4000, 1e5, 1e30))
    tiny = _scaled(1e-6, 1e-8, 1e-20, 1e-38, 1e-41)
    yield Input("tiny", ("subnormal",), "norms below float16 and float32's normal ranges", tiny)
    yield Input("nonfinite", ("nan",), "NaN and infinities", _nan)
    yield Input("outliers", ("outlier",), "a few values far above the rest", _outlier)
    yield Input(
        "streams",
        ("streams", "row_index"),
        "two streams of three rows",
        lambda fmt, bits: gaussian(bits, 2, 3, 2 * unit(fmt)),
    )
    for width in HEAD_DIMS if size == "full" else (80, 192, 576):
        comment = f"rows that are a multiple of heads of {width}"
        yield Input(f"head_dim_{width}", (f"head_dim_{width}", "tail"), comment, _head(width))
