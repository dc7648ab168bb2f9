"""turbo4 and turbo8 of buun's CPU code: 128 values times a dense matrix, see `cuda_port.dense`.

The arithmetic is that of `tbq.families.turbo_cpu`.
"""

from __future__ import annotations

import numpy as np

from cuda_port import dense
from cuda_port.groups import levels_of, plan_of
from cuda_port.port import Port
from tbq.families.turbo import GROUP
from tbq.families.turbo_cpu import EDGES, LEVELS, DenseCells, matrix


def port(codec: DenseCells) -> Port | None:
    """Return the kernels of turbo4 or turbo8 of the CPU code; None for wrong kernels."""
    if codec != DenseCells(codec.bits):
        return None
    m, levels = matrix(), np.float32(LEVELS[codec.bits]).reshape(-1)
    plan = plan_of(codec, codec.bits, clears=True)
    return Port(
        dense.encoding(plan, GROUP, m.T, 1, EDGES[codec.bits], levels),
        plan.fields,
        levels_of(plan),
        levels,
        dense.decoding(plan, GROUP, m, levels_of(plan, False), levels),
        dense.rotating(GROUP, m.T),
        dense.rotating(GROUP, m),
    )
