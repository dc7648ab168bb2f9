"""ggml's own types: gguf-py is the kernel."""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.ggml import ThroughGguf


def kernels(codec: ThroughGguf) -> RowKernels:
    """Return gguf-py's functions as kernels."""
    no_index = np.empty(0, np.int64)

    def quantize(x, packed, first):
        blocks = codec.quantize(x.reshape(-1, codec.block_values), no_index)
        packed[:] = blocks.view(np.uint8).reshape(packed.shape)

    def dequantize(packed, y):
        y[:] = codec.dequantize(codec.blocks(packed).reshape(-1)).reshape(y.shape)

    return RowKernels(quantize, dequantize, dequantize)
