"""vtq1_1 ... vtq4_1 and vtq_mixed: a thread per block of 32 values, as in ktq.

The arithmetic is that of `tbq.families.vtq`.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from cuda_port import kernels
from cuda_port.cells import finder, table_of
from cuda_port.device import ZERO, device, fp16_value, index, mul, put, take
from cuda_port.families.ktq import HALF_BITS, body, coder, levels_of
from cuda_port.fields import Fields, whole_block, write_unit
from cuda_port.port import Port
from cuda_port.unroll import by_eights
from tbq.families.ktq import SCALE, TINY
from tbq.families.vtq import CODEBOOKS, QK, Distance, MixedBlocks, PlainBlocks
from tbq.nearest import absolute, squared, thresholds

COARSE = 15  # where the table of two bits starts, after eight levels and seven thresholds of three
FINE_BITS, COARSE_BITS = 16, 40  # where codes of three and of two bits start in a vtq_mixed block


def tables(bits: int, distance: Distance) -> np.ndarray:
    """Return the levels of a codebook, then the thresholds between them."""
    levels = CODEBOOKS[bits] * SCALE
    if distance == "absolute":
        return table_of(levels, thresholds(levels, absolute))
    return table_of(levels, thresholds(levels, squared) if bits > 1 else np.zeros(1, np.float32))


@cache
def mixed_coder():
    """Return the device function (v, words, lut) of vtq_mixed: three bits in every fourth code."""
    fine, coarse = finder(3), finder(2, first=COARSE)

    @device
    def eight(first, v, words, lut):
        for j in range(first, first + 8):
            if j % 4 == 0:
                code = fine(v[j], lut)
                v[j] = lut[index(code)]
                put(words, FINE_BITS + 3 * (j // 4), 3, code)
            else:
                code = coarse(v[j], lut)
                v[j] = lut[index(COARSE + code)]
                put(words, COARSE_BITS + 2 * (j - j // 4), 2, code)

    return by_eights(QK, eight)


@cache
def mixed_levels(n: int):
    """Return `levels` of whole vtq_mixed blocks."""

    @device
    def eight(first, words, v, at, lut):
        d = fp16_value(take(words, 0, HALF_BITS))
        for j in range(first, first + 8):
            if j % 4 == 0:
                level = lut[index(take(words, FINE_BITS + 3 * (j // 4), 3))]
            else:
                level = lut[index(COARSE + take(words, COARSE_BITS + 2 * (j - j // 4), 2))]
            v[at + j] = ZERO if d < TINY else mul(level, d)

    return by_eights(QK, eight)


def port(codec: PlainBlocks | MixedBlocks) -> Port | None:
    """Return the kernels of a vtq*_1 format; None for wrong kernels."""
    if not codec.corrected:
        return None
    size, mixed = codec.block_bytes, isinstance(codec, MixedBlocks)
    whole = whole_block(size, QK)
    if mixed:
        table = np.concatenate([tables(bits, codec.distance) for bits in (3, 2)])
        code, fields, levels = mixed_coder(), whole, mixed_levels
    else:
        table, code = tables(codec.bits, codec.distance), coder(codec.bits)
        fields = Fields(size, QK, ((2, codec.bits),), ((0, 2),))
        levels = levels_of(fields, codec.bits)
    encode = kernels.encoder(QK, body(size, False, code), table, write_unit(whole))
    return Port(encode, fields, levels, table)
