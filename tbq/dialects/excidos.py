"""Excidos' types, as the CPU code of a derivative of pull request 21089 writes them."""

from typing import Literal

from tbq.dialect import Dialect, Release
from tbq.families.planar import CELLS, RotatedParts
from tbq.families.turbo import FOUR, OverwrittenCodes, RotatedCells
from tbq.format import Format

CPU = "excidos-cpu"
SOURCE = "jzh20042003/llama.cpp-turboq-mtp @ 10d7ff4f6"


def _parts(kind: Literal["planar", "iso"], bits: int) -> Format:
    return Format(
        dialect=CPU,
        name=f"{kind}{bits}_0",
        codec=RotatedParts(kind, CELLS[bits]),
        side="KV",
        source=f"{SOURCE}: ggml/src/ggml-{kind}-quant.c",
        notes="It mixes so few values that outliers stay what they are.",
    )


# Its CUDA code was not run; it is said to write the same tbq4_0 and another tbq3_0.
TYPES = {
    42: Format(
        dialect=CPU,
        name="tbq3_0",
        codec=OverwrittenCodes(),
        side="KV",
        source=SOURCE,
        notes="Its packer loses the codes: what is decoded is not what was encoded.",
    ),
    43: Format(
        dialect=CPU,
        name="tbq4_0",
        codec=RotatedCells(FOUR, gives="original"),
        side="KV",
        source=SOURCE,
        notes="The bytes of buun's turbo4 with sums in index order; the decoder rotates back.",
    ),
    44: _parts("planar", 3),
    45: _parts("iso", 3),
    46: _parts("planar", 4),
    47: _parts("iso", 4),
}

DIALECTS = (
    Dialect(
        name=CPU,
        title="Excidos' types in jzh20042003/llama.cpp-turboq-mtp, CPU code",
        releases=(Release("2026-07", types=TYPES),),
        functions=None,
    ),
)
