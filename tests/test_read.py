"""Formats of forks whose text was read and never run: qvac-fabric's and vLLM's.

Nothing here proves that the forks write these bytes. `*.model.npz` has what a model of the same
text, written apart from this one, makes of smooth rows; what can be derived is derived.
"""

import numpy as np
import pytest
from conftest import VECTORS, vectors_path
from scipy import stats
from test_turbo import BACKENDS, backends, same

import tbq
from tbq.families import qvac, vllm
from tbq.numerics import MASK64, splitmix64, word_signs

MODELLED = [f for f in tbq.formats() if vectors_path(f).with_suffix(".model.npz").exists()]
modelled = pytest.mark.parametrize("fmt", MODELLED, ids=lambda fmt: fmt.label)


def load(fmt):
    with np.load(vectors_path(fmt).with_suffix(".model.npz")) as file:
        return {name: file[name] for name in file.files}


def test_every_file_is_compared_and_called_read():
    assert len(MODELLED) == len(list(VECTORS.rglob("*.model.npz"))) == 12
    assert {fmt.evidence for fmt in MODELLED} == {"read"}
    assert {fmt.dialect for fmt in MODELLED} == {"qvac", "vllm"}


@modelled
@backends
def test_two_readings_agree(fmt, backend):
    v = load(fmt)
    quantize, dequantize = BACKENDS[backend]
    assert np.array_equal(quantize(v["x"], fmt), v["packed"])
    assert same(dequantize(v["packed"], fmt), v["y"])


@modelled
def test_decoded_values_are_near(fmt, rng):
    """Within what a Gaussian loses to a quantiser of 3 or 4 bits."""
    x = rng.standard_normal((200, fmt.group_values)).astype(np.float32)
    y = tbq.dequantize(tbq.quantize(x, fmt), fmt, original=True)
    error = ((y - x) ** 2).sum() / (x**2).sum()
    bits = next(iter(fmt.codec.codes(np.zeros(1, fmt.block)).values()))[1].bit_length() - 1
    assert 0.9 * {3: 0.0345, 4: 0.0095}[bits] < error < 2.2 * {3: 0.0345, 4: 0.0095}[bits]


# --- qvac-fabric ---------------------------------------------------------------------------------


def xoshiro256(seed):
    """Yield the outputs of xoshiro256** whose state is four of splitmix64."""
    source = splitmix64(seed)
    s = [next(source) for _ in range(4)]

    def turned(x, k):
        return (x << k | x >> (64 - k)) & MASK64

    while True:
        yield turned(s[1] * 5 & MASK64, 7) * 9 & MASK64
        shifted = s[1] << 17 & MASK64
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= shifted
        s[3] = turned(s[3], 45)


@pytest.mark.parametrize(("width", "seed"), [(128, 137), (64, 139)])
def test_residual_signs_are_xoshiros(width, seed):
    numbers = xoshiro256(seed)
    expected = [1.0 if next(numbers) & 1 else -1.0 for _ in range(width)]
    assert word_signs(qvac.SIGNS[width]).tolist() == expected


@pytest.mark.parametrize("name", ["tbq3_0", "tbq4_0", "tbq3_0_64", "tbq4_0_64"])
def test_tbq_starts_with_the_bytes_of_pq(name, rng):
    fmt, plain = tbq.get_format(f"qvac:{name}"), tbq.get_format(f"qvac:{name.replace('tbq', 'pq')}")
    x = rng.standard_normal((9, fmt.group_values)).astype(np.float32)
    packed = tbq.quantize(x, fmt)
    assert np.array_equal(packed[:, : plain.block_bytes], tbq.quantize(x, plain))
    assert np.array_equal(
        tbq.dequantize(packed, fmt), tbq.dequantize(packed[:, : plain.block_bytes], plain)
    )


@pytest.mark.parametrize("name", ["tbq3_0", "tbq4_0", "tbq3_0_64", "tbq4_0_64"])
def test_residual_signs_and_norm_say_where_the_residual_lies(name, rng):
    """E[sign(g) g] is sqrt(2/pi): projected signs times the norm recover that share of it."""
    fmt = tbq.get_format(f"qvac:{name}")
    n = fmt.group_values
    x = rng.standard_normal((400, n)).astype(np.float32)
    packed = tbq.quantize(x, fmt)
    blocks = fmt.codec.blocks(packed)[:, 0]
    r = x - tbq.dequantize(packed, fmt)
    norm = np.linalg.norm(r, axis=1)
    assert np.allclose(blocks["d_r"], norm, rtol=2e-3)
    signs = np.unpackbits(blocks["qjl"], axis=1, bitorder="little") * 2.0 - 1
    hadamard = np.array([[(-1) ** (i & j).bit_count() for i in range(n)] for j in range(n)])
    guess = (signs @ hadamard) * word_signs(qvac.SIGNS[n]) * norm[:, None] / n
    share = (guess * r).sum() / (r**2).sum()
    assert share == pytest.approx(np.sqrt(2 / np.pi), abs=0.02)


def test_tiny_groups_of_qvac_are_zeros():
    for fmt in (f for f in tbq.formats() if f.dialect == "qvac"):
        x = np.zeros((3, fmt.group_values), np.float32)
        x[1], x[2, 5] = -0.0, 9e-16
        assert not tbq.quantize(x, fmt).any()
        codes = np.full((1, fmt.block_bytes), 0, np.uint8)
        y = tbq.dequantize(codes, fmt)
        assert not y.any()
        assert not np.signbit(y).any()
        x[2, 5] = 1.1e-15  # above, yet nothing as float16
        assert tbq.quantize(x, fmt)[2].any()


# --- vLLM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
def test_centroids_of_vllm_follow_its_rule(bits):
    """Lloyd-Max of N(0, 1/128), integrated by trapezoids that make the outermost cell coarse."""
    normal = stats.norm(scale=128**-0.5)
    reach = 3.5 * 128**-0.5
    c = reach * ((np.arange(2**bits) + 0.5) / 2 ** (bits - 1) - 1)
    for _ in range(200):
        edges = np.concatenate([[-3 * reach], (c[1:] + c[:-1]) / 2, [3 * reach]])
        v = np.linspace(edges[:-1], edges[1:], 201)
        density = normal.pdf(v)
        moved = np.trapezoid(v * density, v, axis=0) / np.trapezoid(density, v, axis=0)
        c, change = moved, np.abs(moved - c).max()
        if change < 1e-10:
            break
    assert np.allclose(c, vllm.CELLS[bits].levels, rtol=0, atol=2e-8)


@pytest.mark.parametrize("bits", [3, 4])
def test_decoded_keys_have_the_stored_norm(bits, rng):
    fmt = tbq.get_format(f"vllm:key{bits}")
    x = rng.standard_normal((50, 128)).astype(np.float32) * 3
    packed = tbq.quantize(x, fmt)
    stored = fmt.codec.blocks(packed)["norm"][:, 0].astype(np.float64)
    assert np.allclose(stored, np.linalg.norm(x, axis=1), rtol=1e-3)
    assert np.allclose(np.linalg.norm(tbq.dequantize(packed, fmt), axis=1), stored, rtol=1e-5)


@pytest.mark.parametrize("bits", [3, 4])
def test_values_lie_within_half_a_step(bits, rng):
    fmt = tbq.get_format(f"vllm:value{bits}")
    x = rng.standard_normal((50, 128)).astype(np.float32)
    packed = tbq.quantize(x, fmt)
    step = (x.max(axis=1) - x.min(axis=1)) / (2**bits - 1)
    off = np.abs(tbq.dequantize(packed, fmt) - x).max(axis=1)
    assert (off < 0.5 * step + 5e-3).all()
    codes, _ = fmt.codec.codes(fmt.codec.blocks(packed)[:, 0])["codes"]
    rows = np.arange(50)
    assert (codes[rows, x.argmin(axis=1)] == 0).all()
    assert (codes[rows, x.argmax(axis=1)] == 2**bits - 1).all()


def test_constant_values_are_their_minimum():
    for bits in (3, 4):
        x = np.full((2, 128), 1.5, np.float32)
        x[1] = 0
        y = tbq.dequantize(tbq.quantize(x, f"vllm:value{bits}"), f"vllm:value{bits}")
        assert np.array_equal(y, x)
