"""What a model's GGUF metadata says about its KV cache: heads, widths, layer numbers, window."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gguf_io.metadata import StringArray, brief
from gguf_io.reader import GgufFile, open_gguf
from tbq import FileFormatError

# Of every n layers one attends to everything, the others to a window, where the metadata does not
# say; n = 1: all to everything, 0: all to a window.
# source: ggml-org/llama.cpp, the calls of set_swa_pattern
SWA_PERIOD = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone-moe": 4,
    "exaone4": 4,
    "gemma-embedding": 6,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "laguna": 4,
    "llama4": 4,
    "modern-bert": 3,
    "olmo2": 4,
    "phi3": 1,
    "plamo3": 8,
    "smallthinker": 4,
}
# The one that attends to everything is the first of the n there; elsewhere the last.
DENSE_FIRST = frozenset({"laguna", "modern-bert", "smallthinker"})
# The window (llama4: chunk) of architectures whose metadata need not have one; 0 there means none.
SWA_WINDOW = {"llama4": 8192}
# Every n-th layer attends, the others are recurrent, where head_count_kv does not say.
ATTENTION_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}

MAX_LAYERS = 1024
MAX_NUMBER = 1 << 20  # heads, widths, windows: anything larger is none of a model


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model's memory, one entry per layer where a tuple.

    Attributes:
        architecture: such as "llama".
        n_head_kv: key and value heads; 0 where the layer does not attend or reuses another's rows.
        head_dim_k, head_dim_v: values per head.
        is_swa: whether the layer attends to a sliding window; None if the model has a window and
            its pattern is not known.
        is_recurrent: whether the layer has recurrent state.
        mrope: whether positions have several coordinates.
        mla: whether attention is latent, so that the cache has keys only.
    """

    architecture: str
    n_head_kv: tuple[int, ...]
    head_dim_k: tuple[int, ...]
    head_dim_v: tuple[int, ...]
    is_swa: tuple[bool, ...] | None
    is_recurrent: tuple[bool, ...]
    mrope: bool
    mla: bool
    swa_assumed: bool = False

    @property
    def n_layer(self) -> int:
        """The number of layers."""
        return len(self.n_head_kv)

    @property
    def attention_layers(self) -> list[int]:
        """The layers that have rows in a KV cache."""
        return [il for il, heads in enumerate(self.n_head_kv) if heads]

    def cache_layers(self, memory: str, part: int) -> list[int] | None:
        """Return the layers of part `part` of a memory class; None if they cannot be told."""
        if memory not in ("iswa", "hybrid_iswa"):
            return self.attention_layers
        if self.is_swa is None:
            return None
        return [il for il in self.attention_layers if self.is_swa[il] == bool(part)]

    def head_dim(self, kind: str, layer: int) -> int:
        """Return the values per head of K or V in a layer."""
        return (self.head_dim_k if kind == "K" else self.head_dim_v)[layer]

    def heads(self, kind: str, layer: int | None = None) -> set[tuple[int, int]]:
        """Return (heads, values per head) of K or V in a layer, or all that some layer has."""
        layers = self.attention_layers if layer is None else [layer]
        return {(self.n_head_kv[il], self.head_dim(kind, il)) for il in layers}


def model_shape(model: str | os.PathLike | GgufFile) -> ModelShape:
    """Read the shape from a model file; the metadata suffices, tensors are not looked at.

    Raises:
        FileFormatError: a key that every model has is missing or not a number.
    """
    if isinstance(model, GgufFile):
        return _Keys(model.metadata, model.path).shape()
    with open_gguf(model, follow_splits=False) as file:
        return _Keys(file.metadata, file.path).shape()


def _is_number(value: Any) -> bool:
    """Tell whether a value counts something that a model has."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_NUMBER


def _items(value: Any) -> list | None:
    """Return the first items of an array as Python values; None for anything else."""
    if isinstance(value, (np.ndarray, StringArray)):
        some = value[:MAX_LAYERS]
        return some.tolist() if isinstance(some, np.ndarray) else some
    return None


class _Keys:
    """Typed access to the metadata keys of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], path: object) -> None:
        self.metadata = metadata
        self.path = path
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            self._fail("general.architecture", architecture, "a name")
        self.architecture: str = architecture

    def _fail(self, key: str, value: Any, need: str):
        got = "is missing" if value is None else f"is {brief(value)}"
        key = key if key.isprintable() else repr(key)
        raise FileFormatError(self.path, None, f"metadata key {key:.200} {got}, need {need}")

    def number(self, key: str, default: int | None = None) -> int:
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, default)
        if not _is_number(value):
            self._fail(name, value, "a number")
        return value

    def per_layer(self, key: str, default: int, n_layer: int) -> tuple[int, ...]:
        """Read a number or an array with one per layer."""
        name = f"{self.architecture}.{key}"
        items = _items(self.metadata.get(name, default))
        if items is None:
            return (self.number(key, default),) * n_layer
        if len(items) < n_layer or not all(map(_is_number, items[:n_layer])):
            self._fail(name, items, f"one number per layer, {n_layer} in all")
        return tuple(items[:n_layer])

    def shape(self) -> ModelShape:
        n_layer = self.number("block_count") - self.number("nextn_predict_layers", 0)
        if not 0 < n_layer <= MAX_LAYERS:
            self._fail(f"{self.architecture}.block_count", n_layer, f"1 to {MAX_LAYERS} layers")
        n_head = self.per_layer("attention.head_count", 0, n_layer)
        head_dim = self.number("embedding_length", 0) // max(1, *n_head, 1)
        is_swa = self._swa(n_layer)
        stated = f"{self.architecture}.attention.sliding_window_pattern" in self.metadata
        recurrent = self._recurrent(n_layer, any(n_head))
        n_head_kv = self.per_layer("attention.head_count_kv", max(n_head), n_layer)
        own = n_layer - self.number("attention.shared_kv_layers", 0)
        if self._interval():
            n_head_kv = tuple(0 if r else n for n, r in zip(n_head_kv, recurrent, strict=True))
        return ModelShape(
            architecture=self.architecture,
            n_head_kv=tuple(n if il < own else 0 for il, n in enumerate(n_head_kv)),
            head_dim_k=self._head_dims("attention.key_length", head_dim, is_swa, n_layer),
            head_dim_v=self._head_dims("attention.value_length", head_dim, is_swa, n_layer),
            is_swa=is_swa,
            is_recurrent=recurrent,
            mrope=f"{self.architecture}.rope.dimension_sections" in self.metadata,
            mla=f"{self.architecture}.attention.key_length_mla" in self.metadata,
            swa_assumed=any(is_swa or ()) and not stated,
        )

    def _head_dims(self, key: str, default: int, is_swa, n_layer: int) -> tuple[int, ...]:
        full = self.number(key, default)
        window = self.number(f"{key}_swa", full)
        return tuple(window if swa else full for swa in is_swa or (False,) * n_layer)

    def _swa(self, n_layer: int) -> tuple[bool, ...] | None:
        window = SWA_WINDOW.get(self.architecture, 0)
        if not self.number("attention.sliding_window", window):
            return (False,) * n_layer
        name = f"{self.architecture}.attention.sliding_window_pattern"
        pattern = self.metadata.get(name, SWA_PERIOD.get(self.architecture))
        if pattern is None:
            return None
        flags = _items(pattern)
        if flags is not None:
            if not flags or not all(isinstance(flag, bool) or _is_number(flag) for flag in flags):
                self._fail(name, pattern, "a period or one flag per layer")
            return tuple(bool(flags[il % len(flags)]) for il in range(n_layer))
        if not _is_number(pattern):
            self._fail(name, pattern, "a period or one flag per layer")
        dense = 0 if self.architecture in DENSE_FIRST else pattern - 1
        return tuple(not pattern or il % pattern != dense for il in range(n_layer))

    def _interval(self) -> int:
        return self.number("full_attention_interval", ATTENTION_INTERVAL.get(self.architecture, 0))

    def _recurrent(self, n_layer: int, attends: bool) -> tuple[bool, ...]:
        if not attends:
            return (True,) * n_layer
        interval = self._interval()
        if interval:
            return tuple((il + 1) % interval != 0 for il in range(n_layer))
        heads = self.per_layer("attention.head_count_kv", 1, n_layer)
        return tuple(not n for n in heads)
