"""Where a format keeps the code of each value, found by asking it about blocks with one bit set."""

from __future__ import annotations

from functools import cache

import numpy as np

from tbq import Format


@cache
def bit_layout(fmt: Format) -> tuple[np.ndarray, np.ndarray] | None:
    """Return, for each bit of a block, whose code it is in (-1: nobody's), and its weight there.

    None for a format without codes of its own.
    """
    n = fmt.block_bytes * 8
    single = np.packbits(np.eye(n, dtype=np.uint8), axis=1, bitorder="little")
    found = list(fmt.codes(fmt, single.view(fmt.block).reshape(-1)).values())
    if not found:
        return None
    codes = found[0][0]
    return np.where(codes.any(axis=1), codes.argmax(axis=1), -1), codes.max(axis=1)


def code_mask(fmt: Format, element: int) -> np.ndarray:
    """Return the bits of one value's code, uint8 (block_bytes,)."""
    owner, _ = bit_layout(fmt)
    return np.packbits(owner == element, bitorder="little")


def code_width(fmt: Format) -> int:
    """Return the bits of the widest code."""
    return int(bit_layout(fmt)[1].max()).bit_length()


@cache
def code_counts(fmt: Format) -> np.ndarray:
    """Return how many codes each value of a block can have."""
    owner, weight = bit_layout(fmt)
    counts = np.ones(owner.max() + 1, int)
    np.maximum.at(counts, owner[owner >= 0], 2 * weight[owner >= 0].astype(int))
    return counts


def codes_of(fmt: Format, raw: np.ndarray) -> np.ndarray:
    """Return the codes (n, values) of blocks uint8 (n, block_bytes)."""
    blocks = np.ascontiguousarray(raw).view(fmt.block).reshape(-1)
    return next(iter(fmt.codes(fmt, blocks).values()))[0]


def with_codes(fmt: Format, raw: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return blocks uint8 (n, block_bytes) with other codes (n, values) in them."""
    owner, weight = bit_layout(fmt)
    bits = np.unpackbits(raw, axis=1, bitorder="little")
    used = owner >= 0
    bits[:, used] = (codes[:, owner[used]] & weight[used]) > 0
    return np.packbits(bits, axis=1, bitorder="little")
