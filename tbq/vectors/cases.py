"""Golden vectors: cases with their inputs, expected outputs, stages in between, and match rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import tbq
from tbq.codec import Codec, Stages
from tbq.format import Format
from tbq.numerics import fp16_bits
from tbq.rotations import KINDS
from tbq.vectors.backward import BACKWARD, sigmoid
from tbq.vectors.code_bits import as_blocks, bodies, code_mask, codes_of, with_bodies
from tbq.vectors.inputs import Input, gaussian, inputs, raw_bytes, stream, unit
from tbq.vectors.notes import HEAD_DIMS

# Operations of the graph, which belong to no format, stand under `graph`.
GRAPH = "graph"
GRAPH_OPERATIONS = ("rotation", *BACKWARD)
OPERATIONS = ("quantize", "dequantize", "scores", "weighted_sum", *GRAPH_OPERATIONS)
# Stages are written for rows up to this many values; longer ones are there for their length.
TAPPED_VALUES = 1024
# A kernel that sums in another order may decide otherwise this close to a boundary.
BOUNDARY_ULPS = 8
ULP = 2.0**-23
# Sums of so many equal values, with any signs and in any order, that give zero are exact.
EXACT_TERMS = 4
# The bits in which one quiet NaN may differ from another, by bytes of the type.
ANY_QUIET_NAN = {2: 0x81FF, 4: 0x803FFFFF}
STEP = np.float32(BOUNDARY_ULPS * ULP)
# Scales in which float16 can go wrong: zeros, subnormals, ones, the largest, infinities, NaN.
SPECIAL_SCALES = (
    0x0000,
    0x8000,
    0x0001,
    0x03FF,
    0x0400,
    0x3C00,
    0xBC00,
    0x7BFF,
    0x7C00,
    0xFC00,
    0x7E00,
)
# Outliers of arbitrary blocks: so many of them, this far apart, are within the block.
MAX_OUTLIERS = 4
NMSE = {
    "dequantize": (1e-11, "float32 sums in any order, fused or not; a float16 step is above this"),
    "scores": (1e-10, "float32 sums in any order; a query rounded to float16 is above this"),
    "weighted_sum": (1e-10, "float32 sums in any order; float16 accumulators are above this"),
    "rotation": (1e-11, "float32 sums in any order; float16 values are above this"),
    "backward": (1e-12, "an expf a few units off; float16 values are above this"),
}
TRELLIS_COST = 1e-4


@dataclass(eq=False)
class Case:
    """One case.

    Attributes:
        id: stable name, `dialect/name/operation/input`; also where its files are.
        op: one of OPERATIONS.
        format: the format with its choices made, None for operations of the graph.
        flags: which bugs it is made for, see `tbq.vectors.notes`.
        comment: what the input is.
        inputs: arrays by role: x, packed, q, p, dy, sibling.
        output: the role of the result: packed, y, scores, sum, dx.
        expected: the result.
        taps: stages on the way: norm, coordinates, codes, scale, levels. Where there are several
            kinds of codes or several scales, those after the first are codes_KIND,
            coordinates_KIND and scale_FIELD.
        match: when another result is right too.
        mask: bits of packed results that rounding may change, or None.
        rotation: the kind of a graph rotation.
    """

    id: str
    op: str
    format: Format | None
    flags: tuple[str, ...]
    comment: str
    inputs: dict[str, np.ndarray]
    output: str
    expected: np.ndarray
    taps: dict[str, np.ndarray] = field(default_factory=dict)
    match: dict[str, Any] = field(default_factory=lambda: {"mode": "exact"})
    mask: np.ndarray | None = None
    rotation: str | None = None

    @property
    def fmt(self) -> Format:
        """The format, of a case that is of one."""
        assert self.format is not None, self.id
        return self.format

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the case by role."""
        found = self.inputs | {self.output: self.expected} | self.taps
        return found if self.mask is None else found | {"mask": self.mask}


def cases(
    formats: Iterable[Format],
    operations: Iterable[str] = OPERATIONS,
    seed: int = 0,
    size: str = "small",
) -> Iterator[Case]:
    """Yield the cases of a set, in a fixed order; of formats with choices, those of each choice."""
    operations = set(operations)
    for fmt in (variant for listed in formats for variant in listed.variants()):
        for op in ("quantize", "dequantize", "scores", "weighted_sum"):
            if op in operations:
                yield from _BUILDERS[op](fmt, seed, size)
    if "rotation" in operations:
        yield from _rotations(seed)
    for op in BACKWARD:
        if op in operations:
            yield from _backward(op, seed)


def case_id(fmt: Format, op: str, name: str) -> str:
    """Return the name of a case, which is a path on every file system."""
    label = fmt.label.replace("]", "").replace("[", ".").replace(":", "/")
    return f"{re.sub('[^A-Za-z0-9_.@/-]', '-', label)}/{op}/{name}"


def _sibling(fmt: Format, shape: tuple[int, ...], bits: np.random.PCG64) -> np.ndarray:
    return tbq.quantize(gaussian(bits, *shape), fmt.sibling or fmt)


def _words(fmt: Format, text: str) -> str:
    """Return what a comment says of blocks, said of groups where those are several blocks."""
    return text if fmt.codec.group_blocks == 1 else text.replace("block", "group")


# --- quantize ------------------------------------------------------------------------------------


def _quantize(fmt: Format, seed: int, size: str) -> Iterator[Case]:
    for source in inputs(size):
        yield quantize_case(fmt, source, seed)


def quantize_case(fmt: Format, source: Input, seed: int) -> Case:
    """Return the case of one input, its stages and its match rule."""
    name = case_id(fmt, "quantize", source.name)
    bits = stream(seed, name)
    x = source.make(fmt, bits)
    given = {"x": x}
    if fmt.sibling:
        given["sibling"] = _sibling(fmt, x.shape, bits)
        packed = tbq.quantize_paired(x, given["sibling"], fmt)
    else:
        packed = tbq.quantize(x, fmt)
    comment = _words(fmt, source.comment)
    case = Case(name, "quantize", fmt, source.flags, comment, given, "packed", packed)
    if not fmt.sibling:
        _add_stages(case)
    return case


def group_index(codec: Codec, x: np.ndarray) -> np.ndarray:
    """Return the index of every group of rows (..., n), in order."""
    row_groups = x.shape[-1] // codec.group_values
    return codec.indices(x.size // x.shape[-1], row_groups)


def stages_of(case: Case) -> Stages:
    """Return what the encoder computes on its way to the expected result."""
    codec, x = case.fmt.codec, case.inputs["x"]
    flat = np.ascontiguousarray(x.reshape(-1, codec.group_values))
    blocks = as_blocks(codec, bodies(codec, case.expected))
    return codec.stages(flat, group_index(codec, x), blocks)


def _add_stages(case: Case) -> None:
    """Add the stages to a case, and the bits that rounding may change."""
    codec, x = case.fmt.codec, case.inputs["x"]
    raw = bodies(codec, case.expected)
    stages = stages_of(case)
    if x.shape[-1] <= TAPPED_VALUES:
        case.taps = _taps(codec, stages, codes_of(codec, raw))
    if codec.searches:
        reason = "other walks of the trellis with the same squared error"
        case.match = {"mode": "cost", "max": TRELLIS_COST, "reason": reason}
        return
    near = _near_boundaries(codec, x.reshape(-1, codec.group_values), stages.coordinates)
    kinds = codec.layout.dtype
    loose = {name: loose_scales(scale, kinds[name].base) for name, scale in stages.scales.items()}
    any_loose = np.any([bits.reshape(len(raw), -1).any(axis=1) for bits in loose.values()], axis=0)
    unwritten = codec.layout.unwritten
    if not near.any() and not np.any(any_loose) and not unwritten:
        return
    mask = _mask(codec, near, loose, stages.scales)
    mask = _shared(codec, mask, case.expected.size // case.expected.shape[-1])
    case.mask = with_bodies(codec, case.expected, mask)
    reason = "so many ulps from a decision boundary; or a NaN, whose payload is free"
    case.match = {
        "mode": "boundary",
        "ulps": BOUNDARY_ULPS,
        "positions": np.argwhere(near.reshape(-1, codec.block_values)).tolist(),
        "scales": np.flatnonzero(any_loose).tolist(),
        "reason": reason + ("; or padding, which encoders leave as it was" if unwritten else ""),
    }


def _taps(codec: Codec, stages: Stages, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    taps = {"norm": stages.norm}
    taps |= _named("coordinates", stages.coordinates)
    taps |= _named("codes", codes)
    return taps | _named("scale", {name: stages.scales[name] for name in codec.layout.scales})


def _named(role: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return arrays by role: the first has the bare one, the others their own names behind it."""
    names = [role, *(f"{role}_{re.sub('[^a-z0-9_]', '_', name)}" for name in list(arrays)[1:])]
    return dict(zip(names, arrays.values(), strict=False))


def edges_of(codec: Codec, kind: str) -> np.ndarray:
    """Return the decision boundaries of each value of a group, float64 (group_values, k)."""
    edges = codec.boundaries[kind]
    return np.broadcast_to(edges, (codec.group_values, np.shape(edges)[-1]))


def boundary_ulps(codec: Codec, coordinates: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return how far coordinates are from the nearest decision boundary: by kind, (groups, values).

    The unit is that of the group's root mean square coordinate, as errors come from whole sums: of
    the kind where that is largest, as residuals have the errors of what they are left from.
    Infinity where there are no coordinates; kinds without boundaries are left out.
    """
    wide = {kind: r.astype(np.float64) for kind, r in coordinates.items()}
    with np.errstate(all="ignore"):
        squares = [(r**2).mean(axis=1, keepdims=True) for r in wide.values()]
        unit = ULP * np.sqrt(np.max(squares, axis=0)) if squares else np.zeros(())
    return {
        kind: _ulps(edges_of(codec, kind), r, unit)
        for kind, r in wide.items()
        if kind in codec.boundaries
    }


def _ulps(edges: np.ndarray, r: np.ndarray, unit: np.ndarray) -> np.ndarray:
    distance = np.full(r.shape, np.inf)
    with np.errstate(all="ignore"):
        for edge in edges.T:
            distance = np.fmin(distance, np.abs(r - edge))
        ulps = np.where(distance == 0, 0.0, distance / unit)
    return np.where(np.isfinite(unit), ulps, np.inf)


def _near_boundaries(codec: Codec, x: np.ndarray, coordinates: dict[str, Any]) -> np.ndarray:
    """Tell which values x (groups, values) have a code of any kind that rounding decides.

    A coordinate exactly on a boundary is a tie that every kernel must decide in the same way if no
    rounding led to it: without a rotation, or from so few values that all their sums are exact.
    """
    mixed = codec.rotation_values
    terms = (x.reshape(len(x), -1, mixed) != 0).sum(axis=2)
    exact = np.repeat((terms <= EXACT_TERMS) | (mixed == 1), mixed, axis=1)
    near = np.zeros(x.shape, bool)
    for ulps in boundary_ulps(codec, coordinates).values():
        near |= (ulps <= BOUNDARY_ULPS) & ~((ulps == 0) & exact)
    return near


def loose_scales(scale: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Tell which scales round to another number if they are a few units off, or are NaN.

    Those that are stored as float32 are not rounded.
    """
    return ((_changed_bits(scale, kind) != 0) & np.isfinite(scale)) | np.isnan(scale)


def _mask(
    codec: Codec, near: np.ndarray, loose: dict[str, Any], scales: dict[str, Any]
) -> np.ndarray:
    """Return the bits that rounding may change, uint8 (blocks, bytes).

    If a value is near a boundary, its codes of all kinds are free, and so are the scales of its
    group, another code being another correction of the norm, and what is derived from the codes.
    """
    by_block = near.reshape(-1, codec.block_values)
    mask = np.zeros((len(by_block), codec.layout.dtype.itemsize), np.uint8)
    for block, element in np.argwhere(by_block):
        mask[block] |= code_mask(codec, element)
    free = np.repeat(near.any(axis=1), codec.group_blocks)
    for name in codec.layout.scales:
        span = codec.layout.span(name)
        mask[free, span] = 0xFF
        kind = codec.layout.dtype[name].base
        change = np.where(loose[name], _changed_bits(scales[name], kind), 0)
        change = change.astype(f"<u{kind.itemsize}")
        mask[:, span] |= change.reshape(len(mask), -1).view(np.uint8)
    for name in codec.layout.derived:
        mask[free, codec.layout.span(name)] = 0xFF
    for name in codec.layout.unwritten:
        mask[:, codec.layout.span(name)] = 0xFF
    return mask


def _shared(codec: Codec, mask: np.ndarray, rows: int) -> np.ndarray:
    """Return the mask, uint8 (blocks, bytes), with what one block frees of its whole row."""
    head, by_row = codec.layout.header_bytes, mask.reshape(rows, -1, mask.shape[1])
    by_row[:, :, :head] = np.bitwise_or.reduce(by_row[:, :, :head], axis=1, keepdims=True)
    return by_row.reshape(mask.shape)


def _changed_bits(scale: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Return the bits of scales that a few units more or less may change."""
    change = np.uint32(0)
    if kind.itemsize == 2:
        with np.errstate(all="ignore"):
            change = fp16_bits(scale * (1 - STEP)) ^ fp16_bits(scale * (1 + STEP))
    return np.where(np.isnan(scale), ANY_QUIET_NAN[kind.itemsize], change)


# --- dequantize ----------------------------------------------------------------------------------


def _dequantize(fmt: Format, seed: int, size: str) -> Iterator[Case]:
    rows = 4 if size == "small" else 64
    builders = {
        "normal": (("normal", "distinct_lanes", "tail", "row_index"), "encoded values", _encoded),
        "byte_ramp": (("byte_ramp", "ramp"), "bytes that ascend, scale 1", _byte_ramp),
        "random_bits": (("random_bits",), "random codes and signs, plain scales", _random_bits),
        "scales": (("scales", "subnormal", "nan"), "one special scale per block", _special_scales),
    }
    if not (fmt.layout.scales or fmt.layout.small_scales):
        del builders["scales"]
    for name, (flags, comment, make) in builders.items():
        key = case_id(fmt, "dequantize", name)
        bits = stream(seed, key)
        packed = make(fmt, rows, bits)
        given = {"packed": packed}
        if fmt.sibling:
            shape = (*packed.shape[:-1], fmt.row_values(packed.shape[-1]))
            given["sibling"] = _sibling(fmt, shape, bits)
            y = tbq.dequantize_paired(packed, given["sibling"], fmt)
        else:
            y = tbq.dequantize(packed, fmt)
        case = Case(key, "dequantize", fmt, flags, _words(fmt, comment), given, "y", y)
        if not fmt.sibling:
            blocks = as_blocks(fmt.codec, bodies(fmt.codec, packed))
            case.taps = {"levels": fmt.codec.levels(blocks)}
        case.match = _nmse("dequantize", unit(fmt))
        yield case


def _nmse(op: str, group: int) -> dict[str, Any]:
    """Return the rule: squared error over squared values, in each run of `group` values."""
    limit, reason = NMSE[op]
    return {"mode": "nmse", "max": limit, "group": group, "reason": reason}


def _encoded(fmt: Format, rows: int, bits: np.random.PCG64) -> np.ndarray:
    return tbq.quantize(gaussian(bits, rows, 3 * unit(fmt)), fmt)


def _make_plain(fmt: Format, blocks: np.ndarray, bits: np.random.PCG64) -> None:
    """Give arbitrary blocks scales between 1 and 2, finite values, and outliers in order."""
    layout, n = fmt.layout, blocks.size
    for name in layout.scales:
        shape = blocks[name].shape
        scale = 1 + raw_bytes(bits, blocks[name].size).astype(np.float32) / 256
        blocks[name] = scale.astype(np.float16).reshape(shape)
    if layout.outliers:
        positions, values = layout.outliers
        count = blocks[positions].shape[-1]
        step = 3 * fmt.group_values // 4 // max(count, MAX_OUTLIERS)
        start = raw_bytes(bits, n).reshape(*blocks.shape, 1) % (fmt.block_values // 4)
        blocks[positions] = start.astype(int) + np.arange(count) * step
        loud = gaussian(bits, n * count).reshape(blocks[values].shape)
        blocks[values] = (4 * loud).astype(np.float16)
    if layout.small_scales:  # which of their values are plain, the encoder knows
        encoded = tbq.quantize(gaussian(bits, n, fmt.block_values), fmt)
        for name in layout.small_scales:
            blocks[name] = fmt.codec.blocks(encoded)[name].reshape(blocks[name].shape)
    for name in layout.floats:
        blocks[name] = gaussian(bits, blocks[name].size).reshape(blocks[name].shape)
    for name in layout.padding:
        blocks[name] = 0


def _byte_ramp(fmt: Format, rows: int, bits: np.random.PCG64) -> np.ndarray:
    n = 3 * (unit(fmt) // fmt.block_values) * fmt.block.itemsize
    raw = (np.arange(2 * n) * 37 + 11).astype(np.uint8).reshape(2, n)
    blocks = raw.view(fmt.block)
    _make_plain(fmt, blocks, bits)
    for name in fmt.layout.scales:
        blocks[name] = 1
    return fmt.codec.rows(blocks)


def _random_bits(fmt: Format, rows: int, bits: np.random.PCG64) -> np.ndarray:
    n = 3 * (unit(fmt) // fmt.block_values) * fmt.block.itemsize
    blocks = raw_bytes(bits, rows * n).reshape(rows, n).copy().view(fmt.block)
    _make_plain(fmt, blocks, bits)
    return fmt.codec.rows(blocks)


def _special_scales(fmt: Format, rows: int, bits: np.random.PCG64) -> np.ndarray:
    """Return encoded groups, one for each special value of each scale."""
    special = np.array(SPECIAL_SCALES, "<u2").view("<f2")
    names = (*fmt.layout.scales, *fmt.layout.small_scales)
    packed = tbq.quantize(gaussian(bits, len(names) * len(special), fmt.group_values), fmt)
    raw = bodies(fmt.codec, packed)
    blocks = as_blocks(fmt.codec, raw).reshape(len(names), len(special), -1)
    for i, name in enumerate(names):
        shape = (-1, *[1] * (blocks[name][i].ndim - 1))
        own = special if name in fmt.layout.scales else np.linspace(0, 255, len(special))
        blocks[name][i] = own.reshape(shape)
    return with_bodies(fmt.codec, packed, raw)


# --- attention and rotations ---------------------------------------------------------------------


def _scores(fmt: Format, seed: int, size: str) -> Iterator[Case]:
    if "K" not in fmt.side:
        return
    for keys in (6,) if size == "small" else (6, 64):
        key = case_id(fmt, "scores", f"normal_{keys}")
        bits = stream(seed, key)
        x, q = gaussian(bits, keys, 3 * unit(fmt)), gaussian(bits, 3, 3 * unit(fmt))
        given = {"q": q}
        if fmt.sibling:
            given["sibling"] = _sibling(fmt, x.shape, bits)
            given["packed"] = tbq.quantize_paired(x, given["sibling"], fmt)
        else:
            given["packed"] = tbq.quantize(x, fmt)
        s = tbq.scores(q, given["packed"], fmt, sibling=given.get("sibling"))
        comment = _words(fmt, f"3 queries, {keys} keys of three blocks")
        flags = ("attention", "distinct_lanes", "row_index")
        yield Case(
            key, "scores", fmt, flags, comment, given, "scores", s, match=_nmse("scores", keys)
        )


def _weighted_sum(fmt: Format, seed: int, size: str) -> Iterator[Case]:
    if "V" not in fmt.side:
        return
    for keys in (6,) if size == "small" else (6, 64):
        key = case_id(fmt, "weighted_sum", f"normal_{keys}")
        bits = stream(seed, key)
        packed = tbq.quantize(gaussian(bits, keys, 3 * unit(fmt)), fmt)
        p = (1 + raw_bytes(bits, 3 * keys).astype(np.float32).reshape(3, keys)) / np.float32(256)
        total = tbq.weighted_sum(p, packed, fmt)
        given = {"p": p, "packed": packed}
        flags = ("attention", "distinct_lanes")
        comment = _words(fmt, f"3 sets of weights, {keys} rows of three blocks")
        match = _nmse("weighted_sum", total.shape[1])
        yield Case(key, "weighted_sum", fmt, flags, comment, given, "sum", total, match=match)


def _rotations(seed: int) -> Iterator[Case]:
    for kind in KINDS:
        for head_dim in (d for d in HEAD_DIMS + (128,) if d % 64 == 0):
            key = f"{GRAPH}/{kind}/rotation/head_dim_{head_dim}"
            x = gaussian(stream(seed, key), 4, 2, head_dim)
            x[0, 0] = 0
            x[0, 0, 5] = 1
            y = tbq.rotation(kind, head_dim).forward(x)
            flags: tuple[str, ...] = ("graph_rotation", "one_hot")
            if head_dim in HEAD_DIMS:
                flags += (f"head_dim_{head_dim}",)
            comment = f"4 rows of 2 heads of {head_dim}; the first head is a unit vector"
            yield Case(
                key,
                "rotation",
                None,
                flags,
                comment,
                {"x": x},
                "y",
                y,
                match=_nmse("rotation", head_dim),
                rotation=kind,
            )


def _backward(op: str, seed: int) -> Iterator[Case]:
    normal = gaussian(stream(seed, f"{GRAPH}/{op}/x"), 4, 64)
    # past 88.7 exp(-x) is infinite, past 17 the sigmoid is 1
    ramp = np.linspace(-100, 100, 256, dtype=np.float32).reshape(64, 4).T.copy()  # all in each row
    near = np.ldexp(normal, -20)  # gradients of nearly straight lines
    values = {
        "normal": (normal, ("normal", "backward"), "normal values"),
        "ramp": (ramp, ("backward", "saturated"), "values from -100 to 100"),
        "near_zero": (near.astype(np.float32), ("backward",), "values near zero"),
    }
    for name, (x, flags, comment) in values.items():
        key = f"{GRAPH}/{op}/backward/{name}"
        dy = gaussian(stream(seed, key), *x.shape)
        limit, reason = NMSE["backward"]
        yield Case(
            key,
            op,
            None,
            flags,
            comment,
            {"x": x, "dy": dy},
            "dx",
            BACKWARD[op](x, dy),
            taps={"sigmoid": sigmoid(x)},
            match={"mode": "nmse", "max": limit, "group": x.shape[-1], "reason": reason},
        )


_BUILDERS = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "scores": _scores,
    "weighted_sum": _weighted_sum,
}
