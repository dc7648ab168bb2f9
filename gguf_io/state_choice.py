"""Which reading of a state file is meant, and which memory class wrote it.

The bytes decide first: what does not end at the last byte is out. Of what is left the caller's
arguments and the model decide, then the version, which is no more than a hint. Classes that write
the same bytes are told apart by the model, the architecture, or what the rows hold; if nothing
does, the likeliest is taken and the others are named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gguf_io.mapped import MappedFile
from gguf_io.memory_classes import (
    CLASSES,
    KEYS_ONLY,
    OF_ARCHITECTURE,
    PARTIAL,
    RECURRENT,
    classes_of,
    parts_of,
)
from gguf_io.model_shape import ModelShape
from gguf_io.state_container import Container, containers, with_appendix, with_trailing
from gguf_io.state_cursor import Mismatch
from gguf_io.state_parser import readings
from gguf_io.state_records import IkMemory, KvMemory, Layout, Reading, RecurrentMemory, Rows
from tbq import AmbiguousTypeError, FileFormatError

NAMES = ("memory", "mrope", "values", "recurrent_layers", "deferred")
MAX_TRAILING_TRIES = 64
# Of each layer's values, where zeros are looked for.
LOOKED_AT_BYTES = 1 << 24
MAGNITUDE = np.uint32(0x7FFFFFFF)  # of a float32, all bits but the sign


@dataclass(frozen=True)
class Choice:
    """The reading that is meant.

    Attributes:
        container: what stands around the memory.
        reading: what is in it; its layout has the class that is meant.
        reason: why it is this one.
        candidates: the other classes that could have written the same bytes, if nothing decides.
        apart: what would tell them apart.
    """

    container: Container
    reading: Reading
    reason: str
    candidates: tuple[str, ...] = ()
    apart: str = ""


def choose_reading(
    path: Path,
    mapped: MappedFile,
    wanted: dict[str, object],
    shape: ModelShape | None,
    trailing: bool,
    is_zero: Callable[[Rows], bool | None],
) -> Choice:
    """Return the one reading that fits the bytes and the arguments.

    Args:
        path, mapped: the file.
        wanted: what the caller says of the layout, None where nothing.
        shape: the model.
        trailing: whether a sequence file may have bytes after its memory that nothing explains.
        is_zero: tells whether all values of rows are zero, None if that cannot be told.

    Raises:
        FileFormatError: none fits.
        AmbiguousTypeError: several do.
    """
    found, failures = _all_readings(path, mapped, trailing)
    if not found:
        worst = max(failures, key=lambda failure: failure.rank)
        raise FileFormatError(
            path, worst.at, f"no memory layout fits; in the likeliest, {worst.reason}"
        )
    kept = [(c, r) for c, r in found if not _contradiction(c, r, wanted)]
    if not kept:
        container, reading = found[0]
        asked = _contradiction(container, reading, wanted)
        raise FileFormatError(path, None, f"the file holds {reading.layout}; {asked} was asked for")
    misfits = [model_misfit(c, r, shape) if shape else None for c, r in kept]
    if all(misfits):
        raise FileFormatError(path, None, f"not a dump of the given model: {misfits[0]}")
    kept = [pair for pair, misfit in zip(kept, misfits, strict=True) if not misfit]
    reason = "the only layout that explains the file to its last byte"
    if len(found) > 1:
        reason = f"of {len(found)} layouts that explain the file, the one that was asked for"
    if len(kept) > 1:
        likely = [pair for pair in kept if _expected(*pair)]
        if len(likely) != 1:
            raise _ambiguous(path, [r.layout for _, r in kept])
        kept = likely
        reason = f"of {len(found)} layouts that explain the file, the one that its version has"
    container, reading = kept[0]
    return _classified(container, reading, reason, wanted["memory"], shape, is_zero)


def _all_readings(
    path: Path, mapped: MappedFile, trailing: bool
) -> tuple[list[tuple[Container, Reading]], list[Mismatch]]:
    """Return what explains the file to its last byte, or to an appendix; and what failed."""
    found: list[tuple[Container, Reading]] = []
    failures: list[Mismatch] = []
    ends: set[int] = set()
    own = containers(path, mapped)
    for container in own:
        fitting, failure = readings(mapped, container.memory_at, ends)
        found += [(container, reading) for reading in fitting]
        failures.append(failure)
    if not found and own[0].kind == "sequence":  # llama.cpp does not look behind its memory
        found = _before_appendix(own[0], mapped, ends, trailing)
    return found, failures


def _before_appendix(
    container: Container, mapped: MappedFile, ends: set[int], trailing: bool
) -> list[tuple[Container, Reading]]:
    """Return the readings of what stands before an appendix, or before anything if allowed."""
    places = sorted(ends, reverse=True)
    known = (with_appendix(container, mapped, at) for at in places)
    longer = [c for c in known if c is not None]
    if not longer and trailing:
        longer = [with_trailing(container, at, len(mapped)) for at in places]
    for c in longer[:MAX_TRAILING_TRIES]:
        stop = len(mapped) if c.appendix is None else c.appendix.start
        fitting, _ = readings(memoryview(mapped)[:stop], c.memory_at)
        if fitting:
            return [(c, reading) for reading in fitting]
    return []


def _contradiction(container: Container, reading: Reading, wanted: dict[str, object]) -> str | None:
    """Name an argument that a reading contradicts."""
    layout = reading.layout
    has_cache = layout.memory not in (RECURRENT, "none")
    for name, value in wanted.items():
        if value is None or (name in ("deferred", "mrope", "values") and not has_cache):
            continue
        if name == "memory" and (value in reading.classes or _is_part(container, reading, value)):
            continue
        if getattr(layout, name) != value:
            if name == "deferred":
                have = "with" if value else "without"
                return f"a dialect {have} the deferred-state byte"
            return f"{name}={value!r}"
    return None


def _is_part(container: Container, reading: Reading, memory: object) -> bool:
    """Tell whether a blob can be what PARTIAL_ONLY writes of a class."""
    if container.kind != "sequence blob" or memory not in PARTIAL:
        return False
    own = RECURRENT if PARTIAL[memory][0].name == RECURRENT else "kv"
    return reading.layout.memory == own


def _ambiguous(path: Path, layouts: list[Layout]) -> AmbiguousTypeError:
    differing = [n for n in NAMES if len({getattr(layout, n) for layout in layouts}) > 1]
    flags = ["dialect=" if name == "deferred" else f"{name}=" for name in differing]
    remedy = f"pass {' or '.join(flags)} or model=" if flags else "pass model="
    return AmbiguousTypeError(str(path), [f"[{layout}]" for layout in layouts], remedy)


def _expected(container: Container, reading: Reading) -> bool:
    """Tell whether a reading is what llama.cpp writes under the file's version."""
    layout = reading.layout
    usual = layout.streams and not layout.rotation_words and layout.program == "llama.cpp"
    if container.version is None or container.newer:
        return usual
    return usual and layout.cell_bytes in ((0, 8) if container.old else (0, 12))


# --- which class ---------------------------------------------------------------------------------


def _classified(
    container: Container,
    reading: Reading,
    reason: str,
    wanted: object,
    shape: ModelShape | None,
    is_zero: Callable[[Rows], bool | None],
) -> Choice:
    """Settle the memory class of a reading."""
    classes = reading.classes
    partial = _partial(container, reading, wanted, shape)
    if partial:
        layout = replace(reading.layout, memory=partial, partial=True)
        reason += f"; what PARTIAL_ONLY writes of {partial}, as {_by(wanted, shape)} says"
        return Choice(container, replace(reading, layout=layout), reason)
    if len(classes) < 2:
        return Choice(container, reading, reason + _blob_note(container, reading))
    reason = reason.replace("the only layout that explains", "sections that explain")
    reason += f"; {' and '.join(classes)} write the same sections"
    for name, why in (
        (wanted, f"{wanted} was asked for"),
        _of_architecture(container, reading, shape),
        _of_old_trees(container, reading),
        _of_rows(reading, is_zero),
    ):
        if name in classes:
            return _named(container, reading, f"{reason}, {why}", str(name))
    chosen = _named(container, reading, f"{reason}, and nothing in the file tells", classes[0])
    apart = "the model does, or the architecture of a session file"
    return replace(chosen, candidates=classes, apart=apart)


def _of_architecture(
    container: Container, reading: Reading, shape: ModelShape | None
) -> tuple[str | None, str]:
    """Return the class that the model, or its architecture, has, and why."""
    architecture = shape.architecture if shape else container.architecture
    own = classes_of(architecture)
    name = next((name for name in reading.classes if name in own), None)
    known = shape is not None and (shape.memory in reading.classes or not shape.indexer_width)
    known = known or architecture in OF_ARCHITECTURE or architecture in KEYS_ONLY
    return (name, f"and {architecture} is of {name}") if known else (None, "")


def _of_old_trees(container: Container, reading: Reading) -> tuple[str | None, str]:
    """Return the one class that trees of an old version have, and why."""
    old = [name for name in reading.classes if CLASSES[name].old]
    if len(old) == 1 and (container.old or reading.layout.deferred):
        return old[0], f"but trees of this version have only {old[0]}"
    return None, ""


def _of_rows(reading: Reading, is_zero: Callable[[Rows], bool | None]) -> tuple[str | None, str]:
    """Return the class that the second cache's cells or values show, and why."""
    if not _can_index(reading):
        why = "but the second cache has other cells than the first, or more layers"
        return "iswa", f"{why}, as no indexer's has"
    zero = _second_values_are_zero(reading, is_zero) if "msa" in reading.classes else None
    if zero is None:
        return None, ""
    values = "and the values of the second cache are"
    if zero:
        return "msa", f"{values} all zero, which only an indexer's are"
    return "iswa", f"{values} not all zero, an indexer's are"


def _named(container: Container, reading: Reading, reason: str, memory: str) -> Choice:
    layout = replace(reading.layout, memory=memory)
    return Choice(container, replace(reading, layout=layout), reason)


def _partial(
    container: Container, reading: Reading, wanted: object, shape: ModelShape | None
) -> str | None:
    """Return the class of which a blob is the part that PARTIAL_ONLY writes; None if it is whole.

    The model has to say so, or the caller: without them it is a memory like others.
    """
    if wanted is not None:
        return str(wanted) if _is_part(container, reading, wanted) else None
    if shape is None or shape.memory is None or not _is_part(container, reading, shape.memory):
        return None
    return shape.memory


def _by(wanted: object, shape: ModelShape | None) -> str:
    return "the caller" if wanted is not None or shape is None else "the model"


def _blob_note(container: Container, reading: Reading) -> str:
    """Say what else would write the same, though nothing depends on it."""
    names = [name for name in PARTIAL if _is_part(container, reading, name)]
    if reading.layout.memory == "none":
        return "; there is no memory: the model has none, or its cache shares another's cells"
    if reading.layout.memory == "hybrid" and not container.old and not reading.layout.deferred:
        return "; hybrid_idx without an indexer writes and stores the same"
    if not names:
        return ""
    return f"; what PARTIAL_ONLY writes of {' or '.join(names)} would look the same"


def _can_index(reading: Reading) -> bool:
    """Tell whether the second cache has the cells of the first, and no more layers."""
    first, second = (m for m in reading.memories[:2] if isinstance(m, KvMemory))
    if len(first.streams) != len(second.streams):
        return False
    return all(
        np.array_equal(a.cells.positions, b.cells.positions) and len(a.keys) >= len(b.keys)
        for a, b in zip(first.streams, second.streams, strict=True)
    )


def _second_values_are_zero(
    reading: Reading, is_zero: Callable[[Rows], bool | None]
) -> bool | None:
    """Tell whether the values of the second cache are all zero; None if there are none."""
    caches = [m for m in reading.memories if isinstance(m, KvMemory)]
    found = None
    for rows in (r for s in caches[1].streams for r in s.values if r.cells):
        found = is_zero(rows)
        if not found:
            return found
    return found


# --- the model -----------------------------------------------------------------------------------


def model_misfit(container: Container, reading: Reading, shape: ModelShape) -> str | None:
    """Say why a reading cannot be a dump of the model; None if it can."""
    layout = reading.layout
    if layout.mrope and not shape.has_cell_record:
        return f"cells have M-RoPE coordinates, {shape.architecture} has none"
    if layout.program == "ik_llama":
        return _ik_misfit(reading, shape)
    partial = shape.memory is not None and _is_part(container, reading, shape.memory)
    mine = (n for n in reading.classes if n in classes_of(shape.architecture))
    memory = shape.memory if partial else next(mine, layout.memory)
    reason = _layers_misfit(reading, shape, memory, partial or layout.partial)
    return reason or (None if partial else _class_misfit(reading, shape))


def _layers_misfit(reading: Reading, shape: ModelShape, memory: Any, partial: bool) -> str | None:
    """Compare the layers of each part, and of all together, with the model's."""
    found, whole = 0, not partial
    for part, (named, held) in enumerate(
        zip(parts_of(memory, partial), reading.memories, strict=False)
    ):
        if isinstance(held, RecurrentMemory):
            if held.n_layer != shape.n_layer:
                return f"its recurrent memory counts {held.n_layer} layers, not {shape.n_layer}"
        elif isinstance(held, KvMemory) and not named.indexed:
            if memory == "kv" and len(held.streams[0].keys) in shape.other_counts:
                return None
            reason = _part_misfit(held, shape, memory, part, partial)
            if reason:
                return f"{named.name} {reason}"
            found += len(held.streams[0].keys)
            whole = whole and len(held.streams[0].cells) > 0
    own = len(shape.attention_layers)
    caches = any(isinstance(m, KvMemory) for m in reading.memories)
    if shape.certain and (found > own or (found < own and whole and caches)):
        return f"its caches hold {found} layers, {shape.architecture} has {own}"
    return None


def _part_misfit(
    held: KvMemory, shape: ModelShape, memory: str, part: int, partial: bool
) -> str | None:
    layers = shape.cache_layers(memory, part, partial)
    for stream in held.streams:
        if stream.keys and bool(stream.values) == shape.keys_only:
            have, need = ("V", "none") if shape.keys_only else ("no V", "some")
            return f"has {have} rows, {shape.architecture} needs {need}"
        if not len(stream.cells) or layers is None or not shape.certain:
            continue
        if shape.swa_assumed and memory != "kv":
            continue
        if len(stream.keys) != len(layers):
            have = f"holds {len(stream.keys)} layers"
            return f"{have}, {shape.architecture} has {len(layers)} there"
    return None


def _class_misfit(reading: Reading, shape: ModelShape) -> str | None:
    """Say that the architecture has another class; None if it can have one that fits."""
    own = classes_of(shape.architecture)
    if shape.architecture not in OF_ARCHITECTURE or reading.layout.memory == "none":
        return None
    if any(name in own for name in reading.classes):
        return None
    have = " or ".join(reading.classes)
    return f"the file has the sections of {have}, {shape.architecture} writes {own[0]}"


def _ik_misfit(reading: Reading, shape: ModelShape) -> str | None:
    (memory,) = reading.memories
    assert isinstance(memory, IkMemory)
    if len(memory.keys) < shape.n_layer:
        return (
            f"its cache counts {len(memory.keys)} layers, {shape.architecture} has {shape.n_layer}"
        )
    return None


def has_zero_values(rows: Rows, mapped: MappedFile, decode: Any) -> bool | None:
    """Tell whether the values of the first rows are all zero; None if that cannot be told.

    `decode` dequantises uint8 rows, and returns None for a type that it does not know.
    """
    n = min(rows.cells, max(1, LOOKED_AT_BYTES // max(1, rows.row_bytes)))
    raw = np.frombuffer(mapped, np.uint8, n * rows.row_bytes, rows.data)
    step = max(1, (1 << 20) // max(1, rows.row_bytes)) * rows.row_bytes
    for start in range(0, len(raw), max(1, step)):
        some = raw[start : start + step]
        if not some.any():
            continue
        values = decode(rows, some.reshape(-1, rows.row_bytes))
        if values is None:
            return None
        if (np.ascontiguousarray(values).view(np.uint32) & MAGNITUDE).any():  # NaN is not zero
            return False
    return True
