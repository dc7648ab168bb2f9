"""ggml's own types, through gguf-py.

What it is
    The types that every fork inherits: floats and integers, q4_0 and its kin, K-quants, i-quants.

Block
    Floats and integers are one value. q4_0, q4_1, q5_0, q5_1, q8_0 and iq4_nl are blocks of 32:
    a float16 scale (and minimum), the fifth bits of the codes where there are some, then the codes,
    the low nibbles for the first sixteen values and the high ones for the rest. The others are
    described by their sizes only.

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

QK = 32
NIBBLES = ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
WITH_MINIMUM = ("q4_1", "q5_1")
WITH_FIFTH_BIT = ("q5_0", "q5_1")
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
        name = self.name
        if name in PLAIN:
            return Layout(np.dtype([("x", PLAIN[name])]), scales=(), codes=(), opaque=("x",))
        if name == "q8_0":
            return Layout(np.dtype([("d", "<f2"), ("qs", "i1", QK)]))
        if name in NIBBLES:
            scales = ("d", "m") if name in WITH_MINIMUM else ("d",)
            codes = ("qh", "qs") if name in WITH_FIFTH_BIT else ("qs",)
            fields = [(scale, "<f2") for scale in scales]
            fields += [("qh", "u1", 4)] if name in WITH_FIFTH_BIT else []
            return Layout(np.dtype([*fields, ("qs", "u1", QK // 2)]), scales=scales, codes=codes)
        block = np.dtype([("data", "u1", self.size)])
        return Layout(block, scales=(), codes=(), opaque=("data",))

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,) where they are known; those of q8_0 count from -128."""
        if self.name == "q8_0":
            return {"codes": ((blocks["qs"].astype(np.int16) + 128).astype(np.uint8), 256)}
        if self.name not in NIBBLES:
            return {}
        codes = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=-1)
        if self.name in WITH_FIFTH_BIT:
            codes |= np.unpackbits(blocks["qh"], axis=-1, bitorder="little") << 4
            return {"codes": (codes, 32)}
        return {"codes": (codes, 16)}

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
