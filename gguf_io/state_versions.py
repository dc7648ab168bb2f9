"""The same dump under another version of llama.cpp's state files: 9/2 or 10/3.

The versions differ in the number itself and in the cells of M-RoPE models, which got a token beside
x and y. Going up, the token comes from the file's list: position p of text is token p, and cells
of images have -1. Going back drops it. Version 10/3 has memory classes and rows that 9/2 has not;
those are refused. Cells that a window hides stay or stay away: both load in both.

Source: ggml-org/llama.cpp pull requests 21089 and 27762: src/llama-kv-cache.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gguf_io.memory_classes import CLASSES
from gguf_io.state import StateFile
from gguf_io.state_records import Cells, KvMemory, Memory, RecurrentMemory
from tbq import AmbiguousTypeError, InputError

VERSIONS = {9: {"session": 9, "sequence": 2}, 10: {"session": 10, "sequence": 3}}
RECORD = {9: 8, 10: 12}
UNKNOWN_TOKEN = -1


@dataclass(frozen=True, eq=False)
class VersionChange:
    """How a file is written under another version.

    Attributes:
        number: the file's new version, None for blobs, which have none.
        words: the tokens' words if they become others.
        cell_bytes: bytes of a cell's record, where cells have one.
        notes: what the user should know, one sentence each.
    """

    number: int | None
    words: bytes | None
    cell_bytes: int
    notes: tuple[str, ...]
    _state: StateFile

    def memory(self, memory: Memory) -> Memory:
        """Return a memory with the cells of the new version."""
        if not isinstance(memory, KvMemory):
            return memory
        streams = tuple(replace(s, cells=self._cells(s.cells)) for s in memory.streams)
        return replace(memory, streams=streams)

    def _cells(self, cells: Cells) -> Cells:
        if not cells.has_coordinates or cells.cell_bytes == self.cell_bytes:
            return cells
        return cells.with_record(self.cell_bytes, cell_tokens(self._state, cells))


def change_version(state: StateFile, version: int) -> VersionChange:
    """Decide how a file is written under session version 9 or 10 (sequence version 2 or 3).

    Raises:
        InputError: no such version, or the file holds what that version has not.
        AmbiguousTypeError: whether it does depends on the memory class, which is not known.
    """
    if version not in VERSIONS:
        raise InputError("state version", str(version), "9 or 10")
    _refuse_others(state, version)
    if version == 9:
        _refuse_new(state)
    container, notes = state.container, []
    words = None
    if version == 9 and container.slot is not None:
        if container.slot.media:
            need = "tokens without media: servers of that version had no packed lists"
            raise InputError("source", f"{len(container.slot.media)} media among its tokens", need)
        words = container.slot.tokens.astype("<i4").tobytes()
        notes.append("llama-server's packed token list becomes a plain one")
    number = None if container.version is None else VERSIONS[version][container.kind]
    change = VersionChange(number, words, RECORD[version], (), state)
    return replace(change, notes=(*notes, *_cell_notes(state, change)))


def _refuse_others(state: StateFile, version: int) -> None:
    """Refuse files of programs that have no such versions."""
    layout, need = state.layout, "a file as llama.cpp lays it out"
    if layout.program == "ik_llama":
        raise InputError("source", "a dump of ik_llama.cpp, whose versions are its own", need)
    if state.container.long_header or state.container.envelope is not None:
        raise InputError("source", "a slot file of buun, whose versions are its own", need)
    if layout.deferred and version > 9:
        got = "a dump with llama-tq's deferred-state byte, which no later version has"
        raise InputError("source", got, need)
    if layout.rotation_words or not layout.streams:
        raise InputError("source", f"a dump of {layout}, which neither version writes", need)
    if state.container.appendix is not None:
        name = state.container.appendix.name
        raise InputError("source", f"a dump with an appendix: {name}", "a dump without one")


def _refuse_new(state: StateFile) -> None:
    """Refuse what versions 9 and 2 have not."""
    candidates = state.class_candidates or (state.layout.memory,)
    new = [name for name in candidates if name in CLASSES and not CLASSES[name].old]
    if new and len(new) < len(candidates):
        raise AmbiguousTypeError(str(state.path), candidates, "pass memory= or model=")
    if new:
        need = "a memory class that version 9 has, from kv to hybrid_iswa"
        raise InputError("source", f"a dump of {new[0]}", need)
    states = [m for m in state.memories if isinstance(m, RecurrentMemory)]
    if any(rows is not None for m in states for rows in m.p):
        raise InputError("source", "a dump with PLE states", "recurrent rows without, as version 9")


def _cell_notes(state: StateFile, change: VersionChange) -> list[str]:
    """Say what becomes of the tokens of cells."""
    cells = [
        stream.cells
        for memory in state.memories
        if isinstance(memory, KvMemory)
        for stream in memory.streams
        if stream.cells.has_coordinates and stream.cells.cell_bytes != change.cell_bytes
    ]
    if not cells:
        return []
    total = sum(map(len, cells))
    if change.cell_bytes == RECORD[9]:
        return [f"the tokens of {total} M-RoPE cells are dropped: version 9 has none"]
    unknown = sum(int((cell_tokens(state, c) == UNKNOWN_TOKEN).sum()) for c in cells)
    known = f"the tokens of {total - unknown} M-RoPE cells are those of the file's list"
    text = f"{known}, {unknown} get -1: cells of images, of other sequences, or without a token"
    return [text if unknown else known]


def _listed_sequence(state: StateFile) -> int:
    """Return the sequence that the list is taken to be of: the lowest."""
    found = [
        int(stream.cells.sequences.min())
        for memory in state.memories
        if isinstance(memory, KvMemory)
        for stream in memory.streams
        if len(stream.cells.sequences)
    ]
    return min(found, default=0)


def cell_tokens(state: StateFile, cells: Cells) -> np.ndarray:
    """Return the token of each cell as far as the file's list tells, int32 (cells,), else -1.

    The list is that of the lowest sequence. Without media its n-th token is at position n; with
    some it is matched in the order of positions, if there are as many cells as tokens.
    """
    found = np.full(len(cells), UNKNOWN_TOKEN, np.int32)
    listed = state.container.token_list
    if listed is None or not len(listed) or not len(cells):
        return found
    counts = cells.sequence_counts.astype(np.int64)
    owner = np.repeat(np.arange(len(cells)), counts)
    own = np.zeros(len(cells), bool)
    own[owner[cells.sequences == _listed_sequence(state)]] = True
    positions = cells.positions
    media = np.flatnonzero(listed == UNKNOWN_TOKEN)
    if len(media) and own.sum() == len(listed):
        mine = np.flatnonzero(own)
        found[mine[np.argsort(positions[mine], kind="stable")]] = listed
        return found
    end = int(media[0]) if len(media) else len(listed)
    known = own & (positions >= 0) & (positions < end)
    found[known] = listed[positions[known]]
    return found
