"""q6_0 and q8_KV of ik_llama.cpp."""

import numpy as np
import pytest
from conftest import VECTORS
from test_turbo import BACKENDS, backends, same

import tbq

Q6_0 = "ik_llama:q6_0"
Q8_KV = "ik_llama:q8_KV"


def load(name):
    with np.load(VECTORS / "ik_llama" / name) as file:
        return {key: file[key] for key in file.files}


# --- q6_0 ----------------------------------------------------------------------------------------


@backends
def test_arbitrary_bytes_decode_as_the_forks_code_decodes_them(backend):
    v = load("q6_0.npz")
    assert same(BACKENDS[backend][1](v["dec_packed"], tbq.get_format(Q6_0)), v["dec_y"])


def test_refined_scales_are_better_than_the_largest_values(rng):
    x = rng.standard_normal((2000, 32)).astype(np.float32)
    fmt = tbq.get_format(Q6_0)
    plain = next(codec for bug, _, codec in fmt.codec.mutants() if bug == "scale not refined")
    y = tbq.dequantize(tbq.quantize(x, fmt), fmt)
    y_plain = plain.dequantize(plain.quantize(x, np.zeros(len(x), int)))

    def error(found):
        """Weighted by the squares of values, which is what is minimised."""
        return (x**2 * (found - x) ** 2).sum()

    assert error(y) < 0.99 * error(y_plain)


def test_the_largest_value_is_the_lowest_code(rng):
    x = rng.standard_normal((100, 32)).astype(np.float32)
    codec = tbq.get_format(Q6_0).codec
    codes, _ = codec.codes(codec.blocks(tbq.quantize(x, Q6_0)).reshape(-1))["codes"]
    assert (codes[np.arange(100), np.abs(x).argmax(axis=1)] == 0).all()


# --- q8_KV ---------------------------------------------------------------------------------------


@backends
def test_arbitrary_rows_decode_as_the_forks_code_decodes_them(backend):
    v = load("q8_KV.npz")
    assert same(BACKENDS[backend][1](v["dec_packed"], tbq.get_format(Q8_KV)), v["dec_y"])


@pytest.mark.parametrize("n", [32, 64, 96, 4096])
def test_kernels_equal_specification_on_rows_of_any_width(n, rng):
    x = rng.standard_normal((40, n)).astype(np.float32)
    x *= rng.choice([1e-44, 1e-38, 1.0, 2e37], (40, 1)).astype(np.float32)
    x[rng.random(x.shape) < 0.5 / n] = np.nan
    x[rng.random(x.shape) < 0.5 / n] = np.inf
    fmt = tbq.get_format(Q8_KV)
    packed = fmt.codec.quantize_rows(x)
    assert np.array_equal(tbq.quantize(x, fmt), packed)
    scrambled = rng.integers(0, 256, packed.shape, np.uint8)
    for rows in (packed, scrambled):
        assert same(tbq.dequantize(rows, fmt), fmt.codec.dequantize_rows(rows))


def test_the_sum_is_that_of_the_codes(rng):
    x = rng.standard_normal((20, 96)).astype(np.float32)
    packed = tbq.quantize(x, Q8_KV)
    stored = packed[:, 4:8].copy().view("<i4")[:, 0]
    assert np.array_equal(stored, packed[:, 8:].view(np.int8).sum(axis=1, dtype=np.int32))
    assert np.array_equal(np.abs(packed[:, 8:].view(np.int8)).max(axis=1), np.full(20, 127))
