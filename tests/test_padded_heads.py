"""Caches that pad narrow heads: rows that have the padding, and files that lost it."""

import dataclasses
import json

import numpy as np
import pytest
import state_bytes as sb
from conftest import FORMATS

import gguf_io
import tbq
from gguf_io.state_writer import Conversion
from tbq.registry import get_dialect

PADDED = [
    f for f in FORMATS if f.name in get_dialect(f.dialect).state.padded and f.choice != "side=V"
]
KEPT = [f for f in PADDED if get_dialect(f.dialect).state.keeps_padding]
LOST = [f for f in PADDED if not get_dialect(f.dialect).state.keeps_padding]
HEADS, HEAD_DIM, CELLS = 8, 64, 3


def dump(fmt, tmp_path, width, rng):
    """Return a file of one layer of rows of `width` values, and how to open it."""
    x = rng.standard_normal((CELLS, width)).astype(np.float32)
    x.reshape(CELLS, HEADS, -1)[:, :, HEAD_DIM:] = 0
    packed = tbq.quantize(x, fmt)
    dialect = get_dialect(fmt.dialect)
    release = fmt.release or next(
        r.name for r in dialect.releases if any(f.key == fmt.key for f in r.types.values())
    )
    types = [(dialect.type_id(fmt, release), packed.shape[1])]
    path = tmp_path / "padded.bin"
    path.write_bytes(sb.sequence(sb.kv(CELLS, types, fill=packed.tobytes())))
    return path, f"{dialect.name}@{release}", x


@pytest.mark.parametrize("fmt", KEPT, ids=lambda fmt: fmt.label)
def test_padding_is_part_of_a_head(fmt, tmp_path, rng):
    path, dialect, x = dump(fmt, tmp_path, HEADS * fmt.group_values, rng)
    with gguf_io.open_state(path, dialect=dialect, head_dim=HEAD_DIM) as s:
        assert s.head_dim_reason == "head_dim 64 was given, padded from 64 to 128 values"
        t = s.tensors["cache_k_l0"]
        assert (t.n_head, t.head_dim, t.stored_head) == (HEADS, HEAD_DIM, fmt.group_values)
        y = t.stored().reshape(CELLS, HEADS, -1)
        assert np.array_equal(t.values(), y[:, :, :HEAD_DIM])
        assert np.array_equal(t.values_at(np.array([2, 0])), y[[2, 0], :, :HEAD_DIM])
    x = x.reshape(y.shape)
    signal = (x**2).sum()
    assert ((y - x) ** 2).sum() < 0.2 * signal
    assert (y[:, :, HEAD_DIM:] ** 2).sum() < 0.1 * signal


@pytest.mark.parametrize("fmt", LOST, ids=lambda fmt: fmt.label)
def test_rows_without_their_padding_are_refused(fmt, tmp_path, rng):
    path, dialect, _ = dump(fmt, tmp_path, HEADS * HEAD_DIM, rng)
    with pytest.raises(tbq.FileFormatError, match="pads them to 128, but writes rows without"):
        gguf_io.open_state(path, dialect=dialect, head_dim=HEAD_DIM)
    with gguf_io.open_state(path, dialect=dialect, head_dim=fmt.group_values) as s:
        assert s.tensors["cache_k_l0"].n_head == HEADS * HEAD_DIM // fmt.group_values


@pytest.fixture
def f16(tmp_path, rng):
    """Write a dump of one layer of heads of 64 values; K and V hold the same."""
    x = rng.standard_normal((CELLS, HEADS * HEAD_DIM)).astype(np.float16)
    path = tmp_path / "f16.bin"
    row_bytes = x.dtype.itemsize * x.shape[1]
    path.write_bytes(sb.sequence(sb.kv(CELLS, [(1, row_bytes)], fill=x.tobytes())))
    return path, x.reshape(CELLS, HEADS, HEAD_DIM).astype(np.float32)


def convert(source, out, kind, heads=None, **kwargs):
    """Write K and V as another type; returns whose file it is."""
    heads = heads or {"head_dim": HEAD_DIM}
    with gguf_io.open_state(source, kwargs.pop("opened", None), **heads) as s:
        plan = gguf_io.plan_conversion(s, lambda t: kind, **kwargs)
        gguf_io.write_state(out, plan)
    return f"{plan.dialect}@{plan.release}" if plan.dialect else None


@pytest.mark.parametrize("fmt", KEPT, ids=lambda fmt: fmt.label)
def test_heads_are_padded_with_zeros(fmt, f16, tmp_path):
    source, x = f16
    dialect = convert(source, tmp_path / "out.bin", fmt)
    rows = np.zeros((CELLS, HEADS, fmt.group_values), np.float32)
    rows[:, :, :HEAD_DIM] = x
    with gguf_io.open_state(tmp_path / "out.bin", dialect, head_dim=HEAD_DIM) as s:
        assert len(s.tensors) == 2
        for t in s.tensors.values():
            assert t.format.key == fmt.key
            assert (t.n_embd, t.row_values) == (HEADS * fmt.group_values, HEADS * HEAD_DIM)
            assert np.array_equal(t.rows(), tbq.quantize(rows.reshape(CELLS, -1), fmt))
            assert ((t.values() - x) ** 2).sum() < 0.2 * (x**2).sum()


@pytest.mark.parametrize(
    ("name", "error"),
    [("f16", 1e-6), ("q8_0", 1e-4), ("pr21089:tbq4_0", 0.02), ("llama-tq:ktq4_1", 0.02)],
)
def test_padding_is_dropped(name, error, f16, tmp_path):
    padded, out = tmp_path / "padded.bin", tmp_path / "out.bin"
    dialect = convert(f16[0], padded, tbq.get_format("thetom:turbo4"))
    target = gguf_io.resolve_type(name)
    with gguf_io.open_state(padded, dialect, head_dim=HEAD_DIM) as s:
        types = {
            n: target if t.kind in target.side else gguf_io.resolve_type("f16")
            for n, t in s.tensors.items()
        }
        plan = gguf_io.plan_conversion(s, types, allow_requantize=True)
        gguf_io.write_state(out, plan)
        before = {n: t.values() for n, t in s.tensors.items()}
    with gguf_io.open_state(out, f"{plan.dialect}@{plan.release}", head_dim=HEAD_DIM) as s:
        assert len(s.tensors) == 2
        for n, t in s.tensors.items():
            assert (t.n_embd, t.head_dim, t.stored_head) == (HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM)
            assert t.format.name in (types[n].name, "f16")
            assert ((t.values() - before[n]) ** 2).sum() < error * (before[n] ** 2).sum()


def test_copies_and_other_blocks_keep_the_padding(f16, tmp_path, quantize):
    padded, copy, other = (tmp_path / name for name in ("padded.bin", "copy.bin", "other.bin"))
    dialect = convert(f16[0], padded, tbq.get_format("thetom:turbo2"))
    flags = ("--head-dim", HEAD_DIM, "--dialect", dialect, "--verify")
    assert quantize(*flags, padded, copy, "COPY")[0] == 0
    assert copy.read_bytes() == padded.read_bytes()
    moved = ("--to-dialect", "thetom@2026-03-28", padded, other)
    code, _, err = quantize(*flags, *moved)
    assert code == 0, err
    with (
        gguf_io.open_state(padded, dialect, head_dim=HEAD_DIM) as a,
        gguf_io.open_state(other, "thetom@2026-03-28", head_dim=HEAD_DIM) as b,
    ):
        for x, y in zip(a.tensors.values(), b.tensors.values(), strict=True):
            assert np.array_equal(tbq.repack(x.rows(), x.format, y.format), y.rows())
            assert np.array_equal(x.values(), y.values())


def test_a_model_says_how_wide_heads_are(f16, tmp_path):
    keys = {"block_count": 1, "embedding_length": HEADS * HEAD_DIM, "attention.head_count": HEADS}
    metadata = {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in keys.items()}
    model, out, back = tmp_path / "m.gguf", tmp_path / "out.bin", tmp_path / "back.bin"
    gguf_io.write_gguf(model, metadata, [])
    dialect = convert(f16[0], out, tbq.get_format("thetom:turbo3"), {"model": model})
    with gguf_io.open_state(out, dialect, model=model) as s:
        assert s.head_dim_reason == "heads are the model's, padded from 64 to 128 values"
    convert(out, back, gguf_io.resolve_type("f32"), {"model": model}, opened=dialect)
    with gguf_io.open_state(back) as s, gguf_io.open_state(out, dialect, model=model) as padded:
        for name, t in s.tensors.items():
            x = padded.tensors[name].values().reshape(CELLS, -1)
            assert np.array_equal(t.values().reshape(CELLS, -1), x)


def test_the_program_pads_and_drops_padding(f16, tmp_path, quantize, inspect):
    source, out, back = f16[0], tmp_path / "out.bin", tmp_path / "back.bin"
    flags = ("--head-dim", HEAD_DIM, "--verify")
    code, text, err = quantize(*flags, "--json", source, out, "thetom:turbo4")
    assert code == 0, err
    for t in json.loads(text)["tensors"]:
        assert t["quant_bytes"] == CELLS * tbq.get_format("thetom:turbo4").row_bytes(HEADS * 128)
        assert t["note"] == "heads of 64 values take 128 in a row, not 64"
        assert 0 < t["relative_mse"] < 0.02
    flags += ("--dialect", "thetom")
    code, text, err = quantize(*flags, "--json", out, back, "f16")
    assert code == 0, err
    assert {t["note"] for t in json.loads(text)["tensors"]} == {
        "heads of 64 values take 64 in a row, not 128"
    }
    code, text, _ = inspect(
        *("--json", "--dialect", "thetom", "--head-dim", HEAD_DIM, "--reference", source, out)
    )
    assert code == 0
    for t in json.loads(text)["tensors"]:
        assert t["head_dim"] == HEAD_DIM
        assert 0 < t["reference"]["relative_mse"] < 0.02


@pytest.mark.parametrize("fmt", LOST, ids=lambda fmt: fmt.label)
def test_rows_that_would_lose_their_padding_are_not_written(fmt, f16):
    with (
        gguf_io.open_state(f16[0], head_dim=HEAD_DIM) as s,
        pytest.raises(tbq.InputError, match="pads others, but its files cut the rows"),
    ):
        gguf_io.plan_conversion(s, {"cache_k_l0": fmt})


def test_padded_rows_are_not_repacked_without_their_padding(f16, tmp_path):
    dialect = convert(f16[0], tmp_path / "out.bin", tbq.get_format("thetom:turbo2"))
    cut, same = tbq.get_format("buun:turbo2"), tbq.get_format("thetom@2026-03-28:turbo2")
    # no fork has one yet: the codes of a padded type under a name that its cache does not pad
    unpadded = dataclasses.replace(cut, name="turbo2_whole")
    with gguf_io.open_state(tmp_path / "out.bin", dialect, head_dim=HEAD_DIM) as s:
        t = s.tensors["cache_k_l0"]
        assert Conversion(t, same, None, True).repacks
        assert tbq.repackable(t.format, unpadded)
        assert not Conversion(t, unpadded, None, True).repacks
        with pytest.raises(tbq.InputError, match="pads others, but its files cut the rows"):
            gguf_io.plan_conversion(s, dict.fromkeys(s.tensors, cut))


def test_heads_of_a_width_that_is_assumed_are_not_padded(tmp_path):
    path = tmp_path / "f16.bin"
    path.write_bytes(sb.sequence(sb.kv(CELLS, [(1, 2 * 3 * HEAD_DIM)])))
    with (
        gguf_io.open_state(path) as s,
        pytest.raises(tbq.InputError, match="this width is assumed; model= or head_dim= says"),
    ):
        gguf_io.plan_conversion(s, {"cache_k_l0": tbq.get_format("thetom:turbo3")})


def test_there_are_dialects_of_either_kind():
    assert {f.dialect for f in KEPT} == {"thetom", "thetom-cpu"}
    assert {f.dialect for f in LOST} == {"buun", "buun-cpu"}


@pytest.mark.parametrize("fmt", PADDED, ids=lambda fmt: fmt.label)
def test_candidates_are_tried_padded(fmt, rng):
    from gguf_io.candidates import try_candidate

    x = rng.standard_normal((64, HEADS, HEAD_DIM)).astype(np.float32)
    found = try_candidate(fmt, "K", x, None)
    assert found.bpw == fmt.bpw * fmt.group_values / HEAD_DIM
    whole = np.zeros((64, HEADS, fmt.group_values), np.float32)
    whole[..., :HEAD_DIM] = x
    packed = tbq.quantize(whole.reshape(64, -1), fmt)
    y = tbq.dequantize(packed, fmt, original=True).reshape(whole.shape)[..., :HEAD_DIM]
    assert found.relative_mse == pytest.approx(((y - x) ** 2).sum() / (x**2).sum(), rel=1e-3)
