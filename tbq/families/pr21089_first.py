"""tbqp3_0 and tbqp4_0 of the first commit of llama.cpp pull request 21089; the final one has none.

What it is
    256 values share one L2 norm. The normalised block is multiplied by a dense orthogonal matrix Q,
    and every coordinate becomes the index of its Lloyd-Max cell, with one bit less than the name
    says. What that leaves over is multiplied by a dense Gaussian matrix S, of which only the signs
    are kept, and a second scale.

Block, all fields little-endian
    tbqp3_0   offset 0   qs[64]     256 2-bit codes, code j at bit 2j of a little-endian bit string
              offset 64  signs[32]  bit j is set where coordinate j is not negative
              offset 96  d          float16, the norm
              offset 98  gamma      float16, the norm of the residual of the unit vector
    tbqp4_0   offset 0   qs[96], 3-bit codes; 96 signs[32]; 128 d; 130 gamma

Quantise, sums in index order
    1. n = sqrt(sum of x_j^2), at least 1e-10; e_j = x_j / n, a division.
    2. w_i = sum of Q_ij e_j; v_i = 16 w_i; code_i = the first cell with v_i below its upper
       boundary, else the last. m_i = codebook[code_i] * 0.0625.
    3. r_j = e_j - sum of Q_ij m_i, i ascending. gamma = sqrt(sum of r_j^2).
    4. sign_i is set if sum of S_ij r_j >= 0. d = fp16(n), gamma = fp16(gamma).

Dequantise
    t_j = sum of Q_ij m_i, u_j = sum of S_ij s_i, i ascending, s = +1 or -1 as the signs say.
    y_j = d * (t_j + (q * gamma) * u_j), q = sqrt(pi/2) / 256.

Source
    ggml-org/llama.cpp pull request 21089 @ 88dc3d10b: ggml/src/ggml-turboq.c and
    ggml-turboq-tables.h, built without FMA contraction and without AVX2, as it ships on x86-64.
    Q and S: `tbq.families.dense`. The codes of 2 bits have a table that the final commit lacks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.cells import Cells
from tbq.codec import Codec, Layout, Stages
from tbq.families.dense import QR_SIZE, gaussian_matrix, multiply, qr_rotation
from tbq.families.pr21089 import MIN_NORM, QK_K, SCALE_DOWN, SCALE_UP
from tbq.numerics import fp16_bits, ordered_sum

# source: ggml-turboq-tables.h at 88dc3d10b, decimals as written there
CELLS = {
    2: Cells((0.4528, 1.5104), (0.9816,)),
    3: Cells((0.2451, 0.7560, 1.3440, 2.1520), (0.5006, 1.0500, 1.7480)),
}
SHARE = np.float32(math.sqrt(np.float32(math.pi / 2))) / np.float32(QK_K)


@dataclass(frozen=True)
class DenseResidual(Codec):
    """tbqp3_0 and tbqp4_0 of the first commit.

    Attributes:
        cells: centroids and boundaries.
        transposed, rotated: whether Q is its transpose, or there at all (in kernels that are
            wrong).
        projected: whether the residual is multiplied by S; always, likewise.
        positive: the bit that stands for plus; 1, likewise.
        used: whether the decoder has the residual; always, likewise.
        size: of Q: that of the final commit, on halves of the block, likewise.
        corrected: whether the norm is divided by that of the centroids; never, likewise.
    """

    cells: Cells
    transposed: bool = False
    rotated: bool = True
    projected: bool = True
    positive: int = 1
    used: bool = True
    size: int = QK_K
    corrected: bool = False

    block_values: ClassVar[int] = QK_K
    group_values: ClassVar[int] = QK_K
    rotation_values: ClassVar[int] = QK_K

    @cached_property
    def layout(self) -> Layout:
        """Codes, signs of the residual, scales."""
        fields = [("qs", "u1", QK_K * self.cells.bits // 8), ("signs", "u1", QK_K // 8)]
        dtype = np.dtype([*fields, ("d", "<f2"), ("gamma", "<f2")])
        return Layout(dtype, ("d", "gamma"), ("qs", "signs"))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Where cells meet, for coordinates of variance 1, and zero for the signs."""
        return {"codes": self.cells.edges.astype(np.float64), "signs": np.zeros(1)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 256) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            norm, unit, v = self._coordinates(x)
            codes = self.cells.upper(v)
            blocks["qs"] = pack(codes, self.cells.bits)
            gamma, p = self._left_over(unit, codes)
            bits = np.where(p >= 0, self.positive, 1 - self.positive)
        blocks["signs"] = pack(bits, 1)
        if self.corrected:
            c = self._centroids(codes)
            norm = norm / np.sqrt(ordered_sum(c * c))
        blocks["d"] = fp16_bits(norm).view(np.float16)
        blocks["gamma"] = fp16_bits(gamma).view(np.float16)
        return blocks

    def _coordinates(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        norm = np.sqrt(ordered_sum(x * x))
        norm = np.where(norm < MIN_NORM, MIN_NORM, norm)
        unit = x / norm[:, None]
        return norm, unit, self.rotate(unit, None) * SCALE_UP

    def _left_over(self, unit: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        r = unit - self.unrotate(self._centroids(codes), None)
        gamma = np.sqrt(ordered_sum(r * r))
        return gamma, multiply(gaussian_matrix(), r) if self.projected else r

    def _centroids(self, codes: np.ndarray) -> np.ndarray:
        return self.cells.levels[codes] * SCALE_DOWN

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, both coordinates and both scales of float32 (n, 256)."""
        with np.errstate(all="ignore"):
            norm, unit, v = self._coordinates(x)
            gamma, p = self._left_over(unit, self.codes(blocks)["codes"][0])
        return Stages(norm, {"codes": v, "signs": p}, {"d": norm, "gamma": gamma})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 256)."""
        with np.errstate(all="ignore"):
            y = self.unrotate(self._centroids(self.codes(blocks)["codes"][0]), blocks)
            if self.used:
                y = y + self._residual(blocks)
            return blocks["d"].astype(np.float32)[:, None] * y

    def _residual(self, blocks: np.ndarray) -> np.ndarray:
        bits, _ = self.codes(blocks)["signs"]
        s = np.where(bits == self.positive, np.float32(1), np.float32(-1))
        share = SHARE * blocks["gamma"].astype(np.float32)
        return share[:, None] * (multiply(gaussian_matrix().T, s) if self.projected else s)

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return what is decoded as Q leaves it, float32 (n, 256).

        Codes alone would have their levels, but S has a rotation of its own: that of the residual
        is undone and Q applied.
        """
        with np.errstate(all="ignore"):
            levels = self._centroids(self.codes(blocks)["codes"][0])
            if self.used:
                levels = levels + self.rotate(self._residual(blocks), blocks)
            return blocks["d"].astype(np.float32)[:, None] * levels

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Multiply float32 (n, 256) by Q."""
        return self._multiply(x, self.transposed)

    def unrotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Multiply float32 (n, 256) by the transpose of Q."""
        return self._multiply(x, not self.transposed)

    def _multiply(self, x: np.ndarray, transposed: bool) -> np.ndarray:
        if not self.rotated:
            return x
        q = qr_rotation(self.size)
        parts = x.reshape(-1, self.size)
        return multiply(q.T if transposed else q, parts).reshape(x.shape)

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes, and the residual's signs, of blocks (n,)."""
        codes = (unpack(blocks["qs"], self.cells.bits), 1 << self.cells.bits)
        return {"codes": codes, "signs": (unpack(blocks["signs"], 1), 2)}

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find residuals that no block of (n,) leads to."""
        # A unit vector and centroids that are no longer than the longest: Q keeps lengths.
        longest = 1 + self.cells.centroids[-1]
        with np.errstate(all="ignore"):
            large = blocks["gamma"].astype(np.float32) > np.float32(longest * 1.001)
        found = {"a residual longer than vector and centroids": large}
        return found | {"all codes are 0": ~self._nonzero("qs", blocks)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that rotate wrongly, or have another residual or norm."""
        yield "not rotated", "", replace(self, rotated=False)
        yield "rotated with the transpose", "", replace(self, transposed=True)
        yield "residual not projected", "", replace(self, projected=False)
        yield "residual signs negated", "", replace(self, positive=0)
        yield "residual left out", "", replace(self, used=False)
        yield "rotated in halves", f"{QR_SIZE} values", replace(self, size=QR_SIZE)
        yield "norm corrected", "", replace(self, corrected=True)
