"""The dense matrices of pr21089, rebuilt from their seeds."""

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
# SHA-256 of the little-endian, row-major float32 matrices, by size.
QR_SHA256 = {
    QR_SIZE: "cd1e7d50aa584f9d9e72d822fde7c4ee8bb54f65a4fb291e21c80b17f494fc9f",
    256: "880339c2935512274e1d1a1bfca7884c9e02179ccfa63ef1b4c4a4e5d9df7164",
}
S_SIZE = 256
S_SEED = QR_SEED ^ 0x1234567890ABCDEF
S_SHA256 = "16259af1e3e727f6fbf35832df6e6b79fac2433dcdde27b6b20fe6f3c95902b8"


@lru_cache(maxsize=2)
def qr_rotation(size: int = QR_SIZE) -> np.ndarray:
    """Return pr21089's dense orthogonal matrix Q, float32 (size, size), row-major, read-only.

    The matrix is the Q of a Householder QR decomposition of a pseudo-random Gaussian matrix, with
    the columns' signs chosen so that R has a positive diagonal. It is rebuilt operation by
    operation, in float32, because the C code stores nothing but the seed. The Gaussian draws go
    through the C library's log, cos and sin; a platform whose last bits differ would give another
    matrix, so the result is checked against its SHA-256. The final commit has 128 x 128, the first
    one 256 x 256 besides.

    Raises:
        BackendError: this platform's C library gives a different matrix.

    Source: llama.cpp pull request 21089 at f112d6de7 and 88dc3d10b, ggml/src/ggml-turboq.c.
    """
    return _checked(_householder_q(_gaussian(QR_SEED, size)), QR_SHA256[size])


@lru_cache(maxsize=1)
def gaussian_matrix() -> np.ndarray:
    """Return S of pr21089's first commit, float32 (256, 256), row-major, read-only.

    It is drawn like the matrix that Q is made from, with a seed of its own.

    Raises:
        BackendError: this platform's C library gives a different matrix.
    """
    return _checked(_gaussian(S_SEED, S_SIZE), S_SHA256)


def multiply(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Multiply every row of x by the matrix, each output summed over the input in index order."""
    y = np.zeros_like(x)
    for j in range(x.shape[-1]):
        y += x[..., j, None] * matrix[:, j]
    return y


def _checked(matrix: np.ndarray, sha256: str) -> np.ndarray:
    digest = hashlib.sha256(matrix.astype("<f4").tobytes()).hexdigest()
    if digest != sha256:
        raise BackendError(
            "math library",
            f"rotation matrix has SHA-256 {digest}, pr21089's has {sha256}: "
            "log, cos or sin rounds differently here",
        )
    matrix.setflags(write=False)
    return matrix


def _gaussian(seed: int, size: int) -> np.ndarray:
    """Draw a square of float32 normals, filled column by column (Box-Muller in double)."""
    # math, not numpy: NumPy's SIMD log, cos and sin may differ from libm in the last bit.
    words = islice(splitmix64(seed), size * size)
    uniform = [((word >> 11) + 0.5) / 2.0**53 for word in words]
    normals = []
    for u1, u2 in zip(uniform[0::2], uniform[1::2], strict=True):
        radius, angle = math.sqrt(-2.0 * math.log(u1)), 2.0 * math.pi * u2
        normals += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(normals, np.float64).astype(np.float32).reshape(size, size).T.copy()


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
