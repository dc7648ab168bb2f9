"""llama.cpp's memory classes: which caches each writes one after the other, and for which models.

A state file does not say which class wrote it, and some write the same bytes: two caches with
values are an interleaved window (iswa) or an indexed attention (msa), two without values a latent
attention with an indexer (dsa) or, rarely, an iswa of keys only. What the graph does to the keys
and values of each part before they are stored differs, so that the class has to be known.

Source: ggml-org/llama.cpp @ 0c1e57098, src/llama-model.cpp: create_memory; the state_write of
src/llama-kv-cache-{iswa,dsa,dsa-iswa,msa,dsv4}.cpp and src/llama-memory-{hybrid,hybrid-iswa,
hybrid-idx,recurrent}.cpp; the graphs in src/llama-graph.cpp and src/models/.
"""

from __future__ import annotations

from dataclasses import dataclass

RECURRENT = "recurrent"


@dataclass(frozen=True)
class Part:
    """One cache of a memory class.

    Attributes:
        name: "kv", "base", "swa", "mla", "lid", "idx" or "recurrent".
        indexed: whether it is an indexer's: one head per row, and cells that may lack the record
            that those of the attention have, because it has hyperparameters of its own.
        own_names: whether llama.cpp names its tensors apart (`cache_idx_k_l0`); where caches share
            names, the part's stands before them here (`swa.cache_k_l0`).
    """

    name: str
    indexed: bool = False
    own_names: bool = False

    @property
    def stem(self) -> str:
        """What the names of its tensors start with."""
        if self.own_names:
            return f"cache_{self.name}_"
        return "cache_" if self.name in ("kv", RECURRENT) else f"{self.name}.cache_"


@dataclass(frozen=True)
class MemoryClass:
    """One memory class.

    Attributes:
        name: llama.cpp's, without `llama_memory_` and `llama_kv_cache_`.
        parts: what it writes, in order.
        values: whether it has V rows in its first cache; None if that depends on the model.
        old: whether trees before session version 10 have it.
    """

    name: str
    parts: tuple[Part, ...]
    values: bool | None = None
    old: bool = True

    def written_by(self, shape: str, values: bool) -> bool:
        """Tell whether it writes these sections: a letter each, K for keys (and V), R."""
        return shape == self.shape and self.values in (None, values)

    @property
    def shape(self) -> str:
        """Its sections, a letter each: K or R."""
        return "".join("R" if part.name == RECURRENT else "K" for part in self.parts)


_KV, _BASE, _SWA, _REC = Part("kv"), Part("base"), Part("swa"), Part(RECURRENT)
_MLA, _LID, _IDX = Part("mla"), Part("lid", True), Part("idx", True)
DSV4_CACHES = ("csa", "hca", "lid")

# In order of preference where several write the same.
CLASSES = {
    c.name: c
    for c in (
        MemoryClass("kv", (_KV,)),
        MemoryClass("dsa", (_MLA, _LID), values=False, old=False),
        MemoryClass("iswa", (_BASE, _SWA)),
        MemoryClass("msa", (_BASE, _IDX), values=True, old=False),
        MemoryClass("recurrent", (_REC,)),
        MemoryClass("hybrid", (_KV, _REC)),
        MemoryClass("hybrid_iswa", (_BASE, _SWA, _REC)),
        MemoryClass("hybrid_idx", (_KV, _REC, Part("idx", True, True)), old=False),
        MemoryClass("dsa_iswa", (_MLA, _LID, _SWA), values=False, old=False),
        MemoryClass(
            "dsv4",
            (_BASE, _SWA, *map(Part, DSV4_CACHES), *(Part(f"{n}_state") for n in DSV4_CACHES)),
            values=False,
            old=False,
        ),
    )
}
NAMES = (*CLASSES, "none")
# What PARTIAL_ONLY leaves of a class that it shortens to one section.
PARTIAL = {
    "iswa": (_SWA,),
    "dsa_iswa": (_SWA,),
    "hybrid": (_REC,),
    "hybrid_iswa": (_REC,),
    "hybrid_idx": (_REC,),
}

# --- which models ---

HYBRID = frozenset(
    [
        "jamba",
        "falcon-h1",
        "plamo2",
        "granitehybrid",
        "lfm2",
        "lfm2moe",
        "nemotron_h",
        "nemotron_h_moe",
        "qwen3next",
        "qwen35",
        "qwen35moe",
        "kimi-linear",
        "kimi-k3",
        "bailingmoe3",
        "minimax-01",
    ]
)
HYBRID_IDX = frozenset(("qwen4exp", "glm5-next"))
RECURRENT_ONLY = frozenset(("mamba", "mamba2", "rwkv6", "rwkv7", "rwkv6qwen2", "arwkv7"))
OF_ARCHITECTURE = {
    "deepseek32": "dsa",
    "glm-dsa": "dsa",
    "hy_v4": "dsa",
    "dots3note": "dsa_iswa",
    "minimax-m3": "msa",
    "deepseek4": "dsv4",
    **dict.fromkeys(HYBRID_IDX, "hybrid_idx"),
    **dict.fromkeys(RECURRENT_ONLY, "recurrent"),
}
# Drafts whose caches have keys alone, behind a window.
KEYS_ONLY = frozenset(("dflash",))
# Whose indexer keys are rotated whatever their type is and the environment says.
ALWAYS_ROTATED = frozenset(("deepseek32", "deepseek4", "glm-dsa", "dots3note"))
# Whose positions always have several coordinates; others do if their GGUF has rope sections.
MROPE = frozenset(
    ["qwen2vl", "paddleocr", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen4exp", "qwen3tts"]
)


def classes_of(architecture: str | None) -> tuple[str, ...]:
    """Return the classes that models of an architecture can have; all, if that is not known."""
    if architecture is None:
        return NAMES
    own = OF_ARCHITECTURE.get(architecture)
    if own == "dsa":
        return (own, "kv") if architecture == "hy_v4" else (own,)
    if own == "dsv4":
        return own, "iswa"  # the latter where it predicts several tokens
    if own == "hybrid_idx":
        return own, "hybrid", "kv"
    if own is not None:
        return (own,)
    if architecture in HYBRID:
        return "hybrid", "hybrid_iswa", "kv"
    return "kv", "iswa", "none"


def parts_of(memory: str, partial: bool = False) -> tuple[Part, ...]:
    """Return the parts that a memory class writes."""
    if partial and memory in PARTIAL:
        return PARTIAL[memory]
    return CLASSES[memory].parts if memory in CLASSES else ()


def same_bytes(shape: str, values: bool) -> tuple[str, ...]:
    """Return the classes that write these sections, a letter each."""
    return tuple(c.name for c in CLASSES.values() if c.written_by(shape, values))
