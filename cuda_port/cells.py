"""Codes of coordinates: which cell a float32 is in, by bisection of the edges in shared memory."""

from __future__ import annotations

from functools import cache

import numpy as np

from cuda_port.device import device, div, index


def table_of(levels: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the table that `finder` searches: 2^bits levels, then the edges between them."""
    return np.concatenate([np.float32(levels).reshape(-1), np.float32(edges).reshape(-1)])


@cache
def finder(bits: int, last: bool = False, first: int = 0):
    """Return the device function (u, lut): how many edges are not above u.

    last: whether NaN goes to the last cell, not to the first; first: where the table is in lut.
    """
    edges, find = first + (1 << bits), _found
    for k in range(bits):
        find = _half(edges, 1 << k, last, find)

    @device
    def cell(u, lut):
        return find(u, lut, 0)

    return cell


@device
def _found(u, lut, code):
    return code


def _half(edges: int, half: int, last: bool, then):
    @device
    def find(u, lut, code):
        edge = lut[index(edges + code + half - 1)]
        if (last and not u < edge) or u >= edge:
            code += half
        return then(u, lut, code)

    return find


@device
def corrected(norm, restored, least):
    """Return a norm over that of the centroids, or as it is where that is no more than `least`."""
    return div(norm, restored) if restored > least else norm
