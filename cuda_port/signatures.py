"""Every kernel with the types it is launched with, for whoever compiles them ahead or reads PTX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import tbq
from cuda_port import api, attention, blocks32, pr21089, trellis
from tbq.format import Format


class Signature(NamedTuple):
    """One kernel: its operation, the Python function, and its arguments as NumPy-like types."""

    fmt: Format
    operation: str
    function: Callable
    arguments: tuple[str, ...]


F, B, N, N2 = "f4[1]", "u1[1]", "i4[1]", "i4[2]"
F2, F3, F4 = "f4[2]", "f4[3]", "f4[4]"


def kernels_of(fmt: Format) -> Iterator[Signature]:
    """Yield the kernels of one format."""
    if fmt.dialect == "pr21089":
        yield Signature(fmt, "quantize", pr21089.encoder(fmt).py_func, (F, F2, F, B))
        yield Signature(fmt, "dequantize", pr21089.decoder(fmt).py_func, (B, F2, F, F))
        yield Signature(fmt, "rotate", pr21089.rotator().py_func, (F, F2, F))
    elif "start" in fmt.block.names:
        yield Signature(fmt, "quantize", trellis.encoder(fmt).py_func, (F, F, F2, B))
        yield Signature(fmt, "dequantize", api.value_decoder(fmt).py_func, (B, F, F))
    elif fmt.sibling:
        yield Signature(fmt, "quantize", blocks32.norm_encoder(fmt).py_func, (F, B))
        yield Signature(fmt, "dequantize", api.value_decoder(fmt).py_func, (B, F, F))
        return
    else:
        yield Signature(fmt, "quantize", blocks32.encoder(fmt).py_func, (F, N, F, F, B))
        if "sb" in fmt.block.names:
            yield Signature(fmt, "dequantize", blocks32.signed_decoder(fmt).py_func, (B, F, F))
            yield Signature(fmt, "signs", blocks32.sign_checker(fmt).py_func, (B, "i8", N))
        else:
            yield Signature(fmt, "dequantize", api.value_decoder(fmt).py_func, (B, F, F))
    if "K" in fmt.side:
        yield Signature(fmt, "scores", api.score_kernel(fmt).py_func, (B, F, F4, N2, F2))
    if "V" in fmt.side:
        yield Signature(fmt, "weighted_sum", api.sum_kernel(fmt).py_func, (B, F, F2, F3))
        yield Signature(fmt, "gather", attention.gather_kernel().py_func, (F3, F2))


def all_kernels() -> Iterator[Signature]:
    """Yield the kernels of every format that is ported."""
    for fmt in tbq.formats():
        if api.ported(fmt):
            yield from kernels_of(fmt)


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
