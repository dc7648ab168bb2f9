"""How many threads the BLAS library behind NumPy takes."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any


def one_thread() -> AbstractContextManager[Any]:
    """Return a context in which each product is computed by the thread that asks for it.

    There are as many askers as cores; with threads of its own the library would wait for them in
    loops that cost a quarter of the time. Without threadpoolctl nothing is changed.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return contextlib.nullcontext()
    return threadpool_limits(1, user_api="blas")
