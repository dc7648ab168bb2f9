"""Write docs/formats.md from the registry: `python -m tools.formats_table`."""

from __future__ import annotations

from pathlib import Path

import tbq

DOCUMENT = Path(__file__).parents[1] / "docs" / "formats.md"

HEAD = """\
# Formats

Generated from the registry by `python -m tools.formats_table`; a test compares the two.

A format is named `dialect:name`. Type ids mean nothing without their dialect: forks reuse them.
The arithmetic of each family, step by step, is the docstring of its module in `tbq/families/`.

| format | aliases | id | side | values | bytes | bits/value | fields (offset) | decodes to |
|---|---|---|---|---|---|---|---|---|
"""


def formats_table() -> str:
    """Return the document."""
    rows = "".join(_row(fmt) for fmt in tbq.formats())
    alike: dict[str, list[str]] = {}
    for fmt in tbq.formats():
        alike.setdefault(f"{fmt.source}. {fmt.notes}", []).append(f"`{fmt.key}`")
    sources = "".join(f"* {', '.join(keys)}: {text}\n" for text, keys in alike.items())
    return f"{HEAD}{rows}\n## Sources and notes\n\n{sources}"


def _row(fmt: tbq.Format) -> str:
    fields = ", ".join(_field(name, *field[:2]) for name, field in fmt.block.fields.items())
    cells = (
        f"`{fmt.key}`",
        ", ".join(f"`{alias}`" for alias in fmt.aliases),
        fmt.type_id,
        fmt.side,
        fmt.block_values,
        fmt.block_bytes,
        f"{fmt.bpw:g}",
        fields,
        f"{fmt.domain} values",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def _field(name: str, dtype, offset: int) -> str:
    count = f"[{dtype.shape[0]}]" if dtype.shape else ""
    return f"{name} {dtype.base.name}{count} ({offset})"


if __name__ == "__main__":
    DOCUMENT.write_text(formats_table(), encoding="utf-8")
