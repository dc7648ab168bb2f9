"""The arithmetic contract in NumPy: what the C code's float operations mean, bit by bit.

The specifications in `tbq.families` are written with these. The Numba twins of the scalar
conversions are in `tbq.kernels.numerics`; a test compares the two over all inputs that matter.
"""

from __future__ import annotations

import numpy as np

MASK64 = (1 << 64) - 1


def fp16_bits(x: np.ndarray) -> np.ndarray:
    """Convert float32 to the bits of IEEE binary16 as ggml's software conversion does.

    Round to nearest even, overflow to infinity. NumPy does the same except for NaN, whose payload
    it keeps: ggml writes sign | 0x7E00 (ggml-impl.h, ggml_compute_fp32_to_fp16).
    """
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        bits = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), (bits & 0x8000) | 0x7E00, bits).astype(np.uint16)


def symmetric(*positive: float) -> np.ndarray:
    """Return the ascending table of these positive entries and their negatives, read-only."""
    half = np.array(positive, np.float32)
    table = np.concatenate([-half[::-1], half])
    table.setflags(write=False)
    return table


def ordered_sum(terms: np.ndarray) -> np.ndarray:
    """Sum float32 over the last axis in index order, one rounding per addition, from 0.0f."""
    total = np.zeros(terms.shape[:-1], np.float32)
    for i in range(terms.shape[-1]):
        total += terms[..., i]
    return total


def tree_sum(terms: np.ndarray) -> np.ndarray:
    """Sum float32 over the last axis as a CUDA block does in shared memory.

    Slot i takes slot i + h, for h = n/2, n/4, ... 1; n is a power of two.
    """
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def warps_sum(terms: np.ndarray) -> np.ndarray:
    """Sum float32 over the last axis as CUDA warps do: 32 terms as a tree, then those in order."""
    return ordered_sum(tree_sum(terms.reshape(*terms.shape[:-1], -1, 32)))


# The orders in which forks add: one thread, a block's shared memory, warps that shuffle.
SUMS = {"ordered": ordered_sum, "tree": tree_sum, "warps": warps_sum}


def other_sums(total: str) -> tuple[str, ...]:
    """Return the orders that kernels mistake this one for: one thread's and several threads'."""
    return ("tree", "warps") if total == "ordered" else ("ordered",)


def word_signs(words: tuple[int, ...]) -> np.ndarray:
    """Return the signs in 32-bit words, low bit first, as float32; a set bit is -1."""
    bits = np.unpackbits(np.array(words, "<u4").view(np.uint8), bitorder="little")
    return np.where(bits == 1, np.float32(-1), np.float32(1))


def splitmix64(seed: int):
    """Yield the 64-bit outputs of splitmix64 started at `seed`."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        yield z ^ (z >> 31)


def fwht(x: np.ndarray) -> np.ndarray:
    """Return the unnormalised Walsh-Hadamard transform over the last axis, Sylvester order.

    Butterflies of length 1, 2, 4, ... in the dtype of x; this order is part of the formats.
    """
    shape, n, length = x.shape, x.shape[-1], 1
    while length < n:
        pairs = x.reshape(*shape[:-1], n // (2 * length), 2, length)
        u, v = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([u + v, u - v], axis=-2).reshape(shape)
        length *= 2
    return x


def philox6(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return llama-tq's 6-round Philox word for uint32 counters and keys, as uint64 < 2^32.

    Source: LL4nc33/llama-tq at 0f57a4ee6, ggml/src/ggml-quants.c.
    """
    low, high = np.broadcast_arrays(np.asarray(counter, np.uint64), np.asarray(key, np.uint64))
    mask = np.uint64(0xFFFFFFFF)
    for i in range(1, 7):
        product = low * np.uint64(0xD2511F53)
        low = (product >> np.uint64(32)) ^ high ^ np.uint64(0x9E3779B9 * i & 0xFFFFFFFF)
        high = product & mask
    return low


def fnv1a(words: np.ndarray) -> np.ndarray:
    """Return the 32-bit FNV-1a hash of the four little-endian bytes of each word, as uint64."""
    words = np.asarray(words).astype(np.uint64) & np.uint64(0xFFFFFFFF)
    h = np.full(words.shape, 2166136261, np.uint64)
    for shift in (0, 8, 16, 24):
        byte = (words >> np.uint64(shift)) & np.uint64(0xFF)
        h = ((h ^ byte) * np.uint64(16777619)) & np.uint64(0xFFFFFFFF)
    return h
