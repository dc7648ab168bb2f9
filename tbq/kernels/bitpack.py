"""Bit packing for kernels: the rule of `tbq.bitpack`, eight codes (b bytes) at a time.

`pack` and `unpack` name each width as a literal, so that the compiler unrolls the inner loops.
"""

from __future__ import annotations

import numpy as np

from tbq.kernels.compile import jit


@jit
def _pack(codes, bits, out):
    for group in range(codes.size // 8):
        word = np.uint32(0)
        for k in range(8):
            word |= np.uint32(codes[8 * group + k]) << np.uint32(bits * k)
        for k in range(bits):
            out[bits * group + k] = np.uint8(word >> np.uint32(8 * k))


@jit
def _unpack(packed, bits, codes):
    mask = np.uint32((1 << bits) - 1)
    for group in range(codes.size // 8):
        word = np.uint32(0)
        for k in range(bits):
            word |= np.uint32(packed[bits * group + k]) << np.uint32(8 * k)
        for k in range(8):
            codes[8 * group + k] = np.uint8((word >> np.uint32(bits * k)) & mask)


@jit
def pack(codes, bits, out):
    """Pack codes (n,) of 1 to 4 bits, n a multiple of 8, into uint8 out (n*bits/8,)."""
    if bits == 1:
        _pack(codes, 1, out)
    elif bits == 2:
        _pack(codes, 2, out)
    elif bits == 3:
        _pack(codes, 3, out)
    else:
        for k in range(codes.size // 2):  # nibbles vectorise, the general loop does not
            out[k] = np.uint8(codes[2 * k] | (codes[2 * k + 1] << 4))


@jit
def unpack(packed, bits, codes):
    """Unpack uint8 packed (n*bits/8,) into codes (n,) of 1 to 4 bits, n a multiple of 8."""
    if bits == 1:
        _unpack(packed, 1, codes)
    elif bits == 2:
        _unpack(packed, 2, codes)
    elif bits == 3:
        _unpack(packed, 3, codes)
    else:
        for k in range(codes.size // 2):
            codes[2 * k] = packed[k] & 15
            codes[2 * k + 1] = packed[k] >> 4
