"""tq3_0: unixsysdev's, and what animehacker made of it under the same name and number."""

from tbq.cells import Cells
from tbq.dialect import Dialect, Release
from tbq.families.tq3 import EIGHT, FOUR, PeakCells
from tbq.format import Format

FIRST, SECOND = "unixsysdev", "animehacker"
ALIKE = "The other tq3_0 has the same name, number and size, and nothing in a file says which."


def _format(dialect: str, cells: Cells, source: str, notes: str) -> Format:
    return Format(dialect, "tq3_0", PeakCells(cells), "KV", source, notes=f"{notes} {ALIKE}")


FOUR_CELLS = _format(
    FIRST,
    FOUR,
    "unixsysdev @ 16e93d5dc: CPU code of tq3_0",
    "A bit per value is the sign of a residual, which no decoder reads: two bits' accuracy.",
)
EIGHT_CELLS = _format(
    SECOND,
    EIGHT,
    "animehacker/llama-turboquant @ 5bc5ed3bd: CPU code of tq3_0",
    "Since 0794f0007; before that the fork wrote unixsysdev's bytes.",
)

DIALECTS = (
    Dialect(
        name=FIRST,
        title="unixsysdev's tq3_0, and animehacker's until 0794f0007",
        releases=(Release("2026-03-25", types={41: FOUR_CELLS}, upstream=40),),
        functions=None,
    ),
    Dialect(
        name=SECOND,
        title="animehacker/llama-turboquant",
        releases=(
            # branch f30e35ddf: the same bytes
            Release("2026-05-04", types={41: EIGHT_CELLS}, upstream=40),
            # 5bc5ed3bd
            Release("2026-04-10", types={41: EIGHT_CELLS}, upstream=40),
        ),
        functions=None,
    ),
)
