"""What a row of K or V goes through between being stored in a fork's cache and being attended to.

Rotated by the graph, padded, quantised, dequantised, and all of that undone: attention is the same
in either domain, but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

import tbq
from gguf_io.graph_rotation import ROTATED_MULTIPLE, rotation_kind
from gguf_io.types import can_quantize, resolve_type
from tbq import Format, InputError, Rotation
from tbq.api import index_step
from tbq.registry import get_dialect


@dataclass(frozen=True)
class CachePath:
    """The way of the rows of one side of one layer through a cache of some type.

    Attributes:
        format: the type, with the codec that fits side and heads.
        head_dim: values per head of the model.
        stored: values per head in the cache, padding included.
        rotation: what the graph does to a head before it is stored; None if nothing.
    """

    format: Format
    head_dim: int
    stored: int
    rotation: Rotation | None

    def __call__(
        self,
        x: np.ndarray,
        mean: np.ndarray | None = None,
        threads: int | None = None,
        first_cell: int = 0,
    ) -> np.ndarray:
        """Return float32 x (cells, heads, head_dim) as attention gets it back, the same shape.

        The first row is that of cell `first_cell` of a sequence. `mean`, float32
        (heads * stored,), is what the fork subtracts from rows as they are stored, for types whose
        fork does.
        """
        if self.format.name == "f32":
            return x
        x = np.ascontiguousarray(x)
        y = x if self.rotation is None else self.rotation.forward(x)
        if self.stored != self.head_dim:
            y = np.pad(y, ((0, 0), (0, 0), (0, self.stored - self.head_dim)))
        shape, rows = y.shape, y.reshape(len(y), -1)
        first = first_cell * index_step(self.format, rows.shape[1])
        packed = tbq.quantize(rows, self.format, mean=mean, first_block=first, threads=threads)
        y = tbq.dequantize(packed, self.format, original=True, mean=mean, threads=threads)
        y = y.reshape(shape)[..., : self.head_dim]
        return np.ascontiguousarray(y) if self.rotation is None else self.rotation.inverse(y)

    def row_bytes(self, heads: int) -> int:
        """Return the bytes of a row of so many heads."""
        return self.format.row_bytes(heads * self.stored)


def cache_type(name: str | Format, side: str) -> Format:
    """Return a type that rows of K or V can be quantised to on their own.

    Raises:
        UnknownFormatError, AmbiguousTypeError: no type has that name, or several.
        InputError: it is none for this side, or cannot be written.
    """
    kind = name if isinstance(name, Format) else resolve_type(name)
    argument = f"type of {side}"
    if kind.sibling or not can_quantize(kind):
        raise InputError(argument, kind.label, "a type that rows can be quantised to on their own")
    if side not in kind.side:
        raise InputError(argument, kind.label, f"a type for {side}; this one is for {kind.side}")
    return kind


def cache_path(name: str | Format, side: str, heads: int, head_dim: int) -> CachePath:
    """Return the way of rows of K or V, (cells, heads, head_dim), through a cache of a type.

    Raises:
        UnknownFormatError, AmbiguousTypeError: as `cache_type`.
        InputError: as `cache_type`; or no cache of that type holds such rows.
    """
    kind = cache_type(name, side)
    argument = f"type of {side}"
    kind = kind.fitting(head_dim=head_dim, side=side)
    stored = get_dialect(kind.dialect).state.head_values(kind, head_dim)
    try:
        kind.row_bytes(heads * stored)
    except InputError as error:
        raise InputError(argument, error.got, error.need) from None
    optional = get_dialect(kind.dialect).rotation.optional
    rotation = rotation_kind(side, [kind]) if kind.is_quantized and not optional else None
    if rotation is None or head_dim % ROTATED_MULTIPLE:
        return CachePath(kind, head_dim, stored, None)
    return CachePath(kind, head_dim, stored, _rotation(rotation, head_dim))


_rotation = cache(tbq.rotation)  # one object each, so that equal paths are equal
