"""Formats that the code base has never heard of work in every program and obey every law.

They are registered for these tests only. What passes here for a group of four blocks, two scales,
unusual field names and a codec that depends on head_dim needs no line anywhere else.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys

import newcomers
import numpy as np
import pytest
import test_attention
import test_laws
import test_vectors
from conftest import HERE, SAMPLES, STATES

import gguf_io
import tbq
from tbq import registry
from tools import bench_cases, formats_table, tbq_bench

VARIANTS = [v for fmt in newcomers.DIALECT.formats for v in fmt.variants()]
each = pytest.mark.parametrize("fmt", VARIANTS, ids=lambda fmt: fmt.label)
F16 = STATES / "pr21089.f16.seq0.bin"
MODEL = SAMPLES / "small.f32.gguf"


@pytest.fixture(autouse=True)
def registered():
    """Register the newcomers, and take them out again."""
    registry.register(newcomers.DIALECT)
    yield
    registry.unregister(newcomers.DIALECT.name)


def test_nothing_else_knows_them():
    """The whole point: no line outside their folder and this file names them."""
    names = r"newcomers|\bquad\b|OddNames|TwoScales|ByHead"
    for folder in ("tbq", "gguf_io", "cuda_port", "tools"):
        for path in (HERE.parent / folder).rglob("*.py"):
            assert not re.search(names, path.read_text(encoding="utf-8")), path


# --- laws ---


@each
def test_kernels_equal_the_specification(fmt, rng):
    test_vectors.test_numba_equals_specification_beyond_the_vectors(fmt, rng)


@each
def test_generic_laws(fmt, rng):
    test_laws.test_out_is_filled_and_returned(fmt, rng)
    test_laws.test_inputs_are_not_modified(fmt, rng)
    with pytest.MonkeyPatch.context() as patch:
        test_laws.test_chunk_size_changes_no_byte(fmt, rng, patch, 1)


@each
def test_attention_laws(fmt, rng):
    test_attention.test_scores_are_the_specification_to_the_bit(fmt, rng)
    test_attention.test_scores_are_close_to_float64_on_decoded_keys(fmt, rng)
    if "V" in fmt.side:
        test_attention.test_weighted_sums_are_the_specification_to_the_bit(fmt, rng)
        test_attention.test_weighted_sums_are_close_to_float64_on_decoded_values(fmt, rng)


@each
def test_original_values_come_back(fmt, rng):
    """Whatever domain the decoder gives, `original` undoes the codec's own rotation."""
    x = rng.standard_normal((9, 4 * fmt.group_values)).astype(np.float32)
    y = tbq.dequantize(tbq.quantize(x, fmt), fmt, original=True)
    assert 0 < ((x - y) ** 2).sum() / (x**2).sum() < 0.1


def test_choices_are_asked_for_and_refused():
    x = np.ones((1, 128), np.float32)
    with pytest.raises(tbq.InputError, match="head_dim: got none.*64"):
        tbq.quantize(x, "newcomers:head")
    with pytest.raises(tbq.InputError, match="newcomers:two is the same for all"):
        tbq.quantize(x, "newcomers:two", head_dim=64)
    with pytest.raises(tbq.InputError, match="the same for K and V"):
        tbq.quantize(x, "newcomers:two", side="K")
    a, b = (tbq.quantize(x, "newcomers:head", head_dim=n) for n in (64, 128))
    assert not np.array_equal(a, b)
    with pytest.raises(tbq.InputError, match="row length: got 96 values.*128"):
        tbq.quantize(x[:, :96], "newcomers:quad")
    with pytest.raises(tbq.InputError, match=r"row length: got 14 bytes.*56"):
        tbq.dequantize(np.zeros((1, 14), np.uint8), "newcomers:quad")


# --- files ---


@pytest.mark.parametrize("name", ["quad", "two", "odd"])
def test_models_are_converted_and_read_back(tmp_path, quantize, name):
    out = tmp_path / "out.gguf"
    code, _, err = quantize("--pure", "--verify", MODEL, out, f"newcomers:{name}")
    assert code == 0, err
    with gguf_io.open_gguf(out) as f:
        assert (f.dialect, f.release, f.dialect_guessed) == ("newcomers", "2099", False)
        assert {t.format.name for t in f.tensors.values()} == {"f32", name}


def test_a_choice_without_context_is_asked_for(tmp_path, quantize):
    code, _, err = quantize("--pure", MODEL, tmp_path / "out.gguf", "newcomers:head")
    assert code == 2
    assert "--head-dim: got none" in err


def test_ids_are_a_releases(tmp_path, rng):
    """An id below all others' and an older release's number, stated and bare."""
    x = rng.standard_normal((8, 256)).astype(np.float32)
    for fmt, place, number in (
        (newcomers.QUAD, "newcomers@2098", 96),
        (newcomers.HEAD.at(head_dim=128), "newcomers", 41),
    ):
        tensor = gguf_io.OutputTensor.from_packed("t", tbq.quantize(x, fmt), fmt)
        path = tmp_path / f"{number}.gguf"
        gguf_io.write_gguf(path, {}, [tensor], dialect=place)
        with gguf_io.open_gguf(path) as f:
            assert f.tensors["t"].type_id == number
            assert f.tensors["t"].format.key == fmt.key
            assert f.dialect == "newcomers"


@pytest.mark.parametrize(
    ("k", "v"), [("quad", "two"), ("odd", "quad"), ("head", "head"), ("two", "two")]
)
def test_dumps_are_converted_and_read_back(tmp_path, quantize, k, v):
    out = tmp_path / "out.bin"
    types = [f"--type-k=newcomers:{k}", f"--type-v=newcomers:{v}"]
    code, _, err = quantize(*types, "--head-dim=64", "--verify", F16, out)
    assert code == 0, err
    with gguf_io.open_state(F16, head_dim=64) as a, gguf_io.open_state(out, head_dim=64) as b:
        assert b.dialect == "newcomers"
        assert (b.rotation.keys, b.rotation.values) == (None, None)
        for name, t in b.tensors.items():
            assert t.format.name in (k, v)
            x, y = a.tensors[name].values(), t.values()
            assert ((x - y) ** 2).sum() / (x**2).sum() < 0.4


def test_regularities_identify_a_dump(tmp_path, quantize):
    """Bare ids that two dialects have: what no encoder writes tells them apart."""
    out = tmp_path / "out.bin"
    code, _, err = quantize("--type-k=newcomers:odd", "--type-v=newcomers:two", F16, out)
    assert code == 0, err
    with gguf_io.open_state(out) as state:
        assert state.dialect == "newcomers"
        assert state.dialect_guessed


def test_inspect_knows_scales_codes_and_anomalies(tmp_path, inspect, quantize):
    out = tmp_path / "out.bin"
    quantize("--type-k=newcomers:odd", "--type-v=newcomers:quad", F16, out)
    code, text, err = inspect("--json", "--reference", F16, out)
    assert code == 0, err
    found = json.loads(text)
    k, v = (next(t for t in found["tensors"] if t["kind"] == kind) for kind in "KV")
    assert k["type"] == "newcomers:odd"
    assert set(k["health"]["histograms"]) == {"codes"}
    assert k["health"]["anomalies"]["signs that do not match their seed"] == 0
    assert v["health"]["anomalies"]["norms that differ in a group"] == 0
    assert v["reference"]["relative_mse"] < 0.1  # rotated values undone: 2.0 if they were not


def test_candidates_are_tried_in_the_right_domain(inspect):
    kinds = ",".join(fmt.key for fmt in newcomers.DIALECT.formats)
    code, text, err = inspect("--json", "--head-dim=64", "--candidates", kinds, F16)
    assert code == 0, err
    for tensor in json.loads(text)["tensors"]:
        for candidate in tensor["candidates"]:
            assert candidate["unfit"] or candidate["relative_mse"] < 0.4, candidate


# --- the other programs ---


def test_bench_times_them(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_cases, "VALUES", 1 << 12)
    monkeypatch.setattr(bench_cases, "SECONDS", 0.01)
    out = tmp_path / "bench.jsonl"
    names = [fmt.key for fmt in newcomers.DIALECT.formats]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert tbq_bench.main(["--rows=256", "--rounds=1", "--out", str(out), *names]) == 0
    assert "newcomers:head[head_dim=64] quantize" in printed.getvalue()
    assert len(out.read_text().splitlines()) == 3 + 2 * len(VARIANTS)


def test_the_table_of_formats_has_them():
    table = formats_table.formats_table()
    assert "| `newcomers:quad` |" in table
    assert "4 × 32" in table


@each
def test_vectors_are_generated_and_checked(tmp_path, vectors, fmt):
    name = fmt.key
    code, _, err = vectors("generate", "--formats", name, "--out", tmp_path / "set")
    assert code == 0, err
    code, text, err = vectors("check", tmp_path / "set", tmp_path / "set")
    assert code == 0, text + err


PORT_SCRIPT = """
import sys; sys.path.insert(0, "tests")
import newcomers, numpy as np, cuda_port, tbq
from tbq import registry
from tools import cuda_trial
registry.register(newcomers.DIALECT)
rng = np.random.default_rng(0)
for fmt in (v for f in newcomers.DIALECT.formats for v in f.variants()):
    x = rng.standard_normal((2, 2 * fmt.group_values)).astype(np.float32)
    x[0, 3], x[1, : fmt.group_values] = 1e-20, 0
    packed = tbq.quantize(x, fmt)
    assert np.array_equal(cuda_port.quantize(x, fmt), packed), fmt
    assert np.array_equal(cuda_port.dequantize(packed, fmt), tbq.dequantize(packed, fmt)), fmt
    found = cuda_port.scores(x, packed, fmt)
    assert np.array_equal(found, tbq.scores(x, packed, fmt)), fmt
    if "V" in fmt.side:
        p = rng.random((2, 2), dtype=np.float32)
        found = cuda_port.weighted_sum(p, packed, fmt)
        assert np.array_equal(found, tbq.weighted_sum(p, packed, fmt)), fmt
for name in ("newcomers:quad", "newcomers:odd"):
    request = {"format": name, "lock": sys.argv[1], "values": 256, "simulated": True}
    print(cuda_trial.trial({**request, "copy_gb_s": 1.0})["exact"])
"""


def test_the_device_has_them_too(tmp_path):
    """In the simulator: byte for byte, in attention, and in the program that checks a device."""
    command = [sys.executable, "-W", "ignore", "-c", PORT_SCRIPT, str(tmp_path / "lock")]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["True", "True"]
