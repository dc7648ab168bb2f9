"""The test that matters: every byte and every bit equals what the fork's C code produced."""

import hashlib
import os

import numpy as np
import pytest
from conftest import HERE, MANIFEST, PROVEN, VECTORS, vectors_path

import tbq
from tbq.numerics import fp16_bits


def test_data_is_what_the_manifest_says():
    for name, entry in MANIFEST["files"].items():
        data = (HERE / name).read_bytes()
        assert len(data) == entry["bytes"], name
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name


def test_no_data_without_manifest_or_format():
    paths = [p for folder in ("vectors", "samples") for p in (HERE / folder).rglob("*.*")]
    assert sorted(MANIFEST["files"]) == sorted(p.relative_to(HERE).as_posix() for p in paths)
    expected = {vectors_path(fmt) for fmt in PROVEN}
    expected |= {PAIRED for fmt in tbq.formats() if fmt.sibling} | {WHOLE_ROWS}
    with_mean = (vectors_path(fmt) for fmt in PROVEN if fmt.takes_mean)
    expected |= {p for path in with_mean if (p := path.with_suffix(".meansub.npz")) in paths}
    # what a model of the text wrote, of formats that are only read: see test_read.py
    read = [vectors_path(fmt).with_suffix(".model.npz") for fmt in tbq.formats()]
    expected |= set(read) & set(paths)
    assert {p for p in paths if p.suffix == ".npz" and VECTORS in p.parents} == expected


PAIRED = VECTORS / "llama-tq" / "xktq2_1_paired.npz"
WHOLE_ROWS = VECTORS / "ik_llama" / "q8_KV.npz"  # no format: see test_ik_llama.py
# The specification of a trellis search takes half a second per block: a sample, unless TBQ_FULL=1.
FULL = os.environ.get("TBQ_FULL") == "1"
proven = pytest.mark.parametrize("fmt", PROVEN, ids=lambda fmt: fmt.label)


def load(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


BACKENDS = {
    "specification": (
        lambda x, fmt: fmt.codec.quantize_rows(x),
        lambda packed, fmt: fmt.codec.dequantize_rows(packed),
    ),
    "numba": (tbq.quantize, tbq.dequantize),
}


@proven
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize(fmt, backend):
    v = load(vectors_path(fmt))
    if backend == "specification" and fmt.codec.searches and not FULL:
        v = {name: array[2::14] if array.ndim else array for name, array in v.items()}
    packed = BACKENDS[backend][0](v["x"], fmt)
    differs = packed != v["packed"]
    if "undefined" in v:  # iq4_nl's codes of dead blocks are what C's stack held
        size = np.nan_to_num(np.abs(v["x"].reshape(-1, fmt.block_values)), posinf=1)
        dead = (size < 1e-15).all(axis=1)
        assert fmt.key == "ggml:iq4_nl"
        blocks = v["undefined"].reshape(len(dead), -1)
        assert np.array_equal(blocks[:, 2:].all(axis=1), dead)
        assert not blocks[:, :2].any()
        differs &= ~v["undefined"]
    bad = np.flatnonzero(differs.any(axis=1))
    assert not bad.size, report(fmt, v, packed, bad)


def report(fmt, v, packed, bad):
    """Say which rows differ and how the worst block does."""
    row = bad[0]
    blocks = [fmt.codec.blocks(rows[row : row + 1])[0] for rows in (packed, v["packed"])]
    raw = [b.view(np.uint8).reshape(len(b), -1) for b in blocks]
    block = (raw[0] != raw[1]).sum(axis=1).argmax()
    got, need = (b[block].tobytes().hex() for b in blocks)
    kinds = sorted(set(v["category"][bad].tolist()))
    return f"{len(bad)} rows differ ({kinds}); row {row} block {block}:\n{got}\n{need}"


# What decodes as another format does, of which values exist.
MODELLED = {"amx3_1": lambda packed: tbq.dequantize(packed[:, :50], "amesianx:tbq3_1")}


@proven
@pytest.mark.parametrize("backend", BACKENDS)
def test_dequantize(fmt, backend):
    v = load(vectors_path(fmt))
    y = BACKENDS[backend][1](v["packed"], fmt)
    if "y_model" in v:  # the fork decodes inside attention only: a model of that was run
        v["y"] = v["y_model"]
    elif fmt.name in MODELLED:
        v["y"] = MODELLED[fmt.name](v["packed"])
    if "y" not in v:  # the CUDA decoders were not run; keys come out negated, values as on the CPU
        cpu = tbq.dequantize(v["packed"], f"llama-tq:{fmt.name}")
        assert fmt.dialect == "llama-tq-cuda"
        assert np.array_equal(y, -cpu if fmt.side == "K" else cpu, equal_nan=True)
        return
    same = (y.view(np.uint32) == v["y"].view(np.uint32)) | (np.isnan(y) & np.isnan(v["y"]))
    assert same.all(), f"{(~same).sum()} of {same.size} values differ"


@proven
def test_vectors_hold_the_special_cases(fmt):
    v = load(vectors_path(fmt))
    finite = np.isfinite(v["x"])
    if "ggml-cuda" not in fmt.source and "was not run" not in fmt.notes:  # finite values only
        assert np.isnan(v["x"]).any()
        assert np.isinf(v["x"]).any()
    assert (v["x"] == 0).all(axis=1).any()
    assert ((np.abs(v["x"]) < np.finfo(np.float32).tiny) & (v["x"] != 0)).any()
    assert (~finite).any(axis=1).sum() < len(finite) / 2


def test_numba_equals_specification_beyond_the_vectors(fmt, rng):
    """Odd group counts take other paths through the kernels; so do scattered specials."""
    codec = fmt.codec
    for n_groups in (1, 2) if codec.searches else (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 40):
        x = rng.standard_normal((n_groups, fmt.group_values)).astype(np.float32)
        x *= rng.choice([1e-30, 1.0, 1e30], (n_groups, 1)).astype(np.float32)
        x[rng.random(x.shape) < 0.002] = np.nan
        x[rng.random(x.shape) < 0.002] = -np.inf
        packed = codec.quantize_rows(x)
        assert np.array_equal(tbq.quantize(x, fmt), packed)
        for rows in (packed, scrambled(fmt, packed, rng)):
            y, expected = tbq.dequantize(rows, fmt), codec.dequantize_rows(rows)
            number = ~np.isnan(expected)
            assert np.array_equal(np.isnan(y), ~number)
            assert y[number].tobytes() == expected[number].tobytes()  # signs of zeros too


def scrambled(fmt, packed, rng):
    """Return rows of random bits, but for their headers and outliers outside the block."""
    changed = rng.integers(0, 256, packed.shape, np.uint8)
    head = fmt.layout.header_bytes
    changed[:, :head] = packed[:, :head]
    if fmt.layout.outliers:
        blocks = fmt.codec.blocks(changed)
        blocks[fmt.layout.outliers[0]] %= fmt.block_values
        changed = fmt.codec.rows(blocks)
    return changed


def test_paired():
    """xktq2_1 beside its sibling: what it borrows is the sibling's, what it stores is its own."""
    v = load(PAIRED)
    fmt, lender = tbq.get_format("xktq2_1"), tbq.get_format("ktq2_1")
    assert np.array_equal(tbq.quantize(v["sibling_x"], lender), v["sibling_packed"])
    packed = tbq.quantize_paired(v["x"], v["sibling_packed"])
    assert np.array_equal(packed, v["packed"])
    y = tbq.dequantize_paired(packed, v["sibling_packed"])
    same = (y.view(np.uint32) == v["y"].view(np.uint32)) | (np.isnan(y) & np.isnan(v["y"]))
    assert same.all()
    lent = v["sibling_packed"].reshape(-1, lender.block_bytes).view(lender.block)[:, 0]
    blocks = fmt.codec.quantize_paired(v["x"].reshape(-1, 32), lent)
    assert blocks.tobytes() == v["packed"].tobytes()
    y_ref = fmt.codec.dequantize_paired(blocks, lent)
    assert np.array_equal(y_ref.reshape(y.shape), y, equal_nan=True)


@proven
def test_stages_lead_to_the_bytes(fmt):
    """Each scale rounds to the block's, and boundaries between coordinates give the codes."""
    v, codec = load(vectors_path(fmt)), fmt.codec
    x = v["x"].reshape(-1, fmt.group_values)
    blocks = codec.blocks(v["packed"]).reshape(-1)
    index = codec.indices(len(v["x"]), v["x"].shape[1] // fmt.group_values)
    stages = codec.stages(x, index, blocks)
    assert set(fmt.layout.scales) == set(stages.scales)
    for name, scale in stages.scales.items():
        rounded = fp16_bits(scale) if blocks[name].itemsize == 2 else scale.view(np.uint32)
        assert np.array_equal(rounded, blocks[name].view(rounded.dtype)), name
    stored = {kind: codes for kind, (codes, _) in codec.codes(blocks).items()}
    assert set(codec.boundaries) <= set(stages.coordinates) <= set(stored)
    live = np.isfinite(stages.norm) & (stages.norm > 1e-30)
    for kind, boundaries in codec.boundaries.items():
        r = stages.coordinates[kind].astype(np.float64)
        edges = np.broadcast_to(boundaries, (fmt.group_values, np.shape(boundaries)[-1]))
        distance = np.abs(r[..., None] - edges)
        near = (distance < 1e-6).any(axis=-1)
        codes = (r[..., None] >= edges).sum(axis=-1)
        right = (stored[kind].reshape(r.shape) == codes) | near
        usable = live & np.isfinite(r).all(axis=1)
        assert right[usable].all(), kind
        assert near[usable].mean() < 0.3
