"""ggml's own types, through gguf-py.

What it is
    Those of the types that every fork inherits of which there is no codec here: floats and
    integers, K-quants, i-quants but iq4_nl, q8_1.

Block
    Floats and integers are one value. The others are described by their sizes only.

Quantise, Dequantise
    What `gguf.quantize` and `gguf.dequantize` do. Types that gguf-py cannot produce or read raise
    BackendError.

Source
    ggml-org/llama.cpp @ f112d6de7: ggml/src/ggml-common.h; the arithmetic is gguf-py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from tbq.codec import Codec, Layout
from tbq.errors import BackendError

PLAIN = {
    "f32": "<f4",
    "f16": "<f2",
    "f64": "<f8",
    "i8": "i1",
    "i16": "<i2",
    "i32": "<i4",
    "i64": "<i8",
}


@dataclass(frozen=True)
class ThroughGguf(Codec):
    """One of ggml's types, encoded and decoded by gguf-py.

    Attributes:
        name: ggml's name of the type, such as "q6_K".
        block_values: values per block.
        size: bytes per block.
    """

    name: str
    block_values: int
    size: int

    signed_scales: ClassVar[bool] = True

    @property
    def group_values(self) -> int:
        """One block."""
        return self.block_values

    @cached_property
    def layout(self) -> Layout:
        """The block's fields where they are known here, else one opaque run of bytes."""
        if self.name in PLAIN:
            block = np.dtype([("x", PLAIN[self.name])])
            return Layout(block, scales=(), codes=(), opaque=("x",))
        block = np.dtype([("data", "u1", self.size)])
        return Layout(block, scales=(), codes=(), opaque=("data",))

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, block_values) to blocks (n,); BackendError if gguf-py cannot."""
        import gguf

        try:
            with np.errstate(all="ignore"):
                packed = gguf.quantize(x, gguf.GGMLQuantizationType[self.name.upper()])
        except NotImplementedError:
            raise BackendError("gguf-py", f"cannot quantise to {self.name}") from None
        return np.ascontiguousarray(packed).view(self.layout.dtype).reshape(-1)

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, block_values); BackendError if gguf-py cannot."""
        import gguf

        raw = np.ascontiguousarray(blocks).view(np.uint8).reshape(len(blocks), self.size)
        try:
            with np.errstate(all="ignore"):
                y = gguf.dequantize(raw, gguf.GGMLQuantizationType[self.name.upper()])
        except NotImplementedError:
            raise BackendError("gguf-py", f"cannot dequantise {self.name}") from None
        return y.reshape(len(blocks), self.block_values)
