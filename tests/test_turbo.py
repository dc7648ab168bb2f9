"""Formats of 128-value groups between sign vectors and a Hadamard transform, and buun's CPU types.

Every row of every vector file, by the specification and by the kernels.
"""

import hashlib
import zlib
from dataclasses import replace

import numpy as np
import pytest
from conftest import vectors_path

import tbq
from tbq.families import dusterbloom, turbo, turbo_cpu
from tbq.numerics import SUMS, fp16_bits, ordered_sum, tree_sum, warps_sum, word_signs
from tbq.registry import meaning

FAMILIES = {module.__name__ for module in (dusterbloom, turbo, turbo_cpu)}
FORMATS = [fmt for fmt in tbq.formats() if type(fmt.codec).__module__ in FAMILIES]
PROVEN = [fmt for fmt in FORMATS if fmt.evidence == "vectors"]
TAPPED = [tbq.get_format(f"buun:turbo{bits}") for bits in (2, 3, 4)]
GRIDS = [fmt for fmt in PROVEN if isinstance(fmt.codec, turbo.RotatedGrid)]


def load(fmt, extra=""):
    path = vectors_path(fmt)
    with np.load(path.with_suffix(f".{extra}.npz") if extra else path) as file:
        return {name: file[name] for name in file.files}


VECTORS = [(fmt, "") for fmt in PROVEN] + [(fmt, "meansub") for fmt in TAPPED]
vectors = pytest.mark.parametrize(
    ("fmt", "extra"), VECTORS, ids=[f"{fmt.label}{extra}" for fmt, extra in VECTORS]
)


def quantize_spec(x, fmt, mean=None):
    with np.errstate(all="ignore"):
        return fmt.codec.quantize_rows(x if mean is None else x - mean)


def dequantize_spec(packed, fmt, original=False):
    decode = fmt.codec.restore if original else fmt.codec.dequantize
    return decode(fmt.codec.blocks(packed).reshape(-1)).reshape(len(packed), -1)


BACKENDS = {
    "specification": (quantize_spec, dequantize_spec),
    "numba": (tbq.quantize, tbq.dequantize),
}
backends = pytest.mark.parametrize("backend", BACKENDS)


def same(a, b):
    """Whether two float arrays are equal bit for bit, any NaN like any other."""
    assert a.dtype == b.dtype
    bits = f"u{a.itemsize}"
    equal = np.ascontiguousarray(a).view(bits) == np.ascontiguousarray(b).view(bits)
    return (equal | (np.isnan(a) & np.isnan(b))).all()


def as_half(y):
    with np.errstate(all="ignore"):
        return y.astype(np.float16)


# --- the forks' bytes ----------------------------------------------------------------------------


@vectors
@backends
def test_quantize(fmt, extra, backend):
    v = load(fmt, extra)
    packed = BACKENDS[backend][0](v["x"], fmt, mean=v.get("mu"))
    bad = (packed != v["packed"]).any(axis=1)
    assert not bad.any(), sorted(set(v["category"][bad].tolist()))


@vectors
@backends
@pytest.mark.parametrize("written", ["packed", "dec_packed"])
def test_dequantize(fmt, extra, backend, written):
    """`packed` is what the encoder wrote, `dec_packed` arbitrary bytes."""
    v = load(fmt, extra)
    y = BACKENDS[backend][1](v[written], fmt)
    assert same(y, v[written.replace("packed", "y")])


@vectors
@backends
@pytest.mark.parametrize("written", ["packed", "dec_packed"])
def test_attention_kernels(fmt, extra, backend, written):
    """What buun's attention makes of keys and values, and dusterbloom's of both."""
    v, decode = load(fmt, extra), BACKENDS[backend][1]
    wanted = written.replace("packed", "y_orig_f16")
    if fmt.dialect not in ("buun", "dusterbloom"):
        assert wanted not in v
        return
    if fmt.dialect == "dusterbloom":
        exact = replace(fmt, codec=replace(fmt.codec, backward=dusterbloom.FULL))
        assert same(as_half(decode(v[written], exact)), v[wanted])
        return
    assert same(as_half(decode(v[written], fmt, original=True)), v[wanted])
    values = as_half(decode(v[written], fmt))
    assert same(values, v[written.replace("packed", "y_v_f16")])


@pytest.mark.parametrize("fmt", TAPPED, ids=lambda fmt: fmt.label)
def test_mean_comes_back(fmt):
    v = load(fmt, "meansub")
    assert (v["packed"] != load(fmt)["packed"]).any()
    y = tbq.dequantize(v["packed"], fmt, original=True)
    restored = tbq.dequantize(v["packed"], fmt, original=True, mean=v["mu"])
    assert same(restored, y + v["mu"])


def test_the_older_numberings_name_the_same_codecs():
    buun = {bits: tbq.get_format(f"buun:turbo{bits}").codec for bits in (2, 3)}
    assert tbq.get_format("thetom@2026-03-28:turbo2").codec == buun[2]
    assert tbq.get_format("thetom@2026-03-28:turbo3").codec == buun[3]
    assert tbq.get_format("thetom:turbo2").codec != buun[2]


# --- kernels against the specification -----------------------------------------------------------


def check_kernels(fmt, groups, rng):
    """Compare with the specification: values at both ends, NaN, infinity, any bytes."""
    codec, kernels = fmt.codec, fmt.codec.kernels
    x = rng.standard_normal((groups, fmt.group_values)).astype(np.float32)
    x *= rng.choice([1e-30, 1e-12, 1.0, 1e30], (groups, 1)).astype(np.float32)
    x[rng.random(x.shape) < 0.002] = np.nan
    x[rng.random(x.shape) < 0.002] = -np.inf
    packed = quantize_spec(x, fmt)
    assert np.array_equal(tbq.quantize(x, fmt), packed)
    for written in (packed, rng.integers(0, 256, packed.shape, np.uint8)):
        blocks = codec.blocks(written).reshape(-1)
        y = np.empty_like(x)
        kernels.dequantize(written, y)
        assert same(y, codec.dequantize(blocks))
        kernels.levels(written, y)
        with np.errstate(all="ignore"):
            assert same(y, codec.levels(blocks))
        if kernels.restore:
            kernels.restore(written, y)
            assert same(y, codec.restore(blocks))
    with np.errstate(all="ignore"):
        for name in ("rotate", "unrotate"):
            y = x.copy()
            getattr(kernels, name)(y, None)
            assert same(y, getattr(codec, name)(x, None))


def check_rotation(codec, rng):
    """A rotation keeps lengths, changes values, and is undone."""
    x = rng.standard_normal((5, codec.group_values)).astype(np.float32)
    turned = codec.rotate(x, None)
    assert np.abs(codec.unrotate(turned, None) - x).max() < 1e-4
    assert np.allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    assert np.abs(turned - x).max() > 1


def check_levels(fmt, rng):
    """Levels are what the decoder gives, or what it gives when they are rotated back."""
    packed = quantize_spec(rng.standard_normal((3, fmt.group_values)).astype(np.float32), fmt)
    blocks = fmt.codec.blocks(packed).reshape(-1)
    levels = fmt.codec.levels(blocks)
    back = fmt.codec.unrotate(levels, blocks)
    assert np.allclose(back, fmt.codec.restore(blocks), atol=1e-4)
    if fmt.codec.gives == "original":
        assert np.allclose(back, fmt.codec.dequantize(blocks), atol=1e-4)
    else:
        assert np.array_equal(levels, fmt.codec.dequantize(blocks))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("groups", [1, 2, 15, 16, 17, 33])
def test_kernels_equal_specification(fmt, groups, rng):
    """Whole and broken sets of lanes."""
    check_kernels(fmt, groups, rng)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_rotation_is_undone(fmt, rng):
    check_rotation(fmt.codec, rng)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_levels_are_decoded_values_before_they_are_rotated_back(fmt, rng):
    check_levels(fmt, rng)


@pytest.mark.parametrize("fmt", PROVEN, ids=lambda fmt: fmt.label)
def test_stages_lead_to_the_bytes(fmt):
    """The scale rounds to the block's, and boundaries between coordinates give the codes."""
    v, codec = load(fmt), fmt.codec
    x = v["x"].reshape(-1, codec.group_values)
    blocks = codec.blocks(v["packed"]).reshape(-1)
    stages = codec.stages(x, np.arange(len(x)), blocks)
    for field, scale in stages.scales.items():
        assert np.array_equal(fp16_bits(scale), blocks[field].view(np.uint16))
    r = stages.coordinates["codes"].astype(np.float64)
    finite = np.isfinite(r).all(axis=1)
    for kind, edges in codec.boundaries.items():
        found = codec.codes(blocks)[kind][0].reshape(r.shape)
        near = np.abs(r[..., None] - edges).min(axis=-1) < 1e-9
        counted = (r[..., None] >= edges).sum(axis=-1)
        assert ((found == counted) | near)[finite].all()
        assert near.mean() < 0.3


# --- sums ----------------------------------------------------------------------------------------


def test_sums_add_in_their_order(rng):
    """Against loops over single floats."""
    terms = rng.standard_normal(128).astype(np.float32) ** 2

    def tree(slots):
        slots = list(slots)
        half = len(slots) // 2
        while half:
            for i in range(half):
                slots[i] = slots[i] + slots[i + half]
            half //= 2
        return slots[0]

    in_order = np.float32(0)
    for term in terms:
        in_order += term
    w0, w1, w2, w3 = (tree(terms[i : i + 32]) for i in range(0, 128, 32))
    assert ordered_sum(terms) == in_order
    assert tree_sum(terms) == tree(terms)
    assert warps_sum(terms) == ((w0 + w1) + w2) + w3
    assert len({float(total(terms)) for total in SUMS.values()}) > 1


PAIRS = [
    ("buun:turbo4", "buun@2026-05:turbo4"),
    ("buun:turbo8", "buun@2026-06:turbo8"),
    ("thetom:turbo2", "thetom-cpu:turbo2"),
    ("thetom:turbo3", "thetom-cpu:turbo3"),
    ("thetom@2026-05:turbo3", "thetom-cpu@2026-05:turbo3"),
]


@pytest.mark.parametrize(("threads", "one"), PAIRS)
def test_order_of_sums_tells_writers_apart(threads, one):
    """The forks' own bytes differ for the same rows, and each codec has those of its own fork."""
    a, b = (load(tbq.get_format(key)) for key in (threads, one))
    where = {row.tobytes(): i for i, row in enumerate(b["x"])}
    rows = [(i, where[row.tobytes()]) for i, row in enumerate(a["x"]) if row.tobytes() in where]
    differ = [(i, j) for i, j in rows if (a["packed"][i] != b["packed"][j]).any()]
    assert len(rows) >= 40
    assert differ
    for i, _ in differ:
        other = quantize_spec(a["x"][i : i + 1], tbq.get_format(one))
        assert (other[0] != a["packed"][i]).any()


# --- tables --------------------------------------------------------------------------------------


def test_tables_are_the_published_ones():
    assert zlib.crc32(turbo.grid().tobytes()) == 0x71B3E1B6
    levels, edges = turbo_cpu.LEVELS[8], turbo_cpu.EDGES[8]
    assert zlib.crc32(levels.tobytes()) == 0x275336AB
    assert zlib.crc32(edges.tobytes()) == 0x4EB056EC
    assert hashlib.sha256(levels.tobytes()).hexdigest().startswith("85322627e8c8df09")
    assert hashlib.sha256(edges.tobytes()).hexdigest().startswith("f99e2db7ef79faf8")
    assert (levels[1:] > edges).all()
    assert (levels[:-1] < edges).all()


def test_matrix_is_orthogonal():
    """Its SHA-256 is checked where it is built."""
    m = turbo_cpu.matrix().astype(np.float64)
    assert np.abs(m @ m.T - np.eye(128)).max() < 1e-4


@pytest.mark.parametrize(
    ("seed", "words"), [(42, (turbo.S1, turbo.S2)), (1042, (turbo.T1, turbo.T2))]
)
def test_sign_words_come_from_numpy(seed, words):
    rng = np.random.default_rng(seed)
    for own in words:
        assert np.array_equal(word_signs(own), rng.choice([-1.0, 1.0], size=128))


CELLS = [turbo.TWO, turbo.THREE, turbo.FOUR, turbo.THREE_TRAINED, turbo.FOUR_TRAINED]
CELLS += [turbo.THREE_UNIT, turbo.FOUR_NARROW, turbo.FOUR_NARROW_CPU]
CELLS += dusterbloom.CELLS.values()


@pytest.mark.parametrize("cells", CELLS, ids=lambda cells: f"{cells.centroids[0]}")
def test_boundaries_lie_half_way(cells):
    """Between centroids, to the digits that are printed."""
    c = np.array(cells.levels, np.float64)
    away = np.abs((c[1:] + c[:-1]) / 2 - cells.edges).max() / c[-1]
    assert away < 1e-5
    assert len(cells.levels) == 1 << cells.bits == len(cells.edges) + 1


# --- what is wrong with blocks and kernels -------------------------------------------------------


@pytest.mark.parametrize("fmt", PROVEN, ids=lambda fmt: fmt.label)
def test_no_written_block_is_anomalous(fmt):
    v = load(fmt)
    blocks = fmt.codec.blocks(v["packed"]).reshape(-1)
    found = fmt.codec.anomalies(blocks, np.arange(len(blocks)))
    assert not any(bad.any() for bad in found.values())


@pytest.mark.parametrize("name", ["buun:turbo2", "buun:turbo3"])
def test_norms_that_differ_within_a_group_are_anomalous(name):
    fmt = tbq.get_format(name)
    blocks = fmt.codec.blocks(load(fmt)["packed"]).reshape(-1).copy()
    blocks["norm"][6] = 2.5
    (bad,) = fmt.codec.anomalies(blocks, np.arange(len(blocks))).values()
    assert np.flatnonzero(bad).tolist() == [4, 5, 6, 7]


def test_reserved_bytes_are_anomalous():
    fmt = tbq.get_format("thetom@2026-05:turbo4")
    blocks = fmt.codec.blocks(load(fmt)["packed"]).reshape(-1).copy()
    blocks["rnorm"][3, 1] = 1
    (bad,) = fmt.codec.anomalies(blocks, np.arange(len(blocks))).values()
    assert np.flatnonzero(bad).tolist() == [3]


@pytest.mark.parametrize("fmt", PROVEN, ids=lambda fmt: fmt.label)
def test_mutants_fail_the_vectors(fmt):
    """Each wrong kernel writes other bytes or decodes to other values, somewhere in the vectors."""
    v = load(fmt)
    count = 0
    for bug, detail, codec in fmt.codec.mutants():
        wrong = replace(fmt, codec=codec)
        encodes = np.array_equal(quantize_spec(v["x"], wrong), v["packed"])
        assert not encodes or not same(dequantize_spec(v["packed"], wrong), v["y"]), (bug, detail)
        count += 1
    assert count >= 3 or isinstance(fmt.codec, turbo.OverwrittenCodes)


def test_kernels_refuse_to_be_wrong():
    codec = tbq.get_format("buun:turbo4").codec
    halves = next(c for bug, _, c in codec.mutants() if bug == "rotated in halves")
    with pytest.raises(NotImplementedError):
        _ = halves.kernels


# --- the format that was only read ---------------------------------------------------------------


def test_residual_codes_are_those_of_turbo3(rng):
    """Same rotation and table; beyond that the norm of what is decoded is the input's."""
    x = rng.standard_normal((50, 128)).astype(np.float32)
    old, new = tbq.get_format("buun@2026-03-27:turbo4"), tbq.get_format("buun:turbo3")
    blocks = old.codec.blocks(tbq.quantize(x, old)).reshape(-1)
    same_cells = new.codec.blocks(tbq.quantize(x, new)).reshape(-1)
    codes = old.codec.codes(blocks)["codes"][0]
    assert np.array_equal(codes, new.codec.codes(same_cells)["codes"][0].reshape(codes.shape))
    y = tbq.dequantize(blocks.view(np.uint8).reshape(50, -1), old)
    assert np.allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=2e-3)
    shares = old.codec.codes(blocks)["signs"][0].mean()
    assert 0.4 < shares < 0.6


# --- numbers -------------------------------------------------------------------------------------

IDS = [
    (42, "buun", "2026-05", "buun:turbo3"),
    (43, "buun", "2026-05", "buun@2026-05:turbo4"),
    (43, "buun", "2026-07", "buun:turbo3"),
    (44, "buun", "2026-07", "buun:turbo4"),
    (48, "buun", None, "buun:turbo8"),
    (47, "buun", "2026-06", "buun@2026-06:turbo8"),
    (42, "buun", "2026-03-27", "buun@2026-03-27:turbo4"),
    (44, "buun-cpu", None, "buun-cpu:turbo4"),
    (45, "thetom", None, "thetom:turbo4"),
    (44, "thetom", "2026-05", "thetom@2026-05:turbo4"),
    (41, "thetom", "2026-03-28", "thetom@2026-03-28:turbo3"),
    (45, "dusterbloom", None, "dusterbloom:tbq4"),
    (41, "dusterbloom", None, "buun:turbo3"),
    (43, "excidos-cpu", None, "excidos-cpu:tbq4_0"),
]


@pytest.mark.parametrize(("type_id", "dialect", "release", "key"), IDS)
def test_ids(type_id, dialect, release, key):
    assert meaning(type_id, dialect, release).key == key
