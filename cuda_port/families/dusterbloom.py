"""tbq2, tbq3 and tbq4 of dusterbloom: a thread per group, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.dusterbloom`.
"""

from __future__ import annotations

import numpy as np

from cuda_port.groups import (
    DIVIDED,
    decoding,
    encoding,
    exceeding,
    hadamard,
    levels_of,
    plan_of,
)
from cuda_port.kernels import rotator
from cuda_port.port import Port
from tbq.families.dusterbloom import MIN_NORM, QK, SignedHadamard
from tbq.numerics import word_signs


def port(codec: SignedHadamard) -> Port | None:
    """Return the kernels of a tbq format; None for wrong kernels."""
    if codec.width != QK:
        return None
    cells, signs, ones = codec.cells, word_signs(codec.signs), np.ones(QK, np.float32)
    plan = plan_of(
        codec,
        cells.bits,
        least=MIN_NORM,
        total=codec.total,
        scaling=DIVIDED,
        last=False,
        corrected=codec.corrected,
    )
    forward, backward = np.float32(codec.forward), np.float32(codec.backward)
    back = hadamard(ones, signs * backward)
    return Port(
        encoding(plan, hadamard(signs, ones * forward), exceeding(cells.edges), cells.levels),
        plan.fields,
        levels_of(plan),
        np.float32(cells.levels).reshape(-1),
        decoding(plan, back, cells.levels),
        rotator(QK, hadamard(signs, ones * backward)),
        rotator(QK, back),
    )
