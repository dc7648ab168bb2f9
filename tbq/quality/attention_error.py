"""What an error in K and V does to attention.

A dump has no queries. They are taken from the keys' own distribution: some of the layer's exact
keys serve as queries, each attending to the keys of all other cells, earlier or later, with the
usual scale 1/sqrt(head_dim). Real queries differ, so the numbers rank types and layers; they do not
predict a model's perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

QUERIES = 64


@dataclass(frozen=True)
class AttentionError:
    """Averages over the heads and queries of one layer.

    Attributes:
        logit_rmse: root mean square difference of the logits.
        kl: Kullback-Leibler divergence of the softmax weights from the exact ones, in nats.
        output_error: squared error of the weighted sum of V over its square; None without V.
    """

    logit_rmse: float
    kl: float
    output_error: float | None

    def report(self) -> dict:
        """Return the numbers for the JSON report."""
        return {"logit_rmse": self.logit_rmse, "kl": self.kl, "output_error": self.output_error}


class ExactAttention:
    """The attention of one layer with exact K and V, to compare with.

    Args:
        k: float32 (cells, heads, head_dim), at least two cells.
        v: float32 (cells, heads, head_dim of V), or None.
    """

    @np.errstate(all="ignore")
    def __init__(self, k: np.ndarray, v: np.ndarray | None) -> None:
        self.k, self.v = k, v
        n = len(k)
        self.queries = np.unique(np.linspace(0, n - 1, min(QUERIES, n)).astype(int))
        self.logits = [self._logits(k, head) for head in range(k.shape[1])]
        self.log_weights = [_log_softmax(x) for x in self.logits]
        self.outputs = None
        if v is not None:
            self.outputs = [np.exp(w) @ v[:, h] for h, w in enumerate(self.log_weights)]

    def _logits(self, k: np.ndarray, head: int) -> np.ndarray:
        """Return the logits (queries, cells) of exact queries, their own cells masked out."""
        q = self.k[self.queries, head]
        logits = q @ k[:, head].T / np.float32(np.sqrt(k.shape[-1]))
        logits[np.arange(len(q)), self.queries] = -np.inf
        return logits

    @np.errstate(all="ignore")
    def error(self, k: np.ndarray | None = None, v: np.ndarray | None = None) -> AttentionError:
        """Compare with the attention of inexact k, v or both; None means the exact one."""
        squared = divergence = 0.0
        wrong = right = 0.0
        for head, exact in enumerate(self.logits):
            log_exact = log_other = self.log_weights[head]
            if k is not None:
                logits = self._logits(k, head)
                squared += _mean_square((logits - exact)[np.isfinite(exact)])
                log_other = _log_softmax(logits)
                divergence += _kl(log_exact, log_other)
            if self.outputs is not None:
                values = self.v if v is None else v
                difference = np.exp(log_other) @ values[:, head] - self.outputs[head]
                wrong += float((difference.astype(np.float64) ** 2).sum())
                right += float((self.outputs[head].astype(np.float64) ** 2).sum())
        n = len(self.logits)
        output = None
        if self.outputs is not None:
            output = wrong / right if right else float("nan")
        return AttentionError(float(np.sqrt(squared / n)), divergence / n, output)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _mean_square(x: np.ndarray) -> float:
    return float((x.astype(np.float64) ** 2).mean()) if x.size else float("nan")


def _kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    p = np.exp(log_p.astype(np.float64))
    terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    mean = float(terms.sum(axis=1).mean())
    return mean if np.isnan(mean) else max(0.0, mean)  # rounding can take it just below zero
