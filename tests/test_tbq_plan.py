"""tbq-plan: what it says, its JSON schema, and what it refuses."""

import json
import re

import jsonschema
import numpy as np
import pytest
from conftest import HERE, SAMPLES

import tbq
from gguf_io import OutputTensor, open_gguf, write_gguf, write_gguf_shards
from tools import tbq_plan, type_errors
from tools.plan_report import error_class
from tools.tbq_plan import parse_size

SCHEMA = json.loads((HERE.parent / "tools/data/tbq-plan.schema.json").read_text())
FOLDER = SAMPLES / "planner"
GEMMA = FOLDER / "gemma3-270m.metadata.gguf"
LLAMA = FOLDER / "llama.metadata.gguf"


@pytest.fixture
def run(capsys):
    """Run tbq-plan; returns the exit code, what it printed, and its complaint."""

    def call(*args):
        code = tbq_plan.main([*map(str, args)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def report(run):
    """Run tbq-plan --json; returns the object, checked against the schema."""

    def call(*args):
        code, out, err = run("--json", *args)
        assert code == 0, err
        found = json.loads(out)
        jsonschema.validate(found, SCHEMA)
        return found

    return call


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.gguf")), ids=lambda path: path.stem)
@pytest.mark.parametrize("flags", [(), ("-ctk", "q8_0", "-np", "3", "-c", "6144")])
def test_every_sample(path, flags, report, run):
    found = report(path, *flags)
    assert found["kv_bytes"] == sum(c["k_bytes"] + c["v_bytes"] for c in found["caches"])
    for cache in found["caches"]:
        assert cache["k_bytes"] == sum(entry["k_bytes"] for entry in cache["by_layer"])
    memory = found["kv_bytes"] + found["state_bytes"] + found["staging_bytes"]
    assert (memory, memory) == (found["memory_bytes"], found["total_bytes"])
    assert bool(found["pairs"]) == (not flags and bool(found["caches"]))
    assert run(path, *flags)[0] == 0


def test_types_that_were_asked_for(report):
    found = report(GEMMA, "-c", "8192", "-ctk", "tbq4_0", "-ctv", "tbq3_0", "-np", "4")
    assert found["types"] == {"k": "pr21089:tbq4_0", "v": "pr21089:tbq3_0", "assumed": False}
    base, swa = found["caches"]
    assert (base["name"], base["cells"], base["streams"], base["layers"]) == ("base", 2048, 4, 3)
    assert (base["k_bytes"], base["v_bytes"]) == (3 * 8192 * 130, 3 * 8192 * 98)
    assert (swa["name"], swa["cells"], swa["layers"]) == ("swa", 1024, 15)
    assert found["bits_per_value"] == (130 + 98) * 8 / 512
    assert found["command"] == "-ctk tbq4_0 -ctv tbq3_0 -c 8192 -np 4 -ub 512 -fa on"
    assert found["pairs"] == []
    assert report(GEMMA, "-ctk", "q8_0")["types"]["v"] == "f16"  # llama.cpp's default


def test_pairs_are_sorted_and_complete(report):
    found = report(GEMMA)
    assert found["types"] == {"k": "f16", "v": "f16", "assumed": True}
    assert found["context"]["n_ctx"] == 32768
    assert found["context"]["n_ctx_assumed"]
    sizes = [pair["memory_bytes"] for pair in found["pairs"]]
    assert sizes == sorted(sizes)
    assert len(found["pairs"]) == 11 * 11
    smallest = found["pairs"][0]
    assert (smallest["k"], smallest["v"]) == ("pr21089:tbq3_0",) * 2
    assert (smallest["class_k"], smallest["class_v"]) == ("3", "3")
    assert smallest["bits_per_value"] == 3.0625
    of = {(pair["k"], pair["v"]): pair for pair in found["pairs"]}
    assert of["f16", "f16"]["memory_bytes"] == found["f16_bytes"]
    assert of["q8_0", "q4_0"]["class_k"] == "8"
    assert of["f16", "q4_0"]["class_k"] == "float"


def test_types_that_do_not_fit_say_why(report, run):
    found = report(LLAMA, "--dialect", "pr21089")  # heads of 64
    unfit = {(entry["type"], entry["side"]): entry["reason"] for entry in found["unfit"]}
    assert unfit["pr21089:tbq3_0", "K"].startswith("rows of 128 values in the kv cache: need")
    assert all("tbq" not in pair["k"] for pair in found["pairs"])
    code, _, err = run(LLAMA, "-ctk", "tbq3_0")
    assert code == 2
    assert "rows of 128 values in the kv cache" in err
    found = report(LLAMA, "--dialect", "llama-tq")
    assert ("llama-tq:vtq2_1", "K") in {(e["type"], e["side"]) for e in found["unfit"]}
    assert not report(LLAMA, "-fa", "off", "--dialect", "ggml")["pairs"][0]["v"].startswith("q")


def test_groups_that_reach_over_heads_are_said_to(report):
    shape = ("--override-kv", "llama.attention.head_count_kv=int:4")
    found = report(LLAMA, *shape, "-ctk", "tbq3_0", "-ctv", "q8_0")
    assert any("reach over heads of 64" in note for note in found["notes"])
    assert not any("reach over" in note for note in report(LLAMA, "-ctk", "q8_0")["notes"])


def test_memory_that_is_there(report):
    one = report(LLAMA, "-c", "256")["memory_bytes"]
    found = report(LLAMA, "--vram", 3 * one)
    assert found["largest_context"] == 768
    assert report(LLAMA, "--vram", one - 1)["largest_context"] == 0
    assert report(LLAMA, "--vram", "1T")["largest_context"] == 1024  # its training context
    assert report(LLAMA)["largest_context"] is None
    of = {(pair["k"], pair["v"]): pair["largest_context"] for pair in found["pairs"]}
    assert (of["f32", "f32"], of["f16", "f16"], of["q8_0", "q4_0"]) == (256, 768, 1024)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("12G", 12 << 30),
        ("12GiB", 12 << 30),
        ("12gb", 12 * 10**9),
        ("1.5G", 3 << 29),
        ("700 M", 700 << 20),
        ("5000", 5000),
        ("5000B", 5000),
    ],
)
def test_sizes(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "G", "12X", "-1G", "1e9", "12GG"])
def test_no_sizes(text, run):
    code, _, err = run(LLAMA, f"--vram={text}")
    assert code == 2
    assert "--vram" in err


# --- layers of their own types -------------------------------------------------------------------


def test_protected_layers(report):
    flags = ("-c", "8192", "-ctk", "q4_0", "-ctv", "q4_0")
    plain = report(GEMMA, *flags)
    found = report(GEMMA, *flags, "--protect-first", "1", "--protect-last", "2")
    assert sorted(found["policy"]["layers"], key=int) == ["0", "16", "17"]
    assert found["policy"]["layers"]["17"] == {"k": "q8_0", "v": "q8_0"}
    rows = 1024 + 1024 + 8192  # two windows and the last layer
    assert found["policy"]["extra_bytes"] == rows * 2 * 256 // 32 * (34 - 18)
    assert found["memory_bytes"] - plain["memory_bytes"] == found["policy"]["extra_bytes"]
    assert found["policy"]["loader"] is None
    assert "none known" in found["notes"][-1]


def test_forks_that_can_load_them(report):
    ends = ("--protect-first", "2", "--protect-last", "2")
    found = report(LLAMA, "-ctk", "ktq2_1", "-ctv", "vtq2_1", *ends)
    assert found["policy"]["flags"] == "--tq-protect-layers 2"
    assert found["command"].endswith("-fa on --tq-protect-layers 2")
    found = report(LLAMA, "-ctk", "q6_0", "-ctv", "q6_0", "--protect-first", "1")
    assert found["dialect"] == "ik_llama"
    assert found["policy"]["flags"] == "-ctk-first q8_0,1 -ctv-first q8_0,1"
    found = report(LLAMA, "-ctk", "ktq2_1", "-ctv", "vtq2_1", "--protect-first", "2")
    assert found["policy"]["flags"] is None  # it protects as many at both ends
    turbo = ("-ctk", "thetom:turbo3", "-ctv", "thetom:turbo2")
    assert "TURBO_LAYER_ADAPTIVE" in report(LLAMA, *turbo, *ends)["policy"]["loader"]


def test_what_a_fork_does_on_its_own(report):
    turbo = ("--dialect", "thetom", "-ctk", "turbo3", "-ctv", "turbo2")
    notes = " ".join(report(GEMMA, *turbo)["notes"])
    assert "TURBO_LAYER_ADAPTIVE=0" in notes
    assert "TURBO_AUTO_ASYMMETRIC=0" in notes
    assert "TURBO_LAYER" not in " ".join(report(LLAMA, *turbo)["notes"])  # three layers


def test_layers_by_name(report):
    found = report(LLAMA, "-ctk", "q8_0", "-ctv", "q8_0", "--layers", "0-1=q4_0,2=q8_0/q5_1")
    (cache,) = found["caches"]
    types = [(entry["k_type"], entry["v_type"]) for entry in cache["by_layer"]]
    assert types == [("q4_0", "q4_0"), ("q4_0", "q4_0"), ("q8_0", "q5_1")]
    assert found["policy"]["extra_bytes"] < 0


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--layers", "0"), "ranges of layers and types"),
        (("--layers", "2-1=q8_0"), "ranges of layers and types"),
        (("--layers", "0-1=q8_0,1=q4_0"), "layer 1 twice"),
        (("--layers", "7=q8_0"), "layers below 3"),
        (("--layers", "0=zzz"), "no format is called"),
        (("--layers", "0=q8_0", "--protect-first", "1"), "one of them"),
        (("--protect-first", "-1"), "0 or more layers"),
        (("--protect-type", "q8_0"), "--protect-first or -last"),
        (("--protect-first", "1", "--protect-type", "tbq3_0"), "rows of 128"),
        (("-ctk", "ktq2_1", "-ctv", "buun:turbo3"), "of one dialect"),
        (("-ctk", "no-such-type"), "no format is called"),
        (("--dialect", "nobody"), "nobody"),
        (("-c", "-5"), "n_ctx"),
        (("-np", "0"), "n_parallel"),
        (("-ub", "0"), "n_ubatch"),
        (("-ctv", "q8_0", "-fa", "off"), "flash attention"),
        (("--override-kv", "a=b"), "KEY=TYPE:VALUE"),
    ],
)
def test_refusals(flags, complaint, run):
    code, out, err = run(LLAMA, *flags)
    assert (code, out) == (2, "")
    assert complaint in err


def test_one_type_for_both_where_llama_cpp_wants_that(report, run):
    latent = FOLDER / "deepseek2.metadata.gguf"
    assert report(latent, "-ctk", "q8_0")["types"] == {"k": "q8_0", "v": "q8_0", "assumed": False}
    code, _, err = run(latent, "-ctk", "q8_0", "-ctv", "q4_0")
    assert code == 2
    assert "deepseek2 needs one type for K and V" in err


# --- files ---------------------------------------------------------------------------------------


def f32(name, *shape):
    """Return an f32 tensor of zeros; the shape in ggml's order."""
    return OutputTensor.from_array(name, np.zeros(shape[::-1], np.float32))


def test_models_with_tensors(report, tmp_path):
    with open_gguf(LLAMA) as file:
        metadata = dict(file.metadata.fields)
    tensors = [
        f32("token_embd.weight", 128, 256),
        f32("blk.0.attn_q.weight", 128, 128),
        f32("blk.0.attn_norm.weight", 128),
        f32("blk.0.ffn_gate_exps.weight", 128, 64, 2),
        f32("blk.0.ffn_up.weight", 128, 64),
        f32("output_norm.weight", 128),
        f32("strange.weight", 64),
    ]
    whole, first = tmp_path / "model.gguf", tmp_path / "part-00001-of-00003.gguf"
    write_gguf(whole, metadata, tensors)
    write_gguf_shards(tmp_path / "part", metadata, [tensors[:2], tensors[2:5], tensors[5:]])
    for path in (whole, first):
        found = report(path, "-ctk", "q8_0")
        groups = {group["name"]: group["parameters"] for group in found["model_groups"]}
        assert groups == {
            "token embeddings": 128 * 256,
            "attention": 128 * 128,
            "norms": 128,
            "experts": 128 * 64 * 2,
            "feed forward": 128 * 64,
            "output": 128,
            "other": 64,
        }
        assert found["model_bytes"] == 4 * sum(groups.values())
        assert found["total_bytes"] == found["model_bytes"] + found["memory_bytes"]


def test_missing_metadata(run, tmp_path, report):
    path = tmp_path / "model.gguf"
    metadata = {"general.architecture": "llama", "llama.block_count": 2}
    write_gguf(path, metadata, [])
    code, out, err = run(path)
    assert (code, out) == (3, "")
    assert "metadata key llama.embedding_length is missing" in err
    given = []
    while code:  # follow what the messages say
        key = re.search(r"--override-kv (\S+)=int:N", err)
        given += ["--override-kv", f"{key[1]}=int:64"]
        code, out, err = run(path, "-c", "512", *given)
    assert [text.partition("=")[0] for text in given[1::2]] == [
        "llama.embedding_length",
        "llama.attention.head_count",
    ]
    code, _, err = run(path, *given)
    assert code == 2
    assert "-c, for the file has no llama.context_length" in err


def test_no_model(run, tmp_path):
    path = tmp_path / "bare.gguf"
    write_gguf(path, {}, [])
    code, _, err = run(path)
    assert code == 3
    assert "general.architecture" in err
    path.write_bytes(b"GGUF")
    assert run(path)[0] == 3
    assert run(tmp_path / "missing.gguf")[0] == 3


# --- errors of types -----------------------------------------------------------------------------


def test_error_classes():
    fmt = tbq.get_format("tbq3_0")
    assert error_class(fmt, None) is None
    assert [error_class(fmt, e) for e in (1.5, 0.9, 0.36, 0.12, 0.034, 0.0095, 4e-5, 1e-9)] == [
        *("0", "0", "1", "2", "3", "4", "8", "8")
    ]


def test_every_type_has_an_error():
    stored = json.loads(type_errors.FILE.read_text())
    assert set(stored) == {fmt.label for fmt in type_errors.cache_formats()}


def test_stored_errors_are_current():
    stored = json.loads(type_errors.FILE.read_text())
    for fmt in type_errors.cache_formats():
        if not fmt.codec.searches:
            current = type_errors.measured(fmt)
            close = current if current is None else pytest.approx(current, rel=2e-3)
            assert stored[fmt.label] == close, f"{fmt.label}: run python -m tools.type_errors"
