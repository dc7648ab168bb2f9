"""Each format's error on Gaussian vectors is what theory says, neither more nor less."""

import numpy as np
import pytest
from scipy import integrate, stats

import tbq
from tbq.families import pr21089
from tbq.metrics import Distortion

D = 256


def unit_coordinate_density(v):
    """The density of sqrt(D) times a coordinate of a random unit vector."""
    return stats.beta.pdf((v / np.sqrt(D) + 1) / 2, (D - 1) / 2, (D - 1) / 2) / (2 * np.sqrt(D))


def cell_error(bits):
    """Mean squared error per coordinate of a codebook with its boundaries."""
    edges = np.concatenate([[-np.sqrt(D)], pr21089.BOUNDARIES[bits], [np.sqrt(D)]])
    return sum(
        integrate.quad(lambda v, c=c: (v - c) ** 2 * unit_coordinate_density(v), a, b)[0]
        for c, a, b in zip(pr21089.CODEBOOKS[bits], edges[:-1], edges[1:], strict=True)
    )


@pytest.mark.parametrize(
    ("name", "bits", "quoted"), [("tbq3_0", 3, 0.03426), ("tbq4_0", 4, 0.00941)]
)
def test_tbq_distortion(name, bits, quoted):
    theory = cell_error(bits)
    assert theory == pytest.approx(quoted, rel=0.01)
    x = np.random.default_rng(1).standard_normal((4000, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    error = ((x - tbq.dequantize(tbq.quantize(x, name), name)) ** 2).sum(axis=1)
    assert abs(error.mean() - theory) < 4 * error.std() / np.sqrt(len(error))


@pytest.mark.parametrize("bits", [3, 4])
def test_tbq_codebook_is_lloyd_max_for_the_normal_distribution(bits):
    """Every centroid is the mean of its cell, every boundary the middle, to the digits given."""
    codebook, inner = pr21089.CODEBOOKS[bits], pr21089.BOUNDARIES[bits]
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    mass = np.diff(stats.norm.cdf(edges))
    means = -np.diff(stats.norm.pdf(edges)) / mass
    assert np.abs(means - codebook).max() < 2e-4
    assert np.abs((codebook[1:] + codebook[:-1]) / 2 - inner).max() < 2e-4


def test_distortion_accumulates():
    x = np.random.default_rng(2).standard_normal(1000)
    y = x + 0.1
    whole, parts = Distortion(), Distortion()
    whole.add(x, y)
    for i in range(0, 1000, 300):
        parts.add(x[i : i + 300], y[i : i + 300])
    assert parts.relative_mse == pytest.approx(((x - y) ** 2).sum() / (x**2).sum())
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.count == 1000


def test_distortion_of_zeros_and_specials():
    zero, some = Distortion(), Distortion()
    zero.add(np.zeros(4), np.zeros(4))
    assert (zero.relative_mse, zero.cosine) == (0.0, 1.0)
    some.add(np.zeros(4), np.array([0.0, np.inf, np.nan, 1.0]))
    assert (some.nonfinite_original, some.nonfinite_decoded) == (0, 2)
