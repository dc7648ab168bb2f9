"""buun's trellis formats: every row of every vector file, by the specification and the kernels."""

import numpy as np
import pytest
from conftest import PROVEN, vectors_path
from test_turbo import as_half, same

import tbq
from tbq.families import tcq
from tbq.families.tcq_tables import TABLES, checksum, values
from tbq.registry import get_dialect

MINE = [fmt for fmt in PROVEN if isinstance(fmt.codec, tcq.TrellisCoded)]
FILES = [(fmt, path) for fmt in MINE for path in (vectors_path(fmt),)]
FILES += [(fmt, p) for fmt, path in FILES if (p := path.with_suffix(".meansub.npz")).exists()]
files = pytest.mark.parametrize(("fmt", "path"), FILES, ids=[path.stem for _, path in FILES])
WRITTEN = ("packed", "dec_packed")  # by the encoder, and arbitrary bytes


def load(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_files_are_those_of_every_table_that_was_run():
    assert len(FILES) == 2 + 6 + 6
    assert {fmt.codec.bits for fmt in MINE} == {1, 2, 3}


@files
def test_quantize(fmt, path):
    v = load(path)
    mean = v.get("mu")
    with np.errstate(all="ignore"):
        x = v["x"] if mean is None else v["x"] - mean
    assert np.array_equal(fmt.codec.quantize_rows(x), v["packed"])
    packed = tbq.quantize(v["x"], fmt, mean=mean)
    assert np.array_equal(packed, v["packed"])


@files
@pytest.mark.parametrize("written", WRITTEN)
def test_dequantize(fmt, path, written):
    v = load(path)
    y = v[written.replace("packed", "y")]
    assert same(fmt.codec.dequantize_rows(v[written]), y)
    assert same(tbq.dequantize(v[written], fmt), y)


@files
@pytest.mark.parametrize("written", WRITTEN)
def test_keys_in_the_original_domain(fmt, path, written):
    v = load(path)
    wanted = v.get(written.replace("packed", "y_orig_f16"))
    if wanted is None:
        assert fmt.side == "V"
        return
    spec = fmt.codec.restore(fmt.codec.blocks(v[written]).reshape(-1)).reshape(wanted.shape)
    assert same(as_half(spec), wanted)
    assert same(as_half(tbq.dequantize(v[written], fmt, original=True)), wanted)


@files
@pytest.mark.parametrize("written", WRITTEN)
def test_values_as_attention_scales_them(fmt, path, written):
    v = load(path)
    wanted = v.get(written.replace("packed", "y_v_f16"))
    if wanted is None:
        assert fmt.side == "K"
        return
    alpha = tcq.DECODE_ALPHA[fmt.codec.bits] if fmt.side == "V" else np.float32(1)
    blocks = fmt.codec.blocks(v[written]).reshape(-1)
    y = fmt.codec.attention_values(blocks, alpha).reshape(wanted.shape)
    assert same(as_half(y), wanted)


@pytest.mark.parametrize("key", TABLES)
def test_tables_have_the_checksums_of_their_sources(key):
    assert checksum(key) == TABLES[key].crc32
    assert len(values(key)) == 1 << tcq.STATE_BITS[TABLES[key].bits]


def test_every_table_is_some_releases():
    used = set()
    for release in get_dialect("buun").releases:
        for fmt in release.types.values():
            used |= {v.codec.table for v in fmt.variants() if hasattr(v.codec, "table")}
    assert used == set(TABLES)


def test_a_block_of_zeros_walks_along_the_values_nearest_to_zero():
    fmt = tbq.get_format("buun:turbo3_tcq").at(side="K")
    packed = tbq.quantize(np.zeros((1, 128), np.float32), fmt)
    walk = fmt.codec.walk(fmt.codec.blocks(packed).reshape(-1))
    level = values(fmt.codec.table)[walk].astype(np.float64)
    assert packed[0, :2].tobytes() == b"\0\0"
    assert 0 < (level**2).sum() < 128 * (values(fmt.codec.table).astype(np.float64) ** 2).mean()
    assert not tbq.dequantize(packed, fmt).any()


@pytest.mark.parametrize("fmt", MINE, ids=lambda fmt: fmt.label)
def test_no_neighbouring_walk_is_nearer(fmt, rng):
    """Any one bit of the stream flipped is another walk, and a worse one."""
    codec = fmt.codec
    x = rng.standard_normal((1, tcq.QK)).astype(np.float32)
    u = codec.rotate(x / np.linalg.norm(x), np.zeros(1, codec.layout.dtype))
    best = codec.quantize(x, np.zeros(1, int))
    used = codec.prefix_bits + tcq.QK * codec.bits
    flipped = np.repeat(best, used + 1)
    bit = np.arange(used)
    flipped["qs"][bit, bit // 8] ^= (1 << bit % 8).astype(np.uint8)
    error = ((u - codec.levels_of_states[codec.walk(flipped)]).astype(np.float64) ** 2).sum(axis=1)
    assert (error[:-1] >= error[-1] * (1 - 1e-6)).all()
    assert error[:-1].max() > error[-1]
