"""tbq-quantize against llama-quantize's own files, its rules, and everything that can go wrong."""

import errno
import fcntl
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import gguf_bytes as g
import numpy as np
import pytest
from conftest import HERE, SAMPLES, run_program
from gguf import GGUFValueType

import gguf_io
import tbq
from gguf_io import Field, OutputTensor, steps
from gguf_io.writer import OWN_KEYS
from tools import tbq_quantize

F32 = SAMPLES / "small.f32.gguf"
PURE = SAMPLES / "small.tbq3_0.pure.gguf"
MOSTLY = SAMPLES / "small.tbq4_0.mostly.gguf"


def model(path, shapes, metadata=None, kind="f32", rng=None):
    """Write a file of Gaussian tensors; shapes are NumPy's, by name."""
    rng = rng or np.random.default_rng(11)
    tensors = []
    for name, shape in shapes.items():
        x = rng.standard_normal(shape).astype(np.float32)
        packed = gguf_io.types.quantize_rows(x.reshape(-1, shape[-1]), gguf_io.resolve_type(kind))
        kind_ = gguf_io.resolve_type(kind)
        tensors.append(OutputTensor(name, shape, kind_, packed.nbytes, lambda p=packed: [p]))
    gguf_io.write_gguf(path, {"general.architecture": "llama"} | (metadata or {}), tensors)
    return path


def types(path):
    with gguf_io.open_gguf(path) as f:
        return {name: t.format.name for name, t in f.tensors.items()}


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


# --- what llama-quantize writes ---


def test_pure_equals_llama_quantize(tmp_path, quantize):
    out = tmp_path / "out.gguf"
    code, _, _ = quantize("--pure", F32, out, "TBQ3_0")
    assert code == 0
    with gguf_io.open_gguf(out) as ours, gguf_io.open_gguf(PURE) as theirs:
        assert list(ours.tensors) == list(theirs.tensors)
        for name, t in theirs.tensors.items():
            o = ours.tensors[name]
            assert (o.type_id, o.ggml_shape) == (t.type_id, t.ggml_shape)
            assert o.raw.tobytes() == t.raw.tobytes()
        fields = {k: bytes(v.raw) for k, v in ours.metadata.fields.items()}
        assert list(fields)[-4:] == list(OWN_KEYS)
        expected = {k: bytes(v.raw) for k, v in theirs.metadata.fields.items()}
        assert list(fields.items())[:-4] == list(expected.items())


def test_mixture_equals_llama_quantize(tmp_path, quantize):
    """All tensors, q6_K and q4_K of the output and the token embeddings among them."""
    out = tmp_path / "out.gguf"
    code, _, err = quantize(F32, out, "tbq4_0")
    assert (code, err.count("tbq-quantize:")) == (0, 0)
    with gguf_io.open_gguf(out) as ours, gguf_io.open_gguf(MOSTLY) as theirs:
        assert list(ours.tensors) == list(theirs.tensors)
        for name, t in theirs.tensors.items():
            o = ours.tensors[name]
            assert (o.type_id, o.raw.tobytes()) == (t.type_id, t.raw.tobytes())
        assert {"q6_K", "q4_K"} < {t.format.name for t in theirs.tensors.values()}
        assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"] == 42


def test_lines_read_like_llama_quantize(tmp_path, quantize):
    code, out, err = quantize("--pure", F32, tmp_path / "out.gguf", "tbq3_0")
    first = (
        "[   1/   5] output.weight                        - [  256,   256,     1,     1], "
        "type =    f32, converting to tbq3_0 .. size =     0.25 MiB ->     0.02 MiB"
    )
    assert out.splitlines()[0] == first
    assert re.search(r"model size  = +0.75 MiB \(32.00 BPW\)", out)
    assert re.search(r"quant size  = +0.07 MiB \(3.14 BPW\)", out)
    assert "\r" not in err


def test_dequantise_and_verify(tmp_path, quantize):
    back = tmp_path / "back.gguf"
    code, out, err = quantize("--verify", PURE, back, "f32")
    assert code == 0
    assert "reading" in err
    assert "as dialect pr21089: the only registered dialect" in err
    with gguf_io.open_gguf(PURE) as source, gguf_io.open_gguf(back) as f:
        for name, t in source.tensors.items():
            assert f.tensors[name].format.name == "f32"
            assert f.tensors[name].raw.tobytes() == t.dequantize().tobytes()
        assert f.metadata["general.file_type"] == 0
        assert not any(key.startswith("tbq.") for key in f.metadata)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("f32", 0),
        ("f16", 1),
        ("bf16", 32),
        ("q8_0", 7),
        ("q4_0", 2),
        ("mxfp4", 38),
        ("tq2_0", 37),
        ("q2_K", 10),
        ("q3_K", 12),
        ("q4_K", 15),
        ("Q5_K_S", 16),
        ("q6_K", 18),
        ("tbq3_0", 41),
        ("pr21089:tbq4_0", 42),
    ],
)
def test_every_kind_of_target(tmp_path, quantize, name, number):
    out = tmp_path / "out.gguf"
    code, text, _ = quantize("--pure", "--verify", "--json", F32, out, name)
    report = json.loads(text)
    assert code == (1 if report["tensors"][0]["failed"] else 0) == 0
    with gguf_io.open_gguf(out) as f:
        assert f.metadata["general.file_type"] == number
        assert f.metadata["general.quantization_version"] == 2
        expected = name.rpartition(":")[2].replace("Q5_K_S", "q5_K")
        assert f.tensors["output.weight"].format.name == expected
        assert f.tensors["output_norm.weight"].format.name == "f32"


# --- which tensors, which types ---


def test_tensors_that_are_left_alone(tmp_path, quantize):
    alone = {
        "blk.0.attn_norm.weight": (256,),
        "blk.0.ffn_gate_inp.weight": (8, 256),
        "blk.0.attn_q.bias": (2, 256),
        "blk.0.ssm_conv1d.weight": (4, 256),
        "blk.0.time_mix_w1.weight": (4, 256),
        "blk.0.attn_q_norm.weight": (4, 256),
        "position_embd.weight": (4, 256),
        "token_types.weight": (2, 256),
        "v.patch_embd.weight": (4, 256),
        "one.row.weight": (1, 256),
    }
    taken = {
        "blk.0.attn_q.weight": (4, 256),
        "blk.0.ffn_up_exps.weight": (2, 3, 256),
        "blk.0.four.weight": (2, 2, 2, 256),
        "v.blk.0.attn_q.weight": (4, 256),
    }
    source = model(tmp_path / "in.gguf", alone | taken | {"output.weight": (4, 256)})
    quantize("--pure", source, tmp_path / "out.gguf", "tbq3_0")
    expected = dict.fromkeys(alone, "f32") | dict.fromkeys(taken, "tbq3_0")
    assert types(tmp_path / "out.gguf") == expected | {"output.weight": "tbq3_0"}
    quantize("--pure", "--leave-output-tensor", source, tmp_path / "out.gguf", "tbq3_0")
    assert types(tmp_path / "out.gguf")["output.weight"] == "f32"


def test_include_and_exclude(tmp_path, quantize):
    names = ["blk.0.attn_k.weight", "blk.0.attn_v.weight", "blk.1.attn_k.weight"]
    source = model(tmp_path / "in.gguf", dict.fromkeys(names, (2, 256)))
    out = tmp_path / "out.gguf"
    quantize("--pure", "--include", "attn_k", "--exclude", r"blk\.1", source, out, "tbq3_0")
    assert list(types(out).values()) == ["tbq3_0", "f32", "f32"]


def test_tensor_type_overrides(tmp_path, quantize):
    names = [f"blk.{i}.attn_k.weight" for i in range(3)]
    source = model(tmp_path / "in.gguf", dict.fromkeys(names, (2, 256)))
    out = tmp_path / "out.gguf"
    flags = ["--tensor-type", "BLK.0=q8_0", "--tensor-type", r"blk\.[01]\.=f16"]
    _, _, err = quantize(*flags, source, out, "tbq3_0")
    assert list(types(out).values()) == ["q8_0", "f16", "tbq3_0"]
    assert "blk.0.attn_k.weight: manual override: tbq3_0 -> q8_0" in err
    _, _, err = quantize("--pure", *flags, source, out, "tbq3_0")
    assert set(types(out).values()) == {"tbq3_0"}
    assert "--tensor-type is ignored" in err


def test_output_and_embedding_types(tmp_path, quantize):
    shapes = dict.fromkeys(["output.weight", "token_embd.weight", "blk.0.x.weight"], (2, 256))
    source, out = model(tmp_path / "in.gguf", shapes), tmp_path / "out.gguf"
    flags = ["--output-tensor-type", "q8_0", "--token-embedding-type", "tbq4_0"]
    for pure in ([], ["--pure"]):
        quantize(*pure, *flags, source, out, "tbq3_0")
        assert types(out) == {
            "output.weight": "q8_0",
            "token_embd.weight": "tbq4_0",
            "blk.0.x.weight": "tbq3_0",
        }


def test_tied_embeddings_take_the_output_type(tmp_path, quantize):
    shapes = dict.fromkeys(["token_embd.weight", "blk.0.x.weight"], (2, 256))
    source, out = model(tmp_path / "in.gguf", shapes), tmp_path / "out.gguf"
    quantize(source, out, "tbq3_0")
    assert types(out)["token_embd.weight"] == "q6_K"
    quantize("--output-tensor-type", "q8_0", source, out, "tbq3_0")
    assert types(out)["token_embd.weight"] == "q8_0"


def test_rows_that_do_not_divide_fall_back(tmp_path, quantize):
    shapes = {
        "blk.0.a.weight": (2, 256),
        "blk.0.b.weight": (2, 160),
        "blk.0.c.weight": (2, 100),
        "output.weight": (2, 160),
        "token_embd.weight": (2, 160),
    }
    source, out = model(tmp_path / "in.gguf", shapes), tmp_path / "out.gguf"
    code, text, err = quantize(source, out, "tbq3_0")
    assert code == 0
    assert types(out) == {
        "output.weight": "q8_0",
        "token_embd.weight": "q5_0",
        "blk.0.a.weight": "tbq3_0",
        "blk.0.b.weight": "q4_0",
        "blk.0.c.weight": "f16",
    }
    assert "160 columns are not divisible by 256, required for tbq3_0; falling back to q4_0" in err
    assert "3 of 5 tensor(s) required fallback quantization" in text


def test_pure_refuses_where_llama_quantize_aborts(tmp_path, quantize):
    source = model(tmp_path / "in.gguf", {"blk.0.b.weight": (2, 160)})
    for dry in ([], ["--dry-run"]):
        code, _, err = quantize("--pure", *dry, source, tmp_path / "out.gguf", "tbq3_0")
        assert code == 2
        assert "blk.0.b.weight" in err
        assert "rows of 160 values, need a multiple of 256" in err
        assert "without --pure" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.gguf"]


def test_eight_experts_and_falcon(tmp_path, quantize):
    names = ["output.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight", "blk.0.attn_q.weight"]
    shapes = dict.fromkeys(names, (2, 256))
    out = tmp_path / "out.gguf"
    quantize(model(tmp_path / "m.gguf", shapes, {"llama.expert_count": 8}), out, "tbq3_0")
    assert list(types(out).values()) == ["q6_K", "q8_0", "tbq3_0", "q8_0"]
    quantize(model(tmp_path / "f.gguf", shapes, {"general.architecture": "falcon"}), out, "tbq3_0")
    assert types(out)["output.weight"] == "q8_0"


def test_mxfp4_is_for_experts(tmp_path, quantize):
    shapes = {"blk.0.ffn_up_exps.weight": (2, 4, 256), "blk.0.attn_q.weight": (4, 256)}
    quantize(model(tmp_path / "in.gguf", shapes), tmp_path / "out.gguf", "mxfp4")
    assert list(types(tmp_path / "out.gguf").values()) == ["q8_0", "mxfp4"]


def test_requantising_needs_permission(tmp_path, quantize):
    out = tmp_path / "out.gguf"
    for dry in ([], ["--dry-run"]):
        code, _, err = quantize("--pure", *dry, PURE, out, "tbq4_0")
        assert code == 2
        assert "tbq3_0, which is quantised already, need --allow-requantize" in err
    assert not out.exists()
    assert quantize("--pure", "--allow-requantize", PURE, out, "tbq4_0")[0] == 0
    with gguf_io.open_gguf(PURE) as source, gguf_io.open_gguf(out) as f:
        x = source.tensors["output.weight"].dequantize()
        assert np.array_equal(f.tensors["output.weight"].raw, tbq.quantize(x, "tbq4_0"))


def test_same_type_is_copied(tmp_path, quantize):
    code, out, _ = quantize("--pure", "--verify", PURE, tmp_path / "out.gguf", "tbq3_0")
    assert code == 0
    assert "converting" not in out
    with gguf_io.open_gguf(PURE) as a, gguf_io.open_gguf(tmp_path / "out.gguf") as b:
        assert all(b.tensors[n].raw.tobytes() == t.raw.tobytes() for n, t in a.tensors.items())


def test_three_and_four_axes(tmp_path, quantize):
    source = model(tmp_path / "in.gguf", {"blk.0.e.weight": (2, 3, 5, 512)})
    quantize("--pure", source, tmp_path / "out.gguf", "tbq4_0")
    with gguf_io.open_gguf(source) as a, gguf_io.open_gguf(tmp_path / "out.gguf") as b:
        (x,), (q,) = a.tensors.values(), b.tensors.values()
        assert q.shape == (2, 3, 5, 512)
        assert np.array_equal(q.raw, tbq.quantize(x.dequantize(), "tbq4_0"))


def test_chunks_and_threads_change_no_byte(tmp_path, quantize, monkeypatch):
    quantize("--pure", F32, tmp_path / "a.gguf", "tbq3_0")
    monkeypatch.setattr(steps, "CHUNK_VALUES", 1000)
    quantize("--pure", "--threads", 3, F32, tmp_path / "b.gguf", "tbq3_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_unknown_types_are_carried_along(tmp_path, quantize, monkeypatch):
    monkeypatch.setattr(steps, "CHUNK_VALUES", 64)  # more than one chunk of rows
    source = tmp_path / "in.gguf"
    records = [g.tensor("x.weight", (256, 2)), g.tensor("u", (64, 2), 99, 2048)]
    source.write_bytes(g.gguf_file([], records, bytes(2048) + bytes(range(100)) * 2))
    code, _, _ = quantize("--pure", "--verify", source, tmp_path / "out.gguf", "q8_0")
    assert code == 0
    with gguf_io.open_gguf(tmp_path / "out.gguf") as f:
        assert f.tensors["u"].raw[:200].tobytes() == bytes(range(100)) * 2
    code, _, err = quantize("--pure", source, tmp_path / "out.gguf", "tbq3_0")
    assert code == 2
    assert "one dialect" in err or "belong to one dialect" in err


@pytest.mark.parametrize("name", ["ktq2", "vtq1", "vtq_mixed", "vtq3", "llama-tq-cuda:ktq2_1"])
def test_formats_of_other_dialects(tmp_path, quantize, name):
    """Aliases and full names; the file says its dialect, so it reads back without flags."""
    fmt = tbq.get_format(name)
    out, back = tmp_path / "out.gguf", tmp_path / "back.gguf"
    quantize("--pure", "--include", "attn_k", F32, out, name)
    with gguf_io.open_gguf(F32) as source, gguf_io.open_gguf(out) as f:
        t = f.tensors["blk.0.attn_k.weight"]
        x = source.tensors[t.name].dequantize()
        assert (f.dialect, f.dialect_guessed, t.format) == (fmt.dialect, False, fmt)
        assert np.array_equal(t.raw, tbq.quantize(x, fmt))
        assert "general.file_type" not in f.metadata
    code, _, err = quantize(out, back, "f32")
    assert (code, err) == (0, "")
    with gguf_io.open_gguf(back) as f:
        y = tbq.dequantize(tbq.quantize(x, fmt), fmt)
        assert np.array_equal(f.tensors[t.name].dequantize(), y)


def test_flat_block_index_runs_on_through_chunks(tmp_path, quantize, monkeypatch):
    """llama-tq's CUDA code seeds its signs by the position in the whole tensor."""
    monkeypatch.setattr(steps, "CHUNK_VALUES", 3000)
    out = tmp_path / "out.gguf"
    quantize("--pure", "--include", "attn_k", F32, out, "llama-tq-cuda:ktq4_1")
    with gguf_io.open_gguf(F32) as source, gguf_io.open_gguf(out) as f:
        x = source.tensors["blk.0.attn_k.weight"].dequantize()
        expected = tbq.quantize(x, "llama-tq-cuda:ktq4_1", threads=1)
        assert np.array_equal(f.tensors["blk.0.attn_k.weight"].raw, expected)


def test_dialects_do_not_mix_in_one_file(tmp_path, quantize):
    names = ["blk.0.attn_k.weight", "blk.0.attn_v.weight"]
    source = model(tmp_path / "in.gguf", dict.fromkeys(names, (2, 256)))
    flags = ["--tensor-type", "attn_k=ktq2_1"]
    for dry in ([], ["--dry-run"]):
        code, _, err = quantize(*flags, *dry, source, tmp_path / "out.gguf", "tbq3_0")
        assert code == 2
        assert "formats of the dialects llama-tq, pr21089, need one dialect per file" in err
    assert list(tmp_path.iterdir()) == [source]


def test_a_format_that_needs_a_sibling_is_no_target(tmp_path, quantize):
    code, _, err = quantize("--pure", F32, tmp_path / "out.gguf", "xktq2_1")
    assert code == 2
    assert "sibling llama-tq:ktq2_1 row" in err
    assert list(tmp_path.iterdir()) == []


# --- splits ---


def split_model(tmp_path, rng):
    fmt = gguf_io.resolve_type("f32")

    def tensor(name):
        x = rng.standard_normal((4, 256)).astype(np.float32)
        return OutputTensor(name, x.shape, fmt, x.nbytes, lambda: [x])

    shards = [[tensor("blk.1.z.weight"), tensor("blk.0.y.weight")], [tensor("blk.0.a.weight")]]
    gguf_io.write_gguf_shards(tmp_path / "in", {"general.architecture": "llama"}, shards)
    return gguf_io.split_path(tmp_path / "in", 0, 2)


def test_split_model_becomes_one_file(tmp_path, quantize, rng):
    out = tmp_path / "out.gguf"
    assert quantize("--pure", split_model(tmp_path, rng), out, "tbq3_0")[0] == 0
    with gguf_io.open_gguf(out) as f:
        assert list(f.tensors) == ["blk.0.a.weight", "blk.0.y.weight", "blk.1.z.weight"]
        assert not any(key.startswith("split.") for key in f.metadata)


def test_keep_split(tmp_path, quantize, rng):
    out = tmp_path / "out.gguf"
    first = split_model(tmp_path, rng)
    code, _, _ = quantize("--pure", "--verify", "--keep-split", first, out, "tbq3_0")
    assert code == 0
    assert not out.exists()
    with gguf_io.open_gguf(tmp_path / "out-00001-of-00002.gguf") as f:
        assert [(t.name, t.shard) for t in f.tensors.values()] == [
            ("blk.1.z.weight", 0),
            ("blk.0.y.weight", 0),
            ("blk.0.a.weight", 1),
        ]
        with gguf_io.open_gguf(first) as source:
            for name, t in source.tensors.items():
                assert np.array_equal(f.tensors[name].raw, tbq.quantize(t.dequantize(), "tbq3_0"))
    code, _, err = quantize("--keep-split", first, tmp_path / "in.gguf", "q8_0")
    assert code == 2
    assert "a file that is not read" in err


# --- output forms ---


def test_default_output_is_beside_the_input(tmp_path, quantize):
    source = tmp_path / "in.gguf"
    source.write_bytes(F32.read_bytes())
    code, out, _ = quantize(source, "tbq3_0")
    assert code == 0
    assert (tmp_path / "ggml-model-TBQ3_0.gguf").exists()


def test_options_may_stand_between_positionals(tmp_path, quantize):
    out = tmp_path / "out.gguf"
    assert quantize(F32, "--pure", out, "--threads", 1, "tbq3_0", "--verify")[0] == 0
    assert out.exists()


TENSOR_KEYS = {
    "name": str,
    "ggml_shape": list,
    "from": str,
    "to": str,
    "model_bytes": int,
    "quant_bytes": int,
    "nonfinite": int,
    "overflowed": int,
    "note": (str, type(None)),
    "relative_mse": (float, type(None)),
    "cosine": (float, type(None)),
    "identical": (bool, type(None)),
    "failed": bool,
}


def test_json_schema(tmp_path, quantize):
    flags = ("--verify", "--json", "--tensor-type", "attn_v=q8_0")
    shapes = dict.fromkeys(["blk.0.attn_k.weight", "blk.0.attn_v.weight"], (16, 256))
    source = model(tmp_path / "in.gguf", shapes | {"output_norm.weight": (256,)})
    code, out, _ = quantize(*flags, source, tmp_path / "out.gguf", "tbq3_0")
    report = json.loads(out)
    assert code == 0
    assert report["schema"] == "tbq-quantize/1"
    assert report["type"] == "pr21089:tbq3_0"
    assert report["output"] == [str(tmp_path / "out.gguf")]
    for tensor in report["tensors"]:
        assert set(tensor) == set(TENSOR_KEYS)
        assert all(isinstance(tensor[key], kind) for key, kind in TENSOR_KEYS.items())
    by_name = {t["name"]: t for t in report["tensors"]}
    assert 0.032 < by_name["blk.0.attn_k.weight"]["relative_mse"] < 0.036
    assert by_name["output_norm.weight"]["identical"] is True
    assert by_name["blk.0.attn_v.weight"]["note"] == "manual override: tbq3_0 -> q8_0"
    with gguf_io.open_gguf(tmp_path / "out.gguf") as f:
        sizes = {name: t.n_bytes for name, t in f.tensors.items()}
    assert {t["name"]: t["quant_bytes"] for t in report["tensors"]} == sizes
    assert report["quant_bytes"] == sum(sizes.values())


def test_dry_run_writes_nothing_and_says_the_same_sizes(tmp_path, quantize):
    out = tmp_path / "out.gguf"
    _, dry, _ = quantize("--dry-run", "--json", F32, out, "tbq3_0")
    assert list(tmp_path.iterdir()) == []
    _, wet, _ = quantize("--json", F32, out, "tbq3_0")
    dry, wet = json.loads(dry), json.loads(wet)
    assert dry["output"] == []
    assert dry["quant_bytes"] == wet["quant_bytes"]
    assert dry["tensors"] == wet["tensors"]


def test_non_finite_values_are_counted_and_follow_the_c_code(tmp_path, quantize):
    x = np.ones((2, 256), np.float32)
    x[1, 3:6] = np.nan, np.inf, -np.inf
    source = tmp_path / "in.gguf"
    gguf_io.write_gguf(source, {}, [OutputTensor.from_array("x.weight", x)])
    out = tmp_path / "out.gguf"
    code, _, err = quantize("--pure", source, out, "tbq3_0")
    assert code == 0
    assert "x.weight: 3 values are NaN or infinite" in err
    with gguf_io.open_gguf(out) as f:
        assert np.array_equal(f.tensors["x.weight"].raw, tbq.quantize(x, "tbq3_0"))


def test_verify_fails_where_finite_values_become_infinite(tmp_path, quantize):
    """A norm above 65504 overflows the float16 scale, as in the C code: not without being asked."""
    x = np.full((2, 256), 1e5, np.float32)
    x[1] = 1
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    gguf_io.write_gguf(source, {}, [OutputTensor.from_array("x.weight", x)])
    code, _, err = quantize("--pure", source, out, "tbq3_0")
    assert (code, out.exists(), leftovers(tmp_path)) == (1, False, [])
    assert "256 of x.weight; nothing was written" in err
    code, text, err = quantize("--pure", "--allow-overflow", "--json", source, out, "tbq3_0")
    assert (code, json.loads(text)["tensors"][0]["overflowed"]) == (0, 256)
    assert "x.weight: 256 finite values become infinite or NaN as tbq3_0" in err


@pytest.mark.parametrize(
    "kind", ["f16", "bf16", "q8_0", "q4_1", "q5_0", "q4_K", "tbq4_0", "ktq2_1", "vtq3_1"]
)
def test_finite_values_that_overflow_are_counted(tmp_path, quantize, kind, rng):
    x = rng.standard_normal((3, 256)).astype(np.float32)
    x[1] *= 3e38 / np.abs(x[1]).max() if kind == "bf16" else 1e7
    x[1, 7] = 3.4e38
    x[2, 5] = np.nan  # loses its group, which was lost already
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    gguf_io.write_gguf(source, {}, [OutputTensor.from_array("x.weight", x)])
    code, _, err = quantize("--pure", source, out, kind)
    assert (code, out.exists()) == (1, False)
    code, text, _ = quantize("--pure", "--allow-overflow", "--json", source, out, kind)
    with gguf_io.open_gguf(out) as f:
        t = f.tensors["x.weight"]
        groups = t.dequantize().reshape(-1, t.format.group_values)
    usable = np.isfinite(x.reshape(groups.shape)).all(axis=1)
    lost = int((~np.isfinite(groups[usable])).sum())
    assert (code, json.loads(text)["tensors"][0]["overflowed"]) == (0, lost)
    assert lost
    assert f"{lost} of x.weight" in err


def test_verify_notices_a_wrong_byte(tmp_path, quantize, monkeypatch):
    """--verify reads the file back; damage between writing and reading is found."""
    out = tmp_path / "out.gguf"
    verify = tbq_quantize._verify

    def damage_and_verify(job):
        data = bytearray(out.read_bytes())
        data[-1] ^= 1  # the last tensor, blk.0.attn_norm.weight, is a copy
        out.write_bytes(data)
        verify(job)

    monkeypatch.setattr(tbq_quantize, "_verify", damage_and_verify)
    code, text, _ = quantize("--pure", "--verify", F32, out, "tbq3_0")
    assert code == 1
    assert re.search(r"blk.0.attn_norm.weight .*FAILED", text)


# --- what goes wrong ---


# Arguments ({0} is a scratch folder), exit code, words of the error line.
BAD_CALLS = {
    "near miss": ([F32, "{0}/out.gguf", "tbq33"], 2, "did you mean .*tbq3"),
    "no near miss": ([F32, "{0}/out.gguf", "zzz"], 2, "no format is called 'zzz'"),
    "near miss of a ggml type": ([F32, "{0}/out.gguf", "f33"], 2, "did you mean .*f32"),
    "i-quant": ([F32, "{0}/out.gguf", "iq3_s"], 4, "gguf-py: cannot quantise to iq3_s"),
    "i-quant for one tensor": (
        ["--output-tensor-type", "iq4_xs", F32, "{0}/out.gguf", "tbq3_0"],
        4,
        "iq4_xs",
    ),
    "dialect": (["--dialect", "nope", F32, "{0}/out.gguf", "tbq3_0"], 2, "nope.*pr21089"),
    "regex": (["--include", "(", F32, "{0}/out.gguf", "tbq3_0"], 2, "regular expression"),
    "override": (["--tensor-type", "attn", F32, "{0}/out.gguf", "tbq3_0"], 2, "REGEX=TYPE"),
    "threads": (["--threads", "0", F32, "{0}/out.gguf", "tbq3_0"], 2, "--threads: got 0"),
    "absent": (["{0}/absent.gguf", "{0}/out.gguf", "tbq3_0"], 3, "absent.gguf: No such file"),
    "directory": (["{0}", "{0}/out.gguf", "tbq3_0"], 3, "Is a directory"),
    "truncated": (["{0}/cut.gguf", "{0}/out.gguf", "tbq3_0"], 3, "the file has 262044 left"),
    "not GGUF": (["{0}/text.gguf", "{0}/out.gguf", "tbq3_0"], 3, "magic is b'hell'"),
    "no folder": ([F32, "{0}/no/out.gguf", "tbq3_0"], 3, "no/out.gguf: No such file"),
    "output a folder": ([F32, "{0}", "tbq3_0"], 2, "regular file"),
    "device": ([F32, "/dev/null", "tbq3_0"], 2, "regular file"),
    "no arguments": ([], 2, "required: INPUT"),
    "one argument": ([F32], 2, "need INPUT .OUTPUT. TYPE"),
    "five arguments": ([F32, "{0}/out.gguf", "tbq3_0", "8", "8"], 2, "arguments: got 5"),
    "unknown flag": (["--nope", F32, "{0}/out.gguf", "tbq3_0"], 2, "unrecognized arguments"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(tmp_path, quantize, name):
    args, expected, words = BAD_CALLS[name]
    (tmp_path / "cut.gguf").write_bytes(F32.read_bytes()[:-100])
    (tmp_path / "text.gguf").write_text("hello")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code, out, err = quantize(*(str(arg).format(tmp_path) for arg in args))
    assert code == expected
    assert out == ""
    *usage, last = err.splitlines()
    assert last.startswith("tbq-quantize: error: ")
    assert re.search(words, last)
    assert all(line.startswith(("usage:", " ")) for line in usage)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_input_is_never_the_output(tmp_path, quantize):
    source = tmp_path / "in.gguf"
    source.write_bytes(F32.read_bytes())
    for alias in ("in.gguf", "sub/../in.gguf", "hard.gguf", "soft.gguf"):
        path = tmp_path / alias
        if alias.startswith("hard"):
            os.link(source, path)
        elif alias.startswith("soft"):
            path.symlink_to(source)
        (tmp_path / "sub").mkdir(exist_ok=True)
        code, _, err = quantize(source, path, "tbq3_0")
        assert code == 2
        assert "a file that is not read" in err
    assert source.read_bytes() == F32.read_bytes()


def test_read_only_folder(tmp_path, quantize):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere but there
        folder = Path("/sys")
    code, _, err = quantize(F32, folder / "out.gguf", "tbq3_0")
    assert code == 3
    assert err.startswith(f"tbq-quantize: error: {folder}/out.gguf: ")


def test_full_disk(tmp_path, quantize, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, err = quantize(F32, tmp_path / "out.gguf", "tbq3_0")
    assert code == 3
    assert "no space left on the device; nothing was written" in err
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit(tmp_path):
    """A write that the kernel refuses half-way, in a process of its own."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run_program("--pure", F32, tmp_path / "out.gguf", "q8_0", preexec_fn=limit)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("tbq-quantize: error: ")
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path, number, expected):
    source = g.big_file(tmp_path / "in.gguf", 4 << 30)
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    command = [sys.executable, "-m", "tools.tbq_quantize", "--pure", source, out, "tbq3_0"]
    process = subprocess.Popen(
        command, cwd=SAMPLES.parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any((tmp_path / n).stat().st_size > 1 << 16 for n in leftovers(tmp_path)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == expected
    assert err.splitlines()[-1].endswith("nothing was written")
    assert "Traceback" not in err
    assert leftovers(tmp_path) == []
    assert out.read_bytes() == b"old"


def test_memory_is_bounded_by_chunks_not_by_the_file(tmp_path):
    """1 GiB in, well under half of that resident; the code alone takes about 200 MiB."""
    source = g.big_file(tmp_path / "in.gguf", 1 << 30)
    # VmHWM, not ru_maxrss: that one starts from what this process held when it forked.
    script = (
        "import sys; from tools.tbq_quantize import main; code = main(sys.argv[1:]);"
        "print([line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line][0]);"
        "sys.exit(code)"
    )
    args = ["--pure", "--json", str(source), str(tmp_path / "out.gguf"), "tbq3_0"]
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        cwd=SAMPLES.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 400 * 1024, "KiB resident at most"
    assert (tmp_path / "out.gguf").stat().st_size > (1 << 28) * 98 / 256


@pytest.mark.parametrize(
    "program",
    ["tbq_quantize", "tbq_inspect", "tbq_plan", "tbq_vectors", "tbq_bench", "cuda_check"],
)
def test_help_imports_nothing_heavy(program):
    command = [sys.executable, "-X", "importtime", "-m", f"tools.{program}", "--help"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not imported & {"numba", "gguf", "scipy", "matplotlib"}


def test_help_lists_every_format():
    done = run_program("--help")
    assert done.returncode == 0
    for fmt in tbq.formats():
        assert fmt.key in done.stdout
    for code in "012":
        assert code in done.stdout


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar_only_on_a_terminal(tmp_path, terminal):
    ours, theirs = os.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    run_program(
        "--pure",
        F32,
        tmp_path / "o.gguf",
        "tbq3_0",
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        capture_output=False,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1 << 16):
            shown += piece
    except OSError:  # how Linux says that the other side of a terminal has gone
        pass
    os.close(ours)
    assert (b"quantising:" in shown) == terminal
    if not terminal:
        assert shown == b""


def test_reader_of_stdout_may_leave(tmp_path):
    """`tbq-quantize … | head -1` ends quietly."""
    command = f"{sys.executable} -m tools.tbq_quantize --dry-run {F32} x.gguf tbq3_0 | true"
    done = subprocess.run(
        command, shell=True, cwd=SAMPLES.parents[1], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_field_of_metadata_survives(tmp_path, quantize):
    """Keys, types, empty values and the alignment all come through the program."""
    kvs = [
        g.kv("general.architecture", g.STRING, g.string("llama")),
        g.kv("general.alignment", g.U32, struct.pack("<I", 128)),
        g.kv("empty", g.STRING, g.string("")),
        g.kv_array("none", g.I8, 0, b""),
        g.kv("general.file_type", g.U32, struct.pack("<I", 0)),
        g.kv("last", g.U64, bytes(8)),
    ]
    source = tmp_path / "in.gguf"
    source.write_bytes(
        g.gguf_file(kvs, [g.tensor("x.weight", (256, 2))], bytes(2048), alignment=128)
    )
    quantize("--pure", source, tmp_path / "out.gguf", "tbq3_0")
    with gguf_io.open_gguf(source) as a, gguf_io.open_gguf(tmp_path / "out.gguf") as b:
        assert b.alignment == 128
        for key, field in a.metadata.fields.items():
            if key != "general.file_type":
                assert bytes(b.metadata.fields[key].raw) == bytes(field.raw)
        assert b.metadata.fields["general.file_type"].raw == Field.of(41, GGUFValueType.UINT32).raw
