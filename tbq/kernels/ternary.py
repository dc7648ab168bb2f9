"""Numba kernels of `tbq.families.ternary`."""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.ternary import RUNS, TERNARY_VALUES, TRITS, Signs, Trits, TwoBits
from tbq.kernels.compile import jit
from tbq.kernels.ggml_blocks import (
    INFINITE,
    NONE,
    as_float,
    away_from_zero,
    block_kernels,
    largest_bits,
    largest_in_order,
)
from tbq.kernels.lanes import ONE, ZERO
from tbq.kernels.numerics import load_fp16, store_fp16

SIGNS = Signs.block_values
COUNT = np.float32(SIGNS)
DENSE_SCALE, LOOSE_SCALE = 52, 64  # where d is in blocks of tq1_0 and tq2_0
MOST_STEPS = np.float32(3)


# --- q1_0 and q2_0 -------------------------------------------------------------------------------


@jit
def _quantize_signs(x, bits, packed):
    """Quantise x (n, 128) to packed (n, 18)."""
    for b in range(x.shape[0]):
        row, codes, total = x[b], packed[b, 2:], ZERO
        for j in range(SIGNS):
            total += abs(row[j])
        store_fp16(total / COUNT, packed[b], 0)
        for i in range(SIGNS // 8):
            byte = NONE
            for k in range(8):
                byte |= np.int32(row[8 * i + k] >= ZERO) << k
            codes[i] = np.uint8(byte)


@jit
def _dequantize_signs(packed, y):
    """Set y (n, 128) to d or -d as the bits of packed (n, 18) say."""
    for b in range(packed.shape[0]):
        d, codes, out = load_fp16(packed[b], 0), packed[b, 2:], y[b]
        for i in range(SIGNS // 8):
            byte = np.int32(codes[i])
            for k in range(8):
                out[8 * i + k] = d if (byte >> k) & 1 else -d


@jit
def _largest(row, bits):
    """Return the largest magnitude of a row, NaN left out."""
    top = largest_bits(bits)
    if top <= INFINITE:
        return as_float(top)
    largest = ZERO
    for j in range(row.size):
        largest = abs(row[j]) if abs(row[j]) > largest else largest
    return largest


@jit
def _two_bits(steps):
    """Return the code of a value in steps; 0 if that is no finite number."""
    finite = abs(steps) < MOST_STEPS  # no finite value is more than one, and little, steps
    code = away_from_zero(steps if finite else -ONE) + 1
    return np.int32(min(max(code, 0), 3))


@jit
def _quantize_two_bits(x, bits, packed):
    """Quantise x (n, values) to packed (n, 2 + values / 4)."""
    for b in range(x.shape[0]):
        row, codes = x[b], packed[b, 2:]
        d = _largest(row, bits[b])
        inverse = ONE / d if d > ZERO else ZERO
        store_fp16(d, packed[b], 0)
        for i in range(codes.size):
            byte = NONE
            for k in range(4):
                byte |= _two_bits(row[4 * i + k] * inverse) << (2 * k)
            codes[i] = np.uint8(byte)


@jit
def _dequantize_two_bits(packed, y):
    """Set y (n, values) to d times one less than the codes of packed (n, 2 + values / 4)."""
    for b in range(packed.shape[0]):
        d, codes, out = load_fp16(packed[b], 0), packed[b, 2:], y[b]
        for i in range(codes.size):
            byte = np.int32(codes[i])
            for k in range(4):
                out[4 * i + k] = np.float32(np.int32((byte >> (2 * k) & 3) - 1)) * d


# --- tq1_0 and tq2_0 -----------------------------------------------------------------------------


@jit
def _scaled(row, bits, out, at, codes):
    """Write the scale of a row to out[at : at + 2], and set codes (256,) to its codes."""
    d = largest_in_order(row, bits)
    inverse = ONE / d if d != ZERO else ZERO
    store_fp16(d, out, at)
    for j in range(TERNARY_VALUES):
        codes[j] = away_from_zero(row[j] * inverse) + 1


@jit
def _quantize_dense(x, bits, packed):
    """Quantise x (n, 256) to packed (n, 54)."""
    codes = np.empty(TERNARY_VALUES, np.int32)
    for b in range(x.shape[0]):
        _scaled(x[b], bits[b], packed[b], DENSE_SCALE, codes)
        at = 0
        for start, values, step in RUNS:
            for m in range(step):
                q = NONE
                for n in range(TRITS):
                    own = codes[start + m + n * step] if n * step < values else NONE
                    q = np.int32((q * 3 + own) & 255)
                packed[b, at + m] = np.uint8((q * 256 + 242) // 243)
            at += step


@jit
def _dequantize_dense(packed, y):
    """Set y (n, 256) to d times one less than the trits of packed (n, 54)."""
    for b in range(packed.shape[0]):
        d, out, at = load_fp16(packed[b], DENSE_SCALE), y[b], 0
        for start, values, step in RUNS:
            power = 1
            for n in range(values // step):
                for m in range(step):
                    trit = ((np.int32(packed[b, at + m]) * power & 255) * 3) >> 8
                    out[start + n * step + m] = np.float32(np.int32(trit - 1)) * d
                power *= 3
            at += step


@jit
def _quantize_loose(x, bits, packed):
    """Quantise x (n, 256) to packed (n, 66)."""
    codes = np.empty(TERNARY_VALUES, np.int32)
    for b in range(x.shape[0]):
        _scaled(x[b], bits[b], packed[b], LOOSE_SCALE, codes)
        for half in range(2):
            for m in range(32):
                byte = NONE
                for n in range(4):
                    byte |= (codes[128 * half + 32 * n + m] & 3) << (2 * n)
                packed[b, 32 * half + m] = np.uint8(byte)


@jit
def _dequantize_loose(packed, y):
    """Set y (n, 256) to d times one less than the codes of packed (n, 66)."""
    for b in range(packed.shape[0]):
        d, out = load_fp16(packed[b], LOOSE_SCALE), y[b]
        for half in range(2):
            for n in range(4):
                for m in range(32):
                    code = (np.int32(packed[b, 32 * half + m]) >> (2 * n)) & 3
                    out[128 * half + 32 * n + m] = np.float32(np.int32(code - 1)) * d


def kernels(codec: Signs | TwoBits | Trits) -> RowKernels:
    """Return the kernels of a codec; NotImplementedError for wrong ones."""
    if codec == Signs():
        return block_kernels(codec, _quantize_signs, _dequantize_signs)
    if isinstance(codec, TwoBits) and not codec.to_even:
        return block_kernels(codec, _quantize_two_bits, _dequantize_two_bits)
    if codec == Trits(dense=True):
        return block_kernels(codec, _quantize_dense, _dequantize_dense)
    if codec == Trits(dense=False):
        return block_kernels(codec, _quantize_loose, _dequantize_loose)
    raise NotImplementedError("kernels do what ggml does; others are mutants")
