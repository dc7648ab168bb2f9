"""Laws that only the llama-tq families have: signs, thresholds, the CUDA findings, pairs."""

import numpy as np
import pytest

import tbq
from tbq import nearest
from tbq.families import ktq, vtq
from tbq.kernels import lanes
from tbq.kernels.compile import jit
from tbq.kernels.simd import Lanes, Tables, on_lanes, search_table
from tbq.numerics import fnv1a, philox6

CPU_KEYS = [
    fmt for fmt in tbq.formats() if fmt.name.startswith("ktq") and fmt.dialect == "llama-tq"
]
CUDA_KEYS = [tbq.get_format(f"llama-tq-cuda:{fmt.name}") for fmt in CPU_KEYS]
ids = {"ids": lambda fmt: fmt.key}


def test_fnv1a_known_answers():
    """FNV-1a of four bytes, worked out with Python integers."""
    for word in (0, 1, 0x61626364, 0xFFFFFFFF):
        h = 2166136261
        for byte in word.to_bytes(4, "little"):
            h = (h ^ byte) * 16777619 % 2**32
        assert int(fnv1a(np.array(word))) == h


def test_philox6_is_six_rounds_of_multiply_and_xor():
    for counter, key in ((0, 0), (31, 0xFFFF), (63, 12345)):
        low, high = counter, key
        for i in range(1, 7):
            product = low * 0xD2511F53
            low, high = (product >> 32) ^ high ^ (0x9E3779B9 * i % 2**32), product % 2**32
        assert int(philox6(np.array(counter), np.array(key))) == low


def test_signs_follow_the_block_index():
    """Blocks of one row have different signs, equal blocks of two rows the same."""
    x = np.tile(np.arange(32, dtype=np.float32), (2, 4))
    blocks = tbq.quantize(x, "ktq2_1").reshape(2, 4, 14)
    assert np.array_equal(blocks[0], blocks[1])
    assert len({block[10:].tobytes() for block in blocks[0]}) == 4
    flat = tbq.quantize(x, "llama-tq-cuda:ktq2_1").reshape(8, 14)
    assert len({block[10:].tobytes() for block in flat}) == 8


@pytest.mark.parametrize("fmt", CUDA_KEYS, **ids)
def test_cuda_block_index_starts_where_it_is_told(fmt, rng):
    x = rng.standard_normal((6, 96)).astype(np.float32)
    whole = tbq.quantize(x, fmt)
    assert np.array_equal(tbq.quantize(x[2:], fmt, first_block=6), whole[2:])
    assert not np.array_equal(tbq.quantize(x[2:], fmt), whole[2:])
    assert np.array_equal(tbq.quantize(x.reshape(1, 6, 96), fmt)[0], whole)


@pytest.mark.parametrize("fmt", CUDA_KEYS, **ids)
def test_cuda_keys_come_back_negated(fmt, rng):
    """The finding: encode, then decode as that code does, and the result is the negative."""
    x = rng.standard_normal((200, 128)).astype(np.float32)
    y = tbq.dequantize(tbq.quantize(x, fmt), fmt)
    cosine = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert cosine < -0.7
    cpu = tbq.dequantize(tbq.quantize(x, fmt), f"llama-tq:{fmt.name}")
    assert np.array_equal(cpu, -y)
    assert "negative" in fmt.notes


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tables", [ktq.CODEBOOKS, vtq.CODEBOOKS], ids=["keys", "values"])
def test_thresholds_equal_the_search(bits, tables):
    """Around every threshold, on a fine grid and at random, |r| < 8: the index C would find."""
    centroids = tables[bits] * ktq.SCALE
    limits = nearest.thresholds(centroids, nearest.squared)
    near = [limits]
    for _ in range(50):
        near += [np.nextafter(near[-1], np.float32(9)), np.nextafter(near[0], np.float32(-9))]
        near[0], near[-1] = near[-1], near[-2]
    grid = np.linspace(-8, 8, 2_000_001, dtype=np.float32)
    fine = np.linspace(-0.6, 0.6, 1_000_001, dtype=np.float32)
    tiny = np.float32([0, -0.0, 1e-45, -1e-45, 1e-30, np.nan])
    r = np.concatenate([*near, grid, fine, tiny])
    assert np.array_equal(count(r, limits), ktq.nearest(r, centroids))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_absolute_thresholds_equal_the_search(bits):
    centroids = vtq.CODEBOOKS[bits] * ktq.SCALE
    limits = nearest.thresholds(centroids, nearest.absolute)
    r = np.linspace(-8, 8, 1_000_001, dtype=np.float32)
    r = np.concatenate([r, limits, np.nextafter(limits, np.float32(-9)), np.float32([0.0, -0.0])])
    expected = np.abs(r[:, None] - centroids).argmin(axis=1)
    assert np.array_equal(count(r, limits), expected)


def count(r, limits):
    """Return how many limits are not above r, as the kernels count."""
    size = lanes.SIZE
    padded = np.zeros(-(-r.size // size) * size, np.float32)
    padded[: r.size] = r
    codes = np.empty(padded.size, np.int32)
    _count(padded, search_table(limits), codes)
    return codes[: r.size]


@jit
def _count(r, limits, codes):
    for start in range(0, r.size, lanes.SIZE):
        own = codes[start : start + lanes.SIZE]
        if limits.shape[0] == 1:
            count1(r[start : start + lanes.SIZE], limits, own)
        elif limits.shape[0] == 2:
            count2(r[start : start + lanes.SIZE], limits, own)
        elif limits.shape[0] == 3:
            count3(r[start : start + lanes.SIZE], limits, own)
        else:
            count4(r[start : start + lanes.SIZE], limits, own)


def counter(bits):
    @on_lanes(lanes.LANES, "limits", times=4, r=8, codes=8)
    def find(r: Lanes, limits: Tables, codes: Lanes) -> None:
        for i in range(8):
            codes[i] = -limits.search(bits, r[i], ">=")

    return find


count1, count2, count3, count4 = (counter(bits) for bits in (1, 2, 3, 4))


def test_normalised_values_stay_below_eight():
    """The bound the thresholds rely on, where squares underflow and norms come out too small."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for scale in np.float32(2.0) ** np.arange(-80, -70, 0.25, dtype=np.float32):
        x = (scale * rng.choice([0.5, 0.99, 1.0, 1.01, 2.0], (500, 32))).astype(np.float32)
        norm = np.sqrt((x * x).sum(axis=1, dtype=np.float32))
        h = x[norm >= 1e-30] / norm[norm >= 1e-30, None]
        worst = max(worst, np.abs(h).sum(axis=1).max(initial=0) / np.sqrt(32))
    assert 1 < worst < 8


def test_mixed_writes_its_last_code_into_the_padding_byte(rng):
    x = rng.standard_normal((64, 32)).astype(np.float32)
    packed = tbq.quantize(x, "vtq_mixed")
    assert set(np.unique(packed[:, 11])) == {0, 1, 2, 3}
    assert not (packed[:, 5] & 3).any()  # slot 0 is never used
    last = packed.copy()
    last[:, 11] ^= 3
    changed = tbq.dequantize(last, "vtq_mixed") != tbq.dequantize(packed, "vtq_mixed")
    assert changed[:, 31].all()
    assert not changed[:, :31].any()


def test_padding_is_zero(rng):
    x = rng.standard_normal((64, 32)).astype(np.float32)
    for name in ("vtq3_1", "llama-tq-cuda:vtq3_1", "xktq2_1"):
        fmt = tbq.get_format(name)
        out = np.full((64, fmt.block_bytes), 0xAA, np.uint8)
        assert not tbq.quantize(x, fmt, out=out).view(fmt.block)["pad"].any()


def test_negative_scales_decode_to_zero():
    """A negative d is below 1e-30, so C takes the block for empty."""
    for name in ("ktq2_1", "vtq2_1", "vtq_mixed"):
        fmt = tbq.get_format(name)
        blocks = np.zeros(1, fmt.block)
        blocks["d"], blocks["qs"] = -1.0, 0xFF
        y = tbq.dequantize(blocks.view(np.uint8).reshape(1, -1), fmt)
        assert y.view(np.uint32).sum() == 0


def test_pairs(rng):
    x, other = rng.standard_normal((2, 5, 3, 64)).astype(np.float32)
    sibling = tbq.quantize(other, "ktq2_1")
    packed = tbq.quantize_paired(x, sibling)
    y = tbq.dequantize_paired(packed, sibling, threads=2)
    assert packed.shape == (5, 3, 16)
    blocks = y.reshape(-1, 32)
    assert np.allclose(
        np.linalg.norm(blocks, axis=1), np.linalg.norm(x.reshape(-1, 32), axis=1), rtol=2e-3
    )
    lent = tbq.dequantize(sibling, "ktq2_1").reshape(-1, 32)
    cosine = (lent * blocks).sum(1) / np.linalg.norm(lent, axis=1) / np.linalg.norm(blocks, axis=1)
    assert np.allclose(cosine, 1, atol=1e-5)
    assert not tbq.dequantize(tbq.quantize(x, "xktq2_1"), "xktq2_1").any()
    out, y_out = np.empty_like(packed), np.empty_like(y)
    assert tbq.quantize_paired(x.astype(np.float64), sibling, out=out) is out
    assert tbq.dequantize_paired(packed[..., ::1], sibling, out=y_out) is y_out
    assert np.array_equal(out, packed)
    assert np.array_equal(y_out, y)


def test_pairs_need_their_sibling():
    x = np.zeros((2, 64), np.float32)
    good = tbq.quantize(x, "ktq2_1")
    for bad in (good[:1], good[:, :14], good.astype(np.int16), tbq.quantize(x, "ktq4_1")):
        with pytest.raises(tbq.InputError, match=r"sibling: .*packed llama-tq:ktq2_1 rows"):
            tbq.quantize_paired(x, bad)
    packed = tbq.quantize_paired(x, good)
    with pytest.raises(tbq.InputError, match="sibling"):
        tbq.dequantize_paired(packed, good[:, :14])
    with pytest.raises(tbq.InputError, match="uint8"):
        tbq.dequantize_paired(packed.astype(np.int8), good)
