"""The architecture "qwen3": each head of q and k is normed before position rotates it.

Source: ggml-org/llama.cpp, src/models/qwen3.cpp
"""

import numpy as np

from gguf_io.evaluation.transformer import Decoder, Layer


class NormedHeads(Layer):
    """A layer that norms the heads of q and k."""

    norms = (*Layer.norms, "attn_q_norm", "attn_k_norm")

    def before_rope(self, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return q and k with each head normed."""
        return self.norm(q, "attn_q_norm"), self.norm(k, "attn_k_norm")


class Qwen3(Decoder):
    """A Qwen 3."""

    layer_type = NormedHeads
