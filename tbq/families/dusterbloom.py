"""tbq2, tbq3 and tbq4 of dusterbloom's pull requests to spiritbuun/buun-llama-cpp.

What it is
    128 values share an L2 norm. The normalised vector gets fixed signs and a Hadamard transform,
    and each coordinate, about N(0, 1), becomes the index of its Lloyd-Max cell. The stored norm is
    divided by that of the codes' centroids. The decoder undoes the transform.

Block, all fields little-endian
    offset 0     qs[16b]  128 b-bit codes, code j at bit b*j of a little-endian bit string
    offset 16b   norm     float16

Quantise (the CUDA kernels; a sum is 32 values at a time as a tree, the four sums in order)
    1. n = sqrt(sum of x_j^2), at least 1e-12.
    2. u = FWHT((x / n) * sign), a division; the transform is not scaled.
    3. code_j = how many boundaries u_j exceeds: a value on a boundary goes down, NaN to code 0.
    4. r = sqrt(sum of c_j^2) over the centroids c of the codes. norm = fp16(n/r) if r > 1e-10,
       else fp16(n).

Dequantise
    y_j = ((FWHT(c)_j * 0.0883883) * sign_j) * norm. The attention kernels have the full
    0.08838834764831845 instead and round to float16.

The CPU code of the same fork (dialect dusterbloom-cpu, same layout)
    Sums are in index order. In 2 the transform is multiplied by 0.0883883, which leaves coordinates
    of N(0, 1/128) for cells of N(0, 1), and 4 stores fp16(n): blocks decode to inflated values,
    about 5, 3 and 1.5 times the input with 2, 3 and 4 bits.

Source
    spiritbuun/buun-llama-cpp pull request 2 @ 184e1199b and 5 @ a7a6d10df: ggml/src/
    ggml-tbq-quant.c, ggml-cuda/turbo-quant-cuda.cuh, tbq-quant.cu, fattn.cu; CUDA code without
    -use_fast_math.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.cells import Cells
from tbq.codec import Codec, Layout, Stages
from tbq.numerics import SUMS, fp16_bits, fwht, other_sums, word_signs

QK = 128
MIN_NORM = np.float32(1e-12)
TINY = np.float32(1e-10)
SIGNS = (0xA3B1C6D9, 0x7E4F2A85, 0xD1936CF0, 0x5B8E47A2)
SHORT, FULL = 0.0883883, 0.08838834764831845  # 1/sqrt(128) as two kernels have it

# source: turbo-quant-cuda.cuh at 184e1199b, decimals as written there
CELLS = {
    2: Cells((0.4527800346, 1.5104176085), (0.9815988216,)),
    3: Cells(
        (0.2450947664, 0.7560068854, 1.3439114671, 2.1519478649),
        (0.5005508259, 1.0499591762, 1.7479296660),
    ),
    4: Cells(
        (
            *(0.1332771696, 0.4023510241, 0.6794737713, 0.9718584055),
            *(1.2904430627, 1.6544546703, 2.1048021157, 2.7643471169),
        ),
        (
            *(0.2678140968, 0.5409123977, 0.8256660884, 1.1311507341),
            *(1.4724488665, 1.8796283930, 2.4345746163),
        ),
    ),
}


@dataclass(frozen=True)
class SignedHadamard(Codec):
    """tbq2, tbq3 and tbq4.

    Attributes:
        cells: centroids and boundaries.
        total: the order of sums, a key of SUMS.
        forward: what the encoder multiplies its transform by.
        backward: what the decoder multiplies its transform by.
        corrected: whether the norm is divided by that of the centroids.
        signs: sign words of the values.
        width: values that are mixed; 128, but in kernels that are wrong (1: none).
    """

    cells: Cells
    total: str = "warps"
    forward: float = 1.0
    backward: float = SHORT
    corrected: bool = True
    signs: tuple[int, int, int, int] = SIGNS
    width: int = QK

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    rotation_values: ClassVar[int] = QK

    @cached_property
    def layout(self) -> Layout:
        """Codes, then the norm."""
        fields = [("qs", "u1", QK * self.cells.bits // 8), ("norm", "<f2")]
        return Layout(np.dtype(fields), ("norm",))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Where cells meet, for coordinates of variance 1."""
        return {"codes": self.cells.edges.astype(np.float64)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n,)."""
        with np.errstate(all="ignore"):
            n, u = self._coordinates(x)
            codes = self.cells.lower(u)
            norm = self._norm(n, self.cells.levels[codes])
        blocks = np.zeros(len(x), self.layout.dtype)
        blocks["qs"] = pack(codes, self.cells.bits)
        blocks["norm"] = fp16_bits(norm).view(np.float16)
        return blocks

    def _coordinates(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = np.sqrt(SUMS[self.total](x * x))
        n = np.where(n < MIN_NORM, MIN_NORM, n)
        unit = x / n[:, None]
        return n, self._hadamard(unit * self._sign) * np.float32(self.forward)

    def _norm(self, n: np.ndarray, c: np.ndarray) -> np.ndarray:
        if not self.corrected:
            return n
        r = np.sqrt(SUMS[self.total](c * c))
        return np.where(r > TINY, n / r, n)

    def _hadamard(self, x: np.ndarray) -> np.ndarray:
        return fwht(x.reshape(len(x), -1, self.width)).reshape(x.shape)

    @property
    def _sign(self) -> np.ndarray:
        return word_signs(self.signs)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, transformed unit vector and stored norm of float32 (n, 128)."""
        with np.errstate(all="ignore"):
            n, u = self._coordinates(x)
            return Stages(n, {"codes": u}, {"norm": self._norm(n, self._centroids(blocks))})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 128)."""
        with np.errstate(all="ignore"):
            y = self.unrotate(self._centroids(blocks), blocks)
            return y * blocks["norm"].astype(np.float32)[:, None]

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return c * norm of blocks (n,), float32 (n, 128), still transformed."""
        with np.errstate(all="ignore"):
            return self._centroids(blocks) * blocks["norm"].astype(np.float32)[:, None]

    def _centroids(self, blocks: np.ndarray) -> np.ndarray:
        return self.cells.levels[unpack(blocks["qs"], self.cells.bits)]

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Give float32 (n, 128) its signs, transform, and scale as the decoder does."""
        return self._hadamard(x * self._sign) * np.float32(self.backward)

    def unrotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Transform float32 (n, 128), scale, and give it its signs."""
        return (self._hadamard(x) * np.float32(self.backward)) * self._sign

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        return {"codes": (unpack(blocks["qs"], self.cells.bits), 1 << self.cells.bits)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that transform wrongly, do not correct, add in another order, scale otherwise."""
        yield "not rotated", "", replace(self, signs=(0,) * 4, width=1, backward=1.0)
        yield "rotated in halves", "64 values", replace(self, width=64, backward=0.125)
        yield "sign diagonal missing", "", replace(self, signs=(0,) * 4)
        other = FULL if self.backward == SHORT else SHORT
        yield "another 1/sqrt(128)", str(other), replace(self, backward=other)
        other = SHORT if self.forward == 1.0 else 1.0
        yield "transform scaled otherwise", str(other), replace(self, forward=other)
        flipped = not self.corrected
        bug = "norm corrected" if flipped else "norm not corrected"
        yield bug, "", replace(self, corrected=flipped)
        for total in other_sums(self.total):
            yield "sums in another order", total, replace(self, total=total)
