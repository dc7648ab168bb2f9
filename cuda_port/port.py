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

from cuda_port.fields import Fields
from tbq.attention import rotates_back
from tbq.codec import Codec
from tbq.format import Format

# Types of kernel arguments, as `cuda_port.signatures` spells them.
FLOATS, INTS = "f4[1]", "i4[1]"
FLOATS2, FLOATS3 = "f4[2]", "f4[3]"
WORDS = {1: "u1[1]", 2: "u2[1]", 4: "u4[1]"}  # packed rows, as words of so many bytes
WORD_BYTES = {name: n_bytes for n_bytes, name in WORDS.items()}


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel: (input, row tables, tables, scratch, output), all flat but the tables.

    Attributes:
        function: what Numba made of it.
        threads: per block of threads.
        values: float32 values that a block of threads handles.
        types: of its arguments.
        tables: arrays that it reads, copied to the device once.
        row_tables: further ones, before `tables`, that depend on the groups per row.
        scratch_bytes: of scratch per block of threads, which then walks through the input in
            strides.
        turns: how often its longest loop runs, for whoever counts instructions; 0 if loops differ.
    """

    function: Any
    threads: int
    values: int
    types: tuple[str, ...]
    tables: tuple[np.ndarray, ...] = ()
    row_tables: Callable[[int], tuple[np.ndarray, ...]] | None = None
    scratch_bytes: int = 0
    turns: int = 1


@dataclass(frozen=True, eq=False)
class Signs:
    """The sign bits that blocks carry.

    Attributes:
        at: where they are in a block, four bytes.
        rotate: device function (v, signs) that rotates a group as a block with these signs does.
    """

    at: int
    rotate: Any


@dataclass(frozen=True, eq=False)
class Port:
    """The kernels of one codec.

    Attributes:
        encoder: float32 to bytes.
        fields: what a slice is read from; None where a level takes its whole group, see `leveler`.
        levels: makes for slices of n values the device function (words, v, at, lut) that sets
            v[at : at + n] to scaled levels.
        table: the table that `levels` reads, lut.
        decoder: bytes to float32; None where the level is the value.
        rotate: the codec's own rotation, float32 to float32; None where it has none, or its blocks
            have signs.
        unrotate: that undone; None where there is none, or it is left to the graph.
        signs: what blocks say of their rotation.
        leveler: bytes to scaled levels, float32, where there are no `fields`.
    """

    encoder: Kernel
    fields: Fields | None
    levels: Callable[[int], Any] | None
    table: np.ndarray
    decoder: Kernel | None = None
    rotate: Kernel | None = None
    unrotate: Kernel | None = None
    signs: Signs | None = None
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
    """Return the decoder of a codec: its own, or that of a slice per thread."""
    from cuda_port import kernels

    port = port_of(codec)
    if port.decoder is not None:
        return port.decoder
    if port.leveler is not None:
        return port.leveler
    n = min(kernels.SLICE, port.fields.values)
    return kernels.decoder(n, port.fields, n, port.levels(n), None, port.table)


def kernels_of(fmt: Format) -> Iterator[tuple[str, Kernel]]:
    """Yield every kernel of a ported format, after its operation."""
    from cuda_port import attention

    codec, port = fmt.codec, port_of(fmt.codec)
    single = {
        "quantize": port.encoder,
        "dequantize": value_decoder(codec),
        "rotate": port.rotate if "K" in fmt.side else None,
        "unrotate": port.unrotate if "V" in fmt.side else None,
        "levels": port.leveler if port.decoder else None,
    }
    for operation, kernel in single.items():
        if kernel is not None:
            yield operation, kernel
    if fmt.sibling:
        return
    if "K" in fmt.side:
        for n in attention.SETS:
            yield f"scores of {n}", attention.score_kernel(codec, n)
        if port.signs:
            yield "rotate", attention.sign_rotator(codec)
    if "V" in fmt.side:
        for n in attention.SETS:
            yield f"weighted_sum of {n}", attention.sum_kernel(codec, n)
        yield "gather", attention.gather_kernel()


def turns_back(fmt: Format) -> bool:
    """Tell whether a weighted sum has to be rotated back."""
    return rotates_back(fmt) and port_of(fmt.codec).unrotate is not None
