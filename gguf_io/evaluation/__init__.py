"""Perplexity and divergence of a model whose KV cache is of a fork's types."""

from gguf_io.evaluation.evaluate import Task, evaluate
from gguf_io.evaluation.forward import Run, make_run
from gguf_io.evaluation.measure import TokenScores
from gguf_io.evaluation.model import ARCHITECTURES, load

__all__ = ["ARCHITECTURES", "Run", "Task", "TokenScores", "evaluate", "load", "make_run"]
