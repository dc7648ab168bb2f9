"""`CacheTensor`: one layer's rows in a state file, as bytes, as blocks, and as K or V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import tbq
from gguf_io.identify import DialectChoice, undecodable
from gguf_io.mapped import MappedFile
from gguf_io.state_records import Rows
from gguf_io.tensors import as_array
from gguf_io.types import TensorType, Unknown, dequantize_rows
from tbq import InputError

# Bytes of columns that are held at a time, where rows are taken out of them.
COLUMN_BYTES = 1 << 24


@dataclass(frozen=True, eq=False)
class CacheTensor:
    """The rows of one layer, K, V, R or S, over all streams of a memory, one row per cell.

    Nothing is read before a method touches it.

    Attributes:
        name: llama.cpp's, such as `cache_k_l0`; after `base.` or `swa.` if there are two caches.
        kind: "K", "V", or "R" and "S" of a recurrent memory.
        memory: index into `StateFile.memories`.
        layer: the model's layer number if a model was given, else a count from 0.
        format: its type: a tbq.Format, or Unknown.
        parts: the records it consists of, one per stream that has cells.
        transposed: whether the file holds it column by column.
        n_embd: values per row, padding included; None if the type's size is not known.
        head_dim: the model's values per head; None for R and S, and where n_embd is.
        stored_head: values per head in a row: head_dim and what the fork's cache pads it with.
        head_told: whether the caller or the model said how wide heads are; else it is assumed.
        rotation: what the graph did to each head before it was stored; None if nothing.
        sibling: the previous layer, whose codes this one borrows (xktq2_1); else None.
    """

    name: str
    kind: str
    memory: int
    layer: int
    format: TensorType
    parts: tuple[Rows, ...]
    transposed: bool
    n_embd: int | None
    head_dim: int | None
    stored_head: int | None
    head_told: bool
    rotation: tbq.Rotation | None
    sibling: CacheTensor | None
    _map: MappedFile = field(repr=False)
    _choice: DialectChoice = field(repr=False)

    @property
    def type_id(self) -> int:
        """The ggml type id that the file has for it."""
        return self.parts[0].type_id

    @property
    def n_cells(self) -> int:
        """The number of rows."""
        return sum(part.cells for part in self.parts)

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return self.parts[0].row_bytes

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows."""
        return self.n_cells * self.row_bytes

    @property
    def ggml_shape(self) -> tuple[int, int]:
        """Values per row and rows; bytes per row where the type's size is not known."""
        return self.row_bytes if self.n_embd is None else self.n_embd, self.n_cells

    @property
    def n_values(self) -> int:
        """The number of values; of bytes where the type's size is not known."""
        return self.ggml_shape[0] * self.n_cells

    @property
    def n_head(self) -> int | None:
        """The number of key or value heads."""
        if self.n_embd is None or not self.stored_head:
            return None
        return self.n_embd // self.stored_head

    @property
    def row_values(self) -> int | None:
        """The model's values per row, without padding; None if the type's size is not known."""
        return self.n_head * self.head_dim if self.n_head and self.head_dim else self.n_embd

    def raw(self, part: int = 0) -> np.ndarray:
        """Return a view of one stream's bytes: (cells, row_bytes), transposed (n_embd, column).

        It views a map of the file, and dies with the process if that is truncated; `rows` does not.
        """
        rows = self.parts[part]
        shape = (rows.columns, -1) if self.transposed else (rows.cells, rows.row_bytes)
        n_bytes = rows.cells * rows.row_bytes
        self._map.require_open()
        return np.frombuffer(self._map, np.uint8, n_bytes, rows.data).reshape(shape)

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the bytes of rows [start, stop), uint8 (rows, row_bytes)."""
        pieces = [self._part_rows(p, a, b) for p, a, b in self._pieces(start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces or [np.empty((0, self.row_bytes), np.uint8)])

    def release(self, start: int, stop: int) -> None:
        """Do nothing: rows are copies, no pages of theirs stay mapped. For callers that were."""

    def _pieces(self, start: int, stop: int | None) -> list[tuple[int, int, int]]:
        """Return (part, first, last) for the pieces that rows [start, stop) consist of."""
        stop = self.n_cells if stop is None else min(stop, self.n_cells)
        pieces, before = [], 0
        for p, part in enumerate(self.parts):
            a, b = max(start - before, 0), min(stop - before, part.cells)
            if a < b:
                pieces.append((p, a, b))
            before += part.cells
        return pieces

    def _part_rows(self, part: int, start: int, stop: int) -> np.ndarray:
        if self.transposed:
            return self._of_columns(part, np.arange(start, stop))
        rows, n = self.parts[part], stop - start
        data = self._map.read_at(rows.data + start * rows.row_bytes, n * rows.row_bytes)
        return data.reshape(n, rows.row_bytes)

    def columns(self, part: int, start: int, stop: int) -> np.ndarray:
        """Return the bytes of columns [start, stop) of one stream, if it is stored in columns."""
        rows = self.parts[part]
        width = rows.cells * rows.row_bytes // rows.columns
        return self._map.read_grid(rows.data + start * width, width, stop - start, width)

    def _of_columns(self, part: int, cells: np.ndarray) -> np.ndarray:
        """Return the bytes of some rows, int (n,), of a stream that is stored in columns."""
        rows = self.parts[part]
        size, columns = rows.row_bytes // rows.columns, rows.columns
        out = np.empty((len(cells), columns), f"V{size}")
        if not out.size:
            return out.view(np.uint8)
        first, n = int(cells.min()), int(np.ptp(cells)) + 1
        step = max(1, COLUMN_BYTES // (n * size))
        for c in range(0, columns, step):
            count = min(step, columns - c)
            start = rows.data + (c * rows.cells + first) * size
            some = self._map.read_grid(start, rows.cells * size, count, n * size)
            out[:, c : c + count] = some.view(out.dtype)[:, cells - first].T
        return out.view(np.uint8)

    def blocks(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the blocks of rows [start, stop), (rows, blocks), with the format's fields."""
        if isinstance(self.format, Unknown):
            raise undecodable(self.format, self.name, self._choice)
        return self.format.codec.blocks(self.rows(start, stop))

    def stored(
        self, start: int = 0, stop: int | None = None, *, threads: int | None = None
    ) -> np.ndarray:
        """Dequantise rows [start, stop) to float32 (rows, n_embd), as stored: rotated, if they are.

        Raises:
            AmbiguousTypeError: several dialects fit the type id; open the file with `dialect=`.
            InputError: nothing is known of the type; or it borrows codes that are not there.
            BackendError: gguf-py cannot decode it.
        """
        return self._decode(lambda tensor: tensor.rows(start, stop), threads)

    def values(
        self, start: int = 0, stop: int | None = None, *, threads: int | None = None
    ) -> np.ndarray:
        """Dequantise rows [start, stop) to float32 (rows, n_head, head_dim), the rotation undone.

        Padding is left out. R and S, which have no heads, come back as (rows, 1, n_embd). Errors as
        for `stored`.
        """
        return self._unrotate(self.stored(start, stop, threads=threads))

    def values_at(self, cells: np.ndarray, *, threads: int | None = None) -> np.ndarray:
        """Dequantise the rows of some cells, int (n,), to float32 (n, n_head, head_dim)."""
        return self._unrotate(self._decode(lambda tensor: tensor.rows_at(cells), threads))

    def rows_at(self, cells: np.ndarray) -> np.ndarray:
        """Return the bytes of the rows of some cells, int (n,), as uint8 (n, row_bytes)."""
        out = np.empty((len(cells), self.row_bytes), np.uint8)
        before = 0
        for p, part in enumerate(self.parts):
            mine = (cells >= before) & (cells < before + part.cells)
            if mine.any():
                out[mine] = self._take(p, cells[mine] - before)
            before += part.cells
        return out

    def _take(self, part: int, cells: np.ndarray) -> np.ndarray:
        if self.transposed:
            return self._of_columns(part, cells)
        return self._map.read_rows(self.parts[part].data, self.row_bytes, cells)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the values, so that `np.asarray` does; what is decoded is new each time."""
        return as_array(self.values(), dtype, copy)

    def __repr__(self) -> str:
        wide = f"{self.row_bytes} bytes" if self.n_embd is None else f"{self.n_embd} values"
        return f"<CacheTensor {self.name}: {self.format.label}, {self.n_cells} rows of {wide}>"

    def _decode(
        self, rows_of: Callable[[CacheTensor], np.ndarray], threads: int | None
    ) -> np.ndarray:
        if isinstance(self.format, Unknown):
            raise undecodable(self.format, self.name, self._choice)
        rows = rows_of(self)
        if not len(rows) or not self.n_embd:
            return np.empty((len(rows), self.n_embd or 0), np.float32)
        if self.format.sibling:
            if self.sibling is None:
                need = f"a layer of {self.format.sibling} before it, whose codes it borrows"
                raise InputError(f"tensor {self.name!r}", self.format.label, need)
            lent = rows_of(self.sibling)
            return tbq.dequantize_paired(rows, lent, self.format, threads=threads)
        return dequantize_rows(rows, self.format, threads=threads)

    def _unrotate(self, stored: np.ndarray) -> np.ndarray:
        heads = stored.reshape(len(stored), self.n_head or 1, self.stored_head or stored.shape[1])
        if self.stored_head != self.head_dim:
            heads = np.ascontiguousarray(heads[..., : self.head_dim])
        return heads if self.rotation is None else self.rotation.inverse(heads)
