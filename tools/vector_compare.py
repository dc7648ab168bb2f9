"""Comparing a kernel's output with a case: exact, explained by rounding, or wrong, and where."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

import tbq
from tbq import Format, TbqError

from .code_bits import codes_of
from .vector_set import Case, block_index, boundary_ulps

EXACT, ROUNDING, WRONG = "exact", "explained by rounding", "wrong"


@dataclass
class Comparison:
    """What became of one case.

    Attributes:
        case: the case.
        actual: the kernel's output, in the shape of the expected one.
        verdict: EXACT, ROUNDING or WRONG.
        detail: one line about it.
        bad_groups: the blocks, rows or heads that are wrong.
        worst: the worst of them, with the bits or the error; None if none is.
    """

    case: Case
    actual: np.ndarray
    verdict: str
    detail: str = ""
    bad_groups: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    worst: dict | None = None


def compare(case: Case, actual: np.ndarray) -> Comparison:
    """Compare one output with the expected one by the case's rule."""
    expected = case.expected
    actual = actual.reshape(expected.shape)
    if expected.dtype == np.uint8:
        return _compare_bytes(case, actual)
    return _compare_floats(case, actual)


def groups(case: Case, array: np.ndarray) -> np.ndarray:
    """Return an output's blocks, rows or heads, (groups, values or bytes)."""
    if case.expected.dtype == np.uint8:
        return np.ascontiguousarray(array).reshape(-1, case.format.block_bytes)
    return np.ascontiguousarray(array).reshape(-1, case.match["group"])


def decode(case: Case, packed: np.ndarray) -> np.ndarray:
    """Dequantise packed rows of a case's format, beside its siblings if there are any."""
    if "sibling" in case.inputs:
        return tbq.dequantize_paired(packed, case.inputs["sibling"])
    return tbq.dequantize(packed, case.format)


def _compare_bytes(case: Case, actual: np.ndarray) -> Comparison:
    a, e = groups(case, actual), groups(case, case.expected)
    different = a ^ e
    if not different.any():
        return Comparison(case, actual, EXACT)
    mode = case.match["mode"]
    if mode == "boundary":
        outside = different & ~groups(case, case.mask)
        bad = np.flatnonzero(outside.any(axis=1))
        if not len(bad):
            return Comparison(case, actual, ROUNDING, _boundary_detail(case, a, e))
    elif mode == "cost":
        costs, limit = _costs(case, actual), 1 + case.match["max"]
        changed = different.any(axis=1)
        nan = [np.isnan(x.view(case.format.block).reshape(-1)["d"]) for x in (a, e)]
        with np.errstate(all="ignore"):
            same = (costs[0] <= costs[1] * limit) | (nan[0] & nan[1])
        bad = np.flatnonzero(changed & ~same)
        if not len(bad):
            n = int(changed.sum())
            text = f"{n} of {len(a)} blocks hold another walk, no worse than the expected one"
            return Comparison(case, actual, ROUNDING, text)
    else:
        bad = np.flatnonzero(different.any(axis=1))
    bits = np.unpackbits(different, axis=1).sum(axis=1)
    worst = int(bad[np.argmax(bits[bad])])
    detail = f"{len(bad)} of {len(a)} blocks differ; block {worst} in {bits[worst]} bits"
    info = {
        "block": worst,
        "bits": int(bits[worst]),
        "expected": e[worst].tobytes().hex(),
        "actual": a[worst].tobytes().hex(),
    }
    return Comparison(case, actual, WRONG, detail, bad, info)


def _boundary_detail(case: Case, a: np.ndarray, e: np.ndarray) -> str:
    changed = (a != e).any(axis=1)
    moved = codes_of(case.format, a) != codes_of(case.format, e)
    positions = [tuple(p) for p in case.match["positions"] if moved[tuple(p)]]
    scales = [b for b in case.match["scales"] if changed[b]]
    parts = []
    if positions:
        flat = np.ascontiguousarray(case.inputs["x"].reshape(-1, case.format.block_values))
        blocks = np.ascontiguousarray(e).view(case.format.block).reshape(-1)
        index = block_index(case.format, case.inputs["x"])
        stages = case.format.stages_ref(case.format, flat, index, blocks)
        ulps = boundary_ulps(case.format, stages.coordinates)
        shown = ", ".join(f"{p[0]}:{p[1]} ({ulps[p]:.1f} ulps)" for p in positions[:4])
        parts.append(f"values (block:element) {shown}{', ...' if len(positions) > 4 else ''}")
    if scales:
        parts.append(f"scales of blocks {', '.join(map(str, scales[:4]))}")
    parts = parts or [f"scales of blocks {', '.join(map(str, np.flatnonzero(changed)[:4]))}"]
    return f"{' and '.join(parts)} lie within {case.match['ulps']} ulps of a boundary"


def _costs(case: Case, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the squared errors of the blocks of both outputs; infinity if they do not decode."""
    x = case.inputs["x"].reshape(-1, case.format.block_values).astype(np.float64)
    found = []
    for packed in (actual, case.expected):
        try:
            y = decode(case, packed).reshape(x.shape)
            with np.errstate(all="ignore"):
                found.append(((x - y) ** 2).sum(axis=1))
        except TbqError:
            found.append(np.full(len(x), np.inf))
    return found[0], found[1]


def group_nmse(a: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Return each group's squared error over its squared values, float32 (groups, values) both.

    Infinity where only one of two values is finite. Infinities and NaN are alike: a sum that is
    zero in one order, and just not in another, times infinity is either.
    """
    with np.errstate(all="ignore"):
        same = np.isfinite(a) == np.isfinite(e)
        finite = np.isfinite(a) & np.isfinite(e)
        wide = np.where(finite, a.astype(np.float64) - e, 0.0)
        error = (wide**2).sum(axis=1)
        total = (np.where(finite, e.astype(np.float64), 0.0) ** 2).sum(axis=1)
        nmse = np.where(total > 0, error / np.where(total > 0, total, 1), (error > 0) * 1.0)
    nmse[(~finite & ~same).any(axis=1)] = np.inf
    return nmse


def _compare_floats(case: Case, actual: np.ndarray) -> Comparison:
    a, e = groups(case, actual), groups(case, case.expected)
    if np.array_equal(a, e, equal_nan=True):
        return Comparison(case, actual, EXACT)
    nmse, limit = group_nmse(a, e), case.match["max"]
    bad = np.flatnonzero(~(nmse <= limit))
    worst = int(np.argmax(nmse))
    if not len(bad):
        return Comparison(case, actual, ROUNDING, f"NMSE up to {nmse[worst]:.1e} of {limit:g}")
    with np.errstate(all="ignore"):
        at = int(
            np.nanargmax(np.where(np.isnan(a[worst] - e[worst]), np.inf, abs(a[worst] - e[worst])))
        )
    info = {
        "group": worst,
        "nmse": float(nmse[worst]),
        "element": at,
        "expected": float(e[worst, at]),
        "actual": float(a[worst, at]),
    }
    detail = f"{len(bad)} of {len(a)} groups of {a.shape[1]} differ; group {worst} "
    detail += f"with NMSE {nmse[worst]:.3g}, element {at}: {e[worst, at]:.6g} expected, "
    detail += f"{a[worst, at]:.6g} found"
    return Comparison(case, actual, WRONG, detail, bad, info)


def format_name(fmt: Format | None, rotation: str | None) -> str:
    """Return what a case is about, for tables."""
    return fmt.key if fmt is not None else f"graph:{rotation}"
