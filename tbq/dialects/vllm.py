"""vLLM's TurboQuant cache, whose slots have no ggml types.

A slot is the key of a head and then its value, rounded up to an even number of bytes: key4 and
value4 (turboquant_4bit_nc), key3 and value4 (turboquant_k3v4_nc), key3 and value3
(turboquant_3bit_nc). turboquant_k8v4 has keys in an FP8 that depends on the GPU; a newer layout
lays a page out in planes.
"""

from tbq.codec import Codec
from tbq.dialect import Dialect, Release
from tbq.families.vllm import CELLS, StepValues, UnitKeys
from tbq.format import Format, Side

NAME = "vllm"
SOURCE = "vllm-project/vllm @ 0135d081: triton_turboquant_store.py"
UNKNOWN = "Nothing of it was run. The order of sums is not known"


def _format(name: str, codec: Codec, side: Side, notes: str) -> Format:
    return Format(NAME, name, codec, side, SOURCE, evidence="read", notes=notes)


KEYS = tuple(
    _format(
        f"key{bits}",
        UnitKeys(cells),
        "K",
        f"{UNKNOWN}, and a GEMM stands where a transform does here: codes of coordinates next to "
        "a midpoint may differ, and last bits of decoded values.",
    )
    for bits, cells in CELLS.items()
)
VALUES = tuple(
    _format(
        f"value{bits}",
        StepValues(bits),
        "V",
        "Nothing of it was run. What it makes of NaN is not known.",
    )
    for bits in (3, 4)
)

DIALECTS = (
    Dialect(
        name=NAME,
        title="vLLM's TurboQuant cache, heads of 128 values",
        releases=(Release("0135d081", types={}, upstream=-1),),
        unnumbered=(*KEYS, *VALUES),
        functions=None,
    ),
)
