"""Every kernel with the types it is launched with, for whoever compiles them ahead or reads PTX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import tbq
from cuda_port import api
from cuda_port.port import Kernel, kernels_of
from tbq.format import Format

SCALARS = {"f4": "float32", "u1": "uint8", "u2": "uint16", "u4": "uint32", "i4": "int32"}


class Signature(NamedTuple):
    """One kernel of a format: its operation, and what it is."""

    fmt: Format
    operation: str
    kernel: Kernel


def all_kernels() -> Iterator[Signature]:
    """Yield the kernels of every format that is ported."""
    for fmt in tbq.formats():
        for variant in fmt.variants():
            if api.ported(variant):
                for operation, kernel in kernels_of(variant):
                    yield Signature(variant, operation, kernel)


def argument_types(kernel: Kernel) -> tuple:
    """Return the types of a kernel's arguments as Numba's."""
    from numba import types

    return tuple(
        types.Array(getattr(types, SCALARS[name[:2]]), int(name[3]), "C")
        if "[" in name
        else types.int64
        for name in kernel.types
    )


def ptx(kernel: Kernel, compute_capability: tuple[int, int]) -> str:
    """Compile a kernel to PTX; needs NVVM (extra cuda12 or cuda13), but no device.

    numba-cuda asks the current device for its compute capability when a kernel calls a device
    function, even where it was told one; without a device it is answered here.
    """
    from numba import cuda, types
    from numba.cuda import dispatcher

    function = kernel.function
    bounds = getattr(function, "targetoptions", {}).get("launch_bounds")
    device = mock.Mock(compute_capability=compute_capability)
    with mock.patch.object(dispatcher, "get_current_device", return_value=device):
        text, _ = cuda.compile_ptx(
            getattr(function, "py_func", function),
            types.void(*argument_types(kernel)),
            cc=compute_capability,
            launch_bounds=bounds,
        )
    return text
