"""tbq2, tbq3 and tbq4 of dusterbloom: a thread per group, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.dusterbloom`.
"""

from __future__ import annotations

import numpy as np

from cuda_port.groups import (
    DIVIDED,
    HADAMARD,
    decoding,
    encoding,
    exceeding,
    level_of,
    plan_of,
    rotating,
)
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
        total=codec.total,
        scaling=DIVIDED,
        last=False,
        corrected=codec.corrected,
    )
    turn, back = (
        (signs, ones * np.float32(codec.forward)),
        (ones, signs * np.float32(codec.backward)),
    )
    edges = exceeding(cells.edges)
    return Port(
        encoding(codec, plan, HADAMARD, MIN_NORM, turn, edges, cells.levels),
        level_of(plan),
        cells.levels,
        decoding(codec, plan, HADAMARD, back, cells.levels),
        rotating(codec, HADAMARD, back),
    )
