"""The forward pass against a plain transformer in float64, and the cache in between."""

import gguf
import numpy as np
import pytest
import tiny_models
from tiny_models import N_EMBD, N_KV, Tiny, log_softmax

import gguf_io
import tbq
from gguf_io import evaluation
from gguf_io.evaluation import forward
from gguf_io.evaluation.cache_path import cache_path
from gguf_io.evaluation.cpu_rounding import rounded
from tbq import FileFormatError, InputError

MODELS = {
    "llama": Tiny("llama"),
    "llama3": Tiny("llama", rope_freqs=True, rope_base=500.0),
    "llama, linear": Tiny("llama", rope_factor=4.0, n_head=2),
    "qwen2": Tiny("qwen2", tied=True),
    "qwen3": Tiny("qwen3"),
    "gemma3": Tiny("gemma3", n_layer=7, tied=True, rope_factor=8.0),
}


@pytest.fixture
def opened(tmp_path):
    files = []

    def make(tiny, **kwargs):
        path = tiny_models.make(tiny, tmp_path / f"{len(files)}.gguf", **kwargs)
        files.append(gguf_io.open_gguf(path))
        return evaluation.load(files[-1], 2)

    yield make
    for file in files:
        file.close()


def tokens_of(rng, n=23):
    return rng.integers(0, tiny_models.VOCAB, n).astype(np.int32)


def model_logits(model, tokens, *types, first=0):
    run = evaluation.make_run(model, *types)
    hidden = forward.hidden_states(model, [tokens], [run], first, threads=2)[0][0]
    return hidden @ model.output_rows(0, model.n_vocab).T


@pytest.mark.parametrize("name", MODELS)
def test_equals_a_plain_transformer(name, opened, rng):
    tiny, tokens = MODELS[name], tokens_of(rng)
    model = opened(tiny)
    want = tiny_models.logits(tiny, tokens)
    assert want.std() > 0.5
    got = model_logits(model, tokens, "f32", "f32")
    assert np.abs(got - want).max() < 2e-4
    later = model_logits(model, tokens, "f32", "f32", first=9)
    assert np.abs(later - want[9:]).max() < 2e-4


@pytest.mark.parametrize(("layers", "scale"), [(7, 128**-0.5), (62, (N_EMBD // 4) ** -0.5)])
def test_scale_and_angles_of_gemma3(layers, scale, opened):
    model = opened(Tiny("gemma3", n_layer=layers, tied=True))
    h = model.hyperparameters
    assert [h.scale(layer) for layer in (0, 5)] == [pytest.approx(scale)] * 2
    assert [h.is_window(layer) for layer in range(7)] == [True] * 5 + [False, True]
    assert (h.window_rope_base, h.rope_base, h.window) == (10000, 5000, tiny_models.WINDOW)


def test_longer_sequences_than_a_block_of_queries(opened, rng, monkeypatch):
    monkeypatch.setattr("gguf_io.evaluation.attention.QUERIES", 4)
    tiny, tokens = MODELS["gemma3"], tokens_of(rng)
    got = model_logits(opened(tiny), tokens, "f32", "f32", first=5)
    assert np.abs(got - tiny_models.logits(tiny, tokens)[5:]).max() < 2e-4


def test_quantised_weights_are_dequantised(opened, rng):
    tiny, tokens = Tiny("qwen2"), tokens_of(rng)
    model = opened(tiny, quantize=("attn_output",))
    kind = model.weights.tensor("blk.0.attn_output.weight").format
    assert kind.name == "q4_0"
    want = tiny_models.logits(tiny, tokens)
    assert np.abs(model_logits(model, tokens, "f32", "f32") - want).max() < 2e-4


@pytest.mark.parametrize(("k", "v"), [("f16", "f16"), ("q8_0", "tbq4_0"), ("tbq3_0", "f32")])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_cache_is_in_between(architecture, k, v, opened, rng):
    # one layer: of several, a rounding error in the first moves codes of the others
    tiny, tokens = Tiny(architecture, n_layer=1), tokens_of(rng)
    model = opened(tiny)
    names, rotations = {"K": k, "V": v}, {"K": "hadamard", "V": "hadamard64"}

    def cache(layer, side, x):
        fmt = tbq.get_format(names[side])
        r = np.eye(128)
        if fmt.is_quantized:  # keys by all of a head, values by halves
            part = tbq.rotation(rotations[side], 128).matrix
            r = np.kron(np.eye(128 // len(part)), part)
        rows = (x @ r).astype(np.float32).reshape(len(x), -1)
        return tbq.dequantize(tbq.quantize(rows, fmt), fmt, original=True).reshape(x.shape) @ r.T

    want = log_softmax(tiny_models.logits(tiny, tokens, cache))
    exact = log_softmax(tiny_models.logits(tiny, tokens))
    got = log_softmax(model_logits(model, tokens, k, v))
    error, effect = np.abs(got - want).max(), np.abs(want - exact).max()
    assert error < 4e-4 + 0.05 * effect
    if k != "f16":
        assert effect > 0.01


@pytest.mark.parametrize(
    ("name", "side", "heads", "head_dim", "stored", "rotation"),
    [
        ("f16", "K", 2, 64, 64, None),
        ("tbq3_0", "K", 2, 128, 128, "hadamard"),
        ("tbq3_0", "V", 2, 128, 128, "hadamard64"),
        ("tbq4_0", "K", 8, 96, 96, None),  # no multiple of 64, not rotated
        ("llama-tq:vtq3_1", "V", 2, 64, 64, "dhd64"),
        ("buun:turbo3", "K", 2, 64, 128, None),
        ("thetom:turbo3", "V", 2, 64, 128, None),
        ("ik_llama:q6_0", "K", 2, 128, 128, None),  # rotated only if it is told to
    ],
)
def test_path_of_each_dialect(name, side, heads, head_dim, stored, rotation, rng):
    path = cache_path(name, side, heads, head_dim)
    assert path.stored == stored
    assert (path.rotation and path.rotation.kind) == rotation
    x = rng.standard_normal((5, heads, head_dim)).astype(np.float32)
    y = path(x)
    assert y.shape == x.shape
    r = path.rotation
    rows = x if r is None else r.forward(x)
    wide = np.zeros((5, heads, stored), np.float32)
    wide[..., :head_dim] = rows
    packed = tbq.quantize(wide.reshape(5, -1), path.format)
    assert packed.shape[1] == path.row_bytes(heads)
    back = tbq.dequantize(packed, path.format, original=True).reshape(wide.shape)[..., :head_dim]
    assert np.array_equal(y, back if r is None else r.inverse(back))
    assert ((y - x) ** 2).mean() < 0.2
    assert cache_path(name, side, heads, head_dim) == path


def test_means_are_subtracted_and_added(rng):
    path = cache_path("buun:turbo3", "K", 1, 128)
    mean = 5 * rng.standard_normal(128).astype(np.float32)
    x = rng.standard_normal((40, 1, 128)).astype(np.float32) + mean
    assert ((path(x, mean) - x) ** 2).sum() < 0.1 * ((path(x) - x) ** 2).sum()


@pytest.mark.parametrize(
    ("name", "side", "words"),
    [
        ("llama-tq:vtq3_1", "K", "a type for K"),
        ("llama-tq:ktq2_1", "V", "a type for V"),
        ("llama-tq:xktq2_1", "K", "on their own"),
        ("tbq3_0", "K", "256"),
    ],
)
def test_types_that_no_such_cache_has(name, side, words):
    with pytest.raises(InputError, match=words):
        cache_path(name, side, 1, 96)


def test_runs_together_are_the_runs_alone(opened, rng):
    model = opened(Tiny("qwen3", n_layer=3))
    windows = [tokens_of(rng), tokens_of(rng)]
    base = evaluation.make_run(model, "f16", "f16")
    whole = evaluation.make_run(model, "tbq3_0", "q4_0")
    runs = [base, whole, whole.where(base, [1], "K"), whole.where(base, [2]), base]
    together = forward.hidden_states(model, windows, runs, 3, threads=2)
    for run, mine in zip(runs, together, strict=True):
        (alone,) = forward.hidden_states(model, windows, [run], 3, threads=1)
        for a, b in zip(mine, alone, strict=True):
            assert np.allclose(a, b, rtol=0, atol=2e-4)
    assert together[0] is together[4]
    different = [r[0] for r in together[:4]]
    for i, a in enumerate(different):
        assert all(np.abs(a - b).max() > 1e-3 for b in different[:i])


def test_layers_are_computed_once_until_runs_differ(opened, rng, monkeypatch):
    model = opened(Tiny("llama", n_layer=4))
    base = evaluation.make_run(model, "f16", "f16")
    runs = [base, evaluation.make_run(model, "q4_0", "f16").where(base, [2])]
    calls = []
    project = model.layer_type.project

    def counted(self, x):
        calls.append(self.index)
        return project(self, x)

    monkeypatch.setattr(model.layer_type, "project", counted)
    forward.hidden_states(model, [tokens_of(rng)], runs)
    assert calls == [0, 1, 2, 3, 3]


def test_queries_are_rounded_where_keys_are_quantised(opened, rng):
    from dataclasses import replace

    model, tokens = opened(Tiny("llama", n_layer=1)), tokens_of(rng)
    coarse = tbq.get_format("q4_0")
    for k, changes in (("q8_0", True), ("f16", False)):
        run = evaluation.make_run(model, k, "f16")
        rounded = replace(run, queries=coarse)
        a, b = forward.hidden_states(model, [tokens], [run, rounded])
        assert (np.abs(a[0] - b[0]).max() > 1e-4) == changes


@pytest.mark.parametrize(("weights", "block"), [("q5_0", 32), ("q4_K", 256)])
def test_cpu_rounding_is_to_multiples_of_a_scale(weights, block, rng):
    x = rng.standard_normal((3, 512)).astype(np.float32)
    x[1] = 0
    y = rounded(x, gguf_io.resolve_type(weights))
    for a, b in zip(x.reshape(-1, block), y.reshape(-1, block), strict=True):
        step = np.abs(a).max() / 127
        assert np.abs(a - b).max() <= 0.51 * step + 1e-3 * np.abs(a).max()
        if step:
            steps = b / step  # whole, but for the float16 of q8_0's scale
            assert np.abs(steps - np.rint(steps)).max() < 0.07
            assert len(np.unique(np.rint(steps))) > 10


def test_cpu_rounding_of_other_weights():
    x = np.array([[1 + 2**-12, 3.0]], np.float32)
    assert rounded(x, gguf_io.resolve_type("f32")) is x
    assert rounded(x, gguf_io.resolve_type("q4_K")) is x  # no whole block
    assert rounded(x, gguf_io.resolve_type("f16")).tolist() == [[1.0, 3.0]]


def test_bits_count_padding(opened):
    model = opened(Tiny("llama", head=64))
    assert evaluation.make_run(model, "f16", "q8_0").bits(model) == (16 + 8.5) / 2
    padded = evaluation.make_run(model, "thetom:turbo3", "thetom:turbo3")
    assert padded.bits(model) == 2 * tbq.get_format("thetom:turbo3").bpw


# --- models that are not covered, or broken -----------------------------------------------------


def test_other_architectures_are_refused_by_name(tmp_path):
    path = tmp_path / "mamba.gguf"
    w = gguf.GGUFWriter(path, "mamba")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    with gguf_io.open_gguf(path) as file, pytest.raises(InputError) as error:
        evaluation.load(file)
    assert "'mamba', need one of gemma3, llama, qwen2, qwen3" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"expert_count": 8}, "expert_count"),
        ({"rope.scaling.type": "yarn"}, "yarn"),
        ({"logit_scale": 0.5}, "logit_scale"),
    ],
)
def test_arithmetic_that_is_not_covered(keys, words, opened):
    with pytest.raises(InputError, match=words):
        opened(Tiny("llama"), keys=keys)


@pytest.mark.parametrize("name", ["blk.1.attn_sinks.weight", "blk.0.ffn_gate_inp.weight"])
def test_tensors_that_are_not_covered(name, opened):
    with pytest.raises(InputError, match=name):
        opened(Tiny("llama"), extra=[name])


def test_missing_and_misshapen_tensors(opened):
    with pytest.raises(FileFormatError, match="no tensor 'output_norm.weight'"):
        opened(Tiny("llama"), leave_out=["output_norm.weight"])
    model = opened(Tiny("llama"), leave_out=["blk.1.ffn_up.weight"])
    model.layer(0)
    with pytest.raises(FileFormatError, match=r"no tensor 'blk\.1\.ffn_up\.weight'"):
        model.layer(1)
    with pytest.raises(FileFormatError, match="token_embd.weight is"):
        opened(Tiny("llama"), keys={"embedding_length": N_EMBD + 1})
    wrong = opened(Tiny("llama"), keys={"attention.head_count_kv": N_KV - 1})
    with pytest.raises(FileFormatError, match="attn_k of layer 0"):
        wrong.layer(0)
