"""Which layers and sides cause a divergence, and the cheapest types that stay within a budget.

Each layer and side is quantised alone. Small disturbances that do not know of each other add up in
divergence; what the whole has beyond the sum is their interaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gguf_io.evaluation.cache_path import CachePath
from gguf_io.evaluation.evaluate import Task, evaluate
from gguf_io.evaluation.forward import Run
from gguf_io.evaluation.measure import TokenScores

Slot = tuple[int, str]  # layer, side
SIDES = "KV"


@dataclass(frozen=True)
class Attribution:
    """The divergence of a run, and of each of its layers and sides alone.

    Attributes:
        whole: of the run.
        sides: of all quantised layers of one side.
        parts: of one layer and side, for those that are quantised.
    """

    whole: TokenScores
    sides: dict[str, TokenScores]
    parts: dict[Slot, TokenScores]

    @property
    def sum(self) -> float:
        """The sum over the parts."""
        return float(sum(scores.kld.mean() for scores in self.parts.values()))

    @property
    def interaction(self) -> float:
        """What the whole has beyond the sum."""
        return float(self.whole.kld.mean()) - self.sum

    def report(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "kld": float(self.whole.kld.mean()),
            "sum": self.sum,
            "interaction": self.interaction,
            "sides": {side: float(s.kld.mean()) for side, s in self.sides.items()},
            "parts": [
                {"layer": layer, "side": side, "kld": s.summary()["kld"]}
                | {"kld_se": s.summary()["kld_se"]}
                for (layer, side), s in self.parts.items()
            ],
        }


def slots(run: Run, base: Run) -> list[Slot]:
    """Return the layers and sides in which a run differs from another."""
    pairs = {"K": (run.k, base.k), "V": (run.v, base.v)}
    return [
        (layer, side)
        for layer in range(len(run.k))
        for side, (mine, theirs) in pairs.items()
        if mine[layer] != theirs[layer]
    ]


def parts(run: Run, base: Run) -> list[Run]:
    """Return the runs that `attribution` needs: whole, sides, and each slot alone."""
    everywhere = range(len(run.k))
    alone = [run.where(base, [layer], side) for layer, side in slots(run, base)]
    return [run, *(run.where(base, everywhere, side) for side in SIDES), *alone]


def attribution(
    task: Task, run: Run, base: Run, progress: Callable[[int], None] = lambda steps: None
) -> Attribution:
    """Attribute the divergence of a run from a base."""
    whole, k, v, *alone = evaluate(task, parts(run, base), base=base, progress=progress)
    found = dict(zip(slots(run, base), alone, strict=True))
    return Attribution(whole, {"K": k, "V": v}, found)


# --- the cheapest types --------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One type for one layer and side.

    Attributes:
        path: its path through the cache.
        bytes: of a row.
        kld: divergence that it causes alone.
    """

    path: CachePath
    bytes: int
    kld: float


@dataclass(frozen=True)
class Policy:
    """Types for every layer and side.

    Attributes:
        run: the types.
        predicted: the sum of what each causes alone.
        scores: what they cause together; None if it was not measured.
    """

    run: Run
    predicted: float
    scores: TokenScores | None = None


def cheapest(options: Sequence[Sequence[Option]], budget: float) -> list[Option] | None:
    """Choose one option per slot: the fewest bytes in all with a sum of kld within the budget.

    Exact: every total of bytes that can be reached is kept with the least divergence it can have.
    Returns None if no choice stays within the budget.
    """
    totals, klds = np.zeros(1, np.int64), np.zeros(1)
    back: list[tuple[np.ndarray, np.ndarray]] = []
    for choices in options:
        sums = np.concatenate([totals + option.bytes for option in choices])
        costs = np.concatenate([klds + max(option.kld, 0.0) for option in choices])
        order = np.lexsort((costs, sums))
        best = np.minimum.accumulate(costs[order])
        keep = np.r_[True, best[1:] < best[:-1]] & (costs[order] <= budget)
        order = order[keep]
        if not len(order):
            return None
        back.append((order // len(totals), order % len(totals)))
        totals, klds = sums[order], costs[order]
    at, chosen = 0, []
    for choices, (which, previous) in zip(reversed(options), reversed(back), strict=True):
        chosen.append(choices[which[at]])
        at = previous[at]
    return chosen[::-1]


def policy(
    task: Task,
    candidates: Sequence[Run],
    base: Run,
    costs: Mapping[tuple[Slot, CachePath], float],
    budget: float,
    tries: int = 4,
    progress: Callable[[int], None] = lambda steps: None,
) -> Policy | None:
    """Return the cheapest assignment that stays within a divergence, measured; None if none does.

    Args:
        task: what is evaluated.
        candidates: runs whose types may be used, layer by layer.
        base: the run whose types cost nothing.
        costs: divergence of each layer, side and path alone.
        budget: divergence of the whole, in nats.
        tries: how often the budget of the sum is lowered because the whole exceeded it.
        progress: as for `evaluate`.
    """
    aim = budget
    heads = task.model.hyperparameters.shape.n_head_kv
    layers = range(task.model.n_layer)
    options = {
        (layer, side): [
            Option(path, path.row_bytes(heads[layer]), costs.get(((layer, side), path), 0.0))
            for path in dict.fromkeys(_path(r, layer, side) for r in (base, *candidates))
        ]
        for layer in layers
        for side in SIDES
    }
    for _ in range(tries):
        chosen = cheapest(list(options.values()), aim)
        if chosen is None:
            return None
        taken = dict(zip(options, chosen, strict=True))
        run = replace(
            base,
            k=tuple(taken[layer, "K"].path for layer in layers),
            v=tuple(taken[layer, "V"].path for layer in layers),
        )
        (scores,) = evaluate(task, [run], base=base, progress=progress)
        whole = float(scores.kld.mean())
        if whole <= budget:
            return Policy(run, sum(option.kld for option in chosen), scores)
        aim *= 0.95 * budget / whole
    return None


def _path(run: Run, layer: int, side: str) -> CachePath:
    return (run.k if side == "K" else run.v)[layer]


def measured_costs(
    task: Task,
    candidates: Sequence[Run],
    base: Run,
    progress: Callable[[int], None] = lambda steps: None,
) -> dict[tuple[Slot, CachePath], float]:
    """Measure the divergence of every layer, side and path alone."""
    needed = cost_runs(candidates, base)
    scores = evaluate(task, list(needed.values()), base=base, progress=progress)
    return {key: float(s.kld.mean()) for key, s in zip(needed, scores, strict=True)}


def cost_runs(candidates: Sequence[Run], base: Run) -> dict[tuple[Slot, CachePath], Run]:
    """Return the runs that `measured_costs` needs."""
    return {
        (slot, _path(run, *slot)): run.where(base, [slot[0]], slot[1])
        for run in candidates
        for slot in slots(run, base)
    }
