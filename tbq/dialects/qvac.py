"""qvac-fabric's types; two files of it were read, which do not say what ids it gives them."""

from tbq.dialect import Dialect, Release
from tbq.families.qvac import CELLS, SIGNS, UnitCells
from tbq.format import Format

NAME = "qvac"
PLAIN = "Nothing of the fork was run. The graph rotates before; its transform was not read."
RESIDUAL = f"The residual's signs serve the fork's dot product alone. {PLAIN}"


def _format(kind: str, bits: int, width: int) -> Format:
    residual = kind == "tbq"
    return Format(
        dialect=NAME,
        name=f"{kind}{bits}_0{'' if width == 128 else '_64'}",
        codec=UnitCells(CELLS[width, bits], width, SIGNS[width] if residual else ()),
        side="KV",
        source="tetherto/qvac-fabric @ a commit after 57d4c984: its CPU code",
        evidence="read",
        notes=RESIDUAL if residual else PLAIN,
    )


FORMATS = tuple(
    _format(kind, bits, width) for width in (128, 64) for kind in ("pq", "tbq") for bits in (3, 4)
)

DIALECTS = (
    Dialect(
        name=NAME,
        title="tetherto/qvac-fabric",
        releases=(Release("2026-08", types={}, upstream=40),),
        unnumbered=FORMATS,
        functions=None,
    ),
)
