"""Metadata of any type and value under any key that is read: our own errors, in one line."""

import json
import struct

import gguf_bytes as g
import numpy as np
import pytest
from conftest import MODELS, STATES

import gguf_io
import tbq
from tools import tbq_bench

# Every key that something reads, and what else a file may hold there.
GENERAL_KEYS = (
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    "split.no",
    "split.count",
    "split.tensors.count",
    "tbq.split.crc32",
    "tbq.dialect",
    "tbq.release",
)
MODEL_KEYS = (
    "block_count",
    "nextn_predict_layers",
    "embedding_length",
    "expert_count",
    "full_attention_interval",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.key_length_swa",
    "attention.key_length_mla",
    "attention.value_length",
    "attention.value_length_swa",
    "attention.shared_kv_layers",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "rope.dimension_sections",
)


def scalar(kind, code, value):
    return struct.pack("<I", kind) + struct.pack("<" + code, value)


def items(kind, code, *values):
    body = b"".join(struct.pack("<" + code, value) for value in values)
    return struct.pack("<IIQ", g.ARRAY, kind, len(values)) + body


def texts(*values):
    return struct.pack("<IIQ", g.ARRAY, g.STRING, len(values)) + b"".join(map(g.string, values))


NAN, INF = float("nan"), float("inf")
WRONG = {
    "missing": None,
    "empty text": struct.pack("<I", g.STRING) + g.string(""),
    "text": struct.pack("<I", g.STRING) + g.string("two\nlines \x1b[2J"),
    "digits": struct.pack("<I", g.STRING) + g.string("2"),
    "not UTF-8": struct.pack("<I", g.STRING) + g.string(b"\xff\xfe\xed\xa0\x80"),
    "long text": struct.pack("<I", g.STRING) + g.string("x" * 100_000),
    "zero": scalar(g.U32, "I", 0),
    "one": scalar(g.U8, "B", 1),
    "negative": scalar(g.I32, "i", -1),
    "least": scalar(g.I64, "q", -(1 << 63)),
    "most": scalar(g.U64, "Q", (1 << 64) - 1),
    "many": scalar(g.U32, "I", 1_000_000),
    "true": scalar(g.BOOL, "B", 1),
    "NaN": scalar(g.F32, "f", NAN),
    "infinity": scalar(g.F64, "d", -INF),
    "fraction": scalar(g.F32, "f", 2.5),
    "no items": items(g.U32, "I"),
    "no texts": texts(),
    "few": items(g.I32, "i", 2),
    "huge items": items(g.U64, "Q", *[(1 << 64) - 1] * 8),
    "negative items": items(g.I32, "i", *[-1] * 8),
    "zeros": items(g.I32, "i", *[0] * 8),
    "NaNs": items(g.F32, "f", *[NAN] * 8),
    "flags": items(g.BOOL, "B", *[1, 0] * 4),
    "texts": texts("a\x1b", b"\xff", *["2"] * 6),
    "long": items(g.I8, "b", *[2] * 5000),
}

PAIRS = {
    "llama": "pr21089.llama.nonunified.session.bin",
    "gemma3": "pr21089.gemma3-iswa.k_tbq4_0_v_tbq3_0.seq0.bin",
    "lfm2": "pr21089.lfm2-hybrid.nonunified.session.bin",
    "mamba": "pr21089.mamba-recurrent.seq0.bin",
    "qwen2vl": "pr21089.qwen2vl-mrope.seq0.bin",
}


def rewrite(path, architecture, key, value):
    """Write a sample model's metadata with another value of a key."""
    with gguf_io.open_gguf(MODELS / f"{architecture}.metadata.gguf") as file:
        fields = {name: bytes(field.raw) for name, field in file.metadata.fields.items()}
    fields.pop(key, None)
    if value is not None:
        fields[key] = value
    kvs = [g.string(name) + raw for name, raw in fields.items()]
    path.write_bytes(g.gguf_file(kvs, [g.tensor("blk.0.w.weight", (32, 2))], bytes(256)))
    return path


def own_failure(code, out, err):
    """Whether a program did its work, or ended as it does where its input is bad."""
    if code == 0:
        return "Traceback" not in err and "\x1b" not in out + err
    return code in (2, 3) and out == "" and err.count("\n") == 1 and len(err) < 1500


@pytest.mark.parametrize("key", GENERAL_KEYS)
def test_general_keys(inspect, quantize, tmp_path, key):
    for name, value in WRONG.items():
        path = rewrite(tmp_path / "m.gguf", "llama", key, value)
        for run in (
            lambda path=path: inspect(path),
            lambda path=path: inspect("--dialect", "pr21089", path),
            lambda path=path: quantize("--pure", path, tmp_path / "o.gguf", "q8_0"),
            lambda path=path: inspect("--model", path, STATES / PAIRS["llama"], "--layers", "0"),
        ):
            result = run()
            assert own_failure(*result), (key, name, result)


@pytest.mark.parametrize("architecture", PAIRS)
@pytest.mark.parametrize("key", MODEL_KEYS)
def test_model_keys(tmp_path, architecture, key):
    """The library: what is read is sane, or it is a FileFormatError."""
    for name, value in WRONG.items():
        path = rewrite(tmp_path / "m.gguf", architecture, f"{architecture}.{key}", value)
        try:
            shape = gguf_io.model_shape(path)
        except tbq.FileFormatError:
            continue
        assert 0 < shape.n_layer <= 1024, name
        assert all(n >= 0 for n in (*shape.n_head_kv, *shape.head_dim_k, *shape.head_dim_v))
        try:
            with gguf_io.open_state(STATES / PAIRS[architecture], model=path) as state:
                assert state.rotation.reason
                for t in state.tensors.values():
                    assert t.values(0, 1).size == t.n_embd, name
        except (tbq.FileFormatError, tbq.AmbiguousTypeError):
            pass


@pytest.mark.parametrize("key", ["attention.head_count_kv", "attention.key_length", "block_count"])
def test_programs_with_a_malformed_model(inspect, quantize, tmp_path, key):
    for name, value in WRONG.items():
        path = rewrite(tmp_path / "m.gguf", "llama", f"llama.{key}", value)
        state, out = STATES / PAIRS["llama"], tmp_path / "o.bin"
        result = quantize("--model", path, "--allow-requantize", state, out, "f16")
        assert own_failure(*result), (key, name, result)
        result = inspect("--json", "--model", path, state)
        assert own_failure(*result), (key, name, result)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "lfm2"])
@pytest.mark.parametrize("layers", [1, 2, 4, 1024])
def test_a_model_with_other_layers_than_the_dump(inspect, tmp_path, architecture, layers):
    key = f"{architecture}.block_count"
    path = rewrite(tmp_path / "m.gguf", architecture, key, scalar(g.U32, "I", layers))
    code, out, err = inspect("--model", path, STATES / PAIRS[architecture])
    assert (code, out) == (3, ""), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", WRONG)
def test_what_is_written_is_what_was_read(quantize, tmp_path, name):
    """Keys that nobody needs come through byte for byte, whatever they hold."""
    path, out = tmp_path / "m.gguf", tmp_path / "o.gguf"
    rewrite(path, "llama", "some.key", WRONG[name])
    assert quantize(path, out, "q8_0")[0] == 0
    with gguf_io.open_gguf(path) as a, gguf_io.open_gguf(out) as b:
        for key, field in a.metadata.fields.items():
            if key not in ("general.file_type", "general.quantization_version"):
                assert bytes(b.metadata.fields[key].raw) == bytes(field.raw)


def test_typed_access():
    fields = {"a": "text", "b": 3, "c": -1, "d": True, "e": 2.0, "f": [1, 2]}
    metadata = gguf_io.Metadata({key: gguf_io.Field.of(value) for key, value in fields.items()})
    assert [metadata.text(key) for key in "abcdefg"] == ["text"] + [None] * 6
    assert [metadata.number(key) for key in "abcdefg"] == [None, 3, *[None] * 5]


@pytest.mark.parametrize("alignment", [0, -32, True, 2.0, "32", [32], 1 << 33, 24])
def test_a_bad_alignment_is_not_written(tmp_path, alignment):
    tensor = gguf_io.OutputTensor.from_array("t", np.zeros((1, 32), np.float32))
    with pytest.raises(tbq.InputError, match="general.alignment"):
        gguf_io.write_gguf(tmp_path / "o", {"general.alignment": alignment}, [tensor])
    assert list(tmp_path.iterdir()) == []


# --- arguments -----------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ["--layers", "²"],
    ["--layers", "0-²"],
    ["--layers", "-1"],
    ["--layers", ""],
    ["--layers", "5-2"],
    ["--layers", "9-99999999999999999999"],
    ["--layers", "9" * 5000],
    ["--max-rows", "-1"],
    ["--max-rows", "1"],
    ["--max-kl", "nan", "--candidates", "q8_0"],
    ["--head-dim", "²"],
    ["--head-dim", "0"],
    ["--head-dim", "9" * 5000],
    ["--recurrent-layers", "-1"],
    ["--threads", "0"],
    ["--dialect", "x\ny"],
    ["--candidates", ","],
]


@pytest.mark.parametrize("args", BAD_ARGUMENTS, ids=lambda args: " ".join(args)[:30])
def test_bad_arguments_of_inspect(inspect, args):
    code, out, err = inspect(*args, STATES / "pr21089.f16.seq0.bin")
    assert code in (2, 3), (code, err)
    assert out == ""
    assert err.count("\n") == 1 or err.startswith("usage: ")
    assert len(err) < 6000


def test_ranges_of_layers_that_nobody_has_cost_nothing(inspect):
    code, out, err = inspect(
        "--json", "--layers", "1-99999999999,0", STATES / "pr21089.f16.seq0.bin"
    )
    assert code == 0, err
    assert {t["layer"] for t in json.loads(out)["tensors"]} == {0, 1}


@pytest.mark.parametrize("rows", ["0", "-1", "²", "", "256,", "99999999999999", "9" * 5000, "1.5"])
def test_bad_row_lengths_of_the_benchmark(capsys, rows):
    assert tbq_bench.main(["--rows=" + rows, "tbq3_0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
