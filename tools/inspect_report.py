"""An Inspection as one JSON object; `data/tbq-inspect.schema.json` is its schema."""

from __future__ import annotations

import numpy as np

from gguf_io import GgufFile, StateFile
from gguf_io.cache_shapes import cache_shapes
from gguf_io.candidates import Combination
from gguf_io.inspection import Findings, Inspection
from gguf_io.planner import Context, plan, uniform
from gguf_io.queries import NONE, Queries
from gguf_io.state_container import Container
from gguf_io.state_origin import origin
from gguf_io.state_records import (
    DEFERRED_STATES,
    CompressedMemory,
    IkMemory,
    KvMemory,
    RecurrentMemory,
)
from gguf_io.types import Unknown, resolve_type
from tbq import TbqError
from tbq.quality.attention_error import QUERIES

SCHEMA = "tbq-inspect/1"
F16_BITS = 16
CACHE_TYPE = "f16"  # llama.cpp's default
CLASSES = {
    KvMemory: "kv",
    IkMemory: "kv",
    RecurrentMemory: "recurrent",
    CompressedMemory: "compressed",
}
ASSUMPTIONS = (
    f"Attention: {{source}}; up to {QUERIES} per head, each sees the cells of its sequence up to "
    "its own position, and no further back than a window where that is known."
)


def report(
    found: Inspection,
    reference: str | None,
    limits: dict[str, float],
    combinations: list[Combination],
    queries: Queries = NONE,
) -> dict:
    """Return everything that was found, as plain Python values."""
    file = found.file
    tensors = [_tensor(f) for f in found.findings]
    n_bytes = sum(t["n_bytes"] for t in tensors)
    values = sum(t["values"] or 0 for t in tensors)
    sized = [t for t in tensors if t["bpw"] is not None]  # of others no size is known, only room
    sized_bytes, sized_values = (sum(t[key] for t in sized) for key in ("n_bytes", "values"))
    return {
        "schema": SCHEMA,
        "path": str(file.path),
        "kind": "state" if isinstance(file, StateFile) else "gguf",
        "dialect": file.dialect,
        "dialect_reason": file.dialect_reason,
        "dialect_guessed": file.dialect_guessed,
        "gguf": None if isinstance(file, StateFile) else _gguf(file),
        "state": _state(file) if isinstance(file, StateFile) else None,
        "totals": {
            "tensors": len(tensors),
            "n_bytes": n_bytes,
            "values": values,
            "bpw": 8 * sized_bytes / sized_values if sized_values else None,
            "compression": F16_BITS * sized_values / (8 * sized_bytes) if sized_bytes else None,
        },
        "tensors": tensors,
        "reference": None
        if reference is None
        else {"path": reference, "cells": found.compared_cells},
        "assumptions": ASSUMPTIONS.format(source=queries.source)
        if any(f.attention or any(c.attention for c in f.candidates) for f in found.findings)
        else None,
        "choice": None
        if not combinations
        else limits | {"combinations": [c.report() for c in combinations]},
        "warnings": found.warnings,
    }


def _gguf(file) -> dict:
    return {
        "version": file.version,
        "shards": [str(path) for path in file.shard_paths],
        "architecture": file.architecture,
        "metadata_keys": len(file.metadata),
        "cache": _cache(file),
    }


def _cache(file: GgufFile) -> dict | None:
    """Return what the KV cache will be, as f16, at the training context; None if unknown."""
    try:
        shapes = cache_shapes(file)
        if not shapes.n_ctx_train:
            return None
        kind = resolve_type(CACHE_TYPE)
        found = plan(shapes, Context(n_ctx=shapes.n_ctx_train), uniform(kind, kind))
    except TbqError:
        return None  # tbq-plan says why
    return {
        "type": CACHE_TYPE,
        "n_ctx": shapes.n_ctx_train,
        "n_bytes": found.n_bytes,
        "caches": [
            {"name": c.part.name, "cells": c.cells, "layers": len(c.layers)} for c in found.caches
        ],
    }


def _state(file: StateFile) -> dict:
    container, layout = file.container, file.layout
    tokens, found = container.token_list, origin(file)
    return {
        "container": container.kind,
        "version": container.version,
        "version_newer": container.newer and layout.program == "llama.cpp",
        "bytes": file.size,
        "architecture": container.architecture or (file.model.architecture if file.model else None),
        "tokens": None if tokens is None else len(tokens),
        "server_tokens": file.has_server_tokens,
        "slot": _slot(container),
        "envelope": _envelope(container),
        "appendix": _appendix(container),
        "sequence_id": container.sequence_id,
        "origin": {"program": found.program, "reasons": list(found.reasons)},
        "loads": [vars(loads) for loads in found.loads],
        "memory": layout.memory,
        "memory_candidates": list(file.class_candidates),
        "partial": layout.partial,
        "layout": str(layout),
        "layout_reason": file.layout_reason,
        "mrope": layout.mrope,
        "cell_bytes": layout.cell_bytes,
        "values": layout.values,
        "deferred_state": file.deferred_state,
        "rotation": {
            "keys": file.rotation.keys,
            "values": file.rotation.values,
            "reason": file.rotation.reason,
            "unclear": file.rotation.unclear,
            "caches": [vars(cache) for cache in file.rotation.caches],
        },
        "heads": file.head_dim_reason,
        "memories": [_memory(file, i) for i in range(len(file.memories))],
    }


def _slot(container: Container) -> dict | None:
    if container.slot is None:
        return None
    media = [{"start": m.start, "bytes": len(m.data)} for m in container.slot.media]
    return {"version": container.slot.version, "media": media}


def _envelope(container: Container) -> dict | None:
    if container.envelope is None:
        return None
    e = container.envelope
    return {
        "version": e.version,
        "flags": e.flags,
        "logits": e.logits,
        "digests": e.digests,
        "checks": e.checks,
    }


def _appendix(container: Container) -> dict | None:
    if container.appendix is None:
        return None
    a = container.appendix
    names = ("tokens", "first", "last", "bytes")
    checkpoints = [dict(zip(names, c, strict=True)) for c in a.checkpoints]
    return {"name": a.name, "start": a.start, "bytes": a.n_bytes, "checkpoints": checkpoints}


def _memory(file: StateFile, index: int) -> dict:
    memory = file.memories[index]
    deferred = getattr(memory, "deferred", None)
    return {
        "name": file.memory_names[index],
        "class": CLASSES[type(memory)],
        "deferred_state": None if deferred is None else DEFERRED_STATES[deferred],
        "layers": len({t.layer for t in file.tensors.values() if t.memory == index}),
        "streams": [_stream(cells) for cells in file.cells(index)],
    }


def _stream(cells) -> dict:
    ids, counts = np.unique(cells.sequences, return_counts=True)
    positions = cells.positions
    return {
        "cells": len(cells),
        "positions": [int(positions.min()), int(positions.max())] if len(cells) else None,
        "sequences": {str(i): int(n) for i, n in zip(ids, counts, strict=True)},
    }


def _tensor(f: Findings) -> dict:
    t = f.tensor
    known = t.n_embd is not None
    sized = known and t.n_values and not isinstance(t.format, Unknown)
    bpw = 8 * t.n_bytes / t.n_values if sized else None
    return {
        "name": t.name,
        "kind": t.kind,
        "layer": t.layer,
        "type": t.format.label,
        "type_id": t.type_id,
        "ggml_shape": list(t.ggml_shape),
        "n_bytes": t.n_bytes,
        "values": t.n_values if known else None,
        "bpw": bpw,
        "compression": F16_BITS / bpw if bpw else None,
        "head_dim": t.head_dim,
        "rotation": t.rotation.kind if t.rotation is not None else None,
        "undecodable": f.undecodable,
        "health": f.health.report(),
        "statistics": None
        if not f.heads
        else {
            "rows": f.rows,
            "rotation": f.statistics_rotation,
            "heads": [head.report(with_channels=t.kind in "KV") for head in f.heads],
        },
        "reference": None
        if f.distortion is None
        else {
            "values": f.distortion.count,
            "relative_mse": f.distortion.relative_mse,
            "cosine": f.distortion.cosine,
            "attention": f.attention.report() if f.attention else None,
        },
        "candidates": [c.report() for c in f.candidates],
    }
