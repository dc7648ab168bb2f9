"""ggml's K-quants q2_K to q6_K, as they are encoded without an importance matrix.

What it is
    256 values are 16 sub-blocks of 16 (q2_K, q3_K, q6_K) or 8 of 32 (q4_K, q5_K). A sub-block has a
    scale, in q2_K, q4_K and q5_K a minimum too, found by a search; those are whole numbers of steps
    d and dmin of the block. Codes are then chosen for the scales that were stored.

Block, all fields little-endian, d and dmin float16
    q2_K, 84 bytes: scales 16 (minimum in the high nibble), qs 64, d, dmin
    q3_K, 110: hmask 32, qs 64, scales 12, d
    q4_K, 144: d, dmin, scales 12, qs 128
    q5_K, 176: d, dmin, scales 12, qh 32, qs 128
    q6_K, 210: ql 128, qh 64, scales 16 int8, d
    Codes in qs and ql. Two bits: byte 32h + l of qs has those of values 128h + l + 32k in bits 2k
    and 2k + 1, k = 0 to 3. Four bits: byte 32h + l has value 64h + l low, 64h + l + 32 high; in ql
    of q6_K byte 64h + l has value 128h + l low, 128h + l + 64 high, l < 64.
    Higher bits of codes. hmask: bit k of byte l is that of value 32k + l. qh of q5_K: the same. qh
    of q6_K: as two-bit codes.
    Six-bit scales s and minima m. q4_K and q5_K, 8 of each: bytes 0 to 3 have s_0 to s_3 in their
    low six bits, bytes 4 to 7 m_0 to m_3; byte 8 + j has the low nibbles of s_(4 + j) low and of
    m_(4 + j) high, whose high two bits are the high bits of bytes j and 4 + j. q3_K, 16 of s: the
    low nibbles of s_0 to s_7 are low in bytes 0 to 7, those of s_8 to s_15 high; the high two bits
    of s_(4k + j) are bits 2k and 2k + 1 of byte 8 + j.

Quantise. All in float32, sums from 0 in the order of the values, products from left to right
    Nearest: near(f) = the low 23 bits of the float f + 12582912, less 4194304. That is the nearest
    whole number, ties to even, while |f| < 2^22; infinities become -4194304, NaN 0.

    q2_K, q4_K, q5_K, with codes up to t = 3, 15, 31
    1. Weights of a sub-block. q2_K: w_i = |x_i|; else a + |x_i| with a = sqrt(sum x_i x_i / 32).
    2. p = the least, q = the largest x_i, from x_0, which stays if it is NaN. p = 0 if p > 0. If
       p = q: scale 0, minimum -p, codes 0, and the search is left out.
       W = sum w_i and X = sum w_i x_i, from the first term and not from 0.
    3. c_i(k) = near(k (x_i - p)), at least 0 and at most t. Start: k = t / (q - p), a = 1 / k,
       b = p; error e = sum w_i r_i^2 with r_i = a c_i + b - x_i; q2_K: |r_i| for r_i^2.
    4. For g = 0 to 20 (q5_K, q2_K: 15): k = (f + 0.1 g + t) / (q - p) with f = -1 (-0.5), and codes
       c_i(k), where p is now the b that was kept last. L = sum w_i c_i, S = sum (w_i c_i) c_i,
       Y = sum (w_i c_i) x_i, D = W S - L L. If D > 0: a = (W Y - X L) / D, b = (S X - L Y) / D; if
       b > 0: b = 0, a = Y / S. If the error of these is less than the least so far, they are kept
       with their codes.
    5. scale a, minimum m = -b. A = the largest scale, M = the largest minimum, at least 0.
       q4_K, q5_K: s_j = near(63/A a_j) modulo 256, at most 63, and from M so the minima; d = A/63,
       dmin = M/63; for A or M of 0 the factor is 0. q2_K: 15 for 63; s_j is not cut off, the byte
       is s_j | m_j << 4 modulo 256; for A or M of 0 all of s or m are 0.
    6. u = d s_j, v = dmin m_j of what is stored. If u is not 0 (NaN is not), codes are
       near((x_i + v) / u), at least 0 and at most t; else those of step 4 stay.

    q6_K, codes -32 to 31 stored with 32 more
    1. z = the value of largest magnitude with its sign, the first of equal ones, NaN left out; if
       |z| < 1e-15: scale 0, codes 0, which is -32.
    2. For g = 0, then -9 to 9 without 0: k = -(32 + 0.1 g) / z; c_i = near(k x_i) between -32
       and 31; w_i = x_i x_i; Y = sum w_i x_i c_i, S = sum w_i c_i c_i. At first: a = Y / S, 0 if
       S is 0, and best = a Y. Later, if S > 0 and Y Y > best S: the same with these codes.
    3. A = the scale of largest magnitude with its sign. If |A| < 1e-15 the block is all zeros.
       k = -128 / A; d = 1 / k; s_j = near(k a_j), at most 127, modulo 256.
    4. u = d s_j of what is stored; if u is not 0, codes are near(x_i / u) between -32 and 31.

    q3_K, codes -4 to 3 stored with 4 more
    1. As q6_K with 4 for 32, up to the first Y and S; no other k is tried.
    2. Five times, or until nothing changes: for each i, y = Y - w_i x_i c_i. If y > 0: s = S -
       w_i c_i c_i; n = near(x_i s / y) between -4 and 3. If n is not c_i: y += w_i x_i n,
       s += w_i n n; if s > 0 and y y S > Y Y s: c_i = n, Y = y, S = s.
       scale Y / S, 0 unless S > 0.
    3. A as there; k = -32 / A, d = 1 / k; s_j = near(k a_j) modulo 256 as int8, between -32
       and 31, stored with 32 more. If A is 0, d and what is stored of s are 0.
    4. As there, between -4 and 3.

Dequantise
    q2_K, q4_K, q5_K: (d s) c - dmin m. q3_K, q6_K: (d s) c.

Source
    ggml-org/llama.cpp @ f112d6de7: ggml/src/ggml-quants.c (quantize_row_q2_K_ref to q6_K_ref,
    dequantize_row_q2_K to q6_K), ggml/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np

from tbq import bitpack
from tbq.codec import Codec, Layout, Stages
from tbq.numerics import fp16_bits, ordered_sum

QK = 256
MAGIC = np.float32(12582912)
MANTISSA, MIDDLE = 0x007FFFFF, 0x00400000
LEAST = np.float32(1e-15)
ZERO, ONE, TENTH = np.float32(0), np.float32(1), np.float32(0.1)


class Search(NamedTuple):
    """What differs between the types with a minimum.

    values: of a sub-block. first, last: f of step 4, and the last g. by_size: whether weights are
    magnitudes alone and errors their first power. steps: the most that a scale can be stored as.
    """

    values: int
    first: float
    last: int
    by_size: bool
    steps: int


SEARCHES = {
    2: Search(16, -0.5, 15, True, 15),
    4: Search(32, -1.0, 20, False, 63),
    5: Search(32, -0.5, 15, False, 63),
}
WITH_MINIMUM = {
    2: np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")]),
    4: np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)]),
    5: np.dtype(
        [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]
    ),
}
WITH_SIGN = {
    3: np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")]),
    6: np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]),
}
SUB = 16  # values of a sub-block of q3_K and q6_K
TRIES = 5


def nearest(f: np.ndarray) -> np.ndarray:
    """Return what ggml's nearest_int makes of float32, as int32."""
    return ((f + MAGIC).view(np.int32) & MANTISSA) - MIDDLE


def grid(search: Search, top: int) -> np.ndarray:
    """Return the numerators of all k that step 4 tries, float32 (last + 1,)."""
    g = np.arange(search.last + 1, dtype=np.float32)
    return np.float32(search.first) + TENTH * g + np.float32(top)


def sign_grid(half: int) -> np.ndarray:
    """Return the numerators of all k that q6_K tries after the first, float32 (18,)."""
    g = np.array([g for g in range(-9, 10) if g], np.float32)
    return -(np.float32(half) + TENTH * g)


def _extreme(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest magnitude of each row, NaN left out, and its value; 0 where none is."""
    size = np.where(np.isnan(values), ZERO, np.abs(values))
    at = size.argmax(axis=1)[:, None]
    largest = np.take_along_axis(size, at, 1)[:, 0]
    return largest, np.where(largest > 0, np.take_along_axis(values, at, 1)[:, 0], ZERO)


def _plus(first: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Add terms (n, k) to first (n,) in order."""
    for i in range(terms.shape[1]):
        first = first + terms[:, i]
    return first


def _least_and_largest(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = x[:, 0].copy(), x[:, 0].copy()
    for i in range(1, x.shape[1]):
        low = np.where(x[:, i] < low, x[:, i], low)
        high = np.where(x[:, i] > high, x[:, i], high)
    return np.where(low > 0, ZERO, low), high


# --- bits ----------------------------------------------------------------------------------------


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Pack codes (n, 256) of two bits to uint8 (n, 64)."""
    by_shift = codes.reshape(-1, 2, 4, 32)
    packed = sum(by_shift[:, :, k] << 2 * k for k in range(4))
    return packed.astype(np.uint8).reshape(-1, 64)


def _unpaired(packed: np.ndarray) -> np.ndarray:
    """Return the two-bit codes (n, 256) in uint8 (n, 64)."""
    halves = packed.reshape(-1, 2, 1, 32)
    return (halves >> (2 * np.arange(4, dtype=np.uint8))[:, None] & 3).reshape(-1, QK)


def _nibbles(codes: np.ndarray, apart: int) -> np.ndarray:
    """Pack codes (n, 256) of four bits, value j with value j + apart, to uint8 (n, 128)."""
    halves = codes.reshape(-1, QK // (2 * apart), 2, apart)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).astype(np.uint8).reshape(-1, QK // 2)


def _unnibbled(packed: np.ndarray, apart: int) -> np.ndarray:
    """Return the four-bit codes (n, 256) in uint8 (n, 128)."""
    bytes_ = packed.reshape(-1, QK // (2 * apart), apart)
    return np.stack([bytes_ & 15, bytes_ >> 4], axis=2).reshape(-1, QK)


def _planes(bits: np.ndarray) -> np.ndarray:
    """Pack bits (n, 256), value 32k + l to bit k of byte l, to uint8 (n, 32)."""
    return bitpack.pack(bits.reshape(-1, 8, 32).transpose(0, 2, 1).reshape(-1, QK), 1)


def _unplaned(packed: np.ndarray) -> np.ndarray:
    """Return the bits (n, 256) in uint8 (n, 32)."""
    return bitpack.unpack(packed, 1).reshape(-1, 32, 8).transpose(0, 2, 1).reshape(-1, QK)


def _scales_of_8(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Pack six-bit scales and minima, uint8 (n, 8) both, to uint8 (n, 12)."""
    first = s[:, :4] | s[:, 4:] >> 4 << 6
    second = m[:, :4] | m[:, 4:] >> 4 << 6
    return np.concatenate([first, second, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], axis=1)


def _unpacked_8(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    s = np.concatenate([first & 63, low & 15 | first >> 6 << 4], axis=1)
    return s, np.concatenate([second & 63, low >> 4 | second >> 6 << 4], axis=1)


def _scales_of_16(s: np.ndarray) -> np.ndarray:
    """Pack six-bit scales, uint8 (n, 16), to uint8 (n, 12)."""
    high = (s >> 4).reshape(-1, 4, 4)
    last = sum(high[:, k] << 2 * k for k in range(4)).astype(np.uint8)
    return np.concatenate([s[:, :8] & 15 | (s[:, 8:] & 15) << 4, last], axis=1)


def _unpacked_16(packed: np.ndarray) -> np.ndarray:
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = packed[:, None, 8:] >> (2 * np.arange(4, dtype=np.uint8))[:, None] & 3
    return low | high.reshape(-1, 16) << 4


# --- codecs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WithMinimum(Codec):
    """q2_K, q4_K and q5_K.

    Attributes:
        bits: 2, 4 or 5.
        searched: whether step 4 is done (in kernels that are wrong: not).
    """

    bits: int
    searched: bool = True

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    sub_scales: ClassVar[tuple[str, ...]] = ("scales", "minima")

    @cached_property
    def layout(self) -> Layout:
        """The block."""
        codes = ("qh", "qs", "scales") if self.bits == 5 else ("qs", "scales")
        return Layout(WITH_MINIMUM[self.bits], scales=("d", "dmin"), codes=codes)

    @property
    def top(self) -> int:
        """The last code."""
        return (1 << self.bits) - 1

    @property
    def search(self) -> Search:
        """What this type does differently."""
        return SEARCHES[self.bits]

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Halves between whole numbers."""
        return {"codes": np.arange(self.top) + 0.5}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 256) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            d, dmin, s, m, searched = self._scales(x)
            blocks["d"], blocks["dmin"] = fp16_bits(d).view("<f2"), fp16_bits(dmin).view("<f2")
            if self.bits == 2:
                blocks["scales"] = s | m << 4
            else:
                blocks["scales"] = _scales_of_8(s, m)
            r = self._coordinates(x, blocks)
        chosen = np.clip(nearest(r), 0, self.top)
        codes = np.where(self._dead(blocks), searched, chosen).astype(np.uint8)
        self._store(blocks, codes)
        return blocks

    def _store(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        blocks["qs"] = _pairs(codes) if self.bits == 2 else _nibbles(codes & 15, 32)
        if self.bits == 5:
            blocks["qh"] = _planes(codes >> 4)

    def _scales(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return d, dmin, s, m and the codes of step 4 of float32 (n, 256)."""
        scale, minimum, codes = (v.reshape(len(x), -1) for v in self._searched(x))
        steps = np.float32(self.search.steps)
        largest = np.fmax(scale, ZERO).max(axis=1), np.fmax(minimum, ZERO).max(axis=1)
        whole = []
        for values, most in zip((scale, minimum), largest, strict=True):
            factor = np.where(most > 0, steps / most, ZERO)
            stored = nearest(factor[:, None] * values)
            stored = np.where((most > 0)[:, None], stored, 0).astype(np.uint8)
            whole.append(stored if self.bits == 2 else np.minimum(stored, self.search.steps))
        return largest[0] / steps, largest[1] / steps, *whole, codes

    def _searched(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return scales, minima and codes of all sub-blocks."""
        x = x.reshape(-1, self.search.values)
        w = self._weights(x)
        low, high = _least_and_largest(x)
        flat, start = high == low, -low
        total, mean = w[:, 0], w[:, 0] * x[:, 0]
        total, mean = _plus(total, w[:, 1:]), _plus(mean, w[:, 1:] * x[:, 1:])
        k = np.float32(self.top) / (high - low)
        a, b, codes = ONE / k, low, self._codes(x, low, k)
        least = self._error(x, w, a, b, codes)
        for numerator in grid(self.search, self.top) if self.searched else ():
            tried = self._codes(x, b, numerator / (high - b))
            c = tried.astype(np.float32)
            wc = w * c
            sum_c, sum_cc, sum_cx = ordered_sum(wc), ordered_sum(wc * c), ordered_sum(wc * x)
            det = total * sum_cc - sum_c * sum_c
            new_a = (total * sum_cx - mean * sum_c) / det
            new_b = (sum_cc * mean - sum_c * sum_cx) / det
            above = new_b > 0
            new_a = np.where(above, sum_cx / sum_cc, new_a)
            new_b = np.where(above, ZERO, new_b)
            error = self._error(x, w, new_a, new_b, tried)
            better = (det > 0) & (error < least)
            least, a, b = (
                np.where(better, new, old) for new, old in ((error, least), (new_a, a), (new_b, b))
            )
            codes = np.where(better[:, None], tried, codes)
        codes[flat] = 0
        return np.where(flat, ZERO, a), np.where(flat, start, -b), codes

    def _weights(self, x: np.ndarray) -> np.ndarray:
        if self.search.by_size:
            return np.abs(x)
        return np.sqrt(ordered_sum(x * x) / np.float32(x.shape[1]))[:, None] + np.abs(x)

    def _codes(self, x: np.ndarray, low: np.ndarray, k: np.ndarray) -> np.ndarray:
        return np.clip(nearest(k[:, None] * (x - low[:, None])), 0, self.top)

    def _error(self, x, w, a, b, codes) -> np.ndarray:
        r = a[:, None] * codes.astype(np.float32) + b[:, None] - x
        return ordered_sum(w * (np.abs(r) if self.search.by_size else r * r))

    def _steps(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return u and v of blocks, float32 (n, 256) both."""
        s, m = self._stored(blocks)
        repeats = QK // s.shape[1]
        u = blocks["d"].astype(np.float32)[:, None] * s.astype(np.float32)
        v = blocks["dmin"].astype(np.float32)[:, None] * m.astype(np.float32)
        return np.repeat(u, repeats, axis=1), np.repeat(v, repeats, axis=1)

    def _stored(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return scales and minima of blocks as whole numbers."""
        if self.bits == 2:
            return blocks["scales"] & 15, blocks["scales"] >> 4
        return _unpacked_8(blocks["scales"])

    def _coordinates(self, x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        u, v = self._steps(blocks)
        return (x + v) / u

    def _dead(self, blocks: np.ndarray) -> np.ndarray:
        """Tell which values have a step of 0, bool (n, 256)."""
        with np.errstate(all="ignore"):
            return self._steps(blocks)[0] == 0

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the largest magnitude, codes before they are rounded, d and dmin of (n, 256).

        Where codes are those of the search there are no coordinates, but NaN.
        """
        with np.errstate(all="ignore"):
            d, dmin, *_ = self._scales(x)
            r = np.where(self._dead(blocks), np.float32(np.nan), self._coordinates(x, blocks))
            return Stages(np.abs(x).max(axis=1), {"codes": r}, {"d": d, "dmin": dmin})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 256)."""
        with np.errstate(all="ignore"):
            u, v = self._steps(blocks)
            return u * self._unpacked(blocks).astype(np.float32) - v

    def _unpacked(self, blocks: np.ndarray) -> np.ndarray:
        if self.bits == 2:
            return _unpaired(blocks["qs"])
        low = _unnibbled(blocks["qs"], 32)
        return low | _unplaned(blocks["qh"]) << 4 if self.bits == 5 else low

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the codes of blocks (n,), and the scale and minimum of each value's sub-block."""
        s, m = (np.repeat(v, QK // v.shape[1], axis=1) for v in self._stored(blocks))
        steps = self.search.steps + 1
        return {
            "codes": (self._unpacked(blocks), self.top + 1),
            "scales": (s, steps),
            "minima": (m, steps),
        }

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that leave out the search."""
        yield "scale not refined", "", replace(self, searched=False)


@dataclass(frozen=True)
class WithSign(Codec):
    """q3_K and q6_K.

    Attributes:
        bits: 3 or 6.
        searched: whether scales are refined (in kernels that are wrong: they are 1 / k).
    """

    bits: int
    searched: bool = True

    block_values: ClassVar[int] = QK
    group_values: ClassVar[int] = QK
    signed_scales: ClassVar[bool] = True
    sub_scales: ClassVar[tuple[str, ...]] = ("scales",)

    @cached_property
    def layout(self) -> Layout:
        """The block."""
        codes = ("hmask", "qs", "scales") if self.bits == 3 else ("ql", "qh", "scales")
        return Layout(WITH_SIGN[self.bits], codes=codes)

    @property
    def half(self) -> int:
        """What is added to a code where it is stored."""
        return 1 << (self.bits - 1)

    @property
    def boundaries(self) -> dict[str, np.ndarray]:
        """Halves between whole numbers."""
        return {"codes": np.arange(-self.half, self.half - 1) + 0.5}

    def quantize(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, 256) to blocks (n,)."""
        blocks = np.zeros(len(x), self.layout.dtype)
        with np.errstate(all="ignore"):
            d, s, searched, zero = self._scales(x)
            blocks["d"] = fp16_bits(d).view("<f2")
            if self.bits == 3:
                stored = np.where((d == 0)[:, None] & zero[:, None], 0, s + 32)
                blocks["scales"] = _scales_of_16(stored.astype(np.uint8))
            else:
                blocks["scales"] = s
            chosen = self._cut(nearest(self._coordinates(x, blocks))) + self.half
            codes = np.where(self._dead(blocks), searched, chosen).astype(np.uint8)
        if self.bits == 3:
            blocks["qs"], blocks["hmask"] = _pairs(codes & 3), _planes(codes >> 2)
        else:
            blocks["ql"], blocks["qh"] = _nibbles(codes & 15, 64), _pairs(codes >> 4)
            blocks[zero] = 0
        return blocks

    def _scales(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return d, s, the codes of the search and which blocks have no scale, of (n, 256)."""
        a, codes = self._searched(x.reshape(-1, SUB))
        a = a.reshape(len(x), -1)
        size, largest = _extreme(a)
        zero = largest == 0 if self.bits == 3 else size < LEAST
        k = np.float32(-32 if self.bits == 3 else -128) / largest
        d = np.where(zero, ZERO, ONE / k)
        s = nearest(k[:, None] * a)
        if self.bits == 3:
            s = np.clip(s.astype(np.int8), -32, 31)
        else:
            s = np.where(zero[:, None], 0, np.minimum(s, 127)).astype(np.int8)
        return d, s, codes.reshape(len(x), -1), zero

    def _searched(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return scales and stored codes of sub-blocks (m, 16)."""
        size, z = _extreme(x)
        k = np.float32(-self.half) / z
        c = self._codes(x, k)
        if not self.searched:
            a = ONE / k
        else:
            a, c = self._descended(x, c) if self.bits == 3 else self._tried(x, z, c)
        small = size < LEAST
        return np.where(small, ZERO, a), np.where(small[:, None], 0, c + self.half)

    def _cut(self, c: np.ndarray) -> np.ndarray:
        return np.clip(c, -self.half, self.half - 1)

    def _codes(self, x: np.ndarray, k: np.ndarray) -> np.ndarray:
        return self._cut(nearest(k[:, None] * x))

    @staticmethod
    def _sums(x: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return Y and S."""
        w, steps = x * x, c.astype(np.float32)
        return ordered_sum(w * x * steps), ordered_sum(w * steps * steps)

    def _tried(self, x: np.ndarray, z: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Try other k, as q6_K does."""
        y, s = self._sums(x, c)
        a = np.where(s != 0, y / s, ZERO)
        best = a * y
        for numerator in sign_grid(self.half):
            tried = self._codes(x, numerator / z)
            y, s = self._sums(x, tried)
            better = (s > 0) & (y * y > best * s)
            a = np.where(better, y / s, a)
            best = np.where(better, a * y, best)
            c = np.where(better[:, None], tried, c)
        return a, c

    def _descended(self, x: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Change one code at a time, as q3_K does."""
        total_y, total_s = self._sums(x, c)
        for _ in range(TRIES):
            for i in range(SUB):
                xi, old = x[:, i], c[:, i].astype(np.float32)
                w = xi * xi
                y = total_y - w * xi * old
                s = total_s - w * old * old
                tried = self._cut(nearest(xi * s / y))
                new = tried.astype(np.float32)
                usable = (y > 0) & (new != old)
                y, s = y + w * xi * new, s + w * new * new
                better = usable & (s > 0) & (y * y * total_s > total_y * total_y * s)
                c[better, i] = tried[better]
                total_y, total_s = np.where(better, y, total_y), np.where(better, s, total_s)
        return np.where(total_s > 0, total_y / total_s, ZERO), c

    def _steps(self, blocks: np.ndarray) -> np.ndarray:
        """Return u of blocks, float32 (n, 256)."""
        scales = blocks["scales"]
        s = _unpacked_16(scales).astype(np.float32) - 32 if self.bits == 3 else scales
        u = blocks["d"].astype(np.float32)[:, None] * s.astype(np.float32)
        return np.repeat(u, SUB, axis=1)

    def _coordinates(self, x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        return x / self._steps(blocks)

    def _dead(self, blocks: np.ndarray) -> np.ndarray:
        """Tell which values have a step of 0, bool (n, 256)."""
        with np.errstate(all="ignore"):
            return self._steps(blocks) == 0

    def stages(self, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
        """Return the largest magnitude, codes before they are rounded, and d of (n, 256).

        Where codes are those of the search there are no coordinates, but NaN.
        """
        with np.errstate(all="ignore"):
            r = np.where(self._dead(blocks), np.float32(np.nan), self._coordinates(x, blocks))
            return Stages(np.abs(x).max(axis=1), {"codes": r}, {"d": self._scales(x)[0]})

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantise blocks (n,) to float32 (n, 256)."""
        steps = self._unpacked(blocks).astype(np.float32) - np.float32(self.half)
        with np.errstate(all="ignore"):
            return self._steps(blocks) * steps

    def _unpacked(self, blocks: np.ndarray) -> np.ndarray:
        if self.bits == 3:
            return _unpaired(blocks["qs"]) | _unplaned(blocks["hmask"]) << 2
        return _unnibbled(blocks["ql"], 64) | _unpaired(blocks["qh"]) << 4

    def codes(self, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """Return the stored codes of blocks (n,), and the scale of each value's sub-block.

        Scales of q6_K count from -128.
        """
        if self.bits == 3:
            scales, steps = _unpacked_16(blocks["scales"]), 64
        else:
            scales, steps = blocks["scales"].view(np.uint8) ^ np.uint8(128), 256
        return {
            "codes": (self._unpacked(blocks), 2 * self.half),
            "scales": (np.repeat(scales, SUB, axis=1), steps),
        }

    def mutants(self) -> Iterator[tuple[str, str, Codec]]:
        """Kernels that do not refine scales."""
        yield "scale not refined", "", replace(self, searched=False)
