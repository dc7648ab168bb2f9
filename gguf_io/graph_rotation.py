"""Which rotation the attention graph applies to K and V before they are stored.

llama.cpp and llama-tq rotate the keys and values of a cache whose type is quantised: keys by the
widest Hadamard matrix that fits the head, values by Hadamard blocks of 64, and values that go into
llama-tq's vtq types by its own signed Hadamard blocks. They do not if heads of the cache differ in
width or are no multiple of 64, nor if LLAMA_ATTN_ROT_DISABLE is set when the program runs. Files do
not record which of these happened; only those of pull request 28498 state the sizes.

That is what a cache decides, and what the log says. The graph does not always carry it out:

    kv, iswa, hybrid with K and V   as decided, each cache by the width of its own heads
    keys alone (latent attention)   never: build_attn for an input of keys has no rotation
    iswa of keys alone              as decided
    hybrid_iswa                     never: its input makes no matrices
    msa                             the attention as decided; the indexer's keys never, and its
                                    values are zeros
    hybrid_idx                      the attention as in hybrid; the indexer never
    dsa, dsa_iswa                   latent keys never; the indexer's always, whatever the type and
                                    the environment, but in hy_v4, where the cache decides
    dsv4                            window, csa and hca as decided, lid always; all of them always
                                    if heads are as wide as the indexer's

The same holds for the trees of versions 9 and 2, and for llama-tq. The type that decides is the one
the user asked for: layers that a fork keeps in another type (llama-tq's boundary layers), and rows
of type f16 that llama-tq has staged until it quantises them, are rotated all the same.

Source: ggml-org/llama.cpp pull request 21089 @ f112d6de7 and 0c1e57098, LL4nc33/llama-tq @
0f57a4ee6: src/llama-kv-cache.cpp, src/llama-graph.cpp, src/models/; dumps of quantised caches
compared with unquantised ones of the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import tbq
from gguf_io.memory_classes import ALWAYS_ROTATED, Part, parts_of
from gguf_io.types import TensorType
from tbq import InputError, Rotation
from tbq.format import GGML
from tbq.registry import get_dialect

if TYPE_CHECKING:
    from gguf_io.cache_tensor import CacheTensor
    from gguf_io.model_shape import ModelShape

ROTATION_MODES = ("auto", "on", "off", "k", "v")
ROTATED_MULTIPLE = 64
AS_DECIDED, NEVER, ALWAYS = "decided", "never", "always"
SIDES = {"K": "keys", "V": "values"}


@dataclass(frozen=True)
class Graph:
    """What is known of the graph that stored the rows.

    Attributes:
        memory: the memory class.
        parts: its parts.
        keys_only: whether caches have no V.
        architecture: the model's, or the session file's.
        model: the model's shape.
        dialect: whose graph it was; None if nothing says so.
        staging: whether llama-tq was holding back rows of type f16 to quantise them later. It does
            not say whether those are the keys, the values or both.
        stated: sizes that the file states for K and V, by memory.
        candidates: other classes that may have written the file.
        indexer_like: whether heads of the attention are as wide as the indexer's.
    """

    memory: str = "kv"
    parts: tuple[Part, ...] = (Part("kv"),)
    keys_only: bool = False
    architecture: str | None = None
    model: ModelShape | None = None
    dialect: str | None = None
    staging: bool = False
    stated: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    indexer_like: bool = False


@dataclass(frozen=True)
class CacheRotation:
    """What the K or V of one cache are taken to be stored under.

    Attributes:
        side: "K" or "V".
        memory: index of the memory.
        part: its name.
        kind: a kind for `tbq.rotation`, or None.
        reason: why.
    """

    side: str
    memory: int
    part: str
    kind: str | None
    reason: str


@dataclass(frozen=True)
class RotationChoice:
    """The rotations that K and V are taken to be stored under.

    Attributes:
        caches: one entry per side and cache.
        unclear: whether the file leaves open which rows are rotated.
        question: what would settle that.
    """

    caches: tuple[CacheRotation, ...] = ()
    unclear: bool = False
    question: str = ""

    def of(self, tensor: CacheTensor) -> Rotation | None:
        """Return the rotation that the rows of a view are stored under."""
        kind = self.kind(tensor.kind, tensor.memory)
        return tbq.rotation(kind, tensor.head_dim) if kind and tensor.head_dim else None

    def kind(self, side: str, memory: int) -> str | None:
        """Return the kind of a side of a cache."""
        found = (c.kind for c in self.caches if (c.side, c.memory) == (side, memory))
        return next(found, None)

    @property
    def keys(self) -> str | None:
        """The rotation of keys, in the first cache that has one."""
        return next((c.kind for c in self.caches if c.side == "K" and c.kind), None)

    @property
    def values(self) -> str | None:
        """The rotation of values, in the first cache that has one."""
        return next((c.kind for c in self.caches if c.side == "V" and c.kind), None)

    @property
    def reason(self) -> str:
        """One sentence for the user."""
        said: dict[tuple[Any, ...], list[str]] = {}
        for c in self.caches:
            said.setdefault((c.side, c.kind, c.reason), []).append(c.part)
        texts = []
        for (side, kind, reason), parts in said.items():
            several = sum(key[0] == side for key in said) > 1
            of = f" of {', '.join(parts)}" if several else ""
            texts.append(f"{SIDES[side]}{of} {kind or 'not rotated'}: {reason}")
        text = "; ".join(texts) or "no keys or values"
        return f"{text}; {self.question}" if self.question else text


def rotation_kind(kind: str, types: Sequence[TensorType], dialect: str | None = None) -> str | None:
    """Return which rotation a dialect's graph applies to the K or V of a cache of these types.

    Without a dialect it is that of the types, else upstream's.
    """
    own = [t.dialect for t in types if t.dialect not in (None, GGML)]
    dialect = dialect or (own[0] if own else GGML)
    return get_dialect(dialect).rotation.kind(kind, types)


def conduct(graph: Graph, part: Part, side: str) -> tuple[str, str]:
    """Return what the graph does to a side of a cache, whatever the cache decides, and why."""
    if graph.memory == "hybrid_iswa":
        return NEVER, "the graph of hybrid_iswa makes no rotation, whatever the log says"
    if part.name == "idx":
        return NEVER, "the indexer's, which the graph stores as they are"
    if part.name == "lid" and graph.memory == "dsv4":
        return ALWAYS, "the indexer's, always"
    if part.name == "lid":
        if graph.architecture is None or graph.architecture in ALWAYS_ROTATED:
            return ALWAYS, "the indexer's, always: whatever the type is and the environment says"
        return AS_DECIDED, ""
    if graph.memory == "dsv4" and graph.indexer_like:
        return ALWAYS, "heads are as wide as the indexer's, so always"
    if graph.memory == "dsv4":
        return AS_DECIDED, ""
    if side == "K" and graph.keys_only and graph.memory != "iswa":
        return NEVER, "latent keys: the graph has no rotation for keys alone, whatever the log says"
    return AS_DECIDED, ""


def choose_rotation(
    mode: str,
    tensors: Sequence[CacheTensor],
    graph: Graph,
    formats: Mapping[str, TensorType] | None = None,
) -> RotationChoice:
    """Decide what K and V of a dump are stored under.

    Args:
        mode: "auto", "on", "off", "k" (only keys) or "v" (only values).
        tensors: the views of the dump.
        graph: what stored them.
        formats: other types than the tensors have, by name.

    Raises:
        InputError: no such mode; or a rotation is demanded that no fork applies to such heads.
    """
    if mode not in ROTATION_MODES:
        raise InputError("rotation", repr(mode), f"one of {', '.join(ROTATION_MODES)}")
    graph = replace(graph, indexer_like=_indexer_like(graph, tensors))
    sides = {
        side: _Side(side, [t for t in tensors if t.kind == side], graph, formats or {})
        for side in SIDES
    }
    found: list[CacheRotation] = []
    for side, other in (("K", "V"), ("V", "K")):
        if sides[side].tensors:
            found += _side_rotations(mode, sides[side], sides[other])
    plain = sides["K"].plain and sides["V"].plain
    unclear = graph.staging and plain and mode == "auto"
    question = _class_question(mode, sides.values(), graph)
    return RotationChoice(tuple(found), unclear or bool(question), question)


def _indexer_like(graph: Graph, tensors: Sequence[CacheTensor]) -> bool:
    """Tell whether heads are as wide as the indexer's, by the model or else by the rows."""
    if graph.model is not None:
        return graph.model.indexer_width == graph.model.head_dim_k[0]
    widths: dict[str, set[int]] = {"lid": set(), "swa": set()}
    for t in tensors:
        if t.kind == "K" and t.head_dim:
            widths.get(graph.parts[t.memory].name, set()).add(t.head_dim)
    return bool(widths["lid"]) and widths["lid"] == widths["swa"]


class _Side:
    """The K or the V of all caches."""

    def __init__(
        self,
        side: str,
        tensors: list[CacheTensor],
        graph: Graph,
        formats: Mapping[str, TensorType],
    ) -> None:
        self.side, self.tensors, self.graph = side, tensors, graph
        self.types = [formats.get(t.name, t.format) for t in tensors]
        self.plain = not any(t.is_quantized for t in self.types)
        self.staged = graph.staging and self.plain
        self.memories = sorted({t.memory for t in tensors})

    @property
    def kind(self) -> str | None:
        """The rotation that the dialect's graph has for it."""
        if self.staged and self.side == "V":
            return get_dialect(self.graph.dialect or GGML).rotation.rotated_values
        return rotation_kind(self.side, self.types, self.graph.dialect)

    @property
    def optional(self) -> bool:
        """Whether the dialect's graph rotates only if it is told to."""
        return get_dialect(self.graph.dialect or GGML).rotation.optional

    def widths(self, memory: int) -> set[int]:
        """Return the widths of the heads of a cache."""
        return {t.head_dim for t in self.tensors if t.memory == memory and t.head_dim}


def _side_rotations(mode: str, mine: _Side, other: _Side) -> list[CacheRotation]:
    """Return the rotation of one side of every cache."""
    decided, why = _decision(mode, mine, other)
    graph, kind = mine.graph, mine.kind
    found, refused = [], []
    for memory in mine.memories:
        part = graph.parts[memory]
        rotates, reason = decided, why
        if memory in graph.stated and mode == "auto":
            rotates, reason = _stated(graph.stated[memory], mine, memory)
        does, because = conduct(graph, part, mine.side)
        if does == NEVER:
            refused += [because] if rotates else []
            rotates, reason = False, because
        elif does == ALWAYS:
            rotates, reason = True, because
        unfit = _unfit(mine, memory, part)
        if rotates and unfit:
            refused.append(f"heads that are rotated, not {unfit}")
            rotates, reason = False, f"heads are {unfit}"
        if rotates and kind is None:
            need = f"none: the graph of {graph.dialect or mine.types[0].dialect} has none"
            refused.append(need)
            reason = need.replace("none: the graph", "the graph").replace(" has none", "")
            rotates, reason = False, f"{reason} rotates nothing before it is stored"
        found.append(CacheRotation(mine.side, memory, part.name, kind if rotates else None, reason))
    asked = mode == "on" or mode == mine.side.lower()
    if asked and refused and not any(c.kind for c in found):
        raise InputError("rotation", repr(mode), refused[0])
    return found


def _decision(mode: str, mine: _Side, other: _Side) -> tuple[bool, str]:
    """Return whether caches decide to rotate a side, and why."""
    if mode != "auto":
        return mode in ("on", mine.side.lower()), "as told"
    if mine.optional:
        return False, f"off unless {mine.graph.dialect} is told to; rotation= says so"
    if not mine.plain:
        names = dict.fromkeys(t.name for t in mine.types if t.is_quantized)
        return True, f"the default for {', '.join(names)} caches"
    if mine.staged and not other.plain:
        return True, "these rows wait to be quantised (deferred state: staging)"
    if mine.staged:
        reason = "assumed, as keys, values or both wait to be quantised; rotation= decides"
        return mine.side == "K", reason
    return False, "the type is not quantised"


def _stated(sizes: tuple[int, int], mine: _Side, memory: int) -> tuple[bool, str]:
    """Return what the sizes in the file say."""
    size = sizes["KV".index(mine.side)]
    if not size:
        return False, "the file states no rotation"
    own = {tbq.rotation(mine.kind, n).size for n in mine.widths(memory) if _whole(n) and mine.kind}
    note = "" if own in (set(), {size}) else f", though {sorted(own)} would be usual"
    return own == {size}, f"the file states a rotation of {size}{note}"


def _whole(width: int) -> bool:
    return width % ROTATED_MULTIPLE == 0


def _unfit(mine: _Side, memory: int, part: Part) -> str | None:
    """Say which heads of a cache forbid a rotation; None if none do."""
    widths = sorted(mine.widths(memory))
    if len(widths) > 1:
        return f"of several widths, {widths}"
    unfit = [n for n in widths if not _whole(n)]
    if unfit:
        return f"{unfit[0]} values wide, no multiple of {ROTATED_MULTIPLE}"
    model = mine.graph.model
    if model is None or part.indexed or mine.graph.memory == "dsv4":
        return None
    first = model.head_dim(mine.side, 0)
    if first and not _whole(first):
        return f"{first} values wide in layer 0, no multiple of {ROTATED_MULTIPLE}"
    return None


def _class_question(mode: str, sides: Any, graph: Graph) -> str:
    """Say what has to be asked where classes that may have written the file rotate differently."""
    if not graph.candidates:
        return ""
    conducts = {}
    for name in graph.candidates:
        own = Graph(name, parts_of(name), graph.keys_only, graph.architecture)
        conducts[name] = [
            conduct(own, own.parts[memory], side.side)[0]
            for side in sides
            for memory in side.memories
        ]
    if len({tuple(c) for c in conducts.values()}) < 2:
        return ""
    return (
        f"assumed as of {graph.memory}: {' and '.join(graph.candidates)} write the same bytes and "
        "rotate differently; memory= or model= decides"
    )
