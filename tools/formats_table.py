"""Write docs/formats.md from the registry: `python -m tools.formats_table`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tbq
from tbq.dialect import Dialect
from tbq.registry import get_dialect, type_id

DOCUMENT = Path(__file__).parents[1] / "docs" / "formats.md"

HEAD = """\
# Formats

Generated from the registry by `python -m tools.formats_table`; a test compares the two.

A format is named `dialect:name`. Type ids mean nothing without their dialect: forks reuse them.
The arithmetic of each family, step by step, is the docstring of its module in `tbq/families/`. The
id is that of the newest release that has the format; `tbq/dialects/` has them all.

| format | aliases | id | side | values | bytes | bpw | fields (offset) | takes → gives | evidence |
|---|---|---|---|---|---|---|---|---|---|
"""


DIALECTS = """
## Dialects and their releases

Newest first. What an id means in one of them: `tbq.registry.meaning(id, dialect, release)`.

| dialect | what it is | releases |
|---|---|---|
"""


def formats_table() -> str:
    """Return the document."""
    rows = "".join(_row(fmt) for fmt in tbq.formats())
    alike: dict[str, list[str]] = {}
    for fmt in tbq.formats():
        alike.setdefault(f"{fmt.source}. {fmt.notes}", []).append(f"`{fmt.key}`")
    dialects = "".join(_dialect(get_dialect(name)) for name in tbq.dialects())
    sources = "".join(f"* {', '.join(keys)}: {text}\n" for text, keys in alike.items())
    return f"{HEAD}{rows}{DIALECTS}{dialects}\n## Sources and notes\n\n{sources}"


def _row(fmt: tbq.Format) -> str:
    fields = ", ".join(
        f"{'once a row: ' if name in fmt.layout.per_row else ''}{_field(name, *field[:2])}"
        for name, field in _stored(fmt)
    )
    cells = (
        f"`{fmt.key}`",
        ", ".join(f"`{alias}`" for alias in fmt.aliases),
        _id(fmt),
        fmt.side,
        fmt.block_values if fmt.group_values == fmt.block_values else _group(fmt),
        fmt.block_bytes,
        f"{fmt.bpw:g}",
        fields,
        f"{fmt.codec.takes} → {fmt.codec.gives}",
        fmt.evidence,
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def _stored(fmt: tbq.Format) -> Iterator[tuple[str, tuple]]:
    """Yield the fields of a format with where they are: in front of a row, then in a block."""
    for part in (fmt.layout.header, fmt.layout.stored):
        yield from (part.fields or {}).items()


def _dialect(dialect: Dialect) -> str:
    releases = ", ".join(release.name for release in dialect.releases)
    return f"| `{dialect.name}` | {dialect.title} | {releases} |\n"


def _id(fmt: tbq.Format) -> int | str:
    try:
        return type_id(fmt)
    except tbq.InputError:
        return "none known"


def _group(fmt: tbq.Format) -> str:
    return f"{fmt.codec.group_blocks} × {fmt.block_values}"


def _field(name: str, dtype, offset: int) -> str:
    count = f"[{dtype.shape[0]}]" if dtype.shape else ""
    return f"{name} {dtype.base.name}{count} ({offset})"


if __name__ == "__main__":
    DOCUMENT.write_text(formats_table(), encoding="utf-8")
