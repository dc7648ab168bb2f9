"""Everything that tbq-inspect finds out about a file, before anybody prints it."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

import tbq
from gguf_io.cache_tensor import CacheTensor
from gguf_io.candidates import CandidateResult, LayerCandidates, try_candidate
from gguf_io.graph_rotation import ROTATED_MULTIPLE, rotation_kind
from gguf_io.health import BlockHealth
from gguf_io.queries import NONE, Queries, exact_attention
from gguf_io.reader import GgufFile, GgufTensor
from gguf_io.state import StateFile
from gguf_io.types import Unknown, dequantize_rows
from tbq import Format, InputError, Rotation, TbqError
from tbq.quality import AttentionError, Distortion
from tbq.quality.attention_error import ExactAttention
from tbq.quality.statistics import HeadStatistics, head_statistics
from tbq.rotations import KINDS


class Progress(Protocol):
    """What is told how far the work is."""

    def advance(self, n: int) -> None:
        """Count n more bytes."""


# Stored bytes and float32 values that are held at a time where all rows are looked at.
CHUNK_BYTES = 1 << 24
CHUNK_VALUES = 1 << 22
# Values of sampled rows that are held at a time; of wide rows fewer are sampled.
SAMPLED_VALUES = 1 << 26
# A row of more values is looked at block by block and not decoded.
MAX_ROW_VALUES = 1 << 24
# A reference that differs by more than this is taken to be misread, not quantised.
IMPLAUSIBLE_MSE = 0.3
# Rows that a wrong rotation is looked for with.
PROBE_ROWS = 128
# How much heavier the tails must get by rotating before the rows are taken to be rotated already.
SUSPECT_KURTOSIS = 1.5
NAMES_IN_WARNING = 6


class ModelTensor:
    """A tensor of a GGUF file with the interface of a CacheTensor: its rows are one head wide."""

    kind = "T"
    memory = 0
    rotation = None

    def __init__(self, tensor: GgufTensor) -> None:
        self._tensor = tensor
        self.name = tensor.name
        self.format = tensor.format
        self.type_id = tensor.type_id
        self.n_bytes = tensor.n_bytes
        self.n_cells = tensor.n_rows
        self.n_embd = None if isinstance(tensor.format, Unknown) else tensor.row_values
        self.head_dim = self.row_values = self.n_embd
        self.ggml_shape = tensor.ggml_shape
        self.n_values = tensor.n_values
        block = re.match(r"blk\.([0-9]{1,6})\.", tensor.name)
        self.layer = int(block[1]) if block else None
        self.row_bytes = tensor.n_bytes // tensor.n_rows if tensor.n_rows else 0
        self.rows = tensor.rows

    def values(self, start: int, stop: int, *, threads: int | None = None) -> np.ndarray:
        """Dequantise rows [start, stop) to float32 (rows, 1, n)."""
        return self._tensor.dequantize_rows(start, stop, threads=threads)[:, None]

    def values_at(self, rows: np.ndarray, *, threads: int | None = None) -> np.ndarray:
        """Dequantise some rows to float32 (n, 1, n_embd)."""
        if isinstance(self.format, Unknown):
            return self.values(0, 1, threads=threads)  # raises the error that explains it
        packed = self._tensor.rows_at(rows)
        return dequantize_rows(packed, self.format, threads=threads)[:, None]


Tensor = CacheTensor | ModelTensor


@dataclass
class Settings:
    """What is to be found out.

    Attributes:
        max_rows: rows per tensor for statistics, candidates and attention, fewer where they are
            wide; 0 for all.
        candidates: types to try.
        layers: what contains the layer numbers to look at; None for all.
        threads: worker threads of the codecs.
        queries: what is known of the model's queries.
    """

    max_rows: int = 4096
    candidates: list[Format] = field(default_factory=list)
    layers: Container[int] | None = None
    threads: int | None = None
    queries: Queries = NONE


@dataclass
class Findings:
    """What was found out about one tensor; `undecodable` says why its values were not."""

    tensor: Tensor
    health: BlockHealth = field(default_factory=BlockHealth)
    heads: list[HeadStatistics] = field(default_factory=list)
    rows: int = 0
    statistics_rotation: str | None = None
    undecodable: str | None = None
    distortion: Distortion | None = None
    attention: AttentionError | None = None
    candidates: list[CandidateResult] = field(default_factory=list)

    @property
    def relative_mse(self) -> float | None:
        """The error against the reference."""
        return self.distortion.relative_mse if self.distortion else None


@dataclass
class Inspection:
    """A file and what was found in it."""

    file: StateFile | GgufFile
    findings: list[Findings] = field(default_factory=list)
    compared_cells: int | None = None
    _warnings: dict[str, list[str]] = field(default_factory=dict)

    def warn(self, text: str, tensor: str | None = None) -> None:
        """Note something for the user; the same about several tensors is said once."""
        self._warnings.setdefault(text, []).extend([] if tensor is None else [tensor])

    @property
    def warnings(self) -> list[str]:
        """What the user should know, one sentence each."""
        return [
            f"{_some(names)}: {text}" if names else text for text, names in self._warnings.items()
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that were looked at."""
        return [f.tensor for f in self.findings]

    def layer_candidates(self) -> list[LayerCandidates]:
        """Return the candidates of each layer's K and V."""
        layers: dict[tuple[Any, ...], LayerCandidates] = {}
        for f in self.findings:
            t = f.tensor
            if t.kind in "KV" and f.candidates:
                name = re.sub(r"cache_[kv]_l", "layer ", t.name)
                layer = layers.setdefault((t.memory, t.layer), LayerCandidates(name, {}, {}))
                layer.widths[t.kind] = t.row_values or 0
                layer.results[t.kind] = f.candidates
        return list(layers.values())


def _some(names: list[str]) -> str:
    shown = names if len(names) <= NAMES_IN_WARNING else names[: NAMES_IN_WARNING - 1]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def inspect_file(
    file: StateFile | GgufFile,
    reference: StateFile | GgufFile | None,
    settings: Settings,
    progress: Progress,
) -> Inspection:
    """Look at a file, layer by layer; at most one layer's sampled rows are in memory at a time.

    Raises:
        InputError: the reference has no rows in common with the file.
    """
    inspection = Inspection(file)
    for text in getattr(file, "warnings", ()):
        inspection.warn(text)
    tensors = selected_tensors(file, settings.layers)
    others = {t.name: t for t in selected_tensors(reference, None)} if reference else {}
    pairings = _pairings(file, reference) if reference else {}
    if pairings and isinstance(file, StateFile):
        inspection.compared_cells = sum(len(mine) for mine, _ in pairings.values())
    if reference is not None:
        _check_reference(inspection, tensors, others, reference)
    for group in _layers(tensors):
        done = [_look_at(t, settings, inspection, progress) for t in group]
        inspection.findings += done
        for f in done:
            other = others.get(f.tensor.name)
            if other is not None and not f.undecodable and f.tensor.n_values:
                _compare(f, other, pairings.get(f.tensor.memory), inspection, settings)
        _attention(done, others, pairings, inspection, settings)
        _try_candidates(done, inspection, settings, progress)
    for opened in (file, reference):
        if opened is not None:
            opened.check_unchanged()
    order = {t.name: i for i, t in enumerate(tensors)}
    inspection.findings.sort(key=lambda f: order[f.tensor.name])
    return inspection


def selected_tensors(file: StateFile | GgufFile, layers: Container[int] | None) -> list[Tensor]:
    """Return the tensors of a file that have values, of some layers or of all."""
    tensors: list[Tensor]
    if isinstance(file, StateFile):
        tensors = [t for t in file.tensors.values() if t.n_bytes]
    else:
        tensors = [ModelTensor(t) for t in file.tensors.values()]
    return [t for t in tensors if layers is None or t.layer in layers]


def _layers(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the K and V of each layer together, everything else alone."""
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for t in tensors:
        key = (t.memory, t.layer) if t.kind in "KV" else (t.name,)
        groups.setdefault(key, []).append(t)
    yield from groups.values()


def sampled_rows(n: int, limit: int) -> np.ndarray:
    """Return at most `limit` of n row numbers, evenly spaced; all for limit 0."""
    if not limit or n <= limit:
        return np.arange(n)
    return np.linspace(0, n - 1, limit).astype(np.int64)


def row_limit(t: Tensor, settings: Settings) -> int:
    """Return how many rows of a tensor are sampled; 0 for all."""
    affordable = SAMPLED_VALUES // max(1, t.n_embd or 1)
    return settings.max_rows and min(settings.max_rows, max(2, affordable))


def statistics_rotation(t: Tensor) -> Rotation | None:
    """Return the rotation that a cache would apply to a tensor's rows, stored under one or not."""
    if t.rotation is not None:
        return t.rotation
    width = t.head_dim or 0
    if not width or width % ROTATED_MULTIPLE or t.kind in "RSP":
        return None
    kind = "hadamard64" if t.kind == "T" else rotation_kind(t.kind, [])
    return None if kind is None else tbq.rotation(kind, width)


# --- one tensor ----------------------------------------------------------------------------------


def _look_at(t: Tensor, settings: Settings, inspection: Inspection, progress: Progress) -> Findings:
    found = Findings(t)
    if not t.n_values and not isinstance(t.format, Unknown):
        return found
    _check_blocks(t, found.health, progress)
    for problem in found.health.problems():
        inspection.warn(problem, t.name)
    rows = sampled_rows(t.n_cells, row_limit(t, settings))
    try:
        if (t.n_embd or 0) > MAX_ROW_VALUES:
            need = f"at most {MAX_ROW_VALUES} for statistics and comparisons"
            raise InputError(f"tensor {t.name!r}", f"rows of {t.n_embd} values", need)
        values = t.values_at(rows, threads=settings.threads)
    except TbqError as error:
        found.undecodable = str(error)
        inspection.warn(str(error))
        return found
    rotation = statistics_rotation(t)
    found.rows = len(rows)
    found.statistics_rotation = rotation.kind if rotation else None
    found.heads = head_statistics(values, rotation)
    _suspect_rotation(found, inspection)
    return found


def _check_blocks(t: Tensor, health: BlockHealth, progress: Progress) -> None:
    """Look at everything that is stored, some rows at a time, or some blocks of a wide row."""
    if isinstance(t.format, Unknown):
        progress.advance(t.n_bytes)
        return
    step = max(1, CHUNK_BYTES // max(1, t.row_bytes))
    for start in range(0, t.n_cells, step):
        stop = min(start + step, t.n_cells)
        rows = t.rows(start, stop)
        if t.row_bytes <= CHUNK_BYTES:
            health.add(rows, t.format, start)
        else:
            codec = t.format.codec
            groups = (t.n_embd or 0) // codec.group_values
            some = max(1, CHUNK_BYTES // (codec.group_blocks * codec.block_bytes))
            for first in range(0, groups, some):
                health.add_part(rows[0], t.format, start, first, min(first + some, groups))
        progress.advance((stop - start) * t.row_bytes)


def _suspect_rotation(f: Findings, inspection: Inspection) -> None:
    """Warn if undoing the rotation, or not having done so, made the tails lighter."""
    if f.tensor.kind not in "KV" or not f.heads or f.heads[0].kurtosis_rotated is None:
        return
    before = float(np.median([h.kurtosis for h in f.heads]))
    after = float(np.median([h.kurtosis_rotated for h in f.heads]))
    if after > SUSPECT_KURTOSIS * before:
        state = "undone" if f.tensor.rotation is not None else "not assumed"
        text = "the tails are heavier after the rotation than before, which is unusual; "
        inspection.warn(f"{text}it was {state}: check --rotation", f.tensor.name)


# --- against a reference -------------------------------------------------------------------------


def _check_reference(
    inspection: Inspection, tensors: list[Tensor], others: dict[str, Tensor], reference: Any
) -> None:
    missing = [t.name for t in tensors if t.name not in others]
    if len(missing) == len(tensors):
        raise InputError("--reference", f"{reference.path}, without any of these tensors", "a twin")
    if missing:
        inspection.warn(f"the reference lacks {', '.join(missing)}")
    quantised = sorted(
        {o.format.name for o in others.values() if o.format.is_quantized and o.kind in "KV"}
    )
    if quantised:
        inspection.warn(f"the reference is quantised itself: {', '.join(quantised)}")
    file = inspection.file
    if isinstance(file, StateFile):
        mine, its = file.container.tokens, reference.container.tokens
        if mine is None or its is None:
            return
        n = min(len(mine), len(its))
        if n and not np.array_equal(mine[:n], its[:n]):
            inspection.warn("the reference was made from other tokens")


def _pairings(file: Any, reference: Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return, per memory, the rows of the file and of the reference that are the same cells."""
    if not isinstance(file, StateFile):
        return {}
    found = {}
    for memory, name in enumerate(file.memory_names):
        if name not in reference.memory_names or not _is_cache(file, memory):
            continue
        mine = _cell_keys(file, memory)
        its = _cell_keys(reference, reference.memory_names.index(name))
        _, a, b = np.intersect1d(mine, its, return_indices=True)
        order = np.argsort(a)
        found[memory] = a[order], b[order]
    if found and not any(len(a) for a, _ in found.values()):
        got = f"{reference.path}, with other positions or sequences"
        raise InputError("--reference", got, "a dump of the same prompt")
    return found


def _is_cache(state: StateFile, memory: int) -> bool:
    """Tell whether rows of a memory are those of cells with positions."""
    return state.memory_names[memory] != "recurrent" and bool(state.cells(memory))


def _cell_keys(state: StateFile, memory: int) -> np.ndarray:
    """Return one number per row, made of its cell's first sequence and its position."""
    keys = []
    for cells in state.cells(memory):
        counts = cells.sequence_counts.astype(np.int64)
        first = np.cumsum(counts) - counts
        sequence = cells.sequences[np.minimum(first, max(0, len(cells.sequences) - 1))]
        sequence = np.where(counts > 0, sequence, 0) if len(sequence) else counts
        keys.append(sequence.astype(np.int64) << 32 | cells.positions)
    return np.concatenate(keys)


def _compare(
    f: Findings,
    other: Tensor,
    pairing: tuple[np.ndarray, np.ndarray] | None,
    inspection: Inspection,
    settings: Settings,
) -> None:
    """Accumulate the error over all rows that both files have."""
    t = f.tensor
    unpaired = pairing is None
    mine, its = (np.arange(t.n_cells),) * 2 if pairing is None else pairing
    if t.row_values != other.row_values or (unpaired and t.n_cells != other.n_cells):
        shapes = f"{t.ggml_shape} and {other.ggml_shape}"
        inspection.warn(f"shapes differ from the reference's: {shapes}", t.name)
        return
    f.distortion = Distortion()
    step = max(1, CHUNK_VALUES // (t.n_embd or 1))
    for start in range(0, len(mine), step):
        x = other.values_at(its[start : start + step], threads=settings.threads)
        y = t.values_at(mine[start : start + step], threads=settings.threads)
        f.distortion.add(x.reshape(len(x), -1), y.reshape(len(y), -1))
    if not f.distortion.relative_mse <= IMPLAUSIBLE_MSE:
        probe = slice(0, PROBE_ROWS)
        why = _explanation(t, other.values_at(its[probe]), t.values_at(mine[probe]))
        text = "the error against the reference is larger than quantisation makes it; "
        inspection.warn(text + why, t.name)


def _explanation(t: Tensor, exact: np.ndarray, found: np.ndarray) -> str:
    """Say which other reading of the rotation would explain a large error."""
    if t.kind in "KV":
        n = t.row_values or 0
        stored = found if t.rotation is None else t.rotation.forward(found)
        stored, exact = stored.reshape(-1, n), exact.reshape(-1, n)
        readings = [(_relative_mse(stored, exact), "no rotation")]
        for kind in KINDS:
            for width in sorted({64, 128, 256, 512, t.head_dim or 64}):
                if width % ROTATED_MULTIPLE == 0 and n % width == 0:
                    undone = tbq.rotation(kind, width).inverse(stored)
                    readings.append(
                        (_relative_mse(undone, exact), f"rotation {kind} on heads of {width}")
                    )
        error, name = min(readings)
        if error < IMPLAUSIBLE_MSE / 3:
            return f"{name} would explain it: check --rotation, and --head-dim or --model"
    return "check that both files hold the same prompt and model, --rotation and --head-dim"


def _relative_mse(y: np.ndarray, x: np.ndarray) -> float:
    distortion = Distortion()
    distortion.add(x, y)
    return distortion.relative_mse


def _attention(
    done: list[Findings],
    others: dict[str, Tensor],
    pairings: dict[int, tuple[np.ndarray, np.ndarray]],
    inspection: Inspection,
    settings: Settings,
) -> None:
    """Compare the attention of a layer's K and V with that of the reference."""
    by_kind = {f.tensor.kind: f for f in done if f.distortion is not None}
    k = by_kind.get("K")
    if k is None or k.tensor.memory not in pairings:
        return
    mine, its = pairings[k.tensor.memory]
    sample = sampled_rows(len(mine), row_limit(k.tensor, settings))
    if len(sample) < 2:
        return
    exact: dict[str, np.ndarray] = {}
    found: dict[str, np.ndarray] = {}
    for kind, f in by_kind.items():
        exact[kind] = others[f.tensor.name].values_at(its[sample], threads=settings.threads)
        # heads as the file under inspection has them
        found[kind] = f.tensor.values_at(mine[sample], threads=settings.threads)
        exact[kind] = exact[kind].reshape(found[kind].shape)
    same_heads = "V" in exact and exact["V"].shape[1] == exact["K"].shape[1]
    v = exact["V"] if same_heads else None
    attention = _exact(inspection, settings, k.tensor, mine[sample], exact["K"], v)
    if attention is None:
        return
    error = attention.error(found["K"], found["V"] if same_heads else None)
    for f in by_kind.values():
        f.attention = error


def _exact(
    inspection: Inspection,
    settings: Settings,
    t: Tensor,
    rows: np.ndarray,
    k: np.ndarray,
    v: np.ndarray | None,
) -> ExactAttention | None:
    """Return the exact attention to some rows of a layer, None if that cannot be had."""
    file = inspection.file
    assert isinstance(file, StateFile), "models have no keys"
    assert t.layer is not None, "keys are those of a layer"
    if not _is_cache(file, t.memory):
        inspection.warn("has no cells of its own: attention to it is not computed", t.name)
        return None
    keys = _cell_keys(file, t.memory)[rows]
    windowed = file.memory_names[t.memory] == "swa"
    exact = exact_attention(settings.queries, t.layer, windowed, keys, k, v)
    if exact is None:
        inspection.warn("no query of the file looks at any of its cells", t.name)
    return exact


# --- candidates ----------------------------------------------------------------------------------


def _try_candidates(
    done: list[Findings], inspection: Inspection, settings: Settings, progress: Progress
) -> None:
    """Try every candidate on a layer's K and V, or on a model's tensor."""
    usable = [f for f in done if not f.undecodable and f.tensor.kind in "KVT" and f.heads]
    if not settings.candidates or not usable:
        return
    limit = row_limit(usable[0].tensor, settings)
    rows = sampled_rows(usable[0].tensor.n_cells, limit)
    values = {f.tensor.kind: f.tensor.values_at(rows, threads=settings.threads) for f in usable}
    exact = None
    if "K" in values and len(rows) > 1:
        v = values.get("V")
        same_heads = v is not None and v.shape[1] == values["K"].shape[1]
        t = next(f.tensor for f in usable if f.tensor.kind == "K")
        v = v if same_heads else None
        exact = _exact(inspection, settings, t, rows, values["K"], v)
    for f in usable:
        side = f.tensor.kind
        if f.tensor.format.is_quantized:
            inspection.warn(
                "candidates were tried on values that are quantised already, which flatters some"
            )
        for kind in settings.candidates:
            f.candidates.append(try_candidate(kind, side, values[side], exact, settings.threads))
            progress.advance(f.tensor.n_bytes)
