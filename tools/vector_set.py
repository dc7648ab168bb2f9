"""Golden vectors: cases with their inputs, expected outputs, stages in between, and match rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

import tbq
from tbq import Format
from tbq.numerics import fp16_bits

from .code_bits import code_mask
from .vector_inputs import Input, gaussian, inputs, raw_bytes, stream
from .vector_notes import HEAD_DIMS

OPERATIONS = ("quantize", "dequantize", "scores", "weighted_sum", "rotation")
GRAPH = "graph"  # where rotations stand, that belong to no format
# Stages are written for rows up to this many values; longer ones are there for their length.
TAPPED_VALUES = 1024
# A kernel that sums in another order may decide otherwise this close to a boundary.
BOUNDARY_ULPS = 8
ULP = 2.0**-23
# Sums of so many equal values, with any signs and in any order, that give zero are exact.
EXACT_TERMS = 4
# The bits in which one quiet float16 NaN may differ from another.
ANY_QUIET_NAN = 0x81FF
NMSE = {
    "dequantize": (1e-11, "float32 sums in any order, fused or not; a float16 step is above this"),
    "scores": (1e-10, "float32 sums in any order; a query rounded to float16 is above this"),
    "weighted_sum": (1e-10, "float32 sums in any order; float16 accumulators are above this"),
    "rotation": (1e-11, "float32 sums in any order; float16 values are above this"),
}
TRELLIS_COST = 1e-4


@dataclass(eq=False)
class Case:
    """One case.

    Attributes:
        id: stable name, `dialect/name/operation/input`; also where its files are.
        op: one of OPERATIONS.
        format: the format, None for graph rotations.
        flags: which bugs it is made for, see vector_notes.
        comment: what the input is.
        inputs: arrays by role: x, packed, q, p, sibling.
        output: the role of the result: packed, y, scores, sum.
        expected: the result.
        taps: stages on the way: norm, coordinates, codes, scale, levels.
        match: when another result is right too.
        mask: bits of packed results that rounding may change, or None.
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
    match: dict = field(default_factory=lambda: {"mode": "exact"})
    mask: np.ndarray | None = None
    rotation: str | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the case by role."""
        found = self.inputs | {self.output: self.expected} | self.taps
        return found if self.mask is None else found | {"mask": self.mask}


def cases(
    formats: Iterable[Format], operations: Iterable[str], seed: int, size: str
) -> Iterator[Case]:
    """Yield the cases of a set, in a fixed order."""
    operations = set(operations)
    for fmt in formats:
        for op in ("quantize", "dequantize", "scores", "weighted_sum"):
            if op in operations:
                yield from _BUILDERS[op](fmt, seed, size)
    if "rotation" in operations:
        yield from _rotations(seed)


def _id(fmt: Format, op: str, name: str) -> str:
    return f"{fmt.dialect}/{fmt.name}/{op}/{name}"


def _sibling(fmt: Format, shape: tuple[int, ...], bits: np.random.PCG64) -> np.ndarray:
    return tbq.quantize(gaussian(bits, *shape), fmt.sibling)


# --- quantize ------------------------------------------------------------------------------------


def _quantize(fmt: Format, seed: int, size: str) -> Iterator[Case]:
    for source in inputs(size):
        yield quantize_case(fmt, source, seed)


def quantize_case(fmt: Format, source: Input, seed: int) -> Case:
    """Return the case of one input, its stages and its match rule."""
    name = _id(fmt, "quantize", source.name)
    bits = stream(seed, name)
    x = source.make(fmt, bits)
    given = {"x": x}
    if fmt.sibling:
        given["sibling"] = _sibling(fmt, x.shape, bits)
        packed = tbq.quantize_paired(x, given["sibling"])
    else:
        packed = tbq.quantize(x, fmt)
    case = Case(name, "quantize", fmt, source.flags, source.comment, given, "packed", packed)
    if not fmt.sibling:
        _add_stages(case)
    return case


def block_index(fmt: Format, x: np.ndarray) -> np.ndarray:
    """Return the index of every block of rows (..., n), in order."""
    return fmt.block_indices(math.prod(x.shape[:-1]), x.shape[-1] // fmt.block_values)


def _add_stages(case: Case) -> None:
    """Add the stages to a case, and the bits that rounding may change."""
    fmt, x = case.format, case.inputs["x"]
    flat = np.ascontiguousarray(x.reshape(-1, fmt.block_values))
    blocks = case.expected.view(fmt.block).reshape(-1)
    stages = fmt.stages_ref(fmt, flat, block_index(fmt, x), blocks)
    ((codes, _),) = fmt.codes(fmt, blocks).values()
    if x.shape[-1] <= TAPPED_VALUES:
        case.taps = {
            "norm": stages.norm,
            "coordinates": stages.coordinates,
            "codes": codes,
            "scale": stages.scale,
        }
    if fmt.boundaries is None and fmt.block_index != "tensor":
        reason = "other walks of the trellis with the same squared error"
        case.match = {"mode": "cost", "max": TRELLIS_COST, "reason": reason}
        return
    near = _near_boundaries(fmt, flat, stages.coordinates)
    loose = _loose_scales(stages.scale)
    if not near.any() and not loose.any():
        return
    case.mask = _mask(fmt, blocks, near, loose, stages.scale).reshape(case.expected.shape)
    case.match = {
        "mode": "boundary",
        "ulps": BOUNDARY_ULPS,
        "positions": np.argwhere(near).tolist(),
        "scales": np.flatnonzero(loose).tolist(),
        "reason": "so many ulps from a decision boundary; or a NaN, whose payload is free",
    }


def boundary_ulps(fmt: Format, r: np.ndarray) -> np.ndarray:
    """Return how far coordinates r (n, values) are from the nearest decision boundary.

    The unit is that of the block's root mean square coordinate, as errors come from whole sums.
    Infinity where there are no boundaries, or no coordinates.
    """
    distance = np.full(r.shape, np.inf)
    if fmt.boundaries is None:
        return distance
    wide = r.astype(np.float64)
    edges = np.broadcast_to(fmt.boundaries, (fmt.block_values, np.shape(fmt.boundaries)[-1]))
    with np.errstate(all="ignore"):
        unit = ULP * np.sqrt((wide**2).mean(axis=1, keepdims=True))
        for edge in edges.T:
            distance = np.fmin(distance, np.abs(wide - edge))
        ulps = np.where(distance == 0, 0.0, distance / unit)
    return np.where(np.isfinite(unit), ulps, np.inf)


def _near_boundaries(fmt: Format, x: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Tell which coordinates r (n, values) of x are so near a boundary that rounding decides.

    A coordinate exactly on a boundary is a tie that every kernel must decide in the same way if no
    rounding led to it: without a rotation, or from so few values that all their sums are exact.
    """
    ulps = boundary_ulps(fmt, r)
    near = ulps <= BOUNDARY_ULPS
    terms = (x.reshape(len(x), -1, fmt.group_values) != 0).sum(axis=2)
    exact = (terms <= EXACT_TERMS) | (fmt.group_values == 1)
    return near & ~((ulps == 0) & np.repeat(exact, fmt.group_values, axis=1))


def _loose_scales(scale: np.ndarray) -> np.ndarray:
    """Tell which scales (n,) round to another float16 if they are a few units off, or are NaN."""
    step = np.float32(BOUNDARY_ULPS * ULP)
    with np.errstate(all="ignore"):
        low, high = fp16_bits(scale * (1 - step)), fp16_bits(scale * (1 + step))
    return ((low != high) & np.isfinite(scale)) | np.isnan(scale)


def _mask(fmt, blocks, near, loose, scale) -> np.ndarray:
    mask = np.zeros((len(blocks), fmt.block_bytes), np.uint8)
    for block, element in np.argwhere(near):
        mask[block] |= code_mask(fmt, element)
    at = fmt.block.fields["d"][1]
    mask[near.any(axis=1), at : at + 2] = 0xFF  # another code, another correction of the norm
    step = np.float32(BOUNDARY_ULPS * ULP)
    with np.errstate(all="ignore"):
        change = fp16_bits(scale * (1 - step)) ^ fp16_bits(scale * (1 + step))
    change[np.isnan(scale)] = ANY_QUIET_NAN
    for block in np.flatnonzero(loose):
        mask[block, at : at + 2] |= change[block : block + 1].astype("<u2").view(np.uint8)
    return mask


# --- dequantize ----------------------------------------------------------------------------------


def _dequantize(fmt: Format, seed: int, size: str) -> Iterator[Case]:
    rows = 4 if size == "small" else 64
    builders = {
        "normal": (("normal", "distinct_lanes", "tail", "row_index"), "encoded values", _encoded),
        "byte_ramp": (("byte_ramp", "ramp"), "bytes that ascend, scale 1", _byte_ramp),
        "random_bits": (("random_bits",), "random codes and signs, plain scales", _random_bits),
        "scales": (("scales", "subnormal", "nan"), "one special scale per block", _special_scales),
    }
    for name, (flags, comment, make) in builders.items():
        key = _id(fmt, "dequantize", name)
        bits = stream(seed, key)
        packed = make(fmt, rows, bits)
        given = {"packed": packed}
        if fmt.sibling:
            shape = (*packed.shape[:-1], fmt.row_values(packed.shape[-1]))
            given["sibling"] = _sibling(fmt, shape, bits)
            y = tbq.dequantize_paired(packed, given["sibling"])
        else:
            y = tbq.dequantize(packed, fmt)
        case = Case(key, "dequantize", fmt, flags, comment, given, "y", y)
        if not fmt.sibling:
            blocks = packed.view(fmt.block).reshape(-1)
            case.taps = {"levels": fmt.levels_ref(fmt, blocks)}
        case.match = _nmse("dequantize", fmt.block_values)
        yield case


def _nmse(op: str, group: int) -> dict:
    """Return the rule: squared error over squared values, in each run of `group` values."""
    limit, reason = NMSE[op]
    return {"mode": "nmse", "max": limit, "group": group, "reason": reason}


def _encoded(fmt: Format, rows: int, bits: np.random.PCG64) -> np.ndarray:
    return tbq.quantize(gaussian(bits, rows, 3 * fmt.block_values), fmt)


def _with_plain_fields(fmt: Format, packed: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    """Give arbitrary bytes scales between 1 and 2, and outliers in order."""
    blocks = packed.view(fmt.block)
    n = blocks.size
    scale = 1 + raw_bytes(bits, n).astype(np.float32) / 256
    blocks["d"] = scale.astype(np.float16).reshape(blocks.shape)
    if "pos" in fmt.block.names:
        count = blocks["pos"].shape[-1]
        start = raw_bytes(bits, n).reshape(*blocks.shape, 1) % 32
        blocks["pos"] = start + np.arange(count, dtype=np.uint8) * 24
        values = gaussian(bits, n * count).reshape(blocks["val"].shape)
        blocks["val"] = (4 * values).astype(np.float16)
    if "pad" in fmt.block.names:
        blocks["pad"] = 0
    return packed


def _byte_ramp(fmt: Format, rows: int, bits: np.random.PCG64) -> np.ndarray:
    n = 3 * fmt.block_bytes
    packed = (np.arange(2 * n) * 37 + 11).astype(np.uint8).reshape(2, n)
    packed = _with_plain_fields(fmt, packed, bits)
    packed.view(fmt.block)["d"] = 1
    return packed


def _random_bits(fmt: Format, rows: int, bits: np.random.PCG64) -> np.ndarray:
    n = 3 * fmt.block_bytes
    return _with_plain_fields(fmt, raw_bytes(bits, rows * n).reshape(rows, n).copy(), bits)


def _special_scales(fmt: Format, rows: int, bits: np.random.PCG64) -> np.ndarray:
    special = [
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
    ]
    packed = tbq.quantize(gaussian(bits, len(special), fmt.block_values), fmt)
    packed.view(fmt.block)["d"] = np.array(special, "<u2").view("<f2")[:, None]
    return packed


# --- attention and rotations ---------------------------------------------------------------------


def _scores(fmt: Format, seed: int, size: str) -> Iterator[Case]:
    if "K" not in fmt.side:
        return
    for keys in (6,) if size == "small" else (6, 64):
        key = _id(fmt, "scores", f"normal_{keys}")
        bits = stream(seed, key)
        x, q = gaussian(bits, keys, 3 * fmt.block_values), gaussian(bits, 3, 3 * fmt.block_values)
        given = {"q": q}
        if fmt.sibling:
            given["sibling"] = _sibling(fmt, x.shape, bits)
            given["packed"] = tbq.quantize_paired(x, given["sibling"])
        else:
            given["packed"] = tbq.quantize(x, fmt)
        s = tbq.scores(q, given["packed"], fmt, sibling=given.get("sibling"))
        comment = f"3 queries, {keys} keys of three blocks"
        flags = ("attention", "distinct_lanes", "row_index")
        yield Case(
            key, "scores", fmt, flags, comment, given, "scores", s, match=_nmse("scores", keys)
        )


def _weighted_sum(fmt: Format, seed: int, size: str) -> Iterator[Case]:
    if "V" not in fmt.side:
        return
    for keys in (6,) if size == "small" else (6, 64):
        key = _id(fmt, "weighted_sum", f"normal_{keys}")
        bits = stream(seed, key)
        packed = tbq.quantize(gaussian(bits, keys, 3 * fmt.block_values), fmt)
        p = (1 + raw_bytes(bits, 3 * keys).astype(np.float32).reshape(3, keys)) / np.float32(256)
        total = tbq.weighted_sum(p, packed, fmt)
        given = {"p": p, "packed": packed}
        flags = ("attention", "distinct_lanes")
        comment = f"3 sets of weights, {keys} rows of three blocks"
        match = _nmse("weighted_sum", total.shape[1])
        yield Case(key, "weighted_sum", fmt, flags, comment, given, "sum", total, match=match)


def _rotations(seed: int) -> Iterator[Case]:
    for kind in ("hadamard64", "hadamard", "dhd64"):
        for head_dim in (d for d in HEAD_DIMS + (128,) if d % 64 == 0):
            key = f"{GRAPH}/{kind}/rotation/head_dim_{head_dim}"
            x = gaussian(stream(seed, key), 4, 2, head_dim)
            x[0, 0] = 0
            x[0, 0, 5] = 1
            y = tbq.rotation(kind, head_dim).forward(x)
            flags = ("graph_rotation", "one_hot")
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


_BUILDERS = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "scores": _scores,
    "weighted_sum": _weighted_sum,
}
