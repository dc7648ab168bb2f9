"""Numba kernels of `tbq.families.ik_llama`."""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.ik_llama import HALF_QK, OFFSET, QK, STEPS, TOP, RowSteps, SixBits
from tbq.kernels.compile import jit
from tbq.kernels.ggml_blocks import largest_of_row
from tbq.kernels.lanes import LANES, ONE, ZERO, load
from tbq.kernels.numerics import load_fp16, store_fp16

MIDDLE = np.float32(32)
LIMIT = np.float32(TOP)
FAR = np.float32(2.0**31)
LEAST_CODE, MOST_CODE = np.int32(-128), np.int32(127)


@jit
def _largest(x, m):
    """Set m (LANES,) to the value of largest magnitude of each lane of x (32, LANES)."""
    m[:] = ZERO
    for j in range(QK):
        for lane in range(LANES):
            u = x[j, lane]
            m[lane] = u if abs(u) > abs(m[lane]) else m[lane]


@jit
def _choose(x, inverse, a, codes):
    for j in range(QK):
        for lane in range(LANES):
            u = x[j, lane] * inverse[lane]
            a[j, lane] = u
            steps = u + OFFSET
            steps = steps if steps > ZERO else ZERO  # NaN too
            steps = steps if abs(u) < np.float32(np.inf) else ZERO
            codes[j, lane] = np.int32(steps if steps < LIMIT else LIMIT)


@jit
def _refine(x, a, codes, u, v):
    """Set u and v (LANES,) to the two sums."""
    u[:], v[:] = ZERO, ZERO
    for j in range(HALF_QK):
        for lane in range(LANES):
            x0, a0, p0 = x[j, lane], a[j, lane], np.float32(codes[j, lane]) - MIDDLE
            k = j + HALF_QK
            x1, a1, p1 = x[k, lane], a[k, lane], np.float32(codes[k, lane]) - MIDDLE
            w0, w1 = a0 * a0, a1 * a1
            u[lane] += ((w0 * x0) * p0) + ((w1 * x1) * p1)
            v[lane] += ((w0 * p0) * p0) + ((w1 * p1) * p1)


@jit
def _pack(codes, low, high):
    """Set low (16, LANES) and high (8, LANES) to the bytes of each lane."""
    for j in range(HALF_QK):
        for lane in range(LANES):
            first, second = codes[j, lane], codes[j + HALF_QK, lane]
            low[j, lane] = np.uint8(first & 15 | (second & 15) << 4)
    for j in range(8):
        for lane in range(LANES):
            near = codes[j, lane] >> 4 | (codes[j + HALF_QK, lane] >> 4) << 2
            far = codes[j + 8, lane] >> 4 | (codes[j + 8 + HALF_QK, lane] >> 4) << 2
            high[j, lane] = np.uint8(near | far << 4)


@jit
def _quantize(x, packed):
    """Quantise x (n, 32) to packed (n, 26)."""
    v, a = np.empty((QK, LANES), np.float32), np.empty((QK, LANES), np.float32)
    codes = np.empty((QK, LANES), np.int32)
    low, high = np.empty((HALF_QK, LANES), np.uint8), np.empty((8, LANES), np.uint8)
    scale, inverse = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    up, down = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v.reshape(QK * LANES))
        _largest(v, scale)
        for lane in range(LANES):
            scale[lane] /= STEPS
            inverse[lane] = ONE / scale[lane] if scale[lane] != ZERO else ZERO
        _choose(v, inverse, a, codes)
        _refine(v, a, codes, up, down)
        _pack(codes, low, high)
        for lane in range(count):
            out = packed[start + lane]
            store_fp16(up[lane] / down[lane] if down[lane] > ZERO else scale[lane], out, 0)
            for j in range(8):
                out[2 + j] = high[j, lane]
            for j in range(HALF_QK):
                out[10 + j] = low[j, lane]


@jit
def _dequantize(packed, y):
    """Set y (n, 32) to d times the steps from the middle of packed (n, 26)."""
    for b in range(packed.shape[0]):
        block, out = packed[b], y[b]
        d = load_fp16(block, 0)
        for half in range(2):
            for i in range(8):
                j = 8 * half + i
                low, high = np.int32(block[10 + j]), np.int32(block[2 + i]) >> (4 * half)
                out[j] = d * np.float32((low & 15 | (high & 3) << 4) - 32)
                out[j + HALF_QK] = d * np.float32((low >> 4 | (high & 12) << 2) - 32)


# --- q8_KV ---------------------------------------------------------------------------------------


@jit
def _store32(word, out, at):
    for k in range(4):
        out[at + k] = np.uint8((np.uint32(word) >> np.uint32(8 * k)) & np.uint32(255))


@jit
def _quantize_rows(x, packed):
    """Quantise x (rows, n) to packed (rows, 8 + n) as q8_KV."""
    lanes, scale = np.empty(8, np.float32), np.empty(1, np.float32)
    for b in range(x.shape[0]):
        row, out = x[b], packed[b]
        largest = largest_of_row(row, lanes)
        if largest == ZERO:
            out[:] = 0
            continue
        scale[0] = largest / np.float32(127)
        inverse, total, codes = ONE / scale[0], np.int64(0), out[8:]
        for j in range(row.size):
            steps = np.rint(row[j] * inverse)
            steps = steps if abs(steps) < FAR else -FAR  # NaN too
            whole = np.int32(steps)
            total += np.int64(whole)
            codes[j] = np.uint8(np.int8(min(max(whole, LEAST_CODE), MOST_CODE)))
        _store32(scale.view(np.uint32)[0], out, 0)
        _store32(total, out, 4)


@jit
def _dequantize_rows(packed, y):
    """Set y (rows, n) to d times the codes of packed (rows, 8 + n), q8_KV."""
    word = np.empty(1, np.uint32)
    for b in range(packed.shape[0]):
        word[0] = 0
        for k in range(4):
            word[0] |= np.uint32(packed[b, k]) << np.uint32(8 * k)
        d, codes, out = word.view(np.float32)[0], packed[b, 8:], y[b]
        for j in range(out.size):
            out[j] = d * np.float32(np.int8(codes[j]))


def kernels(codec: SixBits | RowSteps) -> RowKernels:
    """Return the kernels of q6_0 or q8_KV."""
    if codec not in (SixBits(), RowSteps()):
        raise NotImplementedError("kernels do what the fork does; others are mutants")
    if codec == RowSteps():
        return RowKernels(
            lambda x, packed, first: _quantize_rows(x, packed), _dequantize_rows, _dequantize_rows
        )
    size = codec.block_bytes

    def quantize(x, packed, first):
        _quantize(x.reshape(-1, QK), packed.reshape(-1, size))

    def dequantize(packed, y):
        _dequantize(packed.reshape(-1, size), y.reshape(-1, QK))

    return RowKernels(quantize, dequantize, dequantize)
