"""Groups of float32 on their way between global memory and a thread each.

A thread has a group of its own, whose sums have an order that threads cannot share. Its values are
far from those of its neighbours, so a block of threads moves all its groups together, neighbours
reading neighbouring values, through a tile in shared memory: rows of odd length, so that equal
steps of neighbouring threads are in different banks.
"""

from __future__ import annotations

from functools import cache

from cuda_port.device import device, index
from cuda_port.unroll import by_eights

TILE_FLOATS = 4224  # 32 groups of 128 values, 64 of 64 or 32: 17 KiB, 13 blocks of threads per SM
MOST_THREADS = 64
AT_ONCE = 32  # values that a thread moves per turn of a loop


def threads_for(width: int) -> int:
    """Return how many groups of so many values a block of threads has, a power of two."""
    return min(MOST_THREADS, 1 << max(1, TILE_FLOATS // (width + 1)).bit_length() - 1)


def turn_of(width: int, threads: int) -> int:
    """Return the values that each thread moves per turn of a loop: whole rows of all threads."""
    return min(width, max(AT_ONCE, width // threads))


@device
def _read(flat, at, tile, place):
    tile[place] = flat[at]


@device
def _write(flat, at, tile, place):
    flat[at] = tile[place]


@cache
def loader(width: int, threads: int):
    """Return the device function (x, first, t, tile) that all threads call: groups from `first` on.

    x: flat float32, of which the groups beyond the end are left out.
    """
    return _mover(width, threads, _read)


@cache
def storer(width: int, threads: int):
    """Return the device function (y, first, t, tile), likewise, of the other direction."""
    return _mover(width, threads, _write)


def _mover(width: int, threads: int, one):
    values, turn = width * threads, turn_of(width, threads)
    step = turn * threads

    @device
    def eight(first, flat, base, tile, at):
        for k in range(first, first + 8):
            place = index(at + k * threads + k * threads // width)
            one(flat, index(base + k * threads), tile, place)

    some = by_eights(turn, eight)

    @device
    def move(flat, first, t, tile):
        base, at, done = first * width + t, t + t // width, 0
        if (first + threads) * width <= flat.size:
            while done < width:
                some(flat, base, tile, at)
                base += step
                at += step + step // width
                done += turn
        else:
            e = t
            while e < values and first * width + e < flat.size:
                one(flat, index(first * width + e), tile, index(e + e // width))
                e += threads

    return move
