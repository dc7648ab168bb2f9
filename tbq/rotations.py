"""Rotations of the attention graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tbq.errors import InputError, UnknownFormatError
from tbq.numerics import fwht

# Widths of the graph rotations: 64, or the largest power of two that divides the head.
KINDS = ("hadamard64", "hadamard", "dhd64")
DHD_SEED = 0x56545121


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal, symmetric rotation that the attention graph applies to parts of a head.

    Attributes:
        kind: its name.
        size: values that are mixed; a head is a whole number of such parts.
        signs: float32 (size,), +1 or -1, multiplied in before and after the transform.
    """

    kind: str
    size: int
    signs: np.ndarray

    @property
    def matrix(self) -> np.ndarray:
        """The matrix R, float32 (size, size)."""
        return self.forward(np.eye(self.size, dtype=np.float32))

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Rotate float32 (..., n), every `size` values of the last axis on their own.

        Raises:
            InputError: n is no multiple of `size`.
        """
        x = np.asarray(x, np.float32)
        if x.ndim == 0 or x.shape[-1] % self.size:
            got = f"shape {x.shape}"
            raise InputError("x", got, f"a last axis that is a multiple of {self.size}")
        from tbq.kernels.rotation import rotate  # imports Numba

        y = np.array(x, np.float32, order="C")
        rotate(y.reshape(y.size // self.size, self.size), self.signs, self._scale)
        return y

    def forward_ref(self, x: np.ndarray) -> np.ndarray:
        """The specification of `forward`, in NumPy, for float32 (..., size)."""
        return fwht(x * self.signs) * self._scale * self.signs

    @property
    def _scale(self) -> np.float32:
        return np.float32(1.0) / np.sqrt(np.float32(self.size))

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Undo `forward`; R is its own inverse, so this rotates again."""
        return self.forward(y)


def rotation(kind: str, head_dim: int) -> Rotation:
    """Return a graph-level rotation for heads of head_dim values.

    Args:
        kind: "hadamard64" (values, since llama.cpp PR 21038), "hadamard" (keys: as wide as the
            largest power of two that divides head_dim) or "dhd64" (llama-tq's values: signs,
            Hadamard 64, the same signs).
        head_dim: a multiple of 64; the forks do not rotate other heads.

    Raises:
        UnknownFormatError: no such kind.
        InputError: head_dim is no positive multiple of 64.

    Source: LL4nc33/llama-tq @ 0f57a4ee6, src/llama-kv-cache.cpp.
    """
    if kind not in KINDS:
        raise UnknownFormatError(kind, KINDS)
    if head_dim <= 0 or head_dim % 64:
        raise InputError("head_dim", str(head_dim), "a positive multiple of 64")
    size = head_dim & -head_dim if kind == "hadamard" else 64
    signs = np.ones(size, np.float32)
    if kind == "dhd64":
        signs = np.array([_dhd_sign(i) for i in range(size)], np.float32)
    return Rotation(kind, size, signs)


def _dhd_sign(i: int) -> float:
    """Return D_i of llama-tq's value rotation, from an integer hash."""
    h = (DHD_SEED ^ i) * 0x9E3779B9 & 0xFFFFFFFF
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    return 1.0 if (h ^ h >> 13) & 1 else -1.0
