"""Write tools/data/type-errors.json: what each cache type does. `python -m tools.type_errors`.

The relative mean squared error of `tools.distortion_table` for every type that a cache can have,
rounded to four digits; null where nothing here can quantise to the type. tbq-plan needs it at once,
and measuring takes a minute.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import tbq
from tbq import Format
from tbq.registry import dialects

FILE = Path(__file__).parent / "data" / "type-errors.json"


def cache_formats() -> Iterator[Format]:
    """Yield every type of every dialect's caches, with every choice that it has."""
    from gguf_io.planner import cache_types

    seen = {fmt.key: fmt for name in dialects() for fmt in cache_types(name) if not fmt.sibling}
    for fmt in seen.values():
        yield from fmt.variants()


def measured(fmt: Format) -> float | None:
    """Return the error of a type, to four digits."""
    from .distortion_table import measure

    try:
        return float(f"{measure(fmt):.3e}")
    except tbq.BackendError:
        return None


@cache
def _stored() -> dict[str, float | None]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def error_of(fmt: Format, head_dim: int, side: str) -> float | None:
    """Return the measured error of a type in a cache of such heads; None if there is none."""
    return _stored().get(fmt.fitting(head_dim=head_dim, side=side).label)


def type_errors() -> str:
    """Return the file."""
    found = {fmt.label: measured(fmt) for fmt in cache_formats()}
    return json.dumps(found, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(type_errors(), encoding="utf-8")
