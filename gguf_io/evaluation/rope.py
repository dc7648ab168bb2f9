"""Rotary position embedding, as ggml computes it."""

from __future__ import annotations

import numpy as np


def tables(
    n: int, dims: int, base: float, scale: float = 1.0, factors: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines for positions 0 to n - 1, float32 (n, dims / 2) each.

    Args:
        n: how many positions.
        dims: values of a head that are rotated.
        base, scale: base of the angles, and what positions are multiplied with.
        factors: (dims / 2,), what each angle is divided by (llama3's rope_freqs); None for 1.
    """
    frequencies = base ** (-np.arange(0, dims, 2) / dims)
    if factors is not None:
        frequencies = frequencies / factors
    angles = np.arange(n)[:, None] * (scale * frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: np.ndarray, table: tuple[np.ndarray, np.ndarray], adjacent: bool) -> np.ndarray:
    """Rotate pairs of the first values of each head by the angles of their positions.

    Args:
        x: float32 (n, heads, head_dim).
        table: what `tables` returned for n positions.
        adjacent: whether pairs are neighbours (ggml's NORM) or half a rotated part apart (NEOX).

    Returns:
        float32 (n, heads, head_dim); values beyond the rotated part as they were.
    """
    cosines, sines = (part[:, None, :] for part in table)
    half = cosines.shape[-1]
    y = x.copy()
    if adjacent:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first], x[..., second]
    y[..., first] = a * cosines - b * sines
    y[..., second] = a * sines + b * cosines
    return y
