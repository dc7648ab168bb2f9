"""tbq-inspect --keys and --tensors: what stands in a file's header, and the list of its tensors.

Values are read, nothing is decoded and no layout of blocks is needed, so that files of any dialect
and with any type ids are listed. A state file has no keys: the fields of its containers, sections
and cells are listed under names of ours, with the types that they are stored in.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gguf_io import GgufFile, StateFile, StringArray, Unknown
from gguf_io.cache_tensor import CacheTensor
from gguf_io.reader import GgufTensor
from gguf_io.state_container import BLOB_MAGIC, SEQUENCE_MAGIC, SESSION_MAGIC, Container
from gguf_io.state_records import (
    DEFERRED_STATES,
    CompressedMemory,
    IkMemory,
    IkOutputs,
    KvMemory,
    Mode,
    RecurrentMemory,
)
from tbq.registry import meanings

from . import console
from .columns import table, wrapped

SCHEMA = "tbq-inspect-keys/1"
# Flags that ask for what is not looked at here.
OTHERS = ("html", "reference", "candidates", "layers", "queries")
MAGICS = {"session": SESSION_MAGIC, "sequence": SEQUENCE_MAGIC}
ITEMS = 6  # of an array that are shown
LETTERS = 160  # of a text that are shown; of one in an array a fifth
DIALECTS = 4  # that are named for an id that nothing explains


class Key(NamedTuple):
    """One key: its name, the type that it is stored as, and its value; `count` is an array's."""

    key: str
    type: str
    value: Any
    count: int | None = None


def refuse_others(args: argparse.Namespace) -> None:
    """Raise InputError if something was asked for that a listing does not have."""
    console.refuse_flags(args, OTHERS, "it with --keys or --tensors", "one or the other")


def print_listing(file: GgufFile | StateFile, args: argparse.Namespace) -> None:
    """Print the keys of a file, its tensors, or both, as `args` say; as JSON if they say so."""
    keys = list(file_keys(file)) if args.keys else None
    tensors = list(map(_tensor, file.tensors.values())) if args.tensors else None
    notes = list(_unexplained(file)) if args.tensors else []
    if args.json:
        console.print_json(
            {
                "schema": SCHEMA,
                "path": str(file.path),
                "dialect": file.dialect,
                "dialect_reason": file.dialect_reason,
                "keys": None if keys is None else [key._asdict() for key in keys],
                "tensors": tensors,
                "notes": notes,
            }
        )
        return
    console.say(file.path)
    if keys is not None:
        _print_keys(keys)
    if tensors is not None:
        print(f"\n{len(tensors)} tensors")
        print(wrapped("  ", f"dialect {file.dialect or 'none'}: {file.dialect_reason}"))
        _print_tensors(tensors)
        for note in notes:
            print(wrapped("  ", note))


def file_keys(file: GgufFile | StateFile) -> Iterator[Key]:
    """Yield what stands in a file's header, arrays shortened."""
    found = _state_keys(file) if isinstance(file, StateFile) else _gguf_keys(file)
    for name, kind, value in found:
        if isinstance(value, (np.ndarray, StringArray, list, tuple)):
            items = [v.item() if isinstance(v, np.generic) else v for v in value[:ITEMS]]
            yield Key(name, f"{kind}[{len(value)}]", items, len(value))
        else:
            yield Key(name, kind, value.item() if isinstance(value, np.generic) else value)


# --- GGUF ----------------------------------------------------------------------------------------


def _gguf_keys(file: GgufFile) -> Iterator[tuple[str, str, Any]]:
    """Yield the header's numbers, which `gguf-dump` gives these names, and the metadata."""
    yield "GGUF.version", "uint32", file.version
    yield "GGUF.tensor_count", "uint64", len(file.tensors)
    yield "GGUF.kv_count", "uint64", len(file.metadata)
    for name, field in file.metadata.fields.items():
        yield name, (field.item_type or field.type).name.lower(), field.value


# --- state files ---------------------------------------------------------------------------------


def _state_keys(file: StateFile) -> Iterator[tuple[str, str, Any]]:
    yield from _container_keys(file.container)
    yield "memory.at_byte", "", file.container.memory_at
    yield "memory.layout", "", str(file.layout)
    lead = file.reading.lead
    if isinstance(lead, Mode):
        yield "dsv4.version", "uint32", lead.words[1]
        yield "dsv4.partial", "uint32", lead.words[2]
    if isinstance(lead, IkOutputs):
        yield "ik_llama.rng", "string", lead.rng
        for name in ("outputs", "logits", "embeddings"):
            yield f"ik_llama.{name}", "", getattr(lead, name)
    for name, memory in zip(file.memory_names, file.memories, strict=True):
        for key, kind, value in _memory_keys(memory):
            yield f"{name}.{key}", kind, value


def _container_keys(container: Container) -> Iterator[tuple[str, str, Any]]:
    yield "container.kind", "", container.kind
    magic = MAGICS.get(container.kind)
    if container.sequence_id is not None:
        magic = BLOB_MAGIC
    if magic is not None:
        yield "container.magic", "uint32", f"{magic:#010x}"
    if container.version is not None:
        yield "container.version", "uint32", container.version
    if container.tokens is not None:
        packed = container.slot is not None or container.envelope is not None
        yield f"container.{'words' if packed else 'tokens'}", "int32", container.tokens
    if container.architecture is not None:
        yield "container.architecture", "string", container.architecture
    if container.sequence_id is not None:
        yield "container.sequence_id", "int32", container.sequence_id
    if container.envelope is not None:
        yield "envelope.version", "uint32", container.envelope.version
        yield "envelope.flags", "uint32", container.envelope.flags
        yield "envelope.logits", "uint32", container.envelope.logits
        for name, digest in container.envelope.digests.items():
            yield f"envelope.sha256.{name.replace(' ', '_')}", "uint8[32]", digest
    if container.slot is not None:
        yield "slot.version", "uint32", container.slot.version
        yield "slot.tokens", "int32", container.slot.tokens
        yield "slot.media.starts", "uint32", [m.start for m in container.slot.media]
        yield "slot.media.sizes", "uint32", [len(m.data) for m in container.slot.media]
    if container.appendix is not None:
        yield "appendix.name", "", container.appendix.name
        yield "appendix.at_byte", "", container.appendix.start
        yield "appendix.bytes", "", container.appendix.n_bytes


def _memory_keys(memory: Any) -> Iterator[tuple[str, str, Any]]:
    if isinstance(memory, KvMemory):
        if memory.counted:
            yield "streams", "uint32", len(memory.streams)
        if memory.deferred is not None:
            yield "deferred_state", "uint8", DEFERRED_STATES[memory.deferred]
        for i, stream in enumerate(memory.streams):
            place = f"stream.{i}"
            yield from _cell_keys(place, stream.cells)
            if len(stream.cells):
                yield f"{place}.v_trans", "uint32", stream.v_trans
                yield f"{place}.layers", "uint32", len(stream.keys)
            if stream.rotation is not None:
                yield f"{place}.rotation", "uint32", stream.rotation
            if stream.fingerprint is not None:
                yield f"{place}.fingerprint", "uint32", stream.fingerprint
    elif isinstance(memory, RecurrentMemory):
        yield from _cell_keys("cells", memory.cells)
        yield "layers", "uint32", memory.n_layer
    elif isinstance(memory, CompressedMemory):
        yield "head", "uint32", memory.head
        yield "layers", "uint32", memory.layers
    elif isinstance(memory, IkMemory):
        if memory.window is not None:
            yield "window", "uint32", memory.window
        yield from _cell_keys("cells", memory.cells)
        yield "v_state", "uint32", memory.v_state
        yield "layers", "uint32", len(memory.keys)


def _cell_keys(place: str, cells: Any) -> Iterator[tuple[str, str, Any]]:
    yield f"{place}.cell_count", "uint32", len(cells)
    yield f"{place}.positions", "int32", cells.positions
    yield f"{place}.sequence_counts", "uint32", cells.sequence_counts
    yield f"{place}.sequences", "int32", cells.sequences
    if cells.coordinates is not None:
        yield f"{place}.x", "int32", cells.coordinates[:, 0]
        yield f"{place}.y", "int32", cells.coordinates[:, 1]
    if cells.tokens is not None:
        yield f"{place}.tokens", "int32", cells.tokens


# --- tensors -------------------------------------------------------------------------------------


def _tensor(t: GgufTensor | CacheTensor) -> dict[str, Any]:
    """Return a tensor as it is listed; `offsets` are those of each stream of a dump."""
    in_model = isinstance(t, GgufTensor)
    return {
        "name": t.name,
        "type": t.format.label,
        "type_id": t.type_id,
        "ggml_shape": list(t.ggml_shape),
        "n_bytes": t.n_bytes,
        "offsets": [t.data_offset] if in_model else [part.data for part in t.parts],
        "shard": t.shard if in_model else 0,
    }


def _unexplained(file: GgufFile | StateFile) -> Iterator[str]:
    """Yield what an id that nothing explains here is elsewhere."""
    kinds = {t.format.type_id for t in file.tensors.values() if isinstance(t.format, Unknown)}
    for number in sorted(kinds):
        found = dict.fromkeys(f"{fmt.name} of {name}" for name, _, fmt in meanings(number))
        names = ", ".join(list(found)[:DIALECTS])
        more = f" and {len(found) - DIALECTS} more" if len(found) > DIALECTS else ""
        said = (
            f"{names}{more}; --dialect says whose" if found else "no dialect that is known has it"
        )
        yield f"type id {number}: {said}"


# --- text ----------------------------------------------------------------------------------------


def _print_keys(keys: Sequence[Key]) -> None:
    print(f"\n{len(keys)} keys")
    width = max(len(key.type) for key in keys)
    for key in keys:
        print(wrapped(f"  {key.type:<{width}}  ", f"{key.key} = {_value(key)}"))


def _value(key: Key) -> str:
    if key.count is None:
        return _text(key.value, LETTERS)
    items = ", ".join(_text(item, LETTERS // 5) for item in key.value)
    return f"[{items}{', ...' if key.count > len(key.value) else ''}]"


def _text(value: Any, letters: int) -> str:
    if not isinstance(value, str):
        return f"{value:.9g}" if isinstance(value, float) else str(value)
    more = f"... ({len(value)} characters)" if len(value) > letters else ""
    return repr(value[:letters]) + more


def _print_tensors(tensors: Sequence[dict[str, Any]]) -> None:
    shards = any(t["shard"] for t in tensors)
    header = ("tensor", "type", "id", "shape", "bytes", "at byte", *["file"] * shards)
    rows = [
        (
            t["name"],
            t["type"].partition("[")[0],
            str(t["type_id"]),
            "x".join(map(str, t["ggml_shape"])) or "-",
            str(t["n_bytes"]),
            str(t["offsets"][0]) if t["offsets"] else "-",
            *[str(t["shard"] + 1)] * shards,
        )
        for t in tensors
    ]
    if rows:
        table(header, rows)
