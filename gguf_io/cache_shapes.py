"""Which caches llama.cpp makes for a model, and how wide their rows are, from metadata alone.

`cache_shapes` answers with parts in the order in which llama.cpp allocates (and logs) them. How
many cells they get, and so their bytes, is `gguf_io.planner`'s.

Source: ggml-org/llama.cpp @ 0c1e57098: llama-model.cpp (create_memory, load_hparams),
llama-hparams.cpp, llama-kv-cache*.cpp, llama-memory-*.cpp, models/*.cpp (load_arch_hparams).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from gguf_io.memory_classes import HYBRID, HYBRID_IDX, RECURRENT_ONLY
from gguf_io.model_shape import (
    ATTENTION_INTERVAL,
    DENSE_FIRST,
    MAX_LAYERS,
    SWA_PERIOD,
    Keys,
)
from gguf_io.reader import GgufFile, open_gguf


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Nothing is cached: every token of a batch sees every other.
WITHOUT_CACHE = _names(
    "bert jina-bert-v2 jina-bert-v3 nomic-bert nomic-bert-moe neo-bert eurobert wavtokenizer-dec "
    "modern-bert gemma-embedding dream llada llada-moe rnd1"
)
# Layers are recurrent except for one in so many, or as `attention.recurrent_layers` lists them.
BY_INTERVAL = _names("qwen3next qwen35 qwen35moe qwen4exp minimax-01")
WITH_RECURRENT = HYBRID | HYBRID_IDX
# Layers without key and value heads are the recurrent ones.
BY_HEADS = WITH_RECURRENT - BY_INTERVAL - {"falcon-h1"}
# Keys of latent attention are read by these; elsewhere they mean nothing.
LATENT = _names(
    "deepseek2 mistral4 deepseek32 glm-dsa hy_v4 dots3note bailingmoe3 kimi-linear kimi-k3 "
    "glm5-next"
)
INDEXED = _names("minimax-m3 deepseek32 glm-dsa hy_v4 dots3note qwen4exp glm5-next")
# Some layers attend to a window, and only the file can say which.
SWA_LISTED = _names(
    "gemma4 gemma4-assistant granite_swa maple mimo2 spark2_5 step35 dots3note dflash"
)
# The file has to say how long the window is, or it is as long as here, whatever the file says.
SWA_REQUIRED = (SWA_LISTED - {"dflash"}) | _names(
    "cohere2 cohere2moe exaone-moe gemma3n gpt-oss muse-glimmer deepseek4"
)
SWA_DEFAULT = {"gemma2": 4096, "exaone4": 4096}
SWA_FIXED = {"llama4": 8192, "smallthinker": 4096}
SWA_NEVER = frozenset({"phi3"})
EXAONE4_LAYERS_WITH_WINDOW = 64
KIMI_DELTA = _names("kimi-linear kimi-k3 bailingmoe3 glm5-next")
GEMMA3N_LAYERS_WITH_KV = 20
GLM_INDEXERS_SHARED_FROM = 1048576  # tokens of context: GLM 5.2, whose older files list no types
COMPRESSED_RATIO, HEAVILY_COMPRESSED_RATIO = 4, 128

KNOWN = _names(
    "llama llama4 deci falcon grok gpt2 gptj gptneox mpt baichuan starcoder refact bloom stablelm "
    "qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe phi2 phi3 phimoe plamo plamo3 "
    "codeshell orion internlm2 minicpm minicpm3 gemma gemma2 gemma3 gemma3n gemma4 "
    "gemma4-assistant starcoder2 maple xverse command-r cohere2 cohere2moe dbrx olmo olmo2 olmoe "
    "muse-glimmer openelm arctic deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4 chatglm "
    "glm4 glm4moe glm-dsa bitnet t5 t5encoder jais jais2 nemotron exaone exaone4 exaone-moe "
    "granite granitemoe graniteswitch granite_swa chameleon plm bailingmoe bailingmoe2 dots1 "
    "dots3note arcee afmoe laguna ernie4_5 ernie4_5-moe hunyuan-moe hunyuan-dense hunyuan_vl hy_v3 "
    "hy_v4 smollm3 gpt-oss smallthinker seed_oss grovemoe apertus hrm_text minimax-m2 minimax-m3 "
    "cogvlm pangu-embedded mistral3 mistral4 eagle3 dflash paddleocr mimo2 step35 spark2_5 "
    "llama-embed maincoder talkie mellum nanbeige qwen3tts pockettts"
) | (WITHOUT_CACHE | RECURRENT_ONLY | WITH_RECURRENT)


@dataclass(frozen=True)
class CacheLayer:
    """The rows of one layer in one cache.

    Attributes:
        number: the layer in the model, from 0.
        heads: key and value heads.
        head_k, head_v: values per head; `head_v` is 0 where no V is stored.
    """

    number: int
    heads: int
    head_k: int
    head_v: int


@dataclass(frozen=True)
class CachePart:
    """One cache of keys and values.

    Attributes:
        name: "kv"; "base" and "swa"; "mla"; "indexer"; "csa", "hca" and "lid" of deepseek4.
        layers: those that have rows in it; there may be none.
        windowed: whether it holds a window of the context only.
        ratio: how many tokens of context share a cell.
        per_sequence: whether each sequence has a stream of its own even in a unified cache.
        widest_v: values per V row of the widest layer of the model, to which V is padded where it
            is stored transposed (without flash attention).
    """

    name: str
    layers: tuple[CacheLayer, ...]
    windowed: bool = False
    ratio: int = 1
    per_sequence: bool = False
    widest_v: int = 0


@dataclass(frozen=True)
class RecurrentPart:
    """The states of recurrent layers: float32, a row per sequence.

    Attributes:
        n_layer: the model's layers, as llama.cpp prints them.
        layers: those that have a state.
        r_values, s_values: values per layer of the convolution's and the scan's state.
        p_layers, p_values: layers with a history of n-gram embeddings, and its values.
    """

    n_layer: int
    layers: tuple[int, ...]
    r_values: int
    s_values: int
    p_layers: tuple[int, ...] = ()
    p_values: int = 0


@dataclass(frozen=True)
class CompressorState:
    """What deepseek4 keeps of tokens that do not fill a cell yet: float32, per sequence.

    Attributes:
        name: of the cache that it fills.
        layers: those that have one.
        values: per layer, keys and scores together.
    """

    name: str
    layers: tuple[int, ...]
    values: int


@dataclass(frozen=True)
class CacheShapes:
    """Everything that llama.cpp allocates for the memory of a model.

    Attributes:
        architecture: such as "llama".
        known: whether llama.cpp had this architecture at the commit that was read; the memory of
            others is taken to be that of a plain transformer.
        n_layer: layers, those that predict further tokens (NextN) not counted.
        n_ctx_train: the context that the model was trained with; None if the file does not say.
        window: tokens of a sliding window; 0 if there is none.
        parts: caches, in the order of allocation.
        recurrent: recurrent states; None if there are none.
        compressors: deepseek4's states.
        head_widths: (K, V) values per head of every layer, which blocks must divide.
        same_types: whether K and V must have one type.
        notes: what else is to be known, one sentence each.
    """

    architecture: str
    known: bool
    n_layer: int
    n_ctx_train: int | None
    window: int
    parts: tuple[CachePart, ...]
    recurrent: RecurrentPart | None
    compressors: tuple[CompressorState, ...]
    head_widths: tuple[tuple[int, int], ...]
    same_types: bool
    notes: tuple[str, ...] = ()

    @property
    def cached_layers(self) -> tuple[int, ...]:
        """The layers that have rows in some cache, ascending."""
        return tuple(sorted({layer.number for part in self.parts for layer in part.layers}))

    @property
    def has_v(self) -> bool:
        """Whether any V is stored."""
        return any(layer.head_v for part in self.parts for layer in part.layers)


def cache_shapes(
    model: str | os.PathLike[str] | GgufFile | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
) -> CacheShapes:
    """Read what a model's memory consists of; metadata and names of tensors suffice.

    Args:
        model: a GGUF file, one that is open, or metadata alone.
        overrides: metadata keys and values that stand in for those of the file.

    Raises:
        FileFormatError: a key is missing or impossible; the message names the one to override.
    """
    if isinstance(model, Mapping):
        given = {**model, **(overrides or {})}
        arrays = {k: np.asarray(v) for k, v in given.items() if isinstance(v, (list, tuple))}
        keys = _PlanKeys(given | arrays, "metadata")
        return _shapes(_Hparams.read(keys, ()))
    if isinstance(model, GgufFile):
        metadata = dict(model.metadata.items()) | dict(overrides or {})
        return _shapes(_Hparams.read(_PlanKeys(metadata, model.path), model.tensors))
    with open_gguf(model) as file:
        return cache_shapes(file, overrides)


class _PlanKeys(Keys):
    """The keys, with a word on how to supply one that is missing."""

    def _fail(self, key: str, value: Any, need: str) -> NoReturn:
        if value is None:
            kind = "str:NAME" if need == "a name" else "int:N"
            need += f", which --override-kv {key:.200}={kind} supplies"
        super()._fail(key, value, need)

    def refuse(self, key: str, value: Any, need: str) -> NoReturn:
        """Raise FileFormatError for a key of the architecture; a value of None: it is missing."""
        self._fail(f"{self.architecture}.{key}", value, need)

    def has(self, key: str) -> bool:
        """Tell whether the file has a key of the architecture."""
        return f"{self.architecture}.{key}" in self.metadata

    def numbers(self, key: str) -> tuple[int, ...] | None:
        """Read an array of numbers or flags, the first MAX_LAYERS of them; None if it is none."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, str):
            return None
        found = [
            int(n) if isinstance(n, (bool, np.bool_, int, np.integer)) else -1
            for n in value[:MAX_LAYERS]
        ]
        if any(n < 0 for n in found):
            self.refuse(key, value, "numbers or flags")
        return tuple(found)

    def flags(self, key: str, n_layer: int) -> tuple[bool, ...] | None:
        """Read an array of flags, one per layer: none beyond its end; None if it is no array."""
        found = self.numbers(key)
        if found is None:
            return None
        return tuple(il < len(found) and bool(found[il]) for il in range(n_layer))


@dataclass(frozen=True)
class _Hparams:
    """llama.cpp's hyperparameters as far as memory depends on them; names as there.

    `n_layer_all` counts the NextN layers behind the trunk, `n_layer` does not.
    """

    architecture: str
    n_layer_all: int
    n_layer_nextn: int
    n_ctx_train: int | None
    n_embd: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    n_ff: tuple[int, ...]
    head_k: int
    head_v: int
    head_k_swa: int
    head_v_swa: int
    n_swa: int
    has_window: bool
    is_swa: tuple[bool, ...]
    is_recr: tuple[bool, ...]
    layers_with_kv: int
    router_layer: int | None
    mla: bool
    indexer_size: int
    indexer_pooled: bool
    indexer_top_k: int
    indexer_full: tuple[bool, ...]
    dense_lead: int
    compress_ratios: tuple[int, ...]
    recurrent_values: tuple[int, int]
    ple: tuple[tuple[int, ...], int]
    hyper_connections: int

    @property
    def n_layer(self) -> int:
        return self.n_layer_all - self.n_layer_nextn

    @classmethod
    def read(cls, keys: _PlanKeys, tensors: Collection[str]) -> _Hparams:
        """Read them as load_hparams and the architecture's own load_arch_hparams do."""
        name = keys.architecture
        n_all, nextn, router = _layers(keys, tensors)
        file_layers = keys.number("block_count")  # arrays have one value per layer of the file
        n_head = _per_layer(keys, "attention.head_count", (0,) * file_layers, n_all)
        n_head_kv = _per_layer(keys, "attention.head_count_kv", n_head, n_all)
        if router is not None:
            n_head, n_head_kv = (*n_head[:router], 1), (*n_head_kv[:router], 1)
        n_ff = _per_layer(keys, "feed_forward_length", (0,) * file_layers, n_all)
        n_embd = keys.number("embedding_length")
        if not any(n_head) and name not in RECURRENT_ONLY:
            keys.number("attention.head_count")  # says that it is missing
        head = n_embd // n_head[0] if n_head[0] else 0
        head_k = keys.number("attention.key_length", head) if n_head[0] else 0
        head_v = keys.number("attention.value_length", head) if n_head[0] else 0
        if name in ("kimi-k3", "glm5-next"):
            head_v = keys.number("attention.kv_lora_rank")
        n_swa = _window(keys, n_all - nextn)
        is_recr = _recurrent(keys, n_all, n_all - nextn, n_head_kv, n_ff)
        return cls(
            architecture=name,
            n_layer_all=n_all,
            n_layer_nextn=nextn,
            n_ctx_train=_context(keys),
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            n_ff=n_ff,
            head_k=head_k,
            head_v=head_v,
            head_k_swa=keys.number("attention.key_length_swa", head_k),
            head_v_swa=keys.number("attention.value_length_swa", head_v),
            n_swa=n_swa or 0,
            has_window=n_swa is not None,
            is_swa=(False,) * n_all
            if n_swa is None
            else _sliding(keys, n_all, n_all - nextn, is_recr),
            is_recr=is_recr,
            layers_with_kv=_layers_with_kv(keys, n_all),
            router_layer=router,
            mla=name in LATENT
            and bool(keys.number("attention.key_length_mla", 0))
            and bool(keys.number("attention.value_length_mla", 0)),
            indexer_size=_indexer(keys),
            indexer_pooled=name == "glm5-next",
            indexer_top_k=keys.number("attention.indexer.top_k", 0),
            indexer_full=_full_indexers(keys, n_all, n_all - nextn),
            dense_lead=keys.number("leading_dense_block_count", 0),
            compress_ratios=_ratios(keys, n_all),
            recurrent_values=_state_values(keys, n_embd, n_head[0], head_k),
            ple=_ple(keys, n_embd),
            hyper_connections=keys.number("hyper_connection.count", 0),
        )

    def cached(self, wanted: Callable[[int], bool]) -> tuple[CacheLayer, ...]:
        """Return the rows of the layers that have any and are wanted."""
        return tuple(
            CacheLayer(
                il, self.n_head_kv[il], self.width_k(il), 0 if self.mla else self.width_v(il)
            )
            for il in range(min(self.n_layer_all, self.layers_with_kv))
            if wanted(il)
        )

    def width_k(self, il: int) -> int:
        return self.head_k_swa if self.is_swa[il] else self.head_k

    def width_v(self, il: int) -> int:
        return self.head_v_swa if self.is_swa[il] else self.head_v

    def part(self, name: str, wanted: Callable[[int], bool], **kind: Any) -> CachePart:
        """Return a cache of the wanted layers."""
        widest = max(self.n_head_kv[il] * self.width_v(il) for il in range(self.n_layer_all))
        return CachePart(name, self.cached(wanted), widest_v=0 if self.mla else widest, **kind)

    def indexer(self, **changes: Any) -> _Hparams:
        """Return them as an indexer's cache is given them: one key head of the indexer's width."""
        return replace(self, n_head_kv=(1,) * self.n_layer_all, head_k=self.indexer_size, **changes)


# --- hyperparameters -----------------------------------------------------------------------------


def _layers(keys: _PlanKeys, tensors: Collection[str]) -> tuple[int, int, int | None]:
    """Return all layers, the NextN layers among them, and the layer of graniteswitch's router."""
    n_all, nextn = keys.number("block_count"), keys.number("nextn_predict_layers", 0)
    if not 0 < n_all <= MAX_LAYERS or nextn > n_all:
        keys.refuse("block_count", n_all, f"1 to {MAX_LAYERS} layers, NextN's among them")
    probe = f"blk.{n_all - nextn}.nextn.eh_proj.weight"
    if keys.architecture == "deepseek4" and probe not in tensors:
        nextn = 0
    if keys.architecture == "graniteswitch":
        return n_all - nextn + 1, 1, n_all - nextn
    if keys.architecture == "nanbeige":
        loops = max(1, keys.number("num_loops", 1))
        if loops > 1:
            if (n_all - nextn) * loops + nextn > MAX_LAYERS:
                keys.refuse("num_loops", loops, f"no more than {MAX_LAYERS} layers")
            n_all = (n_all - nextn) * loops
    return n_all, nextn, None


def _per_layer(keys: _PlanKeys, key: str, default: tuple[int, ...], n_all: int) -> tuple[int, ...]:
    """Read a number per layer of the file and repeat it for layers that loop over its blocks."""
    if keys.has(key):
        default = keys.per_layer(key, 0, min(n_all, keys.number("block_count")))
    return tuple(default[il % len(default)] for il in range(n_all))


def _context(keys: _PlanKeys) -> int | None:
    value = keys.metadata.get(f"{keys.architecture}.context_length")
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _window(keys: _PlanKeys, n_layer: int) -> int | None:
    """Return the tokens of the sliding window; None if llama.cpp gives this model none."""
    name, key = keys.architecture, "attention.sliding_window"
    if name in SWA_REQUIRED:
        return keys.number(key)
    stated = keys.number(key, 0)
    if name in SWA_NEVER or (name == "exaone4" and n_layer != EXAONE4_LAYERS_WITH_WINDOW):
        return None
    if name in SWA_DEFAULT:
        return stated if keys.has(key) else SWA_DEFAULT[name]
    if name in SWA_FIXED:
        has = stated > 0 or (name == "llama4" and not keys.has(key))
        return SWA_FIXED[name] if has else None
    # llama.cpp would not look further; an architecture that it does not know may well have one
    looks = name in SWA_PERIOD or name in ("lfm2", "dflash") or name not in KNOWN
    return stated or None if looks else None


def _sliding(
    keys: _PlanKeys, n_all: int, n_layer: int, is_recr: tuple[bool, ...]
) -> tuple[bool, ...]:
    """Return which layers of a model with a window attend to that only."""
    name, key = keys.architecture, "attention.sliding_window_pattern"
    if name == "deepseek4" or (name == "dflash" and keys.number("hyper_connection.count", 0)):
        return (True,) * n_all
    if name == "lfm2":
        return tuple(il < n_layer and not is_recr[il] for il in range(n_all))
    listed = keys.flags(key, n_all)
    if listed is not None:
        return listed
    if name in SWA_LISTED and not keys.has(key):
        keys.refuse(key, None, "one flag per layer")
    period = keys.number(key, SWA_PERIOD.get(name))
    dense = 0 if name in DENSE_FIRST else period - 1
    return tuple(il < n_layer and (not period or il % period != dense) for il in range(n_all))


def _recurrent(
    keys: _PlanKeys,
    n_all: int,
    n_layer: int,
    n_head_kv: tuple[int, ...],
    n_ff: tuple[int, ...],
) -> tuple[bool, ...]:
    """Return which layers have recurrent state."""
    name = keys.architecture
    if name in RECURRENT_ONLY or name == "falcon-h1":
        return (True,) * n_all
    if name in BY_HEADS:
        dense = n_ff if name.startswith("nemotron_h") else (0,) * n_all
        last = n_all if name == "glm5-next" else n_layer
        return tuple(il < last and not n_head_kv[il] and not dense[il] for il in range(n_all))
    if name in BY_INTERVAL:
        if keys.has("attention.recurrent_layers"):
            listed = keys.flags("attention.recurrent_layers", n_all)
            return listed or (bool(keys.number("attention.recurrent_layers")),) * n_all
        interval = keys.number("full_attention_interval", ATTENTION_INTERVAL[name])
        if not interval:
            keys.refuse("full_attention_interval", interval, "at least 1")
        return tuple(il < n_layer and (il + 1) % interval != 0 for il in range(n_all))
    return (False,) * n_all


def _layers_with_kv(keys: _PlanKeys, n_all: int) -> int:
    """Return how many layers have rows of their own; those behind them reuse others'."""
    if keys.architecture == "gemma3n":
        return GEMMA3N_LAYERS_WITH_KV
    if keys.architecture == "gemma4":
        return n_all - keys.number("attention.shared_kv_layers", 0)
    return n_all


def _indexer(keys: _PlanKeys) -> int:
    """Return the values of an indexer's key; 0 for architectures without one."""
    name, key = keys.architecture, "attention.indexer.key_length"
    if name == "hy_v4" or name not in INDEXED | {"deepseek4"}:
        return keys.number(key, 0) if name == "hy_v4" else 0
    return keys.number(key)


def _full_indexers(keys: _PlanKeys, n_all: int, n_layer: int) -> tuple[bool, ...]:
    """Return which layers have an indexer of their own."""
    name, key = keys.architecture, "attention.indexer.types"
    if keys.has(key) and name in ("glm-dsa", "hy_v4", "dots3note", "glm5-next"):
        listed = keys.flags(key, n_layer)
        if listed is None:
            listed = (bool(keys.number(key)),) * n_layer
        # glm5-next's NextN layers keep the default
        return (*listed, *(name in ("glm-dsa", "glm5-next"),) * (n_all - n_layer))
    if name == "dots3note":
        keys.refuse(key, None, "one flag per layer")
    if name == "hy_v4":
        return (False,) * n_all
    if name == "glm-dsa" and (_context(keys) or 0) >= GLM_INDEXERS_SHARED_FROM:
        return tuple(il < 2 or (il < 78 and il % 4 == 2) for il in range(n_all))
    return (True,) * n_all


def _ratios(keys: _PlanKeys, n_all: int) -> tuple[int, ...]:
    """Return deepseek4's tokens per cell, layer by layer."""
    if keys.architecture != "deepseek4":
        return (0,) * n_all
    if not keys.has("attention.compress_ratios"):
        keys.refuse("attention.compress_ratios", None, "one number per layer")
    return keys.per_layer("attention.compress_ratios", 0, n_all)


def _state_values(keys: _PlanKeys, n_embd: int, n_head: int, head_k: int) -> tuple[int, int]:
    """Return the values of the convolution's and the scan's state of one layer."""
    name = keys.architecture
    if name in RECURRENT_ONLY - {"mamba", "mamba2"}:
        head = keys.number("wkv.head_size")
        return keys.number("token_shift_count", 2) * n_embd, n_embd * head
    if name in ("lfm2", "lfm2moe"):
        return n_embd * (keys.number("shortconv.l_cache") - 1), 0
    if name in KIMI_DELTA:
        head, conv = keys.number("kda.head_dim"), keys.number("ssm.conv_kernel")
        return 3 * (conv - 1 if conv else 3) * n_head * head, head * head * n_head
    if name == "minimax-01":
        return 0, head_k * head_k * n_head
    if name not in RECURRENT_ONLY | WITH_RECURRENT:
        return 0, 0
    conv, inner = keys.number("ssm.conv_kernel"), keys.number("ssm.inner_size")
    state = keys.number("ssm.state_size")
    groups = 0 if name in ("mamba", "jamba") else keys.number("ssm.group_count")
    return max(0, conv - 1) * (inner + 2 * groups * state), state * inner


def _ple(keys: _PlanKeys, n_embd: int) -> tuple[tuple[int, ...], int]:
    """Return the layers that keep a history of n-gram embeddings, and its values."""
    if keys.architecture != "qwen4exp" or not keys.has("ple.layers"):
        return (), 0
    listed = keys.numbers("ple.layers")
    if not listed:
        return (), 0
    size, kernel = keys.number("ple.ngram_size"), keys.number("ple.conv_kernel")
    values = max(0, kernel - 1) * size * keys.number("hyper_connection.count") * n_embd
    return listed if values else (), values


# --- memories ------------------------------------------------------------------------------------


def _shapes(h: _Hparams) -> CacheShapes:
    parts = _parts(h)
    latent = h.mla or h.architecture == "deepseek4"
    return CacheShapes(
        architecture=h.architecture,
        known=h.architecture in KNOWN,
        n_layer=h.n_layer,
        n_ctx_train=h.n_ctx_train,
        window=h.n_swa,
        parts=parts,
        recurrent=_recurrent_part(h),
        compressors=_compressors(h),
        head_widths=tuple((h.width_k(il), h.width_v(il)) for il in range(h.n_layer)),
        same_types=latent,
        notes=tuple(_notes(h, parts)),
    )


def _notes(h: _Hparams, parts: tuple[CachePart, ...]) -> Iterator[str]:
    if h.architecture not in KNOWN:
        yield (
            f"architecture {h.architecture!r} is unknown here: taken for a transformer whose "
            "layers all have keys and values"
        )
    if h.architecture in WITHOUT_CACHE:
        yield "this architecture has no cache"
    if h.architecture == "gemma4-assistant":
        yield "a draft model whose layers use the caches of the model it drafts for"
    cached = {layer.number for part in parts for layer in part.layers}
    if h.n_layer_nextn and not any(il >= h.n_layer for il in cached):
        yield (
            f"{h.n_layer_nextn} NextN layer(s) have a cache only in a draft context (MTP), which "
            "is not counted"
        )


def _parts(h: _Hparams) -> tuple[CachePart, ...]:
    """Return the caches of keys and values, as create_memory chooses them."""
    name = h.architecture
    if name in WITHOUT_CACHE or name in RECURRENT_ONLY:
        return ()
    if name in _OWN_MEMORY:
        return _OWN_MEMORY[name](h)
    if name in WITH_RECURRENT:
        return _hybrid(h)
    if name == "gemma4-assistant":
        return _window_pair(replace(h, layers_with_kv=0), lambda il: True)
    # NextN layers are left out, unless one is the router, or there is nothing else
    trunk = h.n_layer_nextn > 0 and h.n_layer > 0 and h.router_layer is None
    last = h.n_layer if trunk and not _is_dspark(h) else h.n_layer_all
    return _window_pair(h, lambda il: il < last)


def _is_dspark(h: _Hparams) -> bool:
    return h.architecture == "dflash" and h.hyper_connections > 0


def _window_pair(h: _Hparams, wanted: Callable[[int], bool]) -> tuple[CachePart, ...]:
    """Return one cache, or two if some layers attend to a window."""
    if not h.has_window:
        return (h.part("kv", wanted),)
    return (
        h.part("base", lambda il: wanted(il) and not h.is_swa[il]),
        h.part("swa", lambda il: wanted(il) and h.is_swa[il], windowed=True),
    )


def _hybrid(h: _Hparams) -> tuple[CachePart, ...]:
    """Return the caches beside recurrent states; falcon-h1's layers have both."""
    name = h.architecture
    if name == "falcon-h1":
        return _window_pair(h, lambda il: True)
    if name.startswith("nemotron_h"):
        return _window_pair(h, lambda il: not h.is_recr[il] and not h.n_ff[il])
    last = h.n_layer if name in BY_INTERVAL else h.n_layer_all
    return _window_pair(h, lambda il: il < last and not h.is_recr[il])


def _hybrid_indexed(h: _Hparams) -> tuple[CachePart, ...]:
    """Return attention's and the indexer's cache; glm5-next's has key, gate and pooled key."""

    def attends(il: int) -> bool:
        return il < h.n_layer and not h.is_recr[il]

    indexer = h.indexer(mla=True)
    if h.indexer_pooled:
        indexer = replace(indexer, head_k=3 * h.indexer_size)
        wanted = lambda il: attends(il) and h.indexer_full[il]  # noqa: E731
    else:
        wanted = attends
    parts = (h.part("kv", attends),)
    return (*parts, indexer.part("indexer", wanted)) if h.indexer_size else parts


def _sparse_latent(h: _Hparams) -> tuple[CachePart, ...]:
    """Return latent keys and indexer keys (deepseek32, glm-dsa, hy_v4)."""
    if h.architecture == "hy_v4":
        last = h.n_layer_all
        if not h.indexer_top_k:
            return (h.part("kv", lambda il: True),)
    else:
        last = h.n_layer
    own = (True,) * h.n_layer_all if h.architecture == "deepseek32" else h.indexer_full
    return (
        h.part("mla", lambda il: il < last),
        h.indexer().part("indexer", lambda il: il < h.n_layer and own[il]),
    )


def _sparse_latent_window(h: _Hparams) -> tuple[CachePart, ...]:
    """Return dots3note's: latent keys, indexer keys, latent keys of a window."""
    return (
        h.part("mla", lambda il: il < h.n_layer and not h.is_swa[il]),
        h.indexer().part("indexer", lambda il: il < h.n_layer and h.indexer_full[il]),
        h.part("swa", lambda il: il < h.n_layer and h.is_swa[il], windowed=True),
    )


def _sparse_blocks(h: _Hparams) -> tuple[CachePart, ...]:
    """Return minimax-m3's: keys and values, and indexer keys with values that stay zero."""
    return (
        h.part("kv", lambda il: True),
        h.indexer().part("indexer", lambda il: il >= h.dense_lead),
    )


def _compressed(h: _Hparams) -> tuple[CachePart, ...]:
    """Return deepseek4's: a window of keys, and keys of 4 or 128 tokens at a time."""
    keys = replace(h, mla=True)
    size = h.indexer_size
    lid = h.indexer(mla=True, head_k_swa=size)

    def of_ratio(ratio: int) -> Callable[[int], bool]:
        return lambda il: h.compress_ratios[il] == ratio

    dense, sparse = COMPRESSED_RATIO, HEAVILY_COMPRESSED_RATIO
    return (
        keys.part("base", lambda il: not h.is_swa[il], per_sequence=True),
        keys.part("swa", lambda il: h.is_swa[il], windowed=True, per_sequence=True),
        keys.part("csa", of_ratio(dense), ratio=dense, per_sequence=True),
        keys.part("hca", of_ratio(sparse), ratio=sparse, per_sequence=True),
        lid.part("lid", of_ratio(dense), ratio=dense, per_sequence=True),
    )


_OWN_MEMORY: dict[str, Callable[[_Hparams], tuple[CachePart, ...]]] = {
    "deepseek32": _sparse_latent,
    "deepseek4": _compressed,
    "dots3note": _sparse_latent_window,
    "glm-dsa": _sparse_latent,
    "glm5-next": _hybrid_indexed,
    "hy_v4": _sparse_latent,
    "minimax-m3": _sparse_blocks,
    "qwen4exp": _hybrid_indexed,
}


def _recurrent_part(h: _Hparams) -> RecurrentPart | None:
    name = h.architecture
    if name not in RECURRENT_ONLY | WITH_RECURRENT:
        return None
    dense = h.n_ff if name.startswith("nemotron_h") else (0,) * h.n_layer
    layers = tuple(il for il in range(h.n_layer) if h.is_recr[il] and not dense[il])
    r, s = h.recurrent_values
    p_layers, p = h.ple
    return RecurrentPart(h.n_layer, layers, r, s, tuple(il for il in p_layers if il in layers), p)


def _compressors(h: _Hparams) -> tuple[CompressorState, ...]:
    if h.architecture != "deepseek4":
        return ()
    head, size = h.width_k(0), h.indexer_size
    dense, sparse = COMPRESSED_RATIO, HEAVILY_COMPRESSED_RATIO
    of = {
        ratio: tuple(il for il in range(h.n_layer) if h.compress_ratios[il] == ratio)
        for ratio in (dense, sparse)
    }
    return (
        CompressorState("csa", of[dense], 2 * (2 * dense) * (2 * head)),
        CompressorState("hca", of[sparse], 2 * sparse * head),
        CompressorState("lid", of[dense], 2 * (2 * dense) * (2 * size)),
    )
