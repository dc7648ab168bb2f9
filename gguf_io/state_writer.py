"""Writing state files: the same structure back, with other types for K and V if wanted.

The file is serialised from what was parsed, not copied, so a file that comes back byte for byte has
been understood. Rows that change their type are dequantised, un-rotated, rotated and padded as the
target's fork does and quantised, piece by piece.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import tbq
from gguf_io.atomic import AtomicFiles, refuse_inputs
from gguf_io.cache_tensor import CacheTensor
from gguf_io.graph_rotation import RotationChoice, choose_rotation
from gguf_io.identify import known_dialect
from gguf_io.state import StateFile, writes_deferred
from gguf_io.state_buun import HEADER_BYTES, fnv1a64
from gguf_io.state_records import (
    DEFERRED_STATES,
    Cells,
    KvMemory,
    Memory,
    Rows,
    Span,
    Stream,
)
from gguf_io.state_versions import VersionChange, change_version
from gguf_io.state_views import ABSENT
from gguf_io.types import (
    TensorType,
    Unknown,
    dequantize_rows,
    known,
    overflowed,
    quantize_rows,
    row_bytes,
)
from gguf_io.writer import file_dialect
from tbq import AmbiguousTypeError, Format, InputError, Rotation, ValueOverflowError
from tbq.format import GGML
from tbq.registry import get_dialect, type_id

# Float32 values that are held at a time.
CHUNK_VALUES = 1 << 21
# source: ggml-org/llama.cpp, common/arg.cpp: the ggml types that --cache-type-k and -v take
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


@dataclass(frozen=True, eq=False)
class Conversion:
    """What is written for one tensor.

    Attributes:
        tensor: the source.
        format: the type that is written.
        rotation: the rotation that the written rows are under.
        converts: whether the bytes change.
        lender: for xktq2_1, the conversion of the layer before, whose codes it borrows.
    """

    tensor: CacheTensor
    format: TensorType
    rotation: Rotation | None
    converts: bool
    lender: Conversion | None = None

    @property
    def repacks(self) -> bool:
        """Whether codes and scales stay as they are, in other blocks."""
        t, target = self.tensor, self.format
        if not self.converts or is_unknown(t) or self.lender or t.sibling or t.transposed:
            return False
        same = (t.rotation and t.rotation.kind) == (self.rotation and self.rotation.kind)
        same &= self.stored_head == t.stored_head
        return same and tbq.repackable(known(t.format), known(target))

    @property
    def stored_head(self) -> int | None:
        """Values per head that are written, with what the target's cache pads them to."""
        t = self.tensor
        if not (self.converts and t.head_dim):
            return t.stored_head
        kind = known(self.format)
        return get_dialect(kind.dialect).state.head_values(kind, t.head_dim)

    @property
    def n_embd(self) -> int | None:
        """Values per row that is written."""
        t = self.tensor
        return t.n_head * self.stored_head if t.n_head and self.stored_head else t.n_embd

    @property
    def row_bytes(self) -> int:
        """Bytes per row that is written."""
        if not self.converts:
            return self.tensor.row_bytes
        return row_bytes(self.format, self.values)

    @property
    def values(self) -> int:
        """Values per row that is written, of a tensor that is converted."""
        assert self.n_embd is not None, "what is converted is of a known type"
        return self.n_embd

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows that are written."""
        return self.row_bytes * self.tensor.n_cells


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a byte is written.

    Attributes:
        state: the source.
        dialect, release: whose file is written; None if nothing in it depends on that.
        deferred: per memory, an index into DEFERRED_STATES; None where the file has no such byte.
        conversions: one per tensor, by name.
        version: how it is written under another version; None under its own.
    """

    state: StateFile
    dialect: str | None
    release: str | None
    deferred: tuple[int | None, ...]
    conversions: dict[str, Conversion]
    version: VersionChange | None = None

    @property
    def moves(self) -> bool:
        """Whether rows are written under another dialect's or release's ids."""
        return (self.dialect, self.release) != (self.state.dialect, self.state.release)

    @property
    def changes(self) -> bool:
        """Whether any tensor is converted."""
        return any(c.converts for c in self.conversions.values())

    def type_id(self, conversion: Conversion) -> int:
        """Return the type id that is written for a tensor: its own where it stays as it is."""
        if is_unknown(conversion.tensor) or not (conversion.converts or self.moves):
            return conversion.tensor.type_id
        return type_id(known(conversion.format), self.dialect or GGML, self.release)


Types = Mapping[str, TensorType] | Callable[[CacheTensor], TensorType | None]


def plan_conversion(
    state: StateFile,
    types: Types | None = None,
    *,
    dialect: str | None = None,
    rotate: bool = True,
    allow_requantize: bool = False,
    allow_mixed: bool = False,
    version: int | None = None,
) -> Plan:
    """Decide what `write_state` writes, and refuse what the fork would refuse to load.

    Args:
        state: the open source.
        types: the new type of tensors by name, or a function from a tensor to its type or None.
            Tensors without one keep theirs.
        dialect: whose file is written, `dialect` or `dialect@release`; if omitted, that of the new
            types, else the source's.
        rotate: whether K and V of quantised caches are rotated as the fork does by default; off for
            programs that run with LLAMA_ATTN_ROT_DISABLE.
        allow_requantize: whether rows that are quantised already may be quantised again.
        allow_mixed: whether layers may differ in type where the fork's own reader cannot load that.
        version: 9 or 10, the session version of llama.cpp to write, or the sequence version of the
            same time, 2 or 3; the source's if omitted.

    Raises:
        AmbiguousTypeError: what is written depends on the memory class, which is not known.
        InputError: a name that is no tensor; blocks that do not divide a row; a type that no cache
            takes, or takes on the other side; quantised V under transposed V; types of several
            dialects; layers of different types; quantised rows; staged rows that would stay behind.
        UnknownFormatError: `dialect` is not registered.
    """
    chosen = _chosen_types(state, types)
    target, release = _dialect(state, chosen, dialect)
    final = {name: chosen.get(name, t.format) for name, t in state.tensors.items()}
    conversions: dict[str, Conversion] = {}
    rotations = _target_rotations(state, final, rotate, target)
    for kind in "KV":
        tensors = [t for t in state.tensors.values() if t.kind == kind]
        touched = any(t.name in chosen for t in tensors)
        before = None
        for t in tensors:
            c = Conversion(t, t.format, t.rotation, False)
            if touched:
                c = _conversion(t, final[t.name], rotations.kind(kind, t.memory), before)
                _check(c, allow_requantize)
            conversions[t.name] = before = c
    for name, t in state.tensors.items():  # recurrent rows stay, and the order is the file's
        done = conversions.pop(name, None)
        conversions[name] = done or Conversion(t, t.format, None, False)
    changed = None if version is None else change_version(state, version)
    deferred = _deferred(state, target, conversions)
    plan = Plan(state, target, release, deferred, conversions, changed)
    if plan.changes:
        _check_types(plan, allow_mixed)
        _check_staging(plan)
        _check_class(plan)
    return plan


def write_state(
    path: str | os.PathLike[str],
    plan: Plan | StateFile,
    *,
    allow_overflow: bool = False,
    threads: int | None = None,
    progress: Callable[[CacheTensor, int], None] | None = None,
) -> dict[str, int]:
    """Write a state file, atomically: the path gets the whole file or stays as it was.

    Args:
        path: the file; an existing one is replaced, the source never.
        plan: what `plan_conversion` returned, or an open file to be written as it is.
        allow_overflow: write finite values that come back as infinite or NaN.
        threads: worker threads of the codecs.
        progress: called with a tensor and the number of its source bytes that were written.

    Returns:
        how many finite values come back as infinite or NaN, by name, of tensors that have some.

    Raises:
        InputError: `path` is the source.
        ValueOverflowError: finite values would come back as infinite or NaN.
        FileFormatError: the source changed while it was read.
        OSError: the file cannot be written.
    """
    plan = plan if isinstance(plan, Plan) else plan_conversion(plan)
    refuse_inputs([path], [plan.state.path])
    with AtomicFiles() as output:
        file: Any = output.create(path)
        serialiser = _Serialiser(plan, threads, progress)
        if plan.state.container.long_header:
            _write_summed(file, serialiser.pieces())
        else:
            for piece in serialiser.pieces():
                file.write(piece)
        plan.state.check_unchanged()
        if serialiser.overflow and not allow_overflow:
            raise ValueOverflowError(serialiser.overflow)
    return serialiser.overflow


def _write_summed(file: Any, pieces: Iterator[bytes | np.ndarray]) -> None:
    """Write a file with buun's header, whose size and checksum are known at the end."""
    header = next(pieces)
    file.write(header)
    checksum = fnv1a64(header[HEADER_BYTES:])
    for piece in pieces:
        file.write(piece)
        checksum = fnv1a64(piece, checksum)
    size = file.tell()
    file.seek(8)
    file.write(struct.pack("<QQ", size, checksum))


# --- planning ------------------------------------------------------------------------------------


def _chosen_types(state: StateFile, types: Types | None) -> dict[str, TensorType]:
    if types is None:
        return {}
    if callable(types):
        found = {name: types(t) for name, t in state.tensors.items() if t.kind in "KV"}
        types = {name: kind for name, kind in found.items() if kind is not None}
    for name in types:
        if name not in state.tensors or state.tensors[name].kind not in "KV":
            raise InputError("types", repr(name), "names of K and V tensors in the file")
    return {name: _fitting(kind, state.tensors[name]) for name, kind in types.items()}


def _fitting(kind: TensorType, t: CacheTensor) -> TensorType:
    """Return a type with its codec for a tensor's side and heads."""
    return kind if isinstance(kind, Unknown) else kind.fitting(head_dim=t.head_dim, side=t.kind)


def _dialect(
    state: StateFile, chosen: dict[str, TensorType], given: str | None
) -> tuple[str | None, str | None]:
    """Return the dialect and release of the file that is written."""
    if not chosen and given is None:
        return state.dialect, state.release  # whose types may be those of another
    final = {name: chosen.get(name, t.format) for name, t in state.tensors.items()}
    own = {kind.dialect for kind in final.values() if kind.dialect not in (None, GGML)}
    named = {kind.dialect for kind in chosen.values() if kind.dialect != GGML}
    asked = {known_dialect(given).partition("@")[0]} if given else set()
    together = sorted(own | asked)
    if len(together) > 1:
        raise InputError("types", f"formats of {' and '.join(together)}", "one dialect per file")
    unknown = [t for n, t in state.tensors.items() if n not in chosen and is_unknown(t)]
    if named and unknown:
        got = f"{unknown[0].name} of {unknown[0].format.name}"
        raise InputError("types", got, f"known types beside those of {together[0]}")
    if not together:
        return state.dialect, state.release
    if given is None and together == [state.dialect]:
        given = f"{state.dialect}@{state.release}"  # the ids that the source has
    known = [kind for kind in final.values() if isinstance(kind, Format)]
    return file_dialect(known, given or together[0]) or (None, None)


def is_unknown(tensor: CacheTensor) -> bool:
    """Tell whether nothing is known of a tensor's type."""
    return isinstance(tensor.format, Unknown)


def _target_rotations(
    state: StateFile, final: dict[str, TensorType], rotate: bool, dialect: str | None
) -> RotationChoice:
    """Return what the target's graph would store K and V of these types under."""
    own = state.graph(dialect)
    if state.layout.program == "llama.cpp":  # whose types say whose graph it is
        own = replace(own, dialect=dialect)
    graph = replace(own, staging=False, stated={})
    return choose_rotation("auto" if rotate else "off", list(state.tensors.values()), graph, final)


def _conversion(
    t: CacheTensor, kind: TensorType, rotation: str | None, before: Conversion | None
) -> Conversion:
    if is_unknown(t):
        if kind != t.format:
            t.stored(0, 1)  # raises the error that explains it
        return Conversion(t, kind, t.rotation, False)
    target = tbq.rotation(rotation, t.head_dim) if rotation and t.head_dim else None
    same_rotation = (target and target.kind) == (t.rotation and t.rotation.kind)
    converts = kind != t.format or not same_rotation
    lender = kind.sibling if isinstance(kind, Format) else None
    if lender and converts:
        if before is None or before.format.label != lender:
            need = f"a layer of {lender} before it, whose codes it borrows"
            raise InputError(f"type of {t.name}", kind.label, need)
        return Conversion(t, kind, target, True, before)
    return Conversion(t, kind, target, converts)


def _check(c: Conversion, allow_requantize: bool) -> None:
    """Refuse a type that the fork's cache would not take for this tensor."""
    t, argument = c.tensor, f"type of {c.tensor.name}"
    if not c.converts:
        return
    kind = known(c.format)
    if kind.is_ggml and kind.name not in CACHE_TYPES:
        raise InputError(argument, kind.label, f"a type that caches take: {', '.join(CACHE_TYPES)}")
    if t.kind not in kind.side:
        raise InputError(argument, kind.label, f"a type for {t.kind}; this one is for {kind.side}")
    _check_padding(c, argument)
    if t.transposed and kind.is_quantized:
        need = (
            "f32, f16 or bf16: V is stored transposed (no flash attention), which blocks cannot be"
        )
        raise InputError(argument, kind.name, need)
    if t.format.is_quantized and kind.is_quantized and not (allow_requantize or c.repacks):
        got = f"{t.format.name}, which is quantised already"
        raise InputError(argument, got, f"allow_requantize to quantise it again, to {kind.name}")
    try:
        row_bytes(kind, c.values)
    except InputError as error:
        raise InputError(argument, error.got, error.need) from None
    t.stored(0, 1)  # fails here, before anything is written, if it cannot be decoded


def _check_padding(c: Conversion, argument: str) -> None:
    """Refuse to pad heads where the fork's files lose that, or where their width is a guess."""
    t, kind = c.tensor, known(c.format)
    if c.stored_head == t.head_dim:
        return
    got = f"{kind.label} for heads of {t.head_dim} values"
    whole = f"heads of whole {kind.group_values}s"
    if not get_dialect(kind.dialect).state.keeps_padding:
        need = f"{whole}: {kind.dialect}'s cache pads others, but its files cut the rows"
        raise InputError(argument, got, f"{need}, so that none could hold them")
    if not t.head_told:
        need = f"{whole}: the cache pads others, but this width is assumed"
        raise InputError(argument, got, f"{need}; model= or head_dim= says what it is")


def _check_types(plan: Plan, allow_mixed: bool) -> None:
    if allow_mixed or (plan.dialect and get_dialect(plan.dialect).state.mixed):
        return
    for kind in "KV":
        mine = [c for c in plan.conversions.values() if c.tensor.kind == kind]
        names = sorted({c.format.name for c in mine})
        if len(names) > 1 and any(c.converts for c in mine):
            need = f"one type for all {kind}, as {plan.dialect or 'llama.cpp'} has; or allow_mixed"
            raise InputError("types", f"{' and '.join(names)} for {kind}", need)


def _check_staging(plan: Plan) -> None:
    """Refuse to leave staged rows behind in a file that says nothing is staged."""
    if not plan.state.staging:
        return
    if plan.state.rotation.unclear:
        need = "rotation= stated when the file is opened: keys, values or both may be rotated"
        raise InputError("source", "a dump with staged rows", need)
    for c in plan.conversions.values():
        if not c.converts and c.tensor.rotation is not None:
            need = "a new type too: its rows are staged, and the file would say that nothing is"
            raise InputError(f"type of {c.tensor.name}", c.format.name, need)


def _check_class(plan: Plan) -> None:
    """Refuse to guess a rotation that another class with the same bytes would not have."""
    candidates, question = plan.state.class_candidates, plan.state.rotation.question
    if candidates and question:
        raise AmbiguousTypeError(str(plan.state.path), candidates, "pass memory= or model=")


def _deferred(
    state: StateFile, dialect: str | None, conversions: dict[str, Conversion]
) -> tuple[int | None, ...]:
    """Return the deferred states to write: done if llama-tq would have staged any of the types."""
    have = tuple(getattr(memory, "deferred", None) for memory in state.memories)
    if not any(c.converts for c in conversions.values()):
        return have
    new = None
    if dialect is not None and writes_deferred(dialect):
        names = get_dialect(dialect).state.staged
        staged = any(
            c.format.dialect != GGML and c.format.name in names for c in conversions.values()
        )
        new = DEFERRED_STATES.index("done" if staged else "off")
    return tuple(new if isinstance(memory, KvMemory) else None for memory in state.memories)


# --- bytes ---------------------------------------------------------------------------------------


class _Serialiser:
    """Yields a state file's bytes, piece by piece."""

    def __init__(self, plan: Plan, threads: int | None, progress: Any) -> None:
        self.plan = plan
        self.threads = threads
        self.progress = progress or (lambda tensor, n_bytes: None)
        self.overflow: dict[str, int] = {}
        # which conversion, and which of its streams, a record of the source belongs to
        self.owner = {
            id(rows): (c, p)
            for c in plan.conversions.values()
            for p, rows in enumerate(c.tensor.parts)
        }

    def pieces(self) -> Iterator[bytes | np.ndarray]:
        state = self.plan.state
        version = self.plan.version
        numbers = () if version is None else (version.number, version.words)
        yield state.container.header(*numbers)
        if state.reading.lead is not None:
            yield from self._written(state.reading.lead)
        for memory, deferred in zip(state.memories, self.plan.deferred, strict=True):
            yield from self._written(self._changed(memory, deferred))
        appendix = state.container.appendix
        if appendix is not None:
            yield from self._span(Span(appendix.name, appendix.start, appendix.n_bytes))

    def _written(self, memory: Any) -> Iterator[bytes | np.ndarray]:
        """Yield the bytes of a memory, or of what stands before it."""
        for piece in memory.pieces():
            if isinstance(piece, Cells):
                self.plan.state.check_unchanged()  # cells are views of its map
                yield from cell_bytes(piece)
            elif isinstance(piece, Rows):
                yield from self._rows(piece)
            elif isinstance(piece, Span):
                yield from self._span(piece)
            else:
                yield piece

    def _span(self, span: Span) -> Iterator[np.ndarray]:
        for start in range(span.start, span.start + span.n_bytes, CHUNK_VALUES):
            n = min(CHUNK_VALUES, span.start + span.n_bytes - start)
            yield self.plan.state.bytes_at(start, n)

    def _changed(self, memory: Memory, deferred: int | None) -> Memory:
        """Return a memory with what its new rows imply."""
        if self.plan.version is not None:
            memory = self.plan.version.memory(memory)
        if not isinstance(memory, KvMemory):
            return memory
        streams = tuple(
            replace(s, fingerprint=self._fingerprint(s), rotation=self._sizes(s))
            for s in memory.streams
        )
        return replace(memory, streams=streams, deferred=deferred)

    def _sizes(self, stream: Stream) -> tuple[int, int] | None:
        """Return the sizes of the rotations that are stated, where they are."""
        if stream.rotation is None or not self.plan.changes:
            return stream.rotation
        sizes = list(stream.rotation)
        for i, records in enumerate((stream.keys, stream.values)):
            owners = [self.owner[id(rows)][0] for rows in records]
            if any(c.converts for c in owners):
                sizes[i] = max((c.rotation.size for c in owners if c.rotation), default=0)
        return sizes[0], sizes[1]

    def _fingerprint(self, stream: Stream) -> int | None:
        """Return what stands in the footer that is written; None if there is none."""
        plan = self.plan
        if not (plan.changes or plan.moves):
            return stream.fingerprint
        footed = get_dialect(plan.dialect).state.footed if plan.dialect else frozenset()
        owners = [self.owner[id(rows)][0] for rows in (*stream.keys, *stream.values)]
        if not any(c.format.name in footed and c.format.dialect != GGML for c in owners):
            return None
        return stream.fingerprint or 0

    def _rows(self, rows: Rows) -> Iterator[bytes | np.ndarray]:
        if rows.type_id == ABSENT:
            yield rows.head(ABSENT, 0)
            return
        c, part = self.owner[id(rows)]
        yield rows.head(self.plan.type_id(c), c.row_bytes)
        if rows.n_embd is not None:
            yield from self._columns(c, part)
            return
        first = sum(other.cells for other in c.tensor.parts[:part])
        wide = max(c.tensor.n_embd or 0, c.n_embd or 0)
        step = max(1, CHUNK_VALUES // (wide or c.tensor.row_bytes or 1))
        for start in range(first, first + rows.cells, step):
            stop = min(start + step, first + rows.cells)
            if c.repacks:
                kinds = known(c.tensor.format), known(c.format)
                yield tbq.repack(c.tensor.rows(start, stop), *kinds)
            else:
                yield self._convert(c, start, stop) if c.converts else c.tensor.rows(start, stop)
            if c.tensor.row_bytes:
                self.progress(c.tensor, (stop - start) * c.tensor.row_bytes)

    def _columns(self, c: Conversion, part: int) -> Iterator[np.ndarray]:
        """Yield the columns of transposed values, which are floats and never rotated."""
        rows = c.tensor.parts[part]
        step = max(1, CHUNK_VALUES // rows.cells)
        for start in range(0, rows.columns, step):
            piece = c.tensor.columns(part, start, min(start + step, rows.columns))
            self.progress(c.tensor, piece.nbytes)
            if c.converts:
                x = dequantize_rows(piece, c.tensor.format, threads=self.threads)
                piece = quantize_rows(x, c.format, threads=self.threads)
                self._count(c, x, piece)
            yield piece

    def _convert(self, c: Conversion, start: int, stop: int) -> np.ndarray:
        t = c.tensor
        x = t.values(start, stop, threads=self.threads)
        x = x if c.rotation is None else c.rotation.forward(x)
        if c.stored_head is not None and t.head_dim is not None and c.stored_head != t.head_dim:
            x = np.pad(x, ((0, 0), (0, 0), (0, c.stored_head - t.head_dim)))
        x = x.reshape(stop - start, c.values)
        if c.lender is not None:
            lent = self._lent(c.lender, start, stop)
            return tbq.quantize_paired(x, lent, known(c.format), threads=self.threads)
        packed = quantize_rows(x, c.format, first_row=start, threads=self.threads)
        self._count(c, x, packed)
        return packed

    def _count(self, c: Conversion, x: np.ndarray, packed: np.ndarray) -> None:
        n = overflowed(x, packed, known(c.format))
        if n:
            self.overflow[c.tensor.name] = self.overflow.get(c.tensor.name, 0) + n

    def _lent(self, lender: Conversion, start: int, stop: int) -> np.ndarray:
        if lender.converts:
            return self._convert(lender, start, stop)
        return lender.tensor.rows(start, stop)


def cell_bytes(cells: Cells) -> Iterator[bytes | np.ndarray]:
    """Yield a stream's cell count and its cells as the file has them."""
    yield struct.pack("<I", len(cells))
    yield cells.words.view(np.uint8)
