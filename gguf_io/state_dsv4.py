"""deepseek4's memory: a window cache, and caches of keys that stand for several tokens each.

    memory      u32 0x34565344 (DSV4), u32 1, u32 mode (1: PARTIAL_ONLY); KV without layers, KV of
                the window, keys only; unless partial, the compressed keys csa, hca and lid; the
                states of csa, hca and lid that the next ones are made from
    keys        u32 2, u32 rows, u32 streams, u32 n_layer, per layer u32 its number, tensor
    states      u32 1, u32 ratio, u32 size, u32 width, u32 streams, u32 n_layer, per layer u32 its
                number, tensor kv, tensor score
    tensor      i32 type, u64 values per row, u64 rows, u64 row bytes, the rows of every stream

Source: ggml-org/llama.cpp @ 0c1e57098, src/llama-kv-cache-dsv4.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from gguf_io.memory_classes import DSV4_CACHES
from gguf_io.state_cursor import Cursor, Mismatch
from gguf_io.state_records import CompressedMemory, KvMemory, Layout, Mode, Reading, Rows

MAGIC = 0x34565344
VERSION = 1
KEYS, STATES = 2, 1
MAX_LAYERS = 1024
MAX_STREAMS = 256
MOST = (1 << 32) - 1


def readings(
    cursor: Cursor, caches: Callable[[Cursor, int, int], tuple[KvMemory, ...]]
) -> Iterator[Reading | Mismatch]:
    """Yield the readings of a memory that starts with DSV4; `caches` reads its KV memories."""
    if cursor.peek("I") != MAGIC:
        return
    for cell_bytes in (0, 8, 12):
        try:
            yield _read(cursor.moved(cursor.at), cell_bytes, caches)
        except Mismatch as failure:
            yield failure.with_traceback(None)


def _read(cursor: Cursor, cell_bytes: int, caches: Any) -> Reading:
    cursor.number("I", "magic", MAGIC, MAGIC)
    version = cursor.number("I", "version of DSV4", VERSION, VERSION)
    mode = cursor.number("I", "mode of DSV4", 0, 1)
    cursor.progress += 1
    memories = caches(cursor, cell_bytes, 2)
    compressed = [] if mode else [_keys(cursor, name) for name in DSV4_CACHES]
    states = [_states(cursor, f"{name}_state") for name in DSV4_CACHES]
    if cursor.left:
        cursor.shared.ends.add(cursor.at)
        cursor.fail(cursor.at, f"{cursor.left} bytes after the last state of deepseek4")
    layout = Layout("dsv4", cell_bytes=cell_bytes, values=False, partial=bool(mode))
    lead = Mode((MAGIC, version, mode))
    return Reading(layout, (*memories, *compressed, *states), lead, classes=("dsv4",))


def _keys(cursor: Cursor, name: str) -> CompressedMemory:
    head = [cursor.number("I", f"kind of {name}", KEYS, KEYS)]
    head.append(cursor.number("I", f"rows of {name}", 0, MOST))
    head.append(cursor.number("I", f"streams of {name}", 1, MAX_STREAMS))
    head.append(cursor.number("I", f"layers of {name}", 0, MAX_LAYERS))
    return _layers(cursor, name, head, ("K",))


def _states(cursor: Cursor, name: str) -> CompressedMemory:
    head = [cursor.number("I", f"kind of {name}", STATES, STATES)]
    for what in ("ratio", "size", "width"):
        head.append(cursor.number("I", f"{what} of {name}", 0, MOST))
    head.append(cursor.number("I", f"streams of {name}", 1, MAX_STREAMS))
    head.append(cursor.number("I", f"layers of {name}", 0, MAX_LAYERS))
    return _layers(cursor, name, head, ("R", "S"))


def _layers(cursor: Cursor, name: str, head: list[int], kinds: tuple[str, ...]) -> CompressedMemory:
    layers, records = [], []
    for _ in range(head[-1]):
        where = cursor.at
        layers.append(cursor.number("I", f"layer of {name}", 0, MAX_LAYERS - 1))
        if layers[-1] in layers[:-1]:
            cursor.fail(where, f"layer {layers[-1]} of {name} occurs twice")
        records.append(tuple(_tensor(cursor, kind, head[-2]) for kind in kinds))
    return CompressedMemory(name, tuple(head), tuple(layers), tuple(records))


def _tensor(cursor: Cursor, kind: str, streams: int) -> Rows:
    where = cursor.at
    type_id = cursor.number("i", f"type of {kind} tensor", 0, 1023)
    known, possible = cursor.shared.type(type_id)
    if not possible:
        cursor.fail(where, f"type {type_id} is none that {kind} rows can have")
    values = cursor.number("Q", f"values of {kind} tensor", 1, MOST)
    rows = cursor.number("Q", f"rows of {kind} tensor", 0, cursor.end)
    size_at = cursor.at
    row_bytes = cursor.number("Q", f"row size of {kind} tensor", 1, cursor.end if rows else MOST)
    if known is not None:
        whole = values % known.group_values == 0
        if not whole or known.row_bytes(values) != row_bytes:
            need = f"{values} values of {known.name}"
            cursor.fail(size_at, f"row size of {kind} tensor is {row_bytes}, not of {need}")
    data = cursor.skip(row_bytes * rows * streams, f"{kind} tensor")
    cells = rows * streams
    return Rows(kind, type_id, cells, row_bytes, where, data, None, "tensor", values, streams)
