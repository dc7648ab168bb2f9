"""What an error in K and V does to attention.

A dump has no queries. Where none are given, directions drawn at random stand in for them: of what a
query does to errors in keys, its length matters and its direction hardly does. Real queries differ
still, so the numbers rank types and layers; they do not predict a model's perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

QUERIES = 128


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

    def report(self) -> dict[str, Any]:
        """Return the numbers for the JSON report."""
        return {"logit_rmse": self.logit_rmse, "kl": self.kl, "output_error": self.output_error}


def random_queries(n: int, heads: int, head_dim: int, length: float | None = None) -> np.ndarray:
    """Return stand-ins for queries, float32 (n, heads, head_dim): the same at every call.

    Args:
        n, heads, head_dim: how many there are, and of which width.
        length: L2 norm of each; sqrt(head_dim), that of unit variance, if omitted.
    """
    length = head_dim**0.5 if length is None else length
    q = np.random.Generator(np.random.PCG64(n)).standard_normal((n, heads, head_dim))
    return (q * (length / np.linalg.norm(q, axis=-1, keepdims=True))).astype(np.float32)


def visible(queries: np.ndarray, cells: np.ndarray, window: int = 0) -> np.ndarray:
    """Return which cells each query attends to, bool (queries, cells).

    Args:
        queries, cells: int64, the sequence in the upper 32 bits, the position in the lower.
        window: how many positions up to its own a query sees; 0 for all.
    """
    back = queries[:, None] - cells[None]
    same = (queries[:, None] >> 32) == (cells[None] >> 32)
    return same & (back >= 0) & ((back < window) if window else True)


class ExactAttention:
    """The attention of one layer with exact K and V, to compare with.

    Args:
        k: float32 (cells, heads, head_dim).
        v: float32 (cells, heads, head_dim of V), or None.
        queries: float32 (n, query heads, head_dim); so many consecutive query heads share a head of
            K as there are more of them.
        seen: bool (n, cells), what each query attends to, at least one cell.
        scale: what logits are multiplied by; 1/sqrt(head_dim) if omitted.
    """

    @np.errstate(all="ignore")
    def __init__(
        self,
        k: np.ndarray,
        v: np.ndarray | None,
        queries: np.ndarray,
        seen: np.ndarray,
        scale: float | None = None,
    ) -> None:
        self.k, self.v = k, v
        self.queries, self.seen = queries, seen
        self.shared = queries.shape[1] // k.shape[1]
        self.scale = np.float32(k.shape[-1] ** -0.5 if scale is None else scale)
        self.logits = [self._logits(k, head) for head in range(queries.shape[1])]
        self.log_weights = [_log_softmax(x) for x in self.logits]
        self.outputs = None
        if v is not None:
            self.outputs = [
                np.exp(w) @ v[:, head // self.shared] for head, w in enumerate(self.log_weights)
            ]

    def _logits(self, k: np.ndarray, head: int) -> np.ndarray:
        """Return the logits (queries, cells) of a query head, -inf where it does not look."""
        logits = (self.queries[:, head] @ k[:, head // self.shared].T) * self.scale
        logits[~self.seen] = -np.inf
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
                squared += _mean_square((logits - exact)[self.seen])
                log_other = _log_softmax(logits)
                divergence += _kl(log_exact, log_other)
            if self.outputs is not None:
                values = self.v if v is None else v
                assert values is not None, "outputs are those of values"
                sums = np.exp(log_other) @ values[:, head // self.shared]
                difference = sums - self.outputs[head]
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
