"""vtq1_1 ... vtq4_1 and vtq_mixed, see `cuda_port.blocks32`.

The arithmetic is that of `tbq.families.vtq`.
"""

from __future__ import annotations

import numpy as np

from cuda_port.blocks32 import GROUPS, QK, SCALE, THREADS, encoder, level_at
from cuda_port.port import BYTES, FLOATS, INTS, Kernel, Port
from tbq.families.vtq import CODEBOOKS, Distance, MixedBlocks, PlainBlocks
from tbq.nearest import absolute, squared, thresholds

NO_SIGNS = (np.zeros(1, np.int32),)


def tables(bits: int, distance: Distance) -> tuple[np.ndarray, np.ndarray]:
    """Return the levels of a codebook and the thresholds between them."""
    levels = CODEBOOKS[bits] * SCALE
    if distance == "absolute":
        return levels, thresholds(levels, absolute)
    return levels, thresholds(levels, squared) if bits > 1 else np.zeros(1, np.float32)


def port(codec: PlainBlocks | MixedBlocks) -> Port | None:
    """Return the kernels of a vtq*_1 format; None for wrong kernels."""
    if not codec.corrected:
        return None
    mixed = isinstance(codec, MixedBlocks)
    bits = 2 if mixed else codec.bits
    if mixed:
        pairs = [tables(bits, codec.distance) for bits in (3, 2)]
        levels, limits = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    else:
        levels, limits = tables(bits, codec.distance)
    types = (FLOATS, INTS, FLOATS, FLOATS, BYTES)
    kernel = encoder(codec.block_bytes, bits, 0, mixed)
    encode = Kernel(kernel, THREADS, GROUPS * QK, types, (*NO_SIGNS, levels, limits))
    return Port(encode, level_at(bits, mixed), levels)
