"""When results of the device are those of the CPU: equal to the bit, but for a NaN's sign.

A NaN that the hardware makes has no sign of its own; one that x86 makes has. So a scale that is NaN
may differ from the oracle's in its bits, and a value that is NaN may be any NaN. Nothing else may.
"""

from __future__ import annotations

import numpy as np

from tbq.format import Format


def wrong_bytes(fmt: Format, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return where packed rows differ, as flat indices; scales that are NaN in both do not."""
    differ = found != expected
    if differ.any():
        block = np.dtype((np.void, fmt.block_bytes))
        shape = (*found.shape[:-1], found.shape[-1] // block.itemsize, block.itemsize)
        by_block = differ.reshape(shape)
        names = (*fmt.layout.scales, *fmt.layout.floats, *(fmt.layout.outliers or ())[1:])
        for name in names:
            span = fmt.layout.span(name)
            both = _nan(found.reshape(shape)[..., span]) & _nan(expected.reshape(shape)[..., span])
            by_block[..., span] &= ~np.repeat(both, 2, axis=-1)
    return np.flatnonzero(differ)


def _nan(raw: np.ndarray) -> np.ndarray:
    return np.isnan(np.ascontiguousarray(raw).view(np.float16))


def wrong_values(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return where float32 differ in their bits, as flat indices; any NaN equals any other."""
    differ = found.view(np.uint32) != expected.view(np.uint32)
    return np.flatnonzero(differ & ~(np.isnan(found) & np.isnan(expected)))
