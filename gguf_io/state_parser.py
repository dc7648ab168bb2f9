"""llama.cpp state files, bytes to records: what is in the file, under every reading that fits.

The file does not say which memory class wrote it, how long the record of coordinates in its cells
is, whether the model has values (MLA has none), whether the sizes of the rotation follow the layer
count, or whether a fork put its own byte in front. Each combination is a `Layout`; `readings` tries
them all and returns those that consume the file to its last byte. Nothing is trusted: every length
is compared with the bytes that are left before it is used, no array is larger than the part of the
file it views, and what several readings share is read once.

    memory      KV and REC in the order of the class, see `memory_classes`; deepseek4's and
                ik_llama.cpp's: `state_dsv4`, `state_ik_llama`
    KV          u32 n_stream, [u8 deferred state], streams
    stream      u32 cells, nothing more if 0; cells; u32 v_trans, u32 n_layer (0 for a cache
                without layers), [u32 size of K's rotation, u32 of V's], K rows, V rows;
                buun, if a layer is of a trellis type: u32 0x54514346 (TQCF), u32 fingerprint
    cell        i32 position, u32 n, [i32 x, i32 y, [i32 token]], i32 sequences[n]
    rows        i32 type, u64 row bytes, cells rows;
                V if v_trans: i32 type, u32 element bytes, u32 n_embd, n_embd columns of cells
    REC         u32 cells; cells; u32 s_trans = 0, u32 n_layer, per layer R rows and, if it has a
                PLE state, u64 row bytes and its rows; S rows

Source: ggml-org/llama.cpp pull request 21089 @ f112d6de7 (versions 9 and 2) and 0c1e57098 (10 and
3): src/llama-context.cpp, src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp,
src/llama-memory-hybrid.cpp, src/llama-memory-recurrent.cpp; the rotation's sizes: pull request
28498; the deferred state: LL4nc33/llama-tq @ 0f57a4ee6, src/llama-kv-cache.cpp; the footer:
spiritbuun/buun-llama-cpp, src/llama-kv-cache.cpp.
"""

from __future__ import annotations

import itertools
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from gguf_io import state_dsv4, state_ik_llama
from gguf_io.memory_classes import CLASSES, same_bytes
from gguf_io.state_cursor import Cursor, Mismatch, Shared
from gguf_io.state_records import (
    CELL_RECORDS,
    FOOTER_MAGIC,
    Cells,
    CompressedMemory,
    IkMemory,
    KvMemory,
    Layout,
    Memory,
    Reading,
    RecurrentMemory,
    Rows,
    Stream,
    fixed_words,
    sequence_mask,
    starts,
)
from tbq.format import Format

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
MAX_LAYERS = 1024
MAX_TYPE_ID = 1023
MAX_ROW_BYTES = 1 << 32  # of rows that there are none of
# What recurrent states are of: f32. A PLE row, which has no type, starts with its size, which is
# another number.
STATE_TYPE = 0
# Words that are walked through, and cells that are checked, at a time.
CHUNK_WORDS = 1 << 11
CHUNK_CELLS = 1 << 12
SHAPES = {c.shape for c in CLASSES.values() if c.name != "dsv4"}


@dataclass(frozen=True)
class Form:
    """How the KV memories of a file are written, see `Layout`."""

    deferred: bool = False
    cell_bytes: int = 0
    values: bool = True
    rotation_words: bool = False
    counted: bool = True


def readings(
    buffer: Any, start: int, ends: set[int] | None = None
) -> tuple[list[Reading], Mismatch]:
    """Return every reading of the memory that starts at `start`, and the likeliest one's failure.

    Places before the end at which a memory was complete are added to `ends`.
    Readings that differ only in what the file has no trace of (M-RoPE where there are no cells,
    values where there are no rows) count as one.
    """
    found: dict[tuple[Any, ...], Reading] = {}
    furthest = Mismatch(start, "there is no memory", progress=-1)
    shared = Shared() if ends is None else Shared(ends=ends)
    for reading in _attempts(buffer, start, shared):
        if isinstance(reading, Mismatch):
            furthest = max(furthest, reading, key=lambda failure: failure.rank)
            continue
        key = _extent(reading)
        same = found.get(key)
        if same is None:
            found[key] = reading
        else:  # what is told apart by nothing has the classes of all
            classes = tuple(dict.fromkeys((*same.classes, *reading.classes)))
            found[key] = replace(same, classes=classes)
    return list(found.values()), furthest


def _attempts(buffer: Any, start: int, shared: Shared) -> Iterator[Reading | Mismatch]:
    """Yield what becomes of each reading."""
    if start == len(buffer):
        yield Reading(Layout("none"), (), classes=("none",))
        return
    at_start = Cursor(buffer, start, shared)
    axes = ((False, True), (False, True), CELL_RECORDS, (True, False))
    for rotation, deferred, cell_bytes, values in itertools.product(*axes):
        form = Form(deferred, cell_bytes, values, rotation)
        yield from _sections(at_start.moved(start), form, "", ())
    for cell_bytes, values in itertools.product(CELL_RECORDS, (True, False)):
        form = Form(False, cell_bytes, values, counted=False)
        yield from _sections(at_start.moved(start), form, "", ())
    yield from state_dsv4.readings(at_start.moved(start), _caches)
    plain_cells = partial(_cells, cell_bytes=0)
    yield from state_ik_llama.readings(at_start.moved(start), plain_cells, _rows, transposed_rows)


def _sections(
    cursor: Cursor, form: Form, shape: str, before: tuple[Memory, ...]
) -> Iterator[Reading | Mismatch]:
    """Yield the readings of what is left, after some memories of a shape."""
    reading = _complete(form, shape, before) if before else None
    if reading is not None and cursor.left:
        cursor.shared.ends.add(cursor.at)
    if before and not cursor.left:
        if reading is not None:
            yield reading
        return
    for letter in "KR":
        if not any(s.startswith(shape + letter) for s in SHAPES):
            continue
        if letter == "R" and shape == "" and form != Form():
            continue  # a recurrent memory alone is the same in every form
        options = _caches_next(cursor, form, shape) if letter == "K" else _states(cursor, shape)
        for option in options:
            if isinstance(option, Mismatch):
                yield _after(option, before)
            else:
                memory, at = option
                yield from _sections(cursor.moved(at), form, shape + letter, (*before, memory))


def _complete(form: Form, shape: str, memories: tuple[Memory, ...]) -> Reading | None:
    """Return the reading that these memories are; None if no class writes them."""
    classes = [CLASSES[name] for name in same_bytes(shape, form.values)]
    caches = [(i, m) for i, m in enumerate(memories) if isinstance(m, KvMemory)]
    for i, memory in caches:
        records = {s.cells.cell_bytes for s in memory.streams if len(s.cells)}
        if records - {form.cell_bytes}:
            classes = [c for c in classes if c.parts[i].indexed]
    if not classes:
        return None
    states = [m for m in memories if isinstance(m, RecurrentMemory)]
    layout = Layout(
        classes[0].name,
        form.deferred,
        form.cell_bytes,
        form.values,
        sum(len(m.r) for m in states),
        form.rotation_words,
        form.counted or not caches,
    )
    return Reading(layout, memories, classes=tuple(c.name for c in classes))


def _caches_next(
    cursor: Cursor, form: Form, shape: str
) -> Iterator[tuple[KvMemory, int] | Mismatch]:
    """Yield the KV memories that the next bytes can be, and where each ends."""
    forms = [form]
    if "K" in shape:  # an indexer's, perhaps: of keys only, and without the record in its cells
        values = form.values and "R" not in shape
        records = dict.fromkeys((form.cell_bytes, 0))
        forms = [replace(form, values=values, cell_bytes=n) for n in records]
    for each in forms:
        try:
            own = cursor.moved(cursor.at)
            memory = own.once(("kv", each), partial(_kv, form=each))
            yield memory, own.at
        except Mismatch as failure:
            yield failure


def _caches(cursor: Cursor, cell_bytes: int, n: int) -> tuple[KvMemory, ...]:
    """Read n KV memories of keys only."""
    return tuple(_kv(cursor, Form(values=False, cell_bytes=cell_bytes)) for _ in range(n))


def _states(cursor: Cursor, shape: str) -> Iterator[tuple[RecurrentMemory, int] | Mismatch]:
    """Yield the recurrent memories that the next bytes can be, and where each ends.

    How many layers have recurrent state is not stored. Records of R and of S are alike, so that
    there is one chain of them, of which a part is R, as many are S, and the rest is what follows.
    """
    own = cursor.moved(cursor.at)
    try:
        cells, n_layer, chain, stop = own.once(("rec",), _chain)
    except Mismatch as failure:
        yield failure
        return
    ends = [end for _, _, end in chain]
    followed = any(s.startswith(shape + "RK") for s in SHAPES)
    found = False
    for n in range(1, len(chain) // 2 + 1):
        end = ends[2 * n - 1]
        last = end == cursor.end
        if not last:
            cursor.shared.ends.add(end)
        if not last and not (followed and _starts_cache(cursor, end)):
            continue
        if any(ple is not None for _, ple, _ in chain[n : 2 * n]):
            continue
        found = found or last
        yield _recurrent(cells, n_layer, chain, n), end
    if not found:
        yield stop or Mismatch(
            ends[-1] if ends else own.at,
            f"{n_layer} recurrent layers do not end where the file does",
            own.progress,
        )


def _starts_cache(cursor: Cursor, at: int) -> bool:
    """Tell whether a number of streams stands somewhere."""
    count = cursor.moved(at).peek("I")
    return count is not None and 1 <= count <= MAX_SEQUENCES


def _recurrent(cells: Cells, n_layer: int, chain: list[Any], n: int) -> RecurrentMemory:
    """Return the memory whose first n records of a chain are R."""
    r, s = (
        tuple(replace(rows, kind=kind) for rows, _, _ in some)
        for kind, some in (("R", chain[:n]), ("S", chain[n : 2 * n]))
    )
    return RecurrentMemory(cells, n_layer, r, s, tuple(ple for _, ple, _ in chain[:n]))


def _chain(cursor: Cursor) -> tuple[Cells, int, list[Any], Mismatch | None]:
    """Read cells and all records after them, each with its PLE row and its end."""
    cells = _cells(cursor, cell_bytes=0, least_sequences=0)
    cursor.number("I", "s_trans", 0, 0)
    n_layer = cursor.number("I", "layer count", 1, MAX_LAYERS)
    chain: list[tuple[Rows, Rows | None, int]] = []
    while cursor.left and len(chain) < 2 * n_layer:
        at = cursor.at
        try:
            if cursor.peek("i") == STATE_TYPE or not chain or chain[-1][1] is not None:
                rows = _rows(cursor, "R or S", len(cells), least_bytes=0)
                if rows.type_id != STATE_TYPE:
                    cursor.fail(at, f"recurrent rows of type {rows.type_id}, not of f32")
                chain.append((rows, None, cursor.at))
            else:
                ple = _ple(cursor, len(cells))
                chain[-1] = (chain[-1][0], ple, cursor.at)
        except Mismatch as failure:
            cursor.at = at
            return cells, n_layer, chain, failure.with_traceback(None)
    return cells, n_layer, chain, None


def _ple(cursor: Cursor, cells: int) -> Rows:
    """Read the PLE state of a layer, which is of type f32 and does not say so."""
    where = cursor.at
    row_bytes = cursor.number("Q", "row size of P", 4, cursor.end if cells else MAX_ROW_BYTES)
    if row_bytes % 4:
        cursor.fail(where, f"row size of P is {row_bytes}, not a multiple of 4 bytes of f32")
    data = cursor.skip(row_bytes * cells, "P rows")
    return Rows("P", 0, cells, row_bytes, where, data, form="bare")


def _after(failure: Mismatch, before: tuple[Memory, ...]) -> Mismatch:
    """Say that something did fit before a failure."""
    failure = failure.with_traceback(None)  # whose frames hold everything that was read
    caches = [m for m in before if isinstance(m, KvMemory)]
    complete = sum(any(len(stream.cells) for stream in memory.streams) for memory in caches)
    if not complete:
        return failure
    reason = f"{complete} complete KV memory before this; then {failure.reason}"
    return Mismatch(failure.at, reason, failure.progress + 2 * complete)


def _extent(reading: Reading) -> tuple[Any, ...]:
    """Return what tells two readings apart: where they find rows and cells, and of what kind."""
    parts: list[tuple[Any, ...]] = [(reading.layout.program, reading.lead is None)]
    for memory in reading.memories:
        if isinstance(memory, RecurrentMemory):
            parts.append(("REC", len(memory.cells), *memory.r, *memory.p, *memory.s))
            continue
        if isinstance(memory, IkMemory):
            parts.append((len(memory.cells), *memory.keys, *memory.values))
            continue
        if isinstance(memory, CompressedMemory):
            parts.append((memory.name, *itertools.chain(*memory.records)))
            continue
        parts.append((memory.deferred, memory.counted))
        for stream in memory.streams:
            record = stream.cells.cell_bytes if len(stream.cells) else 0
            own = (len(stream.cells), record, stream.rotation, *stream.keys, *stream.values)
            parts.append(own)
    return tuple(parts)


def _kv(cursor: Cursor, form: Form) -> KvMemory:
    n_stream = cursor.number("I", "stream count", 1, MAX_SEQUENCES) if form.counted else 1
    deferred = cursor.number("B", "deferred state", 0, 3) if form.deferred else None
    streams = tuple(_stream(cursor, form) for _ in range(n_stream))
    return KvMemory(streams, deferred, form.counted)


def _stream(cursor: Cursor, form: Form) -> Stream:
    cells = _cells(cursor, form.cell_bytes, least_sequences=1)
    if not len(cells):
        return Stream(cells)
    cursor.progress += 1
    v_trans = cursor.number("I", "v_trans", 0, 1)
    n_layer = cursor.number("I", "layer count", 0, MAX_LAYERS)
    rotation = None
    if form.rotation_words:
        rotation = (_rotation_size(cursor, "K"), _rotation_size(cursor, "V"))
    keys = tuple(_rows(cursor, "K", len(cells)) for _ in range(n_layer))
    read_values = transposed_rows if v_trans else _rows
    n_values = n_layer if form.values else 0
    values = tuple(read_values(cursor, "V", len(cells)) for _ in range(n_values))
    return Stream(cells, v_trans, keys, values, _fingerprint(cursor), rotation)


def _rotation_size(cursor: Cursor, kind: str) -> int:
    where = cursor.at
    size = cursor.number("I", f"size of the rotation of {kind}", 0, 1 << 20)
    if size and (size < 64 or size & (size - 1)):
        cursor.fail(where, f"size of the rotation of {kind} is {size}, no power of two from 64 up")
    return size


def _fingerprint(cursor: Cursor) -> int | None:
    """Read a footer if there is one; as many cells as its magic says do not fit in any file."""
    if cursor.left < 8:
        return None
    magic, fingerprint = struct.unpack_from("<II", cursor.buffer, cursor.at)
    if magic != FOOTER_MAGIC:
        return None
    cursor.at += 8
    return fingerprint


def _cells(cursor: Cursor, cell_bytes: int, least_sequences: int) -> Cells:
    """Read the cells of a stream; `least_sequences` is 0 where they may belong to none."""
    read = partial(_read_cells, cell_bytes=cell_bytes, least_sequences=least_sequences)
    return cursor.once(("cells", cell_bytes, least_sequences), read)


def _read_cells(cursor: Cursor, cell_bytes: int, least_sequences: int) -> Cells:
    where, fixed = cursor.at, fixed_words(cell_bytes)
    count = cursor.number("I", "cell count", 0, (1 << 32) - 1)
    if count > cursor.left // (4 * (fixed + least_sequences)):
        cursor.fail(where, f"{count} cells do not fit the {cursor.left} bytes left")
    start = cursor.at
    words = np.frombuffer(cursor.buffer, "<i4", (cursor.end - start) // 4, start)
    if not count:
        return Cells(words[:0], 0, 0, cell_bytes)
    counts: int | np.ndarray | None = _uniform_count(words, count, fixed, least_sequences)
    if counts is None:
        counts = _walk(cursor, words, count, fixed, least_sequences)
    total = counts * count if isinstance(counts, int) else int(counts.sum(dtype=np.int64))
    size = total + fixed * count
    _check_cells(cursor, words[:size], counts, count, fixed)
    cursor.skip(4 * size, "cells")
    return Cells(words[:size], counts, count, cell_bytes)


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
        begins = starts(np.broadcast_to(np.asarray(some), (n,)), fixed)
        size = int(begins[-1]) + fixed + (some if isinstance(some, int) else int(some[-1]))
        piece = words[at : at + size]
        ids = sequence_mask(begins, size, fixed)
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


def _rows(cursor: Cursor, kind: str, cells: int, least_bytes: int = 1) -> Rows:
    where = cursor.at
    type_id, known = _type_id(cursor, kind)
    size_at = cursor.at
    most = cursor.end if cells else MAX_ROW_BYTES
    row_bytes = cursor.number("Q", f"row size of {kind}", least_bytes, most)
    if known is not None and max(0, row_bytes - known.layout.header_bytes) % known.block_bytes:
        need = f"a multiple of {known.block_bytes} bytes of {known.name}"
        cursor.fail(size_at, f"row size of {kind} is {row_bytes}, not {need}")
    data = cursor.skip(row_bytes * cells, f"{kind} rows")
    return Rows(kind, type_id, cells, row_bytes, where, data)


def transposed_rows(cursor: Cursor, kind: str, cells: int) -> Rows:
    """Read the rows of V as they are stored without flash attention: in columns."""
    where = cursor.at
    type_id, known = _type_id(cursor, kind)
    size_at = cursor.at
    element = cursor.number("I", f"element size of {kind}", 1, cursor.end)
    if known is None or known.is_quantized or element != known.block_bytes:
        cursor.fail(size_at, f"transposed {kind} of type {type_id} and {element} bytes each")
    n_embd = cursor.number("I", f"width of {kind}", 1, cursor.end)
    data = cursor.skip(n_embd * element * cells, f"{kind} columns")
    return Rows(kind, type_id, cells, n_embd * element, where, data, n_embd, "columns")
