"""turbo4 and turbo8 of buun's CPU code: a thread per group, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.turbo_cpu`. All threads read the same element of the matrix
at a time, which serves a group each.
"""

from __future__ import annotations

from cuda_port.groups import DENSE, TINY, decoding, encoding, level_of, plan_of, rotating
from cuda_port.port import Port
from tbq.families.turbo_cpu import EDGES, LEVELS, DenseCells, matrix


def port(codec: DenseCells) -> Port | None:
    """Return the kernels of turbo4 or turbo8 of the CPU code; None for wrong kernels."""
    if codec != DenseCells(codec.bits):
        return None
    m, levels = matrix(), LEVELS[codec.bits]
    plan = plan_of(codec, codec.bits, clears=True)
    turn, back = (m.T, m[:0]), (m, m[:0])
    return Port(
        encoding(codec, plan, DENSE, TINY, turn, EDGES[codec.bits], levels),
        level_of(plan),
        levels,
        decoding(codec, plan, DENSE, back, levels),
        rotating(codec, DENSE, back),
    )
