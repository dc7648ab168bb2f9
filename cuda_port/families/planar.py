"""planar3_0, planar4_0, iso3_0 and iso4_0: a thread per group, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.planar`.
"""

from __future__ import annotations

from cuda_port.device import add, device, mul
from cuda_port.groups import TINY, decoding, encoding, level_of, plan_of, rotating
from cuda_port.port import Port
from tbq.families.planar import ROTATIONS, RotatedParts, inverse
from tbq.nearest import absolute, thresholds


@device
def turn_pairs(v, n, rotations, unused):
    """Rotate pairs of v[:n]; rotations: cosine and sine of each, flat."""
    for i in range(0, n, 2):
        cos, sin = rotations[i], rotations[i + 1]
        a, b = v[i], v[i + 1]
        v[i] = add(mul(cos, a), -mul(sin, b))
        v[i + 1] = add(mul(sin, a), mul(cos, b))


@device
def sum_of_four(a, b, c, d):
    """Return the sum of four terms, from left to right."""
    return add(add(add(a, b), c), d)


@device
def turn_fours(v, n, rotations, unused):
    """Multiply fours of v[:n] from the left by quaternions, which are flat."""
    for i in range(0, n, 4):
        qw, qx, qy, qz = rotations[i], rotations[i + 1], rotations[i + 2], rotations[i + 3]
        w, x, y, z = v[i], v[i + 1], v[i + 2], v[i + 3]
        v[i] = sum_of_four(mul(qw, w), -mul(qx, x), -mul(qy, y), -mul(qz, z))
        v[i + 1] = sum_of_four(mul(qw, x), mul(qx, w), mul(qy, z), -mul(qz, y))
        v[i + 2] = sum_of_four(mul(qw, y), -mul(qx, z), mul(qy, w), mul(qz, x))
        v[i + 3] = sum_of_four(mul(qw, z), mul(qx, y), -mul(qy, x), mul(qz, w))


MIXES = {"planar": (turn_pairs, 1), "iso": (turn_fours, 1)}


def port(codec: RotatedParts) -> Port | None:
    """Return the kernels of a planar or iso format; None for wrong kernels."""
    if codec != RotatedParts(codec.kind, codec.cells):
        return None
    cells, how = codec.cells, MIXES[codec.kind]
    third = "signs" if cells.bits == 3 else None
    plan = plan_of(codec, cells.bits, last=False, third=third)
    rotations = ROTATIONS[codec.kind]
    turn, back = (rotations, rotations[:0]), (inverse(rotations), rotations[:0])
    limits = thresholds(cells.levels, absolute)
    return Port(
        encoding(codec, plan, how, TINY, turn, limits, cells.levels),
        level_of(plan),
        cells.levels,
        decoding(codec, plan, how, back, cells.levels),
        rotating(codec, how, back),
    )
