"""Numba kernels of `tbq.families.qvac`; what works on lanes is that of `tbq.kernels.amesianx`."""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.qvac import TINY, UnitCells
from tbq.kernels.amesianx import (
    CHUNK,
    LANES,
    ONE,
    ONE_CODE,
    TILE,
    ZERO,
    ZERO_CODE,
    add_squares,
    fwht,
    load,
    write_codes,
)
from tbq.kernels.compile import jit
from tbq.kernels.numerics import fp16_to_fp32, fp32_to_fp16, load_fp16, store_fp16
from tbq.kernels.rotated import STREAMS, halves, pair_table, read_codes
from tbq.numerics import word_signs


@jit
def _spread(factor, tile):
    """Set tile (TILE,) to factor (LANES,), as often as it goes into that."""
    for start in range(0, TILE, LANES):
        tile[start : start + LANES] = factor


@jit
def _choose(v, tile, edges, above, lowest, codes, c):
    """Set codes to the first cell with v times tile below its upper edge; c: levels."""
    low, high = edges
    low_above, high_above = above
    for start in range(0, v.size, TILE):
        stop = start + TILE
        own, own_codes, levels = v[start:stop], codes[start:stop], c[start:stop]
        for k in range(TILE):
            u, code, found = own[k] * tile[k], ZERO_CODE, lowest
            for edge, level in zip(low, low_above):  # noqa: B905 (Numba has no strict)
                code += ZERO_CODE if u < edge else ONE_CODE
                found = found if u < edge else level
            for edge, level in zip(high, high_above):  # noqa: B905
                code += ZERO_CODE if u < edge else ONE_CODE
                found = found if u < edge else level
            own_codes[k], levels[k] = code, found


@jit
def _norms(v, s, norm):
    """Set norm (LANES,) to the L2 norm of each lane of v; s is scratch."""
    add_squares(v, s, norm)
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


@jit
def _quantize(x, bits, cells, signs, has_signs, packed):
    """Quantise x (n, width) to packed (n, bytes); cells are edges, levels above and the lowest."""
    edges, above, lowest = cells
    width = signs.size // LANES
    v, c = np.empty(width * LANES, np.float32), np.empty(width * LANES, np.float32)
    codes, words = np.empty(width * LANES, np.int32), np.empty(width // 8 * LANES, np.int32)
    norm, rest = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    factor, s = np.empty(LANES, np.float32), np.empty(LANES + CHUNK, np.float32)
    tile = np.empty(TILE, np.float32)
    ones, at, size = np.ones(width, np.float32), width * bits // 8, packed.shape[1]
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, ones, v)
        _norms(v, s, norm)
        for lane in range(LANES):
            factor[lane] = ONE / norm[lane]
        _spread(factor, tile)
        _choose(v, tile, edges, above, lowest, codes, c)
        write_codes(codes, start, count, bits, size, 0, words, packed)
        if has_signs:
            for lane in range(LANES):
                factor[lane] = fp16_to_fp32(fp32_to_fp16(norm[lane]))
            _spread(factor, tile)
            _subtract(v, c, tile)
            _norms(c, s, rest)
            _bits(c, signs, codes)
            write_codes(codes, start, count, 1, size, at + 2, words, packed)
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


@jit
def _dequantize(packed, bits, pairs, y):
    """Set y (n, width) to levels times d."""
    at = y.shape[1] * bits // 8
    for b in range(packed.shape[0]):
        d = load_fp16(packed[b], at)
        if abs(d) < TINY:
            y[b] = ZERO
        else:
            read_codes(packed[b], bits, pairs, d, y[b])


def kernels(codec: UnitCells) -> RowKernels:
    """Return the kernels of a codec of the family."""
    if codec.corrected or codec.width:
        raise NotImplementedError("kernels do what the text says; others are mutants")
    width, size = codec.block_values, codec.block_bytes
    bits, levels = codec.cells.bits, codec.cells.levels
    cells = halves(codec.cells.edges), halves(levels[1:]), levels[0]
    pairs = pair_table(levels, STREAMS[bits])
    signs = np.repeat(word_signs(codec.signs) if codec.signs else np.ones(width), LANES)
    signs = signs.astype(np.float32)

    def quantize(x, packed, first):
        blocks = packed.reshape(-1, size)
        _quantize(x.reshape(-1, width), bits, cells, signs, bool(codec.signs), blocks)

    def dequantize(packed, y):
        _dequantize(packed.reshape(-1, size), bits, pairs, y.reshape(-1, width))

    return RowKernels(quantize, dequantize, dequantize)
