"""Perplexity and divergence, token by token, without ever holding all logits.

The output matrix is taken in pieces, each dequantised once for all runs and windows. Sums of
exponentials are kept with the largest logit so far, and rescaled when a larger one comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gguf_io.evaluation.blas import one_thread
from gguf_io.evaluation.transformer import Decoder

# Logits of one piece of the output matrix, for one block of tokens; 4 bytes each, four at a time.
PIECE_LOGITS = 1 << 22
ROWS = 512


@dataclass(frozen=True)
class TokenScores:
    """What a run made of each token that was scored.

    Attributes:
        nll: float64 (n,), minus the logarithm of the probability of the token that followed.
        kld: float64 (n,), divergence of the distribution from that of the base, in nats.
        same: bool (n,), whether the likeliest token is the base's.
    """

    nll: np.ndarray
    kld: np.ndarray
    same: np.ndarray

    def summary(self) -> dict[str, float]:
        """Return means and their standard errors, as llama-perplexity has them."""
        n = len(self.nll)
        ppl = float(np.exp(self.nll.mean()))
        return {
            "ppl": ppl,
            "ppl_se": ppl * _standard_error(self.nll),
            "kld": float(self.kld.mean()),
            "kld_se": _standard_error(self.kld),
            "kld_median": float(np.median(self.kld)),
            "kld_99": float(np.quantile(self.kld, 0.99)),
            "same_top": float(self.same.mean()),
            "n": n,
        }


def _standard_error(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")


def score(
    model: Decoder,
    hidden: Sequence[Sequence[np.ndarray]],
    targets: Sequence[np.ndarray],
    *,
    threads: int = 1,
    progress: Callable[[int], None] = lambda logits: None,
) -> list[TokenScores]:
    """Score runs against the first of them, the base.

    Args:
        model: whose output matrix it is.
        hidden: float32 (n or more, n_embd) per run and window, see `forward.hidden_states`.
        targets: int (n,) per window: the tokens that followed.
        threads: blocks of tokens that are scored side by side.
        progress: called with the number of tokens of the vocabulary times tokens scored.

    Returns:
        the scores of every run, the windows one after the other.
    """
    joined = np.concatenate(targets)
    different: dict[tuple[int, ...], np.ndarray] = {}
    for mine in hidden:
        wanted = [x[: len(t)] for x, t in zip(mine, targets, strict=True)]
        different.setdefault(tuple(map(id, mine)), np.concatenate(wanted))
    step = max(1, min(ROWS, -(-len(joined) // threads)))
    blocks = [
        _Block([x[i : i + step] for x in different.values()], joined[i : i + step])
        for i in range(0, len(joined), step)
    ]
    width = max(1, PIECE_LOGITS // step)
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        for start in range(0, model.n_vocab, width):
            rows = model.output_rows(start, min(start + width, model.n_vocab))
            work = [pool.submit(block.add, start, rows) for block in blocks]
            try:
                for done in work:
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            progress(len(rows) * len(joined))
    joined_scores = [
        TokenScores(*(np.concatenate(parts) for parts in zip(*runs, strict=True)))
        for runs in zip(*(block.scores() for block in blocks), strict=True)
    ]
    found = dict(zip(different, joined_scores, strict=True))
    return [found[tuple(map(id, mine))] for mine in hidden]


class _Softmax:
    """The softmax of one run and block, as far as the vocabulary has been seen."""

    def __init__(self, n: int) -> None:
        self.largest = np.full(n, -np.inf, np.float32)
        self.top = np.zeros(n, np.int64)
        self.sum = np.zeros(n)
        self.target = np.zeros(n)
        self.lead = np.zeros(n)  # sum of the base's exponentials times its lead in logits

    def see(self, logits: np.ndarray, first: int, targets: np.ndarray) -> np.ndarray:
        """Take in logits (n, some) of tokens from `first` on; return what sums shrink by."""
        own = logits.argmax(axis=1)
        rows = np.arange(len(logits))
        there = logits[rows, own]
        self.top = np.where(there > self.largest, first + own, self.top)
        before, self.largest = self.largest, np.maximum(self.largest, there)
        inside = (targets >= first) & (targets < first + logits.shape[1])
        self.target[inside] = logits[rows[inside], targets[inside] - first]
        with np.errstate(invalid="ignore"):  # of what broke before, NaN minus NaN
            return np.exp(np.float64(before) - self.largest)

    def add(self, exponentials: np.ndarray, shrink: np.ndarray) -> None:
        """Take in exponentials of logits minus the largest."""
        self.sum = self.sum * shrink + exponentials.sum(axis=1)

    @property
    def log_sum(self) -> np.ndarray:
        """float64 (n,), the logarithm of the sum of all exponentials."""
        return self.largest + np.log(self.sum)


class _Block:
    """Some tokens of all runs."""

    def __init__(self, hidden: list[np.ndarray], targets: np.ndarray) -> None:
        self.hidden = hidden
        self.targets = targets
        self.runs = [_Softmax(len(targets)) for _ in hidden]

    def add(self, first: int, rows: np.ndarray) -> None:
        """Take in the logits of tokens `first` and later, whose output rows are (some, n_embd)."""
        shape = len(self.targets), len(rows)
        base, logits, weights, scratch = (np.empty(shape, np.float32) for _ in range(4))
        np.matmul(self.hidden[0], rows.T, out=base)
        shrink = self._see(0, base, first, weights)
        self.runs[0].add(weights, shrink)
        for i in range(1, len(self.runs)):
            run = self.runs[i]
            np.matmul(self.hidden[i], rows.T, out=logits)
            run.add(scratch, self._see(i, logits, first, scratch))
            np.subtract(base, logits, out=logits)
            run.lead = run.lead * shrink + np.einsum("ij,ij->i", weights, logits)

    def _see(self, i: int, logits: np.ndarray, first: int, out: np.ndarray) -> np.ndarray:
        run = self.runs[i]
        shrink = run.see(logits, first, self.targets)
        np.subtract(logits, run.largest[:, None], out=out)
        np.exp(out, out=out)
        return shrink

    def scores(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return (nll, kld, same) of every run."""
        base, found = self.runs[0], []
        for run in self.runs:
            # sum of p * (log p - log q), and log p - log q is the lead less the difference of sums
            kld = run.lead / base.sum - (base.log_sum - run.log_sum)
            found.append((run.log_sum - run.target, kld, run.top == base.top))
        return found
