"""tbq-eval, the program: results, files that it writes, and what it refuses."""

import json

import numpy as np
import pytest
import tiny_models
from conftest import program
from tiny_models import Tiny

import gguf_io
import tbq
from gguf_io import evaluation
from gguf_io.evaluation.attention import attend
from tools import eval_report, tbq_eval

evaluate = program(tbq_eval.main)
CTX = 24


@pytest.fixture
def model(tmp_path):
    return tiny_models.make(Tiny("qwen3", n_layer=2), tmp_path / "model.gguf")


@pytest.fixture
def tokens(tmp_path, rng):
    path = tmp_path / "tokens.npy"
    np.save(path, rng.integers(2, tiny_models.VOCAB, 2 * CTX + 5).astype(np.int32))
    return path


def run_json(evaluate, *args):
    code, out, err = evaluate(*args, "--ctx", CTX, "--json")
    assert code == 0, err
    return json.loads(out)


def test_json(evaluate, model, tokens):
    pairs = "q8_0/q8_0,f16/f16,q4_0/tbq3_0,f32/f32,pr21089:tbq4_0/q4_0"
    report = run_json(evaluate, model, "--tokens", tokens, "--pairs", pairs)
    results = report["results"]
    bits = [r["bpw"] for r in results]
    assert bits == sorted(bits) == [(4.5 + 3.0625) / 2, (4.0625 + 4.5) / 2, 8.5, 16, 32]
    by_name = {f"{r['k']}/{r['v']}": r for r in results}
    assert set(by_name) == set(pairs.split(","))
    assert by_name["f16/f16"]["kld"] == 0
    assert by_name["f16/f16"]["same_top"] == 1
    assert 0 < by_name["f32/f32"]["kld"] < by_name["q8_0/q8_0"]["kld"]
    assert {"k", "v", "ppl", "kld", "kld_se", "same_top", "bpw", "n"} <= set(results[0])
    assert all(r["n"] == 2 * (CTX - 1 - CTX // 2) for r in results)
    fronts = [r["front"] for r in results]
    least = np.inf
    for r in results:  # the fewest bits first
        assert r["front"] == (r["kld"] < least)
        least = min(least, r["kld"])
    assert not fronts[-1]
    assert report["windows"] == 2
    assert report["cost"]["seconds"] > 0


def test_perplexity_is_that_of_the_plain_transformer(evaluate, model, tokens):
    tiny = Tiny("qwen3", n_layer=2)
    tiny_models.make(tiny, model.with_name("again.gguf"))
    report = run_json(evaluate, model, "--tokens", tokens, "--pairs", "f32/f32", "--windows", 1)
    window = np.load(tokens)[:CTX]
    window[0] = tiny.bos
    logs = tiny_models.log_softmax(tiny_models.logits(tiny, window))
    scored = [logs[t, window[t + 1]] for t in range(CTX // 2, CTX - 1)]
    assert report["results"][0]["ppl"] == pytest.approx(np.exp(-np.mean(scored)), rel=1e-4)


def test_text_is_tokenised_as_llama_cpp_does(evaluate, tmp_path):
    pieces = [f"<0x{b:02X}>" for b in range(tiny_models.VOCAB)]
    tiny = Tiny("llama", n_layer=1, pieces=pieces)
    model = tiny_models.make(tiny, tmp_path / "m.gguf")
    text, ids = tmp_path / "text.txt", tmp_path / "ids.npy"
    words = b"some_text,and_more_of_it\r\n" * 2
    text.write_bytes(words)
    np.save(ids, np.array([tiny.bos, *words]))
    common = (model, "--pairs", "q4_0/q4_0")
    a, b = (
        run_json(evaluate, *common, flag, x) for flag, x in (("--text", text), ("--tokens", ids))
    )
    assert a["results"] == b["results"]
    assert a["windows"] == 2


def test_text_report(evaluate, model, tokens):
    code, out, err = evaluate(
        model, "--tokens", tokens, "--ctx", CTX, "--pairs", "q8_0/q8_0,q4_0/q8_0", "--attribute"
    )
    assert code == 0, err
    assert "2 windows of 24 tokens, against f16/f16" in out
    assert out.count("divergence of each layer and side alone") == 2
    assert "interaction" in out
    assert "GB of memory" in err
    lines = [line.split() for line in out.splitlines()]
    assert ["q4_0/q8_0", "*"] in [line[:2] for line in lines]


def test_only_some_layers_and_one_side(evaluate, model, tokens):
    common = (model, "--tokens", tokens, "--pairs", "tbq3_0/tbq3_0")
    whole = run_json(evaluate, *common, "--attribute")
    (found,) = whole["attribution"]
    parts = {(p["layer"], p["side"]): p["kld"] for p in found["parts"]}
    assert found["kld"] == pytest.approx(whole["results"][0]["kld"])
    assert sum(parts.values()) == pytest.approx(found["sum"])
    for layer, side in ((0, "K"), (1, "V")):
        alone = run_json(evaluate, *common, "--layers", layer, "--side", side)["results"][0]
        assert alone["kld"] == pytest.approx(parts[layer, side], rel=0.02)
        assert alone["bpw"] == (3 * 16 + 3.0625) / 4
    both = run_json(evaluate, *common, "--layers", 0, "--attribute")["attribution"][0]
    assert {(p["layer"], p["side"]) for p in both["parts"]} == {(0, "K"), (0, "V")}


def test_policy(evaluate, model, tokens):
    pairs = "q8_0/q8_0,tbq3_0/tbq3_0,llama-tq:ktq2_1/llama-tq:vtq2_2"
    common = (model, "--tokens", tokens, "--pairs", pairs)
    report = run_json(evaluate, *common, "--policy", "0.05")
    choices = report["policy"]["choices"]
    assert {c["dialect"] for c in choices} == {"pr21089", "llama-tq"}
    for c in choices:
        assert c["kld"] <= 0.05
        assert len(c["layers"]) == 2
        names = {row[side] for row in c["layers"] for side in "kv"}
        own = {n.partition(":")[0] for n in names if ":" in n}
        assert own <= {c["dialect"]}
    code, out, _ = evaluate(*common, "--ctx", CTX, "--policy", "0.05")
    assert code == 0
    assert "The cheapest types, layer by layer, within a divergence of 0.05" in out


@pytest.mark.parametrize(
    ("k", "v", "dialect", "want"),
    [
        ("q8_0 q8_0", "q4_0 q4_0", None, "-ctk q8_0 -ctv q4_0"),
        ("tbq4_0 tbq4_0", "q8_0 q8_0", "pr21089", "-ctk tbq4_0 -ctv q8_0"),
        ("q8_0 tbq4_0", "q8_0 q8_0", "pr21089", None),
        ("q8_0 q8_0", "q8_0 tbq4_0", "pr21089", None),
        ("q8_0 q8_0", "f16 llama-tq:vtq3_1", "llama-tq", None),
        (
            "q8_0 q8_0",
            "f16 llama-tq:vtq3_2",
            "llama-tq",
            "-ctk q8_0 -ctv {} --tq-v-strategy manual --tq-v-override 0:f16,1:vtq3_2",
        ),
    ],
)
def test_flags_of_the_fork(k, v, dialect, want, model):
    with gguf_io.open_gguf(model) as file:
        loaded = evaluation.load(file)
        run = evaluation.make_run(loaded, tuple(k.split()), tuple(v.split()))
    got = eval_report.flags(run, dialect)
    assert got in ([want] if want is None else [want.format(n) for n in ("f16", "vtq3_2")])


def test_queries_for_other_programs(evaluate, model, tokens, tmp_path):
    out = tmp_path / "qkv.npz"
    run_json(evaluate, model, "--tokens", tokens, "--pairs", "f16/f16", "--save-queries", out)
    with np.load(out) as file:
        arrays = dict(file)
    assert set(arrays) == {"q0", "k0", "v0", "q1", "k1", "v1", "windows", "scales"}
    assert arrays["windows"].tolist() == [0, 0]
    assert arrays["q1"].shape == (CTX, tiny_models.N_HEAD, tiny_models.HEAD)
    assert arrays["k1"].shape == arrays["v1"].shape == (CTX, tiny_models.N_KV, tiny_models.HEAD)
    window = np.load(tokens)[:CTX]
    window[0] = 1
    with gguf_io.open_gguf(model) as file:
        layer = evaluation.load(file).layer(0)
        x = layer.model.embed(window)
        q, k, v = (arrays[f"{name}0"] for name in "qkv")
        assert np.allclose(q, layer.project(x)[0], atol=1e-5)
        scale = float(arrays["scales"][0])
        want = attend(*layer.project(x), layer.scale)
    assert np.allclose(attend(q, k, v, scale), want, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_dump_is_a_state_file(architecture, evaluate, tokens, tmp_path):
    model = tiny_models.make(Tiny(architecture, n_layer=7, tied=True), tmp_path / "m.gguf")
    dump, queries = tmp_path / "slot.bin", tmp_path / "qkv.npz"
    common = (model, "--tokens", tokens, "--pairs", "tbq4_0/tbq4_0")
    run_json(evaluate, *common, "--save-dump", dump, "--save-queries", queries)
    arrays = np.load(queries)
    window = np.load(tokens)[:CTX]
    window[0] = 1
    with gguf_io.open_state(dump, model=model) as s:
        assert s.container.tokens.tolist() == window.tolist()
        assert s.layout.memory == ("iswa" if architecture == "gemma3" else "kv")
        assert s.rotation.keys is s.rotation.values is None
        assert s.cells(0)[0].positions.tolist() == list(range(CTX))
        layers = {"K": set(), "V": set()}
        for t in s.tensors.values():
            layers[t.kind].add(t.layer)
            assert np.array_equal(t.values(), arrays[f"{t.kind.lower()}{t.layer}"])
        assert layers["K"] == layers["V"] == set(range(7))
        small = tmp_path / "small.bin"
        fmt = tbq.get_format("tbq4_0")
        plan = gguf_io.plan_conversion(s, lambda t: fmt)
        gguf_io.write_state(small, plan)
    with gguf_io.open_state(small, model=model) as s:
        t = next(t for t in s.tensors.values() if (t.kind, t.layer) == ("K", 0))
        rotated = tbq.rotation("hadamard", tiny_models.HEAD).forward(arrays["k0"])
        assert np.array_equal(t.rows(), tbq.quantize(rotated.reshape(CTX, -1), fmt))


def test_cpu_rounding(evaluate, tokens, tmp_path):
    model = tiny_models.make(Tiny("qwen3"), tmp_path / "m.gguf", quantize=("attn_output",))
    common = (model, "--tokens", tokens, "--pairs", "f16/f16,q8_0/q8_0")
    exact, coarse = run_json(evaluate, *common), run_json(evaluate, *common, "--cpu")
    assert (exact["cpu_rounding"], coarse["cpu_rounding"]) == (False, True)
    a, b = ({r["k"]: r for r in x["results"]} for x in (exact, coarse))
    assert a["f16"]["kld"] == b["f16"]["kld"] == 0
    assert a["f16"]["ppl"] != b["f16"]["ppl"]
    assert b["q8_0"]["kld"] > a["q8_0"]["kld"] > 0


def test_means(evaluate, model, tokens, tmp_path):
    path = tmp_path / "means.npz"
    width = tiny_models.N_KV * tiny_models.HEAD
    np.savez(path, k0=np.full(width, 0.5, np.float32))
    common = (model, "--tokens", tokens, "--means", path, "--pairs")
    plain = run_json(evaluate, *common[:-3], "--pairs", "buun:turbo3/f16")["results"][0]
    with_means = run_json(evaluate, *common, "buun:turbo3/f16")["results"][0]
    assert with_means["kld"] != plain["kld"]
    code, _, err = evaluate(*common, "q8_0/q8_0", "--ctx", CTX)
    assert code == 2
    assert "whose fork subtracts means" in err


def test_all_pairs(model):
    with gguf_io.open_gguf(model) as file:
        loaded = evaluation.load(file)
        found = tbq_eval.all_pairs(loaded)
        assert len(found) == len(set(found)) > 30
        for pair in found:
            evaluation.make_run(loaded, *pair)
    assert ("f16", "f16") in found
    assert ("buun:turbo3", "buun:turbo3") in found
    partners = [v for k, v in found if k == "llama-tq:ktq2_1"]
    assert len(partners) == 1
    assert partners[0].startswith("llama-tq:vtq")


def test_plot(evaluate, model, tokens, tmp_path):
    out = tmp_path / "plot.png"
    run_json(evaluate, model, "--tokens", tokens, "--plot", out, "--pairs", "q8_0/q8_0,q4_0/q4_0")
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, "one of them"),
        (("--tokens", "{tokens}", "--text", "{tokens}"), 2, "one of them"),
        (("--tokens", "{tokens}", "--pairs", "q8_0"), 2, "such as q8_0/tbq4_0"),
        (("--tokens", "{tokens}", "--pairs", "nope/q8_0"), 2, "no format is called 'nope'"),
        (("--tokens", "{tokens}", "--pairs", ","), 2, "at least one pair"),
        (("--tokens", "{tokens}", "--pairs", "llama-tq:vtq2_1/q8_0"), 2, "a type for K"),
        (("--tokens", "{tokens}", "--ctx", "4"), 2, "at least 8"),
        (("--tokens", "{tokens}", "--ctx", "4096"), 2, "at least one window"),
        (("--tokens", "{tokens}", "--layers", "7"), 2, "layers of the model, 0 to 1"),
        (("--tokens", "{tokens}", "--policy", "-1"), 2, "a number above 0"),
        (("--tokens", "{tokens}", "--policy", "1", "--layers", "0"), 2, "all layers"),
        (("--tokens", "{tokens}", "--means", "{tokens}"), 3, "no .npz of arrays"),
        (("--tokens", "{model}"), 2, "tokens of the model"),
        (("--tokens", "missing.npy"), 3, "No such file"),
        (("--text", "{tokens}"), 3, "no tokenizer.ggml.tokens"),
        (("--tokens", "{tokens}", "--save-dump", "{model}"), 2, "model.gguf"),
    ],
)
def test_refusals(args, code, words, evaluate, model, tokens):
    args = [arg.format(tokens=tokens, model=model) for arg in args]
    before = model.read_bytes()
    got, out, err = evaluate(model, "--ctx", CTX, *args)
    assert (got, out) == (code, "")
    assert words in err
    assert model.read_bytes() == before


def test_models_that_are_refused(evaluate, tokens, tmp_path):
    path = tmp_path / "broken.gguf"
    tiny_models.make(Tiny("llama"), path, leave_out=["blk.1.attn_q.weight"])
    code, _, err = evaluate(path, "--tokens", tokens, "--ctx", CTX, "--save-dump", tmp_path / "d")
    assert code == 3
    assert "no tensor 'blk.1.attn_q.weight'" in err
    assert not list(tmp_path.glob("d*"))
    tiny_models.make(Tiny("phi3"), path)
    code, _, err = evaluate(path, "--tokens", tokens)
    assert code == 2
    assert "architecture 'phi3'" in err
