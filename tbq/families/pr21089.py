"""tbq3_0 and tbq4_0 of llama.cpp pull request 21089.

What it is
    256 values share one L2 norm; each 128-value half of the normalised block is multiplied by one
    fixed dense orthogonal matrix Q, and every rotated coordinate becomes the index of the
    Lloyd-Max cell for N(0, 1) that holds it.

Block, all fields little-endian
    tbq3_0   offset 0   qs[96]    256 3-bit codes, code j at bit 3j of a little-endian bit string
             offset 96  d         float16, the norm
    tbq4_0   offset 0   qs[128]   256 4-bit codes, even code in the low nibble
             offset 128 d         float16, the norm

Quantise
    1. norm = sqrt(sum of x_j^2), j ascending; below 1e-10 it is set to 1e-10.
    2. unit_j = x_j / norm, a division.
    3. per half, rot_i = sum of Q_ij unit_j, j ascending.
    4. v_i = 16 rot_i (16 = sqrt 256); code_i = the number of boundaries b that do not satisfy
       v_i < b. A value on a boundary takes the upper cell, NaN takes the last.
    5. d = fp16(norm); norms from 65520 up become infinity.

Dequantise
    1. r_i = codebook[code_i] * 0.0625.
    2. per half, u_j = sum of Q_ij r_i, i ascending.
    3. y_j = u_j * d.

Source
    ggml-org/llama.cpp pull request 21089 at f112d6de7, ggml/src/ggml-turboq.c and
    ggml-turboq-tables.h, built without FMA contraction, which is what ships on x86-64: the file
    belongs to ggml-base and gets no architecture flags. Builds that contract may choose the
    neighbouring code where a rotated value lies within rounding of a boundary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.codec import Codec, Layout, Stages
from tbq.families import codebooks
from tbq.families.dense import QR_SIZE, multiply, qr_rotation
from tbq.numerics import fp16_bits, ordered_sum, symmetric

QK_K = 256
MIN_NORM = np.float32(1e-10)
SCALE_UP = np.float32(16.0)  # sqrtf(256)
SCALE_DOWN = np.float32(0.0625)  # 1 / sqrtf(256)


def _boundaries(*positive: float) -> np.ndarray:
    half = symmetric(*positive)
    table = np.insert(half, len(positive), np.float32(0.0))
    table.setflags(write=False)
    return table


CODEBOOKS = codebooks.PR21089

# source: ggml-turboq-tables.h at f112d6de7; decimals as written there
BOUNDARIES = {
    3: _boundaries(0.5006, 1.0500, 1.7480),
    4: _boundaries(0.2583, 0.5225, 0.7996, 1.0993, 1.4371, 1.8435, 2.4008),
}


@dataclass(frozen=True)
class DenseRotated(Codec):
    """tbq3_0 and tbq4_0.

    Attributes:
        bits: per code, 3 or 4.
        transposed, rotated: whether rotations are the transposes, or there at all (in kernels
            that are wrong).
        codebook: whose table it is, likewise; that of others has its midpoints for boundaries.
        corrected: whether the norm is divided by that of the centroids; never, likewise.
    """

    bits: int
    transposed: bool = False
    rotated: bool = True
    codebook: str = "pr21089"
    corrected: bool = False

    block_values: ClassVar[int] = QK_K
    group_values: ClassVar[int] = QK_K
    rotation_values: ClassVar[int] = QR_SIZE

    @cached_property
    def layout(self) -> Layout:
        """Codes, then the norm."""
        return Layout(np.dtype([("qs", "u1", QK_K * self.bits // 8), ("d", "<f2")]))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Between the cells, for coordinates of variance 1."""
        return {"codes": self._edges.astype(np.float64)}

    @property
    def _table(self) -> np.ndarray:
        return codebooks.TABLES[self.codebook][self.bits]

    @property
    def _edges(self) -> np.ndarray:
        if self.codebook == "pr21089":
            return BOUNDARIES[self.bits]
        return (self._table[1:] + self._table[:-1]) / np.float32(2)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray | None) -> Stages:
        """Return norm, coordinates and scale of float32 (n, 256); the index does not matter."""
        with np.errstate(all="ignore"):
            norm = np.sqrt(ordered_sum(x * x))
            norm = np.where(norm < MIN_NORM, MIN_NORM, norm)
            v = self.rotate(x / norm[:, None], blocks) * SCALE_UP
        return Stages(norm, {"codes": v}, {"d": norm})

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 256) to blocks (n,)."""
        norm, coordinates, _ = self.stages(x, index, None)
        codes = (~(coordinates["codes"][..., None] < self._edges)).sum(axis=-1)
        blocks = np.zeros(len(x), self.layout.dtype)
        blocks["qs"] = pack(codes, self.bits)
        if self.corrected:
            c = self._table[codes] * SCALE_DOWN
            norm = norm / np.sqrt(ordered_sum(c * c))
        blocks["d"] = fp16_bits(norm).view(np.float16)
        return blocks

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 256)."""
        with np.errstate(all="ignore"):
            y = self.unrotate(self._unscaled(blocks), blocks)
            return y * blocks["d"].astype(np.float32)[:, None]

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return the scaled levels of blocks (n,), float32 (n, 256), still rotated."""
        with np.errstate(all="ignore"):
            return self._unscaled(blocks) * blocks["d"].astype(np.float32)[:, None]

    def _unscaled(self, blocks: np.ndarray) -> np.ndarray:
        return self._table[unpack(blocks["qs"], self.bits)] * SCALE_DOWN

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Rotate each half of float32 (n, 256) by Q."""
        return self._multiply(qr_rotation().T if self.transposed else qr_rotation(), x)

    def unrotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Rotate each half of float32 (n, 256) by the transpose of Q."""
        return self._multiply(qr_rotation() if self.transposed else qr_rotation().T, x)

    def _multiply(self, matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
        if not self.rotated:
            return x
        return multiply(matrix, x.reshape(-1, QR_SIZE)).reshape(x.shape)

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        return {"codes": (unpack(blocks["qs"], self.bits), 1 << self.bits)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels without the rotation, with its transpose, another table, or another norm."""
        yield "not rotated", "", replace(self, rotated=False)
        yield "rotated with the transpose", "", replace(self, transposed=True)
        for name in codebooks.others(self.codebook, self.bits):
            yield "another codebook", name, replace(self, codebook=name)
        yield "norm corrected", "", replace(self, corrected=True)
