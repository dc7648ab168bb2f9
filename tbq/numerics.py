"""The arithmetic contract in NumPy: what the C code's float operations mean, bit by bit.

The specifications in `tbq.families` are written with these. The Numba twins of the scalar
conversions are in `tbq.kernels.numerics`; a test compares the two over all inputs that matter.
"""

from __future__ import annotations

import numpy as np

MASK64 = (1 << 64) - 1


def fp16_bits(x: np.ndarray) -> np.ndarray:
    """Convert float32 to the bits of IEEE binary16 as ggml's software conversion does.

    Round to nearest even, overflow to infinity. NumPy does the same except for NaN, whose payload
    it keeps: ggml writes sign | 0x7E00 (ggml-impl.h, ggml_compute_fp32_to_fp16).
    """
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        bits = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), (bits & 0x8000) | 0x7E00, bits).astype(np.uint16)


def ordered_sum(terms: np.ndarray) -> np.ndarray:
    """Sum float32 over the last axis in index order, one rounding per addition, from 0.0f."""
    total = np.zeros(terms.shape[:-1], np.float32)
    for i in range(terms.shape[-1]):
        total += terms[..., i]
    return total


def splitmix64(seed: int):
    """Yield the 64-bit outputs of splitmix64 started at `seed`."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        yield z ^ (z >> 31)
