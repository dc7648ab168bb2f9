"""Dense matrices and norms, four vectors at a time: each sum keeps its order, four hide latency."""

from __future__ import annotations

import numpy as np

from tbq.kernels.compile import jit

ZERO = np.float32(0.0)


def multiplier(n: int):
    """Return a kernel that multiplies four vectors of n values; constant bounds make it fast."""
    size, h1, h2, h3 = 4 * n, n, 2 * n, 3 * n  # where the second, third and fourth vector start

    @jit
    def multiply(columns, x, y):
        """Set each vector of y (4 * n,) to the sum over j, ascending, of columns[j] * x_j."""
        for i in range(size):
            y[i] = ZERO
        for j in range(0, n, 4):
            a0, a1, a2, a3 = x[j], x[j + 1], x[j + 2], x[j + 3]
            b0, b1, b2, b3 = x[h1 + j], x[h1 + j + 1], x[h1 + j + 2], x[h1 + j + 3]
            c0, c1, c2, c3 = x[h2 + j], x[h2 + j + 1], x[h2 + j + 2], x[h2 + j + 3]
            d0, d1, d2, d3 = x[h3 + j], x[h3 + j + 1], x[h3 + j + 2], x[h3 + j + 3]
            for i in range(n):
                q0, q1 = columns[j, i], columns[j + 1, i]
                q2, q3 = columns[j + 2, i], columns[j + 3, i]
                y[i] = (((y[i] + q0 * a0) + q1 * a1) + q2 * a2) + q3 * a3
                y[h1 + i] = (((y[h1 + i] + q0 * b0) + q1 * b1) + q2 * b2) + q3 * b3
                y[h2 + i] = (((y[h2 + i] + q0 * c0) + q1 * c1) + q2 * c2) + q3 * c3
                y[h3 + i] = (((y[h3 + i] + q0 * d0) + q1 * d1) + q2 * d2) + q3 * d3

    return multiply


@jit
def norms_of_four(x, norm):
    """Set norm (4,) to the L2 norms of four rows of x (4, n), summed from the first value on."""
    s0 = s1 = s2 = s3 = ZERO
    for j in range(x.shape[1]):
        s0 += x[0, j] * x[0, j]
        s1 += x[1, j] * x[1, j]
        s2 += x[2, j] * x[2, j]
        s3 += x[3, j] * x[3, j]
    norm[0], norm[1], norm[2], norm[3] = np.sqrt(s0), np.sqrt(s1), np.sqrt(s2), np.sqrt(s3)
