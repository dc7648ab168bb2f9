"""spiritbuun/buun-llama-cpp: its CUDA code, and its CPU code, which writes other bytes."""

from typing import Any

from tbq.codec import Codec
from tbq.dialect import Dialect, Release, StateTraits
from tbq.families.tcq import TrellisCoded
from tbq.families.turbo import FOUR, THREE, TWO, ResidualSigns, RotatedCells, RotatedGrid
from tbq.families.turbo_cpu import DenseCells
from tbq.format import Format

CUDA, CPU = "buun", "buun-cpu"
SOURCE = "spiritbuun/buun-llama-cpp @ "
TREE = "7939b6c47: ggml/src/ggml-cuda/set-rows.cu, turbo-quant-cuda.cuh"
MAY = "1c4788192: ggml/src/ggml-cuda/turbo-quant-cuda.cuh"
ROTATED = "Decodes to rotated values; the graph rotates V back, attention kernels K."
TAP = (
    "Since 2026-07-01 channel means of two models (qwen35, qwen35moe) are subtracted first, which "
    "no file says; the graph adds V's again."
)


def _format(name: str, codec: Codec, source: str, notes: str, **fields: Any) -> Format:
    return Format(CUDA, name, codec, "KV", SOURCE + source, notes=notes, **fields)


def _cpu(name: str, bits: int, source: str) -> Format:
    notes = "Not what CUDA writes under the same name and size: a dense matrix rotates."
    return Format(CPU, name, DenseCells(bits), "KV", SOURCE + source, notes=notes)


GROUPS = f"Four blocks are one group with one norm. {ROTATED} {TAP}"
TURBO2 = _format("turbo2", RotatedCells(TWO, 32), TREE, GROUPS, takes_mean=True)
TURBO3 = _format("turbo3", RotatedCells(THREE, 32), TREE, GROUPS, takes_mean=True)
TURBO4 = _format(
    "turbo4", RotatedCells(FOUR, total="tree"), TREE, f"{ROTATED} {TAP}", takes_mean=True
)
TURBO8 = _format("turbo8", RotatedGrid(), TREE, ROTATED)
# As long as one thread wrote a group, and later for rows that are no multiple of 128.
TURBO4_ORDERED = _format(
    "turbo4", RotatedCells(FOUR), MAY, f"{ROTATED} {TAP}", release="2026-05", takes_mean=True
)
TURBO8_ORDERED = _format("turbo8", RotatedGrid("ordered"), TREE, ROTATED, release="2026-06")
TURBO4_RESIDUAL = _format(
    "turbo4",
    ResidualSigns(),
    "before d29fb0b37: ggml/src/ggml-cuda/turbo-quant-cuda.cuh",
    f"{ROTATED} In which order it adds is not known: index order is assumed.",
    release="2026-03-27",
    evidence="read",
)

TURBO4_CPU = _cpu("turbo4", 4, "1c4788192: ggml/src/ggml-turbo-quant.c")
TURBO8_CPU = _cpu("turbo8", 8, "7939b6c47: ggml/src/ggml-turbo-quant.c")

TCQ_NOTES = (
    "The table, by spiritbuun, is the release's; no block says which it was, nor on which side it "
    f"stood. A byte of padding is never written by the fork, here it is 0. {ROTATED} {TAP}"
)


def _tcq(
    bits: int, dates: str, release: str = "", tap: bool = True, evidence: str = "vectors"
) -> Format:
    """Return a trellis format by the date of its tables: of both sides, or one for each."""
    date, shared = dates.removesuffix("*"), dates.endswith("*")
    fields: dict[str, Any] = {"release": release, "takes_mean": tap, "evidence": evidence}
    if shared:
        codec = TrellisCoded(bits, f"turbo{bits}_tcq.kv.{date}")
    else:
        sides = {s: TrellisCoded(bits, f"turbo{bits}_tcq.{s.lower()}.{date}") for s in "KV"}
        codec, fields["by_side"] = sides["K"], sides
    return _format(f"turbo{bits}_tcq", codec, TREE, TCQ_NOTES, **fields)


# By the date of the commit that brought the tables; one with * was for both sides.
TCQ3, TCQ2, TCQ1 = _tcq(3, "2026-06-25"), _tcq(2, "2026-06-25"), _tcq(1, "2026-07-12")
TCQ1_JUNE = _tcq(1, "2026-06-29", "2026-07-08", evidence="read")
TCQ3_MAY = _tcq(3, "2026-04-03*", "2026-06", tap=False)
TCQ2_MAY = _tcq(2, "2026-04-03*", "2026-06", tap=False)
TCQ3_29B = _tcq(3, "2026-03-29b*", "2026-03-29b", tap=False, evidence="read")
TCQ2_29B = _tcq(2, "2026-03-29b*", "2026-03-29b", tap=False, evidence="read")
TCQ3_29A = _tcq(3, "2026-03-29a*", "2026-03-29a", tap=False, evidence="read")
TCQ2_29A = _tcq(2, "2026-03-29a*", "2026-03-29a", tap=False, evidence="read")
TCQ3_28 = _tcq(3, "2026-03-28*", "2026-03-28", tap=False, evidence="read")

# Newest first, by the date of the commit that the first line of each names.
RELEASES = (
    # 7291dc401, 2026-07-21: upstream took 42
    Release(
        "2026-07",
        types={43: TURBO3, 44: TURBO4, 45: TURBO2, 46: TCQ3, 47: TCQ2, 48: TURBO8, 52: TCQ1},
        upstream=42,
    ),
    # 1abf2d28c: other tables for turbo1_tcq
    Release(
        "2026-07-12",
        types={42: TURBO3, 43: TURBO4, 44: TURBO2, 45: TCQ3, 46: TCQ2, 47: TURBO8, 51: TCQ1},
    ),
    # 7a7dfc7e2, 0ce97347c: several threads write a group
    Release(
        "2026-07-08",
        types={42: TURBO3, 43: TURBO4, 44: TURBO2, 45: TCQ3, 46: TCQ2, 47: TURBO8, 51: TCQ1_JUNE},
    ),
    # 69100ad09: turbo1_tcq; 48 to 50 were removed before they were released
    Release(
        "2026-06-29",
        types={
            42: TURBO3,
            43: TURBO4_ORDERED,
            44: TURBO2,
            45: TCQ3,
            46: TCQ2,
            47: TURBO8_ORDERED,
            51: TCQ1_JUNE,
        },
    ),
    # bd61034cf: the tables of K and V part
    Release(
        "2026-06-25",
        types={
            42: TURBO3,
            43: TURBO4_ORDERED,
            44: TURBO2,
            45: TCQ3,
            46: TCQ2,
            47: TURBO8_ORDERED,
        },
    ),
    # 4ab44ae1c, 2026-06-02
    Release(
        "2026-06",
        types={
            42: TURBO3,
            43: TURBO4_ORDERED,
            44: TURBO2,
            45: TCQ3_MAY,
            46: TCQ2_MAY,
            47: TURBO8_ORDERED,
        },
    ),
    # cb08642e6, 2026-04-30: upstream took 41
    Release(
        "2026-05",
        types={42: TURBO3, 43: TURBO4_ORDERED, 44: TURBO2, 45: TCQ3_MAY, 46: TCQ2_MAY},
    ),
    # f120f3d9d: the tables that stayed until June
    Release(
        "2026-04",
        types={41: TURBO3, 42: TURBO4_ORDERED, 43: TURBO2, 44: TCQ3_MAY, 45: TCQ2_MAY},
        upstream=40,
    ),
    # d84cbfe28
    Release(
        "2026-03-29b",
        types={41: TURBO3, 42: TURBO4_ORDERED, 43: TURBO2, 44: TCQ3_29B, 45: TCQ2_29B},
        upstream=40,
    ),
    # 7dd274819: turbo2_tcq
    Release(
        "2026-03-29a",
        types={41: TURBO3, 42: TURBO4_ORDERED, 43: TURBO2, 44: TCQ3_29A, 45: TCQ2_29A},
        upstream=40,
    ),
    # d29fb0b37: turbo4 of 66 bytes; ffaa96f5a: turbo3_tcq
    Release(
        "2026-03-28",
        types={41: TURBO3, 42: TURBO4_ORDERED, 43: TURBO2, 44: TCQ3_28},
        upstream=40,
    ),
    # 309b77e58
    Release("2026-03-27", types={41: TURBO3, 42: TURBO4_RESIDUAL, 43: TURBO2}, upstream=40),
    # 4ff5bf885: 41 is a turbo3 of 128 values and 52 bytes that lived for a day
    Release("2026-03-24", types={42: TURBO4_RESIDUAL}, upstream=40),
)
CPU_RELEASES = (
    Release("2026-07", types={44: TURBO4_CPU, 48: TURBO8_CPU}, upstream=42),
    Release("2026-06", types={43: TURBO4_CPU, 47: TURBO8_CPU}),
    Release("2026-05", types={43: TURBO4_CPU}),
    Release("2026-03-28", types={42: TURBO4_CPU}, upstream=40),
)

# source: src/llama-kv-cache.cpp: heads are padded to 128 in the cache, and state_write takes rows
# of the model's width; a footer after layers of trellis types
TRELLIS = frozenset({"turbo1_tcq", "turbo2_tcq", "turbo3_tcq"})
STATE = StateTraits(
    footed=TRELLIS,
    padded=TRELLIS | {"turbo2", "turbo3", "turbo4", "turbo8"},
    keeps_padding=False,
)

DIALECTS = (
    Dialect(
        name=CUDA,
        title="spiritbuun/buun-llama-cpp",
        releases=RELEASES,
        state=STATE,
        functions=None,
    ),
    Dialect(
        name=CPU,
        title="spiritbuun/buun-llama-cpp as its CPU code writes it",
        backend_of=CUDA,
        releases=CPU_RELEASES,
        state=STATE,
        functions=None,
    ),
)
