"""How far a dequantised array is from its original."""

from __future__ import annotations

import math

import numpy as np


class Distortion:
    """Relative MSE and cosine of two arrays, accumulated chunk by chunk in float64.

    >>> import numpy as np
    >>> d = Distortion()
    >>> d.add(np.array([3.0, 4.0]), np.array([3.0, 3.0]))
    >>> round(d.relative_mse, 4)
    0.04

    Attributes:
        count: values seen.
        nonfinite_original, nonfinite_decoded: NaN and infinities seen on either side.
    """

    def __init__(self) -> None:
        self.count = 0
        self.nonfinite_original = 0
        self.nonfinite_decoded = 0
        self._error = self._original = self._decoded = self._product = 0.0

    def add(self, original: np.ndarray, decoded: np.ndarray) -> None:
        """Add two equally shaped arrays."""
        with np.errstate(invalid="ignore"):  # signalling NaN
            x = np.asarray(original, np.float64).ravel()
            y = np.asarray(decoded, np.float64).ravel()
        self.count += x.size
        self.nonfinite_original += x.size - int(np.isfinite(x).sum())
        self.nonfinite_decoded += y.size - int(np.isfinite(y).sum())
        with np.errstate(all="ignore"):
            difference = x - y
            self._error += float(difference @ difference)
            self._original += float(x @ x)
            self._decoded += float(y @ y)
            self._product += float(x @ y)

    @property
    def relative_mse(self) -> float:
        """Sum of squared errors over sum of squares; 0 for two zero arrays."""
        if self._original == 0:
            return 0.0 if self._error == 0 else math.inf
        return self._error / self._original

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two arrays; 1 for two zero arrays."""
        if self._original == 0 or self._decoded == 0:
            return 1.0 if self._original == self._decoded else 0.0
        return self._product / math.sqrt(self._original) / math.sqrt(self._decoded)
