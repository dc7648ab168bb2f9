"""How every kernel is compiled."""

from __future__ import annotations

import numba


def jit(function):
    """Compile with Numba: no fastmath, IEEE division, GIL released, machine code cached on disk.

    Numba never contracts a*b+c to a fused multiply-add by itself, so with fastmath off each float
    operation rounds once, in source order. Where no cache directory can be written the kernel is
    compiled anew in every process.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        return numba.njit(**options)(function)
