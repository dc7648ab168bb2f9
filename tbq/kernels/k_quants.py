"""Numba kernels of `tbq.families.k_quants`.

Scales are searched for many sub-blocks side by side, arrays [value, lane]: sums have an order
within a sub-block. Codes of the scales that are stored, and bytes, are made in the order of values.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tbq.codec import RowKernels
from tbq.families.k_quants import (
    LEAST,
    MAGIC,
    MANTISSA,
    MIDDLE,
    ONE,
    QK,
    SUB,
    TRIES,
    ZERO,
    WithMinimum,
    WithSign,
    grid,
    sign_grid,
)
from tbq.kernels.compile import jit
from tbq.kernels.numerics import load_fp16, store_fp16

LANES = 32  # loops over fewer are unrolled before they can become vectors
BITS, OFFSET = np.int32(MANTISSA), np.int32(MIDDLE)
NONE, NO_CODE = np.int32(0), np.uint8(0)
# What is searched in is one array, so that the compiler knows that its parts do not overlap:
# values, weights and codes [value, lane], and behind them numbers of each lane.
V, W, C = 0, 32 * LANES, 64 * LANES
(LOW, HIGH, TOTAL, MEAN, K, A, B, DET, ERROR, LEAST_ERROR, SCALE, BEST_K, BEST_LOW, FIRST_LOW) = (
    range(96 * LANES, 110 * LANES, LANES)
)
C1, C2, CX = range(110 * LANES, 113 * LANES, LANES)
PLACES = 113 * LANES


@jit
def _near(f):
    """Return ggml's nearest_int of a float32, as int32."""
    bits = np.float32(f + MAGIC).view(np.int32)
    return np.int32(np.int32(bits & BITS) - OFFSET)


@jit
def _near_between(f, least, most):
    code = _near(f)
    code = code if code > least else least
    return code if code < most else most


@jit
def _load(x, start, f):
    """Set V of f to sub-blocks from start of x (m, values), or to zero behind them."""
    n = x.shape[1]
    for lane in range(LANES):
        if start + lane < x.shape[0]:
            row = x[start + lane]
            for j in range(n):
                f[V + j * LANES + lane] = row[j]
        else:
            for j in range(n):
                f[V + j * LANES + lane] = ZERO


# --- types with a minimum ------------------------------------------------------------------------


@jit
def _weigh(f, n, by_size):
    """Set W to the weights of V."""
    if by_size:
        for i in range(n * LANES):
            f[W + i] = abs(f[V + i])
        return
    for lane in range(LANES):
        f[TOTAL + lane] = ZERO
    for j in range(n):
        for lane in range(LANES):
            f[TOTAL + lane] += f[V + j * LANES + lane] * f[V + j * LANES + lane]
    for lane in range(LANES):
        f[TOTAL + lane] = np.sqrt(f[TOTAL + lane] / np.float32(n))
    for j in range(n):
        for lane in range(LANES):
            f[W + j * LANES + lane] = f[TOTAL + lane] + abs(f[V + j * LANES + lane])


@jit
def _survey(f, n):
    """Set LOW, HIGH, TOTAL and MEAN: p, q, W and X."""
    for lane in range(LANES):
        f[LOW + lane] = f[HIGH + lane] = f[V + lane]
        f[TOTAL + lane] = f[W + lane]
        f[MEAN + lane] = f[W + lane] * f[V + lane]
    for j in range(1, n):
        for lane in range(LANES):
            x, w = f[V + j * LANES + lane], f[W + j * LANES + lane]
            low, high = f[LOW + lane], f[HIGH + lane]
            f[LOW + lane] = x if x < low else low
            f[HIGH + lane] = x if x > high else high
            f[TOTAL + lane] += w
            f[MEAN + lane] += w * x
    for lane in range(LANES):
        f[LOW + lane] = ZERO if f[LOW + lane] > ZERO else f[LOW + lane]


@jit
def _choose(f, n, top):
    """Set C to the codes of K and LOW, and C1, C2 and CX to L, S and Y."""
    for i in range(3 * LANES):
        f[C1 + i] = ZERO
    for j in range(n):
        for lane in range(LANES):
            x, w = f[V + j * LANES + lane], f[W + j * LANES + lane]
            c = np.float32(_near_between(f[K + lane] * (x - f[LOW + lane]), NONE, top))
            f[C + j * LANES + lane] = c
            wc = w * c
            f[C1 + lane] += wc
            f[C2 + lane] += wc * c
            f[CX + lane] += wc * x


@jit
def _miss(f, n, by_size):
    """Set ERROR to the weighted errors of the codes C under A and B."""
    for lane in range(LANES):
        f[ERROR + lane] = ZERO
    if by_size:
        for j in range(n):
            for lane in range(LANES):
                r = f[A + lane] * f[C + j * LANES + lane] + f[B + lane] - f[V + j * LANES + lane]
                f[ERROR + lane] += f[W + j * LANES + lane] * abs(r)
        return
    for j in range(n):
        for lane in range(LANES):
            r = f[A + lane] * f[C + j * LANES + lane] + f[B + lane] - f[V + j * LANES + lane]
            f[ERROR + lane] += f[W + j * LANES + lane] * (r * r)


@jit
def _solve(f):
    """Set A and B to the least square's, and DET to more than 0 where there is one."""
    for lane in range(LANES):
        total, mean = f[TOTAL + lane], f[MEAN + lane]
        sum_c, sum_cc, sum_cx = f[C1 + lane], f[C2 + lane], f[CX + lane]
        det = total * sum_cc - sum_c * sum_c
        a = (total * sum_cx - mean * sum_c) / det
        b = (sum_cc * mean - sum_c * sum_cx) / det
        f[A + lane] = sum_cx / sum_cc if b > ZERO else a
        f[B + lane] = ZERO if b > ZERO else b
        f[DET + lane] = det


@jit
def _keep(f):
    """Keep scale, minimum and how codes were chosen in the lanes where the error is less."""
    for lane in range(LANES):
        better = (f[DET + lane] > ZERO) & (f[ERROR + lane] < f[LEAST_ERROR + lane])
        f[LEAST_ERROR + lane] = f[ERROR + lane] if better else f[LEAST_ERROR + lane]
        f[BEST_K + lane] = f[K + lane] if better else f[BEST_K + lane]
        f[BEST_LOW + lane] = f[LOW + lane] if better else f[BEST_LOW + lane]
        f[SCALE + lane] = f[A + lane] if better else f[SCALE + lane]
        f[LOW + lane] = f[B + lane] if better else f[LOW + lane]


@jit
def _search(f, n, top, by_size, numerators):
    """Set SCALE and LOW, and BEST_K and BEST_LOW, which codes are chosen by."""
    _weigh(f, n, by_size)
    _survey(f, n)
    for lane in range(LANES):
        low, high = f[LOW + lane], f[HIGH + lane]
        k = np.float32(top) / (high - low)
        f[K + lane] = f[BEST_K + lane] = k
        f[A + lane] = f[SCALE + lane] = ONE / k
        f[B + lane] = f[BEST_LOW + lane] = low
        f[FIRST_LOW + lane] = low
    _choose(f, n, top)
    _miss(f, n, by_size)
    for lane in range(LANES):
        f[LEAST_ERROR + lane] = f[ERROR + lane]
    for numerator in numerators:
        for lane in range(LANES):
            f[K + lane] = numerator / (f[HIGH + lane] - f[LOW + lane])
        _choose(f, n, top)
        _solve(f)
        _miss(f, n, by_size)
        _keep(f)
    for lane in range(LANES):
        if f[HIGH + lane] == f[FIRST_LOW + lane]:
            f[SCALE + lane], f[LOW + lane] = ZERO, f[FIRST_LOW + lane]
            f[BEST_K + lane], f[BEST_LOW + lane] = ZERO, ZERO  # codes 0
        f[LOW + lane] = -f[LOW + lane]


@jit
def _largest(values):
    most = ZERO
    for j in range(values.size):
        most = values[j] if values[j] > most else most
    return most


@jit
def _stored(values, most, steps, out):
    """Set out (n,) to the nearest whole numbers of steps, modulo 256."""
    factor = steps / most if most > ZERO else ZERO
    for j in range(values.size):
        out[j] = np.uint8(_near(factor * values[j])) if most > ZERO else np.uint8(0)


@jit
def _rounded(x, u, v, least, most, out):
    """Set out, uint8, to the codes of x from least on."""
    for i in range(x.size):
        out[i] = np.uint8(_near_between((x[i] + v) / u, least, most) - least)


@jit
def _of_search(x, k, p, top, out):
    for i in range(x.size):
        out[i] = np.uint8(_near_between(k * (x[i] - p), NONE, top))


@jit
def _pack_8(s, m, out):
    """Write six-bit scales and minima, uint8 (8,) both, to out (12,)."""
    for j in range(4):
        out[j] = s[j] | (s[4 + j] >> 4) << 6
        out[4 + j] = m[j] | (m[4 + j] >> 4) << 6
        out[8 + j] = s[4 + j] & 15 | (m[4 + j] & 15) << 4


@jit
def _unpack_8(data, s, m):
    for j in range(4):
        s[j], m[j] = data[j] & 63, data[4 + j] & 63
        s[4 + j] = data[8 + j] & 15 | (data[j] >> 6) << 4
        m[4 + j] = data[8 + j] >> 4 | (data[4 + j] >> 6) << 4


@jit
def _pack_pairs(codes, shift, out):
    """Write the two bits from `shift` on of codes (256,) to out (64,)."""
    for h in range(2):
        own, to = codes[128 * h : 128 * h + 128], out[32 * h : 32 * h + 32]
        for i in range(32):
            low = (own[i] >> shift) & 3 | ((own[i + 32] >> shift) & 3) << 2
            high = (own[i + 64] >> shift) & 3 | ((own[i + 96] >> shift) & 3) << 2
            to[i] = np.uint8(low | high << 4)


@jit
def _pack_nibbles(codes, apart, out):
    """Write the low four bits of codes (256,) to out (128,)."""
    for h in range(QK // (2 * apart)):
        own, to = codes[2 * apart * h : 2 * apart * (h + 1)], out[apart * h : apart * (h + 1)]
        for i in range(apart):
            to[i] = np.uint8(own[i] & 15 | (own[i + apart] & 15) << 4)


@jit
def _pack_planes(codes, shift, out):
    """Write bit `shift` of codes (256,) to out (32,)."""
    for i in range(32):
        out[i] = 0
    for k in range(8):
        own = codes[32 * k : 32 * k + 32]
        for i in range(32):
            out[i] |= np.uint8(((own[i] >> shift) & 1) << k)


@jit
def _block_with_minimum(x, bits, steps, found, ints, codes, out):
    """Write one block of x (sub-blocks, values); found starts at its first lane."""
    s, m, count = ints[0, : x.shape[0]], ints[1, : x.shape[0]], x.shape[0]
    scale, minimum = found[SCALE : SCALE + count], found[LOW : LOW + count]
    most_a, most_m = _largest(scale), _largest(minimum)
    _stored(scale, most_a, steps, s)
    _stored(minimum, most_m, steps, m)
    at = 80 if bits == 2 else 0
    store_fp16(most_a / steps, out, at)
    store_fp16(most_m / steps, out, at + 2)
    if bits == 2:
        for j in range(count):
            out[j] = np.uint8(s[j] | m[j] << 4)
            s[j], m[j] = out[j] & 15, out[j] >> 4
    else:
        for j in range(count):
            s[j], m[j] = min(s[j], np.uint8(63)), min(m[j], np.uint8(63))
        _pack_8(s, m, out[4:16])
    d, dmin, top = load_fp16(out, at), load_fp16(out, at + 2), np.int32((1 << bits) - 1)
    n = x.shape[1]
    for j in range(count):
        u, own = d * np.float32(s[j]), codes[n * j : n * j + n]
        if u == ZERO:
            _of_search(x[j], found[BEST_K + j], found[BEST_LOW + j], top, own)
        else:
            _rounded(x[j], u, dmin * np.float32(m[j]), NONE, top, own)
    if bits == 2:
        _pack_pairs(codes, 0, out[16:80])
    else:
        _pack_nibbles(codes, 32, out[out.size - 128 :])
    if bits == 5:
        _pack_planes(codes, 4, out[16:48])


@cache
def _with_minimum_quantizer(n: int):
    """Return the encoder for sub-blocks of n values, a constant, so that loops become vectors."""

    @jit
    def quantize(x, bits, by_size, steps, numerators, packed):
        """Quantise x (m, values) to packed (n, bytes of a block)."""
        f, ints = np.empty(PLACES, np.float32), np.empty((2, LANES), np.uint8)
        codes, top = np.empty(QK, np.uint8), np.int32((1 << bits) - 1)
        count = QK // n
        for start in range(0, x.shape[0], LANES):
            _load(x, start, f)
            _search(f, n, top, by_size, numerators)
            for lane in range(0, min(LANES, x.shape[0] - start), count):
                own = x[start + lane : start + lane + count]
                block = packed[(start + lane) // count]
                _block_with_minimum(own, bits, steps, f[lane:], ints, codes, block)

    return quantize


@jit
def _dequantize_2(packed, y):
    u, v = np.empty(16, np.float32), np.empty(16, np.float32)
    for b in range(packed.shape[0]):
        block, out = packed[b], y[b]
        d, dmin = load_fp16(block, 80), load_fp16(block, 82)
        for j in range(16):
            u[j], v[j] = d * np.float32(block[j] & 15), dmin * np.float32(block[j] >> 4)
        for h in range(4):  # both sides of both halves: the values of 16 bytes
            j = 8 * (h // 2) + h % 2
            own, to = block[16 + 16 * h : 32 + 16 * h], out[16 * j :]
            u0, u1, u2, u3 = u[j], u[j + 2], u[j + 4], u[j + 6]
            v0, v1, v2, v3 = v[j], v[j + 2], v[j + 4], v[j + 6]
            for i in range(16):
                code = np.int32(own[i])
                to[i] = u0 * np.float32(np.int32(code & 3)) - v0
                to[32 + i] = u1 * np.float32(np.int32((code >> 2) & 3)) - v1
                to[64 + i] = u2 * np.float32(np.int32((code >> 4) & 3)) - v2
                to[96 + i] = u3 * np.float32(np.int32(code >> 6)) - v3


@jit
def _dequantize_4(packed, y):
    s, m = np.empty(8, np.uint8), np.empty(8, np.uint8)
    for b in range(packed.shape[0]):
        block, out = packed[b], y[b]
        d, dmin = load_fp16(block, 0), load_fp16(block, 2)
        _unpack_8(block[4:16], s, m)
        for h in range(4):
            u0, v0 = d * np.float32(s[2 * h]), dmin * np.float32(m[2 * h])
            u1, v1 = d * np.float32(s[2 * h + 1]), dmin * np.float32(m[2 * h + 1])
            own, to = block[16 + 32 * h : 48 + 32 * h], out[64 * h : 64 * h + 64]
            for i in range(32):
                code = np.int32(own[i])
                to[i] = u0 * np.float32(np.int32(code & 15)) - v0
                to[32 + i] = u1 * np.float32(np.int32(code >> 4)) - v1


@jit
def _dequantize_5(packed, y):
    s, m = np.empty(8, np.uint8), np.empty(8, np.uint8)
    for b in range(packed.shape[0]):
        block, out = packed[b], y[b]
        d, dmin = load_fp16(block, 0), load_fp16(block, 2)
        _unpack_8(block[4:16], s, m)
        high = block[16:48]
        for h in range(4):
            u0, v0 = d * np.float32(s[2 * h]), dmin * np.float32(m[2 * h])
            u1, v1 = d * np.float32(s[2 * h + 1]), dmin * np.float32(m[2 * h + 1])
            own, to = block[48 + 32 * h : 80 + 32 * h], out[64 * h : 64 * h + 64]
            for i in range(32):
                to[i] = u0 * np.float32(own[i] & 15 | ((high[i] >> 2 * h) & 1) << 4) - v0
            for i in range(32):
                to[32 + i] = u1 * np.float32(own[i] >> 4 | ((high[i] >> 2 * h + 1) & 1) << 4) - v1


# --- types with a sign ---------------------------------------------------------------------------


@jit
def _farthest(f):
    """Set HIGH to the value of largest magnitude of each lane."""
    for lane in range(LANES):
        f[HIGH + lane] = ZERO
    for j in range(SUB):
        for lane in range(LANES):
            x, far = f[V + j * LANES + lane], f[HIGH + lane]
            f[HIGH + lane] = x if abs(x) > abs(far) else far


@jit
def _sum(f, half):
    """Set C to the codes of K, and CX and C2 to Y and S."""
    least, most = np.int32(-half), np.int32(half - 1)
    for lane in range(LANES):
        f[CX + lane] = f[C2 + lane] = ZERO
    for j in range(SUB):
        for lane in range(LANES):
            x = f[V + j * LANES + lane]
            c = np.float32(_near_between(f[K + lane] * x, least, most))
            f[C + j * LANES + lane] = c
            w = x * x
            f[CX + lane] += w * x * c
            f[C2 + lane] += w * c * c


@jit
def _try_others(f, half, numerators):
    """Try other k: SCALE and BEST_K are the best ones."""
    for lane in range(LANES):
        y, s = f[CX + lane], f[C2 + lane]
        a = y / s if s != ZERO else ZERO
        f[SCALE + lane], f[BEST_K + lane], f[LEAST_ERROR + lane] = a, f[K + lane], a * y
    for numerator in numerators:
        for lane in range(LANES):
            f[K + lane] = numerator / f[HIGH + lane]
        _sum(f, half)
        for lane in range(LANES):
            y, s, best = f[CX + lane], f[C2 + lane], f[LEAST_ERROR + lane]
            a = y / s
            better = (s > ZERO) & (y * y > best * s)
            f[SCALE + lane] = a if better else f[SCALE + lane]
            f[BEST_K + lane] = f[K + lane] if better else f[BEST_K + lane]
            f[LEAST_ERROR + lane] = a * y if better else best


@jit
def _descend(f, half):
    """Change one code in C at a time, and set SCALE."""
    least, most = np.int32(-half), np.int32(half - 1)
    for _ in range(TRIES):
        changed = NONE
        for j in range(SUB):
            for lane in range(LANES):
                x, old = f[V + j * LANES + lane], f[C + j * LANES + lane]
                total_y, total_s = f[CX + lane], f[C2 + lane]
                w = x * x
                y, s = total_y - w * x * old, total_s - w * old * old
                new = np.float32(_near_between(x * s / y, least, most))
                new_y, new_s = y + w * x * new, s + w * new * new
                better = (y > ZERO) & (new != old) & (new_s > ZERO)
                better &= new_y * new_y * total_s > total_y * total_y * new_s
                f[C + j * LANES + lane] = new if better else old
                f[CX + lane] = new_y if better else total_y
                f[C2 + lane] = new_s if better else total_s
                changed |= np.int32(better)
        if not changed:
            break
    for lane in range(LANES):
        y, s = f[CX + lane], f[C2 + lane]
        f[SCALE + lane] = y / s if s > ZERO else ZERO


@jit
def _pack_16(s, out):
    """Write six-bit scales, uint8 (16,), to out (12,)."""
    for j in range(8):
        out[j] = s[j] & 15 | (s[8 + j] & 15) << 4
    for j in range(4):
        low = s[j] >> 4 | (s[4 + j] >> 4) << 2
        out[8 + j] = low | (s[8 + j] >> 4 | (s[12 + j] >> 4) << 2) << 4


@jit
def _unpack_16(data, s):
    for j in range(8):
        s[j], s[8 + j] = data[j] & 15, data[j] >> 4
    for j in range(16):
        s[j] |= ((data[8 + j % 4] >> 2 * (j // 4)) & 3) << 4


@jit
def _farthest_scale(f):
    largest = ZERO
    for j in range(SUB):
        largest = f[SCALE + j] if abs(f[SCALE + j]) > abs(largest) else largest
    return largest


@jit
def _is_small(f, lane):
    """Tell whether the values of a lane are too small for a scale."""
    return abs(f[HIGH + lane]) < LEAST


@jit
def _block_3(x, f, s, codes, out):
    """Write one block of x (16, 16); f starts at its first lane."""
    largest = _farthest_scale(f)
    k = np.float32(-32) / largest
    store_fp16(ONE / k if largest != ZERO else ZERO, out, 108)
    for j in range(16):
        whole = np.int32(np.int8(_near(k * f[SCALE + j])))
        s[j] = np.uint8(min(max(whole, -32), 31) + 32) if largest != ZERO else np.uint8(0)
    _pack_16(s, out[96:108])
    d = load_fp16(out, 108)
    for j in range(16):
        u, own = d * np.float32(np.int32(s[j]) - 32), codes[16 * j : 16 * j + 16]
        if u == ZERO:
            for i in range(16):
                c = np.uint8(f[C + i * LANES + j] + np.float32(4))
                own[i] = NO_CODE if _is_small(f, j) else c
        else:
            _rounded(x[j], u, -ZERO, np.int32(-4), np.int32(3), own)
    _pack_planes(codes, 2, out[:32])
    _pack_pairs(codes, 0, out[32:96])


@jit
def _block_6(x, f, s, codes, out):
    """Write one block of x (16, 16); f starts at its first lane."""
    largest = _farthest_scale(f)
    if abs(largest) < LEAST:
        out[:] = 0
        return
    k = np.float32(-128) / largest
    store_fp16(ONE / k, out, 208)
    d = load_fp16(out, 208)
    for j in range(16):
        whole = np.int8(min(_near(k * f[SCALE + j]), np.int32(127)))
        out[192 + j] = np.uint8(whole)
        u, own = d * np.float32(whole), codes[16 * j : 16 * j + 16]
        if u == ZERO:
            for i in range(16):
                c = _near_between(f[BEST_K + j] * x[j, i], np.int32(-32), np.int32(31))
                own[i] = NO_CODE if _is_small(f, j) else np.uint8(c + 32)
        else:
            _rounded(x[j], u, -ZERO, np.int32(-32), np.int32(31), own)
    _pack_nibbles(codes, 64, out[:128])
    _pack_pairs(codes, 4, out[128:192])


@jit
def _quantize_with_sign(x, bits, numerators, packed):
    """Quantise x (m, 16) to packed (n, bytes of a block)."""
    f, s, codes = np.empty(PLACES, np.float32), np.empty(16, np.uint8), np.empty(QK, np.uint8)
    half = np.int32(1 << (bits - 1))
    for start in range(0, x.shape[0], LANES):
        _load(x, start, f)
        _farthest(f)
        for lane in range(LANES):
            f[K + lane] = np.float32(-half) / f[HIGH + lane]
        _sum(f, half)
        if bits == 3:
            _descend(f, half)
        else:
            _try_others(f, half, numerators)
        for lane in range(LANES):
            f[SCALE + lane] = ZERO if _is_small(f, lane) else f[SCALE + lane]
        for lane in range(0, min(LANES, x.shape[0] - start), SUB):
            own, block = x[start + lane : start + lane + SUB], packed[(start + lane) // SUB]
            if bits == 3:
                _block_3(own, f[lane:], s, codes, block)
            else:
                _block_6(own, f[lane:], s, codes, block)


@jit
def _dequantize_3(packed, y):
    s, u = np.empty(16, np.uint8), np.empty(16, np.float32)
    for b in range(packed.shape[0]):
        block, out = packed[b], y[b]
        d = load_fp16(block, 108)
        _unpack_16(block[96:108], s)
        for j in range(16):
            u[j] = d * np.float32(np.int32(s[j]) - 32)
        for h in range(4):
            j, plane = 8 * (h // 2) + h % 2, np.int32(4 * (h // 2))
            high, low = block[16 * (h % 2) :][:16], block[32 + 16 * h :][:16]
            to, u0, u1, u2, u3 = out[16 * j :], u[j], u[j + 2], u[j + 4], u[j + 6]
            for i in range(16):
                pair, plus = np.int32(low[i]), np.int32(np.int32(high[i]) >> plane)
                to[i] = u0 * np.float32(np.int32((pair & 3 | (plus & 1) << 2) - 4))
                to[32 + i] = u1 * np.float32(np.int32((pair >> 2 & 3 | (plus & 2) << 1) - 4))
                to[64 + i] = u2 * np.float32(np.int32((pair >> 4 & 3 | plus & 4) - 4))
                to[96 + i] = u3 * np.float32(np.int32((pair >> 6 | (plus & 8) >> 1) - 4))


@jit
def _dequantize_6(packed, y):
    for b in range(packed.shape[0]):
        block, out = packed[b], y[b]
        d = load_fp16(block, 208)
        for h in range(4):
            j = 8 * (h // 2) + h % 2
            at = 192 + j
            u0, u1 = d * np.float32(np.int8(block[at])), d * np.float32(np.int8(block[at + 2]))
            u2, u3 = d * np.float32(np.int8(block[at + 4])), d * np.float32(np.int8(block[at + 6]))
            near = block[64 * (h // 2) + 16 * (h % 2) :]
            high, to = block[128 + 16 * h :][:16], out[16 * j :]
            for i in range(16):
                low, far, pair = np.int32(near[i]), np.int32(near[32 + i]), np.int32(high[i])
                to[i] = u0 * np.float32(np.int32((low & 15 | (pair & 3) << 4) - 32))
                to[32 + i] = u1 * np.float32(np.int32((far & 15 | (pair & 12) << 2) - 32))
                to[64 + i] = u2 * np.float32(np.int32((low >> 4 | pair & 48) - 32))
                to[96 + i] = u3 * np.float32(np.int32((far >> 4 | (pair & 192) >> 2) - 32))


DECODERS = {
    2: _dequantize_2,
    3: _dequantize_3,
    4: _dequantize_4,
    5: _dequantize_5,
    6: _dequantize_6,
}


def kernels(codec: WithMinimum | WithSign) -> RowKernels:
    """Return the kernels; those that do not search are for mutants, which have none."""
    if not codec.searched:
        raise NotImplementedError("kernels of a wrong K-quant")
    bits, size = codec.bits, codec.layout.dtype.itemsize
    if isinstance(codec, WithMinimum):
        search = codec.search
        numerators, steps = grid(search, codec.top), np.float32(search.steps)
        encode = _with_minimum_quantizer(search.values)

        def quantize(x, packed, first):
            rows = x.reshape(-1, search.values)
            out = packed.reshape(-1, size)
            encode(rows, bits, search.by_size, steps, numerators, out)
    else:
        numerators = sign_grid(codec.half)

        def quantize(x, packed, first):
            _quantize_with_sign(x.reshape(-1, SUB), bits, numerators, packed.reshape(-1, size))

    def dequantize(packed, y):
        DECODERS[bits](packed.reshape(-1, size), y.reshape(-1, QK))

    return RowKernels(quantize, dequantize, dequantize)
