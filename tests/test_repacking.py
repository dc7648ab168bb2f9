"""The same codes and scales in another fork's blocks, rows and whole files."""

import numpy as np
import pytest
import state_bytes as sb
from conftest import FORMATS

import gguf_io
import tbq
from gguf_io import OutputTensor
from tbq.registry import get_dialect, type_id

PAIRS = [
    (a.key, b.key)
    for a in tbq.formats()
    for b in tbq.formats()
    if a is not b and tbq.repackable(a, b)
]


def packed_rows(key, rng, rows=6):
    """Rows with what an encoder can write: Gaussian, zeros, specials."""
    fmt = next(tbq.get_format(key).variants())
    x = rng.standard_normal((rows, 3 * fmt.group_values)).astype(np.float32)
    x[1] = 0
    x[2] *= 1e30
    x[3, ::7] = np.nan
    x[4] *= 1e-30
    return fmt, tbq.quantize(x, fmt)


def test_there_are_pairs_and_they_are_mutual():
    assert ("buun:turbo3", "thetom@2026-05:turbo3") in PAIRS
    assert ("buun:turbo2", "thetom:turbo2") in PAIRS
    assert ("buun:turbo4", "buun@2026-05:turbo4") in PAIRS
    assert ("buun:turbo3", "thetom:turbo3") not in PAIRS  # other tables since 2026-06
    assert ("buun:turbo4", "buun-cpu:turbo4") not in PAIRS  # another rotation
    assert ("llama-tq:ktq2_1", "llama-tq-cuda:ktq2_1") not in PAIRS
    assert all((b, a) in PAIRS for a, b in PAIRS)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_nothing_is_lost(rng, source, target):
    """Values decode to the same bits, and the way back gives the same bytes."""
    fmt, packed = packed_rows(source, rng)
    other = next(tbq.get_format(target).variants())
    moved = tbq.repack(packed, fmt, other)
    assert moved.shape[1] == other.row_bytes(3 * fmt.group_values)
    assert np.array_equal(tbq.repack(moved, other, fmt), packed)
    if fmt.codec.gives == other.codec.gives:
        a, b = tbq.dequantize(packed, fmt), tbq.dequantize(moved, other)
        assert np.array_equal(a.view(np.uint32), b.view(np.uint32))
    else:
        a, b = (tbq.dequantize(p, f, original=True) for p, f in ((packed, fmt), (moved, other)))
        assert np.array_equal(a, b, equal_nan=True)


def test_a_format_repacks_into_itself():
    assert all(tbq.repackable(fmt, fmt) for fmt in FORMATS)


def test_norms_that_differ_within_a_group_have_no_place_elsewhere(rng):
    fmt, packed = packed_rows("buun:turbo3", rng)
    packed[0, fmt.block_bytes] ^= 1  # the norm of the second block
    with pytest.raises(tbq.CorruptBlockError, match="its group has several values of norm"):
        tbq.repack(packed, fmt, "thetom@2026-05:turbo3")


def test_what_is_not_the_same_is_refused(rng):
    fmt, packed = packed_rows("buun:turbo3", rng)
    with pytest.raises(tbq.InputError, match="the codes and scales of buun:turbo3"):
        tbq.repack(packed, fmt, "thetom:turbo3")
    with pytest.raises(tbq.InputError, match="a positive multiple"):
        tbq.repack(packed[:, :-1], fmt, "thetom@2026-05:turbo3")


@pytest.mark.parametrize(
    ("key", "place", "found"),
    [
        ("buun:turbo3", "thetom@2026-05", "thetom@2026-05:turbo3"),
        ("buun:turbo3", "thetom", "thetom:turbo3"),  # of the same name, requantised
        ("thetom:turbo2", "buun", "buun:turbo2"),
        ("excidos-cpu:tbq4_0", "buun", "buun:turbo4"),
        ("buun@2026-05:turbo4", "buun", "buun:turbo4"),
        ("buun:turbo8", "thetom", None),
        ("pr21089:tbq3_0", "amesianx", "amesianx:tbq3_0"),
    ],
)
def test_counterparts(key, place, found):
    kind = tbq.counterpart(tbq.get_format(key), place)
    assert (kind.key if kind else None) == found


# --- files ---


def model(path, key, rng, dialect=None):
    fmt = tbq.get_format(key)
    x = rng.standard_normal((4, 2 * fmt.group_values)).astype(np.float32)
    packed = tbq.quantize(x, fmt)
    tensors = [
        OutputTensor.from_packed("blk.0.ffn_up.weight", packed, fmt),
        OutputTensor.from_array("norm", np.ones(32, np.float32)),
    ]
    gguf_io.write_gguf(path, {"general.architecture": "llama"}, tensors, dialect=dialect)
    return packed


@pytest.mark.parametrize(
    ("source", "to", "target"),
    [
        ("buun:turbo3", "thetom@2026-05", "thetom@2026-05:turbo3"),
        ("thetom:turbo2", "buun", "buun:turbo2"),
        ("buun:turbo2", "buun@2026-05", "buun:turbo2"),  # the same bytes, another id
    ],
)
def test_models_are_repacked(tmp_path, rng, quantize, source, to, target):
    a, b, c = (tmp_path / f"{name}.gguf" for name in "abc")
    packed = model(a, source, rng)
    code, out, err = quantize("--to-dialect", to, "--verify", a, b)
    assert (code, "error" in err) == (0, False)
    with gguf_io.open_gguf(b) as f:
        t = f.tensors["blk.0.ffn_up.weight"]
        assert f"{f.dialect}@{f.release}".startswith(to)
        assert t.format.key == target
        assert t.type_id == type_id(tbq.get_format(target), *to.split("@"))
        assert np.array_equal(t.raw, tbq.repack(packed, source, target))
    back = tbq.get_format(source).dialect
    assert quantize("--to-dialect", back, b, c)[0] == 0
    with gguf_io.open_gguf(c) as f:
        assert np.array_equal(f.tensors["blk.0.ffn_up.weight"].raw, packed)


def test_other_tables_are_requantised_and_the_error_is_said(tmp_path, rng, quantize):
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    packed = model(a, "buun:turbo3", rng)
    code, out, err = quantize("--to-dialect", "thetom", a, b)
    assert code == 0
    assert "buun:turbo3 is quantised again" in err
    assert "relative MSE" in out
    with gguf_io.open_gguf(b) as f:
        y = f.tensors["blk.0.ffn_up.weight"].dequantize()
    x = tbq.dequantize(packed, "buun:turbo3", original=True)
    assert 0 < ((x - y) ** 2).sum() / (x**2).sum() < 0.03


def test_what_no_type_of_the_dialect_can_be_is_refused(tmp_path, rng, quantize):
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    model(a, "buun:turbo8", rng)
    code, _, err = quantize("--to-dialect", "thetom", a, b)
    assert (code, b.exists()) == (2, False)
    assert "a type of thetom that it is to become" in err
    assert quantize("--to-dialect", "thetom", "--allow-requantize", a, b, "turbo4")[0] == 0
    assert quantize("--to-dialect", "nobody", a, b)[0] == 2
    assert quantize("--to-dialect", "thetom", a)[0] == 2


def dump(path, key, rng, cells=5):
    """A state of one layer whose K and V are rows of a format."""
    fmt = tbq.get_format(key)
    release = next(r for r in get_dialect(fmt.dialect).releases if fmt in r.types.values())
    number = next(i for i, other in release.types.items() if other is fmt)
    width = 2 * fmt.group_values
    path.write_bytes(sb.sequence(sb.kv(cells, ((number, fmt.row_bytes(width)),))))
    data = bytearray(path.read_bytes())
    x = rng.standard_normal((cells, width)).astype(np.float32)
    packed = tbq.quantize(x, fmt)
    with gguf_io.open_state(path, dialect=f"{fmt.dialect}@{release.name}", head_dim=128) as s:
        for t in s.tensors.values():
            data[t.parts[0].data : t.parts[0].end] = packed.tobytes()
    path.write_bytes(data)
    return packed, f"{fmt.dialect}@{release.name}"


@pytest.mark.parametrize(
    ("source", "to", "target"),
    [
        ("buun:turbo3", "thetom@2026-05", "thetom@2026-05:turbo3"),
        ("buun:turbo2", "thetom", "thetom:turbo2"),
        ("thetom:turbo2", "buun", "buun:turbo2"),
        ("buun:turbo2", "buun@2026-05", "buun:turbo2"),
    ],
)
def test_dumps_are_repacked(tmp_path, rng, quantize, source, to, target):
    a, b = tmp_path / "a.bin", tmp_path / "b.bin"
    packed, place = dump(a, source, rng)
    flags = ("--dialect", place, "--head-dim", 128, "--to-dialect", to)
    code, _, err = quantize(*flags, "--verify", a, b)
    assert (code, "error" in err) == (0, False)
    with gguf_io.open_state(b, dialect=to, head_dim=128) as s:
        for t in s.tensors.values():
            assert t.format.key == target
            assert t.type_id == type_id(tbq.get_format(target), *to.split("@"))
            assert np.array_equal(t.rows(), tbq.repack(packed, source, target))


# --- footers ---

FOOTER = (0x54514346).to_bytes(4, "little")


@pytest.fixture
def trellis_dump(tmp_path, rng):
    """Write a state of buun's with turbo3_tcq rows and the footer that its streams end in."""

    def make(fingerprint):
        path, fmt = tmp_path / "tcq.bin", tbq.get_format("buun:turbo3_tcq")
        data = bytearray(sb.sequence(sb.kv(3, ((type_id(fmt, "buun"), fmt.row_bytes(256)),))))
        data += FOOTER + fingerprint.to_bytes(4, "little")
        path.write_bytes(data)
        with gguf_io.open_state(path, dialect="buun", head_dim=128) as s:
            for t in s.tensors.values():
                x = rng.standard_normal((3, 256)).astype(np.float32)
                part = t.parts[0]
                data[part.data : part.end] = tbq.quantize(x, fmt, side=t.kind).tobytes()
        path.write_bytes(data)
        return path

    return make


@pytest.mark.parametrize("fingerprint", [0, 0x12345678])
def test_footers_are_read_and_kept(tmp_path, trellis_dump, fingerprint):
    path, out = trellis_dump(fingerprint), tmp_path / "out.bin"
    with gguf_io.open_state(path, head_dim=128) as s:
        assert s.memories[0].streams[0].fingerprint == fingerprint
        assert (s.dialect, s.dialect_guessed) == ("buun", True)  # none else writes footers
        gguf_io.write_state(out, s)
    assert out.read_bytes() == path.read_bytes()


def test_footers_come_and_go_with_trellis_layers(tmp_path, trellis_dump, quantize):
    path, f16, again = trellis_dump(5), tmp_path / "f16.bin", tmp_path / "again.bin"
    flags = ("--head-dim", 128)
    assert quantize(*flags, "--dialect", "buun", path, f16, "f16")[0] == 0
    assert not f16.read_bytes()[-8:].startswith(FOOTER)
    assert quantize(*flags, f16, again, "buun:turbo3_tcq")[0] == 0
    assert again.read_bytes()[-8:] == FOOTER + bytes(4)
    with gguf_io.open_state(again, head_dim=128) as s:
        assert {t.format.label for t in s.tensors.values()} == {
            "buun:turbo3_tcq[side=K]",
            "buun:turbo3_tcq[side=V]",
        }
