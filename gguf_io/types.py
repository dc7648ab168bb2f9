"""What a tensor's type can be: a registered Format, ggml's own among them, or Unknown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

import tbq
from tbq import BackendError, Format, InputError, UnknownFormatError
from tbq.api import index_step
from tbq.registry import near_misses, split_dialect

# Types whose values are not quantised; llama.cpp converts between them freely.
FLOAT_TYPES = ("f32", "f16", "bf16")
FLOAT16_MAX = 65504.0
# ggml's types for what is no weight: indices, tables, masks. No cache row has them, and nothing
# converts them.
PLAIN_TYPES = ("i8", "i16", "i32", "i64", "f64")


@dataclass(frozen=True)
class Unknown:
    """A type id that nothing registered explains; its tensors are raw bytes."""

    type_id: int

    # whatever it is, floats have ids that are known
    is_quantized = True
    is_ggml = False
    dialect = None

    @property
    def name(self) -> str:
        """A name for messages and tables."""
        return f"unknown({self.type_id})"

    @property
    def label(self) -> str:
        """The same."""
        return self.name


TensorType = Format | Unknown
# The name from before ggml's own types were formats of the dialect "ggml".
GgmlType = Format


def resolve_type(name: str, dialect: str | None = None) -> Format:
    """Return the type called `name`: ggml's, or another registered format.

    A bare name means `dialect`'s (`buun`, `buun@2026-05`) if that has one and ggml has not.

    Raises:
        UnknownFormatError: nothing has that name; `.near` holds close ones.
    """
    wanted = name.strip().lower()
    if dialect is not None and ":" not in wanted:
        for place in (tbq.format.GGML, dialect):
            chosen, release = split_dialect(place)
            found = next(chosen.named(wanted, release), None)
            if found is not None:
                return found
    try:
        return tbq.get_format(wanted)
    except UnknownFormatError:
        known = "tbq.registry.all_formats()"
        raise UnknownFormatError(wanted, near_misses(wanted, _useful), known) from None


def _useful(fmt: Format) -> bool:
    """Tell whether a type that was not named rightly may be offered: it can be written, alone."""
    return can_quantize(fmt) and not fmt.sibling


def known(kind: TensorType) -> Format:
    """Return a type that is a format; InputError if nothing registered explains it."""
    if isinstance(kind, Unknown):
        raise InputError("type", kind.name, "a type that a registered dialect explains")
    return kind


def row_bytes(kind: TensorType, n: int) -> int:
    """Return the bytes of a row of n values; InputError if blocks do not divide it."""
    if isinstance(kind, Unknown):
        raise InputError("type", kind.name, "a type of known size")
    return kind.row_bytes(n)


@cache
def can_quantize(kind: TensorType) -> bool:
    """Tell whether `quantize_rows` can produce this type."""
    if isinstance(kind, Unknown):
        return False
    if kind.evidence != "gguf-py":
        return True
    try:
        kind.codec.quantize(np.zeros((1, kind.block_values), np.float32), np.zeros(1, np.int64))
    except BackendError:
        return False
    return True


def quantize_rows(
    x: np.ndarray, kind: TensorType, *, first_row: int = 0, threads: int | None = None
) -> np.ndarray:
    """Quantise float32 rows (rows, n) to uint8 (rows, row_bytes), as `tbq.quantize` does.

    `first_row` is where the rows stand in their tensor, which matters to some codecs.

    Raises:
        BackendError: gguf-py cannot produce this type.
        InputError: the type is unknown or does not fit the rows.
    """
    first = first_row * index_step(known(kind), x.shape[-1])
    return tbq.quantize(x, known(kind), first_block=first, threads=threads)


def overflowed(x: np.ndarray, packed: np.ndarray, kind: Format) -> int:
    """Count the finite values of float32 rows x that come back from `packed` as inf or NaN.

    Only a scale, an outlier or a float can be the cause: where a row has none that is not finite,
    nothing is decoded.
    """
    layout = kind.layout
    fields = [*layout.scales, *layout.floats, *(layout.outliers or ())[1:]]
    if fields:
        blocks = kind.codec.blocks(packed)
        rows = np.any([_not_finite(blocks[name]) for name in fields], axis=0)
    else:
        rows = ~(np.maximum(x.max(axis=-1), -x.min(axis=-1)) <= FLOAT16_MAX)
    if not rows.any():
        return 0
    finite = np.isfinite(x[rows]).reshape(-1, kind.group_values)
    y = dequantize_rows(packed[rows], kind).reshape(finite.shape)
    # a group that holds NaN or infinity already is lost by its own fault
    return int((~np.isfinite(y[finite.all(axis=1)])).sum())


def _not_finite(values: np.ndarray) -> np.ndarray:
    """Return which rows of float16 (rows, ...) hold NaN or infinity."""
    bits = np.ascontiguousarray(values).view(np.uint16).reshape(len(values), -1)
    return np.asarray(
        ((bits & 0x7FFF) >= 0x7C00).any(axis=1)
    )  # NumPy's own test converts each value


def dequantize_rows(raw: np.ndarray, kind: TensorType, *, threads: int | None = None) -> np.ndarray:
    """Dequantise uint8 rows (rows, row_bytes) to float32 (rows, n), in the encoder's domain.

    Rows of f32 come back as a view.

    Raises:
        BackendError: gguf-py cannot read this type.
        InputError: the type is unknown.
    """
    if isinstance(kind, Unknown):
        raise InputError("type", kind.name, "a type that a registered dialect explains")
    if kind.name == "f32":
        return raw.view("<f4")
    return tbq.dequantize(raw, kind, original=True, threads=threads)
