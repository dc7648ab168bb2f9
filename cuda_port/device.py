"""Arithmetic that device code shares: every operation rounds once, as in the C code on x86-64.

NVVM contracts a*b + c to a fused multiply-add unless product and sum are named, so wherever a
product feeds a sum, `mul` and `add` are written out; division and square root are the IEEE ones.
Numba's simulator has no libdevice, there NumPy's float32 does the same.
"""

from __future__ import annotations

import threading

import numpy as np
from numba import config, cuda

ZERO, ONE, HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)
TWO_112 = np.float32(2.0**112)
TINY = np.float32(1e-30)

if config.ENABLE_CUDASIM:

    def device(function):
        """Return the function itself: what the simulator makes of one costs more than most do."""
        return function

    def barrier():
        """Wait for the other threads of the block."""
        threading.current_thread().syncthreads()

    def mul(a, b):
        """Return a * b, float32."""
        return np.float32(a) * np.float32(b)

    def add(a, b):
        """Return a + b, float32."""
        return np.float32(a) + np.float32(b)

    def div(a, b):
        """Return a / b, float32."""
        return np.float32(a) / np.float32(b)

    def sqrt(a):
        """Return the square root of a float32."""
        return np.sqrt(np.float32(a))

    def rint(a):
        """Return a float32 rounded to a whole number, ties to even."""
        return np.rint(np.float32(a))

    def mul64(a, b):
        """Return a * b, float64."""
        return np.float64(a) * np.float64(b)

    def add64(a, b):
        """Return a + b, float64."""
        return np.float64(a) + np.float64(b)

    def sqrt64(a):
        """Return the square root of a float64."""
        return np.sqrt(np.float64(a))

    def bits_of(x):
        """Return the bits of a float32 as a non-negative integer."""
        return int(np.float32(x).view(np.uint32))

    def float_of(bits):
        """Return the float32 with these bits."""
        return np.uint32(bits).view(np.float32)

else:
    from numba.cuda import libdevice

    def device(function):
        """Return a function as device code."""
        return cuda.jit(device=True)(function)

    @cuda.jit(device=True, inline="always")
    def barrier():
        """Wait for the other threads of the block."""
        cuda.syncthreads()

    @cuda.jit(device=True, inline="always")
    def mul(a, b):
        """Return a * b, float32, never fused."""
        return libdevice.fmul_rn(a, b)

    @cuda.jit(device=True, inline="always")
    def add(a, b):
        """Return a + b, float32, never fused."""
        return libdevice.fadd_rn(a, b)

    @cuda.jit(device=True, inline="always")
    def div(a, b):
        """Return a / b, float32, correctly rounded."""
        return libdevice.fdiv_rn(a, b)

    @cuda.jit(device=True, inline="always")
    def sqrt(a):
        """Return the square root of a float32, correctly rounded."""
        return libdevice.fsqrt_rn(a)

    @cuda.jit(device=True, inline="always")
    def rint(a):
        """Return a float32 rounded to a whole number, ties to even."""
        return libdevice.rintf(a)

    @cuda.jit(device=True, inline="always")
    def mul64(a, b):
        """Return a * b, float64, never fused."""
        return libdevice.dmul_rn(a, b)

    @cuda.jit(device=True, inline="always")
    def add64(a, b):
        """Return a + b, float64, never fused."""
        return libdevice.dadd_rn(a, b)

    @cuda.jit(device=True, inline="always")
    def sqrt64(a):
        """Return the square root of a float64, correctly rounded."""
        return libdevice.dsqrt_rn(a)

    @cuda.jit(device=True, inline="always")
    def bits_of(x):
        """Return the bits of a float32 as a non-negative integer."""
        return np.int64(libdevice.float_as_int(x)) & np.int64(0xFFFFFFFF)

    @cuda.jit(device=True, inline="always")
    def float_of(bits):
        """Return the float32 with these bits."""
        return libdevice.int_as_float(np.int32(bits))


@device
def fp16_bits(x):
    """Return the binary16 bits of a float32, rounded to nearest even; a NaN becomes sign|0x7E00."""
    bits = bits_of(x)
    sign = (bits >> 16) & 0x8000
    magnitude = bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return sign | 0x7E00
    if magnitude >= 0x477FF000:  # 65520, the midpoint above the largest binary16
        return sign | 0x7C00
    if magnitude < 0x38800000:  # subnormal: adding 0.5 makes the hardware round to 2^-24
        return sign | (bits_of(add(float_of(magnitude), HALF)) - 0x3F000000)
    odd = (magnitude >> 13) & 1
    return sign | ((magnitude - 0x38000000 + 0xFFF + odd) >> 13)


@device
def fp16_value(h):
    """Return the float32 value of binary16 bits."""
    magnitude = (np.int64(h) & 0x7FFF) << 13
    if magnitude >= 0x0F800000:  # infinity or NaN
        wide = magnitude | 0x7F800000
    else:  # as float32 bits 2^112 too small; scaling is exact
        wide = bits_of(mul(float_of(magnitude), TWO_112))
    if h & 0x8000:
        return -float_of(wide)
    return float_of(wide)


@device
def load_fp16(packed, at):
    """Return the float32 value of the binary16 at packed[at : at + 2]."""
    return fp16_value(np.int64(packed[at]) | (np.int64(packed[at + 1]) << 8))


@device
def store_fp16(x, packed, at):
    """Write a float32 as binary16 to packed[at : at + 2]."""
    h = fp16_bits(x)
    packed[at] = h & 0xFF
    packed[at + 1] = h >> 8


@device
def load_bits(packed, at, first, count):
    """Return up to nine bits from bit `first` on of a little-endian string at packed[at]."""
    byte, shift = at + first // 8, first % 8
    word = np.int64(packed[byte])
    if shift + count > 8:
        word |= np.int64(packed[byte + 1]) << 8
    return (word >> shift) & ((1 << count) - 1)


@device
def load_code(packed, at, bits, i):
    """Return code i of a little-endian string of codes that starts at packed[at]."""
    return load_bits(packed, at, bits * i, bits)


@device
def packed_byte(codes, row, bits, k):
    """Return byte k of the string that codes[row] make, code i at bit bits*i."""
    byte = 0
    for t in range(8):
        p = 8 * k + t
        byte |= ((codes[row, p // bits] >> (p % bits)) & 1) << t
    return byte


@device
def ordered_norm(values, row, n):
    """Return the L2 norm of values[row, :n], summed in index order."""
    total = ZERO
    for j in range(n):
        total = add(total, mul(values[row, j], values[row, j]))
    return sqrt(total)
