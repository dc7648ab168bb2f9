"""What tbq-plan found out, as one JSON object; `data/tbq-plan.schema.json` is its schema."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from gguf_io import GgufFile
from gguf_io.cache_shapes import CacheShapes
from gguf_io.layer_types import Boundary, Loader, own_choices
from gguf_io.planner import (
    Choice,
    Context,
    MemoryPlan,
    Types,
    by_layer,
    cache_types,
    largest_context,
    pair_refusal,
    pairs,
    plan,
    refusal,
    split_head,
    uniform,
)
from gguf_io.types import resolve_type
from tbq import Format, InputError

from .distortion_table import LLOYD_MAX
from .type_errors import error_of

SCHEMA = "tbq-plan/1"
# Errors measured on a sample are as good as a bound if they are so little above it.
SLACK = 1.1
MOST_BITS = 8
# Tensors by what they are for; the first pattern that matches a name.
GROUPS = (
    ("token embeddings", r"(token_embd|per_layer_token_embd|position_embd|token_types)\b"),
    ("output", r"output(_norm)?\b"),
    ("experts", r"blk\.\d+\.ffn_\w+_(ch)?exps\b"),
    ("recurrent", r"blk\.\d+\.(ssm_|time_mix_|channel_mix_|shortconv)"),
    ("norms", r"blk\.\d+\.\w*norm"),
    ("attention", r"blk\.\d+\.(attn|indexer|compressor)"),
    ("feed forward", r"blk\.\d+\.ffn"),
)


@dataclass(frozen=True)
class Request:
    """What is planned.

    Attributes:
        context: as llama.cpp would be asked.
        n_ctx_assumed: whether its length is the model's training context.
        types: those of K and V; None if they are to be chosen.
        dialect: whose types are offered.
        layers: types of single layers.
        edges: layers at both ends with a type of their own.
        loader: how the dialect's fork is told of either; None if no way is known.
        vram: bytes for model and memory; None if not said.
    """

    context: Context
    n_ctx_assumed: bool
    types: Types | None
    dialect: str
    layers: Mapping[int, Types]
    edges: Boundary | None
    loader: Loader | None
    vram: int | None

    @property
    def planned(self) -> Types:
        """The types that sizes are of: f16 if none were asked for."""
        f16 = resolve_type("f16")
        return self.types or Types(f16, f16)

    @property
    def choice(self) -> Choice:
        """The types of every layer."""
        return by_layer(self.layers, self.planned) if self.layers else uniform_of(self.planned)


def uniform_of(types: Types) -> Choice:
    """Return the choice of the same types for every layer."""
    return uniform(types.k, types.v)


def report(file: GgufFile, shapes: CacheShapes, request: Request) -> dict:
    """Return everything as plain Python values.

    Raises:
        InputError: the model cannot have the types.
    """
    check_types(shapes, request)
    found = plan(shapes, request.context, request.choice)
    f16 = resolve_type("f16")
    groups = model_groups(file)
    model_bytes = sum(group["bytes"] for group in groups)
    budget = None if request.vram is None else request.vram - model_bytes
    return {
        "schema": SCHEMA,
        "path": str(file.path),
        "architecture": shapes.architecture,
        "context": _context(shapes, request),
        "dialect": request.dialect,
        "types": {
            "k": request.planned.k.label,
            "v": request.planned.v.label,
            "assumed": request.types is None,
        },
        "policy": _policy(shapes, request, found),
        "caches": [_cache(cache) for cache in found.caches],
        "recurrent": [
            {
                "cells": part.cells,
                "layers": part.layers,
                "state_layers": list(part.state_layers),
                "r_bytes": part.r_bytes,
                "s_bytes": part.s_bytes,
                "p_bytes": part.p_bytes,
            }
            for part in found.recurrent
        ],
        "compressors": [
            {"name": part.name, "layers": part.layers, "bytes": part.n_bytes}
            for part in found.compressors
        ],
        "kv_bytes": found.kv_bytes,
        "state_bytes": found.state_bytes,
        "staging_bytes": found.staging_bytes,
        "memory_bytes": found.n_bytes,
        "f16_bytes": plan(shapes, request.context, uniform(f16, f16)).n_bytes,
        "bits_per_value": bits_per_value(found),
        "model_bytes": model_bytes,
        "model_groups": groups,
        "total_bytes": model_bytes + found.n_bytes,
        "vram_bytes": request.vram,
        "largest_context": _largest(shapes, request, request.choice, budget),
        "pairs": [] if request.types or not shapes.parts else list(_pairs(shapes, request, budget)),
        "unfit": list(_unfit(shapes, request)),
        "command": command(request),
        "notes": list(_notes(shapes, request, found)),
    }


def check_types(shapes: CacheShapes, request: Request) -> None:
    """Raise InputError if the model cannot have types that were asked for."""
    wanted = [request.planned, *request.layers.values()]
    flash = request.context.flash_attn
    for types in wanted:
        for side, fmt in (("K", types.k), ("V", types.v)):
            reason = refusal(fmt, side, shapes, flash)
            if reason:
                raise InputError(f"type of {side}", fmt.label, f"another: {reason}")
        reason = pair_refusal(types.k, types.v, shapes)
        if reason:
            raise InputError("types", f"{types.k.label} and {types.v.label}", f"others: {reason}")


def bits_per_value(found: MemoryPlan) -> float | None:
    """Return the bits that a key or value takes; None if there are none."""
    values = found.kv_values
    return float(Fraction(8 * found.kv_bytes, values)) if values else None


def model_groups(file: GgufFile) -> list[dict]:
    """Return the tensors by what they are for, with their parameters and bytes."""
    found: dict[str, dict] = {}
    for tensor in file.tensors.values():
        name = next((n for n, pattern in GROUPS if re.match(pattern, tensor.name)), "other")
        group = found.setdefault(name, {"name": name, "tensors": 0, "parameters": 0, "bytes": 0})
        group["tensors"] += 1
        group["parameters"] += tensor.n_values
        group["bytes"] += tensor.n_bytes
    return sorted(found.values(), key=lambda group: -group["bytes"])


def error_class(fmt: Format, error: float | None) -> str | None:
    """Return how good a type is: the bits of a Lloyd-Max quantiser without a scale that is no
    better, or "float"; None if its error is not known.
    """  # noqa: D205
    if not fmt.is_quantized:
        return "float"
    if error is None:
        return None
    return str(max((b for b in range(MOST_BITS + 1) if error <= SLACK * lloyd_max(b)), default=0))


def lloyd_max(bits: int) -> float:
    """Return the least error of a scalar quantiser of a normal distribution.

    Above the tabulated bits by Panter and Dite's formula, which is exact in the limit.
    """
    if not bits:
        return 1.0
    return LLOYD_MAX.get(bits) or 3**0.5 * 3.141592653589793 / 2 * 4.0**-bits


def _context(shapes: CacheShapes, request: Request) -> dict:
    context = request.context
    return {
        "n_ctx": context.n_ctx,
        "n_ctx_assumed": request.n_ctx_assumed,
        "n_ctx_seq": context.n_ctx_seq,
        "n_ctx_train": shapes.n_ctx_train,
        "n_parallel": context.n_parallel,
        "n_ubatch": context.n_ubatch,
        "kv_unified": context.kv_unified,
        "swa_full": context.swa_full,
        "flash_attn": context.flash_attn,
    }


def _cache(cache) -> dict:
    return {
        "name": cache.part.name,
        "cells": cache.cells,
        "streams": cache.streams,
        "layers": len(cache.layers),
        "k_bytes": cache.k_bytes,
        "v_bytes": cache.v_bytes,
        "by_layer": [
            {
                "layer": entry.layer.number,
                "heads": entry.layer.heads,
                "head_k": entry.layer.head_k,
                "head_v": entry.layer.head_v,
                "k_type": entry.types.k.label,
                "v_type": entry.types.v.label if entry.layer.head_v else None,
                "k_bytes": entry.k_bytes,
                "v_bytes": entry.v_bytes,
            }
            for entry in cache.layers
        ],
    }


def _largest(
    shapes: CacheShapes, request: Request, choice: Choice, budget: int | None
) -> int | None:
    if budget is None:
        return None
    # beyond its training a model is of little use; without that, what was asked for is the limit
    context = request.context
    sequences = 1 if context.kv_unified else context.n_parallel
    most = max(context.n_ctx_seq, shapes.n_ctx_train or 0) * sequences
    return largest_context(shapes, context, choice, budget, most)


def _policy(shapes: CacheShapes, request: Request, found: MemoryPlan) -> dict | None:
    if not request.layers:
        return None
    same = plan(shapes, request.context, uniform_of(request.planned))
    flags = request.loader.flags(request.edges) if request.loader and request.edges else None
    return {
        "layers": {
            str(il): {"k": types.k.label, "v": types.v.label}
            for il, types in sorted(request.layers.items())
        },
        "extra_bytes": found.n_bytes - same.n_bytes,
        "loader": request.loader.how if request.loader else None,
        "flags": flags,
    }


def _pairs(shapes: CacheShapes, request: Request, budget: int | None) -> Iterator[dict]:
    """Yield every pair that fits the model, the smallest first."""
    found = []
    types = cache_types(request.dialect)
    for k, v in pairs(shapes, types, request.context.flash_attn):
        choice = uniform(k, v)
        size = plan(shapes, request.context, choice)
        errors = [_worst(shapes, fmt, side) for fmt, side in ((k, "K"), (v, "V"))]
        entry = {
            "k": k.label,
            "v": v.label if shapes.has_v else None,
            "kv_bytes": size.kv_bytes,
            "memory_bytes": size.n_bytes,
            "bits_per_value": bits_per_value(size),
            "error_k": errors[0],
            "error_v": errors[1] if shapes.has_v else None,
            "class_k": error_class(k, errors[0]),
            "class_v": error_class(v, errors[1]) if shapes.has_v else None,
            "largest_context": _largest(shapes, request, choice, budget),
        }
        found.append(entry)
    yield from sorted(found, key=lambda e: (e["memory_bytes"], e["error_k"] or 0, e["k"]))


def _worst(shapes: CacheShapes, fmt: Format, side: str) -> float | None:
    """Return the largest error of a type over the widths of heads that the model has."""
    heads = {
        layer.head_k if side == "K" else layer.head_v
        for part in shapes.parts
        for layer in part.layers
    }
    known = [error_of(fmt, head, side) for head in heads - {0}]
    return None if not known or None in known else max(known)


def _unfit(shapes: CacheShapes, request: Request) -> Iterator[dict]:
    for fmt in cache_types(request.dialect) if shapes.parts else ():
        for side in "KV":
            reason = refusal(fmt, side, shapes, request.context.flash_attn)
            if reason:
                yield {"type": fmt.label, "side": side, "reason": reason}


def command(request: Request) -> str:
    """Return the flags for llama.cpp's programs."""
    context, types = request.context, request.planned
    words = [f"-ctk {types.k.name} -ctv {types.v.name} -c {context.n_ctx}"]
    words.append(f"-np {context.n_parallel} -ub {context.n_ubatch}")
    words += ["--kv-unified"] if context.kv_unified else []
    words += ["--swa-full"] if context.swa_full else []
    if not context.flash_attn:
        words.append("-fa off")
    elif types.v.is_quantized:
        words.append("-fa on")
    if request.edges and request.loader:
        words += filter(None, [request.loader.flags(request.edges)])
    return " ".join(words)


def _notes(shapes: CacheShapes, request: Request, found: MemoryPlan) -> Iterator[str]:
    yield from shapes.notes
    if request.n_ctx_assumed:
        yield f"no -c: the model's training context of {request.context.n_ctx} tokens is assumed"
    sequences = request.context.n_parallel
    shareable = any(not part.per_sequence for part in shapes.parts)
    if shareable and not request.context.kv_unified and sequences > 1:
        cells = request.context.n_ctx_seq
        yield f"each of {sequences} sequences has {cells} cells; --kv-unified lets them share"
    if shapes.n_ctx_train and request.context.n_ctx_seq > shapes.n_ctx_train:
        yield f"longer than the {shapes.n_ctx_train} tokens that the model was trained with"
    if found.staging_bytes:
        yield (
            "the fork collects rows of these types as f16 first, in buffers beside the cache that "
            "stay allocated; --no-tq-deferred-k and --no-tq-deferred-v do without"
        )
    for side, fmt in (("K", request.planned.k), ("V", request.planned.v)):
        head = split_head(fmt, side, shapes)
        if head:
            yield f"groups of {fmt.label} reach over heads of {head} values; not every kernel can"
    yield from own_choices(request.dialect, request.planned, shapes.n_layer)
    if request.layers:
        fork = request.dialect
        how = request.loader.how if request.loader else "none known"
        yield f"layers of their own types: what can load that of {fork}: {how}"
    if not shapes.has_v and shapes.parts:
        yield "no V is stored: the type of V does not matter for size, but has to be the same"
    if request.vram is not None:
        yield "buffers for computing are not counted; leave them some hundred MiB"
