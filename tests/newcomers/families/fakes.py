"""A group of four blocks; two scales; fields with unusual names; a codec that depends on head_dim.

What it is
    Each is the smallest codec that has the trait it is named for.

Block, Quantise, Dequantise
    As the classes below say.

Source
    None: these formats exist in tests only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.codec import Codec, Domain, Layout, Position, Stages
from tbq.numerics import fnv1a, fp16_bits, fwht, ordered_sum, symmetric

TABLE = symmetric(0.25, 0.75, 1.35, 2.15)
EDGES = ((TABLE[1:] + TABLE[:-1]) / 2).astype(np.float32)
TWO_BITS = symmetric(0.45, 1.5)
TWO_EDGES = np.array([-1.0, 0.0, 1.0], np.float32)
K128 = np.float32(0.08838834764831845)
ROOT128 = np.float32(11.313708)
ROOT64 = np.float32(8.0)
SIGNS = np.where(np.arange(128) % 3 == 0, np.float32(-1), np.float32(1))


def norms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(ordered_sum(x * x))


def inverse(n: np.ndarray) -> np.ndarray:
    return np.where(n > 0, np.float32(1) / n, np.float32(0))[:, None]


def at_least(v: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return (v[..., None] >= edges).sum(axis=-1).astype(np.uint8)


@dataclass(frozen=True)
class Quad(Codec):
    """128 values in four blocks of 32 that repeat one scale; rotated by the encoder alone."""

    rotated: bool = True
    layout: ClassVar[Layout] = Layout(
        np.dtype([("low", "u1", 8), ("size", "<f2"), ("high", "u1", 4)]),
        scales=("size",),
        codes=("low", "high"),
    )
    block_values: ClassVar[int] = 32
    group_values: ClassVar[int] = 128
    rotation_values: ClassVar[int] = 128
    gives: ClassVar[Domain] = "rotated"

    @property
    def boundaries(self):
        return {"codes": EDGES.astype(np.float64)}

    def stages(self, x, index, blocks):
        with np.errstate(all="ignore"):
            n = norms(x)
            v = self.rotate(x * inverse(n), None) * ROOT128
        return Stages(n, {"codes": v}, {"size": np.repeat(n * K128, 4)})

    def quantize(self, x, index):
        stages = self.stages(x, index, None)
        codes = at_least(stages.coordinates["codes"], EDGES).reshape(-1, 32)
        blocks = np.zeros(len(codes), self.layout.dtype)
        blocks["low"], blocks["high"] = pack(codes & 3, 2), pack(codes >> 2, 1)
        blocks["size"] = fp16_bits(stages.scales["size"]).view("<f2")
        return blocks

    def dequantize(self, blocks):
        with np.errstate(all="ignore"):
            codes = self.codes(blocks)["codes"][0]
            return (TABLE[codes] * blocks["size"].astype(np.float32)[:, None]).reshape(-1, 128)

    def rotate(self, x, blocks):
        return fwht(x * SIGNS) * K128 if self.rotated else x

    def unrotate(self, x, blocks):
        return fwht(x) * K128 * SIGNS if self.rotated else x

    def codes(self, blocks):
        return {"codes": (unpack(blocks["low"], 2) | unpack(blocks["high"], 1) << 2, 8)}

    def anomalies(self, blocks, index):
        size = blocks["size"].view("<u2").reshape(-1, 4)
        return {"norms that differ in a group": np.repeat((size != size[:, :1]).any(axis=1), 4)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        yield "not rotated", "", replace(self, rotated=False)


@dataclass(frozen=True)
class TwoScales(Codec):
    """64 values: 2-bit codes under one scale, the signs of what is left under another."""

    layout: ClassVar[Layout] = Layout(
        np.dtype([("a", "<f2"), ("b", "<f2"), ("qs", "u1", 16), ("rest", "u1", 8)]),
        scales=("a", "b"),
        codes=("qs", "rest"),
    )
    block_values: ClassVar[int] = 64
    group_values: ClassVar[int] = 64

    @property
    def boundaries(self):
        return {"codes": TWO_EDGES.astype(np.float64), "residual signs": np.zeros(1)}

    def stages(self, x, index, blocks):
        with np.errstate(all="ignore"):
            n = norms(x)
            u = x * inverse(n) * ROOT64
            rest = u - TWO_BITS[at_least(u, TWO_EDGES)]
            left = ordered_sum(np.abs(rest)) / np.float32(64) * (n / ROOT64)
        return Stages(n, {"codes": u, "residual signs": rest}, {"a": n / ROOT64, "b": left})

    def quantize(self, x, index):
        stages = self.stages(x, index, None)
        blocks = np.zeros(len(x), self.layout.dtype)
        for name, scale in stages.scales.items():
            blocks[name] = fp16_bits(scale).view("<f2")
        blocks["qs"] = pack(at_least(stages.coordinates["codes"], TWO_EDGES), 2)
        blocks["rest"] = pack((stages.coordinates["residual signs"] >= 0).astype(np.uint8), 1)
        return blocks

    def dequantize(self, blocks):
        with np.errstate(all="ignore"):
            a, b = (blocks[name].astype(np.float32)[:, None] for name in "ab")
            sign = unpack(blocks["rest"], 1).astype(np.float32) * np.float32(2) - np.float32(1)
            return TWO_BITS[unpack(blocks["qs"], 2)] * a + sign * b

    def codes(self, blocks):
        kinds = {"codes": (unpack(blocks["qs"], 2), 4)}
        return kinds | {"residual signs": (unpack(blocks["rest"], 1), 2)}


def seeded(index: np.ndarray) -> np.ndarray:
    """Return the 32 sign bits (n, 32) of block indices: the bits of a hash."""
    words = fnv1a(index).astype("<u4").view(np.uint8).reshape(-1, 4)
    return unpack(words, 1)


@dataclass(frozen=True)
class OddNames(Codec):
    """32 values with seeded signs; no field has a name that another family uses."""

    position: Position = "row"
    layout: ClassVar[Layout] = Layout(
        np.dtype(
            [("mantissas", "u1", 16), ("hole", "u1", 2), ("spread", "<f2"), ("flips", "u1", 4)]
        ),
        scales=("spread",),
        codes=("mantissas",),
        signs="flips",
        padding=("hole",),
    )
    block_values: ClassVar[int] = 32
    group_values: ClassVar[int] = 32
    rotation_values: ClassVar[int] = 32

    @cached_property
    def table(self) -> np.ndarray:
        return (np.arange(16, dtype=np.float32) - np.float32(7.5)) / np.float32(8)

    @property
    def boundaries(self):
        return {"codes": (np.arange(15) - 7.0) / 8}

    def stages(self, x, index, blocks):
        sign = np.where(seeded(index) == 1, np.float32(1), np.float32(-1))
        with np.errstate(all="ignore"):
            n = np.fmax.reduce(np.abs(x), axis=1, initial=np.float32(0))
            return Stages(n, {"codes": x * sign * inverse(n)}, {"spread": n})

    def quantize(self, x, index):
        stages = self.stages(x, index, None)
        v = stages.coordinates["codes"]
        codes = at_least(v, self.boundaries["codes"].astype(np.float32))
        blocks = np.zeros(len(x), self.layout.dtype)
        blocks["mantissas"], blocks["flips"] = pack(codes, 4), pack(seeded(index), 1)
        blocks["spread"] = fp16_bits(stages.scales["spread"]).view("<f2")
        return blocks

    def dequantize(self, blocks):
        return self.unrotate(self.levels(blocks), blocks)

    def levels(self, blocks):
        with np.errstate(all="ignore"):
            codes = self.codes(blocks)["codes"][0]
            return self.table[codes] * blocks["spread"].astype(np.float32)[:, None]

    def rotate(self, x, blocks):
        sign = np.where(unpack(blocks["flips"], 1) == 1, np.float32(1), np.float32(-1))
        with np.errstate(all="ignore"):
            return x * sign

    unrotate = rotate

    def codes(self, blocks):
        return {"codes": (unpack(blocks["mantissas"], 4), 16)}

    def anomalies(self, blocks, index):
        wrong = (blocks["flips"] != pack(seeded(index), 1)).any(axis=-1)
        return super().anomalies(blocks, index) | {"signs that do not match their seed": wrong}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        other = "tensor" if self.position == "row" else "row"
        yield "another block index", "flat", replace(self, position=other)


@dataclass(frozen=True)
class ByHead(Codec):
    """64 values whose levels depend on how wide the cache's heads are."""

    unit: float

    layout: ClassVar[Layout] = Layout(np.dtype([("d", "<f2"), ("qs", "u1", 32)]))
    block_values: ClassVar[int] = 64
    group_values: ClassVar[int] = 64

    @cached_property
    def table(self) -> np.ndarray:
        return (np.arange(16, dtype=np.float32) - np.float32(7.5)) * np.float32(self.unit / 8)

    @property
    def boundaries(self):
        return {"codes": (np.arange(15) - 7.0) * self.unit / 8}

    def stages(self, x, index, blocks):
        with np.errstate(all="ignore"):
            n = np.fmax.reduce(np.abs(x), axis=1, initial=np.float32(0)) / np.float32(self.unit)
            return Stages(n, {"codes": x * inverse(n)}, {"d": n})

    def quantize(self, x, index):
        stages = self.stages(x, index, None)
        edges = self.boundaries["codes"].astype(np.float32)
        blocks = np.zeros(len(x), self.layout.dtype)
        blocks["qs"] = pack(at_least(stages.coordinates["codes"], edges), 4)
        blocks["d"] = fp16_bits(stages.scales["d"]).view("<f2")
        return blocks

    def dequantize(self, blocks):
        with np.errstate(all="ignore"):
            return self.table[unpack(blocks["qs"], 4)] * blocks["d"].astype(np.float32)[:, None]

    def codes(self, blocks):
        return {"codes": (unpack(blocks["qs"], 4), 16)}
