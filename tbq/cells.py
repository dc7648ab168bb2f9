"""`Cells`: a scalar quantiser that is symmetric about zero, as printed in the forks' sources."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tbq.numerics import symmetric


class Cells(NamedTuple):
    """Centroids, and where one cell ends and the next begins; positive halves, decimals as printed.

    One boundary lies at zero and is not listed.
    """

    centroids: tuple[float, ...]
    boundaries: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return len(self.centroids).bit_length()

    @property
    def levels(self) -> np.ndarray:
        """The centroids, ascending, float32 (2^bits,)."""
        return symmetric(*self.centroids)

    @property
    def edges(self) -> np.ndarray:
        """The boundaries, ascending, float32 (2^bits - 1,)."""
        middle = len(self.boundaries)
        return np.insert(symmetric(*self.boundaries), middle, np.float32(0.0))

    def upper(self, v: np.ndarray) -> np.ndarray:
        """Return the first code with v below its upper boundary, else the last.

        A value on a boundary goes up, NaN goes to the last cell.
        """
        return (~(v[..., None] < self.edges)).sum(axis=-1).astype(np.uint8)

    def lower(self, v: np.ndarray) -> np.ndarray:
        """Return how many boundaries v exceeds: one on a boundary goes down, NaN to the first."""
        return (v[..., None] > self.edges).sum(axis=-1).astype(np.uint8)
