"""What llama.cpp's finetune trains of a model, what that costs, and whether it can.

llama.cpp makes every float32 tensor a parameter (`llama_set_param`), except for token embeddings,
frequencies of the rotation, and what `--train-skip-regex` of llama-tq names. A node of the graph
needs a gradient if one of its sources does, so that everything behind the first trained tensor is
on the backward graph. Where an operation there has no backward, llama.cpp aborts.

The graph is put together here from the tensors of each layer: it names the operations that matter,
not every view and copy.

Source: ggml-org/llama.cpp @ 0c1e57098: ggml.c (ggml_compute_backward, ggml_build_backward_expand),
ggml-opt.cpp, llama-context.cpp (llama_set_param, opt_init), llama-graph.cpp; LL4nc33/llama-tq
@ 017716061: ggml.c, and its docs/finetune.md of 2026-10-07.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gguf_io.cache_shapes import BY_INTERVAL, KIMI_DELTA
from gguf_io.reader import GgufFile, GgufTensor
from tbq import FileFormatError, InputError

FLOAT32_BYTES = 4
# Moments per parameter.
OPTIMIZERS = {"adamw": 2, "sgd": 0}
NEVER = frozenset({"token_embd.weight", "rope_freqs.weight"})

# Operations with a backward in ggml, of those that models consist of.
BACKWARD = frozenset(
    {
        *("ADD", "SUB", "MUL", "DIV", "SCALE", "SUM_ROWS", "RMS_NORM", "MUL_MAT", "GET_ROWS"),
        *("ROPE", "SOFT_MAX", "SILU", "SOFTPLUS", "EXP", "NEG", "RELU", "SWIGLU", "CONT"),
        "CROSS_ENTROPY_LOSS",
    }
)
# What llama-tq added, and what it added later.
LLAMA_TQ = frozenset({"SIGMOID", "MUL_MAT_ID"})
LLAMA_TQ_LATER = frozenset({"TANH", "CONCAT", "SSM_CONV", "GATED_DELTA_NET"})
# Activations: those without a backward abort in llama-tq too when it is told to skip what it lacks.
ACTIVATIONS = frozenset({"GEGLU", "SWIGLU_OAI", "GELU or RELU", "TANH"})
BUILDS = {
    "llama.cpp": BACKWARD,
    "llama-tq": BACKWARD | LLAMA_TQ,
    "llama-tq since 2026-10-07": BACKWARD | LLAMA_TQ | LLAMA_TQ_LATER,
}

DELTA_NET = (BY_INTERVAL - {"minimax-01"}) | KIMI_DELTA
GATED_ATTENTION = BY_INTERVAL - {"minimax-01"}
GEGLU = frozenset({"gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "grok"})
SIGMOID_ROUTER = 2  # llama.cpp's expert_gating_func


@dataclass(frozen=True)
class Step:
    """A piece of the graph, in the order of evaluation.

    Attributes:
        layer: its number; None before and behind all layers.
        name: what it does.
        operations: ggml's names.
        tensors: what it multiplies or adds of the model.
    """

    layer: int | None
    name: str
    operations: tuple[str, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Training:
    """What is trained.

    Attributes:
        trained: parameters by tensor.
        skipped: how many tensors are not, by reason.
        steps: the whole graph.
        first: the index of the first step that has a trained tensor; all behind it get gradients.
        gradient_bytes, optimizer_bytes: what they take, float32.
    """

    trained: Mapping[str, int]
    skipped: Mapping[str, int]
    steps: tuple[Step, ...]
    first: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def parameters(self) -> int:
        """How many values are trained."""
        return sum(self.trained.values())

    @property
    def backward(self) -> tuple[Step, ...]:
        """The steps that are on the backward graph."""
        return self.steps[self.first :]

    def missing(self, build: str) -> dict[str, Step]:
        """Return operations on the backward graph that a build has none for, and where first."""
        found: dict[str, Step] = {}
        for step in reversed(self.backward):  # the order in which the backward is built
            for operation in reversed(step.operations):
                if operation not in BUILDS[build]:
                    found.setdefault(operation, step)
        return found


def plan_training(
    file: GgufFile, skip: re.Pattern[str] | None, optimizer: str = "adamw"
) -> Training:
    """Return what is trained of a model.

    Args:
        file: the model, with its tensors.
        skip: tensors whose name it finds are left alone, as `--train-skip-regex`.
        optimizer: one of OPTIMIZERS.

    Raises:
        FileFormatError: the file has no tensors.
        InputError: nothing is left to train.
    """
    if not file.tensors:
        raise FileFormatError(file.path, None, "has no tensors: training needs the whole model")
    trained, skipped = {}, {"never trained": 0, "not float32": 0, "named by the regex": 0}
    for tensor in file.tensors.values():
        reason = _why_not(tensor, skip)
        if reason:
            skipped[reason] += 1
        else:
            trained[tensor.name] = tensor.n_values
    if not trained:
        got = f"none of {len(file.tensors)} tensors, {skipped['not float32']} are not float32"
        raise InputError("trained tensors", got, "one: ggml asserts that there are parameters")
    steps = tuple(graph(file))
    n = sum(trained.values())
    return Training(
        trained=trained,
        skipped=skipped,
        steps=steps,
        first=_first(steps, trained),
        gradient_bytes=FLOAT32_BYTES * n,
        optimizer_bytes=FLOAT32_BYTES * OPTIMIZERS[optimizer] * n,
    )


def _why_not(tensor: GgufTensor, skip: re.Pattern[str] | None) -> str | None:
    if tensor.name in NEVER:
        return "never trained"
    if tensor.format.name != "f32":
        return "not float32"
    return "named by the regex" if skip is not None and skip.search(tensor.name) else None


def _first(steps: tuple[Step, ...], trained: Mapping[str, int]) -> int:
    """Return the first step with a trained tensor; of tensors without a step, their layer's."""
    places = {name: i for i, step in reversed(list(enumerate(steps))) for name in step.tensors}
    starts: dict[int | None, int] = {}
    for i, step in enumerate(steps):
        starts.setdefault(step.layer, i)
    return min(places.get(name, starts.get(_layer(name), 0)) for name in trained)


def _layer(name: str) -> int | None:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None


# --- the graph -----------------------------------------------------------------------------------


def graph(file: GgufFile) -> Iterator[Step]:
    """Yield the steps of a model's graph."""
    names = list(file.tensors)
    layers: dict[int, list[str]] = {}
    for name in names:
        layer = _layer(name)
        if layer is not None:
            layers.setdefault(layer, []).append(name)
    yield Step(None, "embeddings", ("GET_ROWS",), _some(names, r"(token_embd|position_embd)\."))
    for layer in sorted(layers):
        yield from _LayerGraph(file, layer, layers[layer]).steps()
    norm = _norm(file)
    yield Step(None, "output norm", norm, _some(names, r"output_norm\."))
    capped = f"{file.architecture}.final_logit_softcapping" in file.metadata
    output = ("MUL_MAT", "SCALE", "TANH") if capped else ("MUL_MAT",)
    yield Step(None, "output", output, _some(names, r"output\."))
    yield Step(None, "loss", ("CROSS_ENTROPY_LOSS",), ())


def _some(names: list[str], pattern: str) -> tuple[str, ...]:
    return tuple(name for name in names if re.match(pattern, name))


def _norm(file: GgufFile) -> tuple[str, ...]:
    """Return the operations of a norm: layers normalised by mean and variance have no backward."""
    key = f"{file.architecture}.attention.layer_norm_epsilon"
    return ("NORM", "MUL", "ADD") if key in file.metadata else ("RMS_NORM", "MUL")


@dataclass(frozen=True)
class _LayerGraph:
    """The steps of one layer, told from the names of its tensors."""

    file: GgufFile
    layer: int
    names: list[str]

    def steps(self) -> Iterator[Step]:
        norm = _norm(self.file)
        yield self._step("norm", norm, r"attn_norm|ln1")
        recurrent = self._recurrent()
        if recurrent:
            yield from recurrent
        if self._has(r"attn_(q|qkv|q_a|kv_a_mqa|output)\b") and not self._has("ssm_|time_mix_"):
            yield from self._attention()
        if self._has(r"attn_post_norm|post_attention_norm"):
            yield self._step("norm behind attention", norm, r"attn_post_norm|post_attention_norm")
        yield self._step("norm before feed forward", norm, r"ffn_norm|ln2")
        if self._has(r"ffn_gate_inp\b"):
            yield from self._experts()
        if self._has(r"ffn_(gate|up|down)(_shexp)?\b"):
            yield from self._feed_forward()
        if self._has(r"ffn_post_norm|post_ffw_norm"):
            yield self._step("norm behind feed forward", norm, r"ffn_post_norm|post_ffw_norm")

    def _attention(self) -> Iterator[Step]:
        names = r"attn_(q|k|v|qkv|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)\b"
        latent = ("CONCAT",) if self._has("attn_kv_a_mqa") else ()
        yield self._step("projections", ("MUL_MAT", *latent), names)
        if self._has(r"attn_(q|k|q_a|kv_a)_norm"):
            yield self._step("norm of queries and keys", _norm(self.file), r"attn_\w+_norm")
        yield self._step("rotation", ("ROPE",), "rope_")
        capped = f"{self.file.architecture}.attn_logit_softcapping" in self.file.metadata
        yield self._step(
            "attention", ("MUL_MAT", "SOFT_MAX", *(("TANH",) if capped else ())), "attn_sinks"
        )
        if self.file.architecture in GATED_ATTENTION or self._has("attn_gate"):
            yield self._step("gate of attention", ("SIGMOID", "MUL"), "attn_gate")
        yield self._step("attention's output", ("MUL_MAT", "ADD"), "attn_output")

    def _recurrent(self) -> list[Step]:
        """Return the steps of a recurrent layer; none if it is not."""
        operations: tuple[str, ...]
        scan: tuple[str, ...]
        if self._has("shortconv"):
            operations = ("MUL_MAT", "MUL", "CONCAT", "SSM_CONV")
            return [self._step("short convolution", operations, "shortconv")]
        if self._has("time_mix_"):
            operations = ("MUL_MAT", "CONCAT", "TANH", "SIGMOID", "EXP", "RWKV_WKV")
            return [self._step("time mix", operations, "time_mix_")]
        if not self._has("ssm_"):
            return []
        if self.file.architecture in DELTA_NET:
            conv = ("MUL_MAT", "CONCAT", "SSM_CONV", "SILU", "L2_NORM")
            scan = ("SIGMOID", "SOFTPLUS", "GATED_DELTA_NET", "RMS_NORM", "MUL_MAT", "ADD")
            scanned = r"ssm_(a|dt|beta|alpha|ba|norm|out|f_|g)"
            return [
                self._step("convolution", conv, r"attn_(qkv|gate)|ssm_(conv1d|in)"),
                self._step("gated delta net", scan, scanned),
            ]
        operations = ("MUL_MAT", "CONCAT", "SSM_CONV", "SILU")
        scan = ("MUL_MAT", "SSM_SCAN", "MUL", "ADD")
        return [
            self._step("convolution", operations, r"ssm_(in|conv1d)"),
            self._step("state space scan", scan, r"ssm_(x|dt|a|d|norm|out|b_|c_)"),
        ]

    def _experts(self) -> Iterator[Step]:
        key = f"{self.file.architecture}.expert_gating_func"
        gate = "SIGMOID" if self.file.metadata.get(key) == SIGMOID_ROUTER else "SOFT_MAX"
        weighted = f"{self.file.architecture}.expert_weights_norm"
        normed = ("SUM_ROWS", "CLAMP", "DIV") if self.file.metadata.get(weighted) else ()
        router = ("MUL_MAT", gate, "GET_ROWS", *normed)
        yield self._step("router", router, r"ffn_gate_inp\b(?!_shexp)|exp_probs_b")
        yield self._step("experts", ("MUL_MAT_ID", self._glu(), "MUL", "ADD"), r"ffn_\w+_exps")
        if self._has("ffn_gate_inp_shexp"):
            yield self._step("gate of the shared expert", ("SIGMOID", "MUL"), "ffn_gate_inp_shexp")

    def _feed_forward(self) -> Iterator[Step]:
        gated = self._has(r"ffn_gate(_shexp)?\b")
        glu = self._glu() if gated else "GELU or RELU"
        yield self._step("feed forward", ("MUL_MAT", glu), r"ffn_(gate|up)(_shexp)?\b")
        yield self._step("feed forward's output", ("MUL_MAT", "ADD"), r"ffn_down(_shexp)?\b")

    def _glu(self) -> str:
        if self.file.architecture in GEGLU:
            return "GEGLU"
        return "SWIGLU_OAI" if self.file.architecture == "gpt-oss" else "SWIGLU"

    def _has(self, pattern: str) -> bool:
        return bool(self._named(pattern))

    def _named(self, pattern: str) -> tuple[str, ...]:
        return _some(self.names, rf"blk\.\d+\.({pattern})")

    def _step(self, name: str, operations: tuple[str, ...], pattern: str) -> Step:
        return Step(self.layer, name, operations, self._named(pattern))
