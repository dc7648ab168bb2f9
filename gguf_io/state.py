"""llama.cpp state files, opened: prompt caches, slot saves, sequence blobs, with views of K and V.

`state_parser` finds the readings that fit the bytes; here one of them is chosen, the dialect and
the heads are settled, and each layer gets a view. Two things are not in the file and have to be
assumed or told, so both are reported with their reason: the heads (head_dim), and whether the
attention graph rotated K and V before it stored them (`rotation`).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gguf_io.cache_tensor import CacheTensor
from gguf_io.graph_rotation import Graph, RotationChoice, choose_rotation
from gguf_io.identify import DialectChoice, StoredRows, identify, known_dialect
from gguf_io.mapped import MappedFile, map_file
from gguf_io.memory_classes import NAMES, Part, parts_of
from gguf_io.model_shape import ModelShape, model_shape
from gguf_io.parser import MAGIC as GGUF_MAGIC
from gguf_io.reader import GgufFile
from gguf_io.state_buun import is_resume_file
from gguf_io.state_choice import Choice, choose_reading, has_zero_values
from gguf_io.state_container import MAGICS, containers
from gguf_io.state_parser import readings
from gguf_io.state_records import (
    DEFERRED_STATES,
    Cells,
    CompressedMemory,
    IkMemory,
    KvMemory,
    Reading,
    RecurrentMemory,
    Rows,
)
from gguf_io.state_views import ABSENT, Heads, cache_tensors, rotated
from gguf_io.tensors import Tensors
from gguf_io.types import dequantize_rows
from tbq import ClosedFileError, FileFormatError, InputError, TbqError
from tbq.registry import dialects, get_dialect, meaning, split_dialect

IK_LLAMA = "ik_llama"


class StateFile:
    """An open state file. Use as a context manager, or let it be collected.

    Attributes:
        path: the path that was opened.
        container: what stands around the memory: kind, version, tokens, architecture.
        layout: the memory class and what else had to be found out.
        layout_reason: why it is this one.
        class_candidates: the other memory classes that may have written the same bytes.
        reading: the parsed records and what stands before them.
        memories: the parsed records, one per part of the memory class.
        memory_names: "kv", "base", "swa", "recurrent" and so on for each.
        tensors: mapping from name to CacheTensor, in file order.
        dialect, release, dialect_reason, dialect_guessed: how type ids were read, and why.
        rotation: which rotations K and V are taken to be stored under, and why.
        head_dim_reason: where head_dim comes from.
        model: the ModelShape that was given, or None.
    """

    def __init__(
        self,
        path: Path,
        mapped: MappedFile,
        chosen: Choice,
        choice: DialectChoice,
        heads: Heads,
        rotation: str,
    ) -> None:
        self._map = mapped
        self.closed = False
        self.path = path
        self.container = chosen.container
        self.reading = chosen.reading
        self.layout = chosen.reading.layout
        self.layout_reason = chosen.reason + (f"; {chosen.apart}" if chosen.apart else "")
        self.class_candidates = chosen.candidates
        self.memories = chosen.reading.memories
        self.parts = memory_parts(chosen.reading)
        self.memory_names = tuple(part.name for part in self.parts)
        self.dialect = choice.dialect
        self.release = choice.release
        self.dialect_reason = choice.reason
        self.dialect_guessed = choice.guessed
        self.model = heads.model
        bare = cache_tensors(mapped, self.memories, self.parts, choice, heads)
        self.head_dim_reason = heads.reason
        self.rotation: RotationChoice = choose_rotation(rotation, bare, self.graph())
        self.tensors = Tensors((t.name, t) for t in rotated(bare, self.rotation))
        self._check_names(bare)

    def _check_names(self, bare: list[CacheTensor]) -> None:
        if len(self.tensors) != len(bare):
            raise FileFormatError(self.path, None, "two layers have the same number")

    def graph(self, dialect: str | None = None) -> Graph:
        """Return what is known of the graph that stored the rows, or of another dialect's."""
        own = dialect or self.dialect
        own = own or (deferring_dialects()[0] if self.staging else None)
        stated = {
            i: stream.rotation
            for i, memory in enumerate(self.memories)
            for stream in getattr(memory, "streams", ())
            if stream.rotation is not None
        }
        return Graph(
            self.layout.memory,
            self.parts,
            not self.layout.values,
            self.model.architecture if self.model else self.container.architecture,
            self.model,
            IK_LLAMA if own is None and self.layout.program == IK_LLAMA else own,
            self.staging and dialect is None,
            stated,
            self.class_candidates,
        )

    @property
    def size(self) -> int:
        """Bytes in the file."""
        self._map.require_open()
        return len(self._map)

    @property
    def header(self) -> bytes:
        """The bytes before the memory."""
        self._map.require_open()
        return bytes(self._map[: self.container.memory_at])

    @property
    def deferred_state(self) -> str | None:
        """llama-tq's state of the staged rows, from DEFERRED_STATES; None for other forks.

        Where two caches differ, the one that is furthest from done.
        """
        states = [m.deferred for m in self.memories if isinstance(m, KvMemory)]
        known = [state for state in states if state is not None]
        return DEFERRED_STATES[min(known, key=_distance_to_done)] if known else None

    @property
    def has_server_tokens(self) -> bool:
        """Whether the tokens are llama-server's packed list, which can hold media."""
        return self.container.is_packed

    @property
    def staging(self) -> bool:
        """Whether rows of type f16 are waiting to be quantised, and so may be rotated already."""
        return self.deferred_state == "staging"

    def cells(self, memory: int) -> list[Cells]:
        """Return the cells of a memory, one entry per stream; none if its rows are not cells'."""
        found = self.memories[memory]
        if isinstance(found, CompressedMemory):
            return []
        if isinstance(found, RecurrentMemory | IkMemory):
            return [found.cells]
        return [stream.cells for stream in found.streams]

    def bytes_at(self, start: int, n_bytes: int) -> Any:
        """Return bytes of the file as a new uint8 array."""
        return self._map.read_at(start, n_bytes)

    def check_unchanged(self) -> None:
        """Raise FileFormatError if the file is not what it was when it was opened."""
        self._map.check_unchanged()

    def close(self) -> None:
        """Unmap the file, unless arrays that view it are still alive."""
        if self.closed:
            return
        self.closed = True
        del self.tensors, self.memories, self.reading
        try:
            self._map.close()
        except BufferError:
            pass  # a view is alive; the map goes with it

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Explain why a closed file lacks what an open one has."""
            if name in ("tensors", "memories", "reading"):
                raise ClosedFileError(self.path)
            raise AttributeError(name)

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        what = "closed" if self.closed else f"{len(self.tensors)} tensors"
        return f"<StateFile {self.path}: {self.layout}, {what}>"


def open_state(
    path: str | os.PathLike[str],
    dialect: str | None = None,
    model: str | os.PathLike[str] | GgufFile | ModelShape | None = None,
    *,
    rotation: str = "auto",
    head_dim: int | tuple[int, int] | None = None,
    memory: str | None = None,
    mrope: bool | None = None,
    values: bool | None = None,
    recurrent_layers: int | None = None,
    any_version: bool = True,
    trailing: bool = False,
) -> StateFile:
    """Open a llama.cpp state file: a prompt cache, a slot save, or a blob of the same content.

    The bytes do not say which memory class they hold. All classes are tried, and the file opens if
    exactly one layout explains it to the last byte; the other arguments choose where several do.
    Versions are hints: a newer one than was looked at opens if its bytes are explained.

    Args:
        path: the file.
        dialect: whose type ids are meant, `dialect` or `dialect@release`; if omitted, the
            registered dialect that fits, see `gguf_io.identify`.
        model: the GGUF of the model that wrote the dump, metadata suffices: gives layer numbers
            and heads, and is checked against the dump.
        rotation: whether the graph rotated K and V before it stored them. "auto": where the fork
            does by default, which is where the cache type is quantised; "on", "off"; "k" or "v":
            only the keys, only the values. The file does not record it. What the graph never or
            always does to a cache stays, see `gguf_io.graph_rotation`.
        head_dim: values per head, or a pair for K and V, if no model is given. If omitted, 128 is
            assumed, else 64, else the whole row: the first that divides it.
        memory: the memory class, see `gguf_io.memory_classes`.
        mrope: whether cells carry M-RoPE coordinates.
        values: whether there are V rows.
        recurrent_layers: how many layers have recurrent state.
        any_version: whether to read versions that were not looked at.
        trailing: whether to keep bytes after the memory of a sequence file that nothing explains.

    Raises:
        FileFormatError: not a state file, truncated or hostile; or it does not fit the arguments
            or the model.
        AmbiguousTypeError: several layouts explain the file; lists them and what decides.
        UnknownFormatError: `dialect` is not registered.
        InputError: another argument is not what it can be, or head_dim does not divide a row.
        OSError: the file cannot be opened.
    """
    if memory is not None and memory not in NAMES:
        raise InputError("memory", repr(memory), f"one of {', '.join(NAMES)}")
    dialect = None if dialect is None else known_dialect(dialect)
    shape = model if isinstance(model, ModelShape | None) else model_shape(model)
    path, mapped = Path(path), map_file(path)
    wanted: dict[str, object] = {
        "memory": memory,
        "mrope": mrope,
        "values": values,
        "recurrent_layers": recurrent_layers,
        "deferred": None if dialect is None else writes_deferred(dialect),
    }

    def is_zero(rows: Rows) -> bool | None:
        return has_zero_values(rows, mapped, _dequantised)

    chosen = choose_reading(path, mapped, wanted, shape, trailing, is_zero)
    if not any_version and not chosen.container.checked:
        reason = f"state version {chosen.container.version} was not looked at"
        raise FileFormatError(path, 4, reason)
    choice = _choose_dialect(path, mapped, chosen.reading, dialect)
    heads = Heads(head_dim, shape, chosen.reading.layout, path)
    return StateFile(path, mapped, chosen, choice, heads, rotation)


def is_state_file(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is to be read as a state file: it has a magic, or reads as a blob.

    Raises:
        FileFormatError: not a regular file, or empty.
        OSError: it cannot be opened.
    """
    mapped = map_file(path)
    start = bytes(mapped[:8])
    if start[:4] == GGUF_MAGIC:
        return False
    if is_resume_file(start):
        return True
    first = start[:4]
    if len(first) == 4 and any(
        m in MAGICS for m in struct.unpack("<I", first) + struct.unpack(">I", first)
    ):
        return True
    found = containers(Path(path), mapped) if len(first) == 4 else []
    return any(c.architecture or readings(mapped, c.memory_at)[0] for c in found)


def memory_parts(reading: Reading) -> tuple[Part, ...]:
    """Return what the memories of a reading are."""
    if reading.layout.program == IK_LLAMA:
        return (Part("kv"),)
    parts = parts_of(reading.layout.memory, reading.layout.partial)
    if reading.layout.memory != "dsv4":
        return parts
    compressed = [m.name for m in reading.memories if isinstance(m, CompressedMemory)]
    return parts[:2] + tuple(Part(name, name == "lid") for name in compressed)


def _distance_to_done(state: int) -> int:
    """Order the deferred states: staging, ready, done, off."""
    return state or len(DEFERRED_STATES)


def writes_deferred(dialect: str) -> bool:
    """Tell whether the KV memories of a `dialect[@release]` start with the deferred-state byte."""
    return split_dialect(dialect)[0].state.deferred


def deferring_dialects() -> list[str]:
    """Return the dialects whose KV memories start with the deferred-state byte."""
    return [name for name in dialects() if writes_deferred(name)]


def _dequantised(rows: Rows, raw: Any) -> np.ndarray | None:
    """Dequantise rows of a type that means the same everywhere; None for any other."""
    fmt = meaning(rows.type_id, None)
    if fmt is None or not fmt.is_ggml or rows.n_embd:
        return None
    try:
        return dequantize_rows(raw, fmt)
    except TbqError:  # of which gguf-py has no decoder, or rows that are no whole blocks
        return None


# --- which dialect -------------------------------------------------------------------------------


def _records(reading: Reading) -> list[Rows]:
    """Return all records of K and V."""
    return [
        piece
        for memory in reading.memories
        for piece in memory.pieces()
        if isinstance(piece, Rows) and piece.kind in "KV" and piece.type_id != ABSENT
    ]


def _choose_dialect(
    path: Path, mapped: MappedFile, reading: Reading, given: str | None
) -> DialectChoice:
    stored = [
        StoredRows(
            f"{rows.kind} rows at byte {rows.where}",
            rows.type_id,
            mapped,
            rows.data,
            rows.cells,
            row_bytes=rows.row_bytes,
        )
        for rows in _records(reading)
    ]
    owner, reason = _owner(reading)
    if given is not None or owner is None:
        streams = [s for m in reading.memories if isinstance(m, KvMemory) for s in m.streams]
        footed = any(stream.fingerprint is not None for stream in streams)
        plain = [
            name
            for name in dialects()
            if not writes_deferred(name) and (not footed or get_dialect(name).state.footed)
        ]
        return identify(stored, path, given, among=plain)
    try:
        found = identify(stored, path, owner)
    except FileFormatError as misfit:
        return DialectChoice(None, f"{reason}, but {misfit.reason}")
    own = owner in {found.type_of(rows.type_id).dialect for rows in stored}
    if not own and not reading.layout.deferred:
        return DialectChoice(None, f"{reason}; every type id means the same in all dialects")
    return DialectChoice(owner, reason, guessed=own, release=found.release)


def _owner(reading: Reading) -> tuple[str | None, str]:
    """Return the dialect that alone writes such a memory, and why."""
    if reading.layout.deferred:
        owner = deferring_dialects()[0]
        return owner, f"KV memories start with the deferred-state byte, which only {owner} has"
    if reading.layout.program == IK_LLAMA:
        return IK_LLAMA, "the memory is laid out as only ik_llama.cpp does"
    return None, ""
