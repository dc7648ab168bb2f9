"""What the metadata of a dense decoder says about its arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gguf_io.metadata import brief
from gguf_io.model_shape import ModelShape, model_shape
from gguf_io.reader import GgufFile
from tbq import FileFormatError, InputError

# Keys that change the arithmetic in a way that is not carried out here, with the value that does
# not. Source: ggml-org/llama.cpp, src/llama-model.cpp (load_hparams)
UNUSUAL = {
    "expert_count": 0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "nextn_predict_layers": 0,
}
ROPE_SCALINGS = ("none", "linear")
# Positions are angles in float32 at best; no model has more.
MAX_CONTEXT = 1 << 20


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers that a forward pass needs.

    Attributes:
        path: of the model, for messages.
        shape: heads and windows per layer.
        n_embd: width of the residual stream.
        epsilon: of the RMS norms.
        rope_dims: values of each head that are rotated by position.
        rope_base, rope_scale: base of the angles, and what positions are multiplied with.
        window_rope_base, window_rope_scale: the same in layers that attend to a window.
        window: how many positions those see, the own included.
        attention_scale: what scores are multiplied with; None for 1/sqrt(head_dim).
    """

    path: Path
    shape: ModelShape
    n_embd: int
    epsilon: float
    rope_dims: int
    rope_base: float
    rope_scale: float
    window_rope_base: float
    window_rope_scale: float
    window: int
    attention_scale: float | None

    @property
    def n_layer(self) -> int:
        """The number of layers."""
        return self.shape.n_layer

    def is_window(self, layer: int) -> bool:
        """Tell whether a layer attends to a window."""
        return bool(self.shape.is_swa and self.shape.is_swa[layer])

    def scale(self, layer: int) -> float:
        """Return what the scores of a layer are multiplied with."""
        if self.attention_scale is not None:
            return self.attention_scale
        return 1 / math.sqrt(self.shape.head_dim_k[layer])


def read(file: GgufFile) -> Hyperparameters:
    """Read the hyperparameters of a model.

    Raises:
        FileFormatError: a key is missing or not a number.
        InputError: the metadata asks for arithmetic that is not carried out here.
    """
    keys = _Keys(file)
    keys.refuse_unusual()
    shape = model_shape(file)
    if any(shape.is_recurrent) or not all(shape.n_head_kv) or shape.mla or shape.mrope:
        raise InputError("model", f"{file.path}, with other layers", "a plain dense decoder")
    dims = keys.number("rope.dimension_count", shape.head_dim_k[0])
    if not 0 < dims <= min(shape.head_dim_k) or dims % 2:
        keys.fail("rope.dimension_count", dims, "an even number up to the width of a head")
    base, scale = keys.number("rope.freq_base", 10000.0), keys.rope_scale()
    return Hyperparameters(
        path=file.path,
        shape=shape,
        n_embd=int(keys.number("embedding_length")),
        epsilon=keys.number("attention.layer_norm_rms_epsilon"),
        rope_dims=int(dims),
        rope_base=base,
        rope_scale=scale,
        window_rope_base=keys.number("rope.freq_base_swa", base),
        window_rope_scale=scale,
        window=int(keys.number("attention.sliding_window", 0)),
        attention_scale=keys.number("attention.scale", 0.0) or None,
    )


class _Keys:
    """Numbers under the keys of the model's own architecture."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._architecture = file.architecture

    def get(self, key: str, default: Any = None) -> Any:
        return self._file.metadata.get(f"{self._architecture}.{key}", default)

    def fail(self, key: str, value: Any, need: str) -> NoReturn:
        got = "is missing" if value is None else f"is {brief(value)}"
        reason = f"metadata key {self._architecture}.{key} {got}, need {need}"
        raise FileFormatError(self._file.path, None, reason)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            self.fail(key, value, "a number from 0 up")
        return value

    def refuse_unusual(self) -> None:
        for key, usual in UNUSUAL.items():
            value = self.get(key, usual)
            if value != usual:
                got = f"{self._architecture}.{key} = {brief(value)}"
                raise InputError("model", got, f"{usual}, or no such key")

    def rope_scale(self) -> float:
        """Return what positions are multiplied with: 1/factor of linear scaling."""
        factor = self.number("rope.scaling.factor", 0.0) or self.number("rope.scale_linear", 0.0)
        kind = self.get("rope.scaling.type", "linear")
        if kind not in ROPE_SCALINGS:
            got = f"{self._architecture}.rope.scaling.type = {brief(kind)}"
            need = f"{' or '.join(ROPE_SCALINGS)} (and llama3's, which is in the tensor rope_freqs)"
            raise InputError("model", got, need)
        return 1 / factor if factor and kind == "linear" else 1.0
