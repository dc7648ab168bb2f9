"""Hypotheses that predict what a bug would write.

A hypothesis takes a case and yields predictions of the whole output. Wrong encoders are right
encoders of other input, wrong decoders right decoders of other bytes, wherever that can be. What
else a family can get wrong is in its `Codec.mutants`: codecs whose specification is run in place of
the kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

import tbq
from tbq.cells import Cells
from tbq.codec import Codec
from tbq.errors import TbqError
from tbq.numerics import fp16_bits
from tbq.registry import get_dialect
from tbq.rotations import KINDS
from tbq.vectors.cases import Case, stages_of
from tbq.vectors.code_bits import (
    as_blocks,
    bit_layout,
    bodies,
    codes_of,
    field_width,
    with_bodies,
    with_codes,
)
from tbq.vectors.inputs import gaussian
from tbq.vectors.match import decode

ANOTHER_DIALECT = "as another dialect does it"
# Tables whose outermost centroids differ by a larger factor are for another scale.
MOST_SIZE = 2
# A norm that is restored is stored as float16, others are wrong by percents.
SAME_LENGTH = 2e-3
ROW_ALIGNMENTS = (4, 16, 32, 64, 128, 256)
# What an index can count: positions in the tensor, in the row, or rows.
SMALL_BLOCK, NEAR_FIELD = 128, 4
INDICES = {"flat": "tensor", "per row": "row", "per cell": "cell"}

Change = Callable[[np.ndarray], np.ndarray]


class Prediction(NamedTuple):
    """A bug, what is known of it, and what it would write."""

    bug: str
    detail: str
    output: np.ndarray


@lru_cache(maxsize=64)
def predictions(case: Case) -> tuple[Prediction, ...]:
    """Return what each bug would write for a case; kept, as it does not depend on the output."""
    found = []
    for predict in _HYPOTHESES:
        with np.errstate(all="ignore"), suppress(TbqError):
            found += [p for p in predict(case) if p.output.size == case.expected.size]
    return tuple(found)


# --- outputs from rows, bytes and levels ---------------------------------------------------------


def _encodes(case: Case) -> bool:
    return case.op == "quantize"


def _packs(case: Case) -> bool:
    """Tell whether there are packed rows in a case, on either side."""
    return case.format is not None


def _encode(case: Case, x: np.ndarray) -> np.ndarray:
    if "sibling" in case.inputs:
        return tbq.quantize_paired(x, case.inputs["sibling"], case.fmt)
    return tbq.quantize(np.ascontiguousarray(x), case.fmt)


def _from_rows(case: Case, y: np.ndarray) -> np.ndarray:
    """Turn wrongly decoded rows (..., n) into the output of a case's operation."""
    y = y.reshape(-1, y.shape[-1])
    if case.op == "scores":
        return (case.inputs["q"].astype(np.float64) @ y.T.astype(np.float64)).astype(np.float32)
    if case.op == "weighted_sum":
        return (case.inputs["p"].astype(np.float64) @ y.astype(np.float64)).astype(np.float32)
    return y


def _decoded(case: Case, packed: np.ndarray) -> np.ndarray | None:
    """Return the output for other packed rows; None if they do not decode."""
    with suppress(TbqError):
        if _by_levels(case.fmt.codec, case.op):
            return _from_rows(case, _rows(case.fmt.codec, packed, case.op))
        return _from_rows(case, decode(case, packed))
    return None


def _by_levels(codec: Codec, op: str) -> bool:
    """Tell whether an operation takes levels and rotates elsewhere, as attention does."""
    return op in ("scores", "weighted_sum") and codec.rotation_values > 1


def _rows(codec: Codec, packed: np.ndarray, op: str) -> np.ndarray:
    """Return packed rows as a codec's specification decodes them for an operation.

    Rotated queries times levels are queries times levels that are rotated back; so are weighted
    sums of levels, unless that is left to the graph.
    """
    packed = packed.reshape(-1, packed.shape[-1])
    if not _by_levels(codec, op):
        return codec.dequantize_rows(packed)
    blocks = codec.blocks(packed).reshape(-1)
    y = codec.levels(blocks)
    if op == "scores" or codec.gives == codec.takes:
        y = codec.unrotate(y, blocks)
    return y.reshape(len(packed), -1)


def _repacked(case: Case, change: Change) -> np.ndarray | None:
    """Return the output with changed blocks: encoded ones changed, or packed ones misread."""
    codec = case.fmt.codec
    packed = case.expected if _encodes(case) else case.inputs["packed"]
    changed = with_bodies(codec, packed, change(bodies(codec, packed)))
    return changed if _encodes(case) else _decoded(case, changed)


def _divides(codec: Codec, case: Case) -> bool:
    """Tell whether the groups of a codec divide the rows of a case."""
    if _encodes(case):
        return case.inputs["x"].shape[-1] % codec.group_values == 0
    return case.fmt.row_values(case.inputs["packed"].shape[-1]) % codec.group_values == 0


def _by(codec: Codec, case: Case) -> np.ndarray | None:
    """Return the output of another codec's specification; None if it has none, or no time."""
    if not _divides(codec, case):
        return None
    if not _encodes(case):
        return _from_rows(case, _rows(codec, case.inputs["packed"], case.op))
    if codec.slow:
        return None
    return codec.quantize_rows(case.inputs["x"].reshape(-1, case.inputs["x"].shape[-1]))


def _some(bug: str, detail: str, output: np.ndarray | None) -> Iterator[Prediction]:
    if output is not None:
        yield Prediction(bug, detail, output)


# --- wrong codecs --------------------------------------------------------------------------------


def _mutants(case: Case) -> Iterator[Prediction]:
    if not _packs(case) or case.fmt.sibling:
        return
    for bug, detail, codec in case.fmt.codec.mutants():
        output = _by(codec, case)
        yield from _some(bug, detail, output)
        signs = case.fmt.layout.signs
        if bug == "sign diagonal missing" and _encodes(case) and output is not None and signs:
            for stored, byte in (("stored as zeros", 0), ("stored as ones", 0xFF)):
                raw = bodies(codec, output)
                raw[:, codec.layout.span(signs)] = byte
                yield Prediction(bug, stored, with_bodies(codec, output, raw))


def _as_another_dialect(case: Case) -> Iterator[Prediction]:
    fmt = case.format
    if fmt is None or not _packs(case) or fmt.sibling:
        return
    others = (variant for other in tbq.formats() for variant in other.variants())
    for other in others:
        alike = other.block == fmt.block and other.name == fmt.name
        older = get_dialect(fmt.dialect).owns(other) and other.key != fmt.key
        bug = "as another release does it" if older else ANOTHER_DIALECT
        if not alike or other.codec == fmt.codec or not _divides(other.codec, case):
            continue
        with suppress(TbqError):
            if _encodes(case):
                output = tbq.quantize(case.inputs["x"], other)
            else:
                output = _from_rows(case, _rows(other.codec, case.inputs["packed"], case.op))
            yield Prediction(bug, other.label, output)


def _another_codebook(case: Case) -> Iterator[Prediction]:
    """The cells of other formats, of as many bits and about as large."""
    codec = case.fmt.codec if _packs(case) and not case.fmt.sibling else None
    own = _cells(codec)
    if codec is None or own is None:
        return
    for cells, owner in all_cells().items():
        size = cells.centroids[-1] / own.centroids[-1]
        alike = cells.bits == own.bits and 1 / MOST_SIZE < size < MOST_SIZE
        if alike and cells.centroids != own.centroids:
            output = _by(_with_cells(codec, cells), case)
            yield from _some("another codebook", f"that of {owner}", output)


def _cells(codec: Codec | None) -> Cells | None:
    """Return the cells of a codec, or of the codec within it; None if it has none."""
    for name in getattr(codec, "__dataclass_fields__", ()):
        value = getattr(codec, name)
        found = _cells(value) if isinstance(value, Codec) else value
        if isinstance(found, Cells):
            return found
    return None


def _with_cells(codec: Any, cells: Cells) -> Any:
    """Return a codec with other cells, in it or in the codec within it."""
    changes: dict[str, Cells | Codec] = {}
    for name in codec.__dataclass_fields__:
        value = getattr(codec, name)
        if isinstance(value, Cells):
            changes[name] = cells
        elif isinstance(value, Codec) and _cells(value):
            changes[name] = _with_cells(value, cells)
    return replace(codec, **changes)


@cache
def all_cells() -> dict[Cells, str]:
    """Return the cells of all formats, each with the first format that has it."""
    found: dict[Cells, str] = {}
    for fmt in tbq.formats():
        for variant in fmt.variants():
            cells = _cells(variant.codec)
            if cells:
                found.setdefault(cells, fmt.key)
    return found


def _norm_not_corrected(case: Case) -> Iterator[Prediction]:
    """The norm for a scale; codecs that can be told so have a mutant for it."""
    if not _packs(case) or not _encodes(case) or not case.fmt.layout.scales:
        return
    codec, norm = case.fmt.codec, stages_of(case).norm
    if any(bug == "norm not corrected" for bug, *_ in codec.mutants()):
        return

    def change(raw: np.ndarray) -> np.ndarray:
        blocks = as_blocks(codec, raw)
        scale = fp16_bits(np.repeat(norm, codec.group_blocks)).view(np.float16)
        for name in codec.layout.scales[:1]:
            blocks[name] = scale.reshape(-1, *[1] * (blocks[name].ndim - 1))
        return raw

    yield from _some("norm not corrected", "", _repacked(case, change))


def _transform_scaled(case: Case) -> Iterator[Prediction]:
    """Coordinates without the constant of their transform, or with it twice, under right cells."""
    if not _packs(case) or not _encodes(case) or case.fmt.sibling:
        return
    codec, boundaries = case.fmt.codec, case.fmt.codec.boundaries
    if "codes" not in boundaries or "codes" not in bit_layout(codec):
        return
    stages, raw = stages_of(case), bodies(codec, case.expected)
    v = stages.coordinates["codes"].astype(np.float64)
    restores = _restores_norm(codec)
    for width in {codec.group_values, codec.rotation_values} - {1}:
        for factor, name in ((width**0.5, f"sqrt({width})"), (width**-0.5, f"1/sqrt({width})")):
            codes = _codes_at(boundaries["codes"], v * factor)
            moved = with_codes(codec, raw, "codes", codes.reshape(len(raw), -1))
            if restores:
                moved = _with_norm(codec, moved, stages.norm)
            output = with_bodies(codec, case.expected, moved)
            yield Prediction("transform scaled otherwise", f"by {name}", output)


def _codes_at(edges: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return how many edges (k,) or (group_values, k) are not above coordinates v (n, values)."""
    return (v[..., None] >= edges).sum(axis=-1).astype(np.uint8)


def _lengths(codec: Codec, raw: np.ndarray) -> np.ndarray:
    """Return the lengths of what blocks under scales of 1 decode to, (groups,)."""
    blocks = as_blocks(codec, raw.copy())
    for name in codec.layout.scales:
        blocks[name] = 1
    return np.sqrt((codec.dequantize(blocks).astype(np.float64) ** 2).sum(axis=1))


@cache
def _restores_norm(codec: Codec) -> bool:
    """Tell whether what blocks decode to is as long as what was encoded."""
    if len(codec.layout.scales) != 1:
        return False
    x = gaussian(np.random.PCG64(0), 4, codec.group_values)
    raw = codec.quantize(x, np.arange(len(x))).view(np.uint8)
    raw = raw.reshape(-1, codec.layout.dtype.itemsize)
    scale = as_blocks(codec, raw)[codec.layout.scales[0]][:: codec.group_blocks]
    decoded = _lengths(codec, raw) * scale.astype(np.float64)
    return bool((np.abs(decoded / np.linalg.norm(x, axis=1) - 1) < SAME_LENGTH).all())


def _with_norm(codec: Codec, raw: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """Return blocks with the scale under which they decode to vectors of length norm (groups,)."""
    scale = np.repeat(norm / _lengths(codec, raw), codec.group_blocks)
    as_blocks(codec, raw)[codec.layout.scales[0]] = scale
    return raw


def _lanes_not_read(case: Case) -> Iterator[Prediction]:
    """Half of the lanes left out before the transform: of the input, or of the levels."""
    if not _packs(case) or case.fmt.sibling:
        return
    codec = case.fmt.codec
    for lanes, every in _halves(codec):
        detail = f"half of every {every} missing"
        if _encodes(case):
            x = np.where(lanes, case.inputs["x"].reshape(-1, every), np.float32(0))
            x = x.reshape(case.inputs["x"].shape)
            yield Prediction("only some lanes read", detail, _encode(case, x))
        elif codec.rotation_values > 1 and (case.op == "scores" or codec.gives == codec.takes):
            packed = case.inputs["packed"].reshape(-1, case.inputs["packed"].shape[-1])
            blocks = codec.blocks(packed).reshape(-1)
            levels = codec.levels(blocks)
            levels = np.where(lanes, levels.reshape(-1, every), 0).reshape(levels.shape)
            y = codec.unrotate(levels.astype(np.float32), blocks)
            output = _from_rows(case, y.reshape(len(packed), -1))
            yield Prediction("only some lanes read", detail, output)


def _halves(codec: Codec) -> Iterator[tuple[np.ndarray, int]]:
    """Yield which lanes of every so many are processed: the first half of them."""
    for every in {2, 32, codec.rotation_values, codec.group_values}:
        if codec.group_values % every == 0 and every % 2 == 0:
            yield np.arange(every) < every // 2, every


def _another_block_index(case: Case) -> Iterator[Prediction]:
    """An encoder that counts otherwise, or a decoder that computes the signs anew."""
    if not _packs(case):
        return
    codec, signs = case.fmt.codec, case.fmt.layout.signs
    if codec.position == "none" or codec.searches or not (_encodes(case) or signs):
        return
    packed = case.expected if _encodes(case) else case.inputs["packed"]
    rows = packed.size // packed.shape[-1]
    row_groups = codec.row_values(packed.shape[-1], "") // codec.group_values
    for name, position in INDICES.items():
        index = _index(position, rows, row_groups)
        if _encodes(case):
            if position != codec.position:
                x = np.ascontiguousarray(case.inputs["x"].reshape(-1, codec.group_values))
                raw = codec.quantize(x, index).view(np.uint8)
                yield Prediction("another block index", name, with_bodies(codec, packed, raw))
            continue
        assert signs is not None, "a decoder was asked for only if the block has signs"
        ones = np.ones((len(index), codec.group_values), np.float32)
        computed = (
            codec.quantize(ones, index).view(np.uint8).reshape(-1, codec.layout.dtype.itemsize)
        )
        output = _repacked(case, partial(_with_field, codec, computed, signs))
        yield from _some("another block index", f"{name}, signs recomputed", output)


def _index(position: str, rows: int, row_groups: int) -> np.ndarray:
    flat = np.arange(rows * row_groups)
    return {"tensor": flat, "row": flat % row_groups, "cell": flat // row_groups}[position]


def _with_field(codec: Codec, other: np.ndarray, name: str, raw: np.ndarray) -> np.ndarray:
    """Return blocks uint8 (n, bytes) with one field from others."""
    raw[:, codec.layout.span(name)] = other[:, codec.layout.span(name)]
    return raw


# --- wrong layouts -------------------------------------------------------------------------------


def _nibbles_swapped(case: Case) -> Iterator[Prediction]:
    for detail, spans in _code_spans(case, lambda width: width == 4):
        output = _repacked(case, partial(_mapped, spans, lambda b: b >> 4 | b << 4))
        yield from _some("nibbles swapped", detail, output)


def _bit_order_reversed(case: Case) -> Iterator[Prediction]:
    bug = "bit order reversed"
    for detail, spans in _code_spans(case, lambda width: width > 0):
        output = _repacked(case, partial(_mapped, spans, _reversed_bits))
        yield from _some(bug, f"in each byte{detail and ' of '}{detail}", output)
    for kind in _code_kinds(case):
        if bit_layout(case.fmt.codec)[kind].counts.max() > 2:
            output = _recoded(case, kind, _reversed_codes)
            yield from _some(bug, f"in each code{_of(case, kind)}", output)
    for detail, spans in _code_spans(case, lambda width: width == 2):
        output = _repacked(case, partial(_mapped, spans, _reversed_pairs))
        yield from _some(bug, f"codes in each byte{detail and ' of '}{detail}", output)


def _codes_off_by_one(case: Case) -> Iterator[Prediction]:
    for kind, step in itertools.product(_code_kinds(case), (1, -1)):
        if _is_sign(case.fmt.codec, kind):
            continue
        clamped = _recoded(case, kind, lambda c, n, s=step: np.clip(c + s, 0, n - 1))
        wrapping = _recoded(case, kind, lambda c, n, s=step: (c + s) % n)
        yield from _some("codes off by one", f"{step:+d}, clamped{_of(case, kind)}", clamped)
        yield from _some("codes off by one", f"{step:+d}, wrapping{_of(case, kind)}", wrapping)


def _residual_signs(case: Case) -> Iterator[Prediction]:
    """Signs beside other codes that are not computed, not looked at, or the other way round."""
    for kind in _code_kinds(case):
        if _is_sign(case.fmt.codec, kind):
            for sign, change in ("zeros", np.zeros_like), ("ones", np.ones_like):
                output = _recoded(case, kind, lambda c, n, f=change: f(c))
                yield from _some("residual signs ignored", f"all {sign}", output)
            output = _recoded(case, kind, lambda c, n: 1 - c)
            yield from _some("residual signs negated", "", output)


def _is_sign(codec: Codec, kind: str) -> bool:
    """Tell whether a kind of codes is one bit beside others."""
    layout = bit_layout(codec)
    return len(layout) > 1 and layout[kind].counts.max() == 2


def _code_spans(case: Case, wanted: Callable[[int], bool]) -> Iterator[tuple[str, list[slice]]]:
    """Yield the fields whose codes have a wanted width: all at once, and each where several are."""
    if not _packs(case):
        return
    codec = case.fmt.codec
    names = [name for name in codec.layout.codes if wanted(field_width(codec, name))]
    if names:
        yield "", [codec.layout.span(name) for name in names]
    for name in names if len(names) > 1 else ():
        yield name, [codec.layout.span(name)]


def _mapped(spans: list[slice], change: Change, raw: np.ndarray) -> np.ndarray:
    for span in spans:
        raw[:, span] = change(raw[:, span])
    return raw


def _reversed_bits(raw: np.ndarray) -> np.ndarray:
    return np.packbits(np.unpackbits(raw, axis=1), axis=1, bitorder="little")


def _reversed_pairs(raw: np.ndarray) -> np.ndarray:
    pairs = [((raw >> 2 * i) & 3) << (6 - 2 * i) for i in range(4)]
    return (pairs[0] | pairs[1] | pairs[2] | pairs[3]).astype(np.uint8)


def _code_kinds(case: Case) -> tuple[str, ...]:
    """Return the kinds of codes of which it is known where their bits are."""
    return tuple(bit_layout(case.fmt.codec)) if _packs(case) else ()


def _of(case: Case, kind: str) -> str:
    """Name a kind of codes where there are several."""
    return f" of {kind}" if len(_code_kinds(case)) > 1 else ""


def _recoded(case: Case, kind: str, change: Callable[..., Any]) -> np.ndarray | None:
    """Return the output with codes changed by change(codes, how many there can be)."""
    codec = case.fmt.codec
    counts = bit_layout(codec)[kind].counts

    def edit(raw: np.ndarray) -> np.ndarray:
        codes = codes_of(codec, raw)[kind].astype(int)
        return with_codes(codec, raw, kind, change(codes, counts).astype(np.uint8))

    return _repacked(case, edit)


def _reversed_codes(codes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    turned = np.zeros_like(codes)
    for k in range(int(counts.max()).bit_length() - 1):
        here = counts > 1 << k  # the bit is one of this code's
        turned = np.where(here, turned << 1 | codes >> k & 1, turned)
    return turned


def _field_order(case: Case) -> Iterator[Prediction]:
    """The scales at the other end, or two fields exchanged."""
    if not _packs(case):
        return
    codec = case.fmt.codec
    names = codec.layout.dtype.names or ()
    orders: dict[tuple[str, ...], str] = {}
    first = (*codec.layout.scales, *codec.layout.small_scales)
    scales = [name for name in names if name in first]
    rest = [name for name in names if name not in scales]
    ahead, behind = (*scales, *rest), (*rest, *scales)
    orders[behind if names[0] in scales else ahead] = "scale at the other end"
    for i, j in itertools.combinations(range(len(names)), 2):
        swapped = list(names)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        orders.setdefault(tuple(swapped), f"{names[i]} and {names[j]} exchanged")
    for order, detail in orders.items():
        if order != names:
            output = _repacked(case, partial(_reordered, codec, order, case.op))
            yield from _some("fields in another order", detail, output)


def _reordered(codec: Codec, order: tuple[str, ...], op: str, raw: np.ndarray) -> np.ndarray:
    """Return blocks as they are written with fields in another order, or as they are read so."""
    columns = [np.arange(raw.shape[1])[codec.layout.span(name)] for name in order]
    places = np.concatenate(columns)
    if op == "quantize":
        return raw[:, places]
    changed = raw.copy()
    changed[:, places] = raw
    return changed


def _scale_elsewhere(case: Case) -> Iterator[Prediction]:
    if not _packs(case) or _encodes(case):
        return
    codec = case.fmt.codec
    several = len(codec.layout.scales) > 1
    for name in codec.layout.scales:
        span = codec.layout.span(name)
        size = span.stop - span.start
        for offset in _likely_offsets(codec, size):
            if offset != span.start:
                source = slice(offset, offset + size)
                output = _repacked(case, partial(_moved, span, source))
                where = f"{name} at byte {offset}" if several else f"at byte {offset}"
                yield from _some("scale read elsewhere", where, output)


def _likely_offsets(codec: Codec, size: int) -> list[int]:
    """Return where a scale might be looked for: anywhere in a small block, else near a field."""
    starts = [codec.layout.span(name).start for name in codec.layout.dtype.names or ()]
    whole = codec.layout.dtype.itemsize
    edges = [*starts, whole - size]
    small = whole <= SMALL_BLOCK
    offsets = range(whole - size + 1)
    return [o for o in offsets if small or any(abs(o - edge) <= NEAR_FIELD for edge in edges)]


def _moved(target: slice, source: slice, raw: np.ndarray) -> np.ndarray:
    raw[:, target] = raw[:, source].copy()
    return raw


def _scale_as_bf16(case: Case) -> Iterator[Prediction]:
    if not _packs(case) or not case.fmt.layout.scales:
        return
    codec = case.fmt.codec
    if _encodes(case):
        yield from _some("scale as bfloat16", "", _repacked(case, lambda r: _as_bf16(codec, r)))
        return
    if case.fmt.sibling or codec.layout.outliers or codec.layout.floats:
        return
    blocks = as_blocks(codec, bodies(codec, case.inputs["packed"]))
    if any(blocks[name].ndim > 1 or blocks[name].itemsize != 2 for name in codec.layout.scales):
        return
    total = np.zeros((len(blocks) // codec.group_blocks, codec.group_values), np.float32)
    for name, place in itertools.product(codec.layout.scales, range(codec.group_blocks)):
        scale = (blocks[name].view("<u2").astype("<u4") << 16).view("<f4")
        unit = _with_one_scale(case, blocks, name, place).reshape(total.shape)
        total += unit * scale[place :: codec.group_blocks, None]
    rows = case.inputs["packed"].size // case.inputs["packed"].shape[-1]
    yield Prediction("scale as bfloat16", "", _from_rows(case, total.reshape(rows, -1)))


def _with_one_scale(case: Case, blocks: np.ndarray, name: str, place: int) -> np.ndarray:
    """Decode blocks with one scale of one block of each group 1 and all others 0.

    Values are a sum of what each scale contributes.
    """
    codec, packed = case.fmt.codec, case.inputs["packed"]
    alone = blocks.copy()
    for other in codec.layout.scales:
        alone[other] = 0
    alone[name][place :: codec.group_blocks] = 1
    changed = with_bodies(codec, packed, alone.view(np.uint8))
    return _rows(codec, changed, case.op)


def _as_bf16(codec: Codec, raw: np.ndarray) -> np.ndarray:
    blocks = as_blocks(codec, raw)
    for name in (n for n in codec.layout.scales if blocks[n].itemsize == 2):
        wide = blocks[name].astype("<f4").view("<u4")
        blocks[name] = ((wide + 0x8000) >> 16).astype("<u2").view("<f2")
    return raw


# --- wrong arithmetic and addresses --------------------------------------------------------------


def _negated(case: Case) -> Iterator[Prediction]:
    yield Prediction(
        "negated", "", _encode(case, -case.inputs["x"]) if _encodes(case) else -case.expected
    )


def _float16_input(case: Case) -> Iterator[Prediction]:
    bug = "float16 intermediate"
    if _encodes(case):
        x = case.inputs["x"].astype(np.float16)
        yield Prediction(bug, "input rounded to float16", _encode(case, x))
    elif case.op == "dequantize":
        y = case.expected.astype(np.float16).astype(np.float32)
        yield Prediction(bug, "output rounded to float16", y)


def _row_stride(case: Case) -> Iterator[Prediction]:
    """Rows read from where they would be with another stride."""
    if not _packs(case) or case.fmt.sibling:
        return
    codec = case.fmt.codec
    source = case.inputs["x" if _encodes(case) else "packed"]
    row = source.shape[-1]
    flat, rows = source.reshape(-1), source.size // row
    if rows < 2:
        return
    unit = codec.group_values if _encodes(case) else codec.group_blocks * codec.block_bytes
    strides = {0, row - unit, row + unit}
    strides |= {-(-row // step) * step for step in ROW_ALIGNMENTS}
    for stride in sorted(strides - {row}):
        starts = [min(r * stride, flat.size - row) for r in range(rows)]
        moved = np.stack([flat[start : start + row] for start in starts]).reshape(source.shape)
        output = _encode(case, moved) if _encodes(case) else _decoded(case, moved)
        yield from _some("wrong row stride", _stride_name(codec, stride, row, unit), output)


def _stride_name(codec: Codec, stride: int, row: int, unit: int) -> str:
    if stride == 0:
        return "the first row for all"
    if (stride - row) % unit == 0:
        word = "block" if codec.group_blocks == 1 else "group"
        return f"{(stride - row) // unit:+d} {word}"
    return f"padded to a multiple of {stride & -stride}"


def _graph_rotation(case: Case) -> Iterator[Prediction]:
    if case.op != "rotation" or case.rotation is None:
        return
    x, head_dim = case.inputs["x"], case.inputs["x"].shape[-1]
    yield Prediction("not rotated", "", x)
    right = tbq.rotation(case.rotation, head_dim)
    if (right.signs != 1).any():
        plain = replace(right, signs=np.ones_like(right.signs))
        signs = np.tile(right.signs, head_dim // right.size)
        side = "sign diagonal on the wrong side"
        yield Prediction("sign diagonal missing", "", plain.forward(x))
        yield Prediction(side, "only before", plain.forward(x * signs))
        yield Prediction(side, "only after", plain.forward(x) * signs)
    for kind in KINDS:
        if kind != case.rotation:
            with suppress(TbqError):
                y = tbq.rotation(kind, head_dim).forward(x)
                yield Prediction("another rotation", kind, y)


_HYPOTHESES: tuple[Callable[[Case], Iterator[Prediction]], ...] = (
    _negated,
    _mutants,
    _another_codebook,
    _norm_not_corrected,
    _transform_scaled,
    _lanes_not_read,
    _another_block_index,
    _nibbles_swapped,
    _bit_order_reversed,
    _codes_off_by_one,
    _residual_signs,
    _field_order,
    _scale_as_bf16,
    _scale_elsewhere,
    _row_stride,
    _graph_rotation,
    _float16_input,
    _as_another_dialect,
)
