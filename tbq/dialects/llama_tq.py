"""LL4nc33/llama-tq, and the same types as its CUDA code writes them."""

from typing import Any

from tbq.codec import Codec
from tbq.dialect import Dialect, GraphRotation, Release, StateTraits
from tbq.families.ktq import BorrowedCodes, SignedBlocks
from tbq.families.trellis import Trellis
from tbq.families.vtq import MixedBlocks, PlainBlocks
from tbq.format import Format

CPU, CUDA = "llama-tq", "llama-tq-cuda"
SOURCE = "LL4nc33/llama-tq @ 0f57a4ee6: ggml/src/"
ROTATED = "The graph rotates 64 values at a time before and after; the block does not."


def _k(name: str, codec: Codec, file: str, notes: str, dialect: str = CPU, **fields: Any) -> Format:
    return Format(dialect, name, codec, "K", SOURCE + file, notes=notes, **fields)


def _v(name: str, codec: Codec, file: str, notes: str, dialect: str = CPU, **fields: Any) -> Format:
    return Format(dialect, name, codec, "V", SOURCE + file, notes=notes, **fields)


def _ktq(bits: int) -> Format:
    notes = "A norm above 65504 decodes to infinity or NaN. Cache rows are Hadamard-rotated first."
    alias = (f"ktq{bits}",)
    return _k(f"ktq{bits}_1", SignedBlocks(bits), "ggml-quants.c", notes, aliases=alias)


def _ktq_cuda(bits: int) -> Format:
    notes = (
        "Decodes to the negative of what was encoded: the CUDA code reads its sign bits inverted."
    )
    codec = SignedBlocks(bits, draw="stochastic", plus_bit=0, position="tensor")
    return _k(f"ktq{bits}_1", codec, "ggml-cuda/turboquant.cuh", notes, CUDA)


def _vtq(bits: int, *aliases: str) -> Format:
    return _v(f"vtq{bits}_1", PlainBlocks(bits=bits), "ggml-quants.c", ROTATED, aliases=aliases)


def _vtq_cuda(bits: int) -> Format:
    codec = PlainBlocks(bits=bits, distance="absolute")
    return _v(f"vtq{bits}_1", codec, "ggml-cuda/turboquant.cuh", ROTATED, CUDA)


def _trellis(name: str, bits: int, outliers: int = 0, *aliases: str) -> Format:
    notes = (
        f"{ROTATED} The exact search; the fork's pruned one (GGML_TRELLIS_BEAM) is not reproduced."
    )
    return _v(name, Trellis(bits, outliers), "ggml-trellis.c", notes, aliases=aliases)


TYPES = {
    45: _ktq(1),
    42: _ktq(2),
    43: _ktq(3),
    44: _ktq(4),
    57: _k(
        "xktq2_1",
        BorrowedCodes(),
        "ggml-quants.c",
        "Holds scales only; without a sibling ktq2_1 row it decodes to zeros, by design.",
        sibling="llama-tq:ktq2_1",
    ),
    46: _vtq(1, "vtq1"),
    47: _vtq(2),
    48: _vtq(3),
    49: _vtq(4),
    53: _v(
        "vtq_mixed",
        MixedBlocks(),
        "ggml-quants.c",
        "C declares qs[9] and writes the last code past it, into the padding byte.",
    ),
    50: _trellis("vtq2_2", 2, 0, "vtq2"),
    51: _trellis("vtq3_2", 3),
    52: _trellis("vtq4_2", 4, 0, "vtq4"),
    54: _trellis("vtq2_3", 2, 4),
    55: _trellis("vtq3_3", 3, 4),
    56: _trellis("vtq4_3", 4, 4),
    58: _trellis("vtq3_v8", 3, 2, "vtq3"),
}
CUDA_TYPES = {
    45: _ktq_cuda(1),
    42: _ktq_cuda(2),
    43: _ktq_cuda(3),
    44: _ktq_cuda(4),
    46: _vtq_cuda(1),
    47: _vtq_cuda(2),
    48: _vtq_cuda(3),
    49: _vtq_cuda(4),
}
# source: src/llama-kv-cache.cpp at 0f57a4ee6
ROTATION = GraphRotation(keys="hadamard", values="hadamard64", rotated_values="dhd64")
# Rows of these types are collected as f16 until a prompt is done.
STAGED = [f.name for f in TYPES.values() if f.side == "K" or isinstance(f.codec, Trellis)]
STATE = StateTraits(deferred=True, staged=frozenset(STAGED), mixed=True)

DIALECTS = (
    Dialect(
        name=CPU,
        title="llama-tq",
        precedence=2,
        rotation=ROTATION,
        state=STATE,
        releases=(Release("2026-05", types=TYPES),),
    ),
    Dialect(
        name=CUDA,
        title="llama-tq as its CUDA code writes it",
        backend_of=CPU,
        precedence=3,
        rotation=ROTATION,
        state=STATE,
        releases=(Release("2026-05", types=CUDA_TYPES),),
        functions=None,
    ),
)
