"""`CacheTensor`: one layer's rows in a state file, as bytes, as blocks, and as K or V."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import tbq
from gguf_io.dialects import DialectChoice, undecodable
from gguf_io.parser import release_pages
from gguf_io.state_parser import Rows
from gguf_io.types import TensorType, Unknown, dequantize_rows
from tbq import Format, InputError


@dataclass(frozen=True, eq=False)
class CacheTensor:
    """The rows of one layer, K, V, R or S, over all streams of a memory, one row per cell.

    Nothing is read before a method touches it.

    Attributes:
        name: llama.cpp's, such as `cache_k_l0`; after `base.` or `swa.` if there are two caches.
        kind: "K", "V", or "R" and "S" of a recurrent memory.
        memory: index into `StateFile.memories`.
        layer: the model's layer number if a model was given, else a count from 0.
        format: its type: a tbq.Format, a GgmlType, or Unknown.
        parts: the records it consists of, one per stream that has cells.
        transposed: whether the file holds it column by column.
        n_embd: values per row; None if the type's size is not known.
        head_dim: values per head; None for R and S, and where n_embd is.
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
    rotation: tbq.Rotation | None
    sibling: CacheTensor | None
    _map: mmap.mmap = field(repr=False)
    _choice: DialectChoice = field(repr=False)

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
        return self.n_embd // self.head_dim if self.head_dim else None

    def raw(self, part: int = 0) -> np.ndarray:
        """Return a view of one stream's bytes: (cells, row_bytes), transposed (n_embd, column)."""
        rows = self.parts[part]
        shape = (rows.n_embd, -1) if self.transposed else (rows.cells, rows.row_bytes)
        n_bytes = rows.cells * rows.row_bytes
        return np.frombuffer(self._map, np.uint8, n_bytes, rows.data).reshape(shape)

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the bytes of rows [start, stop), uint8 (rows, row_bytes); a view if it can be."""
        pieces = [self._part_rows(p, a, b) for p, a, b in self._pieces(start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces or [np.empty((0, self.row_bytes), np.uint8)])

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
        raw = self.raw(part)
        if not self.transposed:
            return raw[start:stop]
        return np.ascontiguousarray(self._elements(part)[:, start:stop].T).view(np.uint8)

    def blocks(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the blocks of rows [start, stop): (rows, blocks), each with the format's fields.

        Types without registered fields come back as uint8 (rows, blocks, block bytes).
        """
        rows = self.rows(start, stop)
        if isinstance(self.format, Format):
            return np.ascontiguousarray(rows).view(self.format.block)
        if isinstance(self.format, Unknown):
            raise undecodable(self.format, self.name, self._choice)
        return rows.reshape(len(rows), -1, self.format.block_bytes)

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

        R and S, which have no heads, come back as (rows, 1, n_embd). Errors as for `stored`.
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
        raw = self.raw(part)
        if not self.transposed:
            return raw[cells]
        return np.ascontiguousarray(self._elements(part)[:, cells].T).view(np.uint8)

    def _elements(self, part: int) -> np.ndarray:
        """View a transposed part as (n_embd, cells) opaque elements."""
        rows = self.parts[part]
        return self.raw(part).view(f"V{rows.row_bytes // rows.n_embd}")

    def _decode(self, rows_of: Callable[[CacheTensor], np.ndarray], threads: int | None):
        if isinstance(self.format, Unknown):
            raise undecodable(self.format, self.name, self._choice)
        rows = rows_of(self)
        if not len(rows) or not self.n_embd:
            return np.empty((len(rows), self.n_embd), np.float32)
        if isinstance(self.format, Format) and self.format.sibling:
            if self.sibling is None:
                need = f"a layer of {self.format.sibling} before it, whose codes it borrows"
                raise InputError(f"tensor {self.name!r}", self.format.key, need)
            return tbq.dequantize_paired(rows, rows_of(self.sibling), threads=threads)
        return dequantize_rows(rows, self.format, threads=threads)

    def _unrotate(self, stored: np.ndarray) -> np.ndarray:
        heads = stored.reshape(len(stored), self.n_head or 1, self.head_dim or self.n_embd)
        return heads if self.rotation is None else self.rotation.inverse(heads)

    def release(self, start: int, stop: int) -> None:
        """Let the kernel drop the cached pages of rows [start, stop); they stay readable."""
        for p, a, b in self._pieces(start, stop):
            part = self.parts[p]
            if not self.transposed:
                first = part.data + a * part.row_bytes
                release_pages(self._map, first, part.data + b * part.row_bytes)
            elif b == part.cells:
                release_pages(self._map, part.data, part.end)
