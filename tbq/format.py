"""`Format`: everything that is known about one block format, written once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from tbq.errors import InputError


def no_anomalies(fmt: Format, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
    """For formats in which an encoder writes every combination of bits."""
    return {}


def no_rotation(fmt: Format, x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """For formats that store values as they are given."""
    return x


class Stages(NamedTuple):
    """What an encoder computes on its way from values to blocks.

    norm: float32 (n,). coordinates: float32 (n, block_values), normalised and rotated, what the
    choice of codes looks at. scale: float32 (n,), before it is rounded to float16.
    """

    norm: np.ndarray
    coordinates: np.ndarray
    scale: np.ndarray


class RowKernels(NamedTuple):
    """The Numba kernels of one format. They check nothing, allocate nothing and release the GIL.

    quantize(x, packed, first_block): float32 (rows, n) to uint8 (rows, row_bytes).
    dequantize(packed, y): uint8 (rows, row_bytes) to float32 (rows, n). Returns None, or, for
        formats with fields that can be out of range, the first block where one is, else -1.
    levels(packed, y): the same, before the format's own rotation is undone.
    """

    quantize: Callable[[np.ndarray, np.ndarray, int], None]
    dequantize: Callable[[np.ndarray, np.ndarray], int | None]
    levels: Callable[[np.ndarray, np.ndarray], int | None]


@dataclass(frozen=True, eq=False)
class Format:
    """One block format of one dialect.

    Attributes:
        dialect: the code base (and release or backend) whose bytes are meant.
        name: the ggml type name within the dialect.
        type_id: the ggml type id within the dialect; other dialects reuse the number.
        block: the block as a NumPy structured dtype, fields in storage order.
        block_values: values per block.
        group_values: values that the format's own rotation mixes; 1 if it has none.
        side: which half of a KV cache the dialect uses it for.
        domain: "original" if the block decodes to what was given, "rotated" if the caller
            rotates before and after.
        source: repository, commit and file of the arithmetic.
        quantize_ref: the specification: (fmt, float32 (n, block_values), block indices (n,)) to
            `block` (n,).
        dequantize_ref: the specification: (fmt, `block` (n,)) to float32 (n, block_values).
        codes: (fmt, `block` (n,)) to the codes in it: {name: (uint8 (n, count), how many codes
            there can be)}.
        anomalies: (fmt, `block` (n,), block indices (n,)) to what no encoder of the dialect writes:
            {description: bool (n,)}.
        levels_ref: (fmt, `block` (n,)) to float32 (n, block_values): each code's level times the
            block's scale, before the format's own rotation is undone.
        rotate_ref, unrotate_ref: (fmt, float32 (n, block_values), `block` (n,)) to the same shape:
            the format's own rotation and its inverse; the blocks give the signs, where it has any.
        stages_ref: (fmt, float32 (n, block_values), block indices (n,), their blocks (n,)) to the
            Stages of encoding them.
        boundaries: where the encoder's decision between two codes lies among the coordinates,
            float64 (k,) ascending, or (block_values, k) padded with NaN; None if it has no such.
        kernels_module: module whose `kernels(fmt)` returns the RowKernels; imported on first use.
        scales: fields of `block` that hold non-negative float16 scales.
        sibling: key of the format whose blocks lend theirs the codes; None if they stand alone.
        block_index: what a block's position counts from where it is part of the arithmetic:
            "none" (it is not), "row", or "tensor" (it runs on through all rows).
        aliases: other names by which the dialect's programs know it.
        ftype: llama.cpp's file type number (`general.file_type`), None if the dialect has none.
        notes: what a user should know before trusting it.
    """

    dialect: str
    name: str
    type_id: int
    block: np.dtype
    block_values: int
    group_values: int
    side: Literal["K", "V", "KV"]
    domain: Literal["original", "rotated"]
    source: str
    quantize_ref: Callable[[Format, np.ndarray, np.ndarray], np.ndarray]
    dequantize_ref: Callable[[Format, np.ndarray], np.ndarray]
    kernels_module: str
    codes: Callable[[Format, np.ndarray], dict[str, tuple[np.ndarray, int]]]
    anomalies: Callable[[Format, np.ndarray, np.ndarray], dict[str, np.ndarray]]
    levels_ref: Callable[[Format, np.ndarray], np.ndarray]
    rotate_ref: Callable[[Format, np.ndarray, np.ndarray], np.ndarray]
    unrotate_ref: Callable[[Format, np.ndarray, np.ndarray], np.ndarray]
    stages_ref: Callable[[Format, np.ndarray, np.ndarray, np.ndarray], Stages]
    boundaries: np.ndarray | None = None
    scales: tuple[str, ...] = ("d",)
    sibling: str | None = None
    block_index: Literal["none", "row", "tensor"] = "none"
    aliases: tuple[str, ...] = ()
    ftype: int | None = None
    notes: str = ""

    @property
    def key(self) -> str:
        """The unique name, `dialect:name`."""
        return f"{self.dialect}:{self.name}"

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return self.block.itemsize

    @property
    def bpw(self) -> float:
        """Bits per value."""
        return 8 * self.block_bytes / self.block_values

    def row_bytes(self, n: int) -> int:
        """Return the packed size of a row of n values; InputError if blocks do not divide it."""
        if n <= 0 or n % self.block_values:
            need = f"a positive multiple of {self.block_values} values for {self.key}"
            raise InputError("row length", f"{n} values", need)
        return n // self.block_values * self.block_bytes

    def row_values(self, n_bytes: int) -> int:
        """Return the number of values in a packed row; InputError if blocks do not divide it."""
        if n_bytes <= 0 or n_bytes % self.block_bytes:
            need = f"a positive multiple of {self.block_bytes} bytes for {self.key}"
            raise InputError("packed row length", f"{n_bytes} bytes", need)
        return n_bytes // self.block_bytes * self.block_values

    def block_indices(self, rows: int, row_blocks: int, first_block: int = 0) -> np.ndarray:
        """Return the index of each block of an array of rows, as the specification takes it."""
        flat = np.arange(rows * row_blocks)
        return first_block + flat if self.block_index == "tensor" else flat % row_blocks

    @cache  # noqa: B019 - formats live as long as the process
    def kernels(self) -> RowKernels:
        """Return the Numba kernels; the first call imports Numba."""
        return importlib.import_module(self.kernels_module).kernels(self)

    def __repr__(self) -> str:
        return f"<Format {self.key}>"
