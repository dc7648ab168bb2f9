"""Text for a terminal: lines that fit, tables, numbers."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

from .console import in_flags, say, shown

MIB = 1024 * 1024
UNSEEN_WIDTH = 80  # of what goes into a file or a pipe
LEAST_WIDTH = 60  # tables need it
LEAST_NAME = 12  # characters that the first column of a table has at least


def line_width() -> int:
    """Return how long a line may be: the terminal's width, or that of what is no terminal."""
    if not sys.stdout.isatty():
        return UNSEEN_WIDTH
    return max(LEAST_WIDTH, shutil.get_terminal_size().columns)


def wrapped(prefix: str, text: str) -> str:
    """Return text in lines that are not too long, indented below a prefix; no word is broken."""
    return textwrap.fill(
        shown(in_flags(text)),
        line_width(),
        initial_indent=prefix,
        subsequent_indent=" " * len(prefix),
        break_long_words=False,
        break_on_hyphens=False,
    )


def number(value: float | None, spec: str) -> str:
    """Format a number; a dash for None and NaN."""
    return "-" if value is None or value != value else format(value, spec)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, grouped: bool = False) -> None:
    """Print a table: the first column left-aligned, the others to the right.

    A name in the first column that would make lines too long stands on a line of its own. In a
    grouped table, so does every new value of the first column, and the second is the first.
    """
    rows = [tuple(map(shown, row)) for row in rows]
    groups = [row[0] for row in (header, *rows)]
    if grouped:
        header, rows = header[1:], [row[1:] for row in rows]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    room = line_width() - 2 - sum(2 + width for width in widths[1:])
    room = max(room, LEAST_NAME, len(header[0]))
    first = min(widths[0], room)
    for i, (name, *others) in enumerate((header, *rows)):
        if grouped and i and groups[i] != groups[i - 1]:
            say(f"  {groups[i]}:")
        if len(name) > first:
            say(f"  {name}")
            name = ""
        cells = [name.ljust(first)]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        say("  " + "  ".join(cells).rstrip())
