"""Views of what a state file holds: layer numbers, heads, names, one CacheTensor per layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from gguf_io.cache_tensor import CacheTensor
from gguf_io.graph_rotation import RotationChoice
from gguf_io.identify import DialectChoice
from gguf_io.mapped import MappedFile
from gguf_io.memory_classes import Part
from gguf_io.model_shape import ModelShape
from gguf_io.state_records import (
    CompressedMemory,
    IkMemory,
    KvMemory,
    Layout,
    Memory,
    RecurrentMemory,
    Rows,
)
from gguf_io.types import TensorType, Unknown
from tbq import FileFormatError, Format, InputError
from tbq.registry import get_dialect

# Assumed where neither the caller nor a model says: most models have it.
USUAL_HEAD_DIMS = (128, 64)
ABSENT = -1
COUNTED = (
    "; layers are counted from 0 in each cache, since which of the model's attend to a window is "
    "not known"
)


class HeadWidth(NamedTuple):
    """Values per head of K or V.

    Attributes:
        own: the model's.
        stored: those in a row, with what the fork's cache pads them to.
        told: whether the caller or the model said so; else it is assumed.
    """

    own: int
    stored: int
    told: bool


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
        known = None
        if self.model is not None:
            known = self.model.cache_layers(self.layout.memory, part, self.layout.partial)
        self.counted = self.model is not None and count > 0 and len(known or ()) != count
        return list(range(count)) if known is None or len(known) != count else known

    def recurrent_layers(self, memory: RecurrentMemory) -> list[int]:
        """Return the layer numbers of the layers that have recurrent state."""
        count = len(memory.r)
        if count == memory.n_layer or self.model is None:
            return list(range(count))
        known = [il for il, recurrent in enumerate(self.model.is_recurrent) if recurrent]
        return known if len(known) == count else list(range(count))

    def width(self, kind: str, layer: int, n_embd: int, fmt: TensorType) -> HeadWidth:
        """Return how wide the heads of a row are.

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
            return HeadWidth(given, width, True)
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
                return HeadWidth(width, whole, True)
        if not self.layout.values:
            self.reason = f"head_dim {n_embd} is assumed: latent keys are one head per row"
            return HeadWidth(n_embd, n_embd, False)
        width = next((n for n in USUAL_HEAD_DIMS if n_embd % n == 0), n_embd)
        self.reason = (
            f"head_dim {width} is assumed: the file does not say; model= or head_dim= does"
        )
        return HeadWidth(width, width, False)

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


@dataclass(frozen=True)
class _Layer:
    """The records of one tensor, before it is one."""

    part: int
    name: str
    kind: str
    layer: int
    records: tuple[Rows, ...]
    one_head: bool = False


def cache_tensors(
    mapped: MappedFile,
    memories: tuple[Memory, ...],
    parts: tuple[Part, ...],
    choice: DialectChoice,
    heads: Heads,
) -> list[CacheTensor]:
    """Return a view of every layer, without rotations.

    Raises:
        FileFormatError: streams or records contradict each other, the model or the types.
        InputError: the head_dim that was given does not divide a row.
    """
    tensors: list[CacheTensor] = []
    before: CacheTensor | None = None
    for entry in _layers(memories, parts, heads):
        follows = before is not None and (before.memory, before.kind) == (entry.part, entry.kind)
        before = _view(mapped, entry, choice, heads, before if follows else None)
        tensors.append(before)
    return tensors


def _layers(
    memories: tuple[Memory, ...], parts: tuple[Part, ...], heads: Heads
) -> Iterator[_Layer]:
    """Yield the layers of every memory, in the order of the file."""
    for at, (part, memory) in enumerate(zip(parts, memories, strict=True)):
        if isinstance(memory, RecurrentMemory):
            yield from _states(at, memory, heads)
        elif isinstance(memory, CompressedMemory):
            yield from _compressed(at, memory)
        elif isinstance(memory, IkMemory):
            yield from _ik(at, memory)
        else:
            yield from _caches(at, part, memory, heads)


def _caches(at: int, part: Part, memory: KvMemory, heads: Heads) -> Iterator[_Layer]:
    streams = [stream for stream in memory.streams if len(stream.cells)]
    if len({(len(s.keys), len(s.values), s.v_trans) for s in streams}) > 1:
        raise FileFormatError(heads.path, None, "streams differ in their number of layers")
    for kind, records in (
        ("K", [stream.keys for stream in streams]),
        ("V", [stream.values for stream in streams]),
    ):
        by_layer = list(zip(*records, strict=True))
        for layer, rows in zip(heads.layers(at, len(by_layer)), by_layer, strict=True):
            name = f"{part.stem}{kind.lower()}_l{layer}"
            yield _Layer(at, name, kind, layer, tuple(rows), part.indexed)


def _states(at: int, memory: RecurrentMemory, heads: Heads) -> Iterator[_Layer]:
    layers = heads.recurrent_layers(memory)
    for kind, records in (("R", memory.r), ("P", memory.p), ("S", memory.s)):
        for layer, rows in zip(layers, records, strict=True):
            if rows is not None:
                yield _Layer(at, f"cache_{kind.lower()}_l{layer}", kind, layer, (rows,))


def _compressed(at: int, memory: CompressedMemory) -> Iterator[_Layer]:
    cache = memory.name.removesuffix("_state")
    what = {"K": "cache_k", "R": "state_kv", "S": "state_score"}
    for layer, records in zip(memory.layers, memory.records, strict=True):
        for rows in records:
            name = f"{cache}.{what[rows.kind]}_l{layer}"
            yield _Layer(at, name, rows.kind, layer, (rows,), rows.kind == "K")


def _ik(at: int, memory: IkMemory) -> Iterator[_Layer]:
    """Yield the layers of ik_llama.cpp, which writes all and so numbers them."""
    for records in (memory.keys, memory.values, memory.linear or ()):
        for layer, rows in enumerate(records):
            if rows.type_id != ABSENT:
                name = f"cache_{rows.kind.lower()}_l{layer}"
                yield _Layer(at, name, rows.kind, layer, (rows,))
    present = [il for il, rows in enumerate(memory.keys) if rows.type_id != ABSENT]
    for layer, rows in zip(present, memory.indexer or (), strict=memory.indexer is not None):
        yield _Layer(at, f"idx.cache_k_l{layer}", rows.kind, layer, (rows,), True)


def _view(
    mapped: MappedFile,
    entry: _Layer,
    choice: DialectChoice,
    heads: Heads,
    before: CacheTensor | None,
) -> CacheTensor:
    first, kind = entry.records[0], entry.kind
    same = {(r.type_id, r.row_bytes) for r in entry.records}
    if len(same) > 1:
        reason = f"layer {entry.layer} changes its {kind} type from stream to stream"
        raise FileFormatError(heads.path, first.where, reason)
    fmt = choice.type_of(first.type_id)
    n_embd = _row_values(fmt, first)
    if n_embd is None and isinstance(fmt, Format):
        reason = f"layer {entry.layer} has {kind} rows of {first.row_bytes} bytes"
        reason += f", not whole groups of {fmt.label}"
        raise FileFormatError(heads.path, first.where, reason)
    width = None
    if n_embd and kind in "KV":
        whole_row = HeadWidth(n_embd, n_embd, False)
        one = entry.one_head
        width = whole_row if one else heads.width(kind, entry.layer, n_embd, fmt)
    if isinstance(fmt, Format) and kind in "KV":
        fmt = fmt.fitting(head_dim=width and width.own, side=kind)
    lender = fmt.sibling if isinstance(fmt, Format) else None
    sibling = before if lender and before and before.format.label == lender else None
    return CacheTensor(
        name=entry.name,
        kind=kind,
        memory=entry.part,
        layer=entry.layer,
        format=fmt,
        parts=entry.records,
        transposed=first.form == "columns",
        n_embd=n_embd,
        head_dim=width and width.own,
        stored_head=width and width.stored,
        head_told=width is not None and width.told,
        rotation=None,
        sibling=sibling,
        _map=mapped,
        _choice=choice,
    )


def _row_values(fmt: TensorType, rows: Rows) -> int | None:
    """Return the values per row; None if whole groups do not make it up, or it is unknown."""
    if isinstance(fmt, Unknown):
        return None
    body = rows.row_bytes - fmt.layout.header_bytes
    groups, rest = divmod(body, fmt.codec.group_blocks * fmt.block_bytes)
    return None if rest or groups < 0 else groups * fmt.group_values


def rotated(tensors: list[CacheTensor], choice: RotationChoice) -> list[CacheTensor]:
    """Return the views with the rotation that each is stored under."""
    done: dict[str, CacheTensor] = {}
    for t in tensors:
        sibling = done[t.sibling.name] if t.sibling is not None else None
        done[t.name] = replace(t, rotation=choice.of(t), sibling=sibling)
    return list(done.values())
