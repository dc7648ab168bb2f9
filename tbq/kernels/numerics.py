"""Scalar conversions for kernels, bit for bit those of `tbq.numerics`.

Numba widens uint32 arithmetic to uint64, so bits are narrowed again before they are reinterpreted.
"""

from __future__ import annotations

import numpy as np

from tbq.kernels.compile import jit

HALF = np.float32(0.5)
TWO_112 = np.float32(2.0**112)
TINY = np.float32(1e-30)


@jit
def fp32_to_fp16(x):
    """Return the binary16 bits of a float32, as uint16; see `tbq.numerics.fp16_bits`."""
    bits = np.float32(x).view(np.uint32)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)
    elif magnitude >= np.uint32(0x477FF000):  # 65520, the midpoint above the largest binary16
        half = np.uint32(0x7C00)
    elif magnitude < np.uint32(0x38800000):
        # Below 2^-14 the result is subnormal with a unit of 2^-24, which is what float32 has
        # between 0.5 and 1: adding 0.5 makes the hardware round to it.
        shifted = np.float32(np.uint32(magnitude).view(np.float32) + HALF)
        half = shifted.view(np.uint32) - np.uint32(0x3F000000)
    else:
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        rebias = np.uint32(0x38000000)  # (127 - 15) << 23
        half = (magnitude - rebias + np.uint32(0xFFF) + odd) >> np.uint32(13)
    return np.uint16(sign | half)


@jit
def fp16_to_fp32(h):
    """Return the float32 value of binary16 bits."""
    bits = np.uint32(h)
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    if magnitude >= np.uint32(0x0F800000):  # infinity or NaN
        wide = magnitude | np.uint32(0x7F800000)
    else:
        # As float32 bits the value is 2^112 too small; scaling is exact, subnormals included.
        scaled = np.float32(np.uint32(magnitude).view(np.float32) * TWO_112)
        wide = scaled.view(np.uint32)
    return np.uint32(sign | wide).view(np.float32)


@jit
def load_fp16(data, at):
    """Return the float32 value of the binary16 at data[at : at + 2]."""
    return fp16_to_fp32(np.uint16(data[at]) | np.uint16(data[at + 1]) << 8)


@jit
def store_fp16(x, out, at):
    """Write a float32 as binary16 to out[at : at + 2]."""
    bits = fp32_to_fp16(x)
    out[at], out[at + 1] = np.uint8(bits & 0xFF), np.uint8(bits >> 8)


@jit
def corrected_scale(norm, reconstructed):
    """Return what llama-tq multiplies codes by, so that the block keeps its norm."""
    return norm / reconstructed if reconstructed > TINY else norm
