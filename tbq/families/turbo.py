"""turbo2, turbo3, turbo4 and turbo8: buun's, TheTom's, and what Excidos made of them.

What it is
    128 values share an L2 norm. The normalised vector is rotated by R, a Hadamard transform
    between two fixed sign vectors, and each rotated coordinate, about N(0, 1/128), becomes the
    index of its cell. The stored norm is divided by that of the codes' centroids, so that the
    decoded vector is as long as the input. Decoders leave the rotation to the attention graph.

Block, all fields little-endian
    turbo2         norm float16, qs: code j at bits 2j of a little-endian bit string
    turbo3         norm, qs: the low two bits of each code as in turbo2; signs: bit 2 of each code,
                   eight to a byte from the low bit up (it says "upper half", nothing is negated)
    turbo4         norm, qs: the even code in the low nibble
    turbo8         norm, qs: a byte per code
    A block holds 128 values; turbo2 and turbo3 of buun and of the first weeks of TheTom hold 32,
    four blocks with the same norm making up a group. turbo4 of TheTom had two zero bytes after the
    norm until June 2026. turbo4 of March 2026 has rnorm float16 after the norm, then qs[48] of
    3-bit codes and signs[16] of residual signs.

Quantise (k = 0.08838834764831845 as float32)
    1. n = sqrt(sum of x_j^2); the order of the sum is the writer's, see below.
    2. inv = 1/n if n > 1e-10, else 0; u = (FWHT((x * inv) * s1) * k) * s2.
    3. code_j = the first cell with u_j below its upper boundary, else the last: a value on a
       boundary goes up, NaN goes to the last. c_j = its centroid.
    4. r = sqrt(sum of c_j^2), summed as in 1. norm = fp16(n/r) if r > 1e-10, else fp16(n).
    turbo4 of TheTom's CPU code: if n is NaN, u = 0.
    turbo8: a = the largest |u_j|, at least 1e-10; code_j = rint((u_j * (1/a)) * 127.5 + 127.5),
       ties to even, cut to 0 ... 255; norm = fp16(n * a), which corrects nothing.
    tbq3_0 of Excidos: n is at least 1e-10, x/n is a division, r is at least 1e-10. Its packer
       shifts code j left by 3(j mod 8), which leaves a byte: codes 3 to 7 of every eight are not
       shifted at all (a negative shift in C; what x86 makes of it), all eight go into one byte, and
       the two bytes that follow stay zero.
    turbo4 of March 2026: 3-bit codes; e = x * inv - c, although c is rotated and x is not; rnorm =
       sqrt(sum of e_j^2); p = (FWHT(e * t1) * k) * t2; sign_j is set if p_j >= 0;
       norm = fp16(n / |c + s * q|), s_j = +1 where the sign is set and -1 elsewhere, with
       q = (1.2533141 / 128) * rnorm.

Order of the sums
    ordered  j ascending: CPU code, and kernels with a thread per group
    tree     slot j takes slot j + h, h = 64 ... 1: buun's turbo4 and turbo8 since 2026-07-08
    warps    32 values at a time as a tree, the four sums in order: TheTom's CUDA code

Dequantise
    y_j = c_j * norm, still rotated. turbo8: c = (code - 127.5) / 127.5 rounded to 8 decimals.
    turbo4 of March 2026: (c_j + s_j * q) * norm, rnorm as stored.
    Restored, as buun's attention does with keys: ((FWHT(c * s2) * k) * s1) * norm. Excidos' decoder
    returns that, its tbq3_0 from a 3-bit string, which is not what its packer wrote.

Source
    spiritbuun/buun-llama-cpp @ 1c4788192 and the tree of 7939b6c47: ggml/src/ggml-cuda/
    turbo-quant-cuda.cuh, set-rows.cu, fattn.cu. TheTom/llama-cpp-turboquant @ 69d8e4be4:
    ggml/src/ggml-turbo-quant.c, ggml-cuda/set-rows.cu; tables since 2026-06-26 as copied by
    adromir/llama-cpp-turboquant @ 500023149. jzh20042003/llama.cpp-turboq-mtp @ 10d7ff4f6. CUDA
    code is meant without -use_fast_math; with it a value within rounding of a boundary can take the
    neighbouring code. The sign words come from NumPy: default_rng(42), then choice([-1, 1], 128)
    twice, and default_rng(1042) for the residual's.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.cells import Cells
from tbq.codec import Codec, Domain, Layout, Stages
from tbq.numerics import SUMS, fp16_bits, fwht, other_sums, word_signs

GROUP = 128
TINY = np.float32(1e-10)
Words = tuple[int, int, int, int]
S1: Words = (0xE46A0359, 0x42F85949, 0xA4C63BBB, 0x49F250A9)
S2: Words = (0x16ACEE90, 0x3F628FDC, 0xB7A5357A, 0xBEA56562)
# The second rotation of turbo4 of March 2026.
T1: Words = (0x693A565E, 0x25622D30, 0x0243E607, 0xFEC58BDA)
T2: Words = (0x3D172324, 0x203007CB, 0x9540A34B, 0x856B1126)
PLUS: Words = (0, 0, 0, 0)
K128 = 0.08838834764831845
QJL = np.float32(1.2533141) / np.float32(GROUP)

# source: base tables of buun's and TheTom's code, decimals as written there
TWO = Cells((0.039994, 0.133462), (0.086728,))
THREE = Cells((0.021460, 0.065717, 0.117832, 0.190685), (0.043589, 0.091775, 0.154259))
FOUR = Cells(
    (0.011353, 0.034311, 0.058069, 0.083317, 0.111065, 0.143047, 0.182907, 0.241556),
    (0.022832, 0.046190, 0.070693, 0.097191, 0.127056, 0.162977, 0.212232),
)
# source: TheTom's since 2026-06-26
THREE_TRAINED = Cells((0.021663, 0.066822, 0.118786, 0.190207), (0.044243, 0.092804, 0.154496))
FOUR_TRAINED = Cells(
    (0.011349, 0.034299, 0.058050, 0.083292, 0.111036, 0.143016, 0.182877, 0.241529),
    (0.022824, 0.046174, 0.070671, 0.097164, 0.127026, 0.162947, 0.212203),
)
# source: TheTom's at 69d8e4be4; CPU and CUDA differ in two last digits
_NARROW = (0.006938, 0.020989, 0.035597, 0.051262, 0.068756, 0.089527, 0.117195, 0.173926)
FOUR_NARROW = Cells(_NARROW, (0.013964, 0.028293, 0.043430, 0.060009, 0.079142, 0.103361, 0.145561))
FOUR_NARROW_CPU = Cells(
    _NARROW, (0.013963, 0.028293, 0.043430, 0.060009, 0.079142, 0.103361, 0.145560)
)
# source: Excidos' at 10d7ff4f6, for N(0, 1)
THREE_UNIT = Cells((0.157976, 0.491349, 0.895384, 1.646828), (0.324663, 0.693367, 1.271106))


def grid() -> np.ndarray:
    """Return what the codes of turbo8 stand for, float32 (256,): decimals of eight places."""
    return np.round((np.arange(256) - 127.5) / 127.5, 8).astype(np.float32)


@dataclass(frozen=True)
class Rotation:
    """R = s2 . FWHT . s1 / sqrt(128) over 128 values, and its inverse.

    Attributes:
        before, after: sign words of the values before and after the transform.
        scale: what the transform is multiplied by.
        width: values that are mixed; 128, but in kernels that are wrong (1: none).
        repeated: whether narrower parts all have the signs of the first of them.
    """

    before: Words = S1
    after: Words = S2
    scale: float = K128
    width: int = GROUP
    repeated: bool = True

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Rotate float32 (n, 128)."""
        return self._transform(x * self._signs(self.before)) * self._signs(self.after)

    def inverse(self, x: np.ndarray) -> np.ndarray:
        """Rotate float32 (n, 128) back."""
        return self._transform(x * self._signs(self.after)) * self._signs(self.before)

    def _signs(self, words: Words) -> np.ndarray:
        signs = word_signs(words)
        return np.tile(signs[: self.width], GROUP // self.width) if self.repeated else signs

    def _transform(self, x: np.ndarray) -> np.ndarray:
        parts = x.reshape(len(x), -1, self.width)
        return fwht(parts).reshape(x.shape) * np.float32(self.scale)

    def wrong(self) -> Iterator[tuple[str, str, Rotation]]:
        """Yield rotations of wrong kernels: (bug, detail, rotation)."""
        yield "not rotated", "", Rotation(PLUS, PLUS, 1.0, 1)
        halves = replace(self, scale=0.125, width=64)
        yield "rotated in halves", "64 values", halves
        signs = "64 values, with the signs of all 128"
        yield "rotated in halves", signs, replace(halves, repeated=False)
        yield "sign vectors swapped", "", replace(self, before=self.after, after=self.before)
        yield "sign diagonal missing", "before the transform", replace(self, before=PLUS)
        yield "sign diagonal missing", "after the transform", replace(self, after=PLUS)
        yield "sign diagonal missing", "both", replace(self, before=PLUS, after=PLUS)


R = Rotation()
RESIDUAL = Rotation(T1, T2)


def inverse_norm(n: np.ndarray) -> np.ndarray:
    """Return what float32 (n, 128) is multiplied by to become a unit vector, (n, 1)."""
    return np.where(n > TINY, np.float32(1) / n, np.float32(0))[:, None]


def corrected(n: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return the norm n over r, that of the centroids, or n where that is nothing."""
    return np.where(r > TINY, n / r, n)


class _Turbo(Codec):
    """What the formats have in common: they rotate, and the graph rotates back."""

    rotation: Rotation

    group_values: ClassVar[int] = GROUP
    rotation_values: ClassVar[int] = GROUP
    gives: Domain = "rotated"

    def rotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Rotate float32 (n, 128) by R."""
        return self.rotation.forward(x)

    def unrotate(self, x: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
        """Rotate float32 (n, 128) by the inverse of R."""
        return self.rotation.inverse(x)

    def centroids(self, blocks: np.ndarray) -> np.ndarray:
        """Return what the codes of blocks stand for, float32 (groups, 128)."""
        raise NotImplementedError

    def norms(self, blocks: np.ndarray) -> np.ndarray:
        """Return the norm that each value of blocks is multiplied by, float32 (groups, 128)."""
        norms = np.repeat(blocks["norm"].astype(np.float32), self.block_values)
        return norms.reshape(-1, GROUP)

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return c * norm of blocks, float32 (groups, 128), rotated."""
        with np.errstate(all="ignore"):
            return self.centroids(blocks) * self.norms(blocks)

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks to float32 (groups, 128), in the domain that the codec gives."""
        return self.levels(blocks) if self.gives == "rotated" else self.restore(blocks)

    def restore(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks to float32 (groups, 128), rotated back before the norm comes in."""
        with np.errstate(all="ignore"):
            return self.unrotate(self.centroids(blocks), blocks) * self.norms(blocks)


@dataclass(frozen=True)
class RotatedCells(_Turbo):
    """turbo2, turbo3 and turbo4, and Excidos' tbq4_0.

    Attributes:
        cells: centroids and boundaries.
        block_values: 128, or 32 with four blocks to a group.
        total: the order of sums, a key of SUMS.
        reserved: zero bytes between norm and codes.
        clears_nan: whether a norm that is NaN makes the codes those of zero.
        gives: "rotated", or "original" if the decoder rotates back.
        rotation: R.
        corrected: whether the norm is divided by that of the centroids; always, but in kernels
            that are wrong.
    """

    cells: Cells
    block_values: int = GROUP
    total: str = "ordered"
    reserved: int = 0
    clears_nan: bool = False
    gives: Domain = "rotated"
    rotation: Rotation = R
    corrected: bool = True

    @cached_property
    def layout(self) -> Layout:
        """Norm, reserved bytes, codes; codes of 3 bits in two fields."""
        fields = [("norm", "<f2")]
        if self.reserved:
            fields.append(("rnorm", "u1", self.reserved))
        low = 2 if self.cells.bits == 3 else self.cells.bits
        fields.append(("qs", "u1", self.block_values * low // 8))
        codes = ("qs",)
        if self.cells.bits == 3:
            fields.append(("signs", "u1", self.block_values // 8))
            codes = ("qs", "signs")
        padding = ("rnorm",) if self.reserved else ()
        return Layout(np.dtype(fields), ("norm",), codes, padding=padding)

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Where cells meet, among rotated unit vectors."""
        return {"codes": self.cells.edges.astype(np.float64)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n * group_blocks,)."""
        with np.errstate(all="ignore"):
            n, u = self._rotated(x)
            codes = self.cells.upper(u)
            norm = self._norm(n, self.cells.levels[codes])
        return self._packed(fp16_bits(norm), codes)

    def _packed(self, norm: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Pack float16 bits of norms (n,) and codes (n, 128) into blocks (n * group_blocks,)."""
        blocks = np.zeros(len(codes) * self.group_blocks, self.layout.dtype)
        blocks["norm"] = np.repeat(norm, self.group_blocks).view(np.float16)
        codes = codes.reshape(len(blocks), -1)
        if self.cells.bits == 3:
            blocks["qs"], blocks["signs"] = pack(codes & 3, 2), pack(codes >> 2, 1)
        else:
            blocks["qs"] = pack(codes, self.cells.bits)
        return blocks

    @property
    def content(self) -> Hashable:
        """Centroids and rotation; boundaries and the order of sums are the encoder's."""
        return self.cells.centroids, self.rotation

    def repacked(self, blocks: np.ndarray, source: Codec) -> np.ndarray:
        """Return blocks of other sizes, or with other reserved bytes, as this codec's."""
        norms = blocks["norm"].view(np.uint16).reshape(-1, source.group_blocks)
        codes, _ = source.codes(blocks)["codes"]
        return self._packed(norms[:, 0], codes.reshape(-1, GROUP))

    def _rotated(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = np.sqrt(SUMS[self.total](x * x))
        unit = x * inverse_norm(n)
        if self.clears_nan:
            unit[np.isnan(n)] = 0
        return n, self.rotate(unit, None)

    def _norm(self, n: np.ndarray, c: np.ndarray) -> np.ndarray:
        return corrected(n, np.sqrt(SUMS[self.total](c * c))) if self.corrected else n

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, rotated unit vector and stored norm of float32 (n, 128)."""
        with np.errstate(all="ignore"):
            n, u = self._rotated(x)
            norm = self._norm(n, self.centroids(blocks))
        return Stages(n, {"codes": u}, {"norm": np.repeat(norm, self.group_blocks)})

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        if self.cells.bits == 3:
            found = unpack(blocks["qs"], 2) | unpack(blocks["signs"], 1) << 2
        else:
            found = unpack(blocks["qs"], self.cells.bits)
        return {"codes": (found, 1 << self.cells.bits)}

    def centroids(self, blocks: np.ndarray) -> np.ndarray:
        """Return the centroids of the codes of blocks, float32 (groups, 128)."""
        codes, _ = self.codes(blocks)["codes"]
        return self.cells.levels[codes].reshape(-1, GROUP)

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find reserved bytes that are set, and groups of blocks (n,) whose norms differ."""
        found = super().anomalies(blocks, index)
        if self.group_blocks > 1:
            norms = blocks["norm"].view(np.uint16).reshape(-1, self.group_blocks)
            differ = (norms != norms[:, :1]).any(axis=1)
            found["norms that differ within a group"] = np.repeat(differ, self.group_blocks)
        return found

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that rotate wrongly, do not correct, or add in another order."""
        for bug, detail, rotation in self.rotation.wrong():
            yield bug, detail, replace(self, rotation=rotation)
        if self.gives == "original":  # else it shows in few codes and no decoded value
            short = replace(self.rotation, scale=0.0883883)
            yield "another 1/sqrt(128)", "0.0883883", replace(self, rotation=short)
        yield "norm not corrected", "", replace(self, corrected=False)
        for total in other_sums(self.total):
            yield "sums in another order", total, replace(self, total=total)


@dataclass(frozen=True)
class RotatedGrid(_Turbo):
    """turbo8.

    Attributes:
        total: the order of the sum, a key of SUMS.
        rotation: R.
        peaked: whether the norm is multiplied by the largest coordinate; always, but in kernels
            that are wrong.
    """

    total: str = "tree"
    rotation: Rotation = R
    peaked: bool = True

    block_values: ClassVar[int] = GROUP
    layout: ClassVar[Layout] = Layout(np.dtype([("norm", "<f2"), ("qs", "u1", GROUP)]), ("norm",))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Half-way between whole numbers."""
        return {"codes": np.arange(255) + 0.5}

    @property
    def content(self) -> Hashable:
        """The rotation; the order of the sum is the encoder's."""
        return replace(self, total="tree")

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n,)."""
        stages = self.stages(x, index, None)
        blocks = np.zeros(len(x), self.layout.dtype)
        blocks["norm"] = fp16_bits(stages.scales["norm"]).view(np.float16)
        # fmax and fmin, as in CUDA: NaN becomes the bound
        whole = np.fmin(np.fmax(np.rint(stages.coordinates["codes"]), 0), 255)
        blocks["qs"] = whole.astype(np.uint8)
        return blocks

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray | None) -> Stages:
        """Return norm, codes before they are rounded, and stored norm of float32 (n, 128)."""
        with np.errstate(all="ignore"):
            n = np.sqrt(SUMS[self.total](x * x))
            u = self.rotate(x * inverse_norm(n), None)
            peak = np.fmax(np.fmax.reduce(np.abs(u), axis=1), TINY)
            half = np.float32(127.5)
            steps = (u * (np.float32(1) / peak)[:, None]) * half + half
            return Stages(n, {"codes": steps}, {"norm": n * peak if self.peaked else n})

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,)."""
        return {"codes": (blocks["qs"], 256)}

    def centroids(self, blocks: np.ndarray) -> np.ndarray:
        """Return the grid values of blocks, float32 (n, 128)."""
        return grid()[blocks["qs"]]

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that rotate wrongly, leave out the largest coordinate, add in another order."""
        for bug, detail, rotation in self.rotation.wrong():
            yield bug, detail, replace(self, rotation=rotation)
        yield "largest coordinate not multiplied in", "", replace(self, peaked=False)
        for total in other_sums(self.total):
            yield "sums in another order", total, replace(self, total=total)


@dataclass(frozen=True)
class ResidualSigns(_Turbo):
    """turbo4 of March 2026: 3-bit codes and signs of a projected residual, 68 bytes.

    Read from the fork's text, which does not say in which order it adds: j ascending is assumed.

    Attributes:
        rotation, residual: the two rotations.
        used: whether the decoder has the residual; always, but in kernels that are wrong.
    """

    rotation: Rotation = R
    residual: Rotation = RESIDUAL
    used: bool = True

    block_values: ClassVar[int] = GROUP
    layout: ClassVar[Layout] = Layout(
        np.dtype([("norm", "<f2"), ("rnorm", "<f2"), ("qs", "u1", 48), ("signs", "u1", 16)]),
        ("norm", "rnorm"),
        ("qs", "signs"),
    )

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Where cells meet, and zero for the signs."""
        return {"codes": THREE.edges.astype(np.float64), "signs": np.zeros(1)}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            n, unit, u = self._rotated(x)
            codes = THREE.upper(u)
            blocks["qs"] = pack(codes, 3)
            rnorm, p = self._projected(unit, THREE.levels[codes])
            blocks["signs"] = pack((p >= 0).astype(np.uint8), 1)
            norm = self._norm(n, rnorm, blocks)
        blocks["norm"] = fp16_bits(norm).view(np.float16)
        blocks["rnorm"] = fp16_bits(rnorm).view(np.float16)
        return blocks

    def _rotated(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n = np.sqrt(SUMS["ordered"](x * x))
        unit = x * inverse_norm(n)
        return n, unit, self.rotate(unit, None)

    def _projected(self, unit: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        error = unit - c
        return np.sqrt(SUMS["ordered"](error * error)), self.residual.forward(error)

    def _norm(self, n: np.ndarray, rnorm: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        c = self._shifted(blocks, rnorm)
        return corrected(n, np.sqrt(SUMS["ordered"](c * c)))

    def _shifted(self, blocks: np.ndarray, rnorm: np.ndarray) -> np.ndarray:
        shift = (QJL * rnorm)[:, None]
        c = THREE.levels[unpack(blocks["qs"], 3)]
        return c + np.where(unpack(blocks["signs"], 1) == 1, shift, -shift)

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return norm, both coordinates and both stored norms of float32 (n, 128)."""
        with np.errstate(all="ignore"):
            n, unit, u = self._rotated(x)
            rnorm, p = self._projected(unit, THREE.levels[unpack(blocks["qs"], 3)])
            norm = self._norm(n, rnorm, blocks)
        return Stages(n, {"codes": u, "signs": p}, {"norm": norm, "rnorm": rnorm})

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return codes and residual signs of blocks (n,)."""
        return {"codes": (unpack(blocks["qs"], 3), 8), "signs": (unpack(blocks["signs"], 1), 2)}

    def centroids(self, blocks: np.ndarray) -> np.ndarray:
        """Return the centroids, moved by the residual's share, float32 (n, 128)."""
        with np.errstate(all="ignore"):
            rnorm = blocks["rnorm"].astype(np.float32)
            return self._shifted(blocks, rnorm if self.used else np.zeros_like(rnorm))

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that rotate wrongly, or leave the residual out."""
        yield "residual left out", "", replace(self, used=False)
        for bug, detail, rotation in self.rotation.wrong():
            yield bug, detail, replace(self, rotation=rotation)
        for bug, detail, rotation in self.residual.wrong():
            yield f"residual {bug}", detail, replace(self, residual=rotation)


@dataclass(frozen=True)
class OverwrittenCodes(_Turbo):
    """tbq3_0 of Excidos' CPU code, whose packer loses the codes: for recognition only.

    Attributes:
        rotation: R.
    """

    rotation: Rotation = R

    block_values: ClassVar[int] = GROUP
    gives: ClassVar[Literal["original"]] = "original"
    layout: ClassVar[Layout] = Layout(np.dtype([("d", "<f2"), ("qs", "u1", 48)]))

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """None: what is stored does not follow from the cells."""
        return {}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 128) to blocks (n,), the codes as the fork's packer leaves them."""
        stages = self.stages(x, index, None)
        blocks = np.zeros(len(x), self.layout.dtype)
        blocks["d"] = fp16_bits(stages.scales["d"]).view(np.float16)
        codes = THREE_UNIT.upper(stages.coordinates["codes"]).reshape(len(x), 16, 8)
        shifted = codes << np.array([0, 3, 6, 0, 0, 0, 0, 0], np.uint8)
        blocks["qs"][:, ::3] = np.bitwise_or.reduce(shifted, axis=-1)
        return blocks

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray | None) -> Stages:
        """Return norm, rotated unit vector and stored norm of float32 (n, 128)."""
        with np.errstate(all="ignore"):
            n = np.sqrt(SUMS["ordered"](x * x))
            n = np.where(n < TINY, TINY, n)
            u = self.rotate(x / n[:, None], None)
            c = THREE_UNIT.levels[THREE_UNIT.upper(u)]
            r = np.sqrt(SUMS["ordered"](c * c))
            return Stages(n, {"codes": u}, {"d": n / np.where(r < TINY, TINY, r)})

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,) as the decoder reads them."""
        return {"codes": (unpack(blocks["qs"], 3), 8)}

    def centroids(self, blocks: np.ndarray) -> np.ndarray:
        """Return the centroids of the codes as the decoder reads them, float32 (n, 128)."""
        return THREE_UNIT.levels[unpack(blocks["qs"], 3)]

    def norms(self, blocks: np.ndarray) -> np.ndarray:
        """Return the scale of blocks for each value, float32 (n, 128)."""
        return np.repeat(blocks["d"].astype(np.float32), GROUP).reshape(-1, GROUP)

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that rotate wrongly."""
        for bug, detail, rotation in self.rotation.wrong():
            yield bug, detail, replace(self, rotation=rotation)
