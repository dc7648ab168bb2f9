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
TINY = np.float32(1e-30)

if config.ENABLE_CUDASIM:
    from numba.np.numpy_support import as_dtype

    def device(function):
        """Return the function itself: what the simulator makes of one costs more than most do."""
        return function

    def bounded(threads, resident):
        """Return the decorator of a kernel; the simulator has registers enough."""
        return cuda.jit

    class LocalArrays:
        """What `cuda.local` is in the simulator's kernels, for device functions."""

        @staticmethod
        def array(shape, dtype):
            """Return an array of a thread's own."""
            return np.empty(shape, as_dtype(dtype))

    cuda.local = LocalArrays

    def barrier():
        """Wait for the other threads of the block."""
        threading.current_thread().syncthreads()

    def settle():
        """Keep reads and writes of shared memory from moving past here."""

    def thread():
        """Return the number of this thread in its block."""
        return threading.current_thread().threadIdx.x

    def block():
        """Return the number of this block of threads."""
        return threading.current_thread().blockIdx.x

    def index(i):
        """Return an index that is not negative."""
        return i

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

    def lesser(a, b):
        """Return the lesser of two float32, the other one of a NaN."""
        return np.fmin(np.float32(a), np.float32(b))

    def mul64(a, b):
        """Return a * b, float64."""
        return np.float64(a) * np.float64(b)

    def add64(a, b):
        """Return a + b, float64."""
        return np.float64(a) + np.float64(b)

    def sqrt64(a):
        """Return the square root of a float64."""
        return np.sqrt(np.float64(a))

    def fp16_bits(x):
        """Return the binary16 bits of a float32, to nearest even; a NaN becomes sign|0x7E00."""
        bits = int(np.float32(x).view(np.uint32))
        if bits & 0x7FFFFFFF > 0x7F800000:
            return (bits >> 16) & 0x8000 | 0x7E00
        return int(np.float32(x).astype(np.float16).view(np.uint16))

    def fp16_value(h):
        """Return the float32 value of binary16 bits."""
        return np.float32(np.uint16(h).view(np.float16))

    def float_of(bits):
        """Return the float32 with these bits."""
        return np.uint32(bits).view(np.float32)

    def take(words, first, count):
        """Return `count` bits from bit `first` on of a little-endian string of 32-bit words."""
        word = int(words[first // 32])
        if first % 32 + count > 32:
            word |= int(words[first // 32 + 1]) << 32
        return (word >> (first % 32)) & ((1 << count) - 1)

    def put(words, first, count, value):
        """Set `count` bits, which are zeros, from bit `first` on of a string of words."""
        word = int(value) << (first % 32)
        words[first // 32] |= np.uint32(word & 0xFFFFFFFF)
        if first % 32 + count > 32:
            words[first // 32 + 1] |= np.uint32(word >> 32)

else:
    from numba.cuda import libdevice
    from numba.cuda.core import config as cuda_config

    # It warns of few blocks of threads, which is what few values make.
    cuda_config.CUDA_LOW_OCCUPANCY_WARNINGS = 0

    def bounded(threads, resident):
        """Return the decorator of a kernel of which so many blocks of threads have registers."""
        return cuda.jit(launch_bounds=(threads, resident))

    def device(function):
        """Return a function as device code, which becomes part of what calls it."""
        return cuda.jit(device=True, forceinline=True)(function)

    @device
    def barrier():
        """Wait for the other threads of the block."""
        cuda.syncthreads()

    @device
    def settle():
        """Keep reads and writes of shared memory from moving past here."""
        cuda.threadfence_block()

    # Numba wraps negative indices around. Where the compiler does not see that one is none, each
    # costs instructions: numbers of threads come without a sign, and `index` takes it away.
    @device
    def thread():
        """Return the number of this thread in its block."""
        return np.int64(np.uint32(cuda.threadIdx.x))

    @device
    def block():
        """Return the number of this block of threads."""
        return np.int64(np.uint32(cuda.blockIdx.x))

    @device
    def index(i):
        """Return an index that is not negative."""
        return np.uint64(i)

    @device
    def mul(a, b):
        """Return a * b, float32, never fused."""
        return libdevice.fmul_rn(a, b)

    @device
    def add(a, b):
        """Return a + b, float32, never fused."""
        return libdevice.fadd_rn(a, b)

    @device
    def div(a, b):
        """Return a / b, float32, correctly rounded."""
        return libdevice.fdiv_rn(a, b)

    @device
    def sqrt(a):
        """Return the square root of a float32, correctly rounded."""
        return libdevice.fsqrt_rn(a)

    @device
    def rint(a):
        """Return a float32 rounded to a whole number, ties to even."""
        return libdevice.rintf(a)

    @device
    def lesser(a, b):
        """Return the lesser of two float32, the other one of a NaN."""
        return libdevice.fminf(a, b)

    @device
    def mul64(a, b):
        """Return a * b, float64, never fused."""
        return libdevice.dmul_rn(a, b)

    @device
    def add64(a, b):
        """Return a + b, float64, never fused."""
        return libdevice.dadd_rn(a, b)

    @device
    def sqrt64(a):
        """Return the square root of a float64, correctly rounded."""
        return libdevice.dsqrt_rn(a)

    @device
    def fp16_bits(x):
        """Return the binary16 bits of a float32, to nearest even; a NaN becomes sign|0x7E00."""
        bits = np.int64(np.uint16(libdevice.float2half_rn(x)))
        if x != x:  # the device's own NaN is 0x7FFF
            bits = (np.int64(np.uint32(libdevice.float_as_int(x))) >> 16) & 0x8000 | 0x7E00
        return bits

    @device
    def fp16_value(h):
        """Return the float32 value of binary16 bits."""
        return libdevice.half2float(np.int16(h))

    @device
    def float_of(bits):
        """Return the float32 with these bits."""
        return libdevice.int_as_float(np.int32(bits))

    @device
    def take(words, first, count):
        """Return `count` bits from bit `first` on of a little-endian string of 32-bit words."""
        word = np.uint32(words[first // 32] >> np.uint32(first % 32))
        if first % 32 + count > 32:
            word |= np.uint32(words[first // 32 + 1] << np.uint32(32 - first % 32))
        return np.int64(np.uint32(word & np.uint32((1 << count) - 1)))

    @device
    def put(words, first, count, value):
        """Set `count` bits, which are zeros, from bit `first` on of a string of words."""
        bits = np.uint32(value)
        words[first // 32] |= np.uint32(bits << np.uint32(first % 32))
        if first % 32 + count > 32:
            words[first // 32 + 1] |= np.uint32(bits >> np.uint32(32 - first % 32))
