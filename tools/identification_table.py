"""Write docs/identification.md from the registry: `python -m tools.identification_table`."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np

import tbq
from gguf_io.identify import StoredRows
from tbq.registry import get_dialect, meanings
from tbq.vectors.inputs import gaussian, stream

DOCUMENT = Path(__file__).parents[1] / "docs" / "identification.md"
ROWS, ROW_VALUES = 16, 11520  # which the groups of every format divide: 256 * 45, 576 * 20

HEAD = """\
# Whose types a file holds

Generated from the registry by `python -m tools.identification_table`; a test compares the two.

A file stores type ids, and the same id means other formats elsewhere. A file that this project
wrote says whose they are. For any other, what fits is found in this order, over all ids of the
file at once; what is left is asked, with the candidates:

1. releases that have every id of the file, in sizes that fit;
2. scales that no encoder of the format makes negative;
3. rows that leave no bytes over;
4. what no encoder writes: signs that do not match their seed, norms that differ within a group, a
   trellis whose windows do not join.

Two backends of one code base write the same ids, names and sizes: no file tells them apart, the
one that its caches normally hold is meant, and `--dialect` names the other.

Below is every pair of formats of one id and equal bits per value, and what tells rows of Gaussian
values of the one, read as the other, from its own, tried out in both directions. "nothing" means
that only the other ids of a file, or the caller, can.

| id | one | other | one read as other | other read as one |
|---:|---|---|---|---|
"""


def identification_table() -> str:
    """Return the document."""
    releases = [release for name in tbq.dialects() for release in get_dialect(name).releases]
    ids = sorted({type_id for release in releases for type_id in release.types})
    return HEAD + "".join(_line(i, one, other) for i in ids for one, other in _pairs(i))


def _pairs(type_id: int) -> list[tuple[tbq.Format, tbq.Format]]:
    """Return the formats of one id that sizes do not tell apart, and that are not one codec."""
    found = {fmt.key: next(fmt.variants()) for _, _, fmt in meanings(type_id)}
    pairs = combinations(found.values(), 2)
    return [(a, b) for a, b in pairs if a.bpw == b.bpw and a.codec != b.codec]


def _line(type_id: int, one: tbq.Format, other: tbq.Format) -> str:
    cells = (type_id, f"`{one.key}`", f"`{other.key}`", _sign(one, other), _sign(other, one))
    return f"| {' | '.join(map(str, cells))} |\n"


def _sign(written: tbq.Format, read: tbq.Format) -> str:
    """Say what gives rows of one format away that are read as another."""
    packed = _packed(written.key)
    stored = StoredRows("", 0, packed.data, 0, len(packed), row_bytes=packed.shape[1])
    if stored.misfit(read):
        return "negative scales"
    found = stored.anomalies(read)
    return ", ".join(found) or "nothing"


@cache
def _packed(key: str) -> np.ndarray:
    fmt = next(tbq.get_format(key).variants())
    x = gaussian(stream(0, "identification"), ROWS, ROW_VALUES)
    return np.ascontiguousarray(tbq.quantize(x, fmt))


if __name__ == "__main__":
    DOCUMENT.write_text(identification_table(), encoding="utf-8")
