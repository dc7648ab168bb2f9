"""Numba kernels of `tbq.families.vllm`, put together from `tbq.kernels.rotated`."""

from __future__ import annotations

from functools import cache

import numpy as np

from tbq.codec import Codec, RowKernels
from tbq.families.vllm import HEAD, K128, LEAST_SCALE, LEAST_SQUARE, TINY, StepValues, UnitKeys
from tbq.kernels import rotated
from tbq.kernels.compile import jit
from tbq.kernels.lanes import chooser, load
from tbq.kernels.numerics import load_fp16, store_fp16
from tbq.kernels.rotated import LANES, ONE, SIZE, STREAMS, WORDS, ZERO
from tbq.kernels.simd import level_table, search_table

EIGHT = 8 * LANES
INFINITY, HALF = np.float32(np.inf), np.float32(0.5)


@jit
def _norms(v, s, norm):
    """Set norm (LANES,) to the L2 norm of each lane of v; s (EIGHT,) has the partial sums."""
    s[:] = ZERO
    for start in range(0, SIZE, EIGHT):
        own = v[start : start + EIGHT]
        for k in range(EIGHT):
            s[k] += own[k] * own[k]
    n = LANES
    for k in range(n):
        half = (s[k] + s[k + n]) + (s[k + 2 * n] + s[k + 3 * n])
        total = half + ((s[k + 4 * n] + s[k + 5 * n]) + (s[k + 6 * n] + s[k + 7 * n]))
        norm[k] = abs(np.sqrt(total))  # see the specification


@jit
def _divide(v, divisor):
    for j in range(HEAD):
        for lane in range(LANES):
            v[j * LANES + lane] /= divisor[lane]


@cache
def _key_quantizer(bits: int):
    choose, write = chooser(bits, ">", HEAD), rotated.writer(STREAMS[bits])

    @jit
    def quantize(x, places, edges, table, factors, packed):
        """Quantise x (n, 128) to packed (n, bytes), whose last two are the norm."""
        v, found = np.empty(SIZE, np.float32), np.empty(SIZE, np.float32)
        codes, words = np.empty(SIZE, np.int32), np.empty(WORDS * LANES, np.int32)
        norm, s = np.empty(LANES, np.float32), np.empty(EIGHT, np.float32)
        divisor = np.empty(LANES, np.float32)
        for start in range(0, x.shape[0], LANES):
            count = min(LANES, x.shape[0] - start)
            load(x, start, count, v)
            _norms(v, s, norm)
            for lane in range(LANES):
                divisor[lane] = norm[lane] + TINY
            _divide(v, divisor)
            rotated.fwht(v, factors)
            choose(v, edges, table, codes, found)
            write(codes, start, count, places, words, packed)
            for lane in range(count):
                store_fp16(norm[lane], packed[start + lane], packed.shape[1] - 2)

    return quantize


@cache
def _key_dequantizer(bits: int):
    read_codes = rotated.code_reader(bits)

    @jit
    def dequantize(packed, table, y):
        """Set y (n, 128) to centroids of length one times the norm."""
        s = np.empty(8, np.float32)
        for b in range(packed.shape[0]):
            out = y[b]
            read_codes(packed[b], table, ONE, out)
            s[:] = ZERO
            for j in range(0, HEAD, 8):
                for k in range(8):
                    s[k] += out[j + k] * out[j + k]
            total = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
            inverse = ONE / np.sqrt(total + LEAST_SQUARE)
            norm = load_fp16(packed[b], packed.shape[1] - 2)
            for j in range(HEAD):
                out[j] = (out[j] * inverse) * norm

    return dequantize


def _keys(codec: UnitKeys) -> RowKernels:
    wrong = codec.width != HEAD or not codec.normalised or codec.corrected
    if codec.total != "eights" or wrong:
        raise NotImplementedError("kernels do what the text says; others are mutants")
    size, bits, levels = codec.block_bytes, codec.cells.bits, codec.cells.levels
    places = rotated.stored(codec, "qs")
    encode, decode = _key_quantizer(bits), _key_dequantizer(bits)
    # what exceeds the float before a midpoint is not below it
    edges = search_table(np.nextafter(codec.cells.edges, np.float32(-np.inf)))
    table = level_table(levels)
    factors = rotated.in_lanes(np.full(HEAD, K128, np.float32))
    ones = rotated.in_lanes(np.ones(HEAD, np.float32))

    def quantize(x, packed, first):
        blocks = packed.reshape(-1, size)
        encode(x.reshape(-1, HEAD), places, edges, table, factors, blocks)

    def dequantize(packed, y):
        decode(packed.reshape(-1, size), table, y.reshape(-1, HEAD))

    def rotate(x, blocks):
        rotated.rotate(x, ones, factors)

    return RowKernels(quantize, dequantize, dequantize, rotate, rotate)


@jit
def _extremes(v, lo, hi):
    """Set lo and hi (LANES,) to the least and the largest of each lane of v, but for NaN."""
    lo[:], hi[:] = INFINITY, -INFINITY
    for j in range(HEAD):
        for lane in range(LANES):
            u = v[j * LANES + lane]
            lo[lane] = u if u < lo[lane] else lo[lane]
            hi[lane] = u if u > hi[lane] else hi[lane]


@jit
def _count_steps(v, lo, scale, top, codes):
    for j in range(HEAD):
        for lane in range(LANES):
            steps = (v[j * LANES + lane] - lo[lane]) / scale[lane] + HALF
            steps = steps if steps > ZERO else ZERO  # NaN too
            codes[j * LANES + lane] = np.int32(steps if steps < top else top)


@cache
def _value_quantizer(bits: int):
    write = rotated.writer(STREAMS[bits])

    @jit
    def quantize(x, places, top, packed):
        """Quantise x (n, 128) to packed (n, bytes), whose last four are scale and least value."""
        v, codes = np.empty(SIZE, np.float32), np.empty(SIZE, np.int32)
        words, scale = np.empty(WORDS * LANES, np.int32), np.empty(LANES, np.float32)
        lo, hi = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        for start in range(0, x.shape[0], LANES):
            count = min(LANES, x.shape[0] - start)
            load(x, start, count, v)
            _extremes(v, lo, hi)
            for lane in range(LANES):
                step = (hi[lane] - lo[lane]) / top
                scale[lane] = step if step > LEAST_SCALE else LEAST_SCALE  # NaN too
            _count_steps(v, lo, scale, top, codes)
            write(codes, start, count, places, words, packed)
            for lane in range(count):
                out = packed[start + lane]
                store_fp16(scale[lane], out, packed.shape[1] - 4)
                store_fp16(lo[lane], out, packed.shape[1] - 2)

    return quantize


@cache
def _value_dequantizer(bits: int):
    read_codes = rotated.code_reader(bits)

    @jit
    def dequantize(packed, table, y):
        for b in range(packed.shape[0]):
            out, at = y[b], packed.shape[1] - 4
            read_codes(packed[b], table, load_fp16(packed[b], at), out)
            least = load_fp16(packed[b], at + 2)
            for j in range(HEAD):
                out[j] += least

    return dequantize


def _values(codec: StepValues) -> RowKernels:
    if not codec.rounded:
        raise NotImplementedError("kernels round; others are mutants")
    size, bits = codec.block_bytes, codec.bits
    encode, decode = _value_quantizer(bits), _value_dequantizer(bits)
    places, top = rotated.stored(codec, "qs"), np.float32((1 << bits) - 1)
    table = level_table(np.arange(1 << bits, dtype=np.float32))

    def quantize(x, packed, first):
        encode(x.reshape(-1, HEAD), places, top, packed.reshape(-1, size))

    def dequantize(packed, y):
        decode(packed.reshape(-1, size), table, y.reshape(-1, HEAD))

    return RowKernels(quantize, dequantize, dequantize)


def kernels(codec: Codec) -> RowKernels:
    """Return the kernels of a codec of the family."""
    return _keys(codec) if isinstance(codec, UnitKeys) else _values(codec)
