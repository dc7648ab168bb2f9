"""What a model's GGUF metadata says about its KV cache: heads, widths, layer numbers, window."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from gguf_io.memory_classes import HYBRID, HYBRID_IDX, MROPE, OF_ARCHITECTURE, parts_of
from gguf_io.metadata import StringArray, brief
from gguf_io.reader import GgufFile, open_gguf
from tbq import FileFormatError

# Of every n layers one attends to everything, the others to a window, where the metadata does not
# say; n = 1: all to everything, 0: all to a window.
# source: ggml-org/llama.cpp, the calls of set_swa_pattern
SWA_PERIOD = {
    "afmoe": 4,
    "cohere2": 4,
    "cohere2moe": 4,
    "exaone-moe": 4,
    "exaone4": 4,
    "gemma-embedding": 6,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "laguna": 4,
    "lfm2": 0,
    "llama4": 4,
    "mellum": 4,
    "modern-bert": 3,
    "muse-glimmer": 4,
    "olmo2": 4,
    "phi3": 1,
    "plamo3": 8,
    "smallthinker": 4,
}
# The one that attends to everything is the first of the n there; elsewhere the last.
DENSE_FIRST = frozenset({"cohere2moe", "laguna", "modern-bert", "smallthinker"})
# A window in their metadata is not looked at.
WITHOUT_WINDOW = frozenset({"lfm2moe"})
# The window (llama4: chunk) of architectures whose metadata need not have one; 0 there means none.
SWA_WINDOW = {"llama4": 8192}
# Every n-th layer attends, the others are recurrent, where head_count_kv does not say.
ATTENTION_INTERVAL = {
    "minimax-01": 8,
    "qwen3next": 4,
    "qwen35": 4,
    "qwen35moe": 4,
    "qwen4exp": 4,
}
# Layers below this one have K and V of their own, where attention.shared_kv_layers does not say.
OWN_LAYERS = {"gemma3n": 20}

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
        swa_assumed: whether which layers attend to a window is the architecture's habit only.
        certain: whether which layers attend is known.
        memory: the memory class; None where several can be.
        ple: whether it embeds n-grams per layer, so that cells have tokens.
        indexer_width: values of an indexer's key; 0 where there is none.
        first_indexed: the first layer with an indexer, where all after it have one.
        nextn: layers after these that predict several tokens, and have a cache of their own.
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
    certain: bool = True
    memory: str | None = None
    ple: bool = False
    indexer_width: int = 0
    first_indexed: int | None = None
    nextn: int = 0

    @property
    def keys_only(self) -> bool:
        """Whether caches have no V: latent attention, or deepseek4's."""
        return self.mla or self.memory == "dsv4"

    @property
    def has_cell_record(self) -> bool:
        """Whether cells have a record of coordinates."""
        return self.mrope or self.ple

    @property
    def other_counts(self) -> tuple[int, ...]:
        """Numbers of layers of a cache that only predicts several tokens."""
        return (self.nextn,) if self.nextn else ()

    @property
    def n_layer(self) -> int:
        """The number of layers."""
        return len(self.n_head_kv)

    @property
    def attention_layers(self) -> list[int]:
        """The layers that have rows in a KV cache."""
        return [il for il, heads in enumerate(self.n_head_kv) if heads]

    def cache_layers(self, memory: str, part: int, partial: bool = False) -> list[int] | None:
        """Return the layers of part `part` of a memory class; None if they cannot be told."""
        names = [p.name for p in parts_of(memory, partial)]
        name, own = names[part], self.attention_layers
        windowed = "swa" in names and memory != "dsv4"
        if name == "base" and memory == "dsv4":
            return []
        if name == "lid":
            return own if self.architecture == "deepseek32" else None
        if name == "idx":
            first = self.first_indexed
            return None if first is None else [il for il in own if il >= first]
        if not windowed:
            return own
        if self.is_swa is None:
            return None
        return [il for il in own if self.is_swa[il] == (name == "swa")]

    def head_dim(self, kind: str, layer: int) -> int:
        """Return the values per head of K or V in a layer."""
        return (self.head_dim_k if kind == "K" else self.head_dim_v)[layer]

    def heads(self, kind: str, layer: int | None = None) -> set[tuple[int, int]]:
        """Return (heads, values per head) of K or V in a layer, or all that some layer has."""
        layers = self.attention_layers if layer is None else [layer]
        return {(self.n_head_kv[il], self.head_dim(kind, il)) for il in layers}


def model_shape(model: str | os.PathLike[str] | GgufFile) -> ModelShape:
    """Read the shape from a model file; the metadata suffices, tensors are not looked at.

    Raises:
        FileFormatError: a key that every model has is missing or not a number.
    """
    if isinstance(model, GgufFile):
        return Keys(model.metadata, model.path).shape()
    with open_gguf(model, follow_splits=False) as file:
        return Keys(file.metadata, file.path).shape()


def _is_number(value: Any) -> bool:
    """Tell whether a value counts something that a model has."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_NUMBER


def _items(value: Any) -> list[Any] | None:
    """Return the first items of an array as Python values; None for anything else."""
    if isinstance(value, (np.ndarray, StringArray)):
        some = value[:MAX_LAYERS]
        return some.tolist() if isinstance(some, np.ndarray) else some
    return None


class Keys:
    """Typed access to the metadata keys of one architecture; FileFormatError where they fail."""

    def __init__(self, metadata: Mapping[str, Any], path: object) -> None:
        self.metadata = metadata
        self.path = path
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            self._fail("general.architecture", architecture, "a name")
        self.architecture: str = architecture

    def _fail(self, key: str, value: Any, need: str) -> NoReturn:
        got = "is missing" if value is None else f"is {brief(value)}"
        key = key if key.isprintable() else repr(key)
        raise FileFormatError(self.path, None, f"metadata key {key:.200} {got}, need {need}")

    def number(self, key: str, default: int | None = None) -> int:
        """Read a number; without a default it has to be there."""
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
        """Read the shape."""
        nextn = self.number("nextn_predict_layers", 0)
        n_layer = self.number("block_count") - nextn
        if not 0 < n_layer <= MAX_LAYERS:
            self._fail(f"{self.architecture}.block_count", n_layer, f"1 to {MAX_LAYERS} layers")
        n_head = self.per_layer("attention.head_count", 0, n_layer)
        head_dim = self.number("embedding_length", 0) // max(1, *n_head, 1)
        is_swa = self._swa(n_layer)
        stated = f"{self.architecture}.attention.sliding_window_pattern" in self.metadata
        recurrent = self._recurrent(n_layer, any(n_head))
        n_head_kv = self.per_layer("attention.head_count_kv", max(n_head), n_layer)
        shared = self.number("attention.shared_kv_layers", 0)
        own = n_layer - shared if shared else OWN_LAYERS.get(self.architecture, n_layer)
        if self._interval():
            n_head_kv = tuple(0 if r else n for n, r in zip(n_head_kv, recurrent, strict=True))
        return ModelShape(
            architecture=self.architecture,
            n_head_kv=tuple(n if il < own else 0 for il, n in enumerate(n_head_kv)),
            head_dim_k=self._head_dims("attention.key_length", head_dim, is_swa, n_layer),
            head_dim_v=self._head_dims("attention.value_length", head_dim, is_swa, n_layer),
            is_swa=is_swa,
            is_recurrent=recurrent,
            mrope=self._mrope(),
            mla=all(self._has(f"attention.{side}_length_mla") for side in ("key", "value")),
            swa_assumed=any(is_swa or ()) and not stated,
            certain=self._certain(shared, any(n_head)),
            memory=self._memory(is_swa, any(n_head)),
            ple=self._has("ple.layers") and self.architecture == "qwen4exp",
            indexer_width=self.number("attention.indexer.key_length", 0),
            first_indexed=self._first_indexed(),
            nextn=nextn,
        )

    def _has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def _mrope(self) -> bool:
        """Tell whether positions have several coordinates."""
        if self.architecture in MROPE:
            return True
        sections = _items(self.metadata.get(f"{self.architecture}.rope.dimension_sections")) or []
        sections = [n for n in sections if _is_number(n)]
        if self.architecture == "dflash":
            return any(sections)
        return len(sections) > 1 and sections[0] > 0 and sections[1] > 0

    def _certain(self, shared: int, attends: bool) -> bool:
        """Tell whether the metadata say which layers have K and V."""
        if self.architecture in OWN_LAYERS and not shared:
            return False
        if self.architecture not in HYBRID | HYBRID_IDX or not attends:
            return True
        listed = _items(self.metadata.get(f"{self.architecture}.attention.head_count_kv"))
        return listed is not None or bool(self._interval()) or self.architecture == "falcon-h1"

    def _memory(self, is_swa: tuple[bool, ...] | None, attends: bool) -> str | None:
        """Return the memory class of the model."""
        window = is_swa is None or any(is_swa)
        own = OF_ARCHITECTURE.get(self.architecture)
        if self.architecture == "hy_v4" and not self.number("attention.indexer.top_k", 0):
            return "kv"
        if own is not None:
            return own
        if self.architecture in HYBRID:
            return "hybrid_iswa" if window else "hybrid"
        if not attends:
            return "recurrent"
        return "iswa" if window else "kv"

    def _first_indexed(self) -> int | None:
        if self.architecture == "minimax-m3":
            return self.number("leading_dense_block_count", 0)
        return 0 if self.architecture == "qwen4exp" else None

    def _head_dims(self, key: str, default: int, is_swa: Any, n_layer: int) -> tuple[int, ...]:
        full = self.number(key, default)
        window = self.number(f"{key}_swa", full)
        return tuple(window if swa else full for swa in is_swa or (False,) * n_layer)

    def _swa(self, n_layer: int) -> tuple[bool, ...] | None:
        window = SWA_WINDOW.get(self.architecture, 0)
        stated = self.number("attention.sliding_window", window)
        if not stated or self.architecture in WITHOUT_WINDOW:
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
        if self.architecture == "falcon-h1":  # every layer attends and has a state
            return (True,) * n_layer
        if self.architecture.startswith("nemotron_h"):
            wide = self.per_layer("feed_forward_length", 0, n_layer)
            return tuple(not n and not w for n, w in zip(heads, wide, strict=True))
        return tuple(not n for n in heads)
