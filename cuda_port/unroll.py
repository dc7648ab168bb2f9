"""Loops that the compiler is made to unroll: chains of functions, each with its own numbers.

An array stays in registers only if every index is a number to the compiler. It unrolls loops by
itself as long as they are short; what is longer is written as a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from cuda_port.device import device

STEP = 8


def chain(functions: Iterable[Callable]):
    """Return the device function that calls device functions one after the other."""
    first, *rest = functions
    if not rest:
        return first
    then = chain(rest)

    @device
    def run(*args):
        first(*args)
        then(*args)

    return run


@cache
def by_eights(n: int, eight: Callable):
    """Return the device function (...) that calls eight(first, ...) for first = 0, 8, ... n - 8."""
    return chain(_bound(eight, first) for first in range(0, n, STEP))


@cache
def by_ones(n: int, one: Callable):
    """Return the device function (...) that calls one(k, ...) for each k < n."""
    return chain(_bound(one, k) for k in range(n))


def _bound(function: Callable, number: int):
    @device
    def call(*args):
        function(number, *args)

    return call
