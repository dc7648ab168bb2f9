"""What a state file holds, as records that can be serialised again: cells, rows, memories.

Each memory knows the order of its own pieces: bytes that are written as they are, `Cells`, and
`Rows`, whose bytes stay in the file until somebody wants them. Reading them is `state_parser`'s,
writing them `state_writer`'s.

Source: `state_parser`, `state_dsv4`, `state_ik_llama`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FOOTER_MAGIC = 0x54514346  # TQCF
DEFERRED_STATES = ("off", "staging", "ready", "done")
# Bytes that a cell has between its sequence count and its sequences, and what they are.
CELL_RECORDS = {0: (), 8: ("x", "y"), 12: ("x", "y", "token")}


@dataclass(frozen=True)
class Layout:
    """One reading of a file's memory.

    Attributes:
        memory: the memory class, one of `memory_classes.CLASSES`, or "none".
        deferred: whether each KV starts with llama-tq's deferred-state byte.
        cell_bytes: bytes of the cell record of M-RoPE and PLE models: 0, 8 or 12.
        values: whether there are V rows; models with multi-head latent attention have none.
        recurrent_layers: layers with recurrent state.
        rotation_words: whether the sizes of the rotation stand after the layer count.
        streams: whether each KV starts with its number of streams.
        partial: whether it is only the part that `PARTIAL_ONLY` writes.
        program: "llama.cpp", which forks share, or "ik_llama".
    """

    memory: str
    deferred: bool = False
    cell_bytes: int = 0
    values: bool = True
    recurrent_layers: int = 0
    rotation_words: bool = False
    streams: bool = True
    partial: bool = False
    program: str = "llama.cpp"

    @property
    def mrope(self) -> bool:
        """Whether cells carry coordinates."""
        return self.cell_bytes > 0

    def __str__(self) -> str:
        parts = [self.memory + (" (the part that PARTIAL_ONLY writes)" if self.partial else "")]
        parts += ["as ik_llama.cpp writes it"] if self.program == "ik_llama" else []
        parts += ["with the deferred-state byte"] if self.deferred else []
        parts += [f"M-RoPE cells{' of 12 bytes' if self.cell_bytes == 12 else ''}"] * self.mrope
        parts += [] if self.values else ["no V"]
        parts += [f"{self.recurrent_layers} recurrent layers"] if self.recurrent_layers else []
        parts += ["with rotation sizes"] if self.rotation_words else []
        parts += [] if self.streams or self.program == "ik_llama" else ["without a stream count"]
        return ", ".join(parts)


class Cells:
    """The cells of a stream or of a recurrent memory, as views of the file where that can be.

    Args:
        words: the int32 words of all cells, one cell after the other.
        counts: how many sequences each cell belongs to: one number if it is the same for all, else
            uint16 (cells,). That is all that is kept beside the file.
        n_cells: how many cells there are.
        cell_bytes: bytes of a cell's record of coordinates: 0, 8 or 12.
    """

    def __init__(
        self, words: np.ndarray, counts: int | np.ndarray, n_cells: int, cell_bytes: int
    ) -> None:
        self.words = words
        self.cell_bytes = cell_bytes
        self._counts = counts
        self._n_cells = n_cells
        self._fixed = fixed_words(cell_bytes)

    def __len__(self) -> int:
        return self._n_cells

    @property
    def has_coordinates(self) -> bool:
        """Whether there are M-RoPE coordinates."""
        return self.cell_bytes > 0 and self._n_cells > 0

    @property
    def sequence_counts(self) -> np.ndarray:
        """int32 (cells,), how many sequences each cell belongs to."""
        return np.broadcast_to(np.asarray(self._counts, np.int32), (self._n_cells,))

    @property
    def positions(self) -> np.ndarray:
        """int32 (cells,)."""
        return self._column(0)

    @property
    def coordinates(self) -> np.ndarray | None:
        """int32 (cells, 2), the x and y of M-RoPE, or None."""
        if not self.has_coordinates:
            return None
        return np.stack([self._column(2), self._column(3)], axis=1)

    @property
    def tokens(self) -> np.ndarray | None:
        """int32 (cells,), the token of each cell, -1 for an image's; None in records of 8 bytes."""
        return self._column(4) if self.has_coordinates and self.cell_bytes == 12 else None

    @property
    def sequences(self) -> np.ndarray:
        """int32 (sum of sequence_counts,), their ids, cell after cell."""
        if isinstance(self._counts, int):
            return self._table()[:, self._fixed :].reshape(-1)
        return self.words[sequence_mask(self._starts(), len(self.words), self._fixed)]

    def with_record(self, cell_bytes: int, tokens: np.ndarray | None = None) -> Cells:
        """Return the same cells with a record of another size, int32 `tokens` (cells,) in it.

        Coordinates that there are none of become zero.
        """
        if not self._n_cells or cell_bytes == self.cell_bytes:
            return self
        counts = self.sequence_counts.astype(np.int64)
        fixed = fixed_words(cell_bytes)
        begins = starts(counts, fixed)
        words = np.zeros(int(counts.sum()) + fixed * self._n_cells, np.int32)
        words[begins], words[begins + 1] = self.positions, counts
        words[sequence_mask(begins, len(words), fixed)] = self.sequences
        mine = self.coordinates
        if cell_bytes and mine is not None:
            words[begins + 2], words[begins + 3] = mine.T
        if cell_bytes == 12:
            words[begins + 4] = -1 if tokens is None else tokens
        return Cells(words, self._counts, self._n_cells, cell_bytes)

    def _table(self) -> np.ndarray:
        return self.words.reshape(self._n_cells, -1) if self._n_cells else self.words.reshape(0, 5)

    def _column(self, word: int) -> np.ndarray:
        if isinstance(self._counts, int):
            return self._table()[:, word]
        return self.words[self._starts() + word]

    def _starts(self) -> np.ndarray:
        """Return the first word of each cell."""
        return starts(np.asarray(self._counts), self._fixed)


def fixed_words(cell_bytes: int) -> int:
    """Return how many words of a cell stand before its sequence ids."""
    return 2 + cell_bytes // 4


def starts(counts: np.ndarray, fixed: int) -> np.ndarray:
    """Return the first word of each cell, from how many sequences each belongs to."""
    ends = np.cumsum(counts + np.int64(fixed))
    ends[1:] = ends[:-1]
    ends[:1] = 0
    return ends


def sequence_mask(begins: np.ndarray, n_words: int, fixed: int) -> np.ndarray:
    """Return which words are sequence ids."""
    mask = np.ones(n_words, bool)
    for word in range(fixed):
        mask[begins + word] = False
    return mask


@dataclass(frozen=True)
class Rows:
    """The rows of one layer.

    Attributes:
        kind: "K", "V", "R" (recurrent convolution state), "S" (recurrent state) or "P" (PLE
            convolution state).
        type_id: the ggml type id; -1 for a layer that ik_llama.cpp writes as absent.
        cells: rows, one per cell.
        row_bytes: bytes per cell; all its elements together if transposed.
        where: where the record starts.
        data: where the rows start.
        n_embd: if transposed, the values per cell, stored as n_embd columns of `cells` values.
        form: what stands before the rows: "plain" (i32 type, u64 row bytes), "columns" (i32 type,
            u32 element bytes, u32 n_embd), "bare" (u64 row bytes), "tensor" (i32 type, u64 values,
            u64 rows, u64 row bytes), "counted" (i32 type, u64 row bytes, u32 rows).
        values, streams: in a tensor, the values per row that it states, and how many streams its
            rows are of.
    """

    kind: str
    type_id: int
    cells: int
    row_bytes: int
    where: int
    data: int
    n_embd: int | None = None
    form: str = "plain"
    values: int = 0
    streams: int = 1

    @property
    def columns(self) -> int:
        """Values per cell, of rows that are stored in columns."""
        assert self.n_embd is not None, "rows are stored in columns"
        return self.n_embd

    @property
    def end(self) -> int:
        """Where the record ends."""
        return self.data + self.cells * self.row_bytes

    def head(self, type_id: int, row_bytes: int) -> bytes:
        """Return what stands before the rows if they have this type and size."""
        if self.form == "columns":
            return struct.pack("<iII", type_id, row_bytes // (self.n_embd or 1), self.n_embd or 0)
        if self.form == "bare":
            return struct.pack("<Q", row_bytes)
        if self.form == "tensor":
            rows = self.cells // max(1, self.streams)
            return struct.pack("<iQQQ", type_id, self.values, rows, row_bytes)
        counted = struct.pack("<I", self.cells) if self.form == "counted" else b""
        return struct.pack("<iQ", type_id, row_bytes) + counted


@dataclass(frozen=True)
class Span:
    """Bytes of the file that nobody looks into, such as logits."""

    what: str
    start: int
    n_bytes: int


Piece = bytes | Cells | Rows | Span


@dataclass(frozen=True, eq=False)
class Stream:
    """One stream of a KV memory: its cells and their rows, keys first.

    `fingerprint` is what buun says of tables that were set when the program ran, 0 if none were;
    None if there is no such footer. `rotation` are the sizes of the rotations of K and V, where
    the file states them.
    """

    cells: Cells
    v_trans: int = 0
    keys: tuple[Rows, ...] = ()
    values: tuple[Rows, ...] = ()
    fingerprint: int | None = None
    rotation: tuple[int, int] | None = None

    def pieces(self) -> Iterator[Piece]:
        """Yield what it is serialised to."""
        yield self.cells
        if not len(self.cells):
            return
        yield struct.pack("<II", self.v_trans, len(self.keys))
        if self.rotation is not None:
            yield struct.pack("<II", *self.rotation)
        yield from self.keys
        yield from self.values
        if self.fingerprint is not None:
            yield struct.pack("<II", FOOTER_MAGIC, self.fingerprint)


@dataclass(frozen=True, eq=False)
class KvMemory:
    """A KV cache.

    `deferred` is an index into DEFERRED_STATES, None if the byte is not there; `counted` whether
    the number of streams is.
    """

    streams: tuple[Stream, ...]
    deferred: int | None = None
    counted: bool = True

    def pieces(self) -> Iterator[Piece]:
        """Yield what it is serialised to."""
        if self.counted:
            yield struct.pack("<I", len(self.streams))
        if self.deferred is not None:
            yield struct.pack("<B", self.deferred)
        for stream in self.streams:
            yield from stream.pieces()


@dataclass(frozen=True, eq=False)
class RecurrentMemory:
    """A recurrent memory. `n_layer` counts all layers of the model.

    `p` has the PLE state of each layer that is in `r`, None for one that has none.
    """

    cells: Cells
    n_layer: int
    r: tuple[Rows, ...]
    s: tuple[Rows, ...]
    p: tuple[Rows | None, ...] = ()

    def pieces(self) -> Iterator[Piece]:
        """Yield what it is serialised to."""
        yield self.cells
        yield struct.pack("<II", 0, self.n_layer)
        for rows, ple in zip(self.r, self.p, strict=True):
            yield rows
            if ple is not None:
                yield ple
        yield from self.s


@dataclass(frozen=True, eq=False)
class CompressedMemory:
    """Keys of deepseek4 that stand for several tokens each, or the state they are made from.

    Attributes:
        name: "csa", "hca" or "lid", and "_state" after it.
        head: the numbers before the layers, as in the file.
        layers: the layers' numbers, which this memory alone states.
        records: one tensor per layer, or two (kv and score).
    """

    name: str
    head: tuple[int, ...]
    layers: tuple[int, ...]
    records: tuple[tuple[Rows, ...], ...]

    def pieces(self) -> Iterator[Piece]:
        """Yield what it is serialised to."""
        yield struct.pack(f"<{len(self.head)}I", *self.head)
        for layer, records in zip(self.layers, self.records, strict=True):
            yield struct.pack("<I", layer)
            yield from records


@dataclass(frozen=True, eq=False)
class Mode:
    """What stands before the caches of deepseek4: b"DSV4", a version, 0 or 1 for PARTIAL_ONLY."""

    words: tuple[int, int, int]

    def pieces(self) -> Iterator[Piece]:
        """Yield what it is serialised to."""
        yield struct.pack("<III", *self.words)


@dataclass(frozen=True, eq=False)
class IkOutputs:
    """What ik_llama.cpp's session files have before the cache: random state and outputs."""

    rng: str
    outputs: int
    logits: int
    embeddings: int
    span: Span

    def pieces(self) -> Iterator[Piece]:
        """Yield what it is serialised to."""
        yield self.span


@dataclass(frozen=True, eq=False)
class IkMemory:
    """The cache of ik_llama.cpp, with all layers of the model; absent ones have type -1.

    Attributes:
        cells: the cells.
        window: what stands before a compacted window: magic, size, live cells, position, head.
        v_state: 0: V in rows, 1: V transposed, 2: no V.
        keys, values: a record per layer.
        linear: recurrent states, a record per layer; None if the file says that there are none.
        indexer: keys of the indexer, a record per layer that is not absent; None likewise.
    """

    cells: Cells
    window: tuple[int, ...] | None
    v_state: int
    keys: tuple[Rows, ...]
    values: tuple[Rows, ...]
    linear: tuple[Rows, ...] | None = None
    indexer: tuple[Rows, ...] | None = None

    def pieces(self) -> Iterator[Piece]:
        """Yield what it is serialised to."""
        if self.window is not None:
            yield struct.pack("<IIIiI", *self.window)
        yield self.cells
        yield struct.pack("<II", self.v_state, len(self.keys))
        yield from self.keys
        yield from self.values
        for records in (self.linear, self.indexer):
            yield struct.pack("<I", records is not None)
            yield from records or ()


Memory = KvMemory | RecurrentMemory | CompressedMemory | IkMemory


@dataclass(frozen=True, eq=False)
class Reading:
    """A layout that fits, and what it finds.

    Attributes:
        layout: the layout.
        memories: its memories, in file order.
        lead: what stands before them.
        classes: the memory classes that write these bytes, likeliest first.
    """

    layout: Layout
    memories: tuple[Memory, ...]
    lead: Mode | IkOutputs | None = None
    classes: tuple[str, ...] = ()

    def pieces(self) -> Iterator[Piece]:
        """Yield what it is serialised to."""
        if self.lead is not None:
            yield from self.lead.pieces()
        for memory in self.memories:
            yield from memory.pieces()
