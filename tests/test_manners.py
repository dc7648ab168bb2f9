"""What callers and users may expect of texts, arrays, names and closed files."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import SAMPLES, STATES, STATES_V3

import gguf_io
import tbq
from tools import tbq_inspect, tbq_plan, tbq_quantize

MODEL = SAMPLES / "small.tbq3_0.pure.gguf"
DUMP = STATES / "pr21089.q8_0.seq0.bin"


def test_python_m_tbq():
    done = subprocess.run([sys.executable, "-m", "tbq"], capture_output=True, text=True)
    first, *rest = done.stdout.splitlines()
    n, dialects = len(tbq.formats()), {fmt.dialect for fmt in tbq.formats()}
    assert first == f"tbq {tbq.__version__}: {n} formats of {len(dialects)} dialects"
    assert len(rest) == len(dialects) + 1 + 7
    assert any(line.split()[0] == "tbq-quantize" for line in rest)


def test_reprs_are_short():
    with gguf_io.open_gguf(MODEL) as f, gguf_io.open_state(DUMP) as s:
        for opened in (f, s):
            tensor = next(iter(opened.tensors.values()))
            assert len(repr(opened.tensors)) < 200
            assert tensor.name in repr(tensor)
            assert len(repr(tensor)) < 100
        assert repr(f.tensors).startswith(f"<{len(f.tensors)} tensors: output.weight, ")
        assert (
            repr(s.tensors["cache_k_l0"]) == "<CacheTensor cache_k_l0: q8_0, 94 rows of 256 values>"
        )


def test_tensors_are_arrays_of_their_values():
    with gguf_io.open_gguf(MODEL) as f, gguf_io.open_state(DUMP) as s:
        weights = f.tensors["token_embd.weight"]
        keys = s.tensors["cache_k_l0"]
        assert np.array_equal(np.asarray(weights), weights.dequantize())
        assert np.array_equal(np.asarray(keys), keys.values())
        assert np.asarray(keys, np.float64).dtype == np.float64
        assert float(np.abs(keys).max()) == float(np.abs(keys.values()).max())
        with pytest.raises(ValueError, match="decoded"):
            keys.__array__(copy=False)


def test_use_after_close():
    with gguf_io.open_gguf(MODEL) as f:
        weights = f.tensors["token_embd.weight"]
    with gguf_io.open_state(DUMP) as s:
        keys = s.tensors["cache_k_l0"]
    uses = [
        (f, lambda: f.tensors),
        (f, lambda: f.metadata["general.architecture"]),
        (f, weights.dequantize),
        (f, lambda: weights.raw),
        (s, lambda: s.tensors),
        (s, lambda: s.cells(0)),
        (s, lambda: s.size),
        (s, lambda: s.header),
        (s, keys.values),
        (s, keys.raw),
    ]
    for file, use in uses:
        with pytest.raises(tbq.ClosedFileError, match="is closed") as caught:
            use()
        assert caught.value.path == str(file.path)
    assert f.closed
    assert s.closed
    assert "closed" in repr(f)
    assert "closed" in repr(s)
    f.close()
    s.close()
    with pytest.raises(AttributeError):
        f.nothing  # noqa: B018


def test_arrays_that_view_a_file_outlive_it():
    with gguf_io.open_gguf(MODEL) as f:
        raw = f.tensors["token_embd.weight"].raw
        expected = raw.copy()
    assert np.array_equal(raw, expected)


NAMES = {
    "q40": "q4_0",  # one of ggml's
    "tbq30": "tbq3_0",  # one of a fork's, from which a bare name chooses
    "bunn:turbo3": "buun:turbo3",
    "llama_tq:ktq2_1": "llama-tq:ktq2_1",
    "thetom:tbq3_0": "pr21089:tbq3_0",  # another fork's
    "buun:q4_0": "q4_0",  # every fork has ggml's own
    "f8": "f8_e4m3",  # starts so
}


@pytest.mark.parametrize("name", NAMES)
def test_did_you_mean(name):
    for resolve in (tbq.get_format, gguf_io.resolve_type):
        with pytest.raises(tbq.UnknownFormatError) as caught:
            resolve(name)
        assert NAMES[name] in caught.value.near, caught.value
        assert len(caught.value.near) <= 3


def test_names_of_both_kinds_quantise():
    x = np.ones((1, 256), np.float32)
    assert tbq.quantize(x, "q4_0").shape == (1, 144)
    assert np.array_equal(tbq.quantize(x, "ggml:Q4_0"), tbq.quantize(x, "q4_0"))
    assert tbq.quantize(x, "pr21089:tbq3_0").shape == (1, 98)


def test_dialects_and_releases_that_are_not_there():
    with pytest.raises(tbq.UnknownFormatError, match="no dialect is called 'bunn'; .* buun"):
        tbq.registry.get_dialect("bunn")
    with pytest.raises(tbq.UnknownFormatError, match="no release .* buun@2026-05") as caught:
        tbq.get_format("buun@2026-5:turbo3")
    assert len(caught.value.near) <= 3


def test_openers_name_each_other():
    with pytest.raises(tbq.FileFormatError, match="a state file.*use open_state"):
        gguf_io.open_gguf(DUMP)
    with pytest.raises(tbq.FileFormatError, match="a GGUF file.*use open_gguf"):
        gguf_io.open_state(MODEL)


def test_programs_speak_in_flags(capsys, tmp_path):
    """What the library says of parameters, programs say of flags."""
    both = STATES_V3 / "deepseek32.q8_0.seq.bin"
    runs = [
        (tbq_quantize, [DUMP, tmp_path / "o", "q4_0"], "need --allow-requantize to"),
        (tbq_quantize, [both, tmp_path / "o", "q4_0", "--allow-requantize"], "--memory or --model"),
        (tbq_plan, [DUMP], "a state file, not a GGUF file; tbq-inspect and tbq-quantize read it"),
        (tbq_inspect, ["--candidates", "zzz", DUMP], "see tbq-quantize --help"),
    ]
    for program, args, words in runs:
        assert program.main([*map(str, args)]) in (2, 3)
        said = capsys.readouterr().err
        assert words in said, said
        assert not any(f"{name}= " in said for name in ("model", "memory", "head_dim"))
    assert tbq_inspect.main([str(DUMP)]) == 0
    assert "--model or --head-dim does" in " ".join(capsys.readouterr().out.split())
