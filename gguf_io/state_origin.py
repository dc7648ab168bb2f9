"""Which program wrote a state file, how that shows, and which llama.cpp would load it.

(magic, version) says neither: GGSN 10 is llama.cpp's or ik_llama.cpp's, GGSQ 3 llama.cpp's or
buun's, GGSQ 4 llama.cpp's or ik_llama.cpp's, and forks write 9 and 2 with bytes of their own. The
bytes do. llama.cpp in turn compares the version for equality before it looks at anything else.

Source: ggml-org/llama.cpp @ 0c1e57098, src/llama-context.cpp; releases v0.6.0 and v1.0.0.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf_io.memory_classes import CLASSES
from gguf_io.state import StateFile
from gguf_io.state_records import KvMemory
from gguf_io.state_versions import change_version
from gguf_io.types import Unknown
from tbq import TbqError
from tbq.format import GGML
from tbq.registry import get_dialect


@dataclass(frozen=True)
class Loads:
    """Whether a program would load a file: True, False, or None where that is not known."""

    program: str
    loads: bool | None
    reason: str


@dataclass(frozen=True)
class Origin:
    """What wrote a file.

    Attributes:
        program: the likeliest program.
        reasons: how that shows, one phrase each.
        loads: which llama.cpp would load it.
    """

    program: str
    reasons: tuple[str, ...]
    loads: tuple[Loads, ...]


@dataclass(frozen=True)
class _Tree:
    """A time of llama.cpp: its versions, and bytes of the record of M-RoPE cells."""

    name: str
    session: int
    sequence: int
    cell_bytes: int | None

    def version(self, kind: str) -> int:
        return self.session if kind == "session" else self.sequence


TREES = (
    _Tree("llama.cpp to 2026-08-26 (versions 9 and 2)", 9, 2, 8),
    _Tree("llama.cpp 0.5, 2026-08-26 to 2026-10-05 (10 and 3)", 10, 3, 12),
    _Tree("llama.cpp 0.6, since 2026-10-05 (11 and 4)", 11, 4, None),
)
LATER = "what it writes was not seen"


def origin(state: StateFile) -> Origin:
    """Say which program wrote a file, why that is thought, and which llama.cpp would load it."""
    program, reasons = _program(state)
    return Origin(program, tuple(reasons), tuple(_loads(state, tree) for tree in TREES))


# --- who wrote it --------------------------------------------------------------------------------


def _program(state: StateFile) -> tuple[str, list[str]]:
    container, layout = state.container, state.layout
    if layout.program == "ik_llama":
        reasons = ["no number of streams, and v_state and all layers of the model in their place"]
        if state.reading.lead is not None:
            reasons.append("random state and outputs before the cache")
        return "ik_llama.cpp", reasons
    if container.long_header:
        reasons = ["the header has 24 bytes, and the size and checksum in it are right"]
        reasons += ["a BUUNSLOT envelope around the tokens"] if container.envelope else []
        return "buun-llama-cpp (spiritbuun)", reasons
    caches = [m for m in state.memories if isinstance(m, KvMemory)]
    if layout.deferred:
        return "llama-tq (LL4nc33)", ["each KV starts with the deferred-state byte"]
    if any(s.fingerprint is not None for m in caches for s in m.streams):
        return "buun-llama-cpp (spiritbuun)", ["a TQCF footer after a stream"]
    reasons = _age(state)
    if state.dialect not in (None, GGML):
        own = dict.fromkeys(
            t.format.name
            for t in state.tensors.values()
            if not (t.format.is_ggml or isinstance(t.format, Unknown))
        )
        if own:
            title = get_dialect(state.dialect).title
            return title, [f"types {', '.join(own)}", *reasons]
    unknown = [t for t in state.tensors.values() if isinstance(t.format, Unknown)]
    if unknown:
        return "a fork of llama.cpp", [f"type id {unknown[0].type_id}, which it has not", *reasons]
    return "llama.cpp, or a fork of it with llama.cpp's types", reasons


def _age(state: StateFile) -> list[str]:
    """Say how old the tree is, as far as the bytes tell."""
    container, layout = state.container, state.layout
    found = []
    if container.version is not None:
        tree = next((t for t in TREES if t.version(container.kind) == container.version), None)
        text = f"version {container.version}" + (f", as {tree.name}" if tree else "")
        if container.newer:
            text += "; newer than what this program was checked with, but its bytes are explained"
        found.append(text)
    new = layout.memory in CLASSES and not CLASSES[layout.memory].old
    if new and not state.class_candidates:
        found.append(f"memory class {layout.memory}, which trees before 10 and 3 have not")
    record = {8: "of the trees to 9 and 2", 12: "of the trees from 10 and 3 on"}
    if any(c.has_coordinates for m in range(len(state.memories)) for c in state.cells(m)):
        text = f"cells with a record of {layout.cell_bytes} bytes, {record[layout.cell_bytes]}"
        if container.version is not None and (layout.cell_bytes == 8) != container.old:
            text += ", although the version is another"
        found.append(text)
    if layout.rotation_words:
        found.append("rotation sizes after the layer count, as pull request 28498 writes them")
    if not layout.streams:
        found.append("no number of streams, as trees before there were several")
    if container.slot is not None:
        found.append("llama-server's packed token list, written since 2026-08")
    if container.appendix is not None:
        found.append(f"after the memory: {container.appendix.name}")
    if container.sequence_id is not None:
        found.append("a blob of llama_state_seq_get_data with its magic")
    return found or ["a blob, which says nothing of who wrote it"]


# --- who loads it --------------------------------------------------------------------------------


def _loads(state: StateFile, tree: _Tree) -> Loads:
    refusals = _refusals(state, tree)
    if refusals:
        return Loads(tree.name, False, "; ".join(refusals))
    if tree.cell_bytes is None:
        return Loads(tree.name, None, LATER)
    same = "into a context of the same model, cache types and streams"
    if any(t.format.is_quantized for t in state.tensors.values() if t.kind in "KV"):
        same += "; it does not check whether that rotates as this file's did"
    return Loads(tree.name, True, same)


def _convertible(state: StateFile, tree: _Tree) -> bool:
    """Tell whether `change_version` writes the file for a tree."""
    try:
        change_version(state, tree.session)
    except TbqError:
        return False
    return True


def _refusals(state: StateFile, tree: _Tree) -> list[str]:
    """Say why a tree would not load a file, the first reason first."""
    container, layout = state.container, state.layout
    found = []
    if layout.program == "ik_llama":
        return ["its layout is ik_llama.cpp's"]
    if container.long_header:
        return ["its header of 24 bytes is buun's"]
    if container.version is not None and container.version != tree.version(container.kind):
        found.append(f"it wants version {tree.version(container.kind)}")
        found[-1] += f" (--state-version {tree.session} writes it)" * _convertible(state, tree)
    if layout.deferred:
        found.append("the deferred-state byte is llama-tq's")
    if tree.cell_bytes is None:
        return found
    alien = [t.format.label for t in state.tensors.values() if not t.format.is_ggml]
    if alien:
        found.append(f"it has no type {alien[0]}")
    if layout.mrope and layout.cell_bytes != tree.cell_bytes:
        found.append(f"its M-RoPE cells have a record of {tree.cell_bytes} bytes")
    own = CLASSES.get(layout.memory)
    if own is not None and not own.old and tree.session < 10 and not state.class_candidates:
        found.append(f"it has no {layout.memory}")
    if layout.rotation_words:
        found.append("it knows no rotation sizes in files")
    if not layout.streams:
        found.append("it wants a number of streams")
    if container.slot is not None and tree.session < 10:
        found.append("its llama-server knows no packed token list")
    return found
