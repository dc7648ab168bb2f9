"""What candidate types would do to a dump, layer by layer, and the cheapest that is good enough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import tbq
from gguf_io.graph_rotation import ROTATED_MULTIPLE, rotation_kind
from gguf_io.state_writer import CACHE_TYPES
from gguf_io.types import (
    can_quantize,
    dequantize_rows,
    quantize_rows,
    resolve_type,
)
from tbq import Format, InputError
from tbq.quality import AttentionError, Distortion, ExactAttention
from tbq.registry import get_dialect

# What a layer keeps when no candidate is good enough for it.
UNQUANTISED = "f16"


@dataclass(frozen=True)
class CandidateResult:
    """One candidate on the K or V of one layer.

    Attributes:
        type: the candidate.
        relative_mse, cosine: of the values, in their original domain.
        attention: what it does to attention, the other side exact; None for tensors of a model.
        unfit: why it could not be tried; the numbers are NaN then.
        bpw: bits per value, padding of heads included; None if it could not be tried.
    """

    type: Format
    relative_mse: float = float("nan")
    cosine: float = float("nan")
    attention: AttentionError | None = None
    unfit: str | None = None
    bpw: float | None = None

    def report(self) -> dict[str, Any]:
        """Return the numbers for the JSON report."""
        return {
            "type": self.type.label,
            "bpw": self.type.bpw if self.bpw is None else self.bpw,
            "relative_mse": self.relative_mse,
            "cosine": self.cosine,
            "attention": self.attention.report() if self.attention else None,
            "unfit": self.unfit,
        }


def parse_candidates(text: str, dialect: str | None) -> list[Format]:
    """Return the types of a comma-separated list; "all" means all that a cache can have.

    Raises:
        UnknownFormatError: nothing has that name.
        InputError: a type that rows cannot be quantised to on their own.
    """
    if text.strip().lower() == "all":
        own = [resolve_type(name) for name in CACHE_TYPES if name not in ("f32", UNQUANTISED)]
        forks = [
            f
            for f in tbq.formats()
            if not f.sibling and not f.is_ggml and not get_dialect(f.dialect).backend_of
        ]
        return [kind for kind in own if can_quantize(kind)] + forks
    kinds = [resolve_type(name, dialect) for name in text.split(",") if name.strip()]
    if not kinds:
        raise InputError("--candidates", repr(text), "names of types, separated by commas")
    for kind in kinds:
        if not can_quantize(kind) or kind.sibling:
            raise InputError("--candidates", kind.label, "types that rows can be quantised to")
    return list(dict.fromkeys(kinds))


def fits(kind: Format, side: str, n_embd: int) -> str | None:
    """Say why a candidate cannot hold rows of n_embd values of K, V or a model's tensor ("T")."""
    if side != "T" and side not in kind.side:
        return f"for {kind.side} only"
    if n_embd % kind.group_values:
        return f"rows of {n_embd} are not divisible by {kind.group_values}"
    return None


def try_candidate(
    kind: Format,
    side: str,
    values: np.ndarray,
    exact: ExactAttention | None,
    threads: int | None = None,
) -> CandidateResult:
    """Quantise values, float32 (rows, heads, head_dim), as the fork's cache would, and compare."""
    rows, heads, head_dim = values.shape
    whole = head_dim
    try:
        kind = kind.fitting(head_dim=head_dim, side=None if side == "T" else side)
        if side != "T":
            whole = get_dialect(kind.dialect).state.head_values(kind, head_dim)
        unfit = fits(kind, side, heads * whole)
    except InputError as error:
        unfit = f"needs {error.need}"
    if unfit:
        return CandidateResult(kind, unfit=unfit)
    rotation = None
    if side != "T" and kind.is_quantized and head_dim % ROTATED_MULTIPLE == 0:
        name = rotation_kind(side, [kind])
        rotation = tbq.rotation(name, head_dim) if name else None
    x = values if rotation is None else rotation.forward(values)
    x = np.pad(x, ((0, 0), (0, 0), (0, whole - head_dim)))
    packed = quantize_rows(x.reshape(rows, -1), kind, threads=threads)
    y = dequantize_rows(packed, kind, threads=threads).reshape(x.shape)[..., :head_dim]
    y = y if rotation is None else rotation.inverse(y)
    distortion = Distortion()
    distortion.add(values, y)
    attention = exact.error(**{side.lower(): y}) if exact is not None else None
    bits = kind.bpw * whole / head_dim
    return CandidateResult(kind, distortion.relative_mse, distortion.cosine, attention, bpw=bits)


@dataclass(frozen=True)
class Combination:
    """The cheapest types of one dialect that stay within the limits.

    Attributes:
        dialect: whose cache it is; None if only ggml's own types are used.
        k, v: one type for all layers, by name.
        bpw: bits per value with these.
        layers: (layer name, K type, V type) for each layer on its own.
        layers_bpw: bits per value with those.
    """

    dialect: str | None
    k: str
    v: str | None
    bpw: float
    layers: list[tuple[str, str, str | None]]
    layers_bpw: float

    def report(self) -> dict[str, Any]:
        """Return it for the JSON report."""
        return {
            "dialect": self.dialect,
            "k": self.k,
            "v": self.v,
            "bpw": self.bpw,
            "layers": [{"layer": n, "k": k, "v": v} for n, k, v in self.layers],
            "layers_bpw": self.layers_bpw,
        }


@dataclass(frozen=True)
class LayerCandidates:
    """What was tried on one layer: its name, values per row of K and V, and the results."""

    name: str
    widths: dict[str, int]
    results: dict[str, list[CandidateResult]]


def cheapest(
    layers: Sequence[LayerCandidates], max_kl: float, max_output_error: float
) -> list[Combination]:
    """Return the cheapest combination of each dialect among the candidates, the best first.

    A type is good enough for the K of a layer if the divergence of the attention weights stays
    within max_kl, and for its V if the error of the attention output stays within max_output_error.
    """

    def good(side: str, result: CandidateResult) -> bool:
        a = result.attention
        if result.unfit or a is None:
            return False
        return a.kl <= max_kl if side == "K" else (a.output_error or 0.0) <= max_output_error

    found = []
    unquantised = resolve_type(UNQUANTISED)
    for dialect in _dialects(layers):
        per_layer: list[tuple[str, dict[str, Format]]] = []
        common: dict[str, set[Format]] = {}
        bits = {unquantised: unquantised.bpw}  # a type may take more where heads are padded
        for layer in layers:
            chosen = {}
            for side, results in layer.results.items():
                passing = {unquantised}
                for r in results:
                    if good(side, r) and _dialect(r.type) in (None, dialect):
                        passing.add(r.type)
                        bits[r.type] = max(bits.get(r.type, 0.0), r.bpw or r.type.bpw)
                chosen[side] = min(passing, key=lambda kind: (bits[kind], kind.label))
                common[side] = common.get(side, passing) & passing
            per_layer.append((layer.name, chosen))
        uniform = {
            side: min(kinds, key=lambda kind: (bits[kind], kind.label))
            for side, kinds in common.items()
        }
        found.append(
            Combination(
                dialect,
                uniform["K"].label,
                uniform["V"].label if "V" in uniform else None,
                _bpw(layers, [uniform] * len(layers), bits),
                [
                    (name, kinds["K"].label, kinds["V"].label if "V" in kinds else None)
                    for name, kinds in per_layer
                ],
                _bpw(layers, [kinds for _, kinds in per_layer], bits),
            )
        )
    return sorted(found, key=lambda c: (c.bpw, c.layers_bpw))


def _dialect(kind: Format) -> str | None:
    return None if kind.is_ggml else kind.dialect


def _dialects(layers: Iterable[LayerCandidates]) -> list[str | None]:
    """Return the dialects of the candidates; None if all are ggml's own."""
    kinds = [r.type for layer in layers for rs in layer.results.values() for r in rs]
    named = dict.fromkeys(_dialect(k) for k in kinds if not k.is_ggml)
    return list(named) or [None]


def _bpw(
    layers: Sequence[LayerCandidates],
    kinds: Sequence[dict[str, Format]],
    bits_of: dict[Format, float],
) -> float:
    bits = values = 0.0
    for layer, chosen in zip(layers, kinds, strict=True):
        for side, width in layer.widths.items():  # a layer may have no V
            bits += bits_of[chosen[side]] * width
            values += width
    return bits / values if values else float("nan")
