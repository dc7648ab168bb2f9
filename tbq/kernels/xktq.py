"""Numba kernels of xktq2_1, alone and beside a sibling; see `tbq.families.ktq`."""

from __future__ import annotations

import numpy as np

from tbq.families.ktq import CODEBOOKS, QK, SCALE, TINY
from tbq.format import Format, RowKernels
from tbq.kernels.compile import jit
from tbq.kernels.lanes import (
    LANES,
    ZERO,
    expand,
    fwht,
    load,
    load_codes,
    load_word,
    norms,
)
from tbq.kernels.numerics import corrected_scale, load_fp16, store_fp16

BITS = 2
LEVELS = CODEBOOKS[BITS] * SCALE


@jit
def _quantize_alone(x, packed):
    v = np.empty((QK, LANES), np.float32)
    norm = np.empty(LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        norms(v, norm)
        for lane in range(count):
            packed[start + lane] = 0
            store_fp16(norm[lane], packed[start + lane], 0)


@jit
def _expand_siblings(siblings, start, count, levels, words, v):
    """Set v (32, LANES) to the transform of the siblings' codes, unsigned and unscaled."""
    words[:] = 0
    for lane in range(count):
        load_codes(siblings[start + lane], BITS, words, lane)
    expand(words, BITS, levels, v)
    fwht(v, SCALE)


@jit
def quantize_paired(x, siblings, levels, packed):
    """Quantise x (n, 32) beside ktq2_1 blocks (n, 14) to packed (n, 8)."""
    v = np.empty((QK, LANES), np.float32)
    words = np.zeros((4, LANES), np.int32)
    norm, rn = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        norms(v, norm)
        _expand_siblings(siblings, start, count, levels, words, v)
        norms(v, rn)
        for lane in range(count):
            dead = norm[lane] < TINY
            scale = norm[lane] if dead else corrected_scale(norm[lane], rn[lane])
            packed[start + lane] = 0
            store_fp16(scale, packed[start + lane], 0)


@jit
def dequantize_paired(packed, siblings, levels, y):
    """Dequantise packed (n, 8) beside ktq2_1 blocks (n, 14) to y (n, 32)."""
    v = np.empty((QK, LANES), np.float32)
    words = np.zeros((4, LANES), np.int32)
    for start in range(0, y.shape[0], LANES):
        count = min(LANES, y.shape[0] - start)
        _expand_siblings(siblings, start, count, levels, words, v)
        for lane in range(count):
            d = load_fp16(packed[start + lane], 0)
            signs = load_word(siblings[start + lane], 2 + 4 * BITS)
            for j in range(QK):
                signed = d if signs & np.int32(1 << j) else -d
                y[start + lane, j] = ZERO if d < TINY else v[j, lane] * signed


def kernels(fmt: Format) -> RowKernels:
    """Return the kernels of xktq2_1 alone."""

    def quantize(x, packed, first_block):
        _quantize_alone(x.reshape(-1, QK), packed.reshape(-1, fmt.block_bytes))

    def dequantize(packed, y):
        y[:] = ZERO

    return RowKernels(quantize, dequantize, dequantize)
