"""Statistics of K and V per layer and head: norms, channels, tails, before and after a rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr

from tbq import Rotation

# Values per head that the distance between distributions is computed from.
MARGINAL_VALUES = 1 << 16


@dataclass(frozen=True)
class HeadStatistics:
    """One head of one tensor.

    Attributes:
        norm_mean, norm_min, norm_max: of the head's part of each row.
        channel_rms: root mean square of each channel, float64 (head_dim,).
        channel_ratio: the largest channel over the median one; large means outlier channels.
        kurtosis: fourth moment over squared variance about the mean; 3 for a Gaussian.
        kurtosis_rotated: the same after the rotation; None if the head is not rotated.
        marginal_distance: Kolmogorov-Smirnov distance between a normal distribution, for which the
            codebooks are made, and the coordinates after the rotation (if there is one), each row
            scaled to unit variance.
    """

    norm_mean: float
    norm_min: float
    norm_max: float
    channel_rms: np.ndarray
    channel_ratio: float
    kurtosis: float
    kurtosis_rotated: float | None
    marginal_distance: float

    def report(self, with_channels: bool) -> dict[str, Any]:
        """Return the numbers for the JSON report, those of each channel if wanted."""
        return {
            "norm_mean": self.norm_mean,
            "norm_min": self.norm_min,
            "norm_max": self.norm_max,
            "channel_rms": self.channel_rms.tolist() if with_channels else None,
            "channel_ratio": self.channel_ratio,
            "kurtosis": self.kurtosis,
            "kurtosis_rotated": self.kurtosis_rotated,
            "marginal_distance": self.marginal_distance,
        }


def head_statistics(values: np.ndarray, rotation: Rotation | None) -> list[HeadStatistics]:
    """Return the statistics of values, float32 (rows, heads, head_dim), head by head.

    NaN and infinities count as zero; what overflows on the way is infinite or NaN in the result.
    """
    heads = []
    with np.errstate(all="ignore"):
        for head in range(values.shape[1]):
            x = np.ascontiguousarray(values[:, head])
            if not np.isfinite(x).all():
                x = np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
            heads.append(_one_head(x, rotation))
    return heads


def _one_head(x: np.ndarray, rotation: Rotation | None) -> HeadStatistics:
    y = x if rotation is None else rotation.forward(x)
    wide = x.astype(np.float64)
    squares = wide * wide
    norms = np.sqrt(squares.sum(axis=1))
    channel_rms = np.sqrt(squares.mean(axis=0))
    median = float(np.median(channel_rms))
    return HeadStatistics(
        norm_mean=float(norms.mean()),
        norm_min=float(norms.min()),
        norm_max=float(norms.max()),
        channel_rms=channel_rms,
        channel_ratio=float(channel_rms.max()) / median if median else float("nan"),
        kurtosis=_kurtosis(wide),
        kurtosis_rotated=None if rotation is None else _kurtosis(y.astype(np.float64)),
        marginal_distance=_distance_from_normal(y, norms),
    )


def _kurtosis(x: np.ndarray) -> float:
    centred = x - x.mean()
    squares = centred * centred
    variance = squares.mean()
    return float((squares * squares).mean() / variance**2) if variance else float("nan")


def _distance_from_normal(y: np.ndarray, norms: np.ndarray) -> float:
    """Return the largest difference of the two cumulative distributions."""
    step = max(1, y.size // MARGINAL_VALUES)
    live = norms > 0
    scaled = y[live] / (norms[live] / np.sqrt(y.shape[1]))[:, None]
    z = np.sort(scaled.reshape(-1)[::step])
    if not len(z):
        return float("nan")
    expected = ndtr(z)
    steps = np.arange(len(z) + 1) / len(z)
    return float(max((steps[1:] - expected).max(), (expected - steps[:-1]).max()))
