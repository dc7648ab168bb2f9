"""Levels of packed codes, for sixteen groups side by side, without a table to look up.

Value j of lane k stands at [16 j + k] of a flat array. A load from a table is a scalar; here a
level is chosen by masks, which are vectors. That is cheap where levels are symmetric: the lower
half of a codebook is the upper half with other signs, so the top bit of a code becomes the sign
bit, and the others, inverted where it is not set, choose among the upper levels.

Numba makes 64-bit integers of sums and products of 32-bit ones, which halves the vectors; hence a
conversion around each operation.
"""

from __future__ import annotations

import numpy as np

from tbq.kernels.compile import jit

LANES = 16
I32 = np.int32
ONE = I32(1)
SIGN = I32(-(1 << 31))


def upper_levels(levels: np.ndarray) -> tuple:
    """Return the bits of the upper half of levels, float32 (2 ** bits,), and zeros: eight int32.

    NotImplementedError if the lower half is not the same with other signs.
    """
    if not np.array_equal(levels[::-1], -levels):
        raise NotImplementedError("kernels mirror levels; a codebook that is not symmetric")
    upper = np.zeros(8, np.float32)
    upper[: len(levels) // 2] = levels[len(levels) // 2 :]
    return tuple(upper.view(np.int32))


@jit
def _mask(code, bit):
    """Return -1 if a bit of code is set, else 0."""
    return I32(-I32(I32(code >> bit) & ONE))


@jit
def _either(a, b, mask):
    """Return b where mask is -1, and a where it is 0."""
    return I32(a ^ I32(I32(a ^ b) & mask))


@jit
def _of_one(upper, code):
    return upper[0]


@jit
def _of_two(upper, code):
    return _either(upper[0], upper[1], _mask(code, I32(0)))


@jit
def _of_four(upper, code):
    m0, m1 = _mask(code, I32(0)), _mask(code, I32(1))
    return _either(_either(upper[0], upper[1], m0), _either(upper[2], upper[3], m0), m1)


@jit
def _of_eight(upper, code):
    return _either(_of_four(upper[:4], code), _of_four(upper[4:], code), _mask(code, I32(2)))


_PICKS = {1: _of_one, 2: _of_two, 3: _of_four, 4: _of_eight}


def _chooser(bits: int, split: bool = False):
    """Return the loop over words of eight codes of so many bits, as constants: it unrolls."""
    pick, top = _PICKS[bits], I32(bits - 1)

    @jit
    def choose(words, upper, v):
        out = v.view(np.int32)
        for g in range(words.size // LANES):
            own = words[g * LANES : (g + 1) * LANES]
            to = out[8 * g * LANES : (8 * g + 8) * LANES]
            for lane in range(LANES):
                word = own[lane]
                for i in range(8):
                    if split:
                        third = I32(I32(word >> I32(16 + i)) & ONE)
                        code = I32(I32(I32(word >> I32(2 * i)) & I32(3)) | I32(third << I32(2)))
                    else:
                        code = I32(word >> I32(bits * i))
                    flip = I32(I32(I32(code >> top) & ONE) - ONE)  # -1 in the lower half
                    level = pick(upper, I32(code ^ flip))
                    to[i * LANES + lane] = I32(level ^ I32(flip & SIGN))

    return choose


# `choose_levels[bits](words, upper, v)` sets v, float32 (8 * words.size,), to the levels of words
# (groups of eight codes * LANES,) int32, code i at bit bits*i, lanes side by side.
choose_levels = {bits: _chooser(bits) for bits in _PICKS}
choose_split_levels = _chooser(3, split=True)
_choose1, _choose2, _choose3, _choose4 = choose_levels.values()


@jit
def choose(words, bits, upper, v):
    """Do what `choose_levels[bits]` does."""
    if bits == 1:
        _choose1(words, upper, v)
    elif bits == 2:
        _choose2(words, upper, v)
    elif bits == 3:
        _choose3(words, upper, v)
    else:
        _choose4(words, upper, v)
