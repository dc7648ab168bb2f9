"""The cache of transformers: on a stand-in everywhere, on torch where that is installed.

For all of it: `make test EXTRAS=test,transformers`. Models are tiny, random, and made here.
"""

import copy
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import stand_in_transformers as stand_in
import tiny_models
from tiny_models import Tiny

import tbq
from tbq import BackendError, InputError, UnknownFormatError

MODULE = "tbq.integrations.transformers"
FILE = Path(tbq.__file__).parent / "integrations" / "transformers.py"
NO_TORCH = "torch and transformers are not installed: make test EXTRAS=test,transformers"
# K, V, the rotations of a head of 128 values in their graphs
PAIRS = [
    ("f16", "q8_0", None, "hadamard64"),
    ("tbq3_0", "tbq4_0", "hadamard", "hadamard64"),
    ("buun:turbo3", "q8_0", None, "hadamard64"),
    ("buun:turbo2_tcq", "buun:turbo2_tcq", None, None),
    ("llama-tq:ktq2_1", "llama-tq:vtq3_1", "hadamard", "dhd64"),
    ("llama-tq-cuda:ktq2_1", "llama-tq-cuda:vtq2_1", "hadamard", "dhd64"),
    ("amesianx:amx3_1", "amesianx:tbq3_0", None, None),
    ("ik_llama:q8_KV", "ik_llama:q6_0", None, None),
]
HEADS, DIM = 2, 128


class StandIn:
    """The library in NumPy."""

    def __init__(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", stand_in.module())
        place = importlib.util.spec_from_file_location("on_a_stand_in", FILE)
        self.module = importlib.util.module_from_spec(place)
        place.loader.exec_module(self.module)
        self.device = "far"

    def tensor(self, x, dtype="float32"):
        return stand_in.Tensor(x, dtype, self.device)

    def array(self, x):
        assert x.device == self.device
        return x.array.astype(np.float32)

    def dtype(self, x):
        return x.dtype

    def config(self, model_type):
        return stand_in.Config(model_type)


class Torch:
    """The library itself."""

    def __init__(self, monkeypatch):
        self.torch = pytest.importorskip("torch", reason=NO_TORCH)
        self.transformers = pytest.importorskip("transformers", reason=NO_TORCH)
        self.module = importlib.import_module(MODULE)

    def tensor(self, x, dtype="float32"):
        return self.torch.tensor(np.ascontiguousarray(x)).to(getattr(self.torch, dtype))

    def array(self, x):
        return x.float().numpy()

    def dtype(self, x):
        return str(x.dtype).removeprefix("torch.")

    def config(self, model_type):
        return self.transformers.AutoConfig.for_model(model_type, num_hidden_layers=2)


@pytest.fixture(params=[StandIn, Torch], ids=["stand-in", "torch"])
def library(request, monkeypatch):
    return request.param(monkeypatch)


@pytest.fixture
def torch(monkeypatch):
    return Torch(monkeypatch)


def states(rng, tokens, batch=1, heads=HEADS, dim=DIM):
    """Return keys and values (batch, heads, tokens, head_dim), not of one scale."""
    x = rng.standard_normal((2, batch, heads, tokens, dim)) * rng.uniform(0.2, 3, (2, 1, 1, 1, dim))
    return x.astype(np.float32)


def through(x, name, side, kind):
    """Return x (heads, tokens, head_dim) as a fork would give it back, step by step."""
    rows, fmt = x.transpose(1, 0, 2), tbq.get_format(name).fitting(head_dim=x.shape[-1], side=side)
    rotation = kind and tbq.rotation(kind, x.shape[-1])
    stored = rotation.forward(rows) if rotation else rows
    packed = tbq.quantize(stored.reshape(len(rows), -1), fmt)
    back = tbq.dequantize(packed, fmt, original=True).reshape(rows.shape)
    return (rotation.inverse(back) if rotation else back).transpose(1, 0, 2)


def feed(library, cache, keys, values, *cuts, layer=0):
    """Append states in pieces; returns all keys and values of the layer as arrays."""
    for start, stop in zip((0, *cuts), (*cuts, keys.shape[2]), strict=True):
        piece = (library.tensor(x[:, :, start:stop]) for x in (keys, values))
        k, v = cache.update(*piece, layer)
    return library.array(k), library.array(v)


@pytest.mark.parametrize(("k", "v", "turn_k", "turn_v"), PAIRS, ids=lambda p: str(p))
def test_rows_come_back_as_from_the_forks_cache(k, v, turn_k, turn_v, library, rng):
    keys, values = states(rng, 11, batch=2)
    got_k, got_v = feed(library, library.module.QuantizedCache(k, v), keys, values)
    for sequence in range(2):
        want = through(keys[sequence], k, "K", turn_k), through(values[sequence], v, "V", turn_v)
        assert np.array_equal(got_k[sequence], want[0])
        assert np.array_equal(got_v[sequence], want[1])
    assert not np.array_equal(got_k, keys)


@pytest.mark.parametrize(("k", "v"), [pair[:2] for pair in PAIRS])
def test_pieces_are_the_whole(k, v, library, rng):
    """A row is quantised once, for the cell that it has, whatever comes with it or later."""
    keys, values = states(rng, 9)
    whole = feed(library, library.module.QuantizedCache(k, v), keys, values)
    pieces = feed(library, library.module.QuantizedCache(k, v), keys, values, 5, 6, 7)
    assert np.array_equal(whole[0], pieces[0])
    assert np.array_equal(whole[1], pieces[1])


def test_layers_are_apart(library, rng):
    cache = library.module.QuantizedCache("amesianx:amx3_1", "q8_0")
    keys, values = states(rng, 4)
    first = feed(library, cache, keys, values, layer=0)
    assert cache.get_seq_length(0) == 4
    second = feed(library, cache, keys, values, layer=1)
    assert np.array_equal(first[0], second[0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_the_models(dtype, library, rng):
    keys, values = (library.tensor(x, dtype) for x in states(rng, 3))
    k, v = library.module.QuantizedCache("tbq4_0", "f32").update(keys, values, 0)
    assert library.dtype(k) == library.dtype(v) == dtype
    assert np.array_equal(library.array(v), library.array(values))
    want = through(library.array(keys)[0], "tbq4_0", "K", "hadamard")
    assert np.array_equal(library.array(k)[0], library.array(library.tensor(want, dtype)))


def test_interleaved_keys(library, rng):
    """As llama.cpp's converter orders them: 0, half, 1, half + 1, …; values stay."""
    keys, values = states(rng, 5)
    cache = library.module.QuantizedCache("tbq3_0", "tbq3_0", rope="interleaved")
    got_k, got_v = feed(library, cache, keys, values, 2)
    order = [i // 2 + (i % 2) * (DIM // 2) for i in range(DIM)]
    assert order[:4] == [0, 64, 1, 65]
    want = np.empty_like(keys[0])
    want[..., order] = through(keys[0][..., order], "tbq3_0", "K", "hadamard")
    assert np.array_equal(got_k[0], want)
    assert np.array_equal(got_v[0], through(values[0], "tbq3_0", "V", "hadamard64"))
    assert not np.array_equal(want, through(keys[0], "tbq3_0", "K", "hadamard"))


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [("llama", "interleaved"), ("mistral", "interleaved"), ("qwen2", "halves")],
)
def test_rope_follows_from_the_model(model_type, rope, library):
    config = library.config(model_type)
    assert library.module.QuantizedCache("q8_0", "q8_0", config=config).rope == rope
    told = library.module.QuantizedCache("q8_0", "q8_0", config=config, rope="halves")
    assert told.rope == "halves"


def test_bytes_are_the_packed_rows(library, rng):
    cache = library.module.QuantizedCache("buun:turbo3", "q4_0")
    assert cache.bytes() == 0
    for layer in range(2):
        feed(library, cache, *states(rng, 10, batch=3, heads=4, dim=64), 7, layer=layer)
    # heads of 64 are padded to a block of 128, 56 bytes; 64 values of q4_0 are two blocks of 18
    assert cache.bytes() == 2 * 3 * 10 * (4 * 56 + 4 * 2 * 18)


@pytest.mark.parametrize(
    ("types", "error", "words"),
    [
        (("llama-tq:vtq3_1", "q8_0"), InputError, "a type for K"),
        (("q8_0", "llama-tq:ktq2_1"), InputError, "a type for V"),
        (("llama-tq:xktq2_1", "q8_0"), InputError, "on their own"),
        (("turbo33", "q8_0"), UnknownFormatError, "turbo3"),
    ],
)
def test_types_that_no_cache_has(types, error, words, library):
    with pytest.raises(error, match=words):
        library.module.QuantizedCache(*types)


def test_heads_that_no_cache_holds(library, rng):
    cache = library.module.QuantizedCache("q8_0", "tbq3_0")
    with pytest.raises(InputError, match="type of V.* 256"):
        feed(library, cache, *states(rng, 2, heads=1, dim=96))


def test_rope_is_one_of_two(library):
    with pytest.raises(InputError, match="interleaved, halves"):
        library.module.QuantizedCache("q8_0", "q8_0", rope="neox")


def test_a_model_is_given_caches(monkeypatch):
    library, model = StandIn(monkeypatch), stand_in.Model()
    with library.module.quantized_caches(model, "tbq4_0", "q8_0") as same:
        assert same is model
        made = model(use_cache=False)
        assert made["use_cache"] is True
        assert isinstance(made["past_key_values"], library.module.QuantizedCache)
        assert made["past_key_values"].rope == "interleaved"
        mine = library.module.QuantizedCache("q8_0", "q8_0")
        assert model(past_key_values=mine)["past_key_values"] is mine
        plain = stand_in.DynamicCache()
        assert model(past_key_values=plain)["past_key_values"].type_k == "tbq4_0"
        plain.update(*(stand_in.Tensor(x) for x in states(np.random.default_rng(0), 3)), 0)
        with pytest.raises(InputError, match="a DynamicCache with 3 tokens"):
            model(past_key_values=plain)
    assert model(use_cache=False) == {"use_cache": False, "past_key_values": None}
    with (
        pytest.raises(InputError, match="a type for K"),
        library.module.quantized_caches(model, "llama-tq:vtq3_1", "q8_0"),
    ):
        pass
    assert not model.hooks


def test_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)  # restored, if it was there
    with pytest.raises(BackendError, match=r"pip install .*\[transformers\]"):
        importlib.import_module(MODULE)


# --- models of torch -----------------------------------------------------------------------------


def loaded(torch, tiny, path):
    """Return a model of transformers with a tiny one's weights, as its converter found them."""
    tiny_models.make(tiny, path)
    config = torch.transformers.AutoConfig.for_model(
        tiny.architecture,
        vocab_size=tiny_models.VOCAB,
        hidden_size=tiny_models.N_EMBD,
        intermediate_size=tiny_models.INNER,
        num_hidden_layers=tiny.n_layer,
        num_attention_heads=tiny.n_head,
        num_key_value_heads=tiny_models.N_KV,
        head_dim=tiny.head,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": tiny.rope_base},
        rope_theta=tiny.rope_base,  # before transformers 5
        tie_word_embeddings=tiny.tied,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(tiny.n_layer):
        for ours, theirs in (
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            *((f"attn_{x}", f"self_attn.{x}_proj") for x in "qkv"),
            *((f"attn_{x}_norm", f"self_attn.{x}_norm") for x in "qk"),
            ("attn_output", "self_attn.o_proj"),
            *((f"ffn_{x}", f"mlp.{x}_proj") for x in ("gate", "up", "down")),
        ):
            names[f"blk.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
    weights = {}
    for name, x in tiny.weights.items():
        base, _, kind = name.rpartition(".")
        if tiny.architecture == "llama" and base.endswith(("attn_q", "attn_k")):
            x = x.reshape(-1, tiny.head // 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        weights[f"{names[base]}.{kind}"] = torch.torch.tensor(x.astype(np.float32))
    model = torch.transformers.AutoModelForCausalLM.from_config(config).eval()
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    return model


def run(torch, model, tokens, cache=None):
    given = {torch.module._argument(model): cache}
    with torch.torch.no_grad():
        made = model(torch.torch.tensor(tokens)[None], use_cache=True, **given)
    return made.logits[0].numpy()


@pytest.fixture
def tokens(rng):
    return rng.integers(0, tiny_models.VOCAB, 24)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("k", "v"), [("f32", "f32"), ("q8_0", "tbq4_0"), ("tbq3_0", "f32")])
def test_a_model_is_what_tbq_eval_makes_of_its_gguf(
    architecture, k, v, torch, tokens, tmp_path, opened
):
    # one layer: of several, a rounding error in the first moves codes of the others
    tiny = Tiny(architecture, n_layer=1)
    model = loaded(torch, tiny, tmp_path / "m.gguf")
    cache = torch.module.QuantizedCache(k, v, config=model.config)
    got, exact = run(torch, model, tokens, cache), run(torch, model, tokens)
    want = opened(tmp_path / "m.gguf", tokens, k, v)
    assert exact.std() > 0.5
    assert np.abs(got - want).max() < 4e-4 + 0.05 * np.abs(want - exact).max()
    if k == "f32":
        assert np.array_equal(got, exact)
    else:
        assert np.abs(got - exact).max() > 0.01


@pytest.fixture
def opened():
    """Return the logits of a GGUF file by tbq-eval's forward pass."""
    import gguf_io
    from gguf_io import evaluation
    from gguf_io.evaluation import forward

    def logits(path, tokens, k, v):
        with gguf_io.open_gguf(path) as file:
            model = evaluation.load(file, 2)
            made = evaluation.make_run(model, k, v)
            windows = [tokens.astype(np.int32)]
            hidden = forward.hidden_states(model, windows, [made], 0, threads=2)[0][0]
            return hidden @ model.output_rows(0, model.n_vocab).T

    return logits


@pytest.fixture
def llama(torch, tmp_path):
    return loaded(torch, Tiny("llama"), tmp_path / "m.gguf")


def divergence(base, other):
    base, other = tiny_models.log_softmax(base), tiny_models.log_softmax(other)
    return float((np.exp(base) * (base - other)).sum(axis=-1).mean())


def test_more_bits_are_closer(torch, llama, tokens):
    base = run(torch, llama, tokens)
    of = {
        name: divergence(
            base,
            run(torch, llama, tokens, torch.module.QuantizedCache(name, name, config=llama.config)),
        )
        for name in ("f16", "q8_0", "tbq4_0", "tbq3_0")
    }
    assert of["f16"] < of["q8_0"] < of["tbq4_0"] < of["tbq3_0"]
    assert of["q8_0"] < 1e-3 < of["tbq3_0"]


def generated(torch, model, tokens, cache=None, **kwargs):
    kwargs |= {torch.module._argument(model): cache} if cache else {}
    ids = torch.torch.tensor(np.stack([tokens, tokens[::-1]]))
    with torch.torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.torch.ones_like(ids),
            max_new_tokens=6,
            pad_token_id=0,
            **kwargs,
        )


@pytest.mark.parametrize("kwargs", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generate(kwargs, torch, llama, tokens):
    plain = generated(torch, llama, tokens, **kwargs)
    exact = torch.module.QuantizedCache("f32", "f32", config=llama.config)
    assert generated(torch, llama, tokens, exact, **kwargs).equal(plain)
    cache = torch.module.QuantizedCache("tbq3_0", "q8_0", config=llama.config)
    assert generated(torch, llama, tokens, cache, **kwargs).shape == plain.shape
    batch = 2 * kwargs.get("num_beams", 1)  # the last token is predicted, not stored
    stored = 2 * batch * (len(tokens) + 5)
    assert cache.bytes() == stored * (98 + 256 // 32 * 34)


def test_crop_reset_and_copies(torch, llama, tokens):
    cache = torch.module.QuantizedCache("amesianx:amx3_1", "q8_0", config=llama.config)
    whole = run(torch, llama, tokens, cache)
    twin = copy.deepcopy(cache)
    for held in (cache, twin):
        held.crop(-4)
        again = run(torch, llama, tokens[-4:], held)
        assert np.abs(again - whole[-4:]).max() < 1e-3
    if int(torch.transformers.__version__.split(".")[0]) < 5:
        return  # its reset sets rows to zero and keeps them
    cache.reset()
    assert cache.bytes() == 0
    assert np.array_equal(run(torch, llama, tokens, cache), whole)


def test_programs_that_pass_no_cache(torch, llama, tokens):
    cache = torch.module.QuantizedCache("tbq3_0", "tbq3_0", config=llama.config)
    want, plain = run(torch, llama, tokens, cache), run(torch, llama, tokens)
    ids = torch.torch.tensor(tokens)[None]
    with torch.torch.no_grad(), torch.module.quantized_caches(llama, "tbq3_0", "tbq3_0"):
        assert np.array_equal(llama(ids, use_cache=False).logits[0].numpy(), want)
        made = generated(torch, llama, tokens, do_sample=False, return_dict_in_generate=True)
    made = made[torch.module._argument(llama)]
    assert isinstance(made, torch.module.QuantizedCache)
    assert made.bytes() == 2 * 2 * (len(tokens) + 5) * 2 * 98
    assert np.array_equal(run(torch, llama, tokens), plain)
