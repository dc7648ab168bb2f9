"""Checking a kernel's outputs against a set of vectors, with a diagnosis of what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from tbq import FileFormatError
from tbq.vectors import (
    EXACT,
    ROUNDING,
    WRONG,
    Case,
    Comparison,
    Diagnosis,
    compare,
    diagnose,
    format_name,
)
from tbq.vectors.match import groups

from .console import shown
from .vector_files import VectorSet, read_exactly
from .vector_manifest import DTYPES

SCHEMA = "tbq-vectors-check/1"
VERDICTS = (EXACT, ROUNDING, WRONG)
MISSING = "missing"
OLD_BYTES = "depends on the old bytes of its destination"


class Output(NamedTuple):
    """What a kernel wrote for a case.

    Attributes:
        array: the output.
        dirty: the same into a destination that held 0xFF everywhere; None if that was not tried.
    """

    array: np.ndarray
    dirty: np.ndarray | None = None


# Returns a kernel's output for a case, or None if it has no such operation.
Kernel = Callable[[Case], Output | None]


@dataclass
class Group:
    """All cases of one format (or rotation) and operation, and what is wrong with them."""

    name: str
    op: str
    comparisons: list[Comparison] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    stale: list[Diagnosis] = field(default_factory=list)
    diagnoses: list[Diagnosis] = field(default_factory=list)

    def count(self, verdict: str) -> int:
        """Return how many cases had a verdict."""
        if verdict == MISSING:
            return len(self.missing)
        return sum(c.verdict == verdict for c in self.comparisons)

    @property
    def failed(self) -> bool:
        """Whether a case is wrong, or its output cannot be read."""
        return bool(self.missing) or self.count(WRONG) > 0

    def add(self, case: Case, output: Output) -> None:
        """Compare a case's output, and with it what was written over other bytes."""
        found = compare(case, output.array)
        if output.dirty is not None:
            stale = _old_bytes(case, output)
            if stale is not None:
                self.stale.append(stale)
                if found.verdict != WRONG:
                    found.verdict, found.detail = WRONG, f"{OLD_BYTES}: {stale.detail}"
        self.comparisons.append(found)

    def diagnose(self) -> None:
        """Find out what is wrong with the outputs that are, by themselves, not exact."""
        own = [c for c in self.comparisons if not c.detail.startswith(OLD_BYTES)]
        self.diagnoses = self.stale[:1]
        if any(c.verdict != EXACT for c in own):
            self.diagnoses = self.diagnoses + diagnose(own)


def _old_bytes(case: Case, output: Output) -> Diagnosis | None:
    """Say which bytes of an output are what the destination held before; None if none are."""
    a, b = (groups(case, x.reshape(case.expected.shape)) for x in output)
    a, b = (np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1) for x in (a, b))
    differs = a != b
    if not differs.any():
        return None
    where = np.flatnonzero(differs.any(axis=0))
    places = f"byte {where[0]}" if len(where) == 1 else f"{len(where)} bytes from byte {where[0]}"
    untouched = (a[differs] == 0).all() and (b[differs] == 0xFF).all()
    why = "never written" if untouched else "written without being cleared first"
    bad = differs.any(axis=1)
    detail = f"{places} of {bad.sum()} of {len(bad)} groups, {why}"
    return Diagnosis(OLD_BYTES, detail, 1.0)


@dataclass
class Outcome:
    """What a check found: groups in the order of the set, and cases that were not run."""

    groups: list[Group]
    not_run: list[str]

    @property
    def wrong(self) -> bool:
        """Whether any case is wrong or missing."""
        return any(group.failed for group in self.groups)


def files_kernel(folder: Path) -> Kernel:
    """Return a kernel whose outputs are files, named as the expected ones are."""
    if not folder.is_dir():
        raise FileFormatError(folder, None, "not a folder with outputs")

    def output(case: Case) -> Output:
        kind = "u8" if case.expected.dtype == np.uint8 else "f32"
        path = folder / f"{case.id}.{case.output}.{kind}"
        return Output(np.frombuffer(read_exactly(path, case.expected.nbytes), DTYPES[kind]))

    return output


def check(
    vectors: VectorSet,
    entries: list[dict],
    kernel: Kernel,
    advance: Callable[[int], None] = lambda n: None,
) -> Outcome:
    """Run and compare cases; `advance` is told of each that is done.

    An output that is missing or of the wrong size is a case's verdict, not the end of the run.

    Raises:
        FileFormatError: a file of the set is missing or damaged.
    """
    found: dict[tuple[str, str], Group] = {}
    not_run = []
    for entry in entries:
        key = format_name(vectors.format(entry), entry["rotation"]), entry["op"]
        group = found.setdefault(key, Group(*key))
        case = vectors.load(entry)
        try:
            output = kernel(case)
        except FileFormatError as error:
            group.missing.append((case.id, str(error)))
        else:
            if output is None:
                not_run.append(case.id)
            else:
                group.add(case, output)
        advance(1)
    groups_ = [group for group in found.values() if group.comparisons or group.missing]
    for group in groups_:
        group.diagnose()
    return Outcome(groups_, not_run)


# --- reports -------------------------------------------------------------------------------------


def lines(vectors: VectorSet, outcome: Outcome, verbose: bool) -> Iterator[str]:
    """Yield the report for a terminal."""
    notes = vectors.manifest["notes"]
    for group in outcome.groups:
        every = (*VERDICTS, MISSING)
        counts = ", ".join(f"{group.count(v)} {v}" for v in every if group.count(v))
        yield f"{'FAIL' if group.failed else 'ok  '} {group.name} {group.op}: {counts}"
        shown_ = group.missing if verbose else group.missing[:3]
        yield from (f"       {name}: {reason}" for name, reason in shown_)
        if len(shown_) < len(group.missing):
            yield f"       and {len(group.missing) - len(shown_)} more"
        for c in group.comparisons:
            if c.verdict == WRONG or (verbose and c.verdict != EXACT):
                yield f"       {c.case.id}: {c.verdict}: {c.detail}"
            if c.verdict == WRONG and verbose:
                for flag in c.case.flags:
                    yield f"         {flag}: {notes.get(flag, {}).get('bug', '')}"
        for d in group.diagnoses[:3]:
            yield f"     > {d}"
        if group.count(WRONG) and not group.diagnoses:
            flags = _suspicious_flags(group)
            hint = (
                f"; only cases of {', '.join(flags)} fail: {notes[flags[0]]['bug']}"
                if flags and flags[0] in notes
                else ""
            )
            yield f"     > no known bug explains it{hint}"
    if outcome.not_run:
        yield f"not run: {len(outcome.not_run)} cases of operations that this kernel does not have"


def _suspicious_flags(group: Group) -> list[str]:
    """Return the flags that all wrong cases have and no right one."""
    wrong = [set(c.case.flags) for c in group.comparisons if c.verdict == WRONG]
    right = [set(c.case.flags) for c in group.comparisons if c.verdict != WRONG]
    return sorted(set.intersection(*wrong) - set().union(*right))


def report(vectors: VectorSet, outcome: Outcome) -> dict:
    """Return the report for machines."""
    return {
        "schema": SCHEMA,
        "vectors": str(vectors.folder),
        "seed": vectors.manifest["seed"],
        "size": vectors.manifest["size"],
        "wrong": outcome.wrong,
        "groups": [
            {
                "format": group.name,
                "op": group.op,
                "counts": {v: group.count(v) for v in (*VERDICTS, MISSING)},
                "diagnoses": [
                    {"bug": d.bug, "detail": d.detail, "explained": d.explained}
                    for d in group.diagnoses
                ],
                "cases": [
                    {
                        "id": c.case.id,
                        "verdict": c.verdict,
                        "detail": c.detail,
                        "flags": list(c.case.flags),
                        "bad_groups": c.bad_groups.tolist(),
                        "worst": c.worst,
                    }
                    for c in group.comparisons
                ]
                + [_missing_case(*pair) for pair in group.missing],
            }
            for group in outcome.groups
        ],
        "not_run": outcome.not_run,
    }


def _missing_case(name: str, reason: str) -> dict:
    return {
        "id": name,
        "verdict": MISSING,
        "detail": reason,
        "flags": [],
        "bad_groups": [],
        "worst": None,
    }


def junit(vectors: VectorSet, outcome: Outcome) -> bytes:
    """Return the report as JUnit XML, one test suite per format and operation."""
    root = ElementTree.Element("testsuites", name="tbq-vectors")
    for group in outcome.groups:
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=shown(f"{group.name} {group.op}"),
            tests=str(len(group.comparisons) + len(group.missing)),
            failures=str(group.count(WRONG)),
            errors=str(len(group.missing)),
        )
        for name, reason in group.missing:
            test = ElementTree.SubElement(suite, "testcase", name=shown(name), classname=group.name)
            ElementTree.SubElement(test, "error", message=shown(reason))
        for c in group.comparisons:
            test = ElementTree.SubElement(
                suite, "testcase", name=shown(c.case.id), classname=group.name
            )
            if c.verdict == WRONG:
                failure = ElementTree.SubElement(test, "failure", message=shown(c.detail))
                failure.text = (
                    "\n".join(map(shown, group.diagnoses[:3])) or "no known bug explains it"
                )
            elif c.detail:
                ElementTree.SubElement(test, "system-out").text = shown(f"{c.verdict}: {c.detail}")
    if outcome.not_run:
        suite = ElementTree.SubElement(
            root, "testsuite", name="not run", tests=str(len(outcome.not_run)), failures="0"
        )
        for name in outcome.not_run:
            test = ElementTree.SubElement(suite, "testcase", name=shown(name), classname="not run")
            ElementTree.SubElement(test, "skipped")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
