"""What the dense decoders share: a layer with its weights, and the model around the layers.

    x = embedding of the tokens
    each layer:  h = norm(x);  q, k, v = projections of h, q and k rotated by position
                 x = x + output(attention(q, cache of k, cache of v))
                 x = x + down(activation(gate(norm(x))) * up(norm(x)))
    logits = output(norm(x))

An architecture says what is different, in a module of its own. Everything is float32; sums are
those of the BLAS library behind NumPy.

Source: ggml-org/llama.cpp, src/llama-graph.cpp, src/models/{llama,qwen2,qwen3,gemma3}.cpp
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gguf_io.evaluation import hyperparameters, rope
from gguf_io.evaluation.attention import attend
from gguf_io.evaluation.cpu_rounding import rounded
from gguf_io.evaluation.weights import Weights
from gguf_io.reader import GgufFile
from tbq import FileFormatError, InputError

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
EMBEDDING, OUTPUT, OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
ROPE_FACTORS = "rope_freqs.weight"


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Divide float32 (..., n) by its root mean square, and multiply with weight (n,)."""
    squares = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    return x * (1 / np.sqrt(squares + np.float32(epsilon))) * weight


def silu(x: np.ndarray) -> np.ndarray:
    """Return x / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # of the exponential, where the result is 0
        return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """Return ggml's GELU, the one with tanh."""
    inner = x * x
    inner *= np.float32(0.044715)
    inner += 1
    inner *= x
    inner *= np.float32(0.79788456080286535588)
    np.tanh(inner, out=inner)
    inner += 1
    inner *= x
    inner *= np.float32(0.5)
    return inner


class Layer:
    """One layer, its weights in float32.

    Attributes of the architecture:
        norms: the weights that it has beside those of the linear maps, by name.
        biased: the linear maps that must have a bias; others may.
        adjacent: which values position rotates together, see `rope.rotate`.
        activation: between gate and down.
    """

    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    biased: tuple[str, ...] = ()
    adjacent = False
    activation: Callable[[np.ndarray], np.ndarray] = staticmethod(silu)

    def __init__(self, model: Decoder, index: int) -> None:
        self.model = model
        self.index = index
        h = model.hyperparameters
        self.n_head_kv = h.shape.n_head_kv[index]
        self.head_dim_k, self.head_dim_v = h.shape.head_dim_k[index], h.shape.head_dim_v[index]
        self.window = h.window if h.is_window(index) else 0
        self.scale = h.scale(index)
        self._weights = {name: self._values(name, "weight") for name in (*self.norms, *LINEAR)}
        self._types = {n: model.weights.tensor(self._name(n, "weight")).format for n in LINEAR}
        self._biases = {
            name: self._values(name, "bias")
            for name in LINEAR
            if name in self.biased or self._name(name, "bias") in model.weights
        }
        self._check_shapes()
        self.n_head = len(self._weights["attn_q"]) // self.head_dim_k

    @classmethod
    def tensor_names(cls, index: int) -> set[str]:
        """Return every name that a tensor of layer `index` can have."""
        names = {f"{name}.weight" for name in (*cls.norms, *LINEAR)}
        return {f"blk.{index}.{name}" for name in names | {f"{name}.bias" for name in LINEAR}}

    def _name(self, name: str, part: str) -> str:
        return f"blk.{self.index}.{name}.{part}"

    def _values(self, name: str, part: str) -> np.ndarray:
        axes = 2 if name in LINEAR and part == "weight" else 1
        return self.model.weights.values(self._name(name, part), (None,) * axes)

    def _check_shapes(self) -> None:
        """Refuse tensors that do not fit each other, before NumPy does or broadcasts them."""
        h, w = self.model.hyperparameters, self._weights
        queries, inner = len(w["attn_q"]), len(w["ffn_gate"])
        head = {"attn_q_norm": self.head_dim_k, "attn_k_norm": self.head_dim_k}
        need = {name: (head.get(name, h.n_embd),) for name in self.norms} | {
            "attn_q": (queries, h.n_embd),
            "attn_k": (self.n_head_kv * self.head_dim_k, h.n_embd),
            "attn_v": (self.n_head_kv * self.head_dim_v, h.n_embd),
            "attn_output": (h.n_embd, queries // self.head_dim_k * self.head_dim_v),
            "ffn_gate": (inner, h.n_embd),
            "ffn_up": (inner, h.n_embd),
            "ffn_down": (h.n_embd, inner),
        }
        for name, shape in need.items():
            if w[name].shape != shape:
                self._misfit(name, w[name].shape, shape)
        for name, bias in self._biases.items():
            if bias.shape != w[name].shape[:1]:
                self._misfit(f"{name}.bias", bias.shape, w[name].shape[:1])
        if queries % (self.n_head_kv * self.head_dim_k):
            self._misfit("attn_q", w["attn_q"].shape, "whole groups of heads")

    def _misfit(self, name: str, got: tuple[int, ...], need: object) -> None:
        reason = f"{name} of layer {self.index} is {got}, need {need}"
        raise FileFormatError(self.model.hyperparameters.path, None, reason)

    # --- arithmetic ------------------------------------------------------------------------------

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """Return x (n, width) times a matrix of the layer, its bias added if there is one."""
        if self.model.cpu_rounding:
            x = rounded(x, self._types[name])
        y = x @ self._weights[name].T
        if name in self._biases:
            y += self._biases[name]
        return y

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """Return `rms_norm` of x with a weight of the layer."""
        return rms_norm(x, self._weights[name], self.model.hyperparameters.epsilon)

    def project(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return q, k and v of the positions 0 to n - 1, each float32 (n, heads, head_dim).

        q and k are rotated by position; q is not scaled.
        """
        n = len(x)
        h = self.norm(x, "attn_norm")
        q = self.linear(h, "attn_q").reshape(n, self.n_head, self.head_dim_k)
        k = self.linear(h, "attn_k").reshape(n, self.n_head_kv, self.head_dim_k)
        v = self.linear(h, "attn_v").reshape(n, self.n_head_kv, self.head_dim_v)
        q, k = self.before_rope(q, k)
        table = self.model.rope_table(n, self.index)
        return rope.rotate(q, table, self.adjacent), rope.rotate(k, table, self.adjacent), v

    def before_rope(self, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return q and k as position is to rotate them."""
        return q, k

    def finish(
        self, x: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int = 0
    ) -> np.ndarray:
        """Return the layer's output at positions `first` and later, float32 (n - first, n_embd).

        Args:
            x, q: at those positions: the layer's input, and the queries.
            k, v: at all positions, as they come out of the cache.
            first: where x and q begin.
        """
        taken = attend(q, k, v, self.scale, self.window, first)
        x = x + self.after_attention(self.linear(taken.reshape(len(x), -1), "attn_output"))
        h = self.norm(x, "ffn_norm")
        inner = self.activation(self.linear(h, "ffn_gate"))
        inner *= self.linear(h, "ffn_up")
        return x + self.after_feed_forward(self.linear(inner, "ffn_down"))

    def after_attention(self, x: np.ndarray) -> np.ndarray:
        """Return the output of attention as it is added."""
        return x

    def after_feed_forward(self, x: np.ndarray) -> np.ndarray:
        """Return the output of the feed-forward part as it is added."""
        return x


class Decoder:
    """A model: what stands around its layers. Weights are read when they are needed.

    Args:
        file: the open model, which has to stay open.
        threads: worker threads of the codecs.
        cpu_rounding: round activations as llama.cpp's CPU code does, see `cpu_rounding`.

    Raises:
        FileFormatError: metadata or a tensor is missing, or does not fit the others.
        InputError: the model has parts that are not covered.
    """

    layer_type: type[Layer] = Layer
    extra_tensors: frozenset[str] = frozenset()

    def __init__(
        self, file: GgufFile, threads: int | None = None, cpu_rounding: bool = False
    ) -> None:
        self.weights = Weights(file, threads)
        self.cpu_rounding = cpu_rounding
        self.hyperparameters = self.read_hyperparameters(file)
        self._refuse_unknown()
        self.output_name = OUTPUT if OUTPUT in self.weights else EMBEDDING
        self.n_vocab = self.weights.tensor(self.output_name).n_rows
        n_embd = self.hyperparameters.n_embd
        for name in (EMBEDDING, self.output_name):
            if self.weights.tensor(name).shape != (self.n_vocab, n_embd):
                reason = f"{name} is {self.weights.tensor(name).shape}, need rows of {n_embd}"
                raise FileFormatError(file.path, None, reason)
        self._output_norm = self.weights.values(OUTPUT_NORM, (n_embd,))
        self.rope_factors = None
        if ROPE_FACTORS in self.weights:
            half = self.hyperparameters.rope_dims // 2
            self.rope_factors = self.weights.values(ROPE_FACTORS, (half,))
        self._tables: dict[tuple[int, bool], tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def read_hyperparameters(cls, file: GgufFile) -> hyperparameters.Hyperparameters:
        """Read the metadata."""
        return hyperparameters.read(file)

    def _refuse_unknown(self) -> None:
        known = {EMBEDDING, OUTPUT, OUTPUT_NORM, *self.extra_tensors}
        for index in range(self.n_layer):
            known |= self.layer_type.tensor_names(index)
        unknown = [name for name in self.weights.file.tensors if name not in known]
        if unknown:
            listed = ", ".join(map(repr, unknown[:3]))
            got = f"{self.weights.file.architecture} with tensors that are not covered, {listed}"
            raise InputError("model", got, "a plain dense decoder")

    @property
    def n_layer(self) -> int:
        """The number of layers."""
        return self.hyperparameters.n_layer

    def layer(self, index: int) -> Layer:
        """Return a layer with its weights, which live as long as it does."""
        return self.layer_type(self, index)

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Return what goes into the first layer, float32 (n, n_embd), for int (n,)."""
        return self.weights.some_rows(EMBEDDING, tokens)

    def rope_table(self, n: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the angles of positions 0 to n - 1 in a layer, see `rope.tables`."""
        h = self.hyperparameters
        local = h.is_window(index)
        if (n, local) not in self._tables:
            base = h.window_rope_base if local else h.rope_base
            scale = h.window_rope_scale if local else h.rope_scale
            table = rope.tables(n, h.rope_dims, base, scale, self.rope_factors)
            self._tables[n, local] = table
        return self._tables[n, local]

    def last_norm(self, x: np.ndarray) -> np.ndarray:
        """Return what the output matrix is multiplied with, float32 like x (n, n_embd)."""
        x = rms_norm(x, self._output_norm, self.hyperparameters.epsilon)
        output = self.weights.tensor(self.output_name).format
        return rounded(x, output) if self.cpu_rounding else x

    def output_rows(self, start: int, stop: int) -> np.ndarray:
        """Return the rows of the output matrix for tokens [start, stop), float32."""
        return self.weights.row_range(self.output_name, start, stop)
