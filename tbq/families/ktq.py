"""ktq1_1 ... ktq4_1 and xktq2_1 of llama-tq, and the same types as its CUDA code writes them.

What it is
    Keys in blocks of 32: pseudo-random signs, a Hadamard transform, and the nearest centroid of a
    Lloyd-Max codebook for N(0, 1) scaled by 1/sqrt(32). The signs follow from the block's position
    and are stored too. The scale is corrected so that the decoded block has the norm of the input.

Block, all fields little-endian
    offset 0        d        float16 scale
    offset 2        qs[4b]   32 b-bit codes, code j at bit b*j of a little-endian bit string
    offset 2 + 4b   sb[4]    sign bits, bit j%8 of byte j/8 is value j; 1 means +1
    xktq2_1: d, then six zero bytes; codes and signs are those of a sibling ktq2_1 block.

Quantise (S = 1/sqrtf(32); block index i counts from the start of the row)
    1. norm = sqrt(sum of x_j^2), j ascending. If norm < 1e-30: d = fp16(norm), all else 0.
    2. seed = the low 16 bits of FNV-1a over the four bytes of i; sign_j = +1 if
       philox6(j, seed) is odd, else -1.
    3. h_j = x_j * (1/norm); r = FWHT(h * sign), then every value times S.
    4. code_j = the first c with the smallest (r_j - cb_c*S)^2 below FLT_MAX; 0 if there is none,
       as for NaN. With one bit: r_j >= 0.
    5. g = FWHT(cb[code]*S)*S*sign; rn = sqrt(sum of g_j^2).
    6. d = fp16(norm/rn) if rn > 1e-30, else fp16(norm).
    xktq2_1: d = fp16(norm) alone; with a sibling ("paired") steps 5 and 6 on the sibling's codes.

Dequantise
    y_j = (FWHT(cb[code]*S)_j * S * sign_j) * d; zeros if d < 1e-30. An xktq2_1 block alone
    decodes to zeros, with a sibling to the sibling's codes and signs under its own d.

The CUDA code of the same fork (dialect llama-tq-cuda, same layout)
    The block index runs on through the whole tensor. The code is drawn at random between the two
    nearest centroids: with b1 < b2 their distances |r - cb*S| (the first of equals is nearest) and
    u = (philox6(j + 32, seed) & 0xFFFF) / 65536, the farther is taken if b1 + b2 > 1e-30 and
    u >= b2/(b1 + b2). With one bit: 1 if u < clamp((r - c0)/(c1 - c0), 0, 1).
    Its decoders read the sign bits the other way round, bit 1 as -1, while its encoder writes them
    as above: what is decoded is the negative of what was encoded.

Source
    LL4nc33/llama-tq @ 0f57a4ee6: ggml/src/ggml-quants.c, ggml-cuda/turboquant.cuh.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import ClassVar, Literal

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.codec import Codec, Layout, Position, Stages
from tbq.families import codebooks
from tbq.numerics import fnv1a, fp16_bits, fwht, ordered_sum, philox6

QK = 32
SCALE = np.float32(1.0) / np.sqrt(np.float32(32.0))
TINY = np.float32(1e-30)

CODEBOOKS = codebooks.KEYS


def block_seed(index: np.ndarray) -> np.ndarray:
    """Return the 16-bit Philox key of block indices."""
    return fnv1a(index) & np.uint64(0xFFFF)


def sign_bits(seed: np.ndarray) -> np.ndarray:
    """Return the sign bits (n, 32) of seeds (n,); 1 means +1."""
    return (philox6(np.arange(QK), np.asarray(seed)[:, None]) & np.uint64(1)).astype(np.uint8)


@cache
def sign_words() -> np.ndarray:
    """Return the 32 sign bits of each of the 65536 seeds, int32."""
    parts = np.array_split(np.arange(1 << 16), 16)  # keeps the temporaries small
    return np.concatenate([pack(sign_bits(part), 1).view("<i4")[:, 0] for part in parts])


def nearest(r: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the first index with the smallest squared distance below FLT_MAX, else 0."""
    best = np.full(r.shape, np.finfo(np.float32).max)
    codes = np.zeros(r.shape, np.uint8)
    for c, centroid in enumerate(centroids):
        distance = (r - centroid) * (r - centroid)
        closer = distance < best
        best = np.where(closer, distance, best)
        codes[closer] = c
    return codes


def exact_scale(norm: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """Return norm/rn, rn the norm of the reconstruction (n, values), or norm for a zero block."""
    rn = np.sqrt(ordered_sum(reconstructed * reconstructed))
    return np.where((rn > TINY) & ~(norm < TINY), norm / rn, norm)


def midpoints(bits: int, centroids: np.ndarray) -> np.ndarray:
    """Return where the choice between neighbouring centroids lies, float64."""
    table = (centroids * SCALE).astype(np.float64)
    return np.zeros(1) if bits == 1 else (table[1:] + table[:-1]) / 2


def _stochastic(r: np.ndarray, seed: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Draw between the two nearest centroids, as the CUDA encoder does."""
    words = philox6(np.arange(QK, 2 * QK), np.asarray(seed)[:, None]) & np.uint64(0xFFFF)
    u = words.astype(np.float32) / np.float32(65536)
    if len(centroids) == 2:
        p1 = (r - centroids[0]) / (centroids[1] - centroids[0])
        return (u < np.clip(p1, np.float32(0), np.float32(1))).astype(np.uint8)
    distance = np.abs(r[..., None] - centroids)
    order = np.argsort(distance, axis=-1, kind="stable")
    first, second = order[..., 0], order[..., 1]
    b1, b2 = np.sort(distance, axis=-1)[..., :2].transpose(2, 0, 1)
    total = b1 + b2
    return np.where((total > TINY) & (u >= b2 / total), second, first).astype(np.uint8)


def normalised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the norms of float32 (n, 32) and its values over them."""
    with np.errstate(all="ignore"):
        norm = np.sqrt(ordered_sum(x * x))
        return norm, x * (np.float32(1) / norm)[:, None]


def stored_signs(blocks: np.ndarray, plus_bit: int) -> np.ndarray:
    """Return the signs (n, 32) of blocks (n,), +1 where the bit is plus_bit."""
    plus = unpack(blocks["sb"], 1) == plus_bit
    return np.where(plus, np.float32(1), np.float32(-1))


def _unit(codes: np.ndarray, table: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Return what codes (n, 32) under signs (n, 32) decode to before scaling."""
    return fwht(table[codes] * SCALE) * SCALE * sign


@dataclass(frozen=True)
class SignedBlocks(Codec):
    """ktq1_1 ... ktq4_1.

    Attributes:
        bits: per code, 1 to 4.
        draw: whether the code is the nearest centroid's or drawn between the two nearest.
        plus_bit: which value of a sign bit the decoder reads as +1; the encoder writes 1.
        position: what the block index counts, "row" or "tensor".
        corrected: whether the scale restores the norm; always, but in kernels that are wrong.
        width, signed, signs_after: likewise how many values are mixed (1: none), whether signs come
            with the transform, and whether they come after it (False is right).
        codebook: likewise whose table it is.
    """

    bits: int
    draw: Literal["nearest", "stochastic"] = "nearest"
    plus_bit: int = 1
    position: Position = "row"
    corrected: bool = True
    width: int = QK
    signed: bool = True
    signs_after: bool = False
    codebook: str = "keys"

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    rotation_values: ClassVar[int] = QK

    @cached_property
    def layout(self) -> Layout:
        """Scale, codes, sign bits."""
        fields = [("d", "<f2"), ("qs", "u1", 4 * self.bits), ("sb", "u1", 4)]
        return Layout(np.dtype(fields), signs="sb")

    @property
    def _table(self) -> np.ndarray:
        return codebooks.TABLES[self.codebook][self.bits]

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Midpoints of the centroids; none where chance decides."""
        if self.draw == "stochastic":
            return {}
        return {"codes": midpoints(self.bits, self._table)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 32) at block indices (n,) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        seed = block_seed(index)
        bits = sign_bits(seed)
        sign = np.where(bits == 1, np.float32(1), np.float32(-1))
        norm, h = normalised(x)
        with np.errstate(all="ignore"):
            codes = self._choose(self._transform(h, sign), seed)
            g = _unit(codes, self._table, sign)
            live = ~(norm < TINY)
            blocks["qs"][live] = pack(codes, self.bits)[live]
            blocks["sb"][live] = pack(bits, 1)[live]
            scale = exact_scale(norm, g) if self.corrected else norm
            blocks["d"] = fp16_bits(np.where(live, scale, norm)).view(np.float16)
        return blocks

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, coordinates and scale of float32 (n, 32) at block indices (n,)."""
        sign = np.where(sign_bits(block_seed(index)) == 1, np.float32(1), np.float32(-1))
        norm, h = normalised(x)
        with np.errstate(all="ignore"):
            g = _unit(unpack(blocks["qs"], self.bits), self._table, stored_signs(blocks, 1))
            return Stages(norm, {"codes": self._transform(h, sign)}, {"d": exact_scale(norm, g)})

    def _choose(self, r: np.ndarray, seed: np.ndarray) -> np.ndarray:
        centroids = self._table * SCALE
        if self.draw == "stochastic":
            return _stochastic(r, seed, centroids)
        return (r >= 0).astype(np.uint8) if self.bits == 1 else nearest(r, centroids)

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 32)."""
        with np.errstate(all="ignore"):
            d = blocks["d"].astype(np.float32)[:, None]
            levels = self._table[unpack(blocks["qs"], self.bits)] * SCALE
            return np.where(d < TINY, np.float32(0), self.unrotate(levels, blocks) * d)

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return the scaled levels of blocks (n,), float32 (n, 32), still rotated."""
        with np.errstate(all="ignore"):
            d = blocks["d"].astype(np.float32)[:, None]
            r = self._table[unpack(blocks["qs"], self.bits)] * SCALE
            return np.where(d < TINY, np.float32(0), r * d)

    def rotate(self, x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Give float32 (n, 32) the signs of blocks (n,), then transform."""
        return self._transform(x, stored_signs(blocks, self.plus_bit))

    def unrotate(self, x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Transform float32 (n, 32), then give it the signs of blocks (n,)."""
        sign = stored_signs(blocks, self.plus_bit) if self.signed else np.float32(1)
        if self.width == 1:
            return x
        return self._mix(x * sign) if self.signs_after else self._mix(x) * sign

    def _transform(self, x: np.ndarray, sign: np.ndarray) -> np.ndarray:
        sign = sign if self.signed else np.float32(1)
        if self.width == 1:
            return x
        return self._mix(x) * sign if self.signs_after else self._mix(x * sign)

    def _mix(self, x: np.ndarray) -> np.ndarray:
        scale = SCALE if self.width == QK else np.float32(self.width**-0.5)
        return fwht(x.reshape(len(x), -1, self.width)).reshape(x.shape) * scale

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        return {"codes": (unpack(blocks["qs"], self.bits), 1 << self.bits)}

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find blocks (n,) whose signs are not those that their indices (n,) seed."""
        expected = pack(sign_bits(block_seed(index)), 1)
        live = blocks["sb"].any(axis=-1) | blocks["qs"].any(axis=-1)  # a zero block has neither
        wrong = live & (blocks["sb"] != expected).any(axis=-1)
        return {"signs that do not match their seed": wrong}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels without transform, signs or correction, with other signs or another table."""
        yield "not rotated", "", replace(self, width=1)
        yield "rotated in halves", "16 values", replace(self, width=QK // 2)
        yield "sign diagonal missing", "stored all the same", replace(self, signed=False)
        yield "sign diagonal on the wrong side", "", replace(self, signs_after=True)
        yield "norm not corrected", "", replace(self, corrected=False)
        for name in codebooks.others(self.codebook, self.bits):
            yield "another codebook", name, replace(self, codebook=name)


@dataclass(frozen=True)
class BorrowedCodes(Codec):
    """xktq2_1: scales under which the codes of a sibling block are decoded.

    Alone it encodes norms and decodes to zeros, as C does.

    Attributes:
        lender: the codec of the sibling.
    """

    lender: SignedBlocks = SignedBlocks(2)

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    borrows: ClassVar[bool] = True
    layout: ClassVar[Layout] = Layout(
        np.dtype([("d", "<f2"), ("pad", "u1", 6)]), codes=(), padding=("pad",)
    )

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 32) to blocks (n,) alone: the norms."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            blocks["d"] = fp16_bits(np.sqrt(ordered_sum(x * x))).view(np.float16)
        return blocks

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Return zeros, float32 (n, 32): alone there are no codes."""
        return np.zeros((len(blocks), QK), np.float32)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the norms, which are the scales."""
        with np.errstate(all="ignore"):
            norm = np.sqrt(ordered_sum(x * x))
        return Stages(norm, {}, {"d": norm})

    def quantize_paired(self, x: np.ndarray, sibling: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 32) beside the lender's blocks (n,) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            norm = np.sqrt(ordered_sum(x * x))
            scale = np.where(norm < TINY, norm, exact_scale(norm, self._unscaled(sibling)))
        blocks["d"] = fp16_bits(scale).view(np.float16)
        return blocks

    def dequantize_paired(self, blocks: np.ndarray, sibling: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) beside the lender's blocks (n,) to float32 (n, 32)."""
        with np.errstate(all="ignore"):
            d = blocks["d"].astype(np.float32)[:, None]
            return np.where(d < TINY, np.float32(0), self._unscaled(sibling) * d)

    def _unscaled(self, sibling: np.ndarray) -> np.ndarray:
        bits = self.lender.bits
        sign = stored_signs(sibling, self.lender.plus_bit)
        return _unit(unpack(sibling["qs"], bits), CODEBOOKS[bits], sign)
