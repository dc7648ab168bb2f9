"""Vectors of eight lanes: each operation is that of a scalar, with every kind of float."""

from functools import cache

import numpy as np
import pytest

from tbq import numerics
from tbq.kernels import lanes, simd
from tbq.kernels.compile import jit
from tbq.kernels.simd import WIDTH, level_table, on_lanes, on_words, search_table

SPECIALS = [0, -0.0, 1e-45, -1e-45, 1, -1, 0.5, 3e38, -3e38, np.inf, -np.inf, np.nan, 1e-38, 7.25]


def floats(n=4096):
    """Return n floats, n a multiple of 16: all kinds of bits, ordinary ones, and specials."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 1 << 32, n // 2, dtype=np.uint32).view(np.float32)
    x = np.concatenate([bits, rng.standard_normal(n // 2).astype(np.float32)])
    places = rng.choice(n, n // 4, replace=False)
    x[places] = rng.choice(np.float32(SPECIALS), places.size)
    return x


def same(a, b):
    """Return whether floats are the same bits, or both NaN."""
    a, b = np.asarray(a), np.asarray(b)
    nan = np.isnan(a) & np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    return a.dtype == b.dtype and (nan | (a.view(np.uint32) == b.view(np.uint32))).all()


@pytest.fixture(autouse=True)
def _no_warnings():
    with np.errstate(all="ignore"):
        yield


def run(function, out, *arrays):
    """Call an intrinsic on vectors of eight, one after the other."""

    @jit
    def loop(out, a, b):
        for start in range(0, out.size, WIDTH):
            stop = start + WIDTH
            function(out[start:stop], a[start:stop], b[start:stop])

    loop(out, *arrays)
    return out


OPERATIONS = {
    "add": (lambda a, b: a + b, np.add),
    "subtract": (lambda a, b: a - b, np.subtract),
    "multiply": (lambda a, b: a * b, np.multiply),
    "divide": (lambda a, b: a / b, np.divide),
    "root": (lambda a, b: a.sqrt(), lambda a, b: np.sqrt(a)),
    "reciprocal": (lambda a, b: a.reciprocal(), lambda a, b: np.float32(1) / a),
    "constant": (lambda a, b: a * 0.1, lambda a, b: a * np.float32(0.1)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_float_operations_round_as_numpy(name):
    operation, expected = OPERATIONS[name]

    @on_lanes(WIDTH)
    def apply(out, a, b):
        out[0] = OPERATIONS[name][0](a[0], b[0])

    a, b = floats(), floats()[::-1].copy()
    assert same(run(apply, np.empty_like(a), a, b), expected(a, b))


BIT_OPERATIONS = {
    "and": (lambda a, b: a & b, lambda a, b: a & b),
    "or": (lambda a, b: a | b, lambda a, b: a | b),
    "xor": (lambda a, b: a ^ b, lambda a, b: a ^ b),
    "not": (lambda a, b: ~a, lambda a, b: ~a),
    "minus": (lambda a, b: -a, lambda a, b: -a),
    "sum": (lambda a, b: a + b, lambda a, b: a + b),
    "left": (lambda a, b: a << 5, lambda a, b: a << 5),
    "right": (lambda a, b: a >> 5, lambda a, b: a >> 5),
    "zeros in": (lambda a, b: a.unsigned_shift(5), lambda a, b: a.view(np.uint32) >> 5),
    "each its own": (
        lambda a, b: a.unsigned_shift(range(0, 16, 2)),
        lambda a, b: (a.view(np.uint32).reshape(-1, 8) >> np.arange(0, 16, 2)).reshape(-1),
    ),
    "negative": (lambda a, b: a.is_negative().mask(), lambda a, b: -(a < 0).astype(np.int32)),
    "not less": (lambda a, b: (a >= b).mask(), lambda a, b: -(a >= b).astype(np.int32)),
    "blend": (
        lambda a, b: a.blend(b, [0, 1] * 4),
        lambda a, b: np.where(np.arange(a.size) % 2, b, a),
    ),
}


@pytest.mark.parametrize("name", BIT_OPERATIONS)
def test_integer_operations_are_numpys(name):
    @on_lanes(WIDTH)
    def apply(out, a, b):
        out[0] = BIT_OPERATIONS[name][0](a[0], b[0])

    a, b = floats().view(np.int32), floats()[::-1].copy().view(np.int32)
    expected = BIT_OPERATIONS[name][1](a, b).astype(np.uint32).view(np.int32)
    assert same(run(apply, np.empty_like(a), a, b), expected)


RULES = {
    ">=": lambda x, limit: x >= limit,
    ">": lambda x, limit: x > limit,
    "not <": lambda x, limit: ~(x < limit),
}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", RULES)
def test_search_counts_the_limits_that_are_passed(bits, rule):
    limits = np.sort(np.random.default_rng(bits).standard_normal((1 << bits) - 1)).astype("f4")
    x = np.resize(np.concatenate([floats(), limits, np.nextafter(limits, 9, dtype="f4")]), 4608)

    @on_lanes(WIDTH, "b")
    def apply(out, a, b):
        out[0] = -b.search(bits, a[0], rule)

    found = np.empty(x.size, np.int32)
    _on_table(apply)(found, x, search_table(limits))
    assert np.array_equal(found, RULES[rule](x[:, None], limits).sum(axis=1))


def _on_table(function):
    @jit
    def loop(out, a, table):
        for start in range(0, out.size, WIDTH):
            function(out[start : start + WIDTH], a[start : start + WIDTH], table)

    return loop


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_looked_up_by_low_bits(bits, permute, monkeypatch):
    """With the machine's own instruction, and with choices that any machine has."""
    if permute and not simd.HAS_PERMUTE:
        pytest.skip("this machine has no AVX2")
    monkeypatch.setattr(simd, "HAS_PERMUTE", permute)
    levels = np.random.default_rng(0).standard_normal(1 << bits).astype(np.float32)
    codes = floats().view(np.int32)  # with anything above the bits that count

    @on_lanes(WIDTH, "b")
    def apply(out, a, b):
        out[0] = b.look_up_level(bits, a[0])

    y = np.empty(codes.size, np.float32)
    # compiled here and now, and not cached: the name does not tell which of the two it is
    _uncached(apply)(y, codes, level_table(levels))
    assert same(y, levels[codes & ((1 << bits) - 1)])


def _uncached(function):
    import numba

    def loop(out, a, table):
        for start in range(0, out.size, WIDTH):
            function(out[start : start + WIDTH], a[start : start + WIDTH], table)

    return numba.njit(loop)


def test_what_a_decorator_was_told_is_in_the_name():
    """By which kernels are known in the cache that close over it."""
    names = {lanes.packer(bits, rows)._defn.__qualname__ for bits in (2, 3) for rows in (32, 128)}
    assert len(names) == 4


def test_words_become_rows():
    @on_words
    def expand(words, tables, factor):
        return tables[0].look_up_level(3, words[0].unsigned_shift(range(0, 24, 3))) * factor

    @jit
    def rows(words, levels, y):
        for k in range(words.size):
            expand((words[k],), (levels,), np.float32(0.3), y, 8 * k)

    levels = np.random.default_rng(0).standard_normal(8).astype(np.float32)
    words = floats(512).view(np.int32)
    y = np.empty((words.size, 8), np.float32)
    rows(words, level_table(levels), y)
    codes = words.view(np.uint32)[:, None] >> np.arange(0, 24, 3, dtype=np.uint32) & 7
    assert same(y, levels[codes] * np.float32(0.3))


@cache
def _converters():
    @on_lanes(WIDTH)
    def to_half(out, a):
        out[0] = lanes.narrow(a[0])

    @jit
    def narrow(out, a):
        for start in range(0, out.size, WIDTH):
            to_half(out[start : start + WIDTH], a[start : start + WIDTH])

    @jit
    def widen(out, a):
        for start in range(0, out.size, lanes.LANES):
            lanes.widen(a[start : start + lanes.LANES], out[start : start + lanes.LANES])

    return narrow, widen


def test_binary16_becomes_float():
    narrow, widen = _converters()
    half = np.arange(1 << 16, dtype=np.int32)
    y = np.empty(half.size, np.float32)
    widen(y, half)
    assert same(y, half.astype(np.uint16).view(np.float16).astype(np.float32))


def test_floats_become_binary16():
    narrow, _ = _converters()
    middles = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    near = middles.view(np.uint32)[:, None] + np.uint32([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF])
    x = np.concatenate([floats(), near.reshape(-1).view(np.float32)])
    half = np.empty(x.size, np.int32)
    narrow(half, x)
    assert np.array_equal(half, numerics.fp16_bits(x).astype(np.int32))


@pytest.mark.parametrize("count", range(1, 17))
def test_rows_become_lanes_and_rows_again(count):
    x = np.random.default_rng(count).standard_normal((20, 48)).astype(np.float32)

    @jit
    def through(x, start, count, v, y):
        lanes.load(x, start, count, v)
        lanes.store(v, start, count, y)

    v, y = np.full(40 * lanes.LANES, 7, np.float32), np.zeros_like(x)
    through(x, 2, count, v, y)  # 40 of 48 values
    expected = np.zeros((lanes.LANES, 40), np.float32)
    expected[:count] = x[2 : 2 + count, :40]
    assert np.array_equal(v.reshape(40, lanes.LANES).T, expected)
    kept = np.zeros_like(x)
    kept[2 : 2 + count, :40] = expected[:count]
    assert np.array_equal(y, kept)


def test_butterflies_are_a_hadamard_transform():
    x = np.random.default_rng(0).integers(-9, 9, (16, 32)).astype(np.float32)
    v = np.ascontiguousarray(x.T).reshape(-1)

    @jit
    def transform(v):
        lanes.fwht(v)

    transform(v)
    h = np.array([[1.0]])
    for _ in range(5):
        h = np.block([[h, h], [h, -h]])
    expected = (x @ h.T).astype(np.float32) * np.float32(lanes.FACTOR)
    assert np.array_equal(v.reshape(32, 16).T, expected)
