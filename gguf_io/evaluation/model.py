"""Which architectures have a forward pass."""

from __future__ import annotations

from gguf_io.evaluation.gemma3 import Gemma3
from gguf_io.evaluation.llama import Llama
from gguf_io.evaluation.qwen2 import Qwen2
from gguf_io.evaluation.qwen3 import Qwen3
from gguf_io.evaluation.transformer import Decoder
from gguf_io.reader import GgufFile
from tbq import InputError

ARCHITECTURES: dict[str, type[Decoder]] = {
    "gemma3": Gemma3,
    "llama": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
}


def load(file: GgufFile, threads: int | None = None, cpu_rounding: bool = False) -> Decoder:
    """Return the forward pass of an open model, which has to stay open; see `Decoder`.

    Raises:
        InputError: its architecture, or a part of it, is not covered.
        FileFormatError: metadata or a tensor is missing, or does not fit the others.
    """
    found = ARCHITECTURES.get(file.architecture or "")
    if found is None:
        got = f"architecture {str(file.architecture)[:64]!r}"
        raise InputError("model", got, f"one of {', '.join(ARCHITECTURES)}")
    return found(file, threads, cpu_rounding)
