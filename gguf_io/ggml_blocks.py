"""The blocks of ggml's own types that KV caches use, for those who look inside them.

gguf-py decodes these types but does not say where a block keeps what.

Source: ggml-org/llama.cpp pull request 21089 @ f112d6de7, ggml/src/ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

QK = 32


@dataclass(frozen=True)
class GgmlBlock:
    """One block type.

    Attributes:
        dtype: the block, fields in storage order.
        scales: float16 fields; unlike those of registered formats they can be negative.
        bits: bits per code.
    """

    dtype: np.dtype
    scales: tuple[str, ...]
    bits: int

    def codes(self, blocks: np.ndarray) -> np.ndarray:
        """Return the codes of blocks (n,) as uint8 (n, 32); those of q8_0 count from -128."""
        qs = blocks["qs"]
        if self.bits == 8:
            return (qs.astype(np.int16) + 128).astype(np.uint8)
        codes = np.concatenate([qs & 15, qs >> 4], axis=-1)
        if self.bits == 5:
            codes |= np.unpackbits(blocks["qh"], axis=-1, bitorder="little") << 4
        return codes


def _block(scales: tuple[str, ...], bits: int) -> GgmlBlock:
    fields = [(name, "<f2") for name in scales]
    fields += [("qh", "u1", 4)] if bits == 5 else []
    fields += [("qs", "i1", QK)] if bits == 8 else [("qs", "u1", QK // 2)]
    return GgmlBlock(np.dtype(fields), scales, bits)


GGML_BLOCKS = {
    "q4_0": _block(("d",), 4),
    "q4_1": _block(("d", "m"), 4),
    "q5_0": _block(("d",), 5),
    "q5_1": _block(("d", "m"), 5),
    "q8_0": _block(("d",), 8),
    "iq4_nl": _block(("d",), 4),
}
