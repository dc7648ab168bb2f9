"""AmesianX' formats and pr21089's first tbqp, which keep signs of a residual.

Every row of every vector file, by the specification and by the kernels.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from conftest import vectors_path
from scipy import integrate, stats
from test_turbo import (
    BACKENDS,
    backends,
    check_kernels,
    check_levels,
    check_rotation,
    quantize_spec,
    same,
)

import tbq
from tbq.families import amesianx, dense, pr21089, pr21089_first
from tbq.registry import meaning

FAMILIES = {module.__name__ for module in (amesianx, pr21089_first)}
FORMATS = [
    variant
    for fmt in tbq.formats()
    if type(fmt.codec).__module__ in FAMILIES
    for variant in fmt.variants()
]
PROVEN = [fmt for fmt in FORMATS if fmt.evidence == "vectors"]
EXECUTED = [f for f in PROVEN if f.dialect == "pr21089" or f.name in ("tbq3_2", "tbq4_2")]
every = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
proven = pytest.mark.parametrize("fmt", PROVEN, ids=lambda fmt: fmt.label)


def load(fmt):
    with np.load(vectors_path(fmt)) as file:
        return {name: file[name] for name in file.files}


def variant(name, head_dim=None):
    return tbq.get_format(f"amesianx:{name}").at(head_dim=head_dim)


# --- the forks' bytes ----------------------------------------------------------------------------


def test_every_file_is_read():
    assert len(PROVEN) == 28
    assert len(EXECUTED) == 4


@proven
@backends
def test_quantize(fmt, backend):
    v = load(fmt)
    packed = BACKENDS[backend][0](v["x"], fmt)
    bad = (packed != v["packed"]).any(axis=1)
    assert not bad.any(), sorted(set(v["category"][bad].tolist()))


@pytest.mark.parametrize("fmt", EXECUTED, ids=lambda fmt: fmt.label)
@backends
@pytest.mark.parametrize("written", ["packed", "dec_packed"])
def test_decoders_that_were_run(fmt, backend, written):
    """`packed` is what the encoder wrote, `dec_packed` arbitrary bytes."""
    v = load(fmt)
    assert same(BACKENDS[backend][1](v[written], fmt), v[written.replace("packed", "y")])


@pytest.mark.parametrize("fmt", [f for f in PROVEN if f not in EXECUTED], ids=lambda fmt: fmt.label)
@backends
def test_decoders_that_are_models(fmt, backend):
    v = load(fmt)
    y = BACKENDS[backend][1](v["packed"], fmt)
    if "y_model" in v:
        assert same(y, v["y_model"])
    else:
        assert fmt.name == "amx3_1"
        assert same(y, tbq.dequantize(v["packed"][:, :50], "amesianx:tbq3_1"))


# --- kernels against the specification -----------------------------------------------------------


@every
@pytest.mark.parametrize("groups", [1, 2, 3, 7, 8, 9, 15, 16, 17, 33])
def test_kernels_equal_specification(fmt, groups, rng):
    """Whole and broken tiles."""
    check_kernels(fmt, groups, rng)


@every
def test_rotation_is_undone(fmt, rng):
    check_rotation(fmt.codec, rng)


@every
def test_levels_are_decoded_values_before_they_are_rotated_back(fmt, rng):
    check_levels(fmt, rng)


# --- what the formats have to do with each other -------------------------------------------------


def test_amxv3_1_is_tbq3_1_by_another_name():
    assert variant("amxv3_1").codec == variant("tbq3_1").codec


def test_amx3_1_starts_with_tbq3_1(rng):
    x = rng.standard_normal((5, 256)).astype(np.float32)
    pairs = tbq.quantize(x, "amesianx:amx3_1").reshape(10, 108)
    assert np.array_equal(pairs[:, :50], tbq.quantize(x, "amesianx:tbq3_1").reshape(10, 50))


@pytest.mark.parametrize("name", ["tbq3", "tbq4", "tbqp3", "tbqp4"])
def test_latent_vectors_are_blocks_of_wide_heads(name, rng):
    x = rng.standard_normal((4, 576)).astype(np.float32)
    rope = x[:, 512:].astype(np.float16).view(np.uint8)
    for fmt, head_dim in ((variant(f"{name}_4"), 512), (f"amesianx@v1.5.3:{name}_4", 256)):
        packed = tbq.quantize(x, fmt)
        blocks = tbq.quantize(x[:, :512], f"amesianx:{name}_0", head_dim=head_dim)
        assert np.array_equal(packed[:, : blocks.shape[1]], blocks)
        assert np.array_equal(packed[:, blocks.shape[1] :], rope)


def test_phases_depend_on_the_cell(rng):
    """Those of pairs that turn fast above all, and the first 52 bytes not at all."""
    x = rng.standard_normal((6, 256)).astype(np.float32)
    packed = tbq.quantize(x, "amesianx:amx3_1")
    assert np.array_equal(packed[2:], tbq.quantize(x[2:], "amesianx:amx3_1", first_block=2))
    moved = tbq.quantize(x[2:], "amesianx:amx3_1").reshape(-1, 108)
    differ = (moved != packed[2:].reshape(-1, 108)).any(axis=0)
    assert not differ[:52].any()
    assert differ[76:80].all()


def test_polar_pairs_are_the_values_before_their_position(rng):
    """Radius and phase, turned by the position, are the pairs again, to the size of their cells."""
    codec, cell = variant("amx3_1").codec, np.array([777])
    x = rng.standard_normal((1, 128)).astype(np.float32)
    blocks = codec.quantize(x, cell)
    codes = codec.codes(blocks)
    r = float(blocks["d_r"][0]) * np.array(amesianx.RADII)[codes["radii"][0][0]]
    phi = (codes["phases"][0][0] + 0.5) * np.pi / 8 - np.pi
    pairs = r * np.exp(1j * (phi + 777 * 1e6 ** (-np.arange(64) / 64)))
    keys = x[0, :64] + 1j * x[0, 64:]
    likeness = np.abs(np.vdot(pairs, keys)) / np.linalg.norm(pairs) / np.linalg.norm(keys)
    assert likeness > 0.95
    codes = codec.codes(codec.quantize(x, cell + 1))
    assert (codes["phases"][0][0, :8] * np.pi / 8 - np.pi != phi[:8]).any()


# --- tables --------------------------------------------------------------------------------------


def test_tables_are_those_of_the_pull_request():
    for cells in (amesianx.CELLS, pr21089_first.CELLS):
        assert np.array_equal(cells[3].levels, pr21089.CODEBOOKS[3])
        assert np.array_equal(cells[3].edges, pr21089.BOUNDARIES[3])
    assert np.array_equal(amesianx.CELLS[4].levels, pr21089.CODEBOOKS[4])
    assert np.array_equal(amesianx.CELLS[4].edges, pr21089.BOUNDARIES[4])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_are_lloyd_max_for_the_normal_distribution(bits):
    """Every centroid is the mean of its cell, every boundary the middle, to the digits given."""
    levels, inner = amesianx.CELLS[bits].levels, amesianx.CELLS[bits].edges
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    means = -np.diff(stats.norm.pdf(edges)) / np.diff(stats.norm.cdf(edges))
    assert np.abs(means - levels).max() < 2e-4
    assert np.abs((levels[1:] + levels[:-1]) / 2 - inner).max() < 2e-4


def test_sign_bytes():
    signs, projected = amesianx.SIGNS, amesianx.PROJECTED_SIGNS
    assert [len(signs[n]) for n in (64, 128, 256, 512)] == [16, 32, 64, 128]
    assert signs[512] == signs[256] + projected[256]
    assert all(signs[512].startswith(digits) for digits in signs.values())
    assert "".join(amesianx.TWICE) == signs[128]
    assert len(projected[512]) == 128
    first = amesianx.byte_signs(signs[64])[:8]
    assert first.tolist() == [-1, -1, -1, 1, 1, -1, 1, -1]  # a7, low bit first


def test_dense_matrices():
    """Their SHA-256 is checked where they are built; Q is orthogonal, S is Gaussian."""
    q = dense.qr_rotation(256).astype(np.float64)
    assert np.abs(q @ q.T - np.eye(256)).max() < 1e-4
    s = dense.gaussian_matrix()
    assert hashlib.sha256(s.astype("<f4").tobytes()).hexdigest() == dense.S_SHA256
    assert stats.kstest(s.reshape(-1), "norm").pvalue > 1e-3


def test_frequencies_are_powers():
    expected = 1e6 ** (-np.arange(64) / 64)
    assert np.allclose(amesianx.frequencies(), expected, rtol=1e-6)


# --- errors --------------------------------------------------------------------------------------


def moments(bits, n):
    """Return the mean square and the mean size of what cells leave of a coordinate.

    Coordinates are those of random vectors of n values and length sqrt(n).
    """
    cells, root, half = amesianx.CELLS[bits], np.sqrt(n), (n - 1) / 2
    edges = np.concatenate([[-root], cells.edges, [root]]).astype(float)
    square = size = 0.0
    for c, a, b in zip(cells.levels.astype(float), edges[:-1], edges[1:], strict=True):

        def mean(power, c=c, a=a, b=b):
            def weighted(v):
                return abs(v - c) ** power * stats.beta.pdf((v / root + 1) / 2, half, half)

            return integrate.quad(weighted, a, b)[0] / (2 * root)

        square, size = square + mean(2), size + mean(1)
    return square, size


def theory(codec):
    """Return the relative squared error to be expected of Gaussian vectors.

    Signs of an orthogonal projection estimate the residual with an error of pi/2 - 1 of its square,
    those of a Gaussian one with pi/2; signs of the residual itself leave the variance of its size,
    taken of so many values.
    """
    n = codec.group_values
    square, size = moments(codec.cells.bits, n)
    if isinstance(codec, pr21089_first.DenseResidual):
        return np.pi / 2 * square
    if codec.residual is None:
        return square
    projected = (np.pi / 2 - 1) * square
    return projected if codec.residual.projected else (square - size**2) * (1 - 1 / n)


WITH_CELLS = [f for f in FORMATS if hasattr(f.codec, "cells") and f.name != "amx3_1"]


@pytest.mark.parametrize("fmt", WITH_CELLS, ids=lambda fmt: fmt.label)
def test_error_is_what_theory_says(fmt, rng):
    x = rng.standard_normal((1 << 19) // fmt.group_values * fmt.group_values).astype(np.float32)
    x = x.reshape(-1, fmt.group_values)
    error = ((tbq.dequantize(tbq.quantize(x, fmt), fmt) - x) ** 2).sum() / (x**2).sum()
    assert error == pytest.approx(theory(fmt.codec), rel=0.02)


# --- what is wrong with blocks and kernels -------------------------------------------------------


@proven
def test_no_written_block_is_anomalous(fmt):
    blocks = fmt.codec.blocks(load(fmt)["packed"]).reshape(-1)
    found = fmt.codec.anomalies(blocks, np.arange(len(blocks)))
    assert found
    assert not any(bad.any() for bad in found.values())


def changed(fmt, **fields):
    """Return which kinds of anomaly blocks have if their fourth has other fields."""
    blocks = fmt.codec.blocks(load(fmt)["packed"]).reshape(-1).copy()
    for name, value in fields.items():
        blocks[name][3] = value
    found = fmt.codec.anomalies(blocks, np.arange(len(blocks)))
    return {what: np.flatnonzero(bad).tolist() for what, bad in found.items() if bad.any()}


def test_anomalies_are_found():
    wide = variant("tbqp4_0", 512)
    assert changed(variant("tbq3_1"), qs=0) == {"all codes are 0 under a scale": [3]}
    assert changed(variant("tbqp3_2"), d_qjl=6e4) == {"a residual larger than the vector": [3]}
    assert changed(wide, d_qjl=0) == {"scales that differ within a group": [2, 3]}
    assert changed(variant("tbqp4_4"), d_qjl2=0) == {"scales that differ within a group": [3]}
    assert changed(variant("tbq3_4"), qs2=0) == {"all codes are 0 under a scale": [3]}
    assert changed(variant("amx3_1"), d_r=2e-4) == {"d_r below 1/1024": [3]}
    first = tbq.get_format("pr21089@first:tbqp3_0")
    assert changed(first, gamma=3) == {"a residual longer than vector and centroids": [3]}
    assert changed(first, qs=0) == {"all codes are 0": [3]}


@proven
def test_mutants_fail_the_vectors(fmt):
    """Each wrong kernel writes other bytes or decodes to other values, somewhere in the vectors."""
    v = load(fmt)
    count = 0
    for bug, detail, codec in fmt.codec.mutants():
        wrong = replace(fmt, codec=codec)
        encodes = np.array_equal(quantize_spec(v["x"], wrong), v["packed"])
        with np.errstate(all="ignore"):
            y, right = (f.codec.dequantize_rows(v["packed"]) for f in (wrong, fmt))
        assert not encodes or not same(y, right), (bug, detail)
        count += 1
    assert count >= 5


@proven
def test_kernels_refuse_to_be_wrong(fmt):
    refused = 0
    for _, _, codec in fmt.codec.mutants():
        try:
            kernels = codec.kernels
        except NotImplementedError:
            refused += 1
            continue
        x = np.random.default_rng(1).standard_normal((3, fmt.group_values)).astype(np.float32)
        packed = np.empty((3, fmt.row_bytes(fmt.group_values)), np.uint8)
        kernels.quantize(x, packed, 0)  # what is not refused is what the mutant's text says
        assert np.array_equal(packed, codec.quantize_rows(x))
    assert refused


# --- numbers -------------------------------------------------------------------------------------

IDS = [
    (42, "amesianx", None, "amesianx:tbq3_0"),
    (41, "amesianx", "v1.4.1", "amesianx:tbq3_0"),
    (41, "amesianx", "v1.0.0", "amesianx:tbq3_0"),
    (45, "amesianx", "v1.1.0", "amesianx:tbq3_1"),
    (53, "amesianx", "v1.7.0", "amesianx:tbqp4_2"),
    (57, "amesianx", "v1.7.0", "amesianx:tbqp4_3"),
    (58, "amesianx", "v1.6.0", "amesianx:tbq3_4"),
    (58, "amesianx", "v1.5.3", "amesianx@v1.5.3:tbq3_4"),
    (60, "amesianx", "v1.4.1", "amesianx@v1.5.3:tbqp4_4"),
    (63, "amesianx", None, "amesianx:amxv3_1"),
    (44, "pr21089", "first", "pr21089@first:tbqp3_0"),
    (42, "pr21089", "first", "pr21089:tbq3_0"),
]


@pytest.mark.parametrize(("type_id", "dialect", "release", "key"), IDS)
def test_ids(type_id, dialect, release, key):
    assert meaning(type_id, dialect, release).key == key


@pytest.mark.parametrize(("type_id", "release"), [(53, "v1.4.1"), (62, "v1.6.0")])
def test_codecs_that_are_not_known_have_no_number(type_id, release):
    assert meaning(type_id, "amesianx", release) is None
