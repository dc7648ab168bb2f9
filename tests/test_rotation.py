"""Graph-level rotations."""

import numpy as np
import pytest
from scipy.linalg import hadamard

import tbq
from tbq.rotations import KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256, 576])
def test_rotation_is_the_matrix_it_says(kind, head_dim, rng):
    r = tbq.rotation(kind, head_dim)
    assert head_dim % r.size == 0
    assert r.size == (head_dim & -head_dim if kind == "hadamard" else 64)
    matrix = r.matrix.astype(np.float64)
    signs = np.diag(r.signs)
    assert np.allclose(matrix, signs @ hadamard(r.size) @ signs / np.sqrt(r.size), atol=1e-7)
    assert np.allclose(matrix, matrix.T)
    assert np.allclose(matrix @ matrix, np.eye(r.size), atol=1e-6)
    x = rng.standard_normal((3, 2 * head_dim)).astype(np.float32)
    y = r.forward(x)
    assert y.dtype == np.float32
    blocks = x.reshape(-1, r.size)
    assert np.allclose(y.reshape(-1, r.size), blocks @ matrix.T, atol=1e-4)
    assert np.allclose(r.inverse(y), x, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128, 512, 576])
def test_kernel_is_the_specification_to_the_bit(kind, head_dim, rng):
    r = tbq.rotation(kind, head_dim)
    x = rng.standard_normal((40, head_dim)).astype(np.float32) * np.float32(1e30)
    x[3, 5], x[4, 6], x[5], x[6] = np.inf, np.nan, 0.0, np.float32(1e-42)
    with np.errstate(all="ignore"):
        expected = r.forward_ref(x.reshape(-1, r.size)).reshape(x.shape)
    assert np.array_equal(r.forward(x), expected, equal_nan=True)
    assert np.array_equal(np.signbit(r.forward(x)[5:]), np.signbit(expected[5:]))
    assert r.forward(x[:0]).shape == (0, head_dim)
    assert np.array_equal(r.forward(x[::2, ::-1]), r.forward(x[::2, ::-1].copy()), equal_nan=True)


def test_dhd_signs_are_pinned():
    """The first signs of llama-tq's value rotation, worked out with Python integers."""
    expected = []
    for i in range(64):
        h = (0x56545121 ^ i) * 0x9E3779B9 % 2**32
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        expected.append(1.0 if h % 2 else -1.0)
    signs = tbq.rotation("dhd64", 128).signs
    assert signs.tolist() == expected
    assert 20 < (signs > 0).sum() < 44
    assert (tbq.rotation("hadamard64", 128).signs == 1).all()


def test_wrong_rotations():
    with pytest.raises(tbq.UnknownFormatError, match="hadamard"):
        tbq.rotation("hadamar", 128)
    for head_dim in (0, 80, -64):
        with pytest.raises(tbq.InputError, match="multiple of 64"):
            tbq.rotation("hadamard", head_dim)
    with pytest.raises(tbq.InputError, match="multiple of 128"):
        tbq.rotation("hadamard", 128).forward(np.zeros((2, 64), np.float32))
