"""Numba kernels of `tbq.families.planar`, put together from `tbq.kernels.rotated`.

Sixteen groups lie side by side, so that the few values that a rotation mixes are vectors of lanes.
"""

from __future__ import annotations

import numpy as np

from tbq.codec import RowKernels
from tbq.families.planar import ROTATIONS, RotatedParts, inverse
from tbq.kernels import rotated
from tbq.kernels.compile import jit
from tbq.kernels.lanes import load, store
from tbq.kernels.rotated import GROUP, LANES, ORDERS, SIZE, SPLIT, STREAM4, ZERO, Plan
from tbq.kernels.simd import level_table, search_table
from tbq.nearest import absolute, thresholds

N = LANES


@jit
def _turn_pairs(v, rotations):
    for i in range(GROUP // 2):
        cos, sin = rotations[i, 0], rotations[i, 1]
        for k in range(2 * i * N, (2 * i + 1) * N):
            a, b = v[k], v[k + N]
            v[k], v[k + N] = cos * a - sin * b, sin * a + cos * b


@jit
def _turn_fours(v, rotations):
    for i in range(GROUP // 4):
        qw, qx, qy, qz = rotations[i, 0], rotations[i, 1], rotations[i, 2], rotations[i, 3]
        for k in range(4 * i * N, (4 * i + 1) * N):
            w, x, y, z = v[k], v[k + N], v[k + 2 * N], v[k + 3 * N]
            v[k] = qw * w - qx * x - qy * y - qz * z
            v[k + N] = qw * x + qx * w + qy * z - qz * y
            v[k + 2 * N] = qw * y - qx * z + qy * w + qz * x
            v[k + 3 * N] = qw * z + qx * y - qy * x + qz * w


@jit
def _turn(v, rotations):
    """Rotate each lane of v by rotations (64, 2) or (32, 4)."""
    if rotations.shape[1] == 2:
        _turn_pairs(v, rotations)
    else:
        _turn_fours(v, rotations)


@jit
def _turn_units(v, norm, plan, factor, kept):
    """Do what `rotated.turn` does; plan.after is rotations."""
    rotated.normalise(v, norm, plan, factor, kept)
    _turn(v, plan.after)


@jit
def _turn_back(v, before, rotations):
    """Do what `rotated.turn_back` does; there are no signs before rotations."""
    _turn(v, rotations)


@jit
def _rotate(x, rotations):
    v = np.empty(SIZE, np.float32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        _turn(v, rotations)
        store(v, start, count, x)


def _edges(codec: RotatedParts) -> np.ndarray:
    """Return what a value exceeds if the next centroid is nearer: the float before that place."""
    limits = thresholds(codec.cells.levels, absolute)
    return np.nextafter(limits, np.float32(-np.inf))


def _plan(codec: RotatedParts, rotations: np.ndarray) -> Plan:
    plan = {
        "divides": False,
        "floor": ZERO,
        "corrected": True,
        "clears_nan": False,
        "before": rotated.in_lanes(np.ones(GROUP, np.float32)),
        "after": rotations,
        "scales": rotated.scale_places(codec),
        "places": rotated.stored(codec, *codec.layout.codes),
        "zeros": rotated.zero_places(codec),
    }
    edges = {"edges": search_table(_edges(codec))}
    return Plan(**plan | rotated.cell_tables(codec.cells) | edges)


def kernels(codec: RotatedParts) -> RowKernels:
    """Return the kernels of a planar or iso codec."""
    misread = codec.transposed or codec.apart or codec.mirrored
    if misread or not codec.rotated or not codec.corrected:
        raise NotImplementedError("kernels rotate forward and correct norms; others are mutants")
    forward = np.ascontiguousarray(ROTATIONS[codec.kind])
    back = np.ascontiguousarray(inverse(forward))
    size, plan = codec.block_bytes, _plan(codec, forward)
    kind = SPLIT if codec.cells.bits == 3 else STREAM4
    table = level_table(codec.cells.levels)
    order = ORDERS[codec.total]
    encode = rotated.quantizer(kind, codec.cells.bits, ">", order, _turn_units)
    read, decode = rotated.leveller(kind), rotated.restorer(kind, _turn_back)

    def quantize(x, packed, first):
        encode(x.reshape(-1, GROUP), plan, packed.reshape(-1, size))

    def dequantize(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, GROUP)
        decode(blocks, plan.places, plan.scales, table, plan.before, back, values)

    def levels(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, GROUP)
        read(blocks, plan.places, plan.scales, table, values)

    def rotate(x, blocks):
        _rotate(x, forward)

    def unrotate(x, blocks):
        _rotate(x, back)

    return RowKernels(quantize, dequantize, levels, rotate, unrotate)
