"""ik_llama.cpp's memory: what it writes under the magics, and some versions, of llama.cpp.

    session     u32 length, random state (text); u32 n, i32 output ids[n]; u64 n, f32 logits[n];
                u64 n, f32 embeddings[n]; cache
    cache       [a compacted window: u32 0x53574143, u32 size, u32 live, i32 position, u32 head]
                u32 cells; cells; u32 v_state (0: rows, 1: transposed, 2: no V), u32 n_layer (all
                layers of the model), K rows, V rows; u32 1 and recurrent rows, or u32 0; u32 1 and
                indexer rows of the layers that are there, or u32 0
    cell        i32 position, u32 n (0 in sequence files), i32 sequences[n]
    rows        i32 type, u64 row bytes, cells rows; of a layer that is not there i32 -1, u64 0
    recurrent   i32 type, u64 row bytes, u32 rows, rows; of a layer that is not there, -1, 0, 0

There is no number of streams, and sequence files start with the cache. What it adds for DeepSeek4
and openPangu is not known, and files with it are refused.

Source: ikawrakow/ik_llama.cpp @ 8337e4cd3, src/llama.cpp, as read; no file was at hand.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from gguf_io.state_cursor import Cursor, Mismatch
from gguf_io.state_records import Cells, IkMemory, IkOutputs, Layout, Reading, Rows, Span

WINDOW_MAGIC = 0x53574143
MAX_LAYERS = 1024
MAX_RANDOM_STATE = 1 << 16
ABSENT = -1
ROWS, COLUMNS, NO_VALUES = range(3)


def readings(
    cursor: Cursor,
    read_cells: Callable[..., Cells],
    read_rows: Callable[..., Rows],
    read_columns: Callable[..., Rows],
) -> Iterator[Reading | Mismatch]:
    """Yield the readings as a session's and as a sequence's memory; what reads parts is given."""
    for outputs in (_outputs, lambda cursor: None):
        try:
            own = cursor.moved(cursor.at)
            lead = outputs(own)
            memory = _cache(own, read_cells, read_rows, read_columns)
            if own.left:
                own.shared.ends.add(own.at)
                own.fail(own.at, f"{own.left} bytes after the cache of ik_llama.cpp")
        except Mismatch as failure:
            yield failure.with_traceback(None)
            continue
        values = memory.v_state != NO_VALUES
        layers = sum(rows.type_id != ABSENT for rows in memory.linear or ())
        layout = Layout("kv", values=values, recurrent_layers=layers, program="ik_llama")
        yield Reading(layout, (memory,), lead, classes=("kv",))


def _outputs(cursor: Cursor) -> IkOutputs:
    start = cursor.at
    length = cursor.number("I", "length of the random state", 1, MAX_RANDOM_STATE)
    at = cursor.skip(length, "random state")
    text = bytes(cursor.buffer[at : cursor.at])
    if not text.isascii() or not set(text) <= set(b"0123456789 "):
        cursor.fail(at, "the random state is not a list of numbers")
    outputs = cursor.number("I", "output count", 0, (1 << 32) - 1)
    cursor.skip(4 * outputs, "output ids")
    logits = cursor.number("Q", "number of logits", 0, cursor.end)
    cursor.skip(4 * logits, "logits")
    embeddings = cursor.number("Q", "number of embeddings", 0, cursor.end)
    cursor.skip(4 * embeddings, "embeddings")
    cursor.progress += 1
    span = Span("random state and outputs", start, cursor.at - start)
    return IkOutputs(text.decode(), outputs, logits, embeddings, span)


def _cache(cursor: Cursor, read_cells: Any, read_rows: Any, read_columns: Any) -> IkMemory:
    window = None
    if cursor.peek("I") == WINDOW_MAGIC:
        at = cursor.skip(20, "compacted window")
        window = struct.unpack_from("<IIIiI", cursor.buffer, at)
    cells = read_cells(cursor, least_sequences=0)
    v_state = cursor.number("I", "v_state", ROWS, NO_VALUES)
    n_layer = cursor.number("I", "layer count", 1, MAX_LAYERS)
    keys = tuple(_record(cursor, "K", len(cells), read_rows) for _ in range(n_layer))
    values: tuple[Rows, ...] = ()
    if v_state != NO_VALUES:
        read = read_rows if v_state == ROWS else read_columns
        values = tuple(_record(cursor, "V", len(cells), read) for _ in range(n_layer))
    present = sum(rows.type_id != ABSENT for rows in keys)
    linear = indexer = None
    if cursor.number("I", "flag of recurrent states", 0, 1):
        linear = tuple(_state(cursor) for _ in range(n_layer))
    if cursor.number("I", "flag of indexer keys", 0, 1):
        indexer = tuple(read_rows(cursor, "K", len(cells)) for _ in range(present))
    return IkMemory(cells, window, v_state, keys, values, linear, indexer)


def _record(cursor: Cursor, kind: str, cells: int, read: Any) -> Rows:
    where = cursor.at
    if cursor.peek("i") != ABSENT:
        return read(cursor, kind, cells)
    cursor.skip(4, f"type of {kind} rows")
    cursor.number("Q", f"row size of {kind} rows that are not there", 0, 0)
    return Rows(kind, ABSENT, cells, 0, where, cursor.at)


def _state(cursor: Cursor) -> Rows:
    """Read the recurrent state of a layer."""
    where = cursor.at
    absent = cursor.peek("i") == ABSENT
    type_id = cursor.number("i", "type of recurrent rows", ABSENT, 1023)
    if not absent and not cursor.shared.type(type_id)[1]:
        cursor.fail(where, f"type {type_id} is none that recurrent rows can have")
    row_bytes = cursor.number("Q", "row size of recurrent rows", 0, 0 if absent else cursor.end)
    rows = cursor.number("I", "recurrent rows", 0, 0 if absent else (1 << 32) - 1)
    data = cursor.skip(row_bytes * rows, "recurrent rows")
    return Rows("S", type_id, rows, row_bytes, where, data, form="counted")
