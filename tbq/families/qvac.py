"""pq3_0, pq4_0, tbq3_0, tbq4_0 of qvac-fabric, and their kin for 64 values: nothing is rotated.

What it is
    The attention graph has rotated the values. 128 (or 64) of them share an L2 norm; each value of
    the normalised vector becomes the index of its cell. The norm is stored as it is. tbq adds the
    signs of the residual after signs and a Hadamard transform, and the residual's norm; only the
    fork's dot product reads them.

Block, all fields little-endian; w is 128 or 64
    qs     3 or 4 bits per value, codes in a little-endian bit string
    d      float16
    qjl    tbq only: w/8 bytes, a bit per sign, set for a positive one
    d_r    tbq only: float16

Quantise
    1. n = sqrt(sum of x_j^2), j ascending. If n < 1e-15, qs and d are zero.
    2. v = x * (1/n). code_j = the first cell with v_j below its upper boundary, else the last: a
       value on a boundary goes up, NaN goes to the last. Boundaries are (c_i + c_(i+1)) * 0.5.
    3. d = fp16(n).
    4. tbq: r = x - c * d, with d as stored; m = sqrt(sum of r_j^2), j ascending; d_r = fp16(m).
    5. tbq: bits are zero if m < 1e-15; else bit j is set if FWHT(r * sign)_j > 0.

Dequantise
    y_j = c_j * d, still rotated; zeros if |d| < 1e-15.

Source
    tetherto/qvac-fabric, two files of its CPU code, read only: nothing of the fork was run. Its
    ggml type ids are not known.
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
from tbq.numerics import SUMS, fp16_bits, fwht, other_sums, word_signs

TINY = np.float32(1e-15)

# source: decimals as far as float32 keeps them; by width and bits
CENTROIDS = {
    (128, 3): (0.02160431, 0.06658561, 0.118139766, 0.18839718),
    (128, 4): (
        *(0.011296455, 0.034133904, 0.057744335, 0.082792304),
        *(0.11024677, 0.14176135, 0.18079342, 0.23762693),
    ),
    (64, 3): (0.03046918, 0.09383226, 0.16616786, 0.26391393),
    (64, 4): (
        *(0.01591077, 0.04806567, 0.081273675, 0.11643765),
        *(0.15486926, 0.19879721, 0.25285715, 0.3307482),
    ),
}
# sign words of the residual: xoshiro256** seeded with 137 and 139, by width
SIGNS = {128: (0xB5B6DFCD, 0xE52501B4, 0x53FFA164, 0xF7F72387), 64: (0x432D3322, 0x1FD86CF7)}


def midway(centroids: tuple[float, ...]) -> Cells:
    """Return the cells of positive centroids that meet half-way, in float32."""
    c = np.array(centroids, np.float32)
    edges = (c[1:] + c[:-1]) * np.float32(0.5)
    return Cells(centroids, tuple(edges.tolist()))


CELLS = {key: midway(centroids) for key, centroids in CENTROIDS.items()}


@dataclass(frozen=True)
class UnitCells(Codec):
    """pq and tbq of qvac-fabric.

    Attributes:
        cells: centroids and boundaries, of 3 or 4 bits.
        block_values: 128 or 64.
        signs: sign words of the residual; empty if it is not stored.
        total: the order of sums, a key of SUMS.
        corrected: whether the norm is divided by that of the centroids (in kernels that are wrong).
        width: values of the residual that are mixed, 0 for all (in kernels that are wrong: less).
    """

    cells: Cells
    block_values: int
    signs: tuple[int, ...] = ()
    total: str = "ordered"
    corrected: bool = False
    width: int = 0

    takes: ClassVar[Domain] = "rotated"
    gives: ClassVar[Domain] = "rotated"

    @property
    def group_values(self) -> int:
        """One block."""
        return self.block_values

    @cached_property
    def layout(self) -> Layout:
        """Codes, norm; signs of the residual and its norm."""
        fields = [("qs", "u1", self.block_values * self.cells.bits // 8), ("d", "<f2")]
        if not self.signs:
            return Layout(np.dtype(fields))
        fields += [("qjl", "u1", self.block_values // 8), ("d_r", "<f2")]
        return Layout(np.dtype(fields), ("d", "d_r"), ("qs", "qjl"))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Where cells meet, and zero for the signs."""
        found = {"codes": self.cells.edges.astype(np.float64)}
        return found | {"residual signs": np.zeros(1)} if self.signs else found

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, block_values) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            n, v = self._unit(x)
            codes = np.where((n < TINY)[:, None], 0, self.cells.upper(v)).astype(np.uint8)
            blocks["qs"] = pack(codes, self.cells.bits)
            blocks["d"] = self._stored(n, codes)
            if self.signs:
                m, turned = self._residual(x, codes, blocks["d"])
                blocks["d_r"] = fp16_bits(m).view(np.float16)
                positive = ~(m < TINY)[:, None] & (turned > 0)
                blocks["qjl"] = pack(positive.astype(np.uint8), 1)
        return blocks

    def _norm(self, x: np.ndarray) -> np.ndarray:
        # abs: no norm is negative, but the sign of a NaN would depend on the order of operands
        return np.abs(np.sqrt(SUMS[self.total](x * x)))

    def _unit(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = self._norm(x)
        return n, x * (np.float32(1) / n)[:, None]

    def _scale(self, n: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return what is stored as d, before it is rounded."""
        n = np.where(n < TINY, np.float32(0), n)
        return n / self._norm(self.cells.levels[codes]) if self.corrected else n

    def _stored(self, n: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return fp16_bits(self._scale(n, codes)).view(np.float16)

    def _residual(
        self, x: np.ndarray, codes: np.ndarray, d: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        r = x - self.cells.levels[codes] * d.astype(np.float32)[:, None]
        signed = r * word_signs(self.signs)
        return self._norm(r), fwht(signed.reshape(len(r), -1, self.width or r.shape[1])).reshape(
            r.shape
        )

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, unit vector and transformed residual, and both norms of float32 (n, w)."""
        codes = unpack(blocks["qs"], self.cells.bits)
        with np.errstate(all="ignore"):
            n, v = self._unit(x)
            coordinates, scales = {"codes": v}, {"d": self._scale(n, codes)}
            if self.signs:
                m, turned = self._residual(x, codes, blocks["d"])
                coordinates["residual signs"], scales["d_r"] = turned, m
        return Stages(n, coordinates, scales)

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, block_values)."""
        d = blocks["d"].astype(np.float32)[:, None]
        with np.errstate(all="ignore"):
            y = self.cells.levels[unpack(blocks["qs"], self.cells.bits)] * d
            return np.where(np.abs(d) < TINY, np.float32(0), y)

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,), and the signs of residuals where there are some."""
        found = {"codes": (unpack(blocks["qs"], self.cells.bits), 1 << self.cells.bits)}
        return found | {"residual signs": (unpack(blocks["qjl"], 1), 2)} if self.signs else found

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that correct the norm, add in another order, or project otherwise."""
        yield "norm corrected", "", replace(self, corrected=True)
        for total in other_sums(self.total):
            yield "sums in another order", total, replace(self, total=total)
        if self.signs:
            yield "residual not rotated", "", replace(self, width=1)
            half = self.block_values // 2
            yield "residual rotated in halves", f"{half} values", replace(self, width=half)
            plus = (0,) * len(self.signs)
            yield "residual sign diagonal missing", "", replace(self, signs=plus)
