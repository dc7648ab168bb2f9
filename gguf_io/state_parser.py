"""llama.cpp state files, bytes to records: what is in the file, under every reading that fits.

The file does not say which memory class wrote it, whether cells carry M-RoPE coordinates, whether
the model has values (MLA has none) or whether a fork put its own byte in front. Each combination is
a `Layout`; `readings` tries them all and returns those that consume the file to its last byte.
Nothing is trusted: every length is compared with the bytes that are left before it is used, no
array is larger than the part of the file it views, at most 33 readings are tried, and each takes
time in proportion to the file.

    container   GGSN  u32 magic, u32 version, u32 n, i32 tokens[n], u32 length, architecture
                GGSQ  u32 magic, u32 version, u32 n, i32 tokens[n]
                blob  u32 0xaf143cd8, i32 sequence; or nothing; or u32 length, architecture
    memory      kv: KV; iswa: KV KV; recurrent: REC; hybrid: KV REC; hybrid_iswa: KV KV REC
    KV          u32 n_stream, [u8 deferred state], streams
    stream      u32 cells, nothing more if 0; cells; u32 v_trans, u32 n_layer, K rows, V rows;
                buun, if a layer is of a trellis type: u32 0x54514346 (TQCF), u32 fingerprint
    cell        i32 position, u32 n, [i32 x, i32 y], i32 sequences[n]
    rows        i32 type, u64 row bytes, cells rows;
                V if v_trans: i32 type, u32 element bytes, u32 n_embd, n_embd columns of cells
    REC         u32 cells; cells; u32 s_trans = 0, u32 n_layer, R rows, S rows

Source: ggml-org/llama.cpp pull request 21089 @ f112d6de7: src/llama-context.cpp,
src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp, src/llama-memory-hybrid.cpp,
src/llama-memory-recurrent.cpp; the deferred state: LL4nc33/llama-tq @ 0f57a4ee6,
src/llama-kv-cache.cpp; the footer: spiritbuun/buun-llama-cpp, src/llama-kv-cache.cpp.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from gguf_io.types import PLAIN_TYPES
from tbq.format import Format
from tbq.registry import meaning, meanings

SESSION_MAGIC = 0x6767736E  # GGSN
SEQUENCE_MAGIC = 0x67677371  # GGSQ
BLOB_MAGIC = 0xAF143CD8
FOOTER_MAGIC = 0x54514346  # TQCF
MEMORY_CLASSES = ("kv", "iswa", "recurrent", "hybrid", "hybrid_iswa", "none")

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
MAX_LAYERS = 1024
MAX_TYPE_ID = 1023
# Words that are walked through, and cells that are checked, at a time.
CHUNK_WORDS = 1 << 11
CHUNK_CELLS = 1 << 12
DEFERRED_STATES = ("off", "staging", "ready", "done")

# Up to here every code base has upstream's ids, and numbers without a type are retired ones.
LAST_COMMON_ID = 40


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


class Cells:
    """The cells of a stream or of a recurrent memory, as views of the file where that can be.

    Args:
        words: the int32 words of all cells, one cell after the other.
        counts: how many sequences each cell belongs to: one number if it is the same for all, else
            uint16 (cells,). That is all that is kept beside the file.
        n_cells: how many cells there are.
        mrope: whether a cell has the two coordinates of M-RoPE.
    """

    def __init__(
        self, words: np.ndarray, counts: int | np.ndarray, n_cells: int, mrope: bool
    ) -> None:
        self.words = words
        self._counts = counts
        self._n_cells = n_cells
        self._fixed = fixed_words(mrope)

    def __len__(self) -> int:
        return self._n_cells

    @property
    def has_coordinates(self) -> bool:
        """Whether there are M-RoPE coordinates."""
        return self._fixed > fixed_words(False) and self._n_cells > 0

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
    def sequences(self) -> np.ndarray:
        """int32 (sum of sequence_counts,), their ids, cell after cell."""
        if isinstance(self._counts, int):
            return self._table()[:, self._fixed :].reshape(-1)
        return self.words[_sequence_mask(self._starts(), len(self.words), self._fixed)]

    def _table(self) -> np.ndarray:
        return self.words.reshape(self._n_cells, -1) if self._n_cells else self.words.reshape(0, 4)

    def _column(self, word: int) -> np.ndarray:
        if isinstance(self._counts, int):
            return self._table()[:, word]
        return self.words[self._starts() + word]

    def _starts(self) -> np.ndarray:
        """Return the first word of each cell."""
        return _starts(self._counts, self._fixed)


def fixed_words(mrope: bool) -> int:
    """Return how many words of a cell stand before its sequence ids."""
    return 4 if mrope else 2


def _starts(counts: np.ndarray, fixed: int) -> np.ndarray:
    ends = np.cumsum(counts + np.int64(fixed))
    ends[1:] = ends[:-1]
    ends[:1] = 0
    return ends


def _sequence_mask(starts: np.ndarray, n_words: int, fixed: int) -> np.ndarray:
    mask = np.ones(n_words, bool)
    for word in range(fixed):
        mask[starts + word] = False
    return mask


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
    """One stream of a KV memory: its cells and their rows, keys first.

    `fingerprint` is what buun says of tables that were set when the program ran, 0 if none were;
    None if there is no such footer.
    """

    cells: Cells
    v_trans: int = 0
    keys: tuple[Rows, ...] = ()
    values: tuple[Rows, ...] = ()
    fingerprint: int | None = None


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


class _Shared:
    """What the readings of one file have in common, so that each is found out once."""

    def __init__(self) -> None:
        # by place and kind of cell: the cells or what is wrong, and where reading them stopped
        self.cells: dict[tuple[int, bool, int], tuple[Cells | Mismatch, int]] = {}
        self._types: dict[int, tuple[Format | None, bool]] = {}

    def type(self, type_id: int) -> tuple[Format | None, bool]:
        """Return what an id means if that is undisputed, and whether a cache row can have it."""
        if type_id not in self._types:
            known = _undisputed(type_id)
            retired = known is None and type_id <= LAST_COMMON_ID and not meanings(type_id)
            unfit = known is not None and known.name in PLAIN_TYPES
            self._types[type_id] = known, not (retired or unfit)
        return self._types[type_id]


class Cursor:
    """A position in a buffer and bounds-checked reads from there on."""

    def __init__(self, buffer, at: int = 0, shared: _Shared | None = None) -> None:
        self.buffer = memoryview(buffer)
        self.end = len(self.buffer)
        self.at = at
        self.progress = 0
        self.shared = shared or _Shared()

    def copy(self) -> Cursor:
        """Return another cursor at the same place, which has seen nothing yet."""
        return Cursor(self.buffer, self.at, self.shared)

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
    """Yield what becomes of each reading: of at most eight KV layouts, and what may follow them.

    Each takes time in proportion to the file. Those that differ only in what comes later share
    what they have read before.
    """
    size = len(buffer)
    if start == size:
        yield Reading(Layout("none"), ())
        return
    shared = _Shared()
    for deferred in (False, True):
        for mrope in (False, True):
            for values in (True, False):
                layout = Layout("kv", deferred, mrope, values)
                yield from _kv_readings(Cursor(buffer, start, shared), layout)
    yield from _with_recurrent(Cursor(buffer, start, shared), (), Layout("recurrent"))


def _kv_readings(cursor: Cursor, layout: Layout) -> Iterator[Reading | Mismatch]:
    """Yield the readings that start with one KV, or with two of them."""
    memories: tuple[KvMemory, ...] = ()
    for plain, hybrid in (("kv", "hybrid"), ("iswa", "hybrid_iswa")):
        try:
            memories += (_kv(cursor, layout),)
        except Mismatch as failure:
            yield _after(failure, memories)
            return
        if cursor.at == cursor.end:
            yield Reading(_with(layout, plain), memories)
            return
        yield from _with_recurrent(cursor.copy(), memories, _with(layout, hybrid))


def _with(layout: Layout, memory: str, recurrent_layers: int = 0) -> Layout:
    return Layout(memory, layout.deferred, layout.mrope, layout.values, recurrent_layers)


def _with_recurrent(cursor: Cursor, before: tuple, layout: Layout):
    """Yield the reading in which all that is left is one recurrent memory."""
    try:
        memory = _recurrent(cursor)
        yield Reading(_with(layout, layout.memory, len(memory.r)), (*before, memory))
    except Mismatch as failure:
        yield _after(failure, before)


def _after(failure: Mismatch, before: tuple) -> Mismatch:
    """Say that something did fit before a failure."""
    failure = failure.with_traceback(None)  # whose frames hold everything that was read
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
            mrope = stream.cells.has_coordinates
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
    return Stream(cells, v_trans, keys, values, _fingerprint(cursor))


def _fingerprint(cursor: Cursor) -> int | None:
    """Read a footer if there is one; as many cells as its magic says do not fit in any file."""
    if cursor.end - cursor.at < 8:
        return None
    magic, fingerprint = struct.unpack_from("<II", cursor.buffer, cursor.at)
    if magic != FOOTER_MAGIC:
        return None
    cursor.at += 8
    return fingerprint


def _recurrent(cursor: Cursor) -> RecurrentMemory:
    """Read a recurrent memory that ends where the file does.

    How many layers have recurrent state is not stored. Records of R and of S are alike, so that
    there is one chain of them, and half of those that reach the end of the file are R.
    """
    cells = _cells(cursor, mrope=False, least_sequences=0)
    cursor.number("I", "s_trans", 0, 0)
    n_layer = cursor.number("I", "layer count", 1, MAX_LAYERS)
    records: list[Rows] = []
    while cursor.at < cursor.end and len(records) < 2 * n_layer:
        records.append(_rows(cursor, "R or S", len(cells), least_bytes=0))
    half, odd = divmod(len(records), 2)
    if cursor.at < cursor.end or odd or not half:
        cursor.fail(cursor.at, f"{n_layer} recurrent layers do not end where the file does")
    r, s = (
        tuple(replace(rows, kind=kind) for rows in some)
        for kind, some in (("R", records[:half]), ("S", records[half:]))
    )
    return RecurrentMemory(cells, n_layer, r, s)


def _cells(cursor: Cursor, mrope: bool, least_sequences: int) -> Cells:
    """Read the cells of a stream; `least_sequences` is 0 where they may belong to none."""
    key = cursor.at, mrope, least_sequences
    if key not in cursor.shared.cells:
        try:
            cells = _read_cells(cursor, mrope, least_sequences)
            cursor.shared.cells[key] = cells, cursor.at
        except Mismatch as failure:
            cursor.shared.cells[key] = failure.with_traceback(None), cursor.at
    found, cursor.at = cursor.shared.cells[key]
    if isinstance(found, Mismatch):
        cursor.fail(found.at, found.reason)
    return found


def _read_cells(cursor: Cursor, mrope: bool, least_sequences: int) -> Cells:
    where, fixed = cursor.at, fixed_words(mrope)
    count = cursor.number("I", "cell count", 0, (1 << 32) - 1)
    if count > (cursor.end - cursor.at) // (4 * (fixed + least_sequences)):
        cursor.fail(where, f"{count} cells do not fit the {cursor.end - cursor.at} bytes left")
    start = cursor.at
    words = np.frombuffer(cursor.buffer, "<i4", (cursor.end - start) // 4, start)
    if not count:
        return Cells(words[:0], 0, 0, mrope)
    counts = _uniform_count(words, count, fixed, least_sequences)
    if counts is None:
        counts = _walk(cursor, words, count, fixed, least_sequences)
        size = int(counts.sum(dtype=np.int64)) + fixed * count
    else:
        size = (counts + fixed) * count
    _check_cells(cursor, words[:size], counts, count, fixed)
    cursor.skip(4 * size, "cells")
    return Cells(words[:size], counts, count, mrope)


def _uniform_count(words: np.ndarray, count: int, fixed: int, least: int) -> int | None:
    """Return how many sequences each cell belongs to; None if that differs or cannot be."""
    n = int(words[1])
    if not least <= n <= MAX_SEQUENCES or count > len(words) // (fixed + n):
        return None
    table = words[: count * (fixed + n)].reshape(count, -1)
    return n if (table[:, 1] == n).all() else None


def _walk(cursor: Cursor, words: np.ndarray, count: int, fixed: int, least: int) -> np.ndarray:
    """Go from cell to cell; return how many sequences each belongs to, uint16 (count,)."""
    counts = array("H")
    at, start = 0, cursor.at
    while len(counts) < count:
        piece = words[at : at + CHUNK_WORDS].tolist()
        if len(piece) < fixed:
            cursor.fail(start + 4 * at, f"{count} cells do not fit the bytes left")
        i, last = 0, len(piece) - 1
        while i < last and len(counts) < count:
            n = piece[i + 1]
            if not least <= n <= MAX_SEQUENCES:
                reason = f"sequence count of a cell is {n % (1 << 32)}, not from {least} to "
                cursor.fail(start + 4 * (at + i + 1), f"{reason}{MAX_SEQUENCES}")
            counts.append(n)
            i += fixed + n
        at += i
    if at > len(words):
        cursor.fail(start, f"{count} cells do not fit the {4 * len(words)} bytes left")
    return np.frombuffer(counts, np.uint16)


def _check_cells(
    cursor: Cursor, words: np.ndarray, counts: int | np.ndarray, count: int, fixed: int
) -> None:
    """Check positions and sequence ids, so many cells at a time."""
    start, at = cursor.at, 0
    for first in range(0, count, CHUNK_CELLS):
        n = min(CHUNK_CELLS, count - first)
        some = counts if isinstance(counts, int) else counts[first : first + n]
        begins = _starts(np.broadcast_to(np.asarray(some), (n,)), fixed)
        size = int(begins[-1]) + fixed + (some if isinstance(some, int) else int(some[-1]))
        piece = words[at : at + size]
        ids = _sequence_mask(begins, size, fixed)
        bad = np.zeros(size, bool)
        bad[begins] = piece[begins] < -1
        bad |= ids & ((piece < 0) | (piece >= MAX_SEQUENCES))
        if bad.any():
            i = int(np.argmax(bad))
            most = MAX_SEQUENCES - 1 if ids[i] else (1 << 31) - 1
            what = "sequence id" if ids[i] else "position"
            reason = f"{what} is {piece[i]}, not from {-1 + int(ids[i])} to {most}"
            cursor.fail(start + 4 * (at + i), reason)
        at += size


def _type_id(cursor: Cursor, kind: str) -> tuple[int, Format | None]:
    """Return a type id, and what it means if it means the same everywhere."""
    where = cursor.at
    type_id = cursor.number("i", f"type of {kind} rows", 0, MAX_TYPE_ID)
    known, possible = cursor.shared.type(type_id)
    if not possible:
        cursor.fail(where, f"type {type_id} is none that {kind} rows can have")
    return type_id, known


def _undisputed(type_id: int) -> Format | None:
    """Return what an id means, if it means the same everywhere; else None."""
    known = meaning(type_id, None)
    return known if all(fmt is known for _, _, fmt in meanings(type_id)) else None


def _rows(cursor: Cursor, kind: str, cells: int, least_bytes: int = 1) -> Rows:
    where = cursor.at
    type_id, known = _type_id(cursor, kind)
    size_at = cursor.at
    row_bytes = cursor.number("Q", f"row size of {kind}", least_bytes, cursor.end)
    if known is not None and row_bytes % known.block_bytes:
        need = f"a multiple of {known.block_bytes} bytes of {known.name}"
        cursor.fail(size_at, f"row size of {kind} is {row_bytes}, not {need}")
    data = cursor.skip(row_bytes * cells, f"{kind} rows")
    return Rows(kind, type_id, cells, row_bytes, where, data)


def _transposed_rows(cursor: Cursor, kind: str, cells: int) -> Rows:
    where = cursor.at
    type_id, known = _type_id(cursor, kind)
    size_at = cursor.at
    element = cursor.number("I", f"element size of {kind}", 1, cursor.end)
    if known is None or known.is_quantized or element != known.block_bytes:
        cursor.fail(size_at, f"transposed {kind} of type {type_id} and {element} bytes each")
    n_embd = cursor.number("I", f"width of {kind}", 1, cursor.end)
    data = cursor.skip(n_embd * element * cells, f"{kind} columns")
    return Rows(kind, type_id, cells, n_embd * element, where, data, n_embd)
