"""Causal attention over whole sequences, in float32 and in blocks of queries."""

from __future__ import annotations

import numpy as np

# Queries at a time: half of the scores above the diagonal are never computed.
QUERIES = 256


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int = 0, first: int = 0
) -> np.ndarray:
    """Return what the queries at positions `first` and later take from all keys up to their own.

    Args:
        q: float32 (n - first, heads, head_dim), the last query at the last position.
        k, v: float32 (n, kv_heads, head_dim); head h of q attends with head h * kv_heads // heads.
        scale: what scores are multiplied with.
        window: how many positions a query sees, its own included; 0 for all.
        first: position of the first query.

    Returns:
        float32 (n - first, heads, head_dim of v).
    """
    n, kv_heads, width = len(k), k.shape[1], v.shape[2]
    group = q.shape[1] // kv_heads
    out = np.empty((len(q), q.shape[1], width), np.float32)
    for start in range(first, n, QUERIES):
        stop = min(start + QUERIES, n)
        oldest = max(0, start - window + 1) if window else 0
        hidden = _hidden(start, stop, oldest, window)
        for head in range(kv_heads):
            mine = slice(head * group, (head + 1) * group)
            some = q[start - first : stop - first, mine] * np.float32(scale)
            scores = some.transpose(1, 0, 2).reshape(-1, q.shape[2]) @ k[oldest:stop, head].T
            weights, sums = _softmax(scores.reshape(group, stop - start, -1), hidden)
            taken = weights.reshape(-1, stop - oldest) @ v[oldest:stop, head]
            taken /= sums.reshape(-1, 1)
            shape = (group, stop - start, width)
            out[start - first : stop - first, mine] = taken.reshape(shape).transpose(1, 0, 2)
    return out


def _hidden(start: int, stop: int, oldest: int, window: int) -> np.ndarray:
    """Return 0 where the queries [start, stop) see the keys [oldest, stop), else -inf."""
    distance = np.arange(start, stop)[:, None] - np.arange(oldest, stop)
    unseen = distance < 0
    if window:
        unseen |= distance >= window
    return np.where(unseen, np.float32(-np.inf), np.float32(0))


def _softmax(scores: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return exponentials, in place of scores (..., queries, keys), and their sums (...)."""
    scores += hidden
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    return scores, scores.sum(axis=-1)
