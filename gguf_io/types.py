"""What a tensor's type can be: a registered Format, one of ggml's own types, or Unknown.

ggml's own types are gguf-py's business: sizes, quantisation and dequantisation come from there. Ids
from `FIRST_FORK_ID` up are never looked up in gguf-py: the forks and upstream each gave them other
meanings, and a later gguf-py would silently size a fork's tensors as upstream's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import gguf
import numpy as np

import tbq
from tbq import BackendError, Format, InputError, UnknownFormatError
from tbq.registry import near_misses

FIRST_FORK_ID = 42

# Types whose values are not quantised; llama.cpp converts between them freely.
FLOAT_TYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class GgmlType:
    """One of ggml's own types, as gguf-py knows it; the name is ggml's, such as `q6_K`."""

    name: str
    type_id: int
    block_values: int
    block_bytes: int

    @property
    def bpw(self) -> float:
        """Bits per value."""
        return 8 * self.block_bytes / self.block_values

    @property
    def is_quantized(self) -> bool:
        """Whether values share blocks; false for floats and integers."""
        return self.block_values > 1


@dataclass(frozen=True)
class Unknown:
    """A type id that nothing registered explains; its tensors are raw bytes."""

    type_id: int

    @property
    def name(self) -> str:
        """A name for messages and tables."""
        return f"unknown({self.type_id})"


TensorType = Format | GgmlType | Unknown


def type_key(kind: TensorType) -> str:
    """Return a type's full name: `dialect:name` of a registered format, ggml's name of its own."""
    return kind.key if isinstance(kind, Format) else kind.name


def _ggml_type(qtype: gguf.GGMLQuantizationType) -> GgmlType:
    name = re.sub("_k$", "_K", qtype.name.lower())
    return GgmlType(name, int(qtype), *gguf.GGML_QUANT_SIZES[qtype])


@cache
def ggml_types() -> dict[int, GgmlType]:
    """Return ggml's own types by id."""
    known = (q for q in gguf.GGMLQuantizationType if q < FIRST_FORK_ID)
    return {int(q): _ggml_type(q) for q in known if q in gguf.GGML_QUANT_SIZES}


def resolve_type(name: str, dialect: str | None = None) -> Format | GgmlType:
    """Return the type called `name`: a registered format, or one of ggml's own.

    A bare format name means `dialect`'s if that has one.

    Raises:
        UnknownFormatError: nothing has that name; `.near` holds close ones.
    """
    wanted = name.strip().lower()
    own = {t.name.lower(): t for t in ggml_types().values()}
    if wanted in own:
        return own[wanted]
    if dialect is not None and ":" not in wanted:
        try:
            return tbq.get_format(f"{dialect}:{wanted}")
        except UnknownFormatError:
            pass
    try:
        return tbq.get_format(wanted)
    except UnknownFormatError:
        known = "tbq.formats() and gguf.GGMLQuantizationType"
        raise UnknownFormatError(wanted, near_misses(wanted, tuple(own)), known) from None


def row_bytes(kind: TensorType, n: int) -> int:
    """Return the bytes of a row of n values; InputError if blocks do not divide it."""
    if isinstance(kind, Format):
        return kind.row_bytes(n)
    if isinstance(kind, Unknown):
        raise InputError("type", kind.name, "a type of known size")
    if n % kind.block_values:
        need = f"a multiple of {kind.block_values} values for {kind.name}"
        raise InputError("row length", f"{n} values", need)
    return n // kind.block_values * kind.block_bytes


@cache
def can_quantize(kind: TensorType) -> bool:
    """Tell whether `quantize_rows` can produce this type."""
    if not isinstance(kind, GgmlType):
        return isinstance(kind, Format)
    if kind.name in FLOAT_TYPES:
        return True
    try:
        quantize_rows(np.zeros((1, kind.block_values), np.float32), kind)
    except BackendError:
        return False
    return True


def quantize_rows(
    x: np.ndarray, kind: TensorType, *, first_block: int = 0, threads: int | None = None
) -> np.ndarray:
    """Quantise float32 rows (rows, n) to uint8 (rows, row_bytes), as `tbq` or gguf-py does.

    Raises:
        BackendError: gguf-py cannot produce this type.
        InputError: the type is unknown or does not fit the rows.
    """
    if isinstance(kind, Format):
        return tbq.quantize(x, kind, first_block=first_block, threads=threads)
    width = row_bytes(kind, x.shape[-1])
    try:
        with np.errstate(all="ignore"):
            packed = gguf.quantize(x, gguf.GGMLQuantizationType(kind.type_id))
    except NotImplementedError:
        raise BackendError("gguf-py", f"cannot quantise to {kind.name}") from None
    return np.ascontiguousarray(packed).view(np.uint8).reshape(len(x), width)


def dequantize_rows(raw: np.ndarray, kind: TensorType, *, threads: int | None = None) -> np.ndarray:
    """Dequantise uint8 rows (rows, row_bytes) to float32 (rows, n), as `tbq` or gguf-py does.

    Rows of f32 come back as a view.

    Raises:
        BackendError: gguf-py cannot read this type.
        InputError: the type is unknown.
    """
    if isinstance(kind, Format):
        return tbq.dequantize(raw, kind, threads=threads)
    if isinstance(kind, Unknown):
        raise InputError("type", kind.name, "a type that a registered dialect explains")
    try:
        with np.errstate(all="ignore"):
            return gguf.dequantize(raw, gguf.GGMLQuantizationType(kind.type_id))
    except NotImplementedError:
        raise BackendError("gguf-py", f"cannot dequantise {kind.name}") from None
