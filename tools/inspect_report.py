"""An Inspection as one JSON object; `data/tbq-inspect.schema.json` is its schema."""

from __future__ import annotations

import numpy as np

from gguf_io import StateFile
from gguf_io.candidates import Combination
from gguf_io.inspection import Findings, Inspection
from gguf_io.state_parser import DEFERRED_STATES, KvMemory
from tbq.quality.attention_error import QUERIES

SCHEMA = "tbq-inspect/1"
F16_BITS = 16
ASSUMPTIONS = (
    f"Attention is that of up to {QUERIES} of the layer's own exact keys, used as queries against "
    "the keys of all other sampled cells, scaled by 1/sqrt(head_dim); real queries differ."
)


def report(
    found: Inspection,
    reference: str | None,
    limits: dict[str, float],
    combinations: list[Combination],
) -> dict:
    """Return everything that was found, as plain Python values."""
    file = found.file
    tensors = [_tensor(f) for f in found.findings]
    n_bytes = sum(t["n_bytes"] for t in tensors)
    values = sum(t["values"] or 0 for t in tensors)
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
            "bpw": 8 * n_bytes / values if values else None,
            "compression": F16_BITS * values / (8 * n_bytes) if n_bytes else None,
        },
        "tensors": tensors,
        "reference": None
        if reference is None
        else {"path": reference, "cells": found.compared_cells},
        "assumptions": ASSUMPTIONS
        if any(f.attention or f.candidates for f in found.findings)
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
    }


def _state(file: StateFile) -> dict:
    container, layout = file.container, file.layout
    return {
        "container": container.kind,
        "version": container.version,
        "bytes": file.size,
        "architecture": container.architecture or (file.model.architecture if file.model else None),
        "tokens": None if container.tokens is None else len(container.tokens),
        "server_tokens": file.has_server_tokens,
        "sequence_id": container.sequence_id,
        "memory": layout.memory,
        "layout": str(layout),
        "layout_reason": file.layout_reason,
        "mrope": layout.mrope,
        "values": layout.values,
        "deferred_state": file.deferred_state,
        "rotation": {
            "keys": file.rotation.keys,
            "values": file.rotation.values,
            "reason": file.rotation.reason,
            "unclear": file.rotation.unclear,
        },
        "heads": file.head_dim_reason,
        "memories": [_memory(file, i) for i in range(len(file.memories))],
    }


def _memory(file: StateFile, index: int) -> dict:
    memory = file.memories[index]
    deferred = getattr(memory, "deferred", None)
    return {
        "name": file.memory_names[index],
        "class": "kv" if isinstance(memory, KvMemory) else "recurrent",
        "deferred_state": None if deferred is None else DEFERRED_STATES[deferred],
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
    bpw = 8 * t.n_bytes / t.n_values if known and t.n_values else None
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
