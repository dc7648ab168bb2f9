"""Where packed rows keep blocks, and blocks the code of each value: found by asking the codec."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from tbq.codec import Codec

# Blocks in which single bits are flipped: all zeros, all ones, and some at random.
BASES = 8


class Bits(NamedTuple):
    """Where the codes of one kind lie in a block.

    owner: of each bit, whose code it is in; -1: nobody's. weight: its weight in that code.
    counts: how many codes each value can have.
    """

    owner: np.ndarray
    weight: np.ndarray
    counts: np.ndarray


# --- rows ----------------------------------------------------------------------------------------


def bodies(codec: Codec, packed: np.ndarray) -> np.ndarray:
    """Return the blocks of packed rows (..., row_bytes), a copy, uint8 (blocks, bytes).

    What a row holds once is part of each of its blocks.
    """
    blocks = codec.blocks(packed.reshape(-1, packed.shape[-1]))
    return blocks.view(np.uint8).reshape(blocks.size, -1).copy()


def with_bodies(codec: Codec, packed: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Return packed rows with other blocks, as of `bodies`, in them."""
    blocks = as_blocks(codec, raw).reshape(packed.size // packed.shape[-1], -1)
    return codec.rows(blocks).reshape(packed.shape)


def as_blocks(codec: Codec, raw: np.ndarray) -> np.ndarray:
    """View blocks uint8 (blocks, bytes) as blocks (blocks,)."""
    return np.ascontiguousarray(raw).view(codec.layout.dtype).reshape(-1)


# --- codes ---------------------------------------------------------------------------------------


def codes_of(codec: Codec, raw: np.ndarray) -> dict[str, np.ndarray]:
    """Return the codes of blocks uint8 (n, bytes): by kind, (n, count)."""
    return {kind: codes for kind, (codes, _) in codec.codes(as_blocks(codec, raw)).items()}


@cache
def affected(codec: Codec) -> dict[str, np.ndarray]:
    """Return which bits of a block change which value's code: by kind, bool (bits, count)."""
    size = codec.layout.dtype.itemsize
    flips = np.packbits(np.eye(8 * size, dtype=np.uint8), axis=1, bitorder="little")
    bases = np.random.default_rng(0).integers(0, 256, (BASES, size), np.uint8)
    bases[0], bases[1] = 0, 0xFF
    found: dict[str, np.ndarray] = {}
    for base in bases:
        before, after = codes_of(codec, base[None]), codes_of(codec, base ^ flips)
        for kind in before:
            changes = after[kind] != before[kind]
            found[kind] = found.get(kind, False) | changes
    return found


@cache
def bit_layout(codec: Codec) -> dict[str, Bits]:
    """Return where the codes lie of those kinds whose codes are sums of bits of their own."""
    size = codec.layout.dtype.itemsize
    single = np.packbits(np.eye(8 * size, dtype=np.uint8), axis=1, bitorder="little")
    raw = np.random.default_rng(1).integers(0, 256, (BASES, size), np.uint8)
    bits = np.unpackbits(raw, axis=1, bitorder="little").astype(int)
    weights, random = codes_of(codec, single), codes_of(codec, raw)
    found = {}
    for kind, weight in weights.items():
        alone = ((weight != 0).sum(axis=1) <= 1).all()
        if alone and np.array_equal(bits @ weight.astype(int), random[kind]):
            owner = np.where(weight.any(axis=1), weight.argmax(axis=1), -1)
            counts = np.maximum(1, 2 * weight.max(axis=0).astype(int))
            found[kind] = Bits(owner, weight.max(axis=1), counts)
    return found


def code_mask(codec: Codec, element: int) -> np.ndarray:
    """Return the bits of one value's codes of all kinds, uint8 (bytes,)."""
    bits = np.zeros(8 * codec.layout.dtype.itemsize, bool)
    for changes in affected(codec).values():
        if element < changes.shape[1]:
            bits |= changes[:, element]
    return np.packbits(bits, bitorder="little")


def field_width(codec: Codec, name: str) -> int:
    """Return the bits that the widest code has in a field; 0 if none has any."""
    span = codec.layout.span(name)
    counts = [
        changes[8 * span.start : 8 * span.stop].sum(axis=0).max(initial=0)
        for changes in affected(codec).values()
    ]
    return int(max(counts, default=0))


def with_codes(codec: Codec, raw: np.ndarray, kind: str, codes: np.ndarray) -> np.ndarray:
    """Return blocks uint8 (n, bytes) with other codes (n, count) of one kind in them."""
    owner, weight, _ = bit_layout(codec)[kind]
    bits = np.unpackbits(raw, axis=1, bitorder="little")
    used = owner >= 0
    bits[:, used] = (codes[:, owner[used]] & weight[used]) > 0
    return np.packbits(bits, axis=1, bitorder="little")
