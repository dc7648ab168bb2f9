"""Runs of a model from token windows to scores, within bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gguf_io.evaluation import forward, measure
from gguf_io.evaluation.attention import QUERIES
from gguf_io.evaluation.forward import Run, Tap
from gguf_io.evaluation.measure import TokenScores
from gguf_io.evaluation.transformer import Decoder
from tbq import InputError

FLOAT = 4  # bytes
PROGRAM_BYTES = 320 << 20  # Python, NumPy, Numba and its kernels, the tables of a tokenizer
# What is held of each layer's inner width and of the residual stream while a layer is computed.
INNER_COPIES, STREAM_COPIES = 4, 8


@dataclass(frozen=True)
class Task:
    """What is evaluated, but for the runs.

    Attributes:
        model: the model.
        windows: int (ctx,) each; predictions of the tokens from the middle on are scored.
        threads: worker threads.
        memory: bytes that may be spent on what runs have come to; more runs go in turns.
    """

    model: Decoder
    windows: Sequence[np.ndarray]
    threads: int = 1
    memory: int = 1 << 30

    @property
    def ctx(self) -> int:
        """Tokens per window."""
        return len(self.windows[0])

    @property
    def first(self) -> int:
        """The first position whose prediction is scored."""
        return self.ctx // 2

    @property
    def scored(self) -> int:
        """Predictions that are scored, of all windows."""
        return len(self.windows) * (self.ctx - 1 - self.first)

    @property
    def run_bytes(self) -> int:
        """Bytes that one run holds between two layers, old and new."""
        tokens = len(self.windows) * self.ctx
        return 2 * FLOAT * tokens * self.model.hyperparameters.n_embd

    @property
    def at_once(self) -> int:
        """How many runs go at once, beside the base."""
        return max(1, self.memory // self.run_bytes - 1)

    def peak_bytes(self, n_runs: int) -> int:
        """Return about how much memory an evaluation of so many runs takes at most."""
        h, tensors = self.model.hyperparameters, self.model.weights.file.tensors
        layers = [0] * h.n_layer
        inner = heads = 1
        for name, t in tensors.items():
            if name.startswith("blk."):
                layers[int(name.split(".")[1])] += FLOAT * t.n_values + t.n_bytes // 4
            inner = max(inner, t.n_rows if ".ffn_gate." in name else 0)
            heads = max(heads, t.n_rows if ".attn_q.w" in name else 0)
        narrowest = min(h.shape.head_dim_k) * min(h.shape.n_head_kv)
        job = INNER_COPIES * (inner + heads) * self.ctx + STREAM_COPIES * h.n_embd * self.ctx
        job += 2 * (heads // narrowest) * QUERIES * self.ctx
        output = 4 * measure.PIECE_LOGITS * self.threads
        output += 3 * h.n_embd * measure.PIECE_LOGITS // measure.ROWS
        held = (1 + min(n_runs, self.at_once)) * self.run_bytes
        return PROGRAM_BYTES + held + max(max(layers) + FLOAT * job * self.threads, FLOAT * output)


def evaluate(
    task: Task,
    runs: Sequence[Run],
    *,
    base: Run | None = None,
    progress: Callable[[int], None] = lambda steps: None,
    tap: Tap | None = None,
) -> list[TokenScores]:
    """Score runs against a base.

    Args:
        task: model, windows and limits.
        runs: what is scored.
        base: what they are compared with; f16 throughout if omitted.
        progress: called with steps, of which there are `total_steps`, or fewer where runs are one.
        tap: see `forward.Tap`.

    Returns:
        the scores of each run.
    """
    if any(len(w) != task.ctx for w in task.windows) or task.ctx < 4:
        raise InputError("windows", "other lengths", "windows of one length, 4 tokens or more")
    base = base or forward.make_run(task.model, "f16", "f16")
    targets = [window[task.first + 1 :] for window in task.windows]
    found: list[TokenScores] = []
    for start in range(0, len(runs), task.at_once):
        some = [base, *runs[start : start + task.at_once]]
        hidden = forward.hidden_states(
            task.model,
            task.windows,
            some,
            task.first,
            threads=task.threads,
            progress=progress,
            tap=tap if not start else None,
        )
        steps = _Steps(task, len(some), progress)
        scores = measure.score(
            task.model, hidden, targets, threads=task.threads, progress=steps.logits
        )
        found += scores[1:]
    return found


def total_steps(task: Task, n_runs: int) -> int:
    """Return about how many steps `evaluate` reports: tokens through a layer, of every run."""
    turns = -(-n_runs // task.at_once)
    per_run = len(task.windows) * task.ctx * task.model.n_layer
    return round((n_runs + turns) * per_run * (1 + OUTPUT_SHARE))


# Scoring takes about as long as so large a share of the layers.
OUTPUT_SHARE = 0.5


class _Steps:
    """Counts the scoring of a turn in tokens through a layer."""

    def __init__(self, task: Task, n_runs: int, progress: Callable[[int], None]) -> None:
        per_run = len(task.windows) * task.ctx * task.model.n_layer
        self._all = OUTPUT_SHARE * n_runs * per_run
        self._logits = task.model.n_vocab * task.scored
        self._seen = 0
        self._progress = progress

    def logits(self, n: int) -> None:
        before = round(self._all * self._seen / self._logits)
        self._seen += n
        self._progress(round(self._all * self._seen / self._logits) - before)
