"""The test that matters: every byte and every bit equals what the fork's C code produced."""

import hashlib
import os

import numpy as np
import pytest
from conftest import HERE, MANIFEST, VECTORS, vectors_path

import tbq
from tbq.families import ktq
from tbq.numerics import fp16_bits


def test_data_is_what_the_manifest_says():
    for name, entry in MANIFEST["files"].items():
        data = (HERE / name).read_bytes()
        assert len(data) == entry["bytes"], name
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name


def test_no_data_without_manifest_or_format():
    paths = [p for folder in ("vectors", "samples") for p in (HERE / folder).rglob("*.*")]
    assert sorted(MANIFEST["files"]) == sorted(p.relative_to(HERE).as_posix() for p in paths)
    expected = {vectors_path(fmt) for fmt in tbq.formats()}
    expected |= {PAIRED for fmt in tbq.formats() if fmt.sibling}
    assert {p for p in paths if p.suffix == ".npz"} == expected


PAIRED = VECTORS / "llama-tq" / "xktq2_1_paired.npz"
# The specification of a trellis search takes half a second per block: a sample, unless TBQ_FULL=1.
FULL = os.environ.get("TBQ_FULL") == "1"


def is_slow(fmt):
    return fmt.kernels_module.endswith("trellis")


def load(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def quantize_ref(x, fmt):
    row_blocks = x.shape[-1] // fmt.block_values
    index = fmt.block_indices(len(x), row_blocks)
    blocks = fmt.quantize_ref(fmt, x.reshape(-1, fmt.block_values), index)
    return blocks.view(np.uint8).reshape(len(x), -1)


def dequantize_ref(packed, fmt):
    blocks = packed.reshape(-1, fmt.block_bytes).view(fmt.block)[:, 0]
    return fmt.dequantize_ref(fmt, blocks).reshape(len(packed), -1)


BACKENDS = {
    "specification": (quantize_ref, dequantize_ref),
    "numba": (tbq.quantize, tbq.dequantize),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize(fmt, backend):
    v = load(vectors_path(fmt))
    if backend == "specification" and is_slow(fmt) and not FULL:
        v = {name: array[2::14] for name, array in v.items()}
    packed = BACKENDS[backend][0](v["x"], fmt)
    bad = np.flatnonzero((packed != v["packed"]).any(axis=1))
    assert not bad.size, report(fmt, v, packed, bad)


def report(fmt, v, packed, bad):
    """Say which rows differ and how the worst block does."""
    row = bad[0]
    differs = (packed[row] != v["packed"][row]).reshape(-1, fmt.block_bytes)
    block = differs.sum(axis=1).argmax()
    got = packed[row].reshape(-1, fmt.block_bytes)[block].tobytes().hex()
    need = v["packed"][row].reshape(-1, fmt.block_bytes)[block].tobytes().hex()
    kinds = sorted(set(v["category"][bad].tolist()))
    return f"{len(bad)} rows differ ({kinds}); row {row} block {block}:\n{got}\n{need}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_dequantize(fmt, backend):
    v = load(vectors_path(fmt))
    y = BACKENDS[backend][1](v["packed"], fmt)
    if "y" not in v:  # the CUDA decoders were not run; keys come out negated, values as on the CPU
        cpu = tbq.dequantize(v["packed"], f"llama-tq:{fmt.name}")
        assert fmt.dialect == "llama-tq-cuda"
        assert np.array_equal(y, -cpu if fmt.side == "K" else cpu, equal_nan=True)
        return
    same = (y.view(np.uint32) == v["y"].view(np.uint32)) | (np.isnan(y) & np.isnan(v["y"]))
    assert same.all(), f"{(~same).sum()} of {same.size} values differ"


def test_vectors_hold_the_special_cases(fmt):
    v = load(vectors_path(fmt))
    finite = np.isfinite(v["x"])
    if fmt.dialect != "llama-tq-cuda":
        assert np.isnan(v["x"]).any()
        assert np.isinf(v["x"]).any()
    assert (v["x"] == 0).all(axis=1).any()
    assert ((np.abs(v["x"]) < np.finfo(np.float32).tiny) & (v["x"] != 0)).any()
    assert (~finite).any(axis=1).sum() < len(finite) / 2


def test_numba_equals_specification_beyond_the_vectors(fmt, rng):
    """Odd block counts take other paths through the kernels; so do scattered specials."""
    for n_blocks in (1, 2) if is_slow(fmt) else (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 40):
        x = rng.standard_normal((n_blocks, fmt.block_values)).astype(np.float32)
        x *= rng.choice([1e-30, 1.0, 1e30], (n_blocks, 1)).astype(np.float32)
        x[rng.random(x.shape) < 0.002] = np.nan
        x[rng.random(x.shape) < 0.002] = -np.inf
        packed = quantize_ref(x, fmt)
        assert np.array_equal(tbq.quantize(x, fmt), packed)
        random = rng.integers(0, 256, packed.shape, np.uint8)
        if "pos" in fmt.block.names:  # anything but an outlier outside the block
            random.reshape(-1, fmt.block_bytes).view(fmt.block)["pos"] %= fmt.block_values
        for blocks in (packed, random):
            y, expected = tbq.dequantize(blocks, fmt), dequantize_ref(blocks, fmt)
            assert np.array_equal(y, expected, equal_nan=True)
            assert np.array_equal(np.signbit(y), np.signbit(expected)) or np.isnan(y).any()


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
    blocks = ktq.quantize_paired_ref(fmt, v["x"].reshape(-1, 32), lent)
    assert blocks.tobytes() == v["packed"].tobytes()
    y_ref = ktq.dequantize_paired_ref(fmt, blocks, lent)
    assert np.array_equal(y_ref.reshape(y.shape), y, equal_nan=True)


@pytest.mark.parametrize("fmt", [f for f in tbq.formats() if not f.sibling], ids=lambda f: f.key)
def test_stages_lead_to_the_bytes(fmt):
    """The scale rounds to the block's, and boundaries between coordinates give the codes."""
    v = np.load(vectors_path(fmt))
    x = v["x"].reshape(-1, fmt.block_values)
    blocks = v["packed"].view(fmt.block).reshape(-1)
    row_blocks = v["x"].shape[1] // fmt.block_values
    index = fmt.block_indices(len(v["x"]), row_blocks)
    stages = fmt.stages_ref(fmt, x, index, blocks)
    assert np.array_equal(fp16_bits(stages.scale), blocks["d"].view(np.uint16))
    if fmt.boundaries is None:
        return
    live = np.isfinite(stages.coordinates).all(axis=1) & (stages.norm > 1e-30)
    r = stages.coordinates[live].astype(np.float64)
    codes = np.zeros(r.shape, int)
    edges = np.broadcast_to(fmt.boundaries, (fmt.block_values, np.shape(fmt.boundaries)[-1]))
    near = np.zeros(r.shape, bool)
    for edge in edges.T:
        codes += r >= edge
        near |= np.abs(r - edge) < 1e-6
    ((found, _),) = fmt.codes(fmt, blocks[live]).values()
    assert ((found == codes) | near).all()
    assert near.mean() < 0.3
