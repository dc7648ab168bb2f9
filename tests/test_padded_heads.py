"""Caches that pad narrow heads: rows that have the padding, and files that lost it."""

import numpy as np
import pytest
import state_bytes as sb
from conftest import FORMATS

import gguf_io
import tbq
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
        assert (t.n_head, t.head_dim) == (HEADS, fmt.group_values)
        y = tbq.dequantize(t.rows(), t.format, original=True).reshape(CELLS, HEADS, -1)
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


@pytest.mark.parametrize("fmt", PADDED, ids=lambda fmt: fmt.label)
def test_rows_that_would_need_padding_are_not_written(fmt, tmp_path, rng):
    path = tmp_path / "f16.bin"
    path.write_bytes(sb.sequence(sb.kv(CELLS, [(1, 2 * HEADS * HEAD_DIM)])))
    with (
        gguf_io.open_state(path, head_dim=HEAD_DIM) as s,
        pytest.raises(tbq.InputError, match="heads of whole 128s, as the cache pads others"),
    ):
        gguf_io.plan_conversion(s, {"cache_k_l0": fmt})


def test_there_are_dialects_of_either_kind():
    assert {f.dialect for f in KEPT} == {"thetom", "thetom-cpu"}
    assert {f.dialect for f in LOST} == {"buun", "buun-cpu"}
