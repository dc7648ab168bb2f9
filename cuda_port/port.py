"""`Port`: what the kernels of one codec are, and how they are launched.

`cuda_port.families.x` has `port(codec)` for the codecs of `tbq.families.x`; None where a
configuration has no kernels. Everything else here iterates ports and knows no family.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cuda_port import attention
from tbq.attention import rotates_back
from tbq.codec import Codec
from tbq.format import Format

VALUE_THREADS = 256
# Types of kernel arguments, as `cuda_port.signatures` spells them.
FLOATS, BYTES, INTS = "f4[1]", "u1[1]", "i4[1]"
FLOATS2, FLOATS3, FLOATS4, INTS2 = "f4[2]", "f4[3]", "f4[4]", "i4[2]"


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel: (input, row tables, tables, scratch, output), all flat but the tables.

    Attributes:
        function: what Numba made of it.
        threads: per block of threads.
        values: float32 values that a block of threads handles.
        tables: arrays that it reads, copied to the device once.
        row_tables: further ones, before `tables`, that depend on the groups per row.
        scratch_values: float32 values of scratch per block of threads, which then walks through
            the input in strides.
        types: of its arguments.
    """

    function: Any
    threads: int
    values: int
    types: tuple[str, ...]
    tables: tuple[np.ndarray, ...] = ()
    row_tables: Callable[[int], tuple[np.ndarray, ...]] | None = None
    scratch_values: int = 0


@dataclass(frozen=True, eq=False)
class Port:
    """The kernels of one codec.

    Attributes:
        encoder: float32 to bytes.
        level: device function (packed, base, i, levels): the scaled level of value i of the block
            that starts at packed[base]; None where that takes a whole group, see `leveler`.
        levels: the table that `level` reads.
        decoder: bytes to float32; None where the level is the value.
        rotator: the codec's own rotation undone, float32 to float32; None where it has none, or
            leaves it to the graph.
        leveler: bytes to scaled levels, float32, where there is no `level`.
    """

    encoder: Kernel
    level: Any
    levels: np.ndarray
    decoder: Kernel | None = None
    rotator: Kernel | None = None
    leveler: Kernel | None = None


@cache
def port_of(codec: Codec) -> Port | None:
    """Return the port of a codec, None if it has none."""
    package = codec.cuda_module.rpartition(".")[0]
    try:
        if importlib.util.find_spec(package) is None:
            return None
        if importlib.util.find_spec(codec.cuda_module) is None:
            return None
    except ModuleNotFoundError:
        return None
    return importlib.import_module(codec.cuda_module).port(codec)


@cache
def value_decoder(codec: Codec) -> Kernel:
    """Return the decoder of a codec: its own, or that of a level per thread."""
    port = port_of(codec)
    if port.decoder is not None:
        return port.decoder
    if port.leveler is not None:
        return port.leveler
    function = attention.value_decoder(port.level, codec.block_values, codec.block_bytes)
    types = (BYTES, FLOATS, FLOATS)
    return Kernel(function, VALUE_THREADS, VALUE_THREADS, types, (port.levels,))


def _read(codec: Codec) -> tuple[Any, int, int]:
    """Return what reads a level, the values of a block and its size in what is read."""
    port = port_of(codec)
    if port.leveler is not None:
        return attention.level_there, codec.block_values, codec.block_values
    return port.level, codec.block_values, codec.block_bytes


@cache
def score_kernel(codec: Codec) -> Any:
    """Return the kernel of `scores`, which reads what the leveler wrote if there is one."""
    return attention.score_kernel(*_read(codec), codec.group_blocks)


@cache
def sum_kernel(codec: Codec) -> Any:
    """Return the kernel of `weighted_sum`, likewise."""
    return attention.sum_kernel(*_read(codec))


@cache
def sign_checker(codec: Codec) -> Any:
    """Return the kernel that tells whether rows differ in their sign bits."""
    span = codec.layout.span(codec.layout.signs)
    return attention.sign_checker(codec.block_bytes, span.start, span.stop - span.start)


def kernels_of(fmt: Format) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Yield every kernel of a ported format: operation, Numba's function, types of arguments."""
    codec, port = fmt.codec, port_of(fmt.codec)
    yield "quantize", port.encoder.function, port.encoder.types
    decoder = value_decoder(codec)
    yield "dequantize", decoder.function, decoder.types
    if port.rotator is not None:
        yield "rotate", port.rotator.function, port.rotator.types
    if fmt.sibling:
        return
    read = BYTES
    if port.leveler is not None:
        read = FLOATS
        yield "levels", port.leveler.function, port.leveler.types
    if "K" in fmt.side:
        yield "scores", score_kernel(codec), (read, FLOATS, FLOATS4, INTS2, FLOATS2)
        if codec.layout.signs:
            yield "signs", sign_checker(codec), (BYTES, "i8", INTS)
    if "V" in fmt.side:
        yield "weighted_sum", sum_kernel(codec), (read, FLOATS, FLOATS2, FLOATS3)
        yield "gather", attention.gather_kernel(), (FLOATS3, FLOATS2)


def turns_back(fmt: Format) -> bool:
    """Tell whether a weighted sum has to be rotated back."""
    return rotates_back(fmt) and port_of(fmt.codec).rotator is not None
