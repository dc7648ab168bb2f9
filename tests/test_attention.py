"""scores and weighted_sum: the specification to the bit, and close to float64 on decoded values."""

import numpy as np
import pytest
from conftest import FORMATS
from hypothesis import given
from hypothesis import strategies as st

import tbq
from tbq import CorruptBlockError, InputError
from tbq.attention import scores_ref, weighted_sum_ref

KEYS = [f for f in FORMATS if "K" in f.side]
VALUES = [f for f in FORMATS if "V" in f.side]
WITH_CODES = [f for f in KEYS if not f.sibling]
by_key = {"ids": lambda fmt: fmt.label}
EPSILON = 2.0**-24


def packed_rows(fmt, rng, keys=5, blocks=3):
    x = rng.standard_normal((keys, blocks * fmt.group_values)).astype(np.float32)
    return tbq.quantize(x * np.float32(3), fmt)


def bound(fmt, n, a, b):
    """Bound what float32 rounding can do to sum a*b: so many roundings, each of the norms' product.

    n products and additions, and per value at most 128 + 8 of either to rotate by Q.
    """
    return (n + 300) * EPSILON * np.linalg.norm(a) * np.linalg.norm(b)


@pytest.mark.parametrize("fmt", WITH_CODES, **by_key)
def test_scores_are_the_specification_to_the_bit(fmt, rng):
    packed = packed_rows(fmt, rng)
    q = rng.standard_normal((3, 3 * fmt.group_values)).astype(np.float32)
    assert np.array_equal(tbq.scores(q, packed, fmt), scores_ref(q, packed, fmt))


@pytest.mark.parametrize("fmt", VALUES, **by_key)
def test_weighted_sums_are_the_specification_to_the_bit(fmt, rng):
    packed = packed_rows(fmt, rng)
    p = rng.random((3, 5), dtype=np.float32)
    assert np.array_equal(tbq.weighted_sum(p, packed, fmt), weighted_sum_ref(p, packed, fmt))


@pytest.mark.parametrize("fmt", WITH_CODES, **by_key)
def test_scores_are_close_to_float64_on_decoded_keys(fmt, rng):
    packed = packed_rows(fmt, rng, keys=40)
    q = rng.standard_normal((4, 3 * fmt.group_values)).astype(np.float32)
    y = tbq.dequantize(packed, fmt, original=True).astype(np.float64)
    found, exact = tbq.scores(q, packed, fmt), q.astype(np.float64) @ y.T
    for i in range(4):
        for t in range(40):
            assert abs(found[i, t] - exact[i, t]) <= bound(fmt, y.shape[1], q[i], y[t])


@pytest.mark.parametrize("fmt", VALUES, **by_key)
def test_weighted_sums_are_close_to_float64_on_decoded_values(fmt, rng):
    packed = packed_rows(fmt, rng, keys=40)
    p = rng.dirichlet(np.ones(40), 3).astype(np.float32)
    y = tbq.dequantize(packed, fmt).astype(np.float64)
    found, exact = tbq.weighted_sum(p, packed, fmt), p.astype(np.float64) @ y
    # rotating back mixes the sums of a block, so the error is that of the whole row
    limit = bound(fmt, 40, p, y)
    assert np.abs(found - exact).max() <= limit


def test_weights_are_summed_in_runs_of_512_keys(rng):
    fmt = tbq.get_format("vtq3_1")
    packed = np.resize(packed_rows(fmt, rng, keys=9, blocks=1), (1300, fmt.block_bytes))
    p = rng.random((2, 1300), dtype=np.float32)
    found = tbq.weighted_sum(p, packed, fmt)
    assert np.array_equal(found, weighted_sum_ref(p, packed, fmt))
    y = tbq.dequantize(packed, fmt)
    total = np.zeros((2, 32), np.float32)
    for start in (0, 512, 1024):
        partial = np.zeros((2, 32), np.float32)
        for t in range(start, min(start + 512, 1300)):
            partial += p[:, t, None] * y[t]
        total += partial
    assert np.array_equal(found, total)


def test_borrowed_codes(rng):
    lender, fmt = tbq.get_format("ktq2_1"), tbq.get_format("xktq2_1")
    x, lent = rng.standard_normal((2, 6, 96)).astype(np.float32)
    sibling = tbq.quantize(lent, lender)
    packed = tbq.quantize_paired(x, sibling)
    q = rng.standard_normal((2, 96)).astype(np.float32)
    y = tbq.dequantize_paired(packed, sibling).astype(np.float64)
    found = tbq.scores(q, packed, fmt, sibling=sibling)
    assert np.abs(found - q @ y.T).max() <= bound(fmt, 96, q, y)
    with pytest.raises(InputError, match="sibling: got none"):
        tbq.scores(q, packed, fmt)
    with pytest.raises(InputError, match="codes of its own"):
        tbq.scores(q, sibling, lender, sibling=sibling)
    with pytest.raises(InputError, match="uint8 array of shape"):
        tbq.scores(q, packed, fmt, sibling=sibling[:3])


@given(st.data())
def test_shapes_and_chunks_change_nothing(data):
    fmt = data.draw(st.sampled_from(KEYS[:3] + VALUES[:3]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    packed = packed_rows(fmt, rng, keys=9, blocks=2)
    lead = data.draw(st.sampled_from([(), (1,), (2, 3), (0,)]))
    is_key = "K" in fmt.side
    width = 2 * fmt.group_values if is_key else 9
    x = rng.standard_normal((*lead, width)).astype(data.draw(st.sampled_from(["f4", "f2", "f8"])))
    run = tbq.scores if is_key else tbq.weighted_sum
    found = run(x, packed, fmt)
    assert found.shape == (*lead, 9 if is_key else 2 * fmt.group_values)
    assert found.dtype == np.float32
    flat = x.reshape(-1, width)
    one_by_one = [run(row, packed, fmt) for row in flat]
    assert all(
        np.array_equal(a, b)
        for a, b in zip(found.reshape(len(flat), found.shape[-1]), one_by_one, strict=True)
    )
    from tbq import attention

    before, attention.CHUNK_VALUES = attention.CHUNK_VALUES, 700
    try:
        assert np.array_equal(run(x, packed, fmt), found)
    finally:
        attention.CHUNK_VALUES = before


def test_specials_reach_the_result(rng):
    fmt = tbq.get_format("tbq3_0")
    packed = packed_rows(fmt, rng, keys=4, blocks=1)
    packed.view(fmt.block)["d"][:, 0] = [np.inf, np.nan, 0, 1]
    s = tbq.scores(np.ones(256, np.float32), packed, fmt)
    assert not np.isfinite(s[:2]).any()
    assert s[2] == 0
    assert np.isfinite(s[3])


def test_wrong_calls(rng):
    keys = packed_rows(tbq.get_format("ktq2_1"), rng)
    values = packed_rows(tbq.get_format("vtq2_2"), rng)
    for call, words in (
        (lambda: tbq.scores(np.ones(384, "f4"), values, "vtq2_2"), "a format for K"),
        (lambda: tbq.weighted_sum(np.ones(5, "f4"), keys, "ktq2_1"), "a format for V"),
        (lambda: tbq.scores(np.ones(95, "f4"), keys, "ktq2_1"), "q: got rows of 95"),
        (lambda: tbq.weighted_sum(np.ones(4, "f4"), values, "vtq2_2"), "p: got 4 weights"),
        (lambda: tbq.scores(np.ones(96, int), keys, "ktq2_1"), "q: got dtype"),
        (lambda: tbq.scores(np.ones(96, "f4"), keys[0], "ktq2_1"), "two axes"),
        (lambda: tbq.scores(np.ones(96, "f4"), keys[:, :-1], "ktq2_1"), "packed row length"),
    ):
        with pytest.raises(InputError, match=words):
            call()
    corrupt = packed_rows(tbq.get_format("vtq2_3"), rng)
    corrupt.view(tbq.get_format("vtq2_3").block)["pos"][2, 1, 0] = 200
    with pytest.raises(CorruptBlockError, match="block 7"):
        tbq.weighted_sum(np.ones(5, "f4"), corrupt, "vtq2_3")
