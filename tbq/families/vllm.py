"""key3, key4, value3 and value4 of vLLM's TurboQuant cache, heads of 128 values.

What it is
    A key is normalised and put through a Hadamard transform; each coordinate becomes the index of
    its cell, and the norm is stored as it is. The decoder scales the centroids to length one and
    leaves them rotated. A value is not rotated: its codes are steps from its least element.

Block, all fields little-endian
    qs     3 or 4 bits per value, codes in a little-endian bit string
    norm   keys: float16
    scale  values: float16
    min    values: float16

Quantise, keys
    1. n = sqrt(sum of x_j^2). v = FWHT(x / (n + 1e-8)) * 0.08838834764831845.
    2. code_j = how many of the midpoints (c_i + c_(i+1)) / 2 are not above v_j.
    3. norm = fp16(n).

Quantise, values
    1. lo and hi: the least and the largest value, NaN left out, the first of equal ones.
    2. scale = max((hi - lo) / (2^bits - 1), 1e-8).
    3. code_j = (x_j - lo) / scale + 0.5 without its fraction, from 0 to 2^bits - 1; 0 for NaN.
    4. Stored are fp16(scale) and fp16(lo).

Dequantise
    Keys: c_j * (1 / sqrt(sum of c_j^2 + 1e-16)) * norm, still rotated.
    Values: code_j * scale + min.

What is not known
    vLLM's kernels run on GPUs; in which order they add, and what they make of NaN, their text does
    not say. Here eight partial sums take every eighth term and are then added pair by pair, and NaN
    is as above. The fork multiplies by a matrix where this has a transform: coordinates next to
    a midpoint may fall on its other side there.

Source
    vllm-project/vllm, TurboQuant store at 0135d081, centroids at 06d0369d, decoder at 055e47c2,
    read only: nothing of it was run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.cells import Cells
from tbq.codec import Codec, Domain, Layout, Stages
from tbq.families.qvac import midway
from tbq.numerics import SUMS, fp16_bits, fwht

HEAD = 128
K128 = np.float32(0.08838834764831845)
TINY, LEAST_SCALE = np.float32(1e-8), np.float32(1e-8)
LEAST_SQUARE = np.float32(1e-16)

# source: centroids.py; decimals as far as float32 keeps them
CELLS = {
    3: midway((0.021653695, 0.06679026, 0.11872146, 0.19006585)),
    4: midway(
        (
            *(0.011351509, 0.034306858, 0.05806053, 0.08330144),
            *(0.11103853, 0.1430019, 0.18282662, 0.2413817),
        )
    ),
}


def eights_sum(terms: np.ndarray) -> np.ndarray:
    """Sum float32 over the last axis: eight partial sums, added pair by pair."""
    sums = np.moveaxis(terms.reshape(*terms.shape[:-1], -1, 8), -2, -1)
    total = SUMS["ordered"](sums)
    while total.shape[-1] > 1:
        total = total[..., ::2] + total[..., 1::2]
    return total[..., 0]


ADDED = SUMS | {"eights": eights_sum}


def _codes(bits: int) -> tuple[str, str, int]:
    return "qs", "u1", HEAD * bits // 8


@dataclass(frozen=True)
class UnitKeys(Codec):
    """key3 and key4.

    Attributes:
        cells: centroids and midpoints, of 3 or 4 bits.
        total: the order of sums, "eights" or a key of SUMS.
        width: values that are mixed, 128 (in kernels that are wrong: 64, or 1 for none).
        normalised: whether the decoder scales the centroids to length one (in kernels that are
            wrong: not).
        corrected: whether the norm is divided by that of the centroids (in kernels that are wrong).
    """

    cells: Cells
    total: str = "eights"
    width: int = HEAD
    normalised: bool = True
    corrected: bool = False

    block_values: ClassVar[int] = HEAD
    group_values: ClassVar[int] = HEAD
    rotation_values: ClassVar[int] = HEAD
    gives: ClassVar[Domain] = "rotated"

    @cached_property
    def layout(self) -> Layout:
        """Codes, then the norm."""
        return Layout(np.dtype([_codes(self.cells.bits), ("norm", "<f2")]), ("norm",))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Half-way between centroids."""
        return {"codes": self.cells.edges.astype(np.float64)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            n, v = self._rotated(x)
            codes = (v[..., None] >= self.cells.edges).sum(axis=-1).astype(np.uint8)
            if self.corrected:
                n = n / np.linalg.norm(self.cells.levels[codes], axis=1)
        blocks["qs"] = pack(codes, self.cells.bits)
        blocks["norm"] = fp16_bits(n).view(np.float16)
        return blocks

    def _rotated(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # abs: no norm is negative, but the sign of a NaN would depend on the order of operands
        n = np.abs(np.sqrt(ADDED[self.total](x * x)))
        return n, self.rotate(x / (n + TINY)[:, None], None)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, rotated unit vector and again the norm of float32 (n, 128)."""
        with np.errstate(all="ignore"):
            n, v = self._rotated(x)
        return Stages(n, {"codes": v}, {"norm": n})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 128), rotated."""
        c = self.cells.levels[unpack(blocks["qs"], self.cells.bits)]
        with np.errstate(all="ignore"):
            if self.normalised:
                length = np.sqrt(ADDED[self.total](c * c) + LEAST_SQUARE)
                c = c * (np.float32(1) / length)[:, None]
            return c * blocks["norm"].astype(np.float32)[:, None]

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Transform float32 (n, 128)."""
        unit = K128 if self.width == HEAD else np.float32(self.width**-0.5)
        return fwht(x.reshape(len(x), -1, self.width)).reshape(x.shape) * unit

    unrotate = rotate

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        return {"codes": (unpack(blocks["qs"], self.cells.bits), 1 << self.cells.bits)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that rotate wrongly, normalise otherwise, or add in another order."""
        yield "not rotated", "", replace(self, width=1)
        yield "rotated in halves", "64 values", replace(self, width=HEAD // 2)
        yield "centroids not normalised", "", replace(self, normalised=False)
        yield "norm corrected", "", replace(self, corrected=True)
        for total in SUMS:
            yield "sums in another order", total, replace(self, total=total)


@dataclass(frozen=True)
class StepValues(Codec):
    """value3 and value4.

    Attributes:
        bits: of a code.
        rounded: whether half a step is added before the fraction is cut (in kernels that are
            wrong: not).
    """

    bits: int
    rounded: bool = True

    block_values: ClassVar[int] = HEAD
    group_values: ClassVar[int] = HEAD
    signed_scales: ClassVar[bool] = True

    @cached_property
    def layout(self) -> Layout:
        """Codes, scale and least value."""
        fields = [_codes(self.bits), ("scale", "<f2"), ("min", "<f2")]
        return Layout(np.dtype(fields), ("scale", "min"))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Whole numbers."""
        return {"codes": np.arange(1.0, 1 << self.bits)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n,)."""
        stages = self.stages(x, index, None)
        blocks = np.zeros(len(x), self.layout.dtype)
        top = np.float32((1 << self.bits) - 1)
        # fmax, so that NaN becomes 0
        steps = np.fmin(np.fmax(stages.coordinates["codes"], np.float32(0)), top)
        blocks["qs"] = pack(steps.astype(np.uint8), self.bits)
        for name, scale in stages.scales.items():
            blocks[name] = fp16_bits(scale).view(np.float16)
        return blocks

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray | None) -> Stages:
        """Return the spread, steps from the least value, and both scales of float32 (n, 128)."""
        rows, top = np.arange(len(x)), np.float32((1 << self.bits) - 1)
        with np.errstate(all="ignore"):
            low = np.where(np.isnan(x), np.float32(np.inf), x)
            high = np.where(np.isnan(x), np.float32(-np.inf), x)
            lo, hi = low[rows, low.argmin(axis=1)], high[rows, high.argmax(axis=1)]
            scale = np.fmax((hi - lo) / top, LEAST_SCALE)
            half = np.float32(0.5 if self.rounded else 0)
            spread = hi - lo
            steps = (x - lo[:, None]) / scale[:, None] + half
        return Stages(spread, {"codes": steps}, {"scale": scale, "min": lo})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 128)."""
        codes = unpack(blocks["qs"], self.bits).astype(np.float32)
        scale, least = (blocks[name].astype(np.float32)[:, None] for name in ("scale", "min"))
        with np.errstate(all="ignore"):
            return codes * scale + least

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        return {"codes": (unpack(blocks["qs"], self.bits), 1 << self.bits)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that cut where they should round."""
        yield "cut instead of rounded", "", replace(self, rounded=False)
