"""`Codec`: the bytes of one configuration of one algorithm, and nothing but the bytes.

A family (`tbq/families/x.py`) has a class per algorithm; a frozen instance is one configuration of
it. Two codecs are equal if each decodes the other's bytes, so their fields are plain values: bits,
a tie rule, a table as a tuple. What a fork calls a codec is a `Format`, which number it gives it is
in a `Release`; neither is known here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np

from tbq.errors import InputError

Domain = Literal["original", "rotated"]
Position = Literal["none", "row", "tensor", "cell"]


@dataclass(frozen=True)
class Layout:
    """One stored block: its fields in storage order, and what each of them is for.

    Attributes:
        dtype: the block as a NumPy structured dtype.
        scales: float16 or float32 fields that levels are multiplied by; no encoder writes a
            negative one unless the codec has `signed_scales`.
        small_scales: uint8 fields with scales that are floats of eight bits or exponents.
        codes: fields of packed codes, residual signs among them.
        signs: field of sign bits that the decoder multiplies in before or after its transform.
        state: field with the state that a trellis starts from.
        floats: float16 fields that hold values as they are.
        outliers: two fields, positions and float16 values, of what is kept out of the codes.
        padding: fields that hold nothing.
        unwritten: those of `padding` that the fork's encoder leaves as they were; ours writes 0.
        opaque: fields whose meaning is another library's business.
        derived: fields that follow from others, and that no decoder reads.
        per_row: the first fields of `dtype` if a file has them once, in front of a row; the blocks
            of a row share them.
    """

    dtype: np.dtype
    scales: tuple[str, ...] = ("d",)
    codes: tuple[str, ...] = ("qs",)
    small_scales: tuple[str, ...] = ()
    signs: str | None = None
    state: str | None = None
    floats: tuple[str, ...] = ()
    outliers: tuple[str, str] | None = None
    padding: tuple[str, ...] = ()
    unwritten: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    per_row: tuple[str, ...] = ()

    @property
    def roles(self) -> dict[str, str]:
        """The role of each field, by name."""
        roles = dict.fromkeys(self.scales, "scale") | dict.fromkeys(self.codes, "codes")
        roles |= dict.fromkeys(self.small_scales, "scale")
        roles |= dict.fromkeys(self.floats, "floats") | dict.fromkeys(self.padding, "padding")
        roles |= dict.fromkeys(self.opaque, "opaque") | dict.fromkeys(self.derived, "derived")
        roles |= {
            name: role for role, name in (("signs", self.signs), ("state", self.state)) if name
        }
        if self.outliers:
            roles |= dict(zip(self.outliers, ("outlier positions", "outlier values"), strict=True))
        return roles

    @cached_property
    def header(self) -> np.dtype:
        """What stands in front of every row, as a structured dtype; without fields for most."""
        return np.dtype([(name, self.dtype[name]) for name in self.per_row])

    @cached_property
    def stored(self) -> np.dtype:
        """The block as files have it, without what a row holds once."""
        own = [name for name in self.dtype.names or () if name not in self.per_row]
        return np.dtype([(name, self.dtype[name]) for name in own])

    @property
    def header_bytes(self) -> int:
        """Bytes in front of every row."""
        return self.header.itemsize

    def offset(self, name: str) -> int:
        """Return where a field starts in the block, in bytes."""
        return self.span(name).start

    def span(self, name: str) -> slice:
        """Return the bytes of a field in the block."""
        fields = self.dtype.fields
        assert fields is not None, "blocks are structured"
        kind, at, *_ = fields[name]
        return slice(at, at + kind.itemsize)


class Stages(NamedTuple):
    """What an encoder computes on its way from values to blocks.

    norm: float32 (groups,). coordinates: by kind of code, float32 (groups, group_values): what the
    choice of those codes looks at. scales: by field, float32 (blocks,), before they are rounded to
    float16.
    """

    norm: np.ndarray
    coordinates: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]


class RowKernels(NamedTuple):
    """The kernels of one codec. They check nothing, allocate little and release the GIL.

    quantize(x, packed, first): float32 (rows, n) to uint8 (rows, row_bytes); `first` is the index
        of the first group where the position in the tensor matters.
    dequantize(packed, y): uint8 (rows, row_bytes) to float32 (rows, n). Returns None, or, for
        codecs with fields that can be out of range, the first block where one is, else -1.
    levels(packed, y): the same, before the codec's own rotation is undone.
    rotate(x, blocks), unrotate(x, blocks): the codec's own rotation and its inverse, of float32
        (groups, group_values) in place, the signs taken from uint8 (groups, bytes of a group), or
        from nothing if the codec has none. None if the codec rotates nothing.
    restore(packed, y): `Codec.restore` of rows; None where that is dequantize, or dequantize and
        then unrotate.
    """

    quantize: Callable[[np.ndarray, np.ndarray, int], None]
    dequantize: Callable[[np.ndarray, np.ndarray], int | None]
    levels: Callable[[np.ndarray, np.ndarray], int | None]
    rotate: Callable[[np.ndarray, np.ndarray], None] | None = None
    unrotate: Callable[[np.ndarray, np.ndarray], None] | None = None
    restore: Callable[[np.ndarray, np.ndarray], None] | None = None


class Codec:
    """The specification of one codec, in NumPy; subclasses are frozen dataclasses.

    x is float32 (g, group_values); blocks are `layout.dtype` (g * group_blocks,), those of a group
    one after the other; index (g,) numbers the groups as `position` says.

    Attributes:
        layout: the stored block.
        block_values: values per block.
        group_values: values that are encoded together: one block, or several.
        rotation_values: values that the codec's own rotation mixes; 1 if it has none.
        takes: "original" if the encoder is given what the model computed, "rotated" if the
            attention graph rotates before.
        gives: the same for what the decoder returns. A codec that takes original values and gives
            rotated ones rotates inside the encoder and leaves it to the graph to rotate back.
        position: what a group's index counts where it is part of the arithmetic: "none" (it is
            not), "row", "tensor" (it runs on through all rows) or "cell" (the row's number).
        searches: whether encoding is a search that takes about a millisecond per block.
        slow: whether the specification of the encoder takes a good part of a second per block.
        signed_scales: whether scales can be negative.
        borrows: whether blocks hold scales only, for the codes of a sibling row.
        spare_codes: codes that decoders know and the encoder never writes.
        sub_scales: kinds of codes that are scales of parts of a block, of which few may occur.
        corruption: what is wrong with a block that `dequantize` of the kernels reports.
        asked: the format whose kernels were asked for last: what is compiled is for it.
    """

    asked: ClassVar[str | None] = None

    if TYPE_CHECKING:  # subclasses have each as a class variable, a field or a property

        @property
        def layout(self) -> Layout: ...  # noqa: D102
        @property
        def block_values(self) -> int: ...  # noqa: D102
        @property
        def group_values(self) -> int: ...  # noqa: D102
        @property
        def rotation_values(self) -> int: ...  # noqa: D102
        @property
        def takes(self) -> Domain: ...  # noqa: D102
        @property
        def gives(self) -> Domain: ...  # noqa: D102
        @property
        def position(self) -> Position: ...  # noqa: D102
        @property
        def slow(self) -> bool: ...  # noqa: D102

    else:
        rotation_values = 1
        takes = gives = "original"
        position = "none"
        slow = False
    searches: ClassVar[bool] = False
    signed_scales: ClassVar[bool] = False
    borrows: ClassVar[bool] = False
    spare_codes: ClassVar[frozenset[int]] = frozenset()
    sub_scales: ClassVar[tuple[str, ...]] = ()
    corruption: ClassVar[str] = "an outlier lies outside the block"

    # --- the specification -----------------------------------------------------------------------

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (g, group_values) to blocks (g * group_blocks,)."""
        raise NotImplementedError

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (g * group_blocks,) to float32 (g, group_values)."""
        raise NotImplementedError

    def levels(self, blocks: np.ndarray) -> np.ndarray:
        """Return each code's level times its scale, before the codec's own rotation is undone."""
        return self.dequantize(blocks)

    def rotate(self, x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Return x (g, group_values) under the codec's own rotation; blocks give the signs."""
        return x

    def unrotate(self, x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Undo `rotate`."""
        return x

    def restore(self, blocks: np.ndarray) -> np.ndarray:
        """Return values (g, group_values) in the domain that the encoder takes."""
        y = self.dequantize(blocks)
        return y if self.gives == self.takes else self.unrotate(y, blocks)

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,): by kind (uint8 (n, count), how many there can be)."""
        return {}

    @property
    def boundaries(self) -> Mapping[str, np.ndarray]:
        """Where the decision between neighbouring codes lies among the coordinates, by kind.

        float64 (k,) ascending, or (group_values, k) padded with NaN. Kinds that are found by a
        search or by chance are absent.
        """
        return {}

    @property
    def content(self) -> Hashable:
        """What stored codes and scales mean, wherever they lie in a block.

        Codecs of one class and equal content hold the same, and are repacked without loss.
        """
        return self

    def repacked(self, blocks: np.ndarray, source: Codec) -> np.ndarray:
        """Return blocks of a codec with equal content, (groups * its group_blocks,), as this one's.

        The scales of a group's blocks are equal if there are several.
        """
        return blocks

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return what encoding x at index computes; `blocks` are the result."""
        raise NotImplementedError

    def anomalies(self, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Find what no encoder writes: {description: bool (n,)} of blocks (n,)."""
        written = [name for name in self.layout.padding if name not in self.layout.unwritten]
        if not written:
            return {}
        nonzero = [self._nonzero(name, blocks) for name in written]
        return {"padding that is not zero": np.logical_or.reduce(nonzero)}

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Yield wrong codecs that kernels have been seen to be: (bug, detail, codec)."""
        yield from ()

    @staticmethod
    def _nonzero(name: str, blocks: np.ndarray) -> np.ndarray:
        return np.asarray(blocks[name].reshape(len(blocks), -1).any(axis=-1))

    # --- sizes -----------------------------------------------------------------------------------

    @property
    def group_blocks(self) -> int:
        """Blocks per group."""
        return self.group_values // self.block_values

    @property
    def block_bytes(self) -> int:
        """Bytes per block in a file."""
        return self.layout.stored.itemsize

    @property
    def coded_values(self) -> int:
        """How many values of a block, from the first, have codes; `codes` has 0 for the others."""
        return self.block_values

    def row_bytes(self, n: int, name: str) -> int:
        """Return the packed size of a row of n values; InputError if groups do not divide it."""
        head, size, values = self._sizes
        if n <= 0 or n % values:
            need = f"a positive multiple of {values} values for {name}"
            raise InputError("row length", f"{n} values", need)
        return head + n // values * size

    def row_values(self, n_bytes: int, name: str) -> int:
        """Return the values in a packed row; InputError if groups do not divide it."""
        head, size, n = self._sizes
        body = n_bytes - head
        if body <= 0 or body % size:
            first = f"{head} and " if head else ""
            need = f"{first}a positive multiple of {size} bytes for {name}"
            raise InputError("packed row length", f"{n_bytes} bytes", need)
        return body // size * n

    @cached_property
    def _sizes(self) -> tuple[int, int, int]:
        """Bytes in front of a row, bytes of a group, and its values."""
        return self.layout.header_bytes, self.block_bytes * self.group_blocks, self.group_values

    def indices(self, rows: int, row_groups: int, first: int = 0) -> np.ndarray:
        """Return the index of each group of an array of rows."""
        flat = np.arange(rows * row_groups)
        if self.position == "tensor":
            return first + flat
        return first + flat // row_groups if self.position == "cell" else flat % row_groups

    # --- rows ------------------------------------------------------------------------------------

    def quantize_rows(self, x: np.ndarray, first: int = 0) -> np.ndarray:
        """Quantise float32 (rows, n) to uint8 (rows, row_bytes) by the specification."""
        index = self.indices(len(x), x.shape[1] // self.group_values, first)
        blocks = self.quantize(x.reshape(-1, self.group_values), index)
        return self.rows(blocks.reshape(len(x), -1))

    def dequantize_rows(self, packed: np.ndarray) -> np.ndarray:
        """Dequantise uint8 (rows, row_bytes) to float32 (rows, n) by the specification."""
        return self.dequantize(self.blocks(packed).reshape(-1)).reshape(len(packed), -1)

    def blocks(self, packed: np.ndarray) -> np.ndarray:
        """Return packed rows, uint8 (rows, row_bytes), as blocks (rows, blocks).

        A view if it can be; a copy where rows hold something once.
        """
        head = self.layout.header_bytes
        if not head:
            return np.ascontiguousarray(packed).view(self.layout.dtype)
        body = packed[:, head:].reshape(len(packed), -1, self.block_bytes)
        whole = np.empty((*body.shape[:2], head + self.block_bytes), np.uint8)
        whole[:, :, :head] = packed[:, None, :head]
        whole[:, :, head:] = body
        return whole.view(self.layout.dtype)[:, :, 0]

    def part(self, row: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return the blocks (n,) of groups [start, stop) of a packed row, uint8 (row_bytes,)."""
        head, size = self.layout.header_bytes, self.group_blocks * self.block_bytes
        body = row[head + start * size : head + stop * size]
        return self.blocks(np.concatenate([row[:head], body])[None])[0]

    def rows(self, blocks: np.ndarray) -> np.ndarray:
        """Return blocks (rows, blocks) as packed rows, uint8 (rows, row_bytes).

        What a row holds once is that of its first block.
        """
        head, shape = self.layout.header_bytes, blocks.shape
        raw = np.ascontiguousarray(blocks).view(np.uint8).reshape(*shape, -1)
        body = raw[:, :, head:].reshape(shape[0], -1)
        return np.concatenate([raw[:, 0, :head], body], axis=1) if head else body

    # --- kernels ---------------------------------------------------------------------------------

    @cached_property
    def kernels(self) -> RowKernels:
        """The kernels; the first use imports Numba."""
        package, _, family = type(self).__module__.rpartition(".families.")
        return importlib.import_module(f"{package}.kernels.{family}").kernels(self)

    @cached_property
    def cuda_module(self) -> str:
        """Name of the module that would hold the port to numba.cuda."""
        package, _, family = type(self).__module__.rpartition(".families.")
        return f"{'cuda_port' if package == 'tbq' else package + '.cuda_port'}.families.{family}"
