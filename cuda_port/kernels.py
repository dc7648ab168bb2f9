"""The kernels that families are made of: a thread per group of values, moved through a tile.

A family writes device functions, and these become kernels:

    body(v, row, packed, group, extra, lut)  encodes a group: v[:width] are its values, in
        registers, row their copy in shared memory, free to be used
    levels(words, v, at, lut)                sets v[at : at + n] from the string of a slice
    finish(words, v)                         what a decoder does to all of a group after that
    turn(v)                                  rotates a group

Everything that indexes v or words is known to the compiler, so both are registers; groups of more
than REGISTER_VALUES lie in their rows of shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda, float32, uint32

from cuda_port import tiles
from cuda_port.device import barrier, block, device, thread
from cuda_port.fields import Fields, reader
from cuda_port.port import FLOATS, WORDS, Kernel

REGISTER_VALUES = 128
SLICE = 32  # values that are encoded, or decoded, at a time
LUT_FLOATS = 1024  # of a table that is copied to shared memory; larger ones stay where they are


@device
def load_lut(table, lut, t, threads, n):
    """Copy a table to shared memory; a barrier has to follow."""
    k = t
    while k < n:
        lut[k] = table[k]
        k += threads


def turns_of(width: int) -> int:
    """Return how often loops over a group run: a slice at a time; 0 where there are others."""
    return max(1, width // SLICE) if width <= REGISTER_VALUES else 0


def encoder(width: int, body: Callable, table: np.ndarray, unit: int, extra=None) -> Kernel:
    """Return the kernel (x, extra, table, packed) of groups of `width` values.

    unit: bytes of the words that `body` writes; extra: None, or what makes the table for so many
    groups per row.
    """
    threads = tiles.threads_for(width)
    function = _encoder(width, threads, body, len(table))
    types = (FLOATS, WORDS[4], FLOATS, WORDS[unit])
    one = np.zeros(1, np.uint32)
    rows = extra or (lambda row_groups: (one,))
    turns = turns_of(width)
    return Kernel(function, threads, threads * width, types, (table,), rows, turns=turns)


@cache
def _encoder(width: int, threads: int, body: Callable, n_table: int):
    pitch, registers = width + 1, width <= REGISTER_VALUES
    room = threads * pitch
    local = width if registers else 1
    load = tiles.loader(width, threads)

    @cuda.jit
    def encode(x, extra, table, packed):
        tile = cuda.shared.array(room, float32)
        lut = cuda.shared.array(n_table, float32)
        own = cuda.local.array(local, float32)
        t = thread()
        first = block() * threads
        load(x, first, t, tile)
        load_lut(table, lut, t, threads, n_table)
        barrier()
        group = first + t
        if group * width < x.size:
            row = tile[t * pitch : t * pitch + width]
            if registers:
                for j in range(width):
                    own[j] = row[j]
                body(own, row, packed, group, extra, lut)
            else:
                body(row, row, packed, group, extra, lut)

    return encode


def decoder(
    width: int, fields: Fields, n: int, levels: Callable, finish: Callable | None, table: np.ndarray
) -> Kernel:
    """Return the kernel (packed, table, y) that sets y to levels, slices of n, then `finish`ed."""
    threads = tiles.threads_for(width)
    function = _decoder(width, threads, fields, n, levels, finish or unfinished, len(table))
    types, turns = (WORDS[fields.unit(n)], FLOATS, FLOATS), turns_of(width)
    return Kernel(function, threads, threads * width, types, (table,), turns=turns)


def group_decoder(width: int, fill: Callable, table: np.ndarray, unit: int) -> Kernel:
    """Return the kernel (packed, table, y) whose `fill` (packed, group, v, lut) decodes a group.

    v is in registers, or, of more than REGISTER_VALUES, a row of shared memory.
    """
    threads = tiles.threads_for(width)
    function = _group_decoder(width, threads, fill, len(table))
    types, turns = (WORDS[unit], FLOATS, FLOATS), turns_of(width)
    return Kernel(function, threads, threads * width, types, (table,), turns=turns)


@cache
def _group_decoder(width: int, threads: int, fill: Callable, n_table: int):
    pitch, registers = width + 1, width <= REGISTER_VALUES
    room, local = threads * pitch, width if registers else 1
    store = tiles.storer(width, threads)

    @cuda.jit
    def decode(packed, table, y):
        tile = cuda.shared.array(room, float32)
        lut = cuda.shared.array(n_table, float32)
        own = cuda.local.array(local, float32)
        t = thread()
        first = block() * threads
        load_lut(table, lut, t, threads, n_table)
        barrier()
        if (first + t) * width < y.size:
            row = tile[t * pitch : t * pitch + width]
            if registers:
                fill(packed, first + t, own, lut)
                for j in range(width):
                    row[j] = own[j]
            else:
                fill(packed, first + t, row, lut)
        barrier()
        store(y, first, t, tile)

    return decode


@device
def unfinished(words, v):
    """Leave levels as they are."""


@cache
def _decoder(width, threads, fields, n, levels, finish, n_table: int):
    pitch, room = width + 1, threads * (width + 1)
    count, small = fields.words(n), n_table <= LUT_FLOATS
    n_lut = n_table if small else 1
    fill = _slices(width, fields, n, levels)
    store = tiles.storer(width, threads)

    @cuda.jit
    def decode(packed, table, y):
        tile = cuda.shared.array(room, float32)
        lut = cuda.shared.array(n_lut, float32)
        v = cuda.local.array(width, float32)
        words = cuda.local.array(count, uint32)
        t = thread()
        first = block() * threads
        if small:
            load_lut(table, lut, t, threads, n_table)
            barrier()
        if (first + t) * width < y.size:
            fill(packed, first + t, words, v, lut if small else table)
            finish(words, v)
            for j in range(width):
                tile[t * pitch + j] = v[j]
        barrier()
        store(y, first, t, tile)

    return decode


def _slices(width: int, fields: Fields, n: int, levels: Callable):
    """Return what sets v to the levels of a group, a slice after the other.

    A chain of functions, so that the compiler knows every index.
    """
    read = reader(fields, n)
    per_block, per_group = max(1, fields.values // n), max(1, width // fields.values)

    @device
    def done(packed, group, words, v, lut):
        """End of the chain."""

    then = done
    for s in reversed(range(width // n)):
        then = _one_slice(read, levels, s * n, s // per_block, s % per_block, per_group, then)
    if width < fields.values:  # a slice is all that a thread has
        return _lone_slice(read, levels, per_block)
    return then


def _one_slice(read, levels, at: int, place: int, s: int, per_group: int, then):
    @device
    def fill(packed, group, words, v, lut):
        read(packed, group * per_group + place, s, words)
        levels(words, v, at, lut)
        then(packed, group, words, v, lut)

    return fill


def _lone_slice(read, levels, per_block: int):
    @device
    def fill(packed, number, words, v, lut):
        read(packed, number // per_block, number % per_block, words)
        levels(words, v, 0, lut)

    return fill


def rotator(width: int, turn: Callable) -> Kernel:
    """Return the kernel (x, y) that turns groups of float32."""
    threads = tiles.threads_for(width)
    function = _rotator(width, threads, turn)
    turns = turns_of(width)
    return Kernel(function, threads, threads * width, (FLOATS, FLOATS), turns=turns)


@cache
def _rotator(width: int, threads: int, turn: Callable):
    pitch, registers = width + 1, width <= REGISTER_VALUES
    room, local = threads * pitch, width if registers else 1
    load, store = tiles.loader(width, threads), tiles.storer(width, threads)

    @cuda.jit
    def rotate(x, y):
        tile = cuda.shared.array(room, float32)
        v = cuda.local.array(local, float32)
        t = thread()
        first = block() * threads
        load(x, first, t, tile)
        barrier()
        if (first + t) * width < x.size:
            row = tile[t * pitch : t * pitch + width]
            if registers:
                for j in range(width):
                    v[j] = row[j]
                turn(v)
                for j in range(width):
                    row[j] = v[j]
            else:
                turn(row)
        barrier()
        store(y, first, t, tile)

    return rotate
