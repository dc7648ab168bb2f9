"""tbq3_0 and tbq4_0: 256 values in two halves of 128, times a dense matrix, see `cuda_port.dense`.

The arithmetic is that of `tbq.families.pr21089`.
"""

from __future__ import annotations

import numpy as np

from cuda_port import dense
from cuda_port.groups import DIVIDED, levels_of, plan_of
from cuda_port.port import Port
from tbq.families.dense import QR_SIZE, qr_rotation
from tbq.families.pr21089 import (
    BOUNDARIES,
    CODEBOOKS,
    MIN_NORM,
    SCALE_DOWN,
    SCALE_UP,
    DenseRotated,
)


def port(codec: DenseRotated) -> Port | None:
    """Return the kernels of tbq3_0 or tbq4_0; None for wrong kernels."""
    if codec != DenseRotated(codec.bits):
        return None
    q, levels = qr_rotation(), np.float32(CODEBOOKS[codec.bits] * SCALE_DOWN)
    plan = plan_of(codec, codec.bits, least=MIN_NORM, scaling=DIVIDED, corrected=False)
    limits = np.asarray(BOUNDARIES[codec.bits], np.float32)
    return Port(
        dense.encoding(plan, QR_SIZE, q.T, SCALE_UP, limits, levels),
        plan.fields,
        levels_of(plan),
        levels,
        dense.decoding(plan, QR_SIZE, q, levels_of(plan, False), levels),
        dense.rotating(QR_SIZE, q.T),
        dense.rotating(QR_SIZE, q),
    )
