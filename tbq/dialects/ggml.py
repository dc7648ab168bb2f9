"""ggml's own types, which every code base has under the same ids up to 40, and their other writers.

What a CPU's KV cache and llama-quantize write is ggml's `_ref` but for two types; those that differ
are dialects of their own, because the same name and id means other bytes.
"""

from typing import Any

from tbq.codec import Codec
from tbq.dialect import Dialect, GraphRotation, Release
from tbq.families.ggml import ThroughGguf
from tbq.families.ggml_blocks import AboveMinimum, Signed, SignedBytes, Uneven
from tbq.families.k_quants import WithMinimum, WithSign
from tbq.families.small_floats import OneByte, PowerOfTwo, SmallScale
from tbq.families.ternary import Signs, Trits, TwoBits
from tbq.format import GGML, Format

CPU, QUANTIZE, PRISM = "ggml-cpu", "llama-quantize", "prismml"
UPSTREAM = "ggml-org/llama.cpp"
QUANTS = "ggml/src/ggml-quants.c"
SPRING, SUMMER = f"{UPSTREAM} @ f112d6de7", f"{UPSTREAM} @ d99724f2"

# llama.cpp's file types where they are not MOSTLY_ plus the name of the type are looked up in
# gguf-py by whoever needs one.


def _type(name: str, block_values: int, size: int) -> Format:
    """Return a type that gguf-py encodes and decodes, as far as it can."""
    return Format(
        dialect=GGML,
        name=name,
        codec=ThroughGguf(name, block_values, size),
        side="KV",
        source=f"{SPRING}: ggml/src/ggml-common.h",
        evidence="gguf-py",
    )


def _k_quant(name: str, codec: WithMinimum | WithSign) -> Format:
    notes = "Encoded without an importance matrix, as llama-quantize does if it is given none."
    return _own(name, codec, notes)


def _own(name: str, codec: Codec, notes: str, at: str = SPRING, **fields: Any) -> Format:
    return Format(GGML, name, codec, "KV", f"{at}: {QUANTS}", notes=notes, **fields)


SIGNED = "d has the sign of the value of largest magnitude, turned; of zeros it is -0."
MINIMUM = "m is the first of the least values, with the sign of its zero."
Q8_0 = _own(
    "q8_0",
    SignedBytes(),
    "What llama-quantize and GPUs write. The CPU code of caches rounds otherwise: ggml-cpu:q8_0.",
)
IQ4_NL = _own(
    "iq4_nl",
    Uneven(),
    "What a cache holds; llama-quantize searches the scale: llama-quantize:iq4_nl. The codes of "
    "blocks below 1e-15 are what C's stack held; here they are those of zeros. Since 2026-08 NaN "
    "gets another code in C.",
)
MEANS_NOTHING = "What C makes of NaN and infinities was not run, but read."
TRITS = "Nothing of it was run; gguf-py agrees on finite values."
Q2_0 = _own("q2_0", TwoBits(), f"The encoder never writes the code of 2. {MEANS_NOTHING}", SUMMER)
F8_E4M3 = Format(
    dialect=GGML,
    name="f8_e4m3",
    codec=OneByte(),
    side="KV",
    source=f"{UPSTREAM} @ a commit after 2026-09: a test of gguf-py",
    evidence="read",
    notes="Its id is not known; 43 is inferred. Beyond 448 it is taken to saturate, which was not "
    "read. Models and caches may have a scale beside it, which is no part of it.",
)

TYPES = {
    0: _type("f32", 1, 4),
    1: _type("f16", 1, 2),
    2: _own("q4_0", Signed(4), SIGNED),
    3: _own("q4_1", AboveMinimum(4), MINIMUM),
    6: _own("q5_0", Signed(5), SIGNED),
    7: _own("q5_1", AboveMinimum(5), MINIMUM),
    8: Q8_0,
    9: _type("q8_1", 32, 36),
    10: _k_quant("q2_K", WithMinimum(2)),
    11: _k_quant("q3_K", WithSign(3)),
    12: _k_quant("q4_K", WithMinimum(4)),
    13: _k_quant("q5_K", WithMinimum(5)),
    14: _k_quant("q6_K", WithSign(6)),
    15: _type("q8_K", 256, 292),
    16: _type("iq2_xxs", 256, 66),
    17: _type("iq2_xs", 256, 74),
    18: _type("iq3_xxs", 256, 98),
    19: _type("iq1_s", 256, 50),
    20: IQ4_NL,
    21: _type("iq3_s", 256, 110),
    22: _type("iq2_s", 256, 82),
    23: _type("iq4_xs", 256, 136),
    24: _type("i8", 1, 1),
    25: _type("i16", 1, 2),
    26: _type("i32", 1, 4),
    27: _type("i64", 1, 8),
    28: _type("f64", 1, 8),
    29: _type("iq1_m", 256, 56),
    30: _type("bf16", 1, 2),
    34: _own("tq1_0", Trits(dense=True), TRITS, evidence="read"),
    35: _own("tq2_0", Trits(dense=False), TRITS, evidence="read"),
    39: _own("mxfp4", PowerOfTwo(), MEANS_NOTHING, SUMMER),
    40: _own("nvfp4", SmallScale(), MEANS_NOTHING, SUMMER),
    41: _own("q1_0", Signs(), f"NaN is negative. {MEANS_NOTHING}", SUMMER),
}

# --- other writers -------------------------------------------------------------------------------

Q8_0_CPU = Format(
    dialect=CPU,
    name="q8_0",
    codec=SignedBytes(avx2=True),
    side="KV",
    source=f"{SPRING}: ggml/src/ggml-cpu/arch/x86/quants.c, the AVX2 code",
    notes="Decodes as ggml's. What does not fit is -128, which nothing else writes; other "
    "processors' code was not read.",
)
IQ4_NL_SEARCHED = Format(
    dialect=QUANTIZE,
    name="iq4_nl",
    codec=Uneven(searches_scale=True),
    side="KV",
    source=f"{SPRING}: {QUANTS}, quantize_iq4_nl",
    notes="Decodes as ggml's. Without an importance matrix.",
)


def _prism(name: str, release: str, commit: str) -> Format:
    return Format(
        dialect=PRISM,
        name=name,
        codec=TwoBits(128),
        side="KV",
        source=f"PrismML-Eng/llama.cpp @ {commit}: {QUANTS}",
        release=release,
        evidence="read",
        notes="Twice as wide as ggml's q2_0. Nothing of it was run.",
    )


PQ2_0 = _prism("pq2_0", "", "811dce5d5")
Q2_0_PRISM = _prism("q2_0", "2026-08", "9ca265a")

# source: llama.cpp, src/llama-kv-cache.cpp, since pull request 21038
ROTATION = GraphRotation(keys="hadamard", values="hadamard64")

DIALECTS = (
    Dialect(
        name=GGML,
        title="ggml's own types",
        precedence=0,
        rotation=ROTATION,
        releases=(
            # fcfe6389, 2026-07-09
            Release("2026-07", types=TYPES | {42: Q2_0}, upstream=42),
            Release("2026-05", types=TYPES),
        ),
        unnumbered=(F8_E4M3,),
    ),
    Dialect(
        name=CPU,
        title="ggml's q8_0 as its CPU code writes it into caches",
        backend_of=GGML,
        rotation=ROTATION,
        releases=(Release("2026-05", types={8: Q8_0_CPU}),),
        functions=None,
    ),
    Dialect(
        name=QUANTIZE,
        title="ggml's iq4_nl as llama-quantize writes it",
        backend_of=GGML,
        rotation=ROTATION,
        releases=(Release("2026-05", types={20: IQ4_NL_SEARCHED}),),
        functions=None,
    ),
    Dialect(
        name=PRISM,
        title="PrismML-Eng/llama.cpp",
        releases=(
            # 811dce5d5; ids from 142 on are its own
            Release("2026-09", types={142: PQ2_0}, upstream=42),
            # 9ca265a
            Release("2026-08", types={42: Q2_0_PRISM}),
        ),
        rotation=ROTATION,
    ),
)
