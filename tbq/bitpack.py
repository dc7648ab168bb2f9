"""Codes to bytes and back: code j occupies bits b*j … b*j+b-1 of a little-endian bit string.

This one rule covers the 1-, 2-, 3- and 4-bit layouts of the TurboQuant families: eight 1-bit codes
per byte from the low bit up, four 2-bit codes per byte, eight 3-bit codes in three bytes, and two
nibbles per byte with the even code low.
"""

from __future__ import annotations

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes (..., n) of `bits` bits into uint8 (..., n*bits/8)."""
    code_bits = (codes[..., None] >> np.arange(bits)) & 1
    flat = code_bits.reshape(*codes.shape[:-1], codes.shape[-1] * bits).astype(np.uint8)
    return np.packbits(flat, axis=-1, bitorder="little")


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpack uint8 (..., m) into codes (..., 8*m/bits), as uint8."""
    flat = np.unpackbits(packed, axis=-1, bitorder="little")
    code_bits = flat.reshape(*packed.shape[:-1], packed.shape[-1] * 8 // bits, bits)
    return (code_bits << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
