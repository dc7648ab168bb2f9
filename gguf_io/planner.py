"""How many bytes the memory of a model takes in llama.cpp, exactly, for any types of K and V.

`gguf_io.cache_shapes` says which caches there are; here they get cells (`Context`) and types
(`uniform`, `by_layer`), and so bytes. All sizes are integers.

Source: ggml-org/llama.cpp @ 0c1e57098, llama-context.cpp (padding of the context),
llama-kv-cache.cpp, llama-kv-cache-iswa.cpp, llama-kv-cache-dsv4.cpp, llama-memory-recurrent.cpp.
Staging: LL4nc33/llama-tq @ 0f57a4ee6, llama-kv-cache.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import tbq
from gguf_io.cache_shapes import CacheLayer, CachePart, CacheShapes
from gguf_io.state_writer import CACHE_TYPES
from tbq import Format, InputError
from tbq.registry import get_dialect

CELL_PAD = 256
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
MAX_TOKENS = (1 << 32) - 1 - CELL_PAD
FLOAT32_BYTES = 4
UPSTREAM = tbq.format.GGML


def padded(n: int, unit: int = CELL_PAD) -> int:
    """Return n rounded up to whole units."""
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Context:
    """What llama.cpp is asked for; the names are those of its parameters.

    Attributes:
        n_ctx: tokens, of all sequences together unless unified.
        n_parallel: sequences.
        n_ubatch: tokens that are evaluated together.
        kv_unified: whether all sequences share one stream of cells.
        swa_full: whether caches of windows are as long as the others.
        flash_attn: whether V is stored by rows; without it, transposed and as wide in every layer.
    """

    n_ctx: int
    n_parallel: int = 1
    n_ubatch: int = 512
    kv_unified: bool = False
    swa_full: bool = False
    flash_attn: bool = True

    def __post_init__(self) -> None:
        _require("n_ctx", self.n_ctx, MAX_TOKENS)
        _require("n_parallel", self.n_parallel, MAX_SEQUENCES)
        _require("n_ubatch", self.n_ubatch, MAX_TOKENS)

    @property
    def n_ctx_seq(self) -> int:
        """Cells of a stream that holds the whole context."""
        n_ctx = padded(self.n_ctx)
        return n_ctx if self.kv_unified else padded(n_ctx // self.n_parallel)

    def streams(self, part: CachePart) -> int:
        """Return how many streams a cache has."""
        return 1 if self.kv_unified and not part.per_sequence else self.n_parallel

    def cells(self, part: CachePart, window: int) -> int:
        """Return the cells of one stream of a cache, as llama.cpp prints them."""
        size = self.n_ctx_seq
        if part.ratio > 1:
            return padded(-(-size // part.ratio))
        if not part.windowed or self.swa_full:
            return size
        shared = self.n_parallel if self.streams(part) == 1 and self.kv_unified else 1
        return padded(min(size, window * shared + self.n_ubatch))


def _require(name: str, value: int, most: int) -> None:
    if not 0 < value <= most:
        raise InputError(name, str(value), f"1 to {most}")


@dataclass(frozen=True)
class Types:
    """The type of K and of V in one layer."""

    k: Format
    v: Format


# Which types a layer of a cache has; `(part, layer) -> Types`.
Choice = Callable[[CachePart, CacheLayer], Types]


def uniform(type_k: Format, type_v: Format) -> Choice:
    """Return the choice of one type for K and one for V."""
    types = Types(type_k, type_v)
    return lambda part, layer: types


def by_layer(types: Mapping[int, Types], default: Types) -> Choice:
    """Return the choice of types by the number of the layer."""
    return lambda part, layer: types.get(layer.number, default)


def boundary(shapes: CacheShapes, first: int, last: int) -> set[int]:
    """Return the first and the last layers, of those that have a cache."""
    layers = shapes.cached_layers
    return {*layers[:first], *layers[len(layers) - min(last, len(layers)) :]}


# --- rows ----------------------------------------------------------------------------------------


def row_values(fmt: Format, heads: int, head_dim: int) -> int:
    """Return the values of a cache row, with the padding of heads that the format's fork adds."""
    return heads * get_dialect(fmt.dialect).state.head_values(fmt, head_dim)


def row_bytes(fmt: Format, heads: int, head_dim: int, side: str) -> int:
    """Return the bytes of a cache row.

    Raises:
        InputError: blocks do not divide it.
    """
    values = row_values(fmt, heads, head_dim)
    return fmt.fitting(head_dim=head_dim, side=side).row_bytes(values) if values else 0


def k_row_bytes(fmt: Format, layer: CacheLayer) -> int:
    """Return the bytes of a row of K."""
    return row_bytes(fmt, layer.heads, layer.head_k, "K")


def v_row_bytes(fmt: Format, part: CachePart, layer: CacheLayer, flash_attn: bool) -> int:
    """Return the bytes of a row of V: as wide as the widest layer's if V is stored transposed."""
    if not layer.head_v:
        return 0
    if not flash_attn:
        return row_bytes(fmt, 1, part.widest_v, "V")
    return row_bytes(fmt, layer.heads, layer.head_v, "V")


# --- plans ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerPlan:
    """The bytes of one layer in one cache, all cells and streams."""

    layer: CacheLayer
    types: Types
    k_bytes: int
    v_bytes: int


@dataclass(frozen=True)
class CachePlan:
    """One cache with its cells (per stream) and layers."""

    part: CachePart
    cells: int
    streams: int
    layers: tuple[LayerPlan, ...]

    @cached_property
    def k_bytes(self) -> int:
        """Bytes of K."""
        return sum(layer.k_bytes for layer in self.layers)

    @cached_property
    def v_bytes(self) -> int:
        """Bytes of V."""
        return sum(layer.v_bytes for layer in self.layers)

    @property
    def n_bytes(self) -> int:
        """Bytes of both."""
        return self.k_bytes + self.v_bytes

    @property
    def values(self) -> int:
        """Keys and values that all cells hold, without padding of heads."""
        widths = (x.layer.heads * (x.layer.head_k + x.layer.head_v) for x in self.layers)
        return self.cells * self.streams * sum(widths)


@dataclass(frozen=True)
class RecurrentPlan:
    """Recurrent states: a cell per sequence; `layers` as llama.cpp prints them, all there are."""

    cells: int
    layers: int
    state_layers: tuple[int, ...]
    r_bytes: int
    s_bytes: int
    p_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes of all states."""
        return self.r_bytes + self.s_bytes + self.p_bytes


@dataclass(frozen=True)
class CompressorPlan:
    """The states of one of deepseek4's compressors."""

    name: str
    layers: int
    n_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """All that llama.cpp allocates to remember a context.

    Attributes:
        caches, recurrent, compressors: in the order of allocation.
        staging_bytes: what a fork allocates beside them to collect rows as f16 first.
    """

    caches: tuple[CachePlan, ...]
    recurrent: tuple[RecurrentPlan, ...]
    compressors: tuple[CompressorPlan, ...]
    staging_bytes: int = 0

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(cache.n_bytes for cache in self.caches)

    @cached_property
    def state_bytes(self) -> int:
        """Bytes that do not grow with the context: recurrent states and compressors."""
        states = sum(part.n_bytes for part in self.recurrent)
        return states + sum(part.n_bytes for part in self.compressors)

    @property
    def n_bytes(self) -> int:
        """Bytes of everything."""
        return self.kv_bytes + self.state_bytes + self.staging_bytes

    @property
    def kv_values(self) -> int:
        """Keys and values that all cells hold."""
        return sum(cache.values for cache in self.caches)


def plan(shapes: CacheShapes, context: Context, choice: Choice) -> MemoryPlan:
    """Return what llama.cpp allocates.

    Raises:
        InputError: blocks of a type do not divide the rows of a layer.
    """
    caches = tuple(_cache(shapes, part, context, choice) for part in shapes.parts)
    return MemoryPlan(
        caches, _recurrent(shapes, context), _compressors(shapes, context), _staging(caches)
    )


def _cache(shapes: CacheShapes, part: CachePart, context: Context, choice: Choice) -> CachePlan:
    cells, streams = context.cells(part, shapes.window), context.streams(part)
    rows = cells * streams
    layers = []
    for layer in part.layers:
        types = choice(part, layer)
        k = rows * k_row_bytes(types.k, layer)
        v = rows * v_row_bytes(types.v, part, layer, context.flash_attn)
        layers.append(LayerPlan(layer, types, k, v))
    return CachePlan(part, cells, streams, tuple(layers))


def _recurrent(shapes: CacheShapes, context: Context) -> tuple[RecurrentPlan, ...]:
    part, rows = shapes.recurrent, context.n_parallel
    if part is None:
        return ()
    unit = rows * FLOAT32_BYTES
    r, s = (unit * n * len(part.layers) for n in (part.r_values, part.s_values))
    p = unit * part.p_values * len(part.p_layers)
    return (RecurrentPlan(rows, part.n_layer, part.layers, r, s, p),)


def _compressors(shapes: CacheShapes, context: Context) -> tuple[CompressorPlan, ...]:
    unit = context.n_parallel * FLOAT32_BYTES
    return tuple(
        CompressorPlan(state.name, len(state.layers), unit * state.values * len(state.layers))
        for state in shapes.compressors
    )


def _staging(caches: Sequence[CachePlan]) -> int:
    """Return the bytes of the f16 rows that llama-tq collects before it quantises them."""
    total = 0
    for cache in caches:
        for entry in cache.layers:
            layer, rows = entry.layer, cache.cells * cache.streams
            widths = ((entry.types.k, layer.head_k), (entry.types.v, layer.head_v))
            total += sum(2 * rows * layer.heads * n for fmt, n in widths if n and is_staged(fmt))
    return total


def is_staged(fmt: Format) -> bool:
    """Tell whether its fork collects rows of a type as f16 first."""
    return fmt.name in get_dialect(fmt.dialect).state.staged


# --- which types fit -----------------------------------------------------------------------------


def refusal(fmt: Format, side: str, shapes: CacheShapes, flash_attn: bool = True) -> str | None:
    """Return why a model cannot have a type on one side of its cache; None if it can."""
    if side not in fmt.side:
        return f"for {fmt.side} only"
    if fmt.sibling:
        return "its blocks borrow the codes of another layer: no type of a whole cache"
    if side == "V" and fmt.is_quantized and not flash_attn:
        return "a quantised V needs flash attention (-fa on)"
    # llama.cpp asks for whole blocks in every head; the forks ask that of rows for their types
    head = split_head(fmt, side, shapes) if flash_attn and fmt.is_ggml else None
    if head:
        return f"blocks of {fmt.block_values} values do not divide heads of {head}"
    return _unfit_row(fmt, side, shapes, flash_attn)


def split_head(fmt: Format, side: str, shapes: CacheShapes) -> int | None:
    """Return the values of a head that groups of a type do not divide; None if all are."""
    for widths in sorted(set(shapes.head_widths)):
        head_dim = widths[side == "V"]
        if head_dim and fmt.is_quantized and row_values(fmt, 1, head_dim) % fmt.group_values:
            return head_dim
    return None


def _unfit_row(fmt: Format, side: str, shapes: CacheShapes, flash_attn: bool) -> str | None:
    for part in shapes.parts:
        for layer in part.layers:
            try:
                if side == "K":
                    k_row_bytes(fmt, layer)
                else:
                    v_row_bytes(fmt, part, layer, flash_attn)
            except InputError as error:
                width = layer.heads * (layer.head_k if side == "K" else layer.head_v)
                return f"rows of {width} values in the {part.name} cache: need {error.need}"
    return None


def pair_refusal(type_k: Format, type_v: Format, shapes: CacheShapes) -> str | None:
    """Return why two types that fit cannot be had together; None if they can."""
    if shapes.same_types and type_k.key != type_v.key:
        return f"{shapes.architecture} needs one type for K and V"
    return None


def cache_types(dialect: str) -> list[Format]:
    """Return the types that programs of a dialect offer for caches: ggml's, then its own."""
    found, release = tbq.registry.split_dialect(dialect)
    upstream = [f for name in CACHE_TYPES for f in get_dialect(UPSTREAM).named(name)]
    if release is None:
        own = [fmt for fmt in found.formats if not fmt.release]
    else:
        own = [fmt for fmt in found.release(release).types.values() if found.owns(fmt)]
    return upstream + [fmt for fmt in own if not fmt.is_ggml]


def pairs(
    shapes: CacheShapes, types: Sequence[Format], flash_attn: bool = True
) -> Iterator[tuple[Format, Format]]:
    """Yield the pairs of types for K and V that a model can have.

    llama.cpp asks about the type of V even where no V is stored.
    """
    ks = [fmt for fmt in types if refusal(fmt, "K", shapes, flash_attn) is None]
    vs = [fmt for fmt in types if refusal(fmt, "V", shapes, flash_attn) is None]
    for k in ks:
        yield from ((k, v) for v in vs if pair_refusal(k, v, shapes) is None)


def largest_context(
    shapes: CacheShapes, context: Context, choice: Choice, budget: int, most: int
) -> int:
    """Return the longest -c, in whole cells of every stream, whose memory fits in a budget.

    Args:
        context: all but its `n_ctx` is kept.
        budget: bytes.
        most: the longest to try.
    """
    unit = CELL_PAD * (1 if context.kv_unified else context.n_parallel)
    one = plan(shapes, context, choice)
    per_cell = [
        (cache.n_bytes + _staging((cache,))) // (cache.cells * cache.streams)
        for cache in one.caches
    ]

    def fits(units: int) -> bool:
        longer = replace(context, n_ctx=units * unit)
        cells = (longer.cells(p, shapes.window) * longer.streams(p) for p in shapes.parts)
        return (
            one.state_bytes + sum(n * each for n, each in zip(cells, per_cell, strict=True))
            <= budget
        )

    low, high = 0, most // unit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * unit
