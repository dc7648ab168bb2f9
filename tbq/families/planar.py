"""planar3_0, planar4_0, iso3_0 and iso4_0 of Excidos' CPU code: rotations of two or four values.

What it is
    128 values share an L2 norm. The normalised vector is rotated in pairs (planar: 64 fixed angles)
    or in fours (iso: multiplied from the left by 32 fixed unit quaternions), and each coordinate
    becomes the index of the nearest centroid. The stored norm is divided by that of the centroids.
    The decoder rotates back. So few values are mixed that outliers stay where they are.

Block, all fields little-endian
    offset 0   d       float16
    offset 2   qs      3 bits: 32 bytes, the low two bits of each code, four to a byte; 4 bits: 64
                       bytes, the even code in the low nibble
    offset 34  signs   3 bits only: 16 bytes, bit 2 of each code (it says "upper half")

Quantise
    1. n = sqrt(sum of x_j^2), j ascending.
    2. v = x * (1/n) if n > 1e-10, else zeros.
    3. planar, pair i: (a, b) becomes (cos_i a - sin_i b, sin_i a + cos_i b).
       iso, group i: q_i (w, x, y, z) by the rule for quaternions, each component added from left to
       right: w = qw w - qx x - qy y - qz z, x = qw x + qx w + qy z - qz y,
       y = qw y - qx z + qy w + qz x, z = qw z + qx y - qy x + qz w.
    4. code_j = the index of the smallest |v_j - c|, the first of equal ones, 0 for NaN.
    5. r = sqrt(sum of c_j^2). d = fp16(n/r) if r > 1e-10, else fp16(n).

Dequantise
    The centroids, rotated back (sin_i, or the quaternion's last three components, negated), by d.

Source
    jzh20042003/llama.cpp-turboq-mtp @ 10d7ff4f6: ggml/src/ggml-planar-quant.c, ggml-iso-quant.c.
    The tables of centroids are buun's of 3 bits and TheTom's of 4 bits before June 2026.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.cells import Cells
from tbq.codec import Codec, Layout, Stages
from tbq.families import planar_tables
from tbq.families.turbo import FOUR_NARROW, GROUP, THREE, corrected, inverse_norm
from tbq.nearest import absolute, thresholds
from tbq.numerics import SUMS, fp16_bits, other_sums

Kind = Literal["planar", "iso"]
PARTS = {"planar": 2, "iso": 4}  # values that are mixed


def _table(*columns: str) -> np.ndarray:
    """Return columns of decimals side by side, float32 (n, columns), read-only."""
    table = np.array([column.split() for column in columns]).astype(np.float32).T
    table.setflags(write=False)
    return table


# cosine and sine of each pair; the four components of each quaternion
ROTATIONS = {
    "planar": _table(planar_tables.PLANAR_COS, planar_tables.PLANAR_SIN),
    "iso": _table(
        planar_tables.ISO_W, planar_tables.ISO_X, planar_tables.ISO_Y, planar_tables.ISO_Z
    ),
}


def inverse(rotations: np.ndarray) -> np.ndarray:
    """Return the rotations that undo these: the first component stays, the others are negated."""
    undone = -rotations
    undone[:, 0] = rotations[:, 0]
    return undone


def turn(rotations: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Rotate the parts of float32 (n, 128)."""
    parts = x.reshape(len(x), -1, rotations.shape[1])
    turned = _turn_pairs if rotations.shape[1] == 2 else _turn_fours
    return np.stack(turned(rotations.T, np.moveaxis(parts, -1, 0)), axis=-1).reshape(x.shape)


def _turn_pairs(q: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
    (cos, sin), (a, b) = q, v
    return cos * a - sin * b, sin * a + cos * b


def _turn_fours(q: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
    (qw, qx, qy, qz), (w, x, y, z) = q, v
    return (
        qw * w - qx * x - qy * y - qz * z,
        qw * x + qx * w + qy * z - qz * y,
        qw * y - qx * z + qy * w + qz * x,
        qw * z + qx * y - qy * x + qz * w,
    )


@dataclass(frozen=True)
class RotatedParts(Codec):
    """planar3_0, planar4_0, iso3_0 and iso4_0.

    Attributes:
        kind: "planar" or "iso".
        cells: the centroids, of 3 or 4 bits; their boundaries do not matter.
        transposed, rotated: whether rotations are the inverses, or there at all (in kernels that
            are wrong).
        apart: whether the values of a part lie 128 over their number apart; they are neighbours,
            but in kernels that are wrong.
        mirrored: whether quaternions are multiplied from the right, likewise.
        corrected, total: whether the norm is divided by that of the centroids, and the order of
            sums; likewise.
    """

    kind: Kind
    cells: Cells
    transposed: bool = False
    rotated: bool = True
    apart: bool = False
    mirrored: bool = False
    corrected: bool = True
    total: str = "ordered"

    block_values: ClassVar[int] = GROUP
    group_values: ClassVar[int] = GROUP

    @property
    def rotation_values(self) -> int:
        """Two or four."""
        return PARTS[self.kind]

    @cached_property
    def layout(self) -> Layout:
        """Norm, then codes, those of 3 bits in two fields."""
        if self.cells.bits == 3:
            fields = [("d", "<f2"), ("qs", "u1", GROUP // 4), ("signs", "u1", GROUP // 8)]
            return Layout(np.dtype(fields), codes=("qs", "signs"))
        return Layout(np.dtype([("d", "<f2"), ("qs", "u1", GROUP // 2)]))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Where the next centroid is nearer, among rotated unit vectors."""
        return {"codes": thresholds(self.cells.levels, absolute).astype(np.float64)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            n, v = self._rotated(x)
            # argmin takes the first of equal distances, and the first if they are NaN
            codes = np.abs(v[..., None] - self.cells.levels).argmin(axis=-1).astype(np.uint8)
            d = self._norm(n, self.cells.levels[codes])
        blocks["d"] = fp16_bits(d).view(np.float16)
        if self.cells.bits == 3:
            blocks["qs"], blocks["signs"] = pack(codes & 3, 2), pack(codes >> 2, 1)
        else:
            blocks["qs"] = pack(codes, 4)
        return blocks

    def _rotated(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = np.sqrt(SUMS[self.total](x * x))
        return n, self.rotate(x * inverse_norm(n), None)

    def _norm(self, n: np.ndarray, c: np.ndarray) -> np.ndarray:
        return corrected(n, np.sqrt(SUMS[self.total](c * c))) if self.corrected else n

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, rotated unit vector and stored norm of float32 (n, 128)."""
        with np.errstate(all="ignore"):
            n, v = self._rotated(x)
            return Stages(n, {"codes": v}, {"d": self._norm(n, self._centroids(blocks))})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 128)."""
        with np.errstate(all="ignore"):
            y = self.unrotate(self._centroids(blocks), blocks)
            return y * blocks["d"].astype(np.float32)[:, None]

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return c * d of blocks (n,), float32 (n, 128), still rotated."""
        with np.errstate(all="ignore"):
            return self._centroids(blocks) * blocks["d"].astype(np.float32)[:, None]

    def _centroids(self, blocks: np.ndarray) -> np.ndarray:
        return self.cells.levels[self.codes(blocks)["codes"][0]]

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Rotate the parts of float32 (n, 128)."""
        return self._turn(x, self.transposed)

    def unrotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Rotate the parts of float32 (n, 128) back."""
        return self._turn(x, not self.transposed)

    def _turn(self, x: np.ndarray, undo: bool) -> np.ndarray:
        if not self.rotated:
            return x
        rotations = inverse(ROTATIONS[self.kind]) if undo else ROTATIONS[self.kind]
        if self.apart:
            parts = x.reshape(len(x), rotations.shape[1], -1).swapaxes(1, 2)
            turned = turn(rotations, parts.reshape(x.shape))
            return turned.reshape(parts.shape).swapaxes(1, 2).reshape(x.shape)
        if self.mirrored:  # v q is the conjugate of q' v'
            conjugate = np.tile(np.float32([1, -1, -1, -1]), GROUP // 4)
            return turn(inverse(rotations), x * conjugate) * conjugate
        return turn(rotations, x)

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        if self.cells.bits == 3:
            return {"codes": (unpack(blocks["qs"], 2) | unpack(blocks["signs"], 1) << 2, 8)}
        return {"codes": (unpack(blocks["qs"], 4), 16)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that rotate wrongly, do not correct, or add in another order."""
        yield "not rotated", "", replace(self, rotated=False)
        yield "rotated with the transpose", "", replace(self, transposed=True)
        yield "parts of values far apart", "", replace(self, apart=True)
        if self.kind == "iso":
            yield "multiplied from the right", "", replace(self, mirrored=True)
        yield "norm not corrected", "", replace(self, corrected=False)
        for total in other_sums(self.total):
            yield "sums in another order", total, replace(self, total=total)


CELLS = {3: THREE, 4: FOUR_NARROW}
