"""Rotations: those of the attention graph, and the dense one inside pr21089's blocks."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np

from tbq.errors import BackendError, InputError, UnknownFormatError
from tbq.numerics import fwht, ordered_sum, splitmix64

QR_SIZE = 128
QR_SEED = 0x517CC1B727220A95
# SHA-256 of the little-endian, row-major float32 matrix.
QR_SHA256 = "cd1e7d50aa584f9d9e72d822fde7c4ee8bb54f65a4fb291e21c80b17f494fc9f"

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


@lru_cache(maxsize=1)
def qr_rotation() -> np.ndarray:
    """Return pr21089's dense 128 x 128 orthogonal matrix Q, float32, row-major, read-only.

    The matrix is the Q of a Householder QR decomposition of a pseudo-random Gaussian matrix, with
    the columns' signs chosen so that R has a positive diagonal. It is rebuilt operation by
    operation, in float32, because the C code stores nothing but the seed. The Gaussian draws go
    through the C library's log, cos and sin; a platform whose last bits differ would give another
    matrix, so the result is checked against its SHA-256.

    Raises:
        BackendError: this platform's C library gives a different matrix.

    Source: llama.cpp pull request 21089 at f112d6de7, ggml/src/ggml-turboq.c.
    """
    q = _householder_q(_gaussian_matrix(QR_SEED))
    digest = hashlib.sha256(q.astype("<f4").tobytes()).hexdigest()
    if digest != QR_SHA256:
        raise BackendError(
            "math library",
            f"rotation matrix has SHA-256 {digest}, pr21089's has {QR_SHA256}: "
            "log, cos or sin rounds differently here",
        )
    q.setflags(write=False)
    return q


def _gaussian_matrix(seed: int) -> np.ndarray:
    """Draw a QR_SIZE square of float32 normals, filled column by column (Box-Muller in double)."""
    # math, not numpy: NumPy's SIMD log, cos and sin may differ from libm in the last bit.
    words = islice(splitmix64(seed), QR_SIZE * QR_SIZE)
    uniform = [((word >> 11) + 0.5) / 2.0**53 for word in words]
    normals = []
    for u1, u2 in zip(uniform[0::2], uniform[1::2], strict=True):
        radius, angle = math.sqrt(-2.0 * math.log(u1)), 2.0 * math.pi * u2
        normals += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(normals, np.float64).astype(np.float32).reshape(QR_SIZE, QR_SIZE).T.copy()


def _householder_q(a: np.ndarray) -> np.ndarray:
    """Return Q of a = QR with diag(R) > 0; float32 throughout, sums in index order."""
    n = len(a)
    a = a.copy()
    tau = np.zeros(n, np.float32)
    sign = np.ones(n, np.float32)
    for k in range(n):
        norm_sq = ordered_sum(a[k:, k] * a[k:, k])
        alpha = a[k, k]
        sign[k] = 1.0 if alpha >= 0 else -1.0
        u1 = alpha + sign[k] * np.sqrt(norm_sq)
        vtv = u1 * u1 + (norm_sq - alpha * alpha)
        if vtv < np.float32(1e-30):
            continue
        tau[k] = np.float32(2.0) / vtv
        a[k, k] = u1
        _reflect(a[k:, k], tau[k], a[k:, k + 1 :])
    q = np.eye(n, dtype=np.float32)
    for k in reversed(range(n)):
        if tau[k] != 0:
            _reflect(a[k:, k], tau[k], q[k:])
    return q * -sign


def _reflect(v: np.ndarray, tau: np.float32, columns: np.ndarray) -> None:
    """Apply the reflection I - tau v v^T to the columns, in place."""
    dot = np.zeros(columns.shape[1], np.float32)
    for v_i, row in zip(v, columns, strict=True):
        dot += v_i * row
    dot *= tau
    for v_i, row in zip(v, columns, strict=True):
        row -= dot * v_i
