"""turbo4 and turbo8 as buun's CPU code has them: the CUDA code's names, ids and sizes, other bytes.

What it is
    128 values share an L2 norm. The normalised vector is multiplied by one fixed dense orthogonal
    matrix M, and each coordinate becomes the index of its cell. The stored norm is divided by that
    of the codes' centroids. The decoder multiplies by the transpose of M.

Block, all fields little-endian
    offset 0   norm   float16
    offset 2   qs     turbo4: 64 bytes, the even code in the low nibble; turbo8: a byte per code

The matrix
    State s = 42; each step is s = s * 6364136223846793005 + 1442695040888963407 modulo 2^64, and a
    draw is (s >> 11) / 2^53 after a step. Row by row every entry takes two draws, the first at
    least 1e-15: sqrt(-2 ln u1) * cos(2 pi u2) in double, stored as float32. Then modified
    Gram-Schmidt over columns, ascending: a column with a norm above 1e-10 is divided by it, and its
    projection is subtracted from every later column. float32, sums in index order.

Quantise
    1. n = sqrt(sum of x_j^2), j ascending.
    2. e = x * (1/n) if n > 1e-10, else zeros, as also for NaN; v_i = sum of M_ij e_j, j ascending.
    3. code_i = the first cell with v_i below its upper boundary, else the last.
    4. r = sqrt(sum of c_i^2) over the centroids. norm = fp16(n/r) if r > 1e-10, else fp16(n).

Dequantise
    y_j = (sum of M_ij c_i, i ascending) * norm.

Source
    spiritbuun/buun-llama-cpp @ 1c4788192 (turbo4) and the tree of 7939b6c47 (turbo8):
    ggml/src/ggml-turbo-quant.c. SHA-256 of M as little-endian float32, row by row: MATRIX_SHA256.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.codec import Codec, Layout, Stages
from tbq.errors import BackendError
from tbq.families import turbo8_tables
from tbq.families.turbo import FOUR, GROUP, TINY, corrected, inverse_norm
from tbq.numerics import MASK64, fp16_bits, ordered_sum

SEED = 42
MATRIX_SHA256 = "98e68773ebcb6d19207557e5922d907e452b75d9af049223cb6269c019ffa320"


@lru_cache(maxsize=1)
def matrix() -> np.ndarray:
    """Return M, float32 (128, 128), read-only.

    Raises:
        BackendError: this platform's C library gives a different matrix.
    """
    import hashlib  # loads OpenSSL, which takes longer than this module

    m = _orthogonal(_gaussian())
    digest = hashlib.sha256(m.astype("<f4").tobytes()).hexdigest()
    if digest != MATRIX_SHA256:
        raise BackendError(
            "math library",
            f"matrix has SHA-256 {digest}, buun's has {MATRIX_SHA256}: "
            "log, cos or sqrt rounds differently here",
        )
    m.setflags(write=False)
    return m


def _draws():
    state = SEED
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) & MASK64
        yield (state >> 11) / 2.0**53


def _gaussian() -> np.ndarray:
    draws = _draws()
    values = []
    for _ in range(GROUP * GROUP):
        u1, u2 = max(next(draws), 1e-15), next(draws)
        # math, not numpy: NumPy's SIMD log and cos may differ from libm in the last bit.
        values.append(math.sqrt(-2.0 * math.log(u1)) * math.cos(2.0 * math.pi * u2))
    return np.array(values, np.float64).astype(np.float32).reshape(GROUP, GROUP)


def _orthogonal(m: np.ndarray) -> np.ndarray:
    for j in range(GROUP):
        column = m[:, j]
        norm = np.sqrt(ordered_sum(column * column))
        if norm > TINY:
            column /= norm
        later = m[:, j + 1 :]
        later -= ordered_sum((column[:, None] * later).T) * column[:, None]
    return m


def _table(text: str) -> np.ndarray:
    table = np.array([float(word) for word in text.split()], np.float32)
    table.setflags(write=False)
    return table


LEVELS = {4: FOUR.levels, 8: _table(turbo8_tables.CENTROIDS)}
EDGES = {4: FOUR.edges, 8: _table(turbo8_tables.BOUNDARIES)}


def _multiply(m: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Multiply each row of x (n, 128) by m, every output summed over the input in index order."""
    y = np.zeros_like(x)
    for j in range(GROUP):
        y += x[:, j, None] * m[:, j]
    return y


@dataclass(frozen=True)
class DenseCells(Codec):
    """turbo4 and turbo8 of the CPU code.

    Attributes:
        bits: per code, 4 or 8.
        transposed, rotated: whether rotations are the transposes, or there at all (in kernels
            that are wrong).
        corrected: whether the norm is divided by that of the centroids; likewise.
    """

    bits: int
    transposed: bool = False
    rotated: bool = True
    corrected: bool = True

    block_values: ClassVar[int] = GROUP
    group_values: ClassVar[int] = GROUP
    rotation_values: ClassVar[int] = GROUP

    @cached_property
    def layout(self) -> Layout:
        """Norm, then the codes."""
        fields = [("norm", "<f2"), ("qs", "u1", GROUP * self.bits // 8)]
        return Layout(np.dtype(fields), ("norm",))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Where cells meet, among rotated unit vectors."""
        return {"codes": EDGES[self.bits].astype(np.float64)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n,)."""
        with np.errstate(all="ignore"):
            n, v = self._rotated(x)
            # searchsorted: how many boundaries are not above v; it sorts NaN last
            codes = np.searchsorted(EDGES[self.bits], v, side="right").astype(np.uint8)
            norm = self._norm(n, LEVELS[self.bits][codes])
        blocks = np.zeros(len(x), self.layout.dtype)
        blocks["norm"] = fp16_bits(norm).view(np.float16)
        blocks["qs"] = pack(codes, self.bits)
        return blocks

    def _rotated(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = np.sqrt(ordered_sum(x * x))
        unit = np.where((n > TINY)[:, None], x * inverse_norm(n), np.float32(0))
        return n, self.rotate(unit, None)

    def _norm(self, n: np.ndarray, c: np.ndarray) -> np.ndarray:
        return corrected(n, np.sqrt(ordered_sum(c * c))) if self.corrected else n

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, rotated unit vector and stored norm of float32 (n, 128)."""
        with np.errstate(all="ignore"):
            n, v = self._rotated(x)
            return Stages(n, {"codes": v}, {"norm": self._norm(n, self._centroids(blocks))})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 128)."""
        with np.errstate(all="ignore"):
            y = self.unrotate(self._centroids(blocks), blocks)
            return y * blocks["norm"].astype(np.float32)[:, None]

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return c * norm of blocks (n,), float32 (n, 128), still rotated."""
        with np.errstate(all="ignore"):
            return self._centroids(blocks) * blocks["norm"].astype(np.float32)[:, None]

    def _centroids(self, blocks: np.ndarray) -> np.ndarray:
        return LEVELS[self.bits][unpack(blocks["qs"], self.bits)]

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Multiply float32 (n, 128) by M."""
        return self._turn(x, self.transposed)

    def unrotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Multiply float32 (n, 128) by the transpose of M."""
        return self._turn(x, not self.transposed)

    def _turn(self, x: np.ndarray, transposed: bool) -> np.ndarray:
        if not self.rotated:
            return x
        return _multiply(matrix().T if transposed else matrix(), x)

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        return {"codes": (unpack(blocks["qs"], self.bits), 1 << self.bits)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels without the matrix, with its transpose, or that do not correct the norm."""
        yield "not rotated", "", replace(self, rotated=False)
        yield "rotated with the transpose", "", replace(self, transposed=True)
        yield "norm not corrected", "", replace(self, corrected=False)
