"""Rotation matrices that formats carry inside their blocks."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from itertools import islice

import numpy as np

from tbq.errors import BackendError
from tbq.numerics import ordered_sum, splitmix64

QR_SIZE = 128
QR_SEED = 0x517CC1B727220A95
# SHA-256 of the little-endian, row-major float32 matrix.
QR_SHA256 = "cd1e7d50aa584f9d9e72d822fde7c4ee8bb54f65a4fb291e21c80b17f494fc9f"


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
