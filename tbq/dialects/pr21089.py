"""llama.cpp pull request 21089."""

from tbq.dialect import Dialect, GraphRotation, Release
from tbq.families.pr21089 import DenseRotated
from tbq.families.pr21089_first import CELLS, DenseResidual
from tbq.format import Format


def _format(name: str, bits: int) -> Format:
    return Format(
        dialect="pr21089",
        name=name,
        codec=DenseRotated(bits),
        side="KV",
        source="ggml-org/llama.cpp PR 21089 @ f112d6de7: ggml/src/ggml-turboq.c",
        notes="256 values of a row may span heads; a norm above 65504 decodes to infinity or NaN.",
    )


def _first(name: str, bits: int) -> Format:
    return Format(
        dialect="pr21089",
        name=name,
        codec=DenseResidual(CELLS[bits]),
        side="KV",
        source="ggml-org/llama.cpp PR 21089 @ 88dc3d10b: ggml/src/ggml-turboq.c",
        release="first",
        notes="Gone from the final commit. A block of zeros is not all zero; it decodes to zeros.",
    )


TBQ3, TBQ4 = _format("tbq3_0", 3), _format("tbq4_0", 4)
TBQP3, TBQP4 = _first("tbqp3_0", 2), _first("tbqp4_0", 3)

DIALECTS = (
    Dialect(
        name="pr21089",
        title="llama.cpp pull request 21089",
        precedence=1,
        # source: PR 21089 @ f112d6de7, src/llama-kv-cache.cpp
        rotation=GraphRotation(keys="hadamard", values="hadamard64"),
        releases=(
            Release(
                "final",
                types={42: TBQ3, 43: TBQ4},
                file_types={"tbq3_0": 41, "tbq4_0": 42},
            ),
            # 88dc3d10b
            Release(
                "first",
                types={42: TBQ3, 43: TBQ4, 44: TBQP3, 45: TBQP4},
                file_types={"tbq3_0": 41, "tbq4_0": 42, "tbqp3_0": 43, "tbqp4_0": 44},
            ),
        ),
    ),
)
