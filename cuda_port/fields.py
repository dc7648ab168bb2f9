"""Where the bytes of a slice of values are in its block, and how a thread gets them.

A slice is some neighbouring values of a block, whose codes are whole bytes. A thread moves its
bytes in words of 16 or 32 bits to and from a short string of bits, an array of words that the
compiler keeps in registers because every index is known to it: `take` and `put` of
`cuda_port.device` read and write it. Every block has an even size.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from cuda_port.device import device, put, take


class Fields(NamedTuple):
    """What a block holds.

    Attributes:
        size: bytes of a block.
        values: of a block.
        parts: where codes are, and how many bits of each value are there.
        whole: what all values share: where, and how many bytes.
        overlap: bytes of the next slice's first part that a slice reads too.
        word: bytes of a word at most.
    """

    size: int
    values: int
    parts: tuple[tuple[int, int], ...]
    whole: tuple[tuple[int, int], ...] = ()
    overlap: int = 0
    word: int = 4

    def starts(self, n: int) -> tuple[int, ...]:
        """Return at which bit of the string each part, then each whole starts; n: of a slice."""
        found, first = [], 0
        for _, bits in self.parts:
            found.append(first)
            first += bits * n + 8 * (0 if len(found) > 1 else self.overlap)
        for _, n_bytes in self.whole:
            found.append(first)
            first += 8 * n_bytes
        return tuple(found)

    def words(self, n: int) -> int:
        """Return the 32-bit words of a string; the last one is the number of the slice."""
        bits = n * sum(bits for _, bits in self.parts) + 8 * sum(size for _, size in self.whole)
        return -(-(bits + 8 * self.overlap) // 32) + 1

    def least_slice(self) -> int:
        """Return the fewest values, 8 at least, whose codes are whole words of 16 bits.

        The first part, where most bits are, is two of them at least: what a slice costs, however
        short it is, is shared by more values then.
        """
        n = 8 if self.parts else self.values
        while n < self.values and (
            n * self.parts[0][1] < 32 or any(n * bits % 16 for _, bits in self.parts)
        ):
            n *= 2
        return n

    def unit(self, n: int) -> int:
        """Return the bytes of the words in which slices of n values are read: 4 where they can."""
        steps = [n * bits // 8 for _, bits in self.parts] if n < self.values else []
        return 2 if self.word < 4 or self.size % 4 or any(step % 4 for step in steps) else 4


def whole_block(size: int, values: int) -> Fields:
    """Return fields that are read as one string, for layouts that slices do not share."""
    return Fields(size, values, (), ((0, size),))


@device
def nothing(packed, base, s, words):
    """End of a chain of moves."""


@cache
def reader(fields: Fields, n: int):
    """Return the device function (packed, block, s, words) that reads slice s of a block.

    packed: flat, uint16 or uint32 as `fields.unit(n)` says; words: uint32, all of them set.
    """
    unit, size, count = fields.unit(n), fields.size, fields.words(n)
    move = nothing
    for (offset, step, n_bytes), first in _moves(fields, n):
        move = _mover(unit, offset // 2, step, n_bytes // 2, first, move)

    @device
    def read(packed, block, s, words):
        for k in range(count - 1):
            words[k] = 0
        words[count - 1] = s
        move(packed, block * (size // unit), s, words)

    return read


def _moves(fields: Fields, n: int):
    """Return (offset, step from slice to slice, bytes) of each field, and its first bit."""
    parts = [(offset, n * bits // 8, n * bits // 8) for offset, bits in fields.parts]
    if fields.overlap:
        offset, step, n_bytes = parts[0]
        parts[0] = offset, step, n_bytes + fields.overlap
    whole = [(offset, 0, n_bytes) for offset, n_bytes in fields.whole]
    return list(zip(parts + whole, fields.starts(n), strict=True))


def _mover(unit: int, offset: int, step: int, halves: int, first: int, then):
    """Return what moves so many halves from half `offset` of a block on, then does `then`."""
    per, step = unit // 2, step // unit
    to, count = first // 32, halves // 2

    @device
    def move_words(packed, base, s, words):
        at = base + s * step + offset // 2
        for k in range(count):
            words[to + k] = packed[at + k]
        then(packed, base, s, words)

    @device
    def move(packed, base, s, words):
        at = base + s * step
        for k in range(halves):
            word = packed[at + (offset + k) // per]
            if per == 2:
                word = (word >> (16 * ((offset + k) % per))) & 0xFFFF
            put(words, first + 16 * k, 16, word)
        then(packed, base, s, words)

    in_words = per == 2 and offset % 2 == 0 and halves % 2 == 0 and first % 32 == 0
    return move_words if in_words else move


@cache
def writer(fields: Fields, n: int):
    """Return the device function (words, packed, block, s) that writes slice s of a block.

    packed: flat, uint16, or uint32 where `write_unit` says so.
    """
    unit, size = write_unit(fields), fields.size
    move = nothing
    for (offset, step, n_bytes), first in _moves(fields, n):
        move = _filler(unit, offset // unit, step // unit, n_bytes // unit, first, move)

    @device
    def write(words, packed, block, s):
        move(packed, block * (size // unit), s, words)

    return write


def write_unit(fields: Fields) -> int:
    """Return the bytes of the words in which blocks are written: 4 where all fields are such."""
    ends = [n for whole in fields.whole for n in whole] + [offset for offset, _ in fields.parts]
    return 2 if fields.size % 4 or any(end % 4 for end in ends) or fields.parts else 4


def _filler(unit: int, offset: int, step: int, count: int, first: int, then):
    """Return what fills so many words from word `offset` of a block on, then does `then`."""

    @device
    def fill(packed, base, s, words):
        at = base + s * step + offset
        for k in range(count):
            packed[at + k] = take(words, first + 8 * unit * k, 8 * unit)
        then(packed, base, s, words)

    return fill
