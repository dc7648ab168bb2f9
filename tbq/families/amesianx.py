"""tbq*_0 to tbq*_4, tbqp*_0 to tbqp*_4, amx3_1 and amxv3_1 of AmesianX/TurboQuant.

What it is
    The values of a head get fixed signs and a Hadamard transform, which is not scaled, and each
    coordinate, about N(0, 1) under the block's scale, becomes the index of its Lloyd-Max cell. The
    p types spend one bit of each code on the sign of what the cell leaves over, and a second scale.
    The last digit of a name stands for the width of heads: _0 256 and 512, _1 128, _2 64, _3 64
    transformed twice, _4 512 values of a latent vector and 64 rotary ones.

Block, all fields little-endian; D values, b bits per code, code j at bit bj of a little-endian
bit string
    tbqN_x         d float16, qs[bD/8]; b = N
    tbqpN_x        d, d_qjl float16, qs[bD/8], qjl[D/8]; b = N - 1
    D is 256 for _0, 128 for _1, 64 for _2 and _3. Bit j of qjl is set where its value was not
    negative.
    tbqN_4, tbqpN_4  two blocks of tbqN_0 or tbqpN_0, fields numbered, then rope[64] float16
    amx3_1         d_wht, qs[48] as in tbq3_1, d_r float16, qr[24] of 3-bit codes, qphi[32] of
                   nibbles
    amxv3_1        tbq3_1

Quantise: _0 (heads of up to 256 values), _1, _2 (sums are in index order, T = FWHT_D . signs)
    1. n = sqrt(sum of x_j^2). If n < 1e-10 all bytes are zero.
    2. v = T(x * (1/n)); d = fp16(n).
    3. code_j = the first cell with v_j below its upper boundary, else the last: a value on a
       boundary goes up, NaN goes to the last. A scale that is NaN is stored as 7e00.
    4. p types: e_j = v_j - c_j, c the centroids.
       _1, _2   d_qjl = fp16((sum of |e_j| / D) * n); bit j is set if e_j >= 0.
       _0       d_qjl = fp16(sqrt(sum of e_j^2) * n); bit j is set if FWHT(e * qjl signs)_j >= 0.

Quantise: _0 (heads of 512: two blocks are one group), _4 (its 512), _3
    1. u = T(x) of all 512 values; of _3: u = FWHT(FWHT(x * S1) * S2).
    2. d = sqrt(sum of u_j^2 / count), of each 256 values, but of all 512 in p types. What has
       d < 1e-10 is all zero. v = u * (1/d).
    3. 3 and 4 from above, d in place of n; _3 takes the signs of e itself, the others those of the
       transform of 512. Both blocks of a p type store the same scales.
    rope = fp16 of the last 64 values of _4, also where the rest is zero.

Quantise: amx3_1, which adds to a tbq3_1 block the pairs (x_p, x_p+64) in polar form
    1. sigma = sqrt(sum over p of (x_p^2 + x_p+64^2) / 128), at least 1/1024; d_r = fp16(sigma).
    2. theta = pos * f_p, pos the number of the cell, f_p = exp(-2p ln(1e6) / 128); less
       2 pi * floor(theta / (2 pi) + 0.5).
    3. X = cos(theta) x_p + sin(theta) x_p+64, Y = -sin(theta) x_p + cos(theta) x_p+64.
    4. r0 = the cell of sqrt(X^2 + Y^2) / sigma; p0 = floor((atan2(Y, X) + pi) / (2 pi) * 16), cut
       to 0 ... 15.
    5. Among r from r0 - 2 to r0 + 2 that exist, and for each phase from p0 - 2 to p0 + 2 modulo
       16, the first with the greatest dot(q, z) - 0.7 |q - z|^2; r0 and p0 if all are NaN.
       z = (X, Y), q = sigma * radius_r times (cos, sin)((phase + 0.5) / 16 * 2 pi - pi).
    Sine, cosine, atan2 and exp are the C library's. Here they are rounded from double; a library
    that differs in the last bit can choose another code.

Dequantise (attention never does it: what follows is what its scores amount to; tbq3_2 and tbq4_2
have a decoder)
    1. w_j = c_j * d. p types of _1, _2, _3: + d_qjl * s_j, s = +1 or -1 as qjl says. Of _0 and _4:
       + (((d_qjl * 1.2533) / D) * qjl sign_j) * FWHT(s)_j; D = 512 where two blocks are a group,
       d_qjl that of the first.
    2. y_j = (FWHT(w)_j * sign_j) / D; of _3: (FWHT(FWHT(w) * S2)_j * S1_j) / 4096. rope as it is.
    amx3_1: the tbq3_1 block alone; the rest serves a score for evicting cells.

Source
    AmesianX/TurboQuant @ cb3c258c6: ggml/src/ggml-cuda/set-rows.cu, fattn-vec.cuh, convert.cu,
    triattention.cu; ggml-quants.c (tbq3_2 and tbq4_2). CUDA code is meant without -use_fast_math;
    with it a value within rounding of a boundary can take the neighbouring code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.cells import Cells
from tbq.codec import Codec, Layout, Stages
from tbq.numerics import fp16_bits, fwht, ordered_sum

BLOCK = 256  # values of the widest block
TINY = np.float32(1e-10)
QJL = np.float32(1.2533)

# source: ggml-cuda/set-rows.cu at cb3c258c6, decimals as written there
CELLS = {
    2: Cells((0.4528, 1.5104), (0.9816,)),
    3: Cells((0.2451, 0.7560, 1.3440, 2.1520), (0.5006, 1.0500, 1.7480)),
    4: Cells(
        (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6180, 2.0690, 2.7326),
        (0.2583, 0.5225, 0.7996, 1.0993, 1.4371, 1.8435, 2.4008),
    ),
}
# Sign bytes, as hexadecimal digits; source: the same file.
_FIRST = "a73b91f46dc2580eb37f24d68945ea1c63afd852970be13d76c419fe4a852cdb"
_SECOND = "d34ea8179c5be63172b90df5438a6ec7582f94e1b63d0a7cc561d84fa3971e85"
SIGNS = {64: _FIRST[:16], 128: _FIRST[:32], 256: _FIRST, 512: _FIRST + _SECOND}
PROJECTED_SIGNS = {
    256: _SECOND,
    512: "214e758d12a104886c5d2cb38ce200d430c215382bb0a532f8be8a1d4386f36f"
    "bc9bddcb058a09f32f39173c6fb8757874446f2a6a23250d614f35bb047bbc3d",
}
TWICE = (_FIRST[:16], _FIRST[16:32])


def byte_signs(digits: str) -> np.ndarray:
    """Return the signs in bytes, low bit first, as float32; a set bit is -1."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), bitorder="little")
    return np.where(bits == 1, np.float32(-1), np.float32(1))


@dataclass(frozen=True)
class Transform:
    """T: signs, then an unscaled Hadamard transform, once or twice, and the inverse of it all.

    Attributes:
        signs: sign bytes before each transform, in hexadecimal digits.
        width: values that are mixed; as many as there are signs, but in kernels that are wrong.
        gain: what the transform is multiplied by; 1, likewise.
    """

    signs: tuple[str, ...]
    width: int
    gain: float = 1.0

    @property
    def size(self) -> int:
        """Values that are transformed together."""
        return 4 * len(self.signs[0])

    @property
    def divisor(self) -> int:
        """What the same transforms once more multiply a value by."""
        return self.width ** len(self.signs)

    @property
    def scale(self) -> np.float32:
        """What makes the transform orthogonal."""
        return np.float32(1 / math.sqrt(self.divisor))

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Transform float32 (n, size)."""
        for digits in self.signs:
            x = self._mix(x * byte_signs(digits))
        return x if self.gain == 1 else x * np.float32(self.gain)

    def transposed(self, x: np.ndarray) -> np.ndarray:
        """Transform float32 (n, size) the other way; `divisor` is still to be divided by."""
        for digits in reversed(self.signs):
            x = self._mix(x) * byte_signs(digits)
        return x

    def _mix(self, x: np.ndarray) -> np.ndarray:
        return fwht(x.reshape(len(x), self.size // self.width, self.width)).reshape(x.shape)

    def wrong(self) -> Iterator[tuple[str, str, Transform]]:
        """Yield transforms of wrong kernels: (bug, detail, transform)."""
        plus = ("0" * len(self.signs[0]),)
        yield "not rotated", "", Transform(plus, 1)
        half = self.width // 2
        yield "rotated in halves", f"{half} values", replace(self, width=half)
        yield "sign diagonal missing", "", replace(self, signs=plus * len(self.signs))
        turned = tuple(_turned(digits) for digits in self.signs)
        yield "sign bits from the high end", "", replace(self, signs=turned)
        if len(self.signs) > 1:
            yield "transformed once", "", replace(self, signs=self.signs[:1])
            yield "sign vectors swapped", "", replace(self, signs=self.signs[::-1])
            yield "sign diagonal missing", "the first", replace(self, signs=plus + self.signs[1:])
            yield "sign diagonal missing", "the second", replace(self, signs=self.signs[:1] + plus)


def _turned(digits: str) -> str:
    return bytes(int(f"{byte:08b}"[::-1], 2) for byte in bytes.fromhex(digits)).hex()


@dataclass(frozen=True)
class Residual:
    """What p types keep of what the cells leave over: signs of it, and its size.

    Attributes:
        projected: sign bytes of the transform of which the signs are taken, in hexadecimal digits;
            none if they are those of the residual itself.
        share: what a sign stands for, if it is projected.
        positive: the bit that stands for plus.
        used: whether the decoder has it; always, but in kernels that are wrong.
    """

    projected: str = ""
    share: float = 1.2533
    positive: int = 1
    used: bool = True

    def coordinates(self, e: np.ndarray) -> np.ndarray:
        """Return what has the signs, of the residual float32 (n, size)."""
        return fwht(e * byte_signs(self.projected)) if self.projected else e

    def sizes(self, e: np.ndarray) -> np.ndarray:
        """Return the residual's norm if it is projected, else its mean: float32 (n,)."""
        if self.projected:
            return np.sqrt(ordered_sum(e * e))
        return ordered_sum(np.abs(e)) / np.float32(e.shape[1])

    def bits(self, p: np.ndarray) -> np.ndarray:
        """Return the stored bits of coordinates (n, size)."""
        return np.where(p >= 0, self.positive, 1 - self.positive).astype(np.uint8)

    def values(self, bits: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Return what bits (n, values) and sizes (n, values) add to the levels."""
        s = np.where(bits == self.positive, np.float32(1), np.float32(-1))
        if not self.projected:
            return size * s
        share = (size[:, :1] * np.float32(self.share)) / np.float32(bits.shape[1])
        return (share * byte_signs(self.projected)) * fwht(s)

    def wrong(self) -> Iterator[tuple[str, str, Residual]]:
        """Yield residuals of wrong kernels: (bug, detail, residual)."""
        yield "residual signs negated", "", replace(self, positive=0)
        yield "residual left out", "", replace(self, used=False)
        if self.projected:
            yield "residual not projected", "", replace(self, projected="")
            plus = "0" * len(self.projected)
            yield "residual sign diagonal missing", "", replace(self, projected=plus)


@dataclass(frozen=True)
class HadamardCells(Codec):
    """tbq and tbqp of heads of 64, 128, 256 and 512 values.

    Attributes:
        cells: centroids and boundaries.
        transform: T.
        residual: what is kept of the residual; None for tbq.
        measured: what the scale is: the "norm" of the values, or the "rms" of the coordinates.
        corrected: whether the norm is divided by that of the centroids; never, but in kernels that
            are wrong.
    """

    cells: Cells
    transform: Transform
    residual: Residual | None = None
    measured: Literal["norm", "rms"] = "norm"
    corrected: bool = False

    @property
    def group_values(self) -> int:
        """As many as are transformed together: those of a head."""
        return self.transform.size

    @property
    def rotation_values(self) -> int:
        """All values of a group."""
        return self.transform.size

    @property
    def block_values(self) -> int:
        """Up to 256."""
        return min(BLOCK, self.transform.size)

    @cached_property
    def layout(self) -> Layout:
        """Scales, codes, signs of the residual."""
        scales, codes = ("d",), [("qs", "u1", self.block_values * self.cells.bits // 8)]
        if self.residual:
            scales = ("d", "d_qjl")
            codes.append(("qjl", "u1", self.block_values // 8))
        dtype = np.dtype([*((name, "<f2") for name in scales), *codes])
        return Layout(dtype, scales, tuple(name for name, *_ in codes))

    @property
    def scales(self) -> int:
        """Scales of a group: one for each block, or, with a residual, one for all."""
        return 1 if self.residual else self.group_blocks

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Where cells meet, for coordinates of variance 1, and zero for the signs."""
        found = {"codes": self.cells.edges.astype(np.float64)}
        return found | {"signs": np.zeros(1)} if self.residual else found

    # --- encoder ---------------------------------------------------------------------------------

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, group_values) to blocks (n * group_blocks,)."""
        blocks = np.zeros(len(x) * self.group_blocks, self.layout.dtype)
        with np.errstate(all="ignore"):
            scale, v = self._coordinates(x)
            codes = self.cells.upper(v)
            size, p = self._left_over(scale, v, codes)
            blocks["d"] = self._stored(self._scale(scale, codes))
        blocks["qs"] = self._packed(codes, self.cells.bits)
        if self.residual:
            blocks["d_qjl"] = self._stored(size)
            blocks["qjl"] = self._packed(self.residual.bits(p), 1)
        blocks[self._by_block(scale < TINY)] = 0
        return blocks

    def _coordinates(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return scales (n, scales) and coordinates (n, group_values)."""
        if self.measured == "norm":
            n = np.sqrt(ordered_sum(x * x))[:, None]
            return n, self.transform.forward(x * (np.float32(1) / n))
        u = self.transform.forward(x)
        u = u.reshape(len(x), self.scales, x.shape[1] // self.scales)
        rms = np.sqrt(ordered_sum(u * u) / np.float32(u.shape[-1]))
        return rms, (u * (np.float32(1) / rms)[..., None]).reshape(x.shape)

    def _left_over(self, scale: np.ndarray, v: np.ndarray, codes: np.ndarray):
        """Return the second scale (n, 1) and what has the residual's signs (n, group_values)."""
        if not self.residual:
            return None, None
        e = v - self.cells.levels[codes]
        size = self.residual.sizes(e)
        return size[:, None] * scale, self.residual.coordinates(e)

    def _scale(self, scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
        if not self.corrected:
            return scale
        c = self.cells.levels[codes]
        c = c.reshape(len(c), self.scales, c.shape[1] // self.scales)
        count = np.float32(c.shape[-1])
        return scale / np.sqrt(ordered_sum(c * c) / count)

    def _by_block(self, scale: np.ndarray) -> np.ndarray:
        """Return what belongs to groups (n, scales) for each block (n * group_blocks,)."""
        return np.repeat(scale, self.group_blocks // self.scales, axis=1).reshape(-1)

    def _stored(self, scale: np.ndarray) -> np.ndarray:
        # abs: no scale is negative, but the sign of a NaN would depend on the order of operands
        return fp16_bits(np.abs(self._by_block(scale))).view(np.float16)

    def _packed(self, codes: np.ndarray, bits: int) -> np.ndarray:
        return pack(codes.reshape(-1, self.block_values), bits)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the first scale, coordinates and scales of float32 (n, group_values).

        Coordinates under a scale that is taken for zero decide nothing and are NaN.
        """
        with np.errstate(all="ignore"):
            scale, v = self._coordinates(x)
            codes = self.codes(blocks)["codes"][0].reshape(v.shape)
            size, p = self._left_over(scale, v, codes)
            dead = scale < TINY
            scales = {"d": self._by_block(np.where(dead, 0, self._scale(scale, codes)))}
            nothing = np.repeat(dead, x.shape[1] // self.scales, axis=1)
            coordinates = {"codes": np.where(nothing, np.float32(np.nan), v)}
            if self.residual:
                scales["d_qjl"] = self._by_block(np.where(dead, 0, size))
                coordinates["signs"] = np.where(nothing, np.float32(np.nan), p)
        return Stages(scale[:, 0], coordinates, scales)

    # --- decoder ---------------------------------------------------------------------------------

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks to float32 (n, group_values)."""
        with np.errstate(all="ignore"):
            y = self.transform.transposed(self._unscaled(blocks))
            return y / np.float32(self.transform.divisor)

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return w of blocks as an orthogonal transform leaves it, float32 (n, group_values)."""
        with np.errstate(all="ignore"):
            return self._unscaled(blocks) * self.transform.scale

    def _unscaled(self, blocks: np.ndarray) -> np.ndarray:
        codes = self.codes(blocks)
        w = self.cells.levels[codes["codes"][0]].reshape(-1, self.group_values)
        w = w * self._by_value(blocks["d"])
        if not self.residual or not self.residual.used:
            return w
        bits = codes["signs"][0].reshape(w.shape)
        return w + self.residual.values(bits, self._by_value(blocks["d_qjl"]))

    def _by_value(self, scale: np.ndarray) -> np.ndarray:
        """Return the scales of blocks for each value, float32 (n, group_values)."""
        wide = np.repeat(scale.astype(np.float32), self.block_values)
        return wide.reshape(-1, self.group_values)

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Transform float32 (n, group_values), scaled so that lengths remain."""
        return self.transform.forward(x) * self.transform.scale

    def unrotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Undo `rotate`."""
        return self.transform.transposed(x) * self.transform.scale

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes, and the residual's signs, of blocks (n,)."""
        found = {"codes": (unpack(blocks["qs"], self.cells.bits), 1 << self.cells.bits)}
        return found | {"signs": (unpack(blocks["qjl"], 1), 2)} if self.residual else found

    # --- what is wrong ---------------------------------------------------------------------------

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find codes that no scale leads to, residuals too large, and scales that should agree."""
        d = blocks["d"].astype(np.float32)
        # All coordinates in the lowest cell would be longer than they can be.
        found = {"all codes are 0 under a scale": (d != 0) & ~self._nonzero("qs", blocks)}
        if not self.residual:
            return found
        size = blocks["d_qjl"].astype(np.float32)
        # e_j^2 is at most v_j^2, or, next to zero, the square of the least centroid.
        limit = math.sqrt(1 + self.cells.centroids[0] ** 2) * 1.001
        if self.residual.projected:
            limit *= math.sqrt(self.group_values)
        with np.errstate(all="ignore"):
            large = np.isfinite(size) & (size > d * np.float32(limit) + np.float32(2.0**-23))
        found["a residual larger than the vector"] = large
        if self.group_blocks > 1:
            differ = self._differ(blocks["d"]) | self._differ(blocks["d_qjl"])
            found["scales that differ within a group"] = np.repeat(differ, self.group_blocks)
        return found

    def _differ(self, scales: np.ndarray) -> np.ndarray:
        halves = scales.view(np.uint16).reshape(-1, self.group_blocks)
        return (halves != halves[:, :1]).any(axis=1)

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that transform wrongly, scale otherwise, or have another residual."""
        for bug, detail, transform in self.transform.wrong():
            yield bug, detail, replace(self, transform=transform)
        root = float(self.transform.scale)
        if self.measured == "norm":
            scaled = replace(self.transform, gain=root)
            yield "transform scaled otherwise", f"{root:.6g}", replace(self, transform=scaled)
        yield "norm corrected", "", replace(self, corrected=True)
        if self.residual:
            for bug, detail, residual in self.residual.wrong():
                yield bug, detail, replace(self, residual=residual)


# --- _4 ------------------------------------------------------------------------------------------

ROPE = 64


@dataclass(frozen=True)
class LatentAndRope(Codec):
    """tbq*_4: the blocks of a latent vector, then rotary values as float16.

    Attributes:
        latent: the codec of the latent vector, whose groups are 512 values; 256 until v1.5.3.
    """

    latent: HadamardCells

    block_values: ClassVar[int] = 2 * BLOCK + ROPE
    group_values: ClassVar[int] = 2 * BLOCK + ROPE
    # Those of the latent vector are mixed, the others stay with them.
    rotation_values: ClassVar[int] = 2 * BLOCK + ROPE

    @cached_property
    def layout(self) -> Layout:
        """Two blocks, their fields numbered, then the rotary values."""
        inner = self.latent.layout
        numbered = [
            (f"{name}{number}", kind.base, kind.shape)
            for number in (1, 2)
            for name, (kind, _) in inner.dtype.fields.items()
        ]
        return Layout(
            np.dtype([*numbered, ("rope", "<f2", ROPE)]),
            _numbered(inner.scales),
            _numbered(inner.codes),
            floats=("rope",),
        )

    @property
    def coded_values(self) -> int:
        """Those of the latent vector."""
        return 2 * BLOCK

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Those of the latent vector's codes; rotary values have none."""
        found = {}
        for kind, edges in self.latent.boundaries.items():
            found[kind] = np.full((self.group_values, len(edges)), np.nan)
            found[kind][: 2 * BLOCK] = edges
        return found

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 576) to blocks (n,)."""
        inner = self.latent.quantize(self._latent(x), index)
        blocks = np.zeros(len(x), self.layout.dtype)
        raw = blocks.view(np.uint8).reshape(len(x), self.block_bytes)
        raw[:, : -2 * ROPE] = inner.view(np.uint8).reshape(len(x), self.block_bytes - 2 * ROPE)
        blocks["rope"] = fp16_bits(x[:, 2 * BLOCK :]).view(np.float16)
        return blocks

    def _latent(self, x: np.ndarray) -> np.ndarray:
        return x[:, : 2 * BLOCK].reshape(-1, self.latent.group_values)

    def _inner(self, blocks: np.ndarray) -> np.ndarray:
        raw = np.ascontiguousarray(blocks).view(np.uint8).reshape(len(blocks), self.block_bytes)
        return np.ascontiguousarray(raw[:, : -2 * ROPE]).view(self.latent.layout.dtype).reshape(-1)

    def _with_rope(self, inner: np.ndarray, rope: np.ndarray) -> np.ndarray:
        return np.concatenate([inner.reshape(len(rope), 2 * BLOCK), rope], axis=1)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the first scale, coordinates and scales of float32 (n, 576).

        The coordinates of rotary values are these values.
        """
        inner = self.latent.stages(self._latent(x), index, self._inner(blocks))
        rope = x[:, 2 * BLOCK :]
        scales = {}
        for name, scale in inner.scales.items():
            halves = scale.reshape(len(x), 2)
            scales |= {f"{name}1": halves[:, 0], f"{name}2": halves[:, 1]}
        coordinates = {kind: self._with_rope(v, rope) for kind, v in inner.coordinates.items()}
        return Stages(inner.norm[:: 2 * BLOCK // self.latent.group_values], coordinates, scales)

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 576)."""
        y = self.latent.dequantize(self._inner(blocks))
        return self._with_rope(y, blocks["rope"].astype(np.float32))

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return the levels of the latent vector and the rotary values, float32 (n, 576)."""
        levels = self.latent.levels(self._inner(blocks))
        return self._with_rope(levels, blocks["rope"].astype(np.float32))

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Transform the latent vectors of float32 (n, 576)."""
        return self._with_rope(self.latent.rotate(self._latent(x), None), x[:, 2 * BLOCK :])

    def unrotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Undo `rotate`."""
        return self._with_rope(self.latent.unrotate(self._latent(x), None), x[:, 2 * BLOCK :])

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,); rotary values have 0 for one."""
        none = np.zeros((len(blocks), ROPE), np.uint8)
        inner = self.latent.codes(self._inner(blocks))
        return {kind: (self._with_rope(codes, none), n) for kind, (codes, n) in inner.items()}

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find what is wrong with either half of the latent vector."""
        inner = self._inner(blocks)
        found = self.latent.anomalies(inner, np.repeat(index, 2))
        return {what: bad.reshape(-1, 2).any(axis=1) for what, bad in found.items()}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that are wrong for the latent vector, or transform its halves alone."""
        for bug, detail, latent in self.latent.mutants():
            yield bug, detail, replace(self, latent=latent)


def _numbered(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}{number}" for number in (1, 2) for name in names)


# --- amx3_1 --------------------------------------------------------------------------------------

PAIRS = 64
# source: ggml-cuda/set-rows.cu at cb3c258c6, decimals as written there
RADII = (0.3399, 0.6422, 0.8651, 1.0730, 1.2869, 1.5277, 1.8371, 2.4546)
RADIUS_EDGES = (0.5168, 0.7585, 0.9695, 1.1774, 1.4006, 1.6651, 2.0393)
PHASES = 16
REACH = 2  # how far from the nearest radius and phase is searched
LEAST_SIGMA = np.float32(1 / 1024)
PI, TWO_PI = np.float32(math.pi), np.float32(2 * math.pi)
HALF = np.float32(0.5)


def _rounded(function):
    """Return a function of the C library as float32: computed in double and rounded."""
    return np.vectorize(lambda *args: function(*map(float, args)), otypes=[np.float32])


# math, not numpy: NumPy's SIMD functions may differ from the C library's in the last bit.
cos, sin, atan2 = _rounded(math.cos), _rounded(math.sin), _rounded(math.atan2)
exp, log = _rounded(math.exp), _rounded(math.log)


def frequencies() -> np.ndarray:
    """Return f_p, by how much the position turns each pair, float32 (64,)."""
    p = np.arange(PAIRS, dtype=np.float32)
    return exp(np.float32(-2) * p * log(np.float32(1e6)) / np.float32(128))


def phase_points() -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine of each phase, float32 (16,)."""
    step = (np.arange(PHASES, dtype=np.float32) + HALF) / np.float32(PHASES)
    phi = step * TWO_PI - PI
    return cos(phi), sin(phi)


@dataclass(frozen=True)
class PolarPairs(Codec):
    """amx3_1: a tbq3_1 block, and the same values in pairs, before their position turned them.

    Attributes:
        cells: the codec of the first 50 bytes.
        penalty: what the squared error costs a candidate (environment variable AMX3_LAMBDA).
        turned: whether the position is undone; always, but in kernels that are wrong.
        reach: how far from the nearest radius and phase is searched; 2, likewise.
    """

    cells: HadamardCells
    penalty: float = 0.7
    turned: bool = True
    reach: int = REACH

    block_values: ClassVar[int] = 2 * PAIRS
    group_values: ClassVar[int] = 2 * PAIRS
    rotation_values: ClassVar[int] = 2 * PAIRS
    position: ClassVar[Literal["cell"]] = "cell"
    layout: ClassVar[Layout] = Layout(
        np.dtype(
            [
                *(("d_wht", "<f2"), ("qs", "u1", 48)),
                *(("d_r", "<f2"), ("qr", "u1", 24), ("qphi", "u1", 32)),
            ]
        ),
        ("d_wht", "d_r"),
        ("qs", "qr", "qphi"),
    )

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Those of the first 50 bytes; the rest is found by a search."""
        return self.cells.boundaries

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) of cells index (n,) to blocks (n,)."""
        inner = self.cells.quantize(x, index)
        blocks = np.zeros(len(x), self.layout.dtype)
        blocks["d_wht"], blocks["qs"] = inner["d"], inner["qs"]
        with np.errstate(all="ignore"):
            sigma, turned_x, turned_y = self._polar(x, index)
            radii, phases = self._search(sigma, turned_x, turned_y)
        blocks["d_r"] = fp16_bits(np.abs(sigma)).view(np.float16)  # as in HadamardCells
        blocks["qr"], blocks["qphi"] = pack(radii, 3), pack(phases, 4)
        return blocks

    def _polar(self, x: np.ndarray, index: np.ndarray):
        """Return sigma (n,), and the pairs without their position: X and Y, (n, 64)."""
        kx, ky = x[:, :PAIRS], x[:, PAIRS:]
        sigma = np.sqrt(ordered_sum(kx * kx + ky * ky) / np.float32(2 * PAIRS))
        sigma = np.where(sigma < LEAST_SIGMA, LEAST_SIGMA, sigma)
        if not self.turned:
            return sigma, kx, ky
        theta = index.astype(np.float32)[:, None] * frequencies()
        theta = theta - TWO_PI * np.floor(theta / TWO_PI + HALF)
        c, s = cos(theta), sin(theta)
        return sigma, c * kx + s * ky, -s * kx + c * ky

    def _search(self, sigma: np.ndarray, x: np.ndarray, y: np.ndarray):
        """Return the codes of radii and phases, (n, 64)."""
        sigma = sigma[:, None]
        size = np.sqrt(x * x + y * y) / sigma
        r0 = (~(size[..., None] < np.array(RADIUS_EDGES, np.float32))).sum(axis=-1)
        turn = np.floor((atan2(y, x) + PI) / TWO_PI * np.float32(PHASES))
        p0 = np.clip(np.nan_to_num(turn), 0, PHASES - 1).astype(int)
        best = np.full(x.shape, -np.inf, np.float32)
        radii, phases = r0, p0
        points_x, points_y = phase_points()
        for dr in range(-self.reach, self.reach + 1):
            r = r0 + dr
            exists = (r >= 0) & (r < len(RADII))
            length = sigma * np.array(RADII, np.float32)[r % len(RADII)]
            for dp in range(-self.reach, self.reach + 1):
                phase = (p0 + dp) % PHASES
                qx, qy = length * points_x[phase], length * points_y[phase]
                ex, ey = qx - x, qy - y
                score = (qx * x + qy * y) - np.float32(self.penalty) * (ex * ex + ey * ey)
                better = exists & (score > best)
                best = np.where(better, score, best)
                radii, phases = np.where(better, r, radii), np.where(better, phase, phases)
        return radii.astype(np.uint8), phases.astype(np.uint8)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, coordinates and both scales of float32 (n, 128) of cells index (n,)."""
        norm, coordinates, scales = self.cells.stages(x, index, self._inner(blocks))
        with np.errstate(all="ignore"):
            sigma, *_ = self._polar(x, index)
        return Stages(norm, coordinates, {"d_wht": scales["d"], "d_r": sigma})

    def _inner(self, blocks: np.ndarray) -> np.ndarray:
        inner = np.zeros(len(blocks), self.cells.layout.dtype)
        inner["d"], inner["qs"] = blocks["d_wht"], blocks["qs"]
        return inner

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise the first 50 bytes of blocks (n,) to float32 (n, 128)."""
        return self.cells.dequantize(self._inner(blocks))

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return the levels of the first 50 bytes, float32 (n, 128)."""
        return self.cells.levels(self._inner(blocks))

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Transform float32 (n, 128), scaled so that lengths remain."""
        return self.cells.rotate(x, None)

    def unrotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Undo `rotate`."""
        return self.cells.unrotate(x, None)

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of values, and those of pairs, of blocks (n,)."""
        return {
            **self.cells.codes(self._inner(blocks)),
            "radii": (unpack(blocks["qr"], 3), len(RADII)),
            "phases": (unpack(blocks["qphi"], 4), PHASES),
        }

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find what is wrong with the first 50 bytes, and a second scale that is too small."""
        found = self.cells.anomalies(self._inner(blocks), index)
        return found | {"d_r below 1/1024": blocks["d_r"] < np.float16(LEAST_SIGMA)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that are wrong for the first 50 bytes, or for the pairs."""
        for bug, detail, cells in self.cells.mutants():
            yield bug, detail, replace(self, cells=cells)
        yield "position not undone", "", replace(self, turned=False)
        yield "another penalty", "0", replace(self, penalty=0.0)
        yield "greedy instead of a search", "the nearest", replace(self, reach=0)
