"""Numba kernels of `tbq.families.dusterbloom`, put together from `tbq.kernels.rotated`."""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.dusterbloom import MIN_NORM, QK, SignedHadamard
from tbq.kernels import rotated
from tbq.kernels.mirrored import upper_levels
from tbq.kernels.rotated import ORDERS, STREAMS, Plan
from tbq.numerics import word_signs


def kernels(codec: SignedHadamard) -> RowKernels:
    """Return the kernels of a codec of the family."""
    if codec.width != QK:
        raise NotImplementedError("kernels rotate 128 values; other widths are mutants")
    kind, size = STREAMS[codec.cells.bits], codec.block_bytes
    signs = word_signs(codec.signs)
    own, ones = rotated.in_lanes(signs), rotated.in_lanes(np.ones(QK, np.float32))
    scaled = np.full(QK, codec.backward, np.float32)
    plan = Plan(
        order=ORDERS[codec.total],
        divides=True,
        floor=MIN_NORM,
        corrected=codec.corrected,
        clears_nan=False,
        before=own,
        after=np.full(QK, codec.forward, np.float32),
        upper=False,
        **rotated.split_cells(codec.cells),
        scales=rotated.scale_places(codec),
        places=rotated.stored(codec, "qs"),
        zeros=rotated.zero_places(codec),
    )
    where, upper = (plan.places, plan.scales), upper_levels(codec.cells.levels)
    pairs = rotated.pair_table(codec.cells.levels, kind)

    def quantize(x, packed, first):
        rotated.quantize(x.reshape(-1, QK), plan, kind, packed.reshape(-1, size))

    def levels(packed, y):
        rotated.levels(packed.reshape(-1, size), kind, *where, pairs, y.reshape(-1, QK))

    def dequantize(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, QK)
        rotated.restore(blocks, kind, *where, upper, ones, scaled * signs, values)

    def rotate(x, blocks):
        rotated.rotate(x, own, scaled)

    def unrotate(x, blocks):
        rotated.rotate(x, ones, scaled * signs)

    return RowKernels(quantize, dequantize, levels, rotate, unrotate)
