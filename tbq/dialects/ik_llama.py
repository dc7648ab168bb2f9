"""ik_llama.cpp's own types for KV caches."""

from tbq.dialect import Dialect, GraphRotation, Release
from tbq.families.ik_llama import RowSteps, SixBits
from tbq.format import Format

NAME = "ik_llama"
SOURCE = "ikawrakow/ik_llama.cpp @ 8337e4cd3"

Q6_0 = Format(
    dialect=NAME,
    name="q6_0",
    codec=SixBits(),
    side="KV",
    source=f"{SOURCE}: ggml/src/ggml-quants.c",
    notes="Values that are no numbers are codes of zero; d is negative or positive.",
)

Q8_KV = Format(
    dialect=NAME,
    name="q8_KV",
    codec=RowSteps(),
    side="KV",
    source=f"{SOURCE}: ggml/src/iqk/iqk_quantize.cpp, the AVX2 code",
    notes="A row, of all heads of a token, has one scale: no block means anything without it.",
)

DIALECTS = (
    Dialect(
        name=NAME,
        title="ikawrakow/ik_llama.cpp",
        # 8337e4cd3; it numbers types beyond bf16 its own way
        releases=(Release("2026-08", types={133: Q6_0, 151: Q8_KV}, upstream=30),),
        # source: src/llama-model.h, common/common.cpp: -khad and -vhad
        rotation=GraphRotation("hadamard", "hadamard", "hadamard", optional=True),
        functions=None,
    ),
)
