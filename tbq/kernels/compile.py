"""How every kernel is compiled."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numba


@cache
def _sources_stamp() -> tuple:
    """Return times and sizes of all files of tbq that kernels are compiled from."""
    package = Path(__file__).parents[1]
    states = ((str(p.relative_to(package)), p.stat()) for p in sorted(package.rglob("*.py")))
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)


def jit(function):
    """Compile with Numba: no fastmath, IEEE division, GIL released, machine code cached on disk.

    Numba never contracts a*b+c to a fused multiply-add by itself, so with fastmath off each float
    operation rounds once, in source order. Where no cache directory can be written the kernel is
    compiled anew in every process.

    Numba's cache notices a change of the file a function stands in, but kernels inline functions
    and constants of other files. The cache is therefore stamped with all of them.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        kernel = numba.njit(cache=True, **options)(function)
        kernel._cache._cache_file._source_stamp = _sources_stamp()
    except (RuntimeError, AttributeError):  # no cache directory; another Numba's internals
        return numba.njit(**options)(function)
    return kernel
