"""planar3_0, planar4_0, iso3_0 and iso4_0: a thread per group, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.planar`.
"""

from __future__ import annotations

import numpy as np

from cuda_port.device import add, device, mul
from cuda_port.groups import decoding, encoding, levels_of, plan_of
from cuda_port.kernels import rotator
from cuda_port.port import Port
from cuda_port.unroll import by_eights
from tbq.families.planar import ROTATIONS, RotatedParts, inverse
from tbq.nearest import absolute, thresholds


def pairs(rotations: np.ndarray):
    """Return the `mix` that rotates pairs; rotations: cosine and sine of each."""
    table = np.float32(rotations).reshape(-1)

    @device
    def eight(first, v):
        for i in range(first, first + 8, 2):
            cos, sin = table[i], table[i + 1]
            a, b = v[i], v[i + 1]
            v[i] = add(mul(cos, a), -mul(sin, b))
            v[i + 1] = add(mul(sin, a), mul(cos, b))

    return by_eights(len(table), eight)


@device
def sum_of_four(a, b, c, d):
    """Return the sum of four terms, from left to right."""
    return add(add(add(a, b), c), d)


def fours(rotations: np.ndarray):
    """Return the `mix` that multiplies fours from the left by quaternions."""
    table = np.float32(rotations).reshape(-1)

    @device
    def eight(first, v):
        for i in range(first, first + 8, 4):
            qw, qx, qy, qz = table[i], table[i + 1], table[i + 2], table[i + 3]
            w, x, y, z = v[i], v[i + 1], v[i + 2], v[i + 3]
            v[i] = sum_of_four(mul(qw, w), -mul(qx, x), -mul(qy, y), -mul(qz, z))
            v[i + 1] = sum_of_four(mul(qw, x), mul(qx, w), mul(qy, z), -mul(qz, y))
            v[i + 2] = sum_of_four(mul(qw, y), -mul(qx, z), mul(qy, w), mul(qz, x))
            v[i + 3] = sum_of_four(mul(qw, z), mul(qx, y), -mul(qy, x), mul(qz, w))

    return by_eights(len(table), eight)


MIXES = {"planar": pairs, "iso": fours}


def port(codec: RotatedParts) -> Port | None:
    """Return the kernels of a planar or iso format; None for wrong kernels."""
    if codec != RotatedParts(codec.kind, codec.cells):
        return None
    cells, mix, width = codec.cells, MIXES[codec.kind], codec.group_values
    third = "signs" if cells.bits == 3 else None
    plan = plan_of(codec, cells.bits, last=False, third=third)
    rotations = ROTATIONS[codec.kind]
    turn, back = mix(rotations), mix(inverse(rotations))
    return Port(
        encoding(plan, turn, thresholds(cells.levels, absolute), cells.levels),
        plan.fields,
        levels_of(plan),
        np.float32(cells.levels).reshape(-1),
        decoding(plan, back, cells.levels),
        rotator(width, turn),
        rotator(width, back),
    )
