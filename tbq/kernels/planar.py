"""Numba kernels of `tbq.families.planar`, put together from `tbq.kernels.rotated`.

Sixteen groups lie side by side, so that the few values that a rotation mixes are vectors of lanes.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tbq.codec import RowKernels
from tbq.families.planar import ROTATIONS, RotatedParts, inverse
from tbq.kernels import rotated
from tbq.kernels.compile import jit
from tbq.kernels.lanes import load, store
from tbq.kernels.numerics import store_fp16
from tbq.kernels.rotated import GROUP, LANES, ORDERS, SIZE, SPLIT, STREAM4, WORDS, ZERO, Plan
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


@cache
def _quantizer(kind: int, bits: int, order: int):
    norms, correct = rotated.norming(order), rotated.correcting(order)
    choose, write = rotated.chooser(bits, ">"), rotated.writer(kind)

    @jit
    def quantize(x, plan, rotations, packed):
        """Quantise x (n, 128) to packed (n, bytes of a block)."""
        v, s = np.empty(SIZE, np.float32), np.empty(SIZE, np.float32)
        codes, words = np.empty(SIZE, np.int32), np.empty(WORDS * LANES, np.int32)
        norm, scratch = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        kept = np.empty(LANES, np.int32)
        for start in range(0, x.shape[0], LANES):
            count = min(LANES, x.shape[0] - start)
            load(x, start, count, v)
            norms(v, norm)
            rotated.normalise(v, norm, plan, scratch, kept)
            _turn(v, rotations)
            choose(v, plan.edges, plan.squares, codes, s)
            correct(norm, s, scratch)
            write(codes, start, count, plan.places, words, packed)
            for lane in range(count):
                store_fp16(norm[lane], packed[start + lane], 0)

    return quantize


@cache
def _restorer(kind: int):
    read = rotated.reader(kind)

    @jit
    def restore(packed, places, scales, table, rotations, y):
        """Set y (n, 128) to the centroids, rotated, times norm."""
        v, words = np.empty(SIZE, np.float32), np.zeros(WORDS * LANES, np.int32)
        for start in range(0, packed.shape[0], LANES):
            count = min(LANES, packed.shape[0] - start)
            read(packed, start, count, places, table, words, v)
            _turn(v, rotations)
            rotated.store_scaled(v, start, count, packed, scales, y)

    return restore


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


def _plan(codec: RotatedParts) -> Plan:
    ones = np.ones(GROUP, np.float32)
    plan = {
        "divides": False,
        "floor": ZERO,
        "corrected": True,
        "clears_nan": False,
        "before": rotated.in_lanes(ones),
        "after": rotated.in_lanes(ones),
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
    size, plan = codec.block_bytes, _plan(codec)
    kind = SPLIT if codec.cells.bits == 3 else STREAM4
    table = level_table(codec.cells.levels)
    encode = _quantizer(kind, codec.cells.bits, ORDERS[codec.total])
    read, decode = rotated.leveller(kind), _restorer(kind)
    forward = np.ascontiguousarray(ROTATIONS[codec.kind])
    back = np.ascontiguousarray(inverse(forward))

    def quantize(x, packed, first):
        encode(x.reshape(-1, GROUP), plan, forward, packed.reshape(-1, size))

    def dequantize(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, GROUP)
        decode(blocks, plan.places, plan.scales, table, back, values)

    def levels(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, GROUP)
        read(blocks, plan.places, plan.scales, table, values)

    def rotate(x, blocks):
        _rotate(x, forward)

    def unrotate(x, blocks):
        _rotate(x, back)

    return RowKernels(quantize, dequantize, levels, rotate, unrotate)
