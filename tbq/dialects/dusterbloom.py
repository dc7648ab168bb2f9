"""dusterbloom's pull requests to buun: the CUDA code, and the CPU code, which scales wrongly."""

from tbq.codec import Codec
from tbq.dialect import Dialect, Release
from tbq.dialects import buun
from tbq.families.dusterbloom import CELLS, SHORT, SignedHadamard
from tbq.format import Format

CUDA, CPU = "dusterbloom", "dusterbloom-cpu"
SOURCE = "spiritbuun/buun-llama-cpp pull request 2 @ 184e1199b: ggml/src/"
NOTES = "Attention kernels decode with a more exact 1/sqrt(128), to float16."
INFLATED = "Written by tests only: the CPU code's wrong scale inflates values {} times."


def _cuda(bits: int) -> Format:
    source = SOURCE + "ggml-cuda/turbo-quant-cuda.cuh"
    return Format(CUDA, f"tbq{bits}", SignedHadamard(CELLS[bits]), "KV", source, notes=NOTES)


def _cpu(bits: int, times: str) -> Format:
    codec: Codec = SignedHadamard(CELLS[bits], "ordered", SHORT, corrected=False)
    notes = INFLATED.format(times)
    return Format(CPU, f"tbq{bits}", codec, "KV", SOURCE + "ggml-tbq-quant.c", notes=notes)


TYPES = {44: _cuda(3), 45: _cuda(4), 46: _cuda(2)}
CPU_TYPES = {44: _cpu(3, "2.8"), 45: _cpu(4, "1.5"), 46: _cpu(2, "5.1")}
# The tree that the pull requests were made for.
BUUN = {41: buun.TURBO3, 43: buun.TURBO2}

DIALECTS = (
    Dialect(
        name=CUDA,
        title="dusterbloom's pull requests to buun",
        releases=(
            # pull request 5 @ a7a6d10df
            Release("2026-03-29", types=BUUN | {42: buun.TURBO4_ORDERED} | TYPES, upstream=40),
            # pull request 2 @ 184e1199b
            Release("2026-03-28", types=BUUN | {42: buun.TURBO4_RESIDUAL} | TYPES, upstream=40),
        ),
        functions=None,
    ),
    Dialect(
        name=CPU,
        title="dusterbloom's pull requests as their CPU code writes",
        backend_of=CUDA,
        releases=(Release("2026-03-29", types=CPU_TYPES, upstream=40),),
        functions=None,
    ),
)
