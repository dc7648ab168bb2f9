"""Numba kernels of `tbq.families.qvac`; what works on lanes is that of `tbq.kernels.amesianx`."""

from __future__ import annotations

from functools import cache

import numpy as np

from tbq.codec import RowKernels
from tbq.families.qvac import TINY, UnitCells
from tbq.kernels.amesianx import (
    ONE_CODE,
    TILE,
    ZERO_CODE,
    add_squares,
    chooser,
    fwht,
    writer,
)
from tbq.kernels.compile import jit
from tbq.kernels.lanes import LANES, ONE, ZERO, load
from tbq.kernels.numerics import fp16_to_fp32, fp32_to_fp16, load_fp16, store_fp16
from tbq.kernels.rotated import code_reader
from tbq.kernels.simd import level_table, search_table
from tbq.numerics import word_signs


@jit
def _spread(factor, tile):
    """Set tile (TILE,) to factor (LANES,), as often as it goes into that."""
    for start in range(0, TILE, LANES):
        for lane in range(LANES):
            tile[start + lane] = factor[lane]


@jit
def _multiply(v, tile, u):
    """Set u to v times tile."""
    for start in range(0, v.size, TILE):
        own, to = v[start : start + TILE], u[start : start + TILE]
        for k in range(TILE):
            to[k] = own[k] * tile[k]


@jit
def _norms(v, norm):
    """Set norm (LANES,) to the L2 norm of each lane of v."""
    add_squares(v, norm)
    for lane in range(LANES):
        norm[lane] = abs(np.sqrt(norm[lane]))  # see the specification


@jit
def _subtract(v, c, tile):
    """Set c to v minus c times tile."""
    for start in range(0, v.size, TILE):
        own, levels = v[start : start + TILE], c[start : start + TILE]
        for k in range(TILE):
            levels[k] = own[k] - levels[k] * tile[k]


@jit
def _bits(c, signs, codes):
    """Set codes to whether what is left, given its signs and transformed, is positive."""
    for k in range(c.size):
        c[k] *= signs[k]
    fwht(c)
    for k in range(c.size):
        codes[k] = ONE_CODE if c[k] > ZERO else ZERO_CODE


@cache
def _quantizer(bits: int, has_signs: bool):
    choose, write, write_signs = chooser(bits), writer(bits), writer(1)

    @jit
    def quantize(x, cells, signs, packed):
        """Quantise x (n, width) to packed (n, bytes); cells are tables of edges and of levels."""
        edges, levels = cells
        width = signs.size // LANES
        v, c = np.empty(width * LANES, np.float32), np.empty(width * LANES, np.float32)
        codes, words = np.empty(width * LANES, np.int32), np.empty(width // 8 * LANES, np.int32)
        norm, rest = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        factor, tile = np.empty(LANES, np.float32), np.empty(TILE, np.float32)
        u, at, size = np.empty(width * LANES, np.float32), width * bits // 8, packed.shape[1]
        for start in range(0, x.shape[0], LANES):
            count = min(LANES, x.shape[0] - start)
            load(x, start, count, v)
            _norms(v, norm)
            for lane in range(LANES):
                factor[lane] = ONE / norm[lane]
            _spread(factor, tile)
            _multiply(v, tile, u)
            choose(u, edges, levels, codes, c)
            write(codes, start, count, size, 0, words, packed)
            if has_signs:
                for lane in range(LANES):
                    factor[lane] = fp16_to_fp32(fp32_to_fp16(norm[lane]))
                _spread(factor, tile)
                _subtract(v, c, tile)
                _norms(c, rest)
                _bits(c, signs, codes)
                write_signs(codes, start, count, size, at + 2, words, packed)
            for lane in range(count):
                out = packed[start + lane]
                if norm[lane] < TINY:
                    out[:] = 0
                    continue
                store_fp16(norm[lane], out, at)
                if has_signs:
                    if rest[lane] < TINY:
                        out[at + 2 : at + 2 + width // 8] = 0
                    store_fp16(rest[lane], out, size - 2)

    return quantize


@cache
def _dequantizer(bits: int):
    read_codes = code_reader(bits)

    @jit
    def dequantize(packed, levels, y):
        """Set y (n, width) to levels times d."""
        at = y.shape[1] * bits // 8
        for b in range(packed.shape[0]):
            d = load_fp16(packed[b], at)
            if abs(d) < TINY:
                y[b] = ZERO
            else:
                read_codes(packed[b], levels, d, y[b])

    return dequantize


def kernels(codec: UnitCells) -> RowKernels:
    """Return the kernels of a codec of the family."""
    if codec.corrected or codec.width:
        raise NotImplementedError("kernels do what the text says; others are mutants")
    width, size = codec.block_values, codec.block_bytes
    bits, levels = codec.cells.bits, level_table(codec.cells.levels)
    cells = search_table(codec.cells.edges), levels
    encode, decode = _quantizer(bits, bool(codec.signs)), _dequantizer(bits)
    signs = np.repeat(word_signs(codec.signs) if codec.signs else np.ones(width), LANES)
    signs = signs.astype(np.float32)

    def quantize(x, packed, first):
        blocks = packed.reshape(-1, size)
        encode(x.reshape(-1, width), cells, signs, blocks)

    def dequantize(packed, y):
        decode(packed.reshape(-1, size), levels, y.reshape(-1, width))

    return RowKernels(quantize, dequantize, dequantize)
