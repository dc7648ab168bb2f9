"""Checking a kernel's outputs against a set of vectors, with a diagnosis of what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from tbq import FileFormatError

from .diagnosis import Diagnosis, diagnose
from .vector_compare import EXACT, ROUNDING, WRONG, Comparison, compare, format_name
from .vector_files import DTYPES, VectorSet, read_exactly
from .vector_set import Case

SCHEMA = "tbq-vectors-check/1"
VERDICTS = (EXACT, ROUNDING, WRONG)

# Returns a kernel's output for a case, or None if it has no such operation.
Kernel = Callable[[Case], np.ndarray | None]


@dataclass
class Group:
    """All cases of one format (or rotation) and operation, and what is wrong with them."""

    name: str
    op: str
    comparisons: list[Comparison]
    diagnoses: list[Diagnosis]

    def count(self, verdict: str) -> int:
        """Return how many cases had a verdict."""
        return sum(c.verdict == verdict for c in self.comparisons)


@dataclass
class Outcome:
    """What a check found: groups in the order of the set, and cases that were not run."""

    groups: list[Group]
    not_run: list[str]

    @property
    def wrong(self) -> bool:
        """Whether any case is wrong."""
        return any(group.count(WRONG) for group in self.groups)


def files_kernel(folder: Path) -> Kernel:
    """Return a kernel whose outputs are files, named as the expected ones are."""
    if not folder.is_dir():
        raise FileFormatError(folder, None, "not a folder with outputs")

    def output(case: Case) -> np.ndarray:
        kind = "u8" if case.expected.dtype == np.uint8 else "f32"
        path = folder / f"{case.id}.{case.output}.{kind}"
        return np.frombuffer(read_exactly(path, case.expected.nbytes), DTYPES[kind])

    return output


def check(vectors: VectorSet, entries: list[dict], kernel: Kernel) -> Outcome:
    """Run and compare cases.

    Raises:
        FileFormatError: a file of the set or an output is missing or has the wrong size.
    """
    groups: dict[tuple[str, str], list[Comparison]] = {}
    not_run = []
    for entry in entries:
        case = vectors.load(entry)
        actual = kernel(case)
        if actual is None:
            not_run.append(case.id)
            continue
        key = format_name(case.format, case.rotation), case.op
        groups.setdefault(key, []).append(compare(case, actual))
    return Outcome([_group(*key, found) for key, found in groups.items()], not_run)


def _group(name: str, op: str, found: list[Comparison]) -> Group:
    wrong = any(c.verdict == WRONG for c in found)
    return Group(name, op, found, diagnose(found) if wrong else [])


# --- reports -------------------------------------------------------------------------------------


def lines(vectors: VectorSet, outcome: Outcome, verbose: bool) -> Iterator[str]:
    """Yield the report for a terminal."""
    notes = vectors.manifest["notes"]
    for group in outcome.groups:
        counts = ", ".join(f"{group.count(v)} {v}" for v in VERDICTS if group.count(v))
        yield f"{'FAIL' if group.count(WRONG) else 'ok  '} {group.name} {group.op}: {counts}"
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
                if flags
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
                "counts": {v: group.count(v) for v in VERDICTS},
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
                ],
            }
            for group in outcome.groups
        ],
        "not_run": outcome.not_run,
    }


def junit(vectors: VectorSet, outcome: Outcome) -> bytes:
    """Return the report as JUnit XML, one test suite per format and operation."""
    root = ElementTree.Element("testsuites", name="tbq-vectors")
    for group in outcome.groups:
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"{group.name} {group.op}",
            tests=str(len(group.comparisons)),
            failures=str(group.count(WRONG)),
        )
        for c in group.comparisons:
            test = ElementTree.SubElement(suite, "testcase", name=c.case.id, classname=group.name)
            if c.verdict == WRONG:
                failure = ElementTree.SubElement(test, "failure", message=c.detail)
                failure.text = (
                    "\n".join(map(str, group.diagnoses[:3])) or "no known bug explains it"
                )
            elif c.detail:
                ElementTree.SubElement(test, "system-out").text = f"{c.verdict}: {c.detail}"
    if outcome.not_run:
        suite = ElementTree.SubElement(
            root, "testsuite", name="not run", tests=str(len(outcome.not_run)), failures="0"
        )
        for name in outcome.not_run:
            test = ElementTree.SubElement(suite, "testcase", name=name, classname="not run")
            ElementTree.SubElement(test, "skipped")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
