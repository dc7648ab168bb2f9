"""Tiny random models in GGUF files, and a transformer in float64 that is as plain as can be."""

import math
from dataclasses import dataclass, field

import gguf
import numpy as np

N_EMBD, N_HEAD, N_KV, HEAD, INNER, VOCAB = 48, 4, 2, 128, 80, 301
WINDOW = 6


@dataclass
class Tiny:
    """What a model is made of; everything else follows from the architecture."""

    architecture: str
    n_layer: int = 2
    n_head: int = N_HEAD
    head: int = HEAD
    rope_base: float = 5000.0
    rope_factor: float = 1.0
    rope_freqs: bool = False
    tied: bool = False
    bos: int | None = 1
    pieces: list[str] | None = None
    weights: dict = field(default_factory=dict)

    @property
    def gemma(self):
        return self.architecture == "gemma3"

    def local(self, layer):
        return self.gemma and layer % 6 != 5


def make(tiny, path, seed=3, quantize=(), keys=None, leave_out=(), extra=()):
    """Write a model; its float values are left in tiny.weights."""
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, tiny.architecture)
    w.add_block_count(tiny.n_layer)
    w.add_embedding_length(N_EMBD)
    w.add_feed_forward_length(INNER)
    w.add_head_count(tiny.n_head)
    w.add_head_count_kv(N_KV)
    w.add_key_length(tiny.head)
    w.add_value_length(tiny.head)
    w.add_rope_dimension_count(tiny.head)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(tiny.rope_base)
    w.add_context_length(512)
    if tiny.rope_factor != 1:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(tiny.rope_factor)
    if tiny.gemma:
        w.add_sliding_window(WINDOW)
    if tiny.bos is not None:
        w.add_tokenizer_model("llama")
        w.add_bos_token_id(tiny.bos)
    if tiny.pieces is not None:
        w.add_token_list(tiny.pieces)
        w.add_token_scores([0.0] * len(tiny.pieces))
        w.add_token_types([6] * len(tiny.pieces))
        w.add_add_space_prefix(False)
    for key, value in (keys or {}).items():
        add = {str: w.add_string, int: w.add_uint32, float: w.add_float32}[type(value)]
        add(f"{tiny.architecture}.{key}", value)

    def add(name, *shape, scale=None, around=0.0):
        x = rng.standard_normal(shape) * (scale or 1 / math.sqrt(shape[-1])) + around
        x = x.astype(np.float32)
        if name in leave_out:
            return
        if name.rpartition(".")[0].rpartition(".")[2] in quantize:
            kind = gguf.GGMLQuantizationType.Q4_0
            raw = gguf.quants.quantize(x, kind)
            w.add_tensor(name, raw, raw_dtype=kind)
            x = gguf.quants.dequantize(raw, kind)
        else:
            w.add_tensor(name, x)
        tiny.weights[name] = x.astype(np.float64)

    add("token_embd.weight", VOCAB, N_EMBD, scale=0.5)
    add("output_norm.weight", N_EMBD, scale=0.2, around=1)
    if not tiny.tied:
        add("output.weight", VOCAB, N_EMBD, scale=0.4)
    if tiny.rope_freqs:
        add("rope_freqs.weight", tiny.head // 2, scale=0.5, around=3)
    for i in range(tiny.n_layer):
        b = f"blk.{i}."
        norms = ["attn_norm", "ffn_norm"]
        norms += ["post_attention_norm", "post_ffw_norm"] if tiny.gemma else []
        for name in norms:
            add(b + name + ".weight", N_EMBD, scale=0.2, around=1)
        if tiny.architecture in ("qwen3", "gemma3"):
            for name in ("attn_q_norm", "attn_k_norm"):
                add(b + name + ".weight", tiny.head, scale=0.2, around=1.5)
        for name, heads in (("attn_q", tiny.n_head), ("attn_k", N_KV), ("attn_v", N_KV)):
            add(f"{b}{name}.weight", heads * tiny.head, N_EMBD)
            if tiny.architecture == "qwen2":
                add(f"{b}{name}.bias", heads * tiny.head, scale=0.5)
        add(b + "attn_output.weight", N_EMBD, tiny.n_head * tiny.head)
        add(b + "ffn_gate.weight", INNER, N_EMBD)
        add(b + "ffn_up.weight", INNER, N_EMBD)
        add(b + "ffn_down.weight", N_EMBD, INNER)
    for name in extra:
        add(name, N_EMBD)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def logits(tiny, tokens, cache=lambda layer, side, x: x):
    """Return float64 logits (n, vocab), one token after the other, one head after the other."""
    w, gemma = tiny.weights, tiny.gemma

    def norm(x, name):
        return x / math.sqrt(float(np.mean(x * x)) + 1e-5) * w[name + ".weight"]

    def linear(x, name):
        return w[name + ".weight"] @ x + w.get(name + ".bias", 0.0)

    def rope(x, position, layer):
        base = 10000.0 if tiny.local(layer) else tiny.rope_base
        factor = 1.0 if tiny.local(layer) else tiny.rope_factor
        half, y = len(x) // 2, x.copy()
        for i in range(half):
            angle = position / factor * base ** (-i / half)
            if tiny.rope_freqs:
                angle /= w["rope_freqs.weight"][i]
            a, b = (2 * i, 2 * i + 1) if tiny.architecture == "llama" else (i, i + half)
            y[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
            y[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
        return y

    def activation(x):
        if gemma:
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return x / (1 + np.exp(-x))

    stream = [w["token_embd.weight"][t] * (math.sqrt(N_EMBD) if gemma else 1) for t in tokens]
    n, d = len(tokens), tiny.head
    for layer in range(tiny.n_layer):
        b = f"blk.{layer}."
        heads = {}
        for side, count in (("q", tiny.n_head), ("k", N_KV), ("v", N_KV)):
            rows = np.zeros((n, count, d))
            for t in range(n):
                x = linear(norm(stream[t], b + "attn_norm"), f"{b}attn_{side}")
                for h in range(count):
                    part = x[h * d : (h + 1) * d]
                    if side != "v":
                        if f"{b}attn_{side}_norm.weight" in w:
                            part = norm(part, f"{b}attn_{side}_norm")
                        part = rope(part, t, layer)
                    rows[t, h] = part
            heads[side] = rows
        k, v = cache(layer, "K", heads["k"]), cache(layer, "V", heads["v"])
        for t in range(n):
            taken = []
            for h in range(tiny.n_head):
                mine = h * N_KV // tiny.n_head
                first = max(0, t - WINDOW + 1) if tiny.local(layer) else 0
                scores = np.array([heads["q"][t, h] @ k[j, mine] for j in range(first, t + 1)])
                p = np.exp(scores / math.sqrt(d) - (scores / math.sqrt(d)).max())
                taken.append((p / p.sum()) @ v[first : t + 1, mine])
            out = linear(np.concatenate(taken), b + "attn_output")
            x = stream[t] + (norm(out, b + "post_attention_norm") if gemma else out)
            h = norm(x, b + "ffn_norm")
            inner = activation(linear(h, b + "ffn_gate")) * linear(h, b + "ffn_up")
            out = linear(inner, b + "ffn_down")
            stream[t] = x + (norm(out, b + "post_ffw_norm") if gemma else out)
    output = w["token_embd.weight" if tiny.tied else "output.weight"]
    return np.stack([output @ norm(x, "output_norm") for x in stream])


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
