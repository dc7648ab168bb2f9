"""Formats that no fork has, each with what the registered ones do without.

Groups of several blocks, several scales, several kinds of codes, padding that nobody writes,
headers of rows, indices that count rows, codecs that depend on the heads. Their kernels are their
specifications.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tbq import registry
from tbq.bitpack import pack, unpack
from tbq.codec import Codec, Layout, RowKernels, Stages
from tbq.dialect import Dialect, Release
from tbq.format import Format
from tbq.numerics import fp16_bits, fwht, ordered_sum, symmetric

TINY = np.float32(1e-20)
LEVELS = {2: symmetric(0.45, 1.5), 3: symmetric(0.25, 0.75, 1.3, 2.1)}


def halves(x):
    return fp16_bits(x).view(np.float16)


def edges(bits):
    table = LEVELS[bits].astype(np.float64)
    return (table[1:] + table[:-1]) / 2


def nearest(v, bits):
    """Return the code of each value: a value on a boundary takes the lower one."""
    return (v[..., None] > edges(bits)).sum(axis=-1).astype(np.uint8)


class BySpecification(Codec):
    """A codec whose kernels are NumPy."""

    @cached_property
    def kernels(self):
        def quantize(x, packed, first):
            packed[:] = self.quantize_rows(x, first)

        def dequantize(packed, y):
            y[:] = self.dequantize_rows(packed)

        def levels(packed, y):
            y[:] = self.levels(self.blocks(packed).reshape(-1)).reshape(y.shape)

        def rotate(x, blocks):
            x[:] = self.rotate(x, blocks.view(self.layout.dtype).reshape(-1))

        def unrotate(x, blocks):
            x[:] = self.unrotate(x, blocks.view(self.layout.dtype).reshape(-1))

        if self.rotation_values == 1:
            return RowKernels(quantize, dequantize, levels)
        return RowKernels(quantize, dequantize, levels, rotate, unrotate)


@dataclass(frozen=True)
class Grouped(BySpecification):
    """128 rotated values of one norm in four blocks of 32, each with the scale and two code fields.

    Takes original values, gives rotated ones.
    """

    group_values: int = 128
    rotated: bool = True

    block_values = 32
    gives = "rotated"
    layout = Layout(
        np.dtype([("norm", "<f2"), ("low", "u1", 8), ("high", "u1", 4)]),
        scales=("norm",),
        codes=("low", "high"),
    )
    boundaries = {"codes": edges(3)}

    @property
    def rotation_values(self):
        return self.group_values

    def rotate(self, x, blocks):
        unit = np.float32(1) / np.sqrt(np.float32(self.group_values))
        return fwht(x) * unit if self.rotated else x

    unrotate = rotate

    def quantize(self, x, index):
        blocks = np.zeros(len(x) * self.group_blocks, self.layout.dtype)
        norm, v = self._coordinates(x)
        with np.errstate(all="ignore"):
            codes = nearest(v, 3).reshape(-1, 32)
            blocks["low"], blocks["high"] = pack(codes & 3, 2), pack(codes >> 2, 1)
            blocks["norm"] = halves(self._scale(norm, blocks))
        return blocks

    def _coordinates(self, x):
        with np.errstate(all="ignore"):
            norm = np.sqrt(ordered_sum(x * x))
            safe = np.where(norm > TINY, norm, np.float32(1))
            unit = np.sqrt(np.float32(self.group_values))
            return norm, self.rotate(x / safe[:, None], None) * unit

    def _scale(self, norm, blocks):
        c = LEVELS[3][self._codes(blocks)].reshape(len(norm), -1)
        return np.repeat(norm / np.sqrt(ordered_sum(c * c)), self.group_blocks)

    def _codes(self, blocks):
        return unpack(blocks["low"], 2) | unpack(blocks["high"], 1) << 2

    def codes(self, blocks):
        return {"codes": (self._codes(blocks), 8)}

    def stages(self, x, index, blocks):
        norm, v = self._coordinates(x)
        with np.errstate(all="ignore"):
            return Stages(norm, {"codes": v}, {"norm": self._scale(norm, blocks)})

    def dequantize(self, blocks):
        with np.errstate(all="ignore"):
            y = LEVELS[3][self._codes(blocks)] * blocks["norm"].astype(np.float32)[:, None]
        return y.reshape(-1, self.group_values)

    def mutants(self):
        yield "not rotated", "", replace(self, rotated=False)


@dataclass(frozen=True)
class Residual(BySpecification):
    """Codes, and the signs of what they leave, each under a scale; padding that stays as it was."""

    rotated: bool = True

    block_values = group_values = rotation_values = 64
    layout = Layout(
        np.dtype(
            [("qs", "u1", 16), ("rest", "<f2"), ("rs", "u1", 8), ("no", "u1", 2), ("d", "<f2")]
        ),
        scales=("d", "rest"),
        codes=("qs", "rs"),
        padding=("no",),
        unwritten=("no",),
    )
    boundaries = {"codes": edges(2), "residual signs": np.zeros(1)}

    def rotate(self, x, blocks):
        return fwht(x) * np.float32(0.125) if self.rotated else x

    unrotate = rotate

    def quantize(self, x, index):
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            norm, coordinates, scales = self.stages(x, index, None)
            blocks["d"], blocks["rest"] = halves(scales["d"]), halves(scales["rest"])
            blocks["qs"] = pack(nearest(coordinates["codes"], 2), 2)
            blocks["rs"] = pack((coordinates["residual signs"] > 0).astype(np.uint8), 1)
        return blocks

    def stages(self, x, index, blocks):
        with np.errstate(all="ignore"):
            norm = np.sqrt(ordered_sum(x * x))
            safe = np.where(norm > TINY, norm, np.float32(1))
            u = self.rotate(x / safe[:, None], blocks) * np.float32(8)
            r = u - LEVELS[2][nearest(u, 2)]
            scale = norm / np.float32(8)
            rest = ordered_sum(np.abs(r)) / np.float32(64) * scale
        return Stages(norm, {"codes": u, "residual signs": r}, {"d": scale, "rest": rest})

    def codes(self, blocks):
        return {
            "codes": (unpack(blocks["qs"], 2), 4),
            "residual signs": (unpack(blocks["rs"], 1), 2),
        }

    def levels(self, blocks):
        with np.errstate(all="ignore"):
            d, rest = (blocks[n].astype(np.float32)[:, None] for n in ("d", "rest"))
            signs = np.where(unpack(blocks["rs"], 1) == 1, np.float32(1), np.float32(-1))
            return LEVELS[2][unpack(blocks["qs"], 2)] * d + signs * rest

    def dequantize(self, blocks):
        with np.errstate(all="ignore"):
            return self.unrotate(self.levels(blocks), blocks)

    def mutants(self):
        yield "not rotated", "", replace(self, rotated=False)


@dataclass(frozen=True)
class Headed(BySpecification):
    """Rows behind a header; signs of blocks follow from the number of their row."""

    block_values = group_values = 32
    position = "cell"
    boundaries = {"codes": np.zeros(1)}
    layout = Layout(
        np.dtype(
            [
                *(("blocks", "<u2"), ("version", "<u2")),
                *(("flips", "u1", 4), ("d", "<f2"), ("qs", "u1", 4)),
            ]
        ),
        signs="flips",
        derived=("blocks", "version"),
        per_row=("blocks", "version"),
    )

    def quantize_rows(self, x, first=0):
        blocks = self.blocks(super().quantize_rows(x, first))
        blocks["blocks"] = x.shape[1] // 32
        return self.rows(blocks)

    def quantize(self, x, index):
        blocks = np.zeros(len(x), self.layout.dtype)
        blocks["blocks"], blocks["version"] = 1, 7
        blocks["flips"] = (index[:, None] * 37 + np.arange(4) * 91 + 5).astype(np.uint8)
        with np.errstate(all="ignore"):
            _, coordinates, scales = self.stages(x, index, blocks)
            blocks["d"] = halves(scales["d"])
        blocks["qs"] = pack((coordinates["codes"] > 0).astype(np.uint8), 1)
        return blocks

    def _signs(self, blocks):
        return np.where(unpack(blocks["flips"], 1) == 1, np.float32(1), np.float32(-1))

    def stages(self, x, index, blocks):
        with np.errstate(all="ignore"):
            norm = ordered_sum(np.abs(x)) / np.float32(32)
            return Stages(norm, {"codes": x * self._signs(blocks)}, {"d": norm})

    def codes(self, blocks):
        return {"codes": (unpack(blocks["qs"], 1), 2)}

    def dequantize(self, blocks):
        bits = np.where(unpack(blocks["qs"], 1) == 1, np.float32(1), np.float32(-1))
        with np.errstate(all="ignore"):
            return bits * self._signs(blocks) * blocks["d"].astype(np.float32)[:, None]


def _format(name, codec, **fields):
    source, notes = "nobody @ never: nowhere", "For tests."
    return Format("strangers", name, codec, "KV", source, notes=notes, **fields)


TYPES = {
    60: _format("grouped", Grouped(), by_head_dim={256: Grouped(256)}),
    61: _format("residual", Residual()),
    62: _format("headed", Headed()),
}
DIALECT = Dialect("strangers", "strangers", (Release("1", TYPES),), functions=None)
FORMATS = [variant for fmt in TYPES.values() for variant in fmt.variants()]


def register():
    registry.register(DIALECT)


def unregister():
    registry.unregister(DIALECT.name)
