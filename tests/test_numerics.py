"""Conversions, packing and the rotation matrix, against other definitions of the same thing."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tbq
from tbq import bitpack, numerics
from tbq.families import dense
from tbq.kernels import bitpack as kernel_bitpack
from tbq.kernels import compile
from tbq.kernels.compile import jit
from tbq.kernels.numerics import fp16_to_fp32, fp32_to_fp16


@jit
def to_fp16(x, bits):
    for i in range(x.size):
        bits[i] = fp32_to_fp16(x[i])


@jit
def to_fp32(bits, x):
    for i in range(bits.size):
        x[i] = fp16_to_fp32(bits[i])


def test_fp16_to_fp32_of_all_bit_patterns():
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = np.empty(bits.size, np.float32)
    to_fp32(bits, x)
    with np.errstate(invalid="ignore"):
        expected = bits.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    assert np.array_equal(x.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    assert np.isnan(x[nan]).all()


def test_fp32_to_fp16_around_every_rounding_boundary():
    """All halves, the midpoints between them, and the floats next to those midpoints."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = np.append((halves[:-1] + halves[1:]) / 2, np.float32(65520))
    near = [np.nextafter(middles, np.float32(s)) for s in (-np.inf, np.inf)]
    specials = np.array([np.nan, -np.nan, np.inf, 1e-45, 3e38, 0.0], np.float32)
    payload = np.array([0x7F800001, 0xFFC12345], np.uint32).view(np.float32)
    positive = np.concatenate([halves, middles, *near, specials])
    x = np.concatenate([positive, -positive, payload])
    bits = np.empty(x.size, np.uint16)
    to_fp16(x, bits)
    assert np.array_equal(bits, numerics.fp16_bits(x))


def test_fp16_bits_follow_ggml_where_numpy_does_not():
    x = np.array([0x7F800001, 0xFFC12345], np.uint32).view(np.float32)
    assert numerics.fp16_bits(x).tolist() == [0x7E00, 0xFE00]
    assert numerics.fp16_bits(np.float32([65519.0, 65520.0])).tolist() == [0x7BFF, 0x7C00]


@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_bit_packing(bits, groups, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, 8 * groups, np.uint8)
    string = sum(int(code) << (bits * j) for j, code in enumerate(codes))
    expected = np.frombuffer(string.to_bytes(bits * groups, "little"), np.uint8)
    assert np.array_equal(bitpack.pack(codes, bits), expected)
    assert np.array_equal(bitpack.unpack(expected, bits), codes)
    packed, unpacked = np.empty_like(expected), np.empty_like(codes)
    kernel_bitpack.pack(codes, bits, packed)
    kernel_bitpack.unpack(packed, bits, unpacked)
    assert np.array_equal(packed, expected)
    assert np.array_equal(unpacked, codes)


def test_ordered_sum_is_sequential():
    x = np.random.default_rng(3).standard_normal((20, 1000)).astype(np.float32)
    for row, total in zip(x, numerics.ordered_sum(x), strict=True):
        expected = np.float32(0)
        for value in row:
            expected = np.float32(expected + value)
        assert total == expected
    assert (numerics.ordered_sum(x) != x.sum(axis=1)).any()  # so the order does matter


def test_kernels_are_not_contracted_to_fma():
    """(1 + e)^2 - (1 + 2e) is e^2 with a fused multiply-add and 0 without."""

    @jit
    def multiply_add(x, y):
        for i in range(x.size):
            y[i] = x[i] * x[i] - (np.float32(1) + np.float32(2) * (x[i] - np.float32(1)))

    e = np.float32(2.0**-20)
    y = np.empty(64, np.float32)
    multiply_add(np.full(64, np.float32(1) + e), y)
    assert (y == 0).all()


def test_cached_kernels_notice_changes_in_other_files():
    """A kernel inlines functions of other modules, so its cache is stamped with all of them."""
    own, stamp = to_fp16._cache._cache_file._source_stamp  # and with its own, for those of tests
    assert own
    assert stamp == compile._sources_stamp()
    assert {"kernels/numerics.py", "families/dense.py", "bitpack.py"} <= {
        name for name, *_ in stamp
    }


def test_kernels_compile_where_nothing_can_be_cached(monkeypatch):
    class Kernel:
        def __init__(self, function):
            self.function = function

        def enable_caching(self):
            raise RuntimeError("cannot cache function: no locator available")

        def compile(self, signature):
            return compile.config.DISABLE_JIT, signature

    monkeypatch.setattr(compile.numba, "njit", lambda **options: Kernel)
    monkeypatch.setattr(compile.config, "DISABLE_JIT", 1)
    kernel = compile.jit(len)
    assert kernel.function is len
    assert kernel.compile("x") == (0, "x")
    assert compile.config.DISABLE_JIT == 1


def test_splitmix64_known_answer():
    """The first outputs for seed 1234567, as the algorithm's author publishes them."""
    words = numerics.splitmix64(1234567)
    assert [next(words) for _ in range(2)] == [6457827717110365317, 3203168211198807973]


def test_qr_rotation_is_pinned():
    q = dense.qr_rotation()
    digest = hashlib.sha256(q.astype("<f4").tobytes()).hexdigest()
    assert digest == "cd1e7d50aa584f9d9e72d822fde7c4ee8bb54f65a4fb291e21c80b17f494fc9f"
    assert np.abs(q.astype(np.float64) @ q.T.astype(np.float64) - np.eye(128)).max() < 2e-6
    assert dense.qr_rotation() is q
    with pytest.raises(ValueError, match="read-only"):
        q[0, 0] = 0


def test_qr_rotation_is_the_q_with_positive_diagonal_r():
    a = dense._gaussian(dense.QR_SEED, dense.QR_SIZE).astype(np.float64)
    q, r = np.linalg.qr(a)
    assert np.abs(dense.qr_rotation() - q * np.sign(np.diag(r))).max() < 1e-4


def test_another_math_library_is_noticed(monkeypatch):
    monkeypatch.setattr(dense.math, "log", lambda x, log=math.log: log(x) * (1 + 1e-7))
    dense.qr_rotation.cache_clear()
    try:
        with pytest.raises(tbq.BackendError, match="SHA-256"):
            dense.qr_rotation()
    finally:
        dense.qr_rotation.cache_clear()
