"""The verifier names each deliberate bug first, in every format where it can occur."""

from collections import Counter

import broken_kernels
import numpy as np
import pytest
from broken_kernels import BROKEN
from conftest import FULL, REPRESENTATIVES
from scipy.linalg import hadamard

import tbq
from tbq.rotations import KINDS
from tbq.vectors import (
    BUGS,
    EXACT,
    GRAPH_OPERATIONS,
    OPERATIONS,
    ROUNDING,
    WRONG,
    cases,
    compare,
    diagnose,
)

# Every bug is tried in one format of each kind; of others, that what is right is called so.

# What a float32 kernel in another order could have written, but for every bit of it.
WITHIN_ROUNDING = {"another 1/sqrt(128)"}
# Bugs that only some families know.
OF_FAMILIES = {"parts of values far apart", "multiplied from the right"}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def same_outputs(a, b):
    return all(
        np.array_equal(x, y, equal_nan=x.dtype != np.uint8) for x, y in zip(a, b, strict=True)
    )


# What else a release with other tables may be called.
TABLES = {"another codebook", "the other side's table", "another release's table"}


def named_bug(kernel):
    return kernel.partition(" / ")[0]


def named(found, outputs):
    """Return what the diagnosis calls each bug, and the names that would be right."""
    for bug, mine in outputs.items():
        comparisons = [compare(c, x) for c, x in zip(found, mine, strict=True)]
        invisible = bug in WITHIN_ROUNDING
        if bug == "float16 intermediate" and same_outputs(mine, [c.expected for c in found]):
            continue  # few levels under a float16: so is what is decoded
        assert invisible or any(c.verdict == WRONG for c in comparisons), f"{bug} passes"
        diagnoses = diagnose(comparisons)
        first = diagnoses[0].bug if diagnoses else "nothing"
        equal = {named_bug(o) for o, theirs in outputs.items() if same_outputs(mine, theirs)}
        yield bug, first, equal | (TABLES if bug == "as another release does it" else set())


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op not in GRAPH_OPERATIONS])
def test_every_bug_is_named_first_and_right_is_never_wrong(fmt, op):
    found = list(cases([fmt], [op]))
    if not found:
        assert (op == "scores" and "K" not in fmt.side) or (
            op == "weighted_sum" and "V" not in fmt.side
        )
        return
    for case in found:
        verdict = compare(case, broken_kernels.right(case))
        assert verdict.verdict in (EXACT, ROUNDING), f"{case.id}: {verdict.detail}"
        assert compare(case, case.expected).verdict == EXACT
    if not (FULL or fmt in REPRESENTATIVES):
        return
    outputs = {}
    for bug, kernel in BROKEN.items():
        mine = [kernel(case) for case in found]
        if all(x is not None for x in mine):
            outputs[bug] = mine
    assert len(outputs) >= 3
    for bug, first, equal in named(found, outputs):
        assert first in equal, bug


def test_every_bug_of_a_graph_rotation_is_named_first():
    found = list(cases([], ["rotation"]))
    for kind in KINDS:
        mine = [c for c in found if c.rotation == kind]
        outputs = {bug: [rotate(c) for c in mine] for bug, rotate in broken_rotations(kind).items()}
        for bug, first, equal in named(mine, outputs):
            assert first in equal, (kind, bug)


def broken_rotations(kind):
    def lanes(case):
        out = case.expected.reshape(-1, 8).copy()
        out[:, 4:] = 0
        return out.reshape(case.expected.shape)

    def plain(case, before=1.0, after=1.0):
        h = hadamard(64) / 8
        x = case.inputs["x"].reshape(-1, 64) * before
        return ((x @ h) * after).astype(np.float32).reshape(case.expected.shape)

    signs = tbq.rotation("dhd64", 64).signs
    bugs = {
        "negated": lambda c: -c.expected,
        "scaled by a constant": lambda c: c.expected * np.float32(8),
        "not rotated": lambda c: c.inputs["x"],
        "float16 intermediate": lambda c: c.expected.astype(np.float16).astype(np.float32),
        "only some lanes written": lanes,
    }
    if kind == "dhd64":
        bugs["sign diagonal missing"] = plain
        bugs["sign diagonal on the wrong side"] = lambda c: plain(c, before=signs)
    elif kind == "hadamard":
        bugs["another rotation"] = plain
    else:
        bugs["another rotation"] = lambda c: plain(c, signs, signs)
    return bugs


def test_every_bug_that_can_be_named_is_tried():
    tried = set(map(named_bug, BROKEN)).union(*map(broken_rotations, KINDS))
    assert tried - OF_FAMILIES == set(BUGS) - {"as another dialect does it"}


def test_another_dialect_is_named():
    fmt = tbq.get_format("llama-tq:ktq2_1")
    for op, expected in (("quantize", "as another dialect does it"), ("dequantize", "negated")):
        found = list(cases([fmt], [op]))
        other = "llama-tq-cuda:ktq2_1"
        if op == "quantize":
            outputs = [tbq.quantize(c.inputs["x"], other) for c in found]
        else:
            outputs = [tbq.dequantize(c.inputs["packed"], other) for c in found]
        comparisons = [compare(c, x) for c, x in zip(found, outputs, strict=True)]
        first = diagnose(comparisons)[0]
        assert first.bug == expected
        assert first.explained > 0.99


def test_an_unknown_bug_is_not_called_a_known_one(rng):
    """Random bytes and values are wrong, and nothing explains them."""
    fmt = tbq.get_format("tbq4_0")
    for op in ("quantize", "dequantize"):
        found = list(cases([fmt], [op]))
        comparisons = []
        for case in found:
            if op == "quantize":
                output = rng.integers(0, 256, case.expected.shape, dtype=np.uint8)
            else:
                output = rng.standard_normal(case.expected.shape).astype(np.float32)
            comparisons.append(compare(case, output))
        assert all(c.verdict == WRONG for c in comparisons)
        assert diagnose(comparisons) == []


def test_contracted_and_reordered_sums_are_rounding():
    """A kernel in float64 is explained, with positions and ulps, wherever it is not exact."""
    verdicts = Counter()
    for fmt in (f for f in tbq.formats() if not f.sibling):
        for case in cases([fmt], ["dequantize"]):
            verdicts[compare(case, broken_kernels.right(case)).verdict] += 1
    assert verdicts[ROUNDING] > 10
    assert verdicts[WRONG] == 0


@pytest.mark.parametrize("key", ["pr21089:tbq3_0", "llama-tq:ktq2_1", "buun:turbo3"])
def test_half_of_the_lanes_of_each_group_is_no_tail(key):
    """Values 16 to 31 of every 32 are right in no row, but the next group's first ones are."""
    found = list(cases([tbq.get_format(key)], ["dequantize"]))
    comparisons = []
    for case in found:
        output = case.expected.copy()
        output.reshape(-1, 32)[:, 16:] = 0
        comparisons.append(compare(case, output))
    diagnoses = {d.bug: d for d in diagnose(comparisons)}
    lanes = diagnoses["only some lanes written"]
    assert "lanes 0-15 of every 32" in lanes.detail
    assert lanes.explained > 0.97
    assert "stale or unwritten tail" not in diagnoses
