"""Sums of squares and transforms of a thread's own values, unrolled by the compiler.

A loop that doubles its step keeps values out of registers, so each step is written out.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, float32

from cuda_port.device import ZERO, add, device, index, mul, sqrt

ORDERS = ("ordered", "tree", "warps", "eights")


@device
def butterflies(v, n, length):
    """Replace all pairs of v[:n] that are `length` apart by sum and difference."""
    for i in range(n // 2):
        j = 2 * i - i % length
        a, b = v[j], v[j + length]
        v[j] = add(a, b)
        v[j + length] = add(a, -b)


@cache
def transform(n: int):
    """Return the device function (v): butterflies of length 1, 2, ... n/2.

    More than 128 values do not fit in registers: sixteen of them are there at a time.
    """

    @device
    def turn(v):
        butterflies(v, n, 1)
        butterflies(v, n, 2)
        butterflies(v, n, 4)
        butterflies(v, n, 8)
        butterflies(v, n, 16)
        if n > 32:
            butterflies(v, n, 32)
        if n > 64:
            butterflies(v, n, 64)

    @device
    def turn_wide(v):
        for g in range(n // 16):
            sixteen(v, 16 * g, 1)
        for g in range(n // 16):
            sixteen(v, g // 16 * 256 + g % 16, 16)
        if n > 256:
            for j in range(256):
                a, b = v[index(j)], v[index(j + 256)]
                v[index(j)] = add(a, b)
                v[index(j + 256)] = add(a, -b)

    return turn if n <= 128 else turn_wide


@device
def sixteen(v, first, apart):
    """Do the four steps of a transform that mix sixteen values `apart` from each other."""
    own = cuda.local.array(16, float32)
    for k in range(16):
        own[k] = v[index(first + k * apart)]
    butterflies(own, 16, 1)
    butterflies(own, 16, 2)
    butterflies(own, 16, 4)
    butterflies(own, 16, 8)
    for k in range(16):
        v[index(first + k * apart)] = own[k]


@device
def fold(v, first, half):
    """Add the second half of v[first : first + 2 half] to the first."""
    for j in range(first, first + half):
        v[j] = add(v[j], v[j + half])


@device
def tree_of_32(v, first):
    """Add up v[first : first + 32] as a tree; the sum is v[first]."""
    fold(v, first, 16)
    fold(v, first, 8)
    fold(v, first, 4)
    fold(v, first, 2)
    fold(v, first, 1)


@cache
def squares(n: int, order: str):
    """Return the device function (v): the sum of squares of v[:n] in one of ORDERS.

    But for an ordered sum it leaves nothing of v.
    """
    tree = order == "tree"

    @device
    def ordered(v):
        total = ZERO
        for j in range(n):
            total = add(total, mul(v[j], v[j]))
        return total

    @device
    def eights(v):
        for j in range(8):
            v[j] = mul(v[j], v[j])
        for j in range(8, n):
            v[j] = add(v[j - 8], mul(v[j], v[j]))
        a = add(add(v[n - 8], v[n - 7]), add(v[n - 6], v[n - 5]))
        return add(a, add(add(v[n - 4], v[n - 3]), add(v[n - 2], v[n - 1])))

    @device
    def by_halves(v):
        for j in range(n):
            v[j] = mul(v[j], v[j])
        if tree:
            if n > 64:
                fold(v, 0, 64)
            if n > 32:
                fold(v, 0, 32)
            tree_of_32(v, 0)
            return v[0]
        tree_of_32(v, 0)
        total = add(ZERO, v[0])
        if n > 32:
            tree_of_32(v, 32)
            total = add(total, v[32])
        if n > 64:
            tree_of_32(v, 64)
            total = add(total, v[64])
            tree_of_32(v, 96)
            total = add(total, v[96])
        return total

    return {"ordered": ordered, "eights": eights}.get(order, by_halves)


@cache
def norm(n: int, order: str):
    """Return the device function (v, row): the L2 norm of v[:n], restored from its copy, row."""
    total = squares(n, order)
    keeps = order == "ordered"

    @device
    def measure(v, row):
        found = sqrt(total(v))
        if not keeps:
            for j in range(n):
                v[j] = row[j]
        return found

    return measure
