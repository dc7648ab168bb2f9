"""The fast twin of `tbq.numerics.fwht` between two sign changes: a graph rotation, in place."""

from __future__ import annotations

import numpy as np

from tbq.kernels.compile import jit


@jit
def rotate(x, signs, scale):
    """Rotate each row of x (n, size) in place: signs, butterflies from length 1 up, scale, signs.

    size is a multiple of 8.
    """
    size = x.shape[1]
    for row in x:
        for j in range(size):
            row[j] *= signs[j]
        for i in range(0, size, 8):  # lengths 1, 2 and 4
            a, b, c, d = row[i], row[i + 1], row[i + 2], row[i + 3]
            e, f, g, h = row[i + 4], row[i + 5], row[i + 6], row[i + 7]
            a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
            a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
            row[i], row[i + 1], row[i + 2], row[i + 3] = a + e, b + f, c + g, d + h
            row[i + 4], row[i + 5], row[i + 6], row[i + 7] = a - e, b - f, c - g, d - h
        length = 8
        while length < size:
            for start in range(0, size, 2 * length):
                low, high = row[start : start + length], row[start + length : start + 2 * length]
                for j in range(length):
                    u, v = low[j], high[j]
                    low[j], high[j] = u + v, u - v
            length *= 2
        for j in range(size):
            row[j] = np.float32(row[j] * scale) * signs[j]
