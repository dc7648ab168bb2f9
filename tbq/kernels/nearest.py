"""The nearest centroid as a count of thresholds, see `tbq.nearest`."""

from __future__ import annotations

import numpy as np

from tbq.kernels.compile import jit


@jit
def count_thresholds(r, limits):
    """Return how many limits are not above r, as int32."""
    code = np.int32(0)
    for limit in limits:
        code += np.int32(1) if r >= limit else np.int32(0)
    return code
