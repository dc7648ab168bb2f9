"""Hypotheses that look at outputs, where a bug leaves its shape and not its values.

Each takes all comparisons of a format and operation, and yields what it found and the share of the
evidence that this explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tbq.vectors.cases import Case, edges_of, stages_of
from tbq.vectors.code_bits import as_blocks, bodies, codes_of
from tbq.vectors.match import Comparison, code_changes, costs, group_nmse, groups

# A ratio of two vectors is constant if what is left of them is no larger than this.
SAME = 1e-6
# A coordinate so close to a boundary is on it, but for rounding.
TIE = 1e-6
# The bug changes nothing but ties; so few other codes may differ among them, by rounding.
TIES_AMONG_OTHERS = 0.05
# A row that is right for less than this share has no tail, it is wrong.
LEAST_RIGHT = 0.125
# A smaller scale has too few bits to tell a ratio.
SMALL_SCALE = 2e-4
# A walk of a search that was cut short is not worse than this.
MOST_WORSE = 3
LANE_PERIODS = (2, 4, 8, 16, 32, 64, 128, 256)
# Lanes that are written are together; others are right by chance.
MOST_EDGES = 3
# Fewer samples of each lane say nothing.
LEAST_SAMPLES = 4
# What is less likely than this is not by chance.
CHANCE = 0.01
FLOAT16_ERRORS = (1e-10, 3e-6)
WIDTHS = (32, 64, 128, 256)

Found = Iterator[tuple[str, float]]


# --- constants -----------------------------------------------------------------------------------


def _scaled(evidence: Sequence[Comparison]) -> Found:
    """Everything right but for one constant: the scale of blocks, or the values."""
    ratios, total = [], 0
    for c in evidence:
        a, e = groups(c.case, c.actual), groups(c.case, c.case.expected)
        wrong = (a != e).any(axis=1)
        total += int(wrong.sum())
        if wrong.any():
            with np.errstate(all="ignore"):
                ratios.append(_constant_ratios(c, a[wrong], e[wrong]))
    found = np.concatenate(ratios) if ratios else np.empty(0)
    found = found[np.isfinite(found)]
    if not len(found) or not total:
        return
    constant = float(np.median(found))
    if abs(constant) < 1e-6 or abs(abs(constant) - 1) < 1e-2:
        return
    share = (np.abs(found / constant - 1) < 5e-3).sum() / total
    yield f"by {constant:.4g}{_known_constant(constant, evidence[0].case)}", float(share)


def _constant_ratios(c: Comparison, a: np.ndarray, e: np.ndarray) -> np.ndarray:
    if a.dtype == np.uint8:
        return _scale_ratios(c, a, e)
    wide, exact = a.astype(np.float64), e.astype(np.float64)
    ratio = (wide * exact).sum(axis=1) / (exact**2).sum(axis=1)
    residual = ((wide - ratio[:, None] * exact) ** 2).sum(axis=1) / (wide**2).sum(axis=1)
    return np.where(residual < SAME, ratio, np.nan)


def _scale_ratios(c: Comparison, a: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Return the ratio of scales that differ, in blocks that are the same in all else; or NaN."""
    codec = c.case.fmt.codec
    rest, scales = np.ones(a.shape[1], bool), codec.layout.scales
    for name in scales:
        rest[codec.layout.span(name)] = False
    if rest.all():
        return np.full(len(a), np.nan)
    x, y = as_blocks(codec, a), as_blocks(codec, e)
    of, by = (
        np.concatenate([b[name].reshape(len(a), -1) for name in scales], axis=1) for b in (x, y)
    )
    ratios = of.astype(np.float64) / by.astype(np.float64)
    ratios[np.abs(by.astype(np.float32)) < SMALL_SCALE] = np.nan
    moved = np.where(of == by, np.nan, ratios)  # scales that are right say nothing
    least, most = np.nanmin(_filled(moved), axis=1), np.nanmax(_filled(moved), axis=1)
    constant = np.abs(most - least) <= 1e-2 * np.abs(most)
    same = (a[:, rest] == e[:, rest]).all(axis=1)
    return np.where(same & constant, most, np.nan)


def _filled(ratios: np.ndarray) -> np.ndarray:
    """Return ratios without rows of NaN only, about which NumPy would warn."""
    return np.where(np.isnan(ratios).all(axis=1, keepdims=True), np.inf, ratios)


def _known_constant(constant: float, case: Case) -> str:
    sizes = set(WIDTHS)
    if case.format is not None:
        codec = case.fmt.codec
        sizes |= {codec.block_values, codec.group_values, codec.rotation_values}
    for n in sorted(sizes):
        roots = (np.sqrt(n), f"sqrt({n})"), (1 / np.sqrt(n), f"1/sqrt({n})")
        for value, name in (*roots, (n, f"{n}"), (1 / n, f"1/{n}")):
            if n > 1 and abs(abs(constant) / value - 1) < 5e-3:
                return f" = {name}"
    return ""


# --- elements ------------------------------------------------------------------------------------


def _right_elements(c: Comparison) -> np.ndarray:
    """Tell which elements of each group are right, (groups, elements)."""
    a, e = groups(c.case, c.actual), groups(c.case, c.case.expected)
    if a.dtype == np.uint8:
        return ~code_changes(c.case.fmt.codec, a, e) if _has_elements(c.case) else a == e
    with np.errstate(all="ignore"):
        rms = np.sqrt((e.astype(np.float64) ** 2).mean(axis=1, keepdims=True))
        return (
            (np.abs(a.astype(np.float64) - e) <= 1e-4 * rms)
            | (a == e)
            | (np.isnan(a) & np.isnan(e))
        )


def _has_elements(case: Case) -> bool:
    """Tell whether the output consists of values or codes, not only of scales."""
    if case.expected.dtype != np.uint8:
        return True
    return bool(codes_of(case.fmt.codec, bodies(case.fmt.codec, case.expected)))


def _usable(evidence: Sequence[Comparison]) -> list[Comparison]:
    return [c for c in evidence if len(c.bad_groups)]


def _some_lanes(evidence: Sequence[Comparison]) -> Found:
    """The same lanes of every so many are right, the others as a rule are not."""
    if evidence[0].case.op == "scores" or not _has_elements(evidence[0].case):
        return
    right = [_right_elements(c)[c.bad_groups] for c in _usable(evidence)]
    right = [r for r in right if r.shape[1] >= 4]
    if not right:
        return
    for period in LANE_PERIODS:
        fitting = [r for r in right if r.shape[1] % period == 0]
        if not fitting:
            continue
        folded = np.concatenate([r.reshape(-1, period) for r in fitting])
        rate = folded.mean(axis=0)
        written = rate > 0.97
        if len(folded) < LEAST_SAMPLES or not written.any() or written.all():
            continue
        chance = period * rate[~written].mean() ** len(folded)  # that some lane is right
        if chance > CHANCE:
            continue
        if rate[~written].max() < 0.8 and np.abs(np.diff(written.astype(int))).sum() <= MOST_EDGES:
            lanes = _ranges(np.flatnonzero(written))
            explained = sum(_all_in_lanes(~r, ~written) for r in fitting)
            share = explained / sum(len(r) for r in right)
            # which says nothing of the other lanes: what predicts nearly all of them says more
            yield f"lanes {lanes} of every {period}", 0.98 * share
            return


def _all_in_lanes(wrong: np.ndarray, lanes: np.ndarray) -> int:
    """Count the groups (groups, elements) whose wrong elements are all in some lanes."""
    outside = wrong & ~np.tile(lanes, wrong.shape[1] // len(lanes))
    return int((~outside.any(axis=1)).sum())


def _ranges(numbers: np.ndarray) -> str:
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _another_tie_rule(evidence: Sequence[Comparison]) -> Found:
    """Codes that differ only where a coordinate is on a boundary."""
    at_ties = elsewhere = explained = bad = 0
    for c in evidence:
        if c.case.op != "quantize" or not c.case.fmt.codec.boundaries:
            return
        differs = ~_right_elements(c)
        tied = _tied(c.case).reshape(differs.shape)
        at_ties += int((differs & tied)[c.bad_groups].sum())
        elsewhere += int((differs & ~tied)[c.bad_groups].sum())
        only = (differs & tied).any(axis=1) & ~(differs & ~tied).any(axis=1)
        explained += int(only[c.bad_groups].sum())
        bad += len(c.bad_groups)
    if at_ties > elsewhere / TIES_AMONG_OTHERS:
        yield "", explained / bad


def _worse_walk(evidence: Sequence[Comparison]) -> Found:
    """Walks that decode nearly as well as the best."""
    ratio = _error_ratios(evidence)
    if len(ratio):
        share = 0.8 * (ratio < MOST_WORSE).mean()
        yield f"{np.median(ratio):.3g} times the least squared error", float(share)


def _one_start(evidence: Sequence[Comparison]) -> Found:
    """The same, where all walks start in one state."""
    ratio = _error_ratios(evidence)
    state = evidence[0].case.fmt.layout.state if len(ratio) else None
    if not state:
        return
    starts = [
        as_blocks(c.case.fmt.codec, groups(c.case, array)[c.bad_groups])[state]
        for c in evidence
        for array in (c.actual, c.case.expected)
    ]
    actual, expected = np.concatenate(starts[::2]), np.concatenate(starts[1::2])
    (found, counts), other = np.unique(actual, return_counts=True), np.unique(expected)
    if len(actual) >= LEAST_SAMPLES and len(other) > 1:
        share = min((ratio < MOST_WORSE).mean(), counts.max() / len(actual))
        yield f"{found[counts.argmax()]}", 0.9 * float(share)


def _error_ratios(evidence: Sequence[Comparison]) -> np.ndarray:
    """Return by how much the walks of wrong blocks are worse, where that can be told."""
    if any(c.case.op != "quantize" or not c.case.fmt.codec.searches for c in evidence):
        return np.empty(0)
    with np.errstate(all="ignore"):
        ratio = np.concatenate(
            [
                (costs(c.case, c.actual) / costs(c.case, c.case.expected))[c.bad_groups]
                for c in evidence
            ]
        )
    return ratio[np.isfinite(ratio)]


def _tied(case: Case) -> np.ndarray:
    """Tell which values (groups, values) have a coordinate on a boundary."""
    codec = case.fmt.codec
    tied = np.zeros((case.inputs["x"].size // codec.group_values, codec.group_values), bool)
    for kind, r in stages_of(case).coordinates.items():
        if kind in codec.boundaries:
            for edge in edges_of(codec, kind).T:
                tied |= np.abs(r - edge) <= TIE
    return tied


def _stale_tail(evidence: Sequence[Comparison]) -> Found:
    """Rows right up to a point, and wrong from there on."""
    explained = total = 0
    tails = set()
    for c in _usable(evidence):
        per_row = _per_row(c.case)
        right = _right_elements(c)
        if per_row is None or right.size % per_row:
            continue
        rows = right.reshape(-1, per_row)
        bad = ~rows.all(axis=1)
        if not bad.any():
            continue  # scales are wrong, not codes
        total += int(bad.sum())
        first = int((~rows[bad]).argmax(axis=1).min())
        wrong = ~rows[bad][:, first:]
        least = 0.4 if c.case.op == "quantize" else 0.9  # codes are right by chance, values are not
        if first < per_row * LEAST_RIGHT or wrong.mean() < least or _periodic(wrong, first):
            continue
        explained += int(bad.sum())
        tails.add(per_row - first)
    if total and explained:
        sizes = ", ".join(map(str, sorted(tails)[:3]))
        yield f"the last {sizes} values of a row", explained / total


def _periodic(wrong: np.ndarray, first: int) -> bool:
    """Tell whether some lane of what should be a tail (rows, elements) is always right."""
    right = 1 - wrong.mean()  # some are, by chance
    for period in LANE_PERIODS:
        start = -first % period
        whole = wrong[:, start : start + (wrong.shape[1] - start) // period * period]
        folded = whole.reshape(-1, period)
        if period * right ** len(folded) < CHANCE and not folded.any(axis=0).all():
            return True
    return False


def _per_row(case: Case) -> int | None:
    """Return how many elements a row of the output has; None if it is no row of elements."""
    if case.op == "scores":
        return None
    return case.inputs["x"].shape[-1] if case.op == "quantize" else case.expected.shape[-1]


# --- noise ---------------------------------------------------------------------------------------


def _stochastic(evidence: Sequence[Comparison]) -> Found:
    """Codes one up or one down at random, all else right."""
    ups = downs = others = seen = 0
    for c in _usable(evidence):
        if c.case.op != "quantize" or not _has_elements(c.case):
            return
        codec = c.case.fmt.codec
        a, e = (groups(c.case, x)[c.bad_groups] for x in (c.actual, c.case.expected))
        finite = _finite_scales(c, e)
        x, y = (next(iter(codes_of(codec, raw[finite]).values())).astype(int) for raw in (a, e))
        step = x - y
        ups, downs = ups + int((step == 1).sum()), downs + int((step == -1).sum())
        others += int((abs(step) > 1).sum())
        seen += step.size
    moved = ups + downs
    if moved < 8 or others > 0.02 * moved or not 0.02 < moved / seen < 0.75:
        return
    if min(ups, downs) < 0.25 * max(ups, downs):
        return
    yield f"{moved / seen:.0%} of the codes are the second nearest", 0.85 * (1 - others / moved)


def _finite_scales(c: Comparison, raw: np.ndarray) -> np.ndarray:
    blocks = as_blocks(c.case.fmt.codec, raw)
    finite = np.ones(len(raw), bool)
    for name in c.case.fmt.layout.scales:
        finite &= np.isfinite(blocks[name]).reshape(len(raw), -1).all(axis=1)
    return finite


def _float16_errors(evidence: Sequence[Comparison]) -> Found:
    """Errors everywhere, of the size that float16 makes."""
    small = total = 0
    for c in evidence:
        if c.case.expected.dtype == np.uint8:
            return
        e = groups(c.case, c.case.expected)
        nmse = group_nmse(groups(c.case, c.actual), e)[np.isfinite(e).all(axis=1)]
        wrong = nmse > c.case.match["max"]
        total += int(wrong.sum())
        small += int(((nmse > FLOAT16_ERRORS[0]) & (nmse < FLOAT16_ERRORS[1])).sum())
    if total:
        yield "errors of that size everywhere", 0.9 * small / max(total, small)


OBSERVATIONS: tuple[tuple[str, Callable[[Sequence[Comparison]], Found]], ...] = (
    ("scaled by a constant", _scaled),
    ("another tie rule", _another_tie_rule),
    ("walk from one state", _one_start),
    ("not the best walk", _worse_walk),
    ("only some lanes written", _some_lanes),
    ("stale or unwritten tail", _stale_tail),
    ("stochastic instead of nearest", _stochastic),
    ("float16 intermediate", _float16_errors),
)
