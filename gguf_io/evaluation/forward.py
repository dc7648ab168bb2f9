"""Many runs of a model over the same tokens, which differ in the types of their caches.

Every weight is dequantised once. Runs are one as long as no type has told them apart: of two that
differ in layer 3 only, layers 0 to 2 are computed once, and layer 3 up to its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gguf_io.evaluation.blas import one_thread
from gguf_io.evaluation.cache_path import CachePath, cache_path
from gguf_io.evaluation.transformer import Decoder, Layer
from tbq import Format

Types = tuple[str | Format, ...]
# Called with a layer, and with q, k and v of the first window before they are stored.
Tap = Callable[[Layer, np.ndarray, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Run:
    """One assignment of types to the caches of all layers.

    Attributes:
        k, v: the paths of the layers, from 0.
        k_means, v_means: what is subtracted from rows, by layer, where anything is.
        queries: the type that queries are rounded to where keys are quantised; None for none.
    """

    k: tuple[CachePath, ...]
    v: tuple[CachePath, ...]
    k_means: dict[int, np.ndarray] = field(default_factory=dict)
    v_means: dict[int, np.ndarray] = field(default_factory=dict)
    queries: Format | None = None

    def rounds(self, layer: int) -> bool:
        """Tell whether the queries of a layer are rounded."""
        return self.queries is not None and self.k[layer].format.is_quantized

    def where(self, other: Run, layers: Container[int], sides: str = "KV") -> Run:
        """Return this run in some layers and sides, and `other` in the rest."""

        def mixed(
            side: str, mine: tuple[CachePath, ...], theirs: tuple[CachePath, ...]
        ) -> tuple[CachePath, ...]:
            return tuple(
                a if side in sides and layer in layers else b
                for layer, (a, b) in enumerate(zip(mine, theirs, strict=True))
            )

        return replace(self, k=mixed("K", self.k, other.k), v=mixed("V", self.v, other.v))

    def bits(self, model: Decoder) -> float:
        """Return the stored bits per value of K and V together, padding counted as cost."""
        shape = model.hyperparameters.shape
        stored = values = 0
        for side, paths in (("K", self.k), ("V", self.v)):
            for layer, path in enumerate(paths):
                heads = shape.n_head_kv[layer]
                stored += 8 * path.row_bytes(heads)
                values += heads * shape.head_dim(side, layer)
        return stored / values


def paths(model: Decoder, side: str, types: str | Format | Types) -> tuple[CachePath, ...]:
    """Return the paths of one side of all layers: of one type, or of one for each layer.

    Raises: as `cache_path` does.
    """
    shape = model.hyperparameters.shape
    each = types if isinstance(types, tuple) else (types,) * model.n_layer
    return tuple(
        cache_path(kind, side, shape.n_head_kv[layer], shape.head_dim(side, layer))
        for layer, kind in enumerate(each)
    )


def make_run(model: Decoder, k: str | Format | Types, v: str | Format | Types) -> Run:
    """Return a run with these types of K and V, each one for all layers or one per layer."""
    return Run(paths(model, "K", k), paths(model, "V", v))


@dataclass
class _Group:
    """Runs that are one so far, and what each window has come to."""

    runs: list[int]
    x: list[np.ndarray | None]


def hidden_states(
    model: Decoder,
    windows: Sequence[np.ndarray],
    runs: Sequence[Run],
    first: int = 0,
    *,
    threads: int = 1,
    progress: Callable[[int], None] = lambda tokens: None,
    tap: Tap | None = None,
) -> list[list[np.ndarray]]:
    """Return what the output matrix is multiplied with, per run and window.

    Args:
        model: the model.
        windows: int token ids (n,), each its own sequence from position 0.
        runs: the types of the caches.
        first: the first position that is wanted.
        threads: windows and runs that are computed side by side.
        progress: called with the number of tokens that went through a layer.
        tap: see `Tap`; called layer by layer, if there is a run.

    Returns:
        float32 (n - first, n_embd) for each window, for each run. Runs that are one share arrays.
    """
    groups = [_Group(list(range(len(runs))), [model.embed(w) for w in windows])]
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        for index in range(model.n_layer):
            layer = model.layer(index)
            cut = first if index == model.n_layer - 1 else 0  # what nobody asks for is left out
            split = [_choices(group, runs, index) for group in groups]
            jobs = [
                _Job(layer, group.x, w, [runs[mine[0]] for mine in choices], cut)
                for group, choices in zip(groups, split, strict=True)
                for w in range(len(windows))
            ]
            if tap is not None:
                jobs[0].tap = tap
            done = _in_order(pool, jobs, max(1, threads // len(jobs)), progress)
            new = []
            for choices in split:
                results = [next(done) for _ in windows]
                new += [_Group(m, [r[i] for r in results]) for i, m in enumerate(choices)]
            groups = new
            del layer, jobs  # the weights go before those of the next layer come
    found: list[list[np.ndarray]] = [[] for _ in runs]
    for group in groups:
        last = [model.last_norm(x) for x in group.x if x is not None]
        for run in group.runs:
            found[run] = last
    return found


def _choices(group: _Group, runs: Sequence[Run], layer: int) -> list[list[int]]:
    """Return the runs of a group by what they do in a layer."""
    split: dict[tuple[Any, ...], list[int]] = {}
    for run in group.runs:
        r = runs[run]
        means = id(r.k_means.get(layer)), id(r.v_means.get(layer))
        queries = r.queries if r.rounds(layer) else None
        split.setdefault((r.k[layer], r.v[layer], queries, *means), []).append(run)
    return list(split.values())


def _in_order(
    pool: ThreadPoolExecutor, jobs: list[_Job], threads: int, progress: Any
) -> Iterator[Any]:
    """Return the results of jobs; after an error or Ctrl-C no other begins."""
    futures, results = [pool.submit(job.run, threads) for job in jobs], []
    try:
        for future in futures:
            results.append(future.result())
            progress(sum(len(x) for x in results[-1]))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return iter(results)


@dataclass
class _Job:
    """One window of one group through one layer, once for each choice of types."""

    layer: Layer
    x: list[np.ndarray | None]
    window: int
    choices: list[Run]
    first: int
    tap: Tap | None = None

    def run(self, threads: int) -> list[np.ndarray]:
        x, self.x[self.window] = self.x[self.window], None
        assert x is not None, "each window goes through a layer once"
        q, k, v = self.layer.project(x)
        if self.tap is not None:
            self.tap(self.layer, q, k, v)
        x, q = x[self.first :], q[self.first :]
        index, stored = self.layer.index, {}
        results = []
        for run in self.choices:
            back: list[np.ndarray] = []
            for path, means, values in ((run.k, run.k_means, k), (run.v, run.v_means, v)):
                mean = means.get(index)
                key = id(values), path[index], id(mean)
                if key not in stored:
                    stored[key] = path[index](values, mean, threads)
                back.append(stored[key])
            asked = q
            if run.queries is not None and run.rounds(index):
                asked = replace(run.k[index], format=run.queries)(q, None, threads)
            results.append(self.layer.finish(x, asked, back[0], back[1], self.first))
        return results
