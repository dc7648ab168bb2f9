"""planar and iso of Excidos: rotations of two and of four values."""

import hashlib

import numpy as np
import pytest
from conftest import vectors_path
from test_turbo import BACKENDS, backends, same

import tbq
from tbq.families import planar

NAMES = ("planar3_0", "iso3_0", "planar4_0", "iso4_0")
SHA256 = {
    "planar": "7c2c162032150bc7ff2a8097b5863778c792d48abc28c3c69145a7db00c349a0",
    "iso": "c2f78535a1209646a1d8a081deb82b97521931faf8a03c06279b466a4711e5cd",
}
every = pytest.mark.parametrize("name", NAMES)


def load(fmt):
    with np.load(vectors_path(fmt)) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture
def own(name):
    return tbq.get_format(f"excidos-cpu:{name}")


@every
@backends
def test_arbitrary_bytes_decode_as_the_forks_code_decodes_them(own, backend):
    v = load(own)
    assert same(BACKENDS[backend][1](v["dec_packed"], own), v["dec_y"])


@pytest.mark.parametrize("kind", SHA256)
def test_tables_are_what_they_were(kind):
    table = planar.ROTATIONS[kind]
    assert hashlib.sha256(table.astype("<f4").tobytes(order="C")).hexdigest() == SHA256[kind]
    assert np.abs((table.astype(np.float64) ** 2).sum(axis=1) - 1).max() < 2e-7


@every
def test_rotations_are_orthogonal_and_mix_only_their_parts(own, name):
    parts = 2 if name.startswith("planar") else 4
    m = own.codec.rotate(np.eye(128, dtype=np.float32), None).astype(np.float64)
    assert np.abs(m @ m.T - np.eye(128)).max() < 1e-6
    place = np.arange(128) // parts
    assert not m[place[:, None] != place].any()
    assert np.linalg.det(m) == pytest.approx(1, abs=1e-4)


def test_iso_multiplies_quaternions_from_the_left():
    """i j = k: a unit i turns j into k and k into -j, 1 into i and i into -1."""
    i = np.tile(np.array([0, 1, 0, 0], np.float32), (32, 1))
    unit = np.zeros((4, 128), np.float32)
    unit[range(4), range(4)] = 1
    turned = planar.turn(i, unit)[:, :4]
    assert np.array_equal(turned, [[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1], [0, 0, -1, 0]])


@every
def test_nan_costs_only_what_it_is_mixed_with(own, name, rng):
    x = rng.standard_normal((1, 128)).astype(np.float32)
    x[0, 50] = np.nan
    packed = tbq.quantize(x, own)
    codes, _ = own.codec.codes(own.codec.blocks(packed)[:, 0])["codes"]
    assert not codes[0, 50 : 52 if name.startswith("planar") else 51].any()
    assert np.isnan(tbq.dequantize(packed, own)).all()  # by its norm


@every
def test_half_way_between_centroids_the_lower_one_is_taken(own):
    """The zero vector: all coordinates lie half-way between the innermost centroids."""
    codes, count = own.codec.codes(
        own.codec.blocks(tbq.quantize(np.zeros((1, 128), np.float32), own))[:, 0]
    )["codes"]
    assert (codes == count // 2 - 1).all()
