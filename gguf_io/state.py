"""llama.cpp state files, opened: prompt caches, slot saves, sequence blobs, with views of K and V.

`state_parser` finds the readings that fit the bytes; here one of them is chosen, the dialect and
the heads are settled, and each layer gets a view. Two things are not in the file and have to be
assumed or told, so both are reported with their reason: the heads (head_dim), and whether the
attention graph rotated K and V before it stored them (`rotation`).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gguf_io.cache_tensor import CacheTensor
from gguf_io.graph_rotation import RotationChoice, choose_rotation
from gguf_io.identify import DialectChoice, StoredRows, identify, known_dialect
from gguf_io.mapped import MappedFile, map_file
from gguf_io.model_shape import ModelShape, model_shape
from gguf_io.parser import MAGIC as GGUF_MAGIC
from gguf_io.reader import GgufFile
from gguf_io.state_parser import (
    BLOB_MAGIC,
    DEFERRED_STATES,
    MEMORY_CLASSES,
    SEQUENCE_MAGIC,
    SESSION_MAGIC,
    Cells,
    Cursor,
    KvMemory,
    Layout,
    Mismatch,
    Reading,
    RecurrentMemory,
    Rows,
    readings,
)
from gguf_io.types import TensorType, Unknown
from tbq import AmbiguousTypeError, FileFormatError, Format, InputError
from tbq.registry import dialects, get_dialect, split_dialect

# A version does not tell the forks apart: each wrote other bytes under these numbers.
VERSIONS = {SESSION_MAGIC: (9,), SEQUENCE_MAGIC: (2,)}
# Assumed where neither the caller nor a model says: most models have it.
USUAL_HEAD_DIMS = (128, 64)
# The first token of a list that llama-server serialised with its media chunks.
SERVER_TOKENS = -1


@dataclass(frozen=True)
class Container:
    """What stands around the memory.

    Attributes:
        kind: "session" (GGSN), "sequence" (GGSQ), "sequence blob" or "state blob".
        version: the file's version, None for blobs.
        tokens: int32 view, None for blobs.
        architecture: such as "llama", where the file says it.
        sequence_id: of a blob that says it.
        memory_at: where the memory starts.
    """

    kind: str
    version: int | None = None
    tokens: np.ndarray | None = None
    architecture: str | None = None
    sequence_id: int | None = None
    memory_at: int = 0


class StateFile:
    """An open state file. Use as a context manager, or let it be collected.

    Attributes:
        path: the path that was opened.
        container: what stands around the memory: kind, version, tokens, architecture.
        layout: the memory class and what else had to be found out.
        layout_reason: why it is this one.
        memories: the parsed records, KvMemory or RecurrentMemory.
        memory_names: "kv", "base", "swa" or "recurrent" for each.
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
        container: Container,
        reading: Reading,
        layout_reason: str,
        choice: DialectChoice,
        heads: Heads,
        rotation: str,
    ) -> None:
        self._map = mapped
        self.path = path
        self.container = container
        self.layout = reading.layout
        self.layout_reason = layout_reason
        self.memories = reading.memories
        self.memory_names = memory_names(reading.layout.memory)
        self.dialect = choice.dialect
        self.release = choice.release
        self.dialect_reason = choice.reason
        self.dialect_guessed = choice.guessed
        self.model = heads.model
        bare = _cache_tensors(self, choice, heads)
        self.head_dim_reason = heads.reason
        graph = choice.dialect or (deferring_dialects()[0] if self.staging else None)
        self.rotation: RotationChoice = choose_rotation(rotation, bare, self.staging, graph)
        self.tensors = {t.name: t for t in _rotated(bare, self.rotation)}

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return len(self._map)

    @property
    def header(self) -> bytes:
        """The bytes before the memory."""
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
        """Whether the tokens are llama-server's serialised list, which can hold media chunks."""
        tokens = self.container.tokens
        return tokens is not None and len(tokens) > 0 and int(tokens[0]) == SERVER_TOKENS

    @property
    def staging(self) -> bool:
        """Whether rows of type f16 are waiting to be quantised, and so may be rotated already."""
        return self.deferred_state == "staging"

    def cells(self, memory: int) -> list[Cells]:
        """Return the cells of a memory, one entry per stream."""
        found = self.memories[memory]
        if isinstance(found, RecurrentMemory):
            return [found.cells]
        return [stream.cells for stream in found.streams]

    def check_unchanged(self) -> None:
        """Raise FileFormatError if the file is not what it was when it was opened."""
        self._map.check_unchanged()

    def close(self) -> None:
        """Unmap the file, unless arrays that view it are still alive."""
        self.tensors, self.memories = {}, ()
        try:
            self._map.close()
        except BufferError:
            pass  # a view is alive; the map goes with it

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<StateFile {self.path}: {self.layout}, {len(self.tensors)} tensors>"


def open_state(
    path: str | os.PathLike,
    dialect: str | None = None,
    model: str | os.PathLike | GgufFile | ModelShape | None = None,
    *,
    rotation: str = "auto",
    head_dim: int | tuple[int, int] | None = None,
    memory: str | None = None,
    mrope: bool | None = None,
    values: bool | None = None,
    recurrent_layers: int | None = None,
    any_version: bool = False,
) -> StateFile:
    """Open a llama.cpp state file: a prompt cache, a slot save, or a blob of the same content.

    The bytes do not say which memory class they hold. All classes are tried, and the file opens if
    exactly one explains it to the last byte; the other arguments choose where several do.

    Args:
        path: the file.
        dialect: whose type ids are meant, `dialect` or `dialect@release`; if omitted, the
            registered dialect that fits, see `gguf_io.identify`.
        model: the GGUF of the model that wrote the dump, metadata suffices: gives layer numbers
            and heads, and is checked against the dump.
        rotation: whether the graph rotated K and V before it stored them. "auto": where the fork
            does by default, which is where the cache type is quantised; "on", "off"; "k" or "v":
            only the keys, only the values. The file does not record it.
        head_dim: values per head, or a pair for K and V, if no model is given. If omitted, 128 is
            assumed, else 64, else the whole row: the first that divides it.
        memory: the memory class, one of "kv", "iswa", "recurrent", "hybrid", "hybrid_iswa".
        mrope: whether cells carry M-RoPE coordinates.
        values: whether there are V rows.
        recurrent_layers: how many layers have recurrent state.
        any_version: read versions that are not known to have this layout.

    Raises:
        FileFormatError: not a state file, of another version, truncated or hostile; or it does not
            fit the arguments or the model.
        AmbiguousTypeError: several layouts explain the file; lists them and what decides.
        UnknownFormatError: `dialect` is not registered.
        InputError: another argument is not what it can be, or head_dim does not divide a row.
        OSError: the file cannot be opened.
    """
    if memory is not None and memory not in MEMORY_CLASSES:
        raise InputError("memory", repr(memory), f"one of {', '.join(MEMORY_CLASSES)}")
    dialect = None if dialect is None else known_dialect(dialect)
    shape = model if isinstance(model, ModelShape | None) else model_shape(model)
    path, mapped = Path(path), map_file(path)
    wanted = {
        "memory": memory,
        "mrope": mrope,
        "values": values,
        "recurrent_layers": recurrent_layers,
        "deferred": None if dialect is None else writes_deferred(dialect),
    }
    container, reading, reason = _read(path, mapped, wanted, shape, any_version)
    choice = _choose_dialect(path, mapped, reading, dialect)
    heads = Heads(head_dim, shape, reading.layout, path)
    return StateFile(path, mapped, container, reading, reason, choice, heads, rotation)


def is_state_file(path: str | os.PathLike) -> bool:
    """Tell whether a file is to be read as a state file: it has a magic, or reads as a blob.

    Raises:
        FileFormatError: not a regular file, or empty.
        OSError: it cannot be opened.
    """
    mapped = map_file(path)
    start = bytes(mapped[:4])
    if start == GGUF_MAGIC:
        return False
    magics = (*VERSIONS, BLOB_MAGIC)
    if len(start) == 4 and any(
        m in magics for m in struct.unpack("<I", start) + struct.unpack(">I", start)
    ):
        return True
    containers = _containers(Path(path), mapped, any_version=False) if len(start) == 4 else []
    return any(readings(mapped, c.memory_at)[0] for c in containers)


def _distance_to_done(state: int) -> int:
    """Order the deferred states: staging, ready, done, off."""
    return state or len(DEFERRED_STATES)


def writes_deferred(dialect: str) -> bool:
    """Tell whether the KV memories of a `dialect[@release]` start with the deferred-state byte."""
    return split_dialect(dialect)[0].state.deferred


def deferring_dialects() -> list[str]:
    """Return the dialects whose KV memories start with the deferred-state byte."""
    return [name for name in dialects() if writes_deferred(name)]


def memory_names(memory: str) -> tuple[str, ...]:
    """Return what the parts of a memory class are called."""
    kv = ("base", "swa") if "iswa" in memory else ("kv",) if memory in ("kv", "hybrid") else ()
    return kv + (("recurrent",) if memory.startswith(("hybrid", "recurrent")) else ())


# --- which reading -------------------------------------------------------------------------------


def _containers(path: Path, mapped: MappedFile, any_version: bool) -> list[Container]:
    """Return what the start of the file can be; several only for blobs without a magic."""
    cursor = Cursor(mapped)
    try:
        magic = cursor.number("I", "magic", 0, (1 << 32) - 1)
        if magic in VERSIONS:
            return [_file_container(path, cursor, magic, any_version)]
        if magic == BLOB_MAGIC:
            sequence = cursor.number("i", "sequence id", -(1 << 31), (1 << 31) - 1)
            return [Container("sequence blob", sequence_id=sequence, memory_at=cursor.at)]
    except Mismatch as failure:
        raise FileFormatError(path, failure.at, failure.reason) from None
    start = bytes(mapped[:4])
    if start == GGUF_MAGIC:
        raise FileFormatError(path, 0, "a GGUF file, not a state file; use open_gguf")
    if struct.unpack(">I", start)[0] in (*VERSIONS, BLOB_MAGIC):
        raise FileFormatError(path, 0, "a big-endian state file; only little-endian is supported")
    found = [Container("sequence blob")]
    try:
        cursor = Cursor(mapped)
        name = _architecture(cursor)
        found.append(Container("state blob", architecture=name, memory_at=cursor.at))
    except Mismatch:
        pass
    return found


def _file_container(path: Path, cursor: Cursor, magic: int, any_version: bool) -> Container:
    version = cursor.number("I", "version", 0, (1 << 32) - 1)
    if version not in VERSIONS[magic] and not any_version:
        known = ", ".join(map(str, VERSIONS[magic]))
        reason = f"state version {version}, {known} is known; any_version= reads it all the same"
        raise FileFormatError(path, 4, reason)
    tokens = cursor.array(cursor.number("I", "token count", 0, (1 << 32) - 1), "tokens")
    if magic == SEQUENCE_MAGIC:
        return Container("sequence", version, tokens, memory_at=cursor.at)
    name = _architecture(cursor)
    return Container("session", version, tokens, name, memory_at=cursor.at)


def _architecture(cursor: Cursor) -> str:
    where = cursor.at
    length = cursor.number("I", "length of the architecture's name", 1, 64)
    start = cursor.skip(length, "architecture")
    name = bytes(cursor.buffer[start : cursor.at])
    if not name.isascii() or not name.decode().isprintable():
        raise Mismatch(where, f"architecture {name!r} is not printable")
    return name.decode()


def _read(
    path: Path,
    mapped: MappedFile,
    wanted: dict[str, object],
    shape: ModelShape | None,
    any_version: bool,
) -> tuple[Container, Reading, str]:
    """Return the one reading that fits the bytes and the arguments, and why it is that one."""
    found: list[tuple[Container, Reading]] = []
    failures = []
    for container in _containers(path, mapped, any_version):
        fitting, failure = readings(mapped, container.memory_at)
        found += [(container, reading) for reading in fitting]
        failures.append(failure)
    if not found:
        worst = max(failures, key=lambda failure: failure.rank)
        raise FileFormatError(
            path, worst.at, f"no memory layout fits; in the likeliest, {worst.reason}"
        )
    kept = [(c, r) for c, r in found if not _contradiction(r.layout, wanted)]
    if not kept:
        layout = found[0][1].layout
        reason = f"the file holds {layout}; {_contradiction(layout, wanted)} was asked for"
        raise FileFormatError(path, None, reason)
    misfits = [_model_misfit(r, shape) if shape else None for _, r in kept]
    if all(misfits):
        raise FileFormatError(path, None, f"not a dump of the given model: {misfits[0]}")
    kept = [pair for pair, misfit in zip(kept, misfits, strict=True) if not misfit]
    if len(kept) > 1:
        raise _ambiguous(path, [r.layout for _, r in kept])
    reason = "the only layout that explains the file to its last byte"
    if len(found) > 1:
        reason = f"of {len(found)} layouts that explain the file, the one that was asked for"
    return *kept[0], reason


def _contradiction(layout: Layout, wanted: dict[str, object]) -> str | None:
    """Name an argument that a layout contradicts."""
    has_cache = layout.memory not in ("recurrent", "none")
    for name, value in wanted.items():
        if value is None or (name in ("deferred", "mrope", "values") and not has_cache):
            continue
        if getattr(layout, name) != value:
            if name == "deferred":
                have = "with" if value else "without"
                return f"a dialect {have} the deferred-state byte"
            return f"{name}={value!r}"
    return None


def _ambiguous(path: Path, layouts: list[Layout]) -> AmbiguousTypeError:
    names = ["memory", "mrope", "values", "recurrent_layers", "deferred"]
    differing = [n for n in names if len({getattr(layout, n) for layout in layouts}) > 1]
    flags = ["dialect=" if name == "deferred" else f"{name}=" for name in differing]
    remedy = f"pass {' or '.join(flags)} or model=" if flags else "pass model="
    return AmbiguousTypeError(str(path), [f"[{layout}]" for layout in layouts], remedy)


def _model_misfit(reading: Reading, shape: ModelShape) -> str | None:
    """Say why a reading cannot be a dump of the model; None if it can."""
    memory = reading.layout.memory
    if reading.layout.mrope and not shape.mrope:
        return f"cells have M-RoPE coordinates, {shape.architecture} has none"
    for part, (name, found) in enumerate(zip(memory_names(memory), reading.memories, strict=True)):
        if isinstance(found, RecurrentMemory):
            if found.n_layer != shape.n_layer:
                return f"its recurrent memory counts {found.n_layer} layers, not {shape.n_layer}"
            continue
        layers = shape.cache_layers(memory, part)
        if any(bool(stream.values) == shape.mla for stream in found.streams if stream.keys):
            have, need = ("V", "none") if shape.mla else ("no V", "some")
            return f"{name} has {have} rows, {shape.architecture} needs {need}"
        for stream in found.streams:
            if not len(stream.cells) or layers is None:
                continue
            if shape.swa_assumed and "iswa" in memory:
                continue
            if len(stream.keys) != len(layers):
                have = f"{name} holds {len(stream.keys)} layers"
                return f"{have}, {shape.architecture} has {len(layers)} there"
    streams = [s for m in reading.memories if isinstance(m, KvMemory) for s in m.streams[:1]]
    found, own = sum(len(s.keys) for s in streams), len(shape.attention_layers)
    if found > own or (found < own and all(len(s.cells) for s in streams)):
        return f"its caches hold {found} layers, {shape.architecture} has {own}"
    return None


# --- which dialect -------------------------------------------------------------------------------


def _records(reading: Reading) -> list[Rows]:
    """Return all records of K and V."""
    streams = [s for m in reading.memories if isinstance(m, KvMemory) for s in m.streams]
    return [rows for stream in streams for rows in (*stream.keys, *stream.values)]


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
    if given is not None or not reading.layout.deferred:
        streams = [s for m in reading.memories if isinstance(m, KvMemory) for s in m.streams]
        footed = any(stream.fingerprint is not None for stream in streams)
        plain = [
            name
            for name in dialects()
            if not writes_deferred(name) and (not footed or get_dialect(name).state.footed)
        ]
        return identify(stored, path, given, among=plain)
    owner = deferring_dialects()[0]
    reason = f"KV memories start with the deferred-state byte, which only {owner} has"
    try:
        found = identify(stored, path, owner)
    except FileFormatError as misfit:
        return DialectChoice(None, f"{reason}, but {misfit.reason}")
    own = owner in {found.type_of(rows.type_id).dialect for rows in stored}
    return DialectChoice(owner, reason, guessed=own, release=found.release)


# --- views ---------------------------------------------------------------------------------------


COUNTED = (
    "; layers are counted from 0 in each cache, since which of the model's attend to a window is "
    "not known"
)


class Heads:
    """Tells layer numbers and head widths from a model, from the caller, or by assumption."""

    def __init__(
        self,
        head_dim: int | tuple[int, int] | None,
        model: ModelShape | None,
        layout: Layout,
        path: Path,
    ) -> None:
        self.model, self.layout, self.path = model, layout, path
        pair = (head_dim, head_dim) if isinstance(head_dim, int | None) else tuple(head_dim)
        if len(pair) != 2 or any(n is not None and (n != int(n) or n < 1) for n in pair):
            raise InputError("head_dim", repr(head_dim), "a positive number, or two for K and V")
        self.given = dict(zip("KV", pair, strict=True))
        self.counted = False  # whether layer numbers are only counts within their cache
        self.reason = "there are no attention layers"

    def layers(self, part: int, count: int) -> list[int]:
        """Return the layer numbers of the layers of a KV memory."""
        known = self.model.cache_layers(self.layout.memory, part) if self.model else None
        if known is not None and len(known) == count:
            return known
        self.counted = self.model is not None and count > 0
        return list(range(count))

    def recurrent_layers(self, memory: RecurrentMemory) -> list[int]:
        """Return the layer numbers of the layers that have recurrent state."""
        count = len(memory.r)
        if count == memory.n_layer or self.model is None:
            return list(range(count))
        known = [il for il, recurrent in enumerate(self.model.is_recurrent) if recurrent]
        return known if len(known) == count else list(range(count))

    def head_dim(self, kind: str, layer: int, n_embd: int, fmt: TensorType) -> int:
        """Return the values per head of a row, with what the fork's cache pads them to.

        Raises:
            InputError: the width that was given does not divide the row.
            FileFormatError: the model has rows of another width; or the fork has cut padded rows
                as if they were not.
        """
        given = self.given[kind]
        if given is not None:
            width = self._stored(kind, layer, given, fmt)
            if n_embd % width:
                need = f"a divisor of the {n_embd} values of {kind} rows (layer {layer})"
                raise InputError("head_dim", str(width), need)
            self.reason = f"head_dim {given} was given{self._padding(given, width)}"
            return width
        if self.model is not None:
            heads = self.model.heads(kind, None if self.counted else layer)
            stored = [(n, width, self._stored(kind, layer, width, fmt)) for n, width in heads]
            widths = {(width, whole) for n, width, whole in stored if n * whole == n_embd}
            if not widths:
                need = " or ".join(f"{n} heads of {whole}" for n, _, whole in sorted(stored))
                reason = f"{kind} rows of layer {layer} have {n_embd} values, not {need}"
                raise FileFormatError(self.path, None, f"not a dump of the given model: {reason}")
            if len(widths) == 1:
                ((width, whole),) = widths
                self.reason = "heads are the model's" + self._padding(width, whole)
                self.reason += COUNTED if self.counted else ""
                return whole
        width = n_embd
        if self.layout.values:  # a latent (MLA) row is one head
            width = next((n for n in USUAL_HEAD_DIMS if n_embd % n == 0), n_embd)
        self.reason = (
            f"head_dim {width} is assumed: the file does not say; model= or head_dim= does"
        )
        return width

    def _stored(self, kind: str, layer: int, head_dim: int, fmt: TensorType) -> int:
        """Return what a head of the model takes in a row; FileFormatError if its end is cut off."""
        if isinstance(fmt, Unknown):
            return head_dim
        state = get_dialect(fmt.dialect).state
        whole = state.head_values(fmt, head_dim)
        if whole != head_dim and not state.keeps_padding:
            reason = f"{kind} of layer {layer} has heads of {head_dim} values"
            fault = (
                f"{fmt.dialect}'s cache pads them to {whole}, but writes rows without the padding"
            )
            raise FileFormatError(self.path, None, f"{reason}: {fault}, which leaves no whole rows")
        return whole

    @staticmethod
    def _padding(width: int, whole: int) -> str:
        return "" if width == whole else f", padded from {width} to {whole} values"


def _cache_tensors(state: StateFile, choice: DialectChoice, heads: Heads) -> list[CacheTensor]:
    """Return a view of every layer, without rotations."""
    tensors: list[CacheTensor] = []

    def view(part: int, kind: str, layer: int, records: list[Rows], transposed: bool, before):
        first = records[0]
        if any((r.type_id, r.row_bytes) != (first.type_id, first.row_bytes) for r in records):
            reason = f"layer {layer} changes its {kind} type from stream to stream"
            raise FileFormatError(state.path, first.where, reason)
        fmt = choice.type_of(first.type_id)
        n_embd = _row_values(fmt, first)
        if n_embd is None and isinstance(fmt, Format):
            reason = f"layer {layer} has {kind} rows of {first.row_bytes} bytes"
            raise FileFormatError(
                state.path, first.where, f"{reason}, not whole groups of {fmt.label}"
            )
        head_dim = None
        if n_embd and kind in "KV":
            head_dim = heads.head_dim(kind, layer, n_embd, fmt)
        if isinstance(fmt, Format) and kind in "KV":
            fmt = fmt.fitting(head_dim=head_dim, side=kind)
        prefix = f"{state.memory_names[part]}." if "iswa" in state.layout.memory else ""
        prefix = prefix if kind in "KV" else ""
        lender = fmt.sibling if isinstance(fmt, Format) else None
        sibling = before if lender and before and before.format.label == lender else None
        tensor = CacheTensor(
            name=f"{prefix}cache_{kind.lower()}_l{layer}",
            kind=kind,
            memory=part,
            layer=layer,
            format=fmt,
            parts=tuple(records),
            transposed=transposed,
            n_embd=n_embd,
            head_dim=head_dim,
            rotation=None,
            sibling=sibling,
            _map=state._map,
            _choice=choice,
        )
        tensors.append(tensor)
        return tensor

    for part, memory in enumerate(state.memories):
        if isinstance(memory, RecurrentMemory):
            for kind, records in (("R", memory.r), ("S", memory.s)):
                for layer, rows in zip(heads.recurrent_layers(memory), records, strict=True):
                    view(part, kind, layer, [rows], False, None)
            continue
        streams = [stream for stream in memory.streams if len(stream.cells)]
        if len({(len(s.keys), len(s.values), s.v_trans) for s in streams}) > 1:
            raise FileFormatError(state.path, None, "streams differ in their number of layers")
        for kind, records in (
            ("K", [stream.keys for stream in streams]),
            ("V", [stream.values for stream in streams]),
        ):
            by_layer = list(zip(*records, strict=True))
            before = None
            for layer, rows in zip(heads.layers(part, len(by_layer)), by_layer, strict=True):
                transposed = kind == "V" and bool(streams[0].v_trans)
                before = view(part, kind, layer, list(rows), transposed, before)
    return tensors


def _row_values(fmt: TensorType, rows: Rows) -> int | None:
    """Return the values per row; None if whole groups do not make it up, or it is unknown."""
    if isinstance(fmt, Unknown):
        return None
    body = rows.row_bytes - fmt.layout.header_bytes
    groups, rest = divmod(body, fmt.codec.group_blocks * fmt.block_bytes)
    return None if rest else groups * fmt.group_values


def _rotated(tensors: list[CacheTensor], choice: RotationChoice) -> list[CacheTensor]:
    """Return the views with the rotation that each is stored under."""
    done: dict[str, CacheTensor] = {}
    for t in tensors:
        sibling = done[t.sibling.name] if t.sibling is not None else None
        done[t.name] = replace(t, rotation=choice.of(t), sibling=sibling)
    return list(done.values())
