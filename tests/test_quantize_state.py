"""tbq-quantize on state files."""

import json

import numpy as np
import pytest
from conftest import MODELS, SAMPLES, STATES

from gguf_io import open_state

F32 = STATES / "pr21089.f32.seq0.bin"


def test_k_and_v_types_give_the_forks_layer_0(tmp_path, quantize):
    out = tmp_path / "out.bin"
    code, text, err = quantize("--type-k", "tbq4_0", "--type-v", "tbq3_0", F32, out, "--verify")
    assert code == 0
    assert "converting to tbq4_0" in text
    assert "cache_v_l1                               tbq3_0     3.3" in text
    assert "keys not rotated: the type is not quantised" in err
    assert "head_dim 128 is assumed" in err
    with (
        open_state(out) as mine,
        open_state(STATES / "pr21089.k_tbq4_0_v_tbq3_0.seq0.bin") as forks,
    ):
        for name in ("cache_k_l0", "cache_v_l0"):
            assert np.array_equal(mine.tensors[name].rows(), forks.tensors[name].rows())


def test_one_type_for_both_and_a_default_name(tmp_path, quantize):
    source = tmp_path / "dump.bin"
    source.write_bytes(F32.read_bytes())
    assert quantize(source, "Q8_0")[0] == 0
    with open_state(tmp_path / "dump.q8_0.bin") as s:
        assert {t.format.name for t in s.tensors.values()} == {"q8_0"}
    assert quantize("--type-k", "llama-tq:ktq2_1", source)[0] == 0
    with open_state(tmp_path / "dump.llama-tq-ktq2_1.bin") as s:
        assert [t.format.name for t in s.tensors.values()] == ["ktq2_1"] * 2 + ["f32"] * 2


def test_type_is_for_the_side_that_has_none(tmp_path, quantize):
    code, text, _ = quantize("--type-v", "vtq2_2", "--json", F32, tmp_path / "out.bin", "ktq2_1")
    assert code == 0
    report = json.loads(text)
    assert [t["to"] for t in report["tensors"]] == ["ktq2_1"] * 2 + ["vtq2_2"] * 2
    assembled = STATES / "llama-tq.k_ktq2_1_v_vtq2_2.assembled.seq0.bin"
    assert (tmp_path / "out.bin").read_bytes() == assembled.read_bytes()
    assert (
        any("a dump of llama-tq" in note for note in report["notes"]) is False
    )  # no dialect before


def test_policy_by_layer(tmp_path, quantize):
    out = tmp_path / "out.bin"
    flags = ["--type-k", "ktq2_1", "--tensor-type", "cache_k_l0$=q8_0"]
    code, _, err = quantize(*flags, "--verify", F32, out)
    assert code == 0
    with open_state(out) as s:
        assert [t.format.name for t in s.tensors.values()] == ["q8_0", "ktq2_1", "f32", "f32"]
    flags = ["--type-v", "vtq2_2", "--exclude", "_l1$"]
    code, _, err = quantize(*flags, F32, out)
    assert code == 0
    assert "cache_v_l1: type f32 stays, its rotation becomes dhd64" in err


def test_dequantise(tmp_path, quantize):
    source = STATES / "pr21089.gemma3-iswa.k_tbq4_0_v_tbq3_0.seq0.bin"
    model = ["--model", MODELS / "gemma3.metadata.gguf"]
    out = tmp_path / "out.bin"
    assert quantize(*model, "--verify", source, out, "f32")[0] == 0
    with open_state(source) as a, open_state(out) as b:
        for x, y in zip(a.tensors.values(), b.tensors.values(), strict=True):
            assert np.array_equal(x.values(), y.values())


def test_dry_run_writes_nothing(tmp_path, quantize):
    code, text, _ = quantize("--dry-run", F32, tmp_path / "out.bin", "tbq3_0")
    assert code == 0
    assert "dry run" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([F32, "{0}/o", "vtq2_2"], 2, "type of cache_k_l0: got llama-tq:vtq2_2"),
        (["--type-k", "q8_0", "--pure", F32, "{0}/o"], 2, "--pure.*is a state file"),
        (["--type-k", "q8_0", SAMPLES / "small.f32.gguf", "{0}/o"], 2, "--type-k.*a GGUF file"),
        (["--head-dim", "8", SAMPLES / "small.f32.gguf", "{0}/o", "q8_0"], 2, "--head-dim.*GGUF"),
        (["--head-dim", "x", F32, "{0}/o", "q8_0"], 2, "--head-dim: got x"),
        (["--memory", "iswa", F32, "{0}/o", "q8_0"], 3, "the file holds kv"),
        ([STATES / "pr21089.q8_0.seq0.bin", "{0}/o", "q4_0"], 2, "need --allow-requantize to"),
        (["--type-k", "q8_0", "--type-v", "q8_0", F32, "{0}/o", "q8_0", "x"], 2, "got 4 of them"),
        (["--model", MODELS / "gemma3.metadata.gguf", F32, "{0}/o", "q8_0"], 3, "gemma3 has 6"),
    ],
)
def test_bad_call(tmp_path, quantize, args, code, words):
    import re

    got, _, err = quantize(*(str(arg).format(tmp_path) for arg in args))
    assert got == code
    assert re.search(words, err.splitlines()[-1])
    assert not list(tmp_path.iterdir())
