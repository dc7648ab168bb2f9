"""Comparing a kernel's output with a case: exact, explained by rounding, or wrong, and where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

import tbq
from tbq.codec import Codec
from tbq.errors import TbqError
from tbq.format import Format
from tbq.vectors.cases import Case, boundary_ulps, stages_of
from tbq.vectors.code_bits import as_blocks, bodies, codes_of

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
    worst: dict[str, Any] | None = None


def compare(case: Case, actual: np.ndarray) -> Comparison:
    """Compare one output with the expected one by the case's rule."""
    expected = case.expected
    actual = actual.reshape(expected.shape)
    if expected.dtype == np.uint8:
        return _compare_bytes(case, actual)
    return _compare_floats(case, actual)


def groups(case: Case, array: np.ndarray) -> np.ndarray:
    """Return an output's blocks, rows or heads, (groups, values or bytes).

    What encoders leave unwritten in blocks is zero.
    """
    if case.expected.dtype != np.uint8:
        return np.ascontiguousarray(array).reshape(-1, case.match["group"])
    raw = bodies(case.fmt.codec, array.reshape(case.expected.shape))
    for name in case.fmt.layout.unwritten:
        raw[:, case.fmt.layout.span(name)] = 0
    return raw


def decode(case: Case, packed: np.ndarray, original: bool = False) -> np.ndarray:
    """Dequantise packed rows of a case's format, beside its siblings if there are any.

    If `original`, the values are in the domain that the encoder takes.
    """
    if "sibling" in case.inputs:
        return tbq.dequantize_paired(packed, case.inputs["sibling"], case.fmt)
    return tbq.dequantize(packed, case.fmt, original=original)


def code_changes(codec: Codec, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Tell which values of two blocks (n, bytes) differ in a code of any kind."""
    found, other = codes_of(codec, a), codes_of(codec, b)
    changed = np.zeros((len(a), codec.block_values), bool)
    for kind, codes in found.items():
        if codes.shape == changed.shape:
            changed |= codes != other[kind]
    return changed


def _compare_bytes(case: Case, actual: np.ndarray) -> Comparison:
    a, e = groups(case, actual), groups(case, case.expected)
    different = a ^ e
    if not different.any():
        return Comparison(case, actual, EXACT)
    mode = case.match["mode"]
    if mode == "boundary":
        assert case.mask is not None, case.id
        different &= ~groups(case, case.mask)
    headers, changed = _changed(case, different)
    bad = np.flatnonzero(changed & ~_as_good(case, actual) if mode == "cost" else changed)
    if len(bad) or len(headers):
        return _wrong_bytes(case, actual, bad, headers)
    if mode == "boundary":
        return Comparison(case, actual, ROUNDING, _boundary_detail(case, a, e))
    text = (
        f"{int(changed.sum())} of {len(a)} blocks hold another walk, no worse than the expected one"
    )
    return Comparison(case, actual, ROUNDING, text)


def _wrong_bytes(
    case: Case, actual: np.ndarray, bad: np.ndarray, headers: np.ndarray
) -> Comparison:
    """Return the comparison of an output with wrong blocks or wrong headers of rows."""
    a, e = groups(case, actual), groups(case, case.expected)
    row_blocks = len(a) // max(1, case.expected.size // case.expected.shape[-1])
    parts = []
    if len(headers):
        parts.append(f"the headers of {len(headers)} rows differ, the first of row {headers[0]}")
    if not len(bad):
        bad = headers * row_blocks
        return Comparison(case, actual, WRONG, parts[0], bad, {"row": int(headers[0])})
    bits = np.unpackbits(a ^ e, axis=1).sum(axis=1)
    worst = int(bad[np.argmax(bits[bad])])
    parts.append(f"{len(bad)} of {len(a)} blocks differ; block {worst} in {bits[worst]} bits")
    info = {
        "block": worst,
        "bits": int(bits[worst]),
        "expected": e[worst].tobytes().hex(),
        "actual": a[worst].tobytes().hex(),
    }
    return Comparison(case, actual, WRONG, "; ".join(parts), bad, info)


def _changed(case: Case, different: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of which what they hold once differs, and which blocks do besides."""
    head = case.fmt.layout.header_bytes
    rows = case.expected.size // case.expected.shape[-1]
    headers = different[:, :head].reshape(rows, -1).any(axis=1)
    return np.flatnonzero(headers), np.asarray(different[:, head:].any(axis=1))


def _boundary_detail(case: Case, a: np.ndarray, e: np.ndarray) -> str:
    codec = case.fmt.codec
    changed = (a != e).any(axis=1)
    moved = code_changes(codec, a, e)
    positions = [tuple(p) for p in case.match["positions"] if moved[tuple(p)]]
    scales = [b for b in case.match["scales"] if changed[b]]
    parts = []
    if positions:
        found = boundary_ulps(codec, stages_of(case).coordinates).values()
        ulps = np.min([u.reshape(moved.shape) for u in found], axis=0)
        shown = ", ".join(f"{p[0]}:{p[1]} ({ulps[p]:.1f} ulps)" for p in positions[:4])
        parts.append(f"values (block:element) {shown}{', ...' if len(positions) > 4 else ''}")
    if scales:
        parts.append(f"scales of blocks {', '.join(map(str, scales[:4]))}")
    parts = parts or [f"scales of blocks {', '.join(map(str, np.flatnonzero(changed)[:4]))}"]
    return f"{' and '.join(parts)} lie within {case.match['ulps']} ulps of a boundary"


def _as_good(case: Case, actual: np.ndarray) -> np.ndarray:
    """Tell which blocks belong to groups that decode no worse than the expected ones."""
    codec = case.fmt.codec
    errors = [costs(case, packed) for packed in (actual, case.expected)]
    with np.errstate(all="ignore"):
        good = errors[0] <= errors[1] * (1 + case.match["max"])
    nan = [_has_nan_scale(codec, packed) for packed in (actual, case.expected)]
    return np.repeat(good, codec.group_blocks) | (nan[0] & nan[1])


def _has_nan_scale(codec: Codec, packed: np.ndarray) -> np.ndarray:
    blocks = as_blocks(codec, bodies(codec, packed))
    scales = [np.isnan(blocks[name]).reshape(len(blocks), -1) for name in codec.layout.scales]
    return np.asarray(np.concatenate(scales, axis=1).any(axis=1))


def costs(case: Case, packed: np.ndarray) -> np.ndarray:
    """Return the squared errors of the groups of an output; infinity if they do not decode."""
    x = case.inputs["x"].reshape(-1, case.fmt.group_values).astype(np.float64)
    try:
        y = decode(case, packed, original=True).reshape(x.shape)
    except TbqError:
        return np.full(len(x), np.inf)
    with np.errstate(all="ignore"):
        return ((x - y) ** 2).sum(axis=1)


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
    return fmt.label if fmt is not None else f"graph:{rotation}" if rotation else "graph"
