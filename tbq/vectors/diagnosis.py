"""Which bug explains a wrong output.

What a hypothesis is worth is the share of the relevant groups (blocks, rows or heads that are
wrong, or that it would make wrong) in which the output is what it predicts. All cases of a format
and operation are judged together. `tbq.vectors.predicted` has the hypotheses that say what the
output would be, `tbq.vectors.observed` those that look at it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tbq.codec import Codec
from tbq.vectors.code_bits import as_blocks, codes_of
from tbq.vectors.match import WRONG, Comparison, group_nmse, groups
from tbq.vectors.observed import OBSERVATIONS
from tbq.vectors.predicted import predictions

# A prediction of floats agrees with a group if the error is no larger than this.
SAME = 1e-6
# A prediction of blocks agrees if nearly all codes do (rounding flips a few) and the scales do.
SAME_CODES = 0.93
SAME_SCALE = 0.02
SMALLEST_STEP = 2.0**-23  # two units of a subnormal float16
# What differs within rounding has to do so in so many groups before it is a bug's.
LEAST_EXACT = 4
# An explanation that covers less than this is not worth printing.
WORTH = 0.5

# Every bug that has a name of its own. Of equally good explanations the first is named, then those
# that only a family knows, the catch-all last.
BUGS = (
    "negated",
    "not rotated",
    "rotated with the transpose",
    "sign diagonal missing",
    "sign diagonal on the wrong side",
    "nibbles swapped",
    "bit order reversed",
    "codes off by one",
    "rotated in halves",
    "sign vectors swapped",
    "transform scaled otherwise",
    "another 1/sqrt(128)",
    "greedy instead of a search",
    "walk from one state",
    "not the best walk",
    "residual signs ignored",
    "residual signs negated",
    "residual left out",
    "norm not corrected",
    "norm corrected",
    "another block index",
    "another codebook",
    "fields in another order",
    "scale as bfloat16",
    "scale read elsewhere",
    "outliers left out",
    "wrong row stride",
    "another rotation",
    "float16 intermediate",
    "scaled by a constant",
    "another tie rule",
    "only some lanes read",
    "only some lanes written",
    "stale or unwritten tail",
    "stochastic instead of nearest",
    "as another release does it",
    "as another dialect does it",
)


@dataclass(frozen=True)
class Diagnosis:
    """A bug, what is known of it, and the share of the evidence that it explains."""

    bug: str
    detail: str
    explained: float

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.bug}{detail}: explains {self.explained:.0%}"


def diagnose(evidence: Sequence[Comparison]) -> list[Diagnosis]:
    """Return the bugs that explain the outputs of one format and operation, the best first.

    Where all of them may be explained by rounding, a bug explains them if it predicts every bit.
    """
    wrong = any(c.verdict == WRONG for c in evidence)
    found = list(_judged(evidence, exactly=not wrong))
    for bug, observe in OBSERVATIONS if wrong else ():
        found += [Diagnosis(bug, detail, share) for detail, share in observe(evidence)]
    best: dict[str, Diagnosis] = {}
    for d in sorted(found, key=lambda d: (-round(d.explained, 2), _rank(d.bug))):
        if d.explained >= WORTH:
            best.setdefault(d.bug, d)
    return list(best.values())


def _rank(bug: str) -> float:
    """Return where a bug stands among others that explain as much.

    A family's own predict whole outputs, which says more than that some lanes are right.
    """
    return BUGS.index(bug) if bug in BUGS else BUGS.index("only some lanes read") - 0.5


def _judged(evidence: Sequence[Comparison], exactly: bool) -> Iterator[Diagnosis]:
    counts: dict[tuple[str, str], np.ndarray] = {}
    for c in evidence:
        measured = _Measured(c)
        for bug, detail, output in predictions(c.case):
            predicted = output.reshape(c.case.expected.shape)
            total = counts.setdefault((bug, detail), np.zeros(2))
            total += (measured.exact_agreement if exactly else measured.agreement)(predicted)
    for (bug, detail), (agree, relevant) in counts.items():
        if relevant >= (LEAST_EXACT if exactly else 1):
            yield Diagnosis(bug, detail, agree / relevant)


class _Measured:
    """One output's groups and their errors, which every prediction is compared with."""

    def __init__(self, comparison: Comparison) -> None:
        self.case = comparison.case
        self.actual = groups(self.case, comparison.actual)
        self.expected = groups(self.case, self.case.expected)
        self.stored = self.case.expected.dtype == np.uint8
        if not self.stored:
            self.error = group_nmse(self.actual, self.expected)
            self.finite = np.isfinite(self.expected).all(axis=1)

    def agreement(self, predicted: np.ndarray) -> np.ndarray:
        """Return how many relevant groups agree with a prediction, and how many there are."""
        a, e, p = self.actual, self.expected, groups(self.case, predicted)
        if self.stored:
            relevant = (a != e).any(axis=1) | (p != e).any(axis=1)
            agree = (a == p).all(axis=1)
            close = relevant & ~agree
            agree[close] = _same_blocks(self.case.fmt.codec, a[close], p[close], e[close])
        else:
            limit = self.case.match["max"]
            relevant = ~(self.error <= limit) | ~(group_nmse(p, e) <= limit)
            relevant &= self.finite
            agree = group_nmse(a, p) <= np.minimum(SAME, self.error / 4)
        return np.array([(agree & relevant).sum(), relevant.sum()], float)

    def exact_agreement(self, predicted: np.ndarray) -> np.ndarray:
        """Return how many groups that are not as expected, or predicted not to be, are predicted.

        Every bit counts, but those of NaN.
        """
        a, e, p = self.actual, self.expected, groups(self.case, predicted)
        relevant = ~_same(a, e) | ~_same(p, e)
        return np.array([(_same(a, p) & relevant).sum(), relevant.sum()], float)


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Tell which groups of two outputs are the same."""
    return ((a == b) | ((a != a) & (b != b))).all(axis=1)


def _same_blocks(codec: Codec, a: np.ndarray, p: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Tell which blocks are the same but for a few codes, and nearer to each other than to e."""
    same = np.ones(len(a), bool)
    if not len(a):
        return same
    mine, theirs = as_blocks(codec, a), as_blocks(codec, p)
    for name in codec.layout.scales:
        close = _same_scales(mine[name].astype(np.float32), theirs[name].astype(np.float32))
        same &= close.reshape(len(a), -1).all(axis=1)
    if codec.layout.signs:
        span = codec.layout.span(codec.layout.signs)
        same &= (a[:, span] == p[:, span]).all(axis=1)
    if same.any():
        same[same] = _same_codes(codec, a[same], p[same], e[same])
    return same


def _same_codes(codec: Codec, a: np.ndarray, p: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Tell which blocks have nearly all codes in common, and more than with e."""
    same = np.ones(len(a), bool)
    x, y, z = (codes_of(codec, raw) for raw in (a, p, e))
    nearer = np.zeros(len(a)) if x else np.ones(len(a))
    for kind in x:
        share = (x[kind] == y[kind]).mean(axis=1)
        same &= share >= SAME_CODES
        nearer += share - (x[kind] == z[kind]).mean(axis=1)
    return same & (nearer > 0)


def _same_scales(a: np.ndarray, p: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        close = np.abs(a - p) <= np.maximum(SAME_SCALE * np.abs(p), SMALLEST_STEP)
    return close | (a == p) | (np.isnan(a) & np.isnan(p))
