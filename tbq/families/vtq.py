"""vtq1_1 ... vtq4_1 and vtq_mixed of llama-tq, and vtq*_1 as its CUDA code writes them.

What it is
    Values in blocks of 32, already rotated by the graph (64 at a time, see `tbq.rotation`): the
    nearest centroid of a codebook scaled by 1/sqrt(32), under a norm-corrected scale.

Block, all fields little-endian
    offset 0   d        float16 scale
    offset 2   qs[4b]   32 b-bit codes, code j at bit b*j of a little-endian bit string
               pad[2]   two zero bytes, in vtq3_1 only
    vtq_mixed  d, then ten bytes. The first three hold the eight values with j%4 == 0 as 3-bit
               codes; the other 24 are 2-bit codes at slot j - j/4 of the bytes after them. Slots
               run from 1 to 24: slot 0 stays 0, and slot 24 (j = 31) lies in the byte that the C
               struct has as padding. The code is written there all the same, and read back.

Quantise (S = 1/sqrtf(32))
    1. norm = sqrt(sum of x_j^2), j ascending. If norm < 1e-30: d = fp16(norm), all else 0.
    2. h_j = x_j * (1/norm); code_j = the first c with the smallest (h_j - cb_c*S)^2 below FLT_MAX,
       0 if there is none. With one bit: h_j >= 0. vtq_mixed: the 3-bit codebook where j%4 == 0.
    3. rn = sqrt(sum of (cb[code_j]*S)^2), j ascending; d = fp16(norm/rn) if rn > 1e-30, else
       fp16(norm).

Dequantise
    y_j = (cb[code_j] * S) * d; zeros if d < 1e-30.

The CUDA code of the same fork (dialect llama-tq-cuda, same layout)
    compares |h - cb*S| instead of the squares, first of equals; with one bit too.

Source
    LL4nc33/llama-tq @ 0f57a4ee6: ggml/src/ggml-quants.c, ggml-cuda/turboquant.cuh.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.codec import Codec, Domain, Layout, Stages
from tbq.families import codebooks
from tbq.families.ktq import QK, SCALE, TINY, exact_scale, midpoints, nearest, normalised
from tbq.numerics import fp16_bits

CODEBOOKS = codebooks.VALUES

# vtq_mixed: positions of the 3-bit values, and of the rest.
FINE = np.arange(0, QK, 4)
COARSE = np.flatnonzero(np.arange(QK) % 4)


def pack_mixed(codes: np.ndarray) -> np.ndarray:
    """Pack vtq_mixed codes (n, 32) into its ten bytes (n, 10)."""
    slots = np.zeros((len(codes), 28), np.uint8)  # slots 0 to 27 fill the seven bytes
    slots[:, 1:25] = codes[:, COARSE]
    return np.concatenate([pack(codes[:, FINE], 3), pack(slots, 2)], axis=-1)


def unpack_mixed(qs: np.ndarray) -> np.ndarray:
    """Unpack the ten bytes (n, 10) of vtq_mixed into codes (n, 32)."""
    codes = np.empty((len(qs), QK), np.uint8)
    codes[:, FINE] = unpack(qs[:, :3], 3)
    codes[:, COARSE] = unpack(qs[:, 3:], 2)[:, 1:25]
    return codes


Distance = Literal["squared", "absolute"]


def _choose(h: np.ndarray, table: np.ndarray, distance: Distance) -> np.ndarray:
    centroids = table * SCALE
    if distance == "absolute":
        return np.abs(h[..., None] - centroids).argmin(axis=-1).astype(np.uint8)
    return (h >= 0).astype(np.uint8) if len(table) == 2 else nearest(h, centroids)


@dataclass(frozen=True)
class _Nearest(Codec):
    """What plain and mixed blocks share: the nearest centroid under a corrected scale.

    Attributes:
        distance: which distance to the centroids is compared.
        corrected: whether the scale restores the norm; always, but in kernels that are wrong.
    """

    distance: Distance = "squared"
    corrected: bool = True

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    takes: ClassVar[Domain] = "rotated"
    gives: ClassVar[Domain] = "rotated"

    @abstractmethod
    def _encode(self, h: np.ndarray) -> np.ndarray:
        """Return the packed codes of normalised values (n, 32)."""

    @abstractmethod
    def _levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return cb[code] * S for blocks (n,)."""

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 32) to blocks (n,); the block index does not matter."""
        blocks = np.zeros(len(x), self.layout.dtype)
        norm, h = normalised(x)
        with np.errstate(all="ignore"):
            blocks["qs"] = self._encode(h)
            scale = exact_scale(norm, self._levels(blocks)) if self.corrected else norm
            live = ~(norm < TINY)
            blocks["qs"][~live] = 0
            blocks["d"] = fp16_bits(np.where(live, scale, norm)).view(np.float16)
        return blocks

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, coordinates and scale of float32 (n, 32)."""
        norm, h = normalised(x)
        with np.errstate(all="ignore"):
            return Stages(norm, {"codes": h}, {"d": exact_scale(norm, self._levels(blocks))})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 32)."""
        with np.errstate(all="ignore"):
            d = blocks["d"].astype(np.float32)[:, None]
            return np.where(d < TINY, np.float32(0), self._levels(blocks) * d)

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that store the norm uncorrected."""
        yield "norm not corrected", "", replace(self, corrected=False)


@dataclass(frozen=True)
class PlainBlocks(_Nearest):
    """vtq1_1 ... vtq4_1.

    Attributes:
        bits: per code, 1 to 4.
        codebook: whose table it is; another one in kernels that are wrong.
    """

    bits: int = 2
    codebook: str = "values"

    @cached_property
    def layout(self) -> Layout:
        """Scale and codes; with 3 bits two bytes of padding."""
        fields = [("d", "<f2"), ("qs", "u1", 4 * self.bits)]
        if self.bits == 3:
            return Layout(np.dtype([*fields, ("pad", "u1", 2)]), padding=("pad",))
        return Layout(np.dtype(fields))

    @property
    def _table(self) -> np.ndarray:
        return codebooks.TABLES[self.codebook][self.bits]

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Midpoints of the centroids."""
        return {"codes": midpoints(self.bits, self._table)}

    def _encode(self, h: np.ndarray) -> np.ndarray:
        return pack(_choose(h, self._table, self.distance), self.bits)

    def _levels(self, blocks: np.ndarray) -> np.ndarray:
        return self._table[unpack(blocks["qs"], self.bits)] * SCALE

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        return {"codes": (unpack(blocks["qs"], self.bits), 1 << self.bits)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that store the norm uncorrected, or have another table."""
        yield from super().mutants()
        for name in codebooks.others(self.codebook, self.bits):
            yield "another codebook", name, replace(self, codebook=name)


@dataclass(frozen=True)
class MixedBlocks(_Nearest):
    """vtq_mixed: eight 3-bit codes and 24 2-bit codes.

    Attributes:
        codebook: whose tables they are; others in kernels that are wrong.
    """

    codebook: str = "values"

    layout: ClassVar[Layout] = Layout(np.dtype([("d", "<f2"), ("qs", "u1", 10)]))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Midpoints of the codebook that each position has, (32, 7)."""
        table = np.full((QK, 7), np.nan)
        tables = codebooks.TABLES[self.codebook]
        table[FINE] = midpoints(3, tables[3])
        table[COARSE, :3] = midpoints(2, tables[2])
        return {"codes": table}

    def _encode(self, h: np.ndarray) -> np.ndarray:
        codes = np.empty(h.shape, np.uint8)
        tables = codebooks.TABLES[self.codebook]
        codes[:, FINE] = _choose(h[:, FINE], tables[3], self.distance)
        codes[:, COARSE] = _choose(h[:, COARSE], tables[2], self.distance)
        return pack_mixed(codes)

    def _levels(self, blocks: np.ndarray) -> np.ndarray:
        codes = unpack_mixed(blocks["qs"])
        levels = np.empty(codes.shape, np.float32)
        tables = codebooks.TABLES[self.codebook]
        levels[:, FINE] = tables[3][codes[:, FINE]] * SCALE
        levels[:, COARSE] = tables[2][codes[:, COARSE]] * SCALE
        return levels

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,); those with j%4 != 0 stay below 4."""
        return {"codes": (unpack_mixed(blocks["qs"]), 8)}

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find blocks (n,) with bits in the slots that hold no value."""
        slots = unpack(blocks["qs"][:, 3:], 2)
        return {"padding that is not zero": slots[:, 0].astype(bool) | slots[:, 25:].any(axis=-1)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that store the norm uncorrected, or have the tables of keys."""
        yield from super().mutants()
        yield "another codebook", "keys", replace(self, codebook="keys")
