"""TheTom/llama-cpp-turboquant: its CUDA code, and its CPU code, which adds in another order."""

from typing import Any

from tbq.codec import Codec
from tbq.dialect import Dialect, Release, StateTraits
from tbq.families.turbo import (
    FOUR_NARROW,
    FOUR_NARROW_CPU,
    FOUR_TRAINED,
    THREE,
    THREE_TRAINED,
    TWO,
    RotatedCells,
)
from tbq.format import Format

CUDA, CPU = "thetom", "thetom-cpu"
MAY = "TheTom/llama-cpp-turboquant @ 69d8e4be4: "
FILES = {
    CUDA: "ggml/src/ggml-cuda/set-rows.cu",
    CPU: "ggml/src/ggml-turbo-quant.c",
}
ROTATED = "Decodes to rotated values; the graph rotates Q, and the output back."
TABLES = "The arithmetic is that of 69d8e4be4, the tables those of copies of pull request 197."


def _format(dialect: str, name: str, codec: Codec, notes: str = "", **fields: Any) -> Format:
    notes = f"{ROTATED} {notes}".strip()
    return Format(dialect, name, codec, "KV", MAY + FILES[dialect], notes=notes, **fields)


def _formats(dialect: str) -> dict[str, Format]:
    """Return the formats of one backend: `turbo3` of today, `turbo3-` of May 2026."""
    total, cpu = {CUDA: "warps", CPU: "ordered"}[dialect], dialect == CPU
    narrow = FOUR_NARROW_CPU if cpu else FOUR_NARROW
    old = {"release": "2026-05"}
    return {
        "turbo2": _format(dialect, "turbo2", RotatedCells(TWO, total=total)),
        "turbo3": _format(dialect, "turbo3", RotatedCells(THREE_TRAINED, total=total), TABLES),
        "turbo4": _format(
            dialect, "turbo4", RotatedCells(FOUR_TRAINED, total=total, clears_nan=cpu), TABLES
        ),
        "turbo3-": _format(dialect, "turbo3", RotatedCells(THREE, total=total), **old),
        "turbo4-": _format(
            dialect,
            "turbo4",
            RotatedCells(narrow, total=total, reserved=2, clears_nan=cpu),
            "The table ends at 0.174, which costs accuracy.",
            **old,
        ),
    }


NEW, NEW_CPU = _formats(CUDA), _formats(CPU)


def _march(name: str, codec: Codec) -> Format:
    notes = "Four blocks are one group with one norm, as in buun's code, which it shares."
    return _format(CUDA, name, codec, notes, release="2026-03-28", evidence="read")


TURBO2_MARCH = _march("turbo2", RotatedCells(TWO, 32))
TURBO3_MARCH = _march("turbo3", RotatedCells(THREE, 32))


def _release(name: str, ids: dict[int, str], formats: dict[str, Format], **fields: Any) -> Release:
    return Release(name, {type_id: formats[key] for type_id, key in ids.items()}, **fields)


def _releases(formats: dict[str, Format]) -> tuple[Release, ...]:
    """Return the numberings of both backends, newest first.

    Within a week around 2026-08-01 there were three.
    """
    in_order = {42: "turbo2", 43: "turbo3", 44: "turbo4"}
    return (
        # 00910b108; 46 and 47 are weights
        _release("2026-08", {43: "turbo2", 44: "turbo3", 45: "turbo4"}, formats, upstream=42),
        # merge of upstream: q2_0 became 47
        _release("2026-08-04", in_order, formats),
        # README; 45 and 46 are weights
        _release("2026-07-31", {43: "turbo2", 44: "turbo3", 47: "turbo4"}, formats, upstream=42),
        # 77ab7e988, 2026-06-26: pull request 197; that ids stayed is inferred
        _release("2026-07", in_order, formats),
        # 3a2fad19c, 2026-04-01, to 69d8e4be4; 45 and 46 are weights
        _release("2026-05", {42: "turbo2", 43: "turbo3-", 44: "turbo4-"}, formats),
    )


# Other branches. Which of two codecs of 68 bytes their turbo4 is, is not known, so it has no row.
BRANCHES = (
    # pull request 107, 351e7a4f4; 42 is turbo4, 44 to 48 other types
    Release("2026-04-25", {41: NEW["turbo3-"], 43: NEW["turbo2"]}, 40, note="pull request 107"),
    # pull request 73, c6733b7de; 43 is turbo4
    Release("2026-04-13", {42: NEW["turbo3-"], 44: NEW["turbo2"]}, note="pull request 73"),
    # 25a19f223; 44 is turbo4
    Release("2026-03-28-rebased", {42: TURBO2_MARCH, 43: TURBO3_MARCH}, note="rebased 2026-04-15"),
    # da6b0fd50; 42 is turbo4
    Release("2026-03-28", {41: TURBO3_MARCH, 43: TURBO2_MARCH}, 40),
)

# source: src/llama-kv-cache.cpp @ 001d906a: rows in files are as wide as the cache's, whose heads
# are padded to 128
STATE = StateTraits(padded=frozenset({"turbo2", "turbo3", "turbo4"}))

DIALECTS = (
    Dialect(
        name=CUDA,
        title="TheTom/llama-cpp-turboquant",
        releases=_releases(NEW) + BRANCHES,
        state=STATE,
        functions=None,
    ),
    Dialect(
        name=CPU,
        title="TheTom/llama-cpp-turboquant as its CPU code writes it",
        backend_of=CUDA,
        releases=_releases(NEW_CPU),
        state=STATE,
        functions=None,
    ),
)
