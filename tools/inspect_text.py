"""tbq-inspect's report for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from .columns import table, wrapped
from .console import say
from .inspect_facts import Fact, facts, verdict
from .inspect_tables import (
    Table,
    candidate_table,
    choice_table,
    notes,
    reference_table,
    side_table,
    tensor_table,
)

LABEL = 10


def print_report(report: dict, details: bool = False) -> None:
    """Print a report that `inspect_report.report` returned; details even where candidates are."""
    say(report["path"])
    _print_facts(verdict(report))
    for warning in report["warnings"]:
        print(wrapped("  ! ", warning))
    print("\nThe file")
    _print_facts(facts(report))
    tried = any(t["candidates"] for t in report["tensors"])
    if details or not tried:
        _print_table(tensor_table(report))
    _print_table(reference_table(report))
    if details:
        _print_table(candidate_table(report))
    for side in "KVT":
        _print_table(side_table(report, side))
    _print_table(choice_table(report))
    for note in notes(report):
        print()
        print(wrapped("", note))
    if tried and not details:
        print()
        say("--details shows every tensor and every candidate on it")


def _print_facts(found: Iterable[Fact]) -> None:
    for label, text in found:
        print(wrapped(f"  {label:<{LABEL}}  ", text))


def _print_table(found: Table | None) -> None:
    """Print a table and its notes; nothing if there is none, or nothing in it."""
    if found is None or not (found.rows or found.notes):
        return
    print()
    print(wrapped("", found.title))
    if found.rows:
        table(found.header, found.rows, grouped=found.grouped)
    for note in found.notes:
        print(wrapped("  ", note))
