"""Numba kernels of `tbq.families.small_floats`."""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.small_floats import (
    E4M3,
    LARGEST_E4M3,
    LARGEST_LEVEL,
    LEVELS32,
    NAN_E4M3,
    NEVER_WRITTEN,
    OneByte,
    PowerOfTwo,
    SmallScale,
)
from tbq.kernels.compile import jit
from tbq.kernels.ggml_blocks import INFINITE, MAGNITUDE, NONE, as_float, block_kernels
from tbq.kernels.lanes import ZERO
from tbq.kernels.numerics import HALF

CODES = len(LEVELS32)
WHOLE_STEP = np.float32(512)  # below 2^-6, E4M3 counts so many to one
MOST_E4M3 = np.float32(448)
EXPONENT_SHIFT = 125
# f8_e4m3: float32 from 2^14 to 2^15 has the unit that E4M3 has below 2^-6.
UNIT_AT = np.float32(2.0**14)
UNIT_BITS = np.int32(141 << 23)
LEAST_NORMAL, REBIAS = np.int32(121 << 23), np.int32(120 << 23)
BYTES = np.concatenate([E4M3, -E4M3])
BYTES[[NAN_E4M3, 128 + NAN_E4M3]] = np.nan
BYTES.setflags(write=False)


# --- mxfp4 and nvfp4 -----------------------------------------------------------------------------


@jit
def _largest(bits):
    """Return the largest magnitude of a row of float32 bits, int32 (n,), NaN left out."""
    top = NONE
    for j in range(bits.size):
        size = np.int32(bits[j] & MAGNITUDE)
        top = max(top, size if size <= INFINITE else NONE)
    return as_float(top)


@jit
def _choose(row, s, best, codes):
    """Set codes (n,) to the first of the nearest levels times s; best (n,) is scratch."""
    for j in range(row.size):
        best[j] = abs(ZERO * s - row[j])
        codes[j] = NONE
    for k in range(1, CODES):
        level = LEVELS32[k] * s
        for j in range(row.size):
            error = abs(level - row[j])
            codes[j] = np.int32(k) if error < best[j] else codes[j]
            best[j] = error if error < best[j] else best[j]


@jit
def _pack(codes, out):
    for j in range(out.size):
        out[j] = np.uint8(codes[j] | codes[j + out.size] << 4)


@jit
def _unpack(packed, s, out):
    """Set out (n,) to the levels of packed (n / 2,) times s."""
    for j in range(packed.size):
        out[j] = LEVELS32[packed[j] & 15] * s
        out[j + packed.size] = LEVELS32[packed[j] >> 4] * s


@jit
def _exponent(largest):
    if not (largest > ZERO and largest < np.float32(np.inf)):
        return NONE
    log = np.float32(np.log2(np.float64(largest)))
    return np.int32((np.int32(np.floor(log)) + EXPONENT_SHIFT) & 255)


@jit
def _power_of_two(e):
    """Return 2^(e - 128) of an exponent byte."""
    return as_float((e - 1) << 23 if e > 1 else 0x00200000 << e)


@jit
def _quantize_power_of_two(x, bits, packed):
    """Quantise x (n, 32) to packed (n, 17)."""
    best, codes = np.empty(32, np.float32), np.empty(32, np.int32)
    for b in range(x.shape[0]):
        e = _exponent(_largest(bits[b]))
        packed[b, 0] = np.uint8(e)
        _choose(x[b], _power_of_two(e), best, codes)
        _pack(codes, packed[b, 1:])


@jit
def _dequantize_power_of_two(packed, y):
    """Set y (n, 32) to what packed (n, 17) means."""
    for b in range(packed.shape[0]):
        _unpack(packed[b, 1:], _power_of_two(np.int32(packed[b, 0])), y[b])


@jit
def _unsigned_e4m3(x):
    """Return the scale of nvfp4 that is nearest to a float32; halves go up."""
    if not x > ZERO:
        return NONE
    x = min(x, MOST_E4M3)
    bits = np.int64(np.float32(x).view(np.int32))
    exponent = (bits >> 23) - 120
    if exponent <= 0:
        return np.int32(min(np.int64(x * WHOLE_STEP + HALF), 7))
    code = (exponent << 3) + (bits >> 20 & 7) + (bits >> 19 & 1)
    return np.int32(code if code < NEVER_WRITTEN else LARGEST_E4M3)


@jit
def _half_of_e4m3(d):
    """Return half of what a scale of nvfp4 means."""
    return ZERO if d == 0 or d == NAN_E4M3 else E4M3[d & 127] * HALF


@jit
def _quantize_small_scale(x, bits, packed):
    """Quantise x (n, 64) to packed (n, 36)."""
    best, codes = np.empty(16, np.float32), np.empty(16, np.int32)
    for b in range(x.shape[0]):
        for part in range(4):
            start, stop = 16 * part, 16 * part + 16
            d = _unsigned_e4m3(_largest(bits[b, start:stop]) / LARGEST_LEVEL)
            packed[b, part] = np.uint8(d)
            _choose(x[b, start:stop], _half_of_e4m3(d), best, codes)
            _pack(codes, packed[b, 4 + 8 * part : 12 + 8 * part])


@jit
def _dequantize_small_scale(packed, y):
    """Set y (n, 64) to what packed (n, 36) means."""
    for b in range(packed.shape[0]):
        for part in range(4):
            s = _half_of_e4m3(np.int32(packed[b, part]))
            _unpack(packed[b, 4 + 8 * part : 12 + 8 * part], s, y[b, 16 * part : 16 * part + 16])


# --- f8_e4m3 -------------------------------------------------------------------------------------


@jit
def _quantize_bytes(x, bits, packed):
    """Quantise x (n, 1) to packed (n, 1)."""
    for j in range(x.shape[0]):
        size = np.int32(bits[j, 0] & MAGNITUDE)
        small = np.float32(as_float(size) + UNIT_AT).view(np.int32) - UNIT_BITS
        odd = (size >> 20) & 1
        normal = (size - REBIAS + 0x7FFFF + odd) >> 20
        code = min(small if size < LEAST_NORMAL else normal, LARGEST_E4M3)
        code = code if size <= INFINITE else NAN_E4M3
        packed[j, 0] = np.uint8(code | (bits[j, 0] >> 24 & 128))


@jit
def _dequantize_bytes(packed, y):
    """Set y (n, 1) to what the bytes packed (n, 1) mean."""
    for j in range(packed.shape[0]):
        y[j, 0] = BYTES[packed[j, 0]]


def kernels(codec: PowerOfTwo | SmallScale | OneByte) -> RowKernels:
    """Return the kernels of a codec; NotImplementedError for wrong ones."""
    if codec == PowerOfTwo():
        return block_kernels(codec, _quantize_power_of_two, _dequantize_power_of_two)
    if codec == SmallScale():
        return block_kernels(codec, _quantize_small_scale, _dequantize_small_scale)
    if codec == OneByte():
        return block_kernels(codec, _quantize_bytes, _dequantize_bytes)
    raise NotImplementedError("kernels do what ggml does; others are mutants")
