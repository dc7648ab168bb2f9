"""Where the choice between neighbouring centroids turns, to the last bit.

For neighbouring centroids a < b the rounded distances f32(r - a) and f32(b - r) are monotone in r
between them, and so are their squares: there is one float32 from which b is strictly nearer. It is
found once, by bisection, under the very rule of the C code. Beyond the neighbours the other
centroids are farther by more than rounding can hide as long as |r| < 8, and the normalised values
of these formats stay below that: |x| exceeds norm only where squares underflow, at most by a
quarter. So the code is the number of thresholds not above r; NaN counts none, as in C.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def squared(r: np.float32, centroid: np.float32) -> np.float32:
    """Return the rounded squared distance."""
    return (r - centroid) * (r - centroid)


def absolute(r: np.float32, centroid: np.float32) -> np.float32:
    """Return the rounded absolute distance."""
    return np.abs(r - centroid)


def thresholds(
    centroids: np.ndarray, distance: Callable[[np.float32, np.float32], np.float32]
) -> np.ndarray:
    """Return the smallest float32 that belongs to each centroid but the first, float32 (n - 1,)."""
    pairs = zip(centroids[:-1], centroids[1:], strict=True)
    return np.array([_threshold(a, b, distance) for a, b in pairs], np.float32)


def _threshold(a: np.float32, b: np.float32, distance) -> np.float32:
    low, high = _rank(a), _rank(b)  # low belongs to a, high to b
    while high - low > 1:
        middle = (low + high) // 2
        r = _from_rank(middle)
        if distance(r, b) < distance(r, a):
            high = middle
        else:
            low = middle
    return _from_rank(high)


def _rank(x: np.float32) -> int:
    """Number the floats in ascending order; both zeros are 0."""
    bits = int(np.float32(x).view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _from_rank(rank: int) -> np.float32:
    magnitude = np.uint32(abs(rank)).view(np.float32)
    return np.float32(-magnitude if rank < 0 else magnitude)
