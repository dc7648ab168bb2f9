"""How good a format is: errors of values and of attention, statistics of what is stored.

`statistics` needs SciPy and is imported by whoever uses it.
"""

from tbq.quality.attention_error import AttentionError, ExactAttention, random_queries, visible
from tbq.quality.distortion import Distortion

__all__ = ["AttentionError", "Distortion", "ExactAttention", "random_queries", "visible"]
