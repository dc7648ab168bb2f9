"""Queries that attend to a dump's keys: real ones from a file, or stand-ins of the right length.

Directions drawn at random do to errors in keys about what real queries do, if they are as long. On
Gemma 3 270M the divergence of attention weights with them is 0.9 to 1.3 times that of the layer's
real queries (median over 18 layers and four types) if their lengths are the real ones, and layers
are ranked alike (Spearman 0.96). `docs/inspect.md` has the table.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from gguf_io.arrays import read_npz
from gguf_io.reader import open_gguf
from tbq import FileFormatError, InputError
from tbq.quality import ExactAttention, random_queries, visible
from tbq.quality.attention_error import QUERIES

# Queries that a model normalises are shorter than the norm's weights, because coordinates with a
# large weight are small before it. Measured on layers 0, 5 and 17 of Gemma 3 270M; the other
# fifteen were held out.
SHORTER = 0.59


@dataclass(frozen=True)
class LayerQueries:
    """The queries of one layer: float32 (tokens, heads, head_dim), unscaled, from token 0 on."""

    q: np.ndarray
    window: int = 0
    scale: float | None = None


@dataclass(frozen=True)
class Queries:
    """What is known of a model's queries, layer by layer.

    Attributes:
        layers: the real ones, by the model's layer number.
        lengths: where those are missing, how long they are.
        window: how many positions layers with a window see; 0 if that is not known.
        source: where they come from, in words.
    """

    layers: dict[int, LayerQueries]
    lengths: dict[int, float]
    window: int = 0
    source: str = "random directions of unit variance stand in for the model's queries"


NONE = Queries({}, {})


def read_queries(path: str | os.PathLike[str]) -> Queries:
    """Read the .npz that `tbq-eval --save-queries` writes: q0, q1, …, and perhaps windows, scales.

    Raises:
        FileFormatError: it is no .npz, or has no such arrays, or some of other shapes.
        OSError: it cannot be read.
    """
    arrays = read_npz(path)
    layers = {}
    for name, q in arrays.items():
        if not (name.startswith("q") and name[1:].isdecimal()):
            continue
        if q.ndim != 3 or not q.size or q.dtype.kind != "f":
            got = f"{q.dtype} {q.shape}"
            raise FileFormatError(path, None, f"{name} is {got}, not floats (tokens, heads, width)")
        n = int(name[1:])
        window, scale = (_entry(path, arrays, key, n) for key in ("windows", "scales"))
        layers[n] = LayerQueries(q.astype(np.float32), int(window or 0), scale)
    if not layers:
        raise FileFormatError(path, None, "no arrays q0, q1 …: tbq-eval --save-queries has them")
    return Queries(layers, {}, source=f"queries are the model's own, from {path}")


def _entry(path: Any, arrays: dict[str, np.ndarray], name: str, layer: int) -> float | None:
    if name not in arrays:
        return None
    values = arrays[name].reshape(-1)
    if layer >= len(values):
        raise FileFormatError(path, None, f"{name} has {len(values)} numbers, none for q{layer}")
    return float(values[layer])


def queries_of_model(path: str | os.PathLike[str]) -> Queries:
    """Say how long a model's queries are, from the weights of the norm that it gives them.

    Raises:
        FileFormatError, OSError: it is no GGUF file, or cannot be read.
    """
    lengths = {}
    with open_gguf(path) as file:
        window = file.metadata.number(f"{file.architecture}.attention.sliding_window") or 0
        for name, tensor in file.tensors.items():
            block, _, rest = name.removeprefix("blk.").partition(".")
            if rest == "attn_q_norm.weight" and block.isdecimal():
                weights = tensor.dequantize().astype(np.float64)
                lengths[int(block)] = SHORTER * float(np.sqrt((weights**2).sum()))
    if not lengths:
        return Queries({}, {}, int(window))
    source = "random directions, as long as the model's norm makes queries, stand in for them"
    return Queries({}, lengths, int(window), source)


def exact_attention(
    queries: Queries,
    layer: int,
    windowed: bool,
    keys: np.ndarray,
    k: np.ndarray,
    v: np.ndarray | None,
) -> ExactAttention | None:
    """Return the exact attention of a layer; None if no query sees any of the cells.

    Args:
        queries: what is known of them.
        layer: the model's layer number.
        windowed: whether the layer attends to a window.
        keys: int64 (cells,), sequence and position of each, see `tbq.quality.visible`.
        k, v: float32 (cells, heads, head_dim); v may be None.

    Raises:
        InputError: the queries of the layer are of another model.
    """
    own = queries.layers.get(layer)
    heads, head_dim = k.shape[1:]
    chosen = np.sort(keys)[np.unique(np.linspace(0, len(keys) - 1, QUERIES).astype(int))]
    if own is None:
        window = queries.window if windowed else 0
        q = random_queries(len(chosen), heads, head_dim, queries.lengths.get(layer))
        return ExactAttention(k, v, q, visible(chosen, keys, window))
    n_tokens, n_heads, width = own.q.shape
    if width != head_dim or n_heads % heads:
        got = f"{n_heads} heads of {width} in layer {layer}"
        raise InputError("queries", got, f"a multiple of {heads} heads of {head_dim}, as K has")
    chosen = chosen[(chosen & 0xFFFFFFFF) < n_tokens]
    if not len(chosen):
        return None
    seen = visible(chosen, keys, own.window)
    return ExactAttention(k, v, own.q[chosen & 0xFFFFFFFF], seen, own.scale)
