"""FNV-1a of 64 bits, which takes one byte after the other."""

import numpy as np

from tbq.kernels.compile import jit

PRIME = np.uint64(0x100000001B3)


@jit
def fnv1a64(data, state):
    """Return the hash of uint8 (n,), going on from `state`, uint64."""
    for byte in data:
        state = (state ^ np.uint64(byte)) * PRIME
    return state
