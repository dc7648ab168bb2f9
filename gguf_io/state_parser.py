"""llama.cpp state files, bytes to records: what is in the file, under every reading that fits.

The file does not say which memory class wrote it, whether cells carry M-RoPE coordinates, whether
the model has values (MLA has none) or whether a fork put its own byte in front. Each combination is
a `Layout`; `readings` tries them all and returns those that consume the file to its last byte.
Nothing is trusted: every length is compared with the bytes that are left before it is used, and no
array is larger than the part of the file it views.

    container   GGSN  u32 magic, u32 version, u32 n, i32 tokens[n], u32 length, architecture
                GGSQ  u32 magic, u32 version, u32 n, i32 tokens[n]
                blob  u32 0xaf143cd8, i32 sequence; or nothing; or u32 length, architecture
    memory      kv: KV; iswa: KV KV; recurrent: REC; hybrid: KV REC; hybrid_iswa: KV KV REC
    KV          u32 n_stream, [u8 deferred state], streams
    stream      u32 cells, nothing more if 0; cells; u32 v_trans, u32 n_layer, K rows, V rows
    cell        i32 position, u32 n, [i32 x, i32 y], i32 sequences[n]
    rows        i32 type, u64 row bytes, cells rows;
                V if v_trans: i32 type, u32 element bytes, u32 n_embd, n_embd columns of cells
    REC         u32 cells; cells; u32 s_trans = 0, u32 n_layer, R rows, S rows

Source: ggml-org/llama.cpp pull request 21089 @ f112d6de7: src/llama-context.cpp,
src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp, src/llama-memory-hybrid.cpp,
src/llama-memory-recurrent.cpp; the deferred state: LL4nc33/llama-tq @ 0f57a4ee6,
src/llama-kv-cache.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gguf_io.types import FIRST_FORK_ID, ggml_types

SESSION_MAGIC = 0x6767736E  # GGSN
SEQUENCE_MAGIC = 0x67677371  # GGSQ
BLOB_MAGIC = 0xAF143CD8
MEMORY_CLASSES = ("kv", "iswa", "recurrent", "hybrid", "hybrid_iswa", "none")

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
MAX_LAYERS = 1024
MAX_TYPE_ID = 1023
DEFERRED_STATES = ("off", "staging", "ready", "done")

# Types a cache row cannot have: the integers and the 64-bit floats of ggml.
_NO_CACHE_TYPE = ("i8", "i16", "i32", "i64", "f64")


@dataclass(frozen=True)
class Layout:
    """One reading of a file's memory.

    Attributes:
        memory: one of MEMORY_CLASSES.
        deferred: whether each KV starts with llama-tq's deferred-state byte.
        mrope: whether cells carry the two extra coordinates of M-RoPE.
        values: whether there are V rows; models with multi-head latent attention have none.
        recurrent_layers: layers with recurrent state.
    """

    memory: str
    deferred: bool = False
    mrope: bool = False
    values: bool = True
    recurrent_layers: int = 0

    def __str__(self) -> str:
        parts = [self.memory]
        parts += ["with the deferred-state byte"] if self.deferred else []
        parts += ["M-RoPE cells"] if self.mrope else []
        parts += [] if self.values else ["no V"]
        parts += [f"{self.recurrent_layers} recurrent layers"] if self.recurrent_layers else []
        return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of a stream or of a recurrent memory.

    Attributes:
        positions: int32 (cells,).
        sequence_counts: int32 (cells,), how many sequences each cell belongs to.
        sequences: int32 (sum of sequence_counts,), their ids, cell after cell.
        coordinates: int32 (cells, 2), the x and y of M-RoPE, or None.
    """

    positions: np.ndarray
    sequence_counts: np.ndarray
    sequences: np.ndarray
    coordinates: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Rows:
    """The rows of one layer: K, V, R (recurrent convolution state) or S (recurrent state).

    Attributes:
        kind: "K", "V", "R" or "S".
        type_id: the ggml type id.
        cells: rows, one per cell.
        row_bytes: bytes per cell; all its elements together if transposed.
        where: where the record starts.
        data: where the rows start.
        n_embd: if transposed, the values per cell, stored as n_embd columns of `cells` values.
    """

    kind: str
    type_id: int
    cells: int
    row_bytes: int
    where: int
    data: int
    n_embd: int | None = None

    @property
    def end(self) -> int:
        """Where the record ends."""
        return self.data + self.cells * self.row_bytes


@dataclass(frozen=True, eq=False)
class Stream:
    """One stream of a KV memory: its cells and their rows, keys first."""

    cells: Cells
    v_trans: int = 0
    keys: tuple[Rows, ...] = ()
    values: tuple[Rows, ...] = ()


@dataclass(frozen=True, eq=False)
class KvMemory:
    """A KV cache. `deferred` is an index into DEFERRED_STATES, None if the byte is not there."""

    streams: tuple[Stream, ...]
    deferred: int | None = None


@dataclass(frozen=True, eq=False)
class RecurrentMemory:
    """A recurrent memory. `n_layer` counts all layers of the model."""

    cells: Cells
    n_layer: int
    r: tuple[Rows, ...]
    s: tuple[Rows, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """A layout that fits, and what it finds."""

    layout: Layout
    memories: tuple[KvMemory | RecurrentMemory, ...]


class Mismatch(Exception):
    """The bytes cannot be what a reading takes them for.

    `progress` counts the memories and the lists of cells that made sense before.
    """

    def __init__(self, at: int, reason: str, progress: int = 0) -> None:
        self.at = at
        self.reason = reason
        self.progress = progress
        super().__init__(reason)

    @property
    def rank(self) -> tuple[int, int]:
        """Higher for the failure of a likelier reading."""
        return self.progress, self.at if self.progress else 0


class Cursor:
    """A position in a buffer and bounds-checked reads from there on."""

    def __init__(self, buffer, at: int = 0) -> None:
        self.buffer = memoryview(buffer)
        self.end = len(self.buffer)
        self.at = at
        self.progress = 0

    def fail(self, at: int, reason: str):
        """Raise a Mismatch."""
        raise Mismatch(at, reason, self.progress)

    def skip(self, n: int, what: str) -> int:
        """Move past n bytes and return where they start."""
        start = self.at
        if n > self.end - start:
            self.fail(start, f"{what} needs {n} bytes, the file has {self.end - start} left")
        self.at = start + n
        return start

    def number(self, code: str, what: str, least: int, most: int) -> int:
        """Read one number of a struct code and check its range."""
        start = self.skip(struct.calcsize("<" + code), what)
        (value,) = struct.unpack_from("<" + code, self.buffer, start)
        if not least <= value <= most:
            self.fail(start, f"{what} is {value}, not from {least} to {most}")
        return value

    def array(self, count: int, what: str) -> np.ndarray:
        """View `count` int32 values."""
        start = self.skip(4 * count, what)
        return np.frombuffer(self.buffer, "<i4", count, start)


def readings(buffer, start: int) -> tuple[list[Reading], Mismatch]:
    """Return every reading of the memory that starts at `start`, and the likeliest one's failure.

    Readings that differ only in what the file has no trace of (M-RoPE where there are no cells,
    values where there are no rows) count as one.
    """
    found: dict[tuple, Reading] = {}
    furthest = Mismatch(start, "there is no memory", progress=-1)
    for reading in _attempts(buffer, start):
        if isinstance(reading, Mismatch):
            furthest = max(furthest, reading, key=lambda failure: failure.rank)
        else:
            found.setdefault(_extent(reading), reading)
    return list(found.values()), furthest


def _attempts(buffer, start: int) -> Iterator[Reading | Mismatch]:
    size = len(buffer)
    if start == size:
        yield Reading(Layout("none"), ())
        return
    for deferred in (False, True):
        for mrope in (False, True):
            for values in (True, False):
                layout = Layout("kv", deferred, mrope, values)
                yield from _kv_readings(buffer, start, layout)
    yield from _with_recurrent(buffer, start, (), Layout("recurrent"))


def _kv_readings(buffer, start: int, layout: Layout) -> Iterator[Reading | Mismatch]:
    """Yield the readings that start with one KV, or with two of them."""
    memories: tuple[KvMemory, ...] = ()
    cursor = Cursor(buffer, start)
    for plain, hybrid in (("kv", "hybrid"), ("iswa", "hybrid_iswa")):
        try:
            memories += (_kv(cursor, layout),)
        except Mismatch as failure:
            yield _after(failure, memories)
            return
        if cursor.at == cursor.end:
            yield Reading(_with(layout, plain), memories)
            return
        yield from _with_recurrent(buffer, cursor.at, memories, _with(layout, hybrid))


def _with(layout: Layout, memory: str, recurrent_layers: int = 0) -> Layout:
    return Layout(memory, layout.deferred, layout.mrope, layout.values, recurrent_layers)


def _with_recurrent(buffer, start: int, before: tuple, layout: Layout):
    """Yield the readings in which all that is left is one recurrent memory."""
    try:
        for memory in _recurrent(Cursor(buffer, start)):
            yield Reading(_with(layout, layout.memory, len(memory.r)), (*before, memory))
    except Mismatch as failure:
        yield _after(failure, before)


def _after(failure: Mismatch, before: tuple) -> Mismatch:
    """Say that something did fit before a failure."""
    complete = sum(any(len(stream.cells) for stream in memory.streams) for memory in before)
    if not complete:
        return failure
    reason = f"{complete} complete KV memory before this; then {failure.reason}"
    return Mismatch(failure.at, reason, failure.progress + 2 * complete)


def _extent(reading: Reading) -> tuple:
    """Return what tells two readings apart: where they find rows and cells, and of what kind."""
    parts: list[tuple] = []
    for memory in reading.memories:
        if isinstance(memory, RecurrentMemory):
            parts.append(("REC", len(memory.cells), *memory.r, *memory.s))
            continue
        for stream in memory.streams:
            mrope = stream.cells.coordinates is not None
            parts.append((memory.deferred, len(stream.cells), mrope, *stream.keys, *stream.values))
    return tuple(parts)


def _kv(cursor: Cursor, layout: Layout) -> KvMemory:
    n_stream = cursor.number("I", "stream count", 1, MAX_SEQUENCES)
    deferred = cursor.number("B", "deferred state", 0, 3) if layout.deferred else None
    streams = tuple(_stream(cursor, layout) for _ in range(n_stream))
    return KvMemory(streams, deferred)


def _stream(cursor: Cursor, layout: Layout) -> Stream:
    cells = _cells(cursor, layout.mrope, least_sequences=1)
    if not len(cells):
        return Stream(cells)
    cursor.progress += 1
    v_trans = cursor.number("I", "v_trans", 0, 1)
    n_layer = cursor.number("I", "layer count", 1, MAX_LAYERS)
    keys = tuple(_rows(cursor, "K", len(cells)) for _ in range(n_layer))
    read_values = _transposed_rows if v_trans else _rows
    n_values = n_layer if layout.values else 0
    values = tuple(read_values(cursor, "V", len(cells)) for _ in range(n_values))
    return Stream(cells, v_trans, keys, values)


def _recurrent(cursor: Cursor) -> Iterator[RecurrentMemory]:
    """Yield every number of layers with which a recurrent memory ends where the file does."""
    cells = _cells(cursor, mrope=False, least_sequences=0)
    cursor.number("I", "s_trans", 0, 0)
    n_layer = cursor.number("I", "layer count", 1, MAX_LAYERS)
    r: tuple[Rows, ...] = ()
    while len(r) < n_layer:
        r += (_rows(cursor, "R", len(cells), least_bytes=0),)
        rest = Cursor(cursor.buffer, cursor.at)
        try:
            s = tuple(_rows(rest, "S", len(cells), least_bytes=0) for _ in r)
        except Mismatch:
            continue
        if rest.at == rest.end:
            yield RecurrentMemory(cells, n_layer, r, s)
    cursor.fail(cursor.at, f"{n_layer} recurrent layers do not end where the file does")


def _cells(cursor: Cursor, mrope: bool, least_sequences: int) -> Cells:
    """Read the cells of a stream; `least_sequences` is 0 where they may belong to none."""
    where = cursor.at
    count = cursor.number("I", "cell count", 0, (1 << 32) - 1)
    fixed = 4 if mrope else 2  # words before the sequence ids
    if count > (cursor.end - cursor.at) // (4 * (fixed + least_sequences)):
        cursor.fail(where, f"{count} cells do not fit the {cursor.end - cursor.at} bytes left")
    if not count:
        none = np.empty(0, np.int32)
        return Cells(none, none, none)
    uniform = _uniform_cells(cursor, count, fixed, least_sequences)
    if uniform is not None:
        return uniform
    positions = np.empty(count, np.int32)
    counts = np.empty(count, np.int32)
    coordinates = np.empty((count, 2), np.int32) if mrope else None
    sequences = []
    for i in range(count):
        positions[i] = cursor.number("i", "position", -1, (1 << 31) - 1)
        what = "sequence count of a cell"
        counts[i] = cursor.number("I", what, least_sequences, MAX_SEQUENCES)
        if coordinates is not None:
            coordinates[i] = cursor.array(2, "M-RoPE coordinates")
        for _ in range(counts[i]):
            sequences.append(cursor.number("i", "sequence id", 0, MAX_SEQUENCES - 1))
    return Cells(positions, counts, np.array(sequences, np.int32), coordinates)


def _uniform_cells(cursor: Cursor, count: int, fixed: int, least_sequences: int) -> Cells | None:
    """Read cells that all belong to equally many sequences; None if they do not."""
    if cursor.end - cursor.at < 4 * fixed:
        return None
    (n_sequences,) = struct.unpack_from("<I", cursor.buffer, cursor.at + 4)
    words = fixed + n_sequences
    if not least_sequences <= n_sequences <= MAX_SEQUENCES:
        return None
    if count > (cursor.end - cursor.at) // (4 * words):
        return None
    table = np.frombuffer(cursor.buffer, "<i4", count * words, cursor.at).reshape(count, words)
    sequences = table[:, fixed:]
    if (table[:, 1] != n_sequences).any() or (table[:, 0] < -1).any():
        return None
    if (sequences < 0).any() or (sequences >= MAX_SEQUENCES).any():
        return None
    cursor.skip(4 * count * words, "cells")
    coordinates = table[:, 2:4] if fixed == 4 else None
    return Cells(table[:, 0], table[:, 1], sequences.reshape(-1), coordinates)


def _type_id(cursor: Cursor, kind: str) -> int:
    where = cursor.at
    type_id = cursor.number("i", f"type of {kind} rows", 0, MAX_TYPE_ID)
    known = ggml_types().get(type_id)
    if type_id < FIRST_FORK_ID and (known is None or known.name in _NO_CACHE_TYPE):
        cursor.fail(where, f"type {type_id} is none that {kind} rows can have")
    return type_id


def _rows(cursor: Cursor, kind: str, cells: int, least_bytes: int = 1) -> Rows:
    where = cursor.at
    type_id = _type_id(cursor, kind)
    size_at = cursor.at
    row_bytes = cursor.number("Q", f"row size of {kind}", least_bytes, cursor.end)
    known = ggml_types().get(type_id)
    if known is not None and row_bytes % known.block_bytes:
        need = f"a multiple of {known.block_bytes} bytes of {known.name}"
        cursor.fail(size_at, f"row size of {kind} is {row_bytes}, not {need}")
    data = cursor.skip(row_bytes * cells, f"{kind} rows")
    return Rows(kind, type_id, cells, row_bytes, where, data)


def _transposed_rows(cursor: Cursor, kind: str, cells: int) -> Rows:
    where = cursor.at
    type_id = _type_id(cursor, kind)
    size_at = cursor.at
    element = cursor.number("I", f"element size of {kind}", 1, cursor.end)
    known = ggml_types().get(type_id)
    if known is None or known.is_quantized or element != known.block_bytes:
        cursor.fail(size_at, f"transposed {kind} of type {type_id} and {element} bytes each")
    n_embd = cursor.number("I", f"width of {kind}", 1, cursor.end)
    data = cursor.skip(n_embd * element * cells, f"{kind} columns")
    return Rows(kind, type_id, cells, n_embd * element, where, data, n_embd)
