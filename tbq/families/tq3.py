"""tq3_0 of unixsysdev and of animehacker: one name, one id, one size, two codecs.

What it is
    32 values get fixed signs and a Hadamard transform. The largest coordinate is laid on the
    outermost centroid, and every coordinate becomes the index of its cell. There is no norm. The
    first codec has four cells and a bit that says on which side of its centroid a coordinate lies,
    which no decoder reads; the second uses that bit for eight cells.

Block, all fields little-endian
    offset 0   qs[8]   low two bits of each code, four to a byte from the low end up
    offset 8   qr[4]   a bit each, eight to a byte: the residual's sign, or bit 2 of the code
    offset 12  gamma   float16

Quantise (k = 0.17677669529663688 as float32)
    1. u = FWHT(x * sign) * k; amax = max |u_j|, NaN left out.
    2. d = amax / outermost centroid; inv = 1/d if d > 0, else 0; v = u * inv.
    3. code_j = the first cell with v_j below its upper boundary, else the last: a value on a
       boundary goes up, NaN goes to the last.
    4. Four cells: residual bit j is set if u_j - d * c_j >= 0, c_j the centroid of the code.
    5. gamma = fp16(d).

Dequantise
    y_j = FWHT(gamma * c)_j * (k * sign_j).

Source
    animehacker/llama-turboquant @ 5bc5ed3bd, the CPU code; of four cells: its ancestor, commit
    16e93d5dc of unixsysdev. CUDA and SYCL code have the same order of operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.cells import Cells
from tbq.codec import Codec, Layout, Stages
from tbq.numerics import fp16_bits, fwht, word_signs

QK = 32
SCALE = 0.17677669529663688  # 1/sqrt(32)
SIGNS = 0xB1A6D4B2

# source: the CPU code of both, decimals as written there
FOUR = Cells((0.4528, 1.510), (0.9814,))
EIGHT = Cells((0.2428, 0.7434, 1.3336, 2.1573), (0.4931, 1.0385, 1.7455))


@dataclass(frozen=True)
class PeakCells(Codec):
    """tq3_0.

    Attributes:
        cells: centroids and boundaries, of 2 or 3 bits.
        signs: the sign word.
        width: values that are mixed, 32 (in kernels that are wrong: less, 1 for none).
        outermost: whether the largest coordinate is laid on the outermost centroid, and not on 1
            (in kernels that are wrong).
    """

    cells: Cells
    signs: int = SIGNS
    width: int = QK
    outermost: bool = True

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    rotation_values: ClassVar[int] = QK
    layout: ClassVar[Layout] = Layout(
        np.dtype([("qs", "u1", 8), ("qr", "u1", 4), ("gamma", "<f2")]), ("gamma",), ("qs", "qr")
    )

    @property
    def splits(self) -> bool:
        """Whether the code's third bit is stored apart; else that place has residual signs."""
        return self.cells.bits == 3

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Where cells meet, among coordinates over d."""
        return {"codes": self.cells.edges.astype(np.float64)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 32) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            u, d, v = self._scaled(x)
            codes = self.cells.upper(v)
            over = u - d[:, None] * self.cells.levels[codes] >= 0
        blocks["qs"] = pack(codes & 3, 2)
        blocks["qr"] = pack(codes >> 2 if self.splits else over.astype(np.uint8), 1)
        blocks["gamma"] = fp16_bits(d).view(np.float16)
        return blocks

    def _scaled(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u = self.rotate(x, None)
        peak = np.fmax.reduce(np.abs(u), axis=1, initial=np.float32(0))
        d = peak / self.cells.levels[-1] if self.outermost else peak
        inverse = np.where(d > 0, np.float32(1) / d, np.float32(0))
        return u, d, u * inverse[:, None]

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return d, coordinates over d and again d of float32 (n, 32)."""
        with np.errstate(all="ignore"):
            _, d, v = self._scaled(x)
        return Stages(d, {"codes": v}, {"gamma": d})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 32)."""
        with np.errstate(all="ignore"):
            return self.unrotate(self.levels(blocks), blocks)

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return gamma * c of blocks (n,), float32 (n, 32), still rotated."""
        codes, _ = self.codes(blocks)["codes"]
        with np.errstate(all="ignore"):
            return blocks["gamma"].astype(np.float32)[:, None] * self.cells.levels[codes]

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Give float32 (n, 32) its signs and transform it."""
        return self._transform(x * self._sign) * self._scale

    def unrotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Transform float32 (n, 32) and give it its signs."""
        return self._transform(x) * (self._scale * self._sign)

    def _transform(self, x: np.ndarray) -> np.ndarray:
        return fwht(x.reshape(len(x), -1, self.width)).reshape(x.shape)

    @property
    def _scale(self) -> np.float32:
        return np.float32(SCALE if self.width == QK else self.width**-0.5)

    @property
    def _sign(self) -> np.ndarray:
        return word_signs((self.signs,))

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,), and the signs of residuals where there are some."""
        low, bit = unpack(blocks["qs"], 2), unpack(blocks["qr"], 1)
        if self.splits:
            return {"codes": (low | bit << 2, 8)}
        return {"codes": (low, 4), "residual signs": (bit, 2)}

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find blocks (n,) in which no coordinate is the largest."""
        codes, count = self.codes(blocks)["codes"]
        peaked = ((codes == 0) | (codes == count - 1)).any(axis=1)
        nothing = (codes == count // 2).all(axis=1)
        return {"no code of the outermost cells": ~peaked & ~nothing}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that rotate wrongly, scale to 1, or take the other codec's cells."""
        yield "not rotated", "", replace(self, signs=0, width=1)
        yield "rotated in halves", "16 values", replace(self, width=QK // 2)
        yield "sign diagonal missing", "", replace(self, signs=0)
        yield "largest coordinate laid on 1", "", replace(self, outermost=False)
        other = FOUR if self.splits else EIGHT
        yield "the other tq3_0", f"{1 << other.bits} cells", replace(self, cells=other)
