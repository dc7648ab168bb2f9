"""Dumps with what no sample has: types nobody knows, rows without bytes, values that overflow."""

import subprocess
import sys

import numpy as np
import pytest
import state_bytes as sb
from conftest import HERE, NUMBERED, STATES

import gguf_io
import tbq
from tbq.registry import get_dialect, undisputed

UNKNOWN = 100


@pytest.fixture
def state_file(tmp_path):
    def write(data):
        path = tmp_path / "state.bin"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("side", "KV")
def test_rows_of_an_unknown_type_are_not_converted(quantize, state_file, tmp_path, side):
    known, unknown = ((1, 512),) * 2, ((UNKNOWN, 512),) * 2
    keys, values = (unknown, known) if side == "K" else (known, unknown)
    path = state_file(sb.sequence(sb.kv(2, keys, values)))
    code, out, err = quantize(path, tmp_path / "o", "q8_0")
    assert code == 2
    assert f"unknown({UNKNOWN})" in err
    assert not (tmp_path / "o").exists()
    other = {"K": "--type-v", "V": "--type-k"}[side]  # the other side can be, beside it
    code, out, err = quantize("--verify", other, "q8_0", path, tmp_path / "o")
    assert code == 0, err
    with gguf_io.open_state(path) as a, gguf_io.open_state(tmp_path / "o") as b:
        for name, t in a.tensors.items():
            if t.kind == side:
                assert np.array_equal(t.rows(), b.tensors[name].rows())
            else:
                assert b.tensors[name].format.name == "q8_0"


def test_conversion_of_an_unknown_type_says_why(state_file):
    with (
        gguf_io.open_state(state_file(sb.sequence(sb.kv(2, ((UNKNOWN, 512),))))) as s,
        pytest.raises(tbq.InputError, match="none of the registered dialects fit"),
    ):
        gguf_io.plan_conversion(s, {"cache_k_l0": gguf_io.resolve_type("q8_0")})


def test_rows_without_bytes(quantize, inspect, state_file, tmp_path):
    memory = sb.kv(2) + sb.rec(r=(64, 0), s=(0, 0))
    path = state_file(sb.session(memory))
    assert inspect(path)[0] == 0
    code, out, err = quantize("--verify", path, tmp_path / "o", "q8_0")
    assert code == 0, err
    with gguf_io.open_state(path) as a, gguf_io.open_state(tmp_path / "o") as b:
        assert list(a.tensors) == list(b.tensors)
        assert b.tensors["cache_s_l1"].n_bytes == 0
        assert np.array_equal(a.tensors["cache_r_l0"].rows(), b.tensors["cache_r_l0"].rows())
        assert b.tensors["cache_k_l1"].format.name == "q8_0"


@pytest.mark.parametrize("fmt", NUMBERED, ids=lambda fmt: fmt.label)
def test_rows_that_are_no_whole_groups_are_refused(state_file, fmt):
    group = fmt.codec.group_blocks * fmt.block_bytes
    if group == 1:
        return  # of any number of bytes
    type_id = get_dialect(fmt.dialect).type_id(fmt, fmt.release or None)
    broken = sb.rows(type_id, fmt.layout.header_bytes + 3 * group - 1, 1)
    release = f"@{fmt.release}" if fmt.release else ""
    everywhere = undisputed(type_id) is not None  # then no reading has such rows
    dialect = None if everywhere and fmt.is_ggml else f"{fmt.dialect}{release}"
    said = []
    for deferred in (None, 0):
        memory = sb.kv(1, deferred=deferred) + sb.cells(1) + sb.u32(0, 1) + broken
        path = state_file(sb.sequence(memory + sb.rows(0, 64, 1)))
        with pytest.raises(tbq.TbqError) as error:
            gguf_io.open_state(path, dialect=dialect)
        said.append(str(error.value))
    need = ("not whole groups", "a multiple of", "bytes long, blocks of", "not of f32")
    need += ("no memory layout fits",) if everywhere else ()
    assert any(words in text for words in need for text in said), said


def test_the_bundled_hybrids_convert(quantize, tmp_path):
    paths = sorted(STATES.glob("*hybrid*"))
    assert paths
    for path in paths:
        code, out, err = quantize("--verify", path, tmp_path / "o", "f16")
        assert code == 0, err


@pytest.mark.parametrize("argv", [(), ("--candidates", "q8_0,tbq3_0"), ("--reference", None)])
def test_overflow_makes_no_noise(state_file, argv):
    fill = np.array([3e38, -3e38, np.nan, np.inf, 1e-45], "<f4").tobytes()
    path = str(state_file(sb.sequence(sb.kv(6, ((0, 1024),) * 2, fill=fill))))
    argv = [path if part is None else part for part in argv]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tools.tbq_inspect", *argv, path],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "values are NaN or infinite" in " ".join(done.stdout.split())
