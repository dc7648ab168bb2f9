"""The test that matters: every byte and every bit equals what the fork's C code produced."""

import hashlib

import numpy as np
import pytest
from conftest import HERE, MANIFEST, vectors_path

import tbq


def test_data_is_what_the_manifest_says():
    for name, entry in MANIFEST["files"].items():
        data = (HERE / name).read_bytes()
        assert len(data) == entry["bytes"], name
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name


def test_no_data_without_manifest_or_format():
    paths = [p for folder in ("vectors", "samples") for p in (HERE / folder).rglob("*.*")]
    assert sorted(MANIFEST["files"]) == sorted(p.relative_to(HERE).as_posix() for p in paths)
    expected = {vectors_path(fmt) for fmt in tbq.formats()}
    assert {p for p in paths if p.suffix == ".npz"} == expected


def load(fmt):
    with np.load(vectors_path(fmt)) as file:
        return {name: file[name] for name in file.files}


def quantize_ref(x, fmt):
    blocks = fmt.quantize_ref(fmt, x.reshape(-1, fmt.block_values))
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
    v = load(fmt)
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
    v = load(fmt)
    y = BACKENDS[backend][1](v["packed"], fmt)
    same = (y.view(np.uint32) == v["y"].view(np.uint32)) | (np.isnan(y) & np.isnan(v["y"]))
    assert same.all(), f"{(~same).sum()} of {same.size} values differ"


def test_vectors_hold_the_special_cases(fmt):
    v = load(fmt)
    finite = np.isfinite(v["x"])
    assert np.isnan(v["x"]).any()
    assert np.isinf(v["x"]).any()
    assert (v["x"] == 0).all(axis=1).any()
    assert ((np.abs(v["x"]) < np.finfo(np.float32).tiny) & (v["x"] != 0)).any()
    assert (~finite).any(axis=1).sum() < len(finite) / 2


def test_numba_equals_specification_beyond_the_vectors(fmt, rng):
    """Odd block counts take other paths through the kernels; so do scattered specials."""
    for n_blocks in (1, 2, 3, 4, 5, 7, 8, 9):
        x = rng.standard_normal((n_blocks, fmt.block_values)).astype(np.float32)
        x *= rng.choice([1e-30, 1.0, 1e30], (n_blocks, 1)).astype(np.float32)
        x[rng.random(x.shape) < 0.002] = np.nan
        x[rng.random(x.shape) < 0.002] = -np.inf
        packed = quantize_ref(x, fmt)
        assert np.array_equal(tbq.quantize(x, fmt), packed)
        random = rng.integers(0, 256, packed.shape, np.uint8)
        for blocks in (packed, random):
            y, expected = tbq.dequantize(blocks, fmt), dequantize_ref(blocks, fmt)
            assert np.array_equal(y, expected, equal_nan=True)
            assert np.array_equal(np.signbit(y), np.signbit(expected)) or np.isnan(y).any()
