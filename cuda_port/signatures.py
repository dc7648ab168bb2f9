"""Every kernel with the types it is launched with, for whoever compiles them ahead or reads PTX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import tbq
from cuda_port import api
from cuda_port.port import kernels_of
from tbq.format import Format


class Signature(NamedTuple):
    """One kernel: its operation, the Python function, and its arguments as NumPy-like types."""

    fmt: Format
    operation: str
    function: Callable
    arguments: tuple[str, ...]


def all_kernels() -> Iterator[Signature]:
    """Yield the kernels of every format that is ported."""
    for fmt in tbq.formats():
        for variant in fmt.variants():
            if api.ported(variant):
                for operation, function, types in kernels_of(variant):
                    yield Signature(variant, operation, function.py_func, types)


def ptx(kernel: Signature, compute_capability: tuple[int, int]) -> str:
    """Compile a kernel to PTX; needs NVVM (extra cuda12 or cuda13), but no device.

    numba-cuda asks the current device for its compute capability when a kernel calls a device
    function, even where it was told one; without a device it is answered here.
    """
    from unittest import mock

    from numba import cuda, types
    from numba.cuda import dispatcher

    scalars = {"f4": types.float32, "u1": types.uint8, "i4": types.int32}
    arguments = tuple(
        types.Array(scalars[name[:2]], int(name[3]), "C") if "[" in name else types.int64
        for name in kernel.arguments
    )
    device = mock.Mock(compute_capability=compute_capability)
    with mock.patch.object(dispatcher, "get_current_device", return_value=device):
        text, _ = cuda.compile_ptx(kernel.function, types.void(*arguments), cc=compute_capability)
    return text
