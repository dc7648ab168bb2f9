"""How llama.cpp's CPU code rounds activations before it multiplies them with quantised weights.

Both sides of its integer products have 8 bits at most: activations are rounded to blocks of 32
(q8_0) or 256 (q8_K) values, whichever the type of the weights is multiplied with. Between two runs
that differ a little this rounding turns out differently, so that it adds a divergence of its own.

Source: ggml-org/llama.cpp, ggml/src/ggml-cpu/ggml-cpu.c (type_traits_cpu), ggml/src/ggml-quants.c
"""

from __future__ import annotations

import numpy as np

from gguf_io.types import TensorType

BY_32 = frozenset({"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4"})
BY_256 = frozenset(
    {"q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s"}
    | {"iq3_xxs", "iq3_s", "iq4_xs", "tq1_0", "tq2_0"}
)


def rounded(x: np.ndarray, weights: TensorType) -> np.ndarray:
    """Return activations, float32 (n, width), as they are multiplied with weights of a type.

    Widths that blocks do not divide come back as they are, as do those for weights that are not
    listed here; ggml has no such rows, or multiplies in float.
    """
    if weights.name in BY_32 and x.shape[-1] % 32 == 0:
        return _q8_0(x)
    if weights.name in BY_256 and x.shape[-1] % 256 == 0:
        return _q8_k(x)
    if weights.name == "f16":
        return x.astype(np.float16).astype(np.float32)
    return x


def _q8_0(x: np.ndarray) -> np.ndarray:
    """Round to whole multiples of the largest magnitude of each 32 values over 127."""
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    whole = np.rint(blocks / np.where(scale == 0, np.float32(1), scale))
    whole *= scale.astype(np.float16).astype(np.float32)
    return whole.reshape(x.shape)


def _q8_k(x: np.ndarray) -> np.ndarray:
    """Round so that the value of largest magnitude among each 256 becomes -127 times the scale."""
    blocks = x.reshape(-1, 256)
    at = np.abs(blocks).argmax(axis=1)
    largest = blocks[np.arange(len(blocks)), at][:, None]
    inverse = np.float32(-127) / np.where(largest == 0, np.float32(1), largest)
    whole = np.minimum(np.rint(blocks * inverse), np.float32(127))
    whole /= inverse
    return whole.reshape(x.shape)
