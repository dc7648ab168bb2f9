"""Numba kernels of `tbq.families.dusterbloom`, put together from `tbq.kernels.rotated`."""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.dusterbloom import MIN_NORM, QK, SignedHadamard
from tbq.kernels import rotated
from tbq.kernels.rotated import ORDERS, STREAMS, Plan
from tbq.kernels.simd import level_table
from tbq.numerics import word_signs


def kernels(codec: SignedHadamard) -> RowKernels:
    """Return the kernels of a codec of the family."""
    if codec.width != QK:
        raise NotImplementedError("kernels rotate 128 values; other widths are mutants")
    kind, size = STREAMS[codec.cells.bits], codec.block_bytes
    signs = word_signs(codec.signs)
    own, ones = rotated.in_lanes(signs), rotated.in_lanes(np.ones(QK, np.float32))
    scaled = rotated.in_lanes(np.full(QK, codec.backward, np.float32))
    plan = Plan(
        divides=True,
        floor=MIN_NORM,
        corrected=codec.corrected,
        clears_nan=False,
        before=own,
        after=rotated.in_lanes(np.full(QK, codec.forward, np.float32)),
        **rotated.cell_tables(codec.cells),
        scales=rotated.scale_places(codec),
        places=rotated.stored(codec, "qs"),
        zeros=rotated.zero_places(codec),
    )
    encode = rotated.quantizer(kind, codec.cells.bits, ">", ORDERS[codec.total])
    read, decode = rotated.leveller(kind), rotated.restorer(kind)
    where, table = (plan.places, plan.scales), level_table(codec.cells.levels)

    def quantize(x, packed, first):
        encode(x.reshape(-1, QK), plan, packed.reshape(-1, size))

    def levels(packed, y):
        read(packed.reshape(-1, size), *where, table, y.reshape(-1, QK))

    def dequantize(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, QK)
        decode(blocks, *where, table, ones, scaled * own, values)

    def rotate(x, blocks):
        rotated.rotate(x, own, scaled)

    def unrotate(x, blocks):
        rotated.rotate(x, ones, scaled * own)

    return RowKernels(quantize, dequantize, levels, rotate, unrotate)
