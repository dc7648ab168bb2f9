"""The architecture "gemma3": windows, norms on both sides of each part, scaled embeddings.

Five of six layers attend to a window and rotate with a base of their own, without the scaling of
the others. The model of 62 layers (27B) scales scores by the width per head of the residual
stream, the others by that of a head.

Source: ggml-org/llama.cpp, src/models/gemma3.cpp; the constants: src/llama-model.cpp
"""

from dataclasses import replace

import numpy as np

from gguf_io.evaluation.hyperparameters import Hyperparameters
from gguf_io.evaluation.qwen3 import NormedHeads
from gguf_io.evaluation.transformer import Decoder, gelu
from gguf_io.reader import GgufFile
from tbq import FileFormatError

WINDOW_ROPE_BASE = 10000.0
LAYERS_OF_27B = 62


class Gemma3Layer(NormedHeads):
    """A layer of Gemma 3."""

    norms = (*NormedHeads.norms, "post_attention_norm", "post_ffw_norm")
    activation = staticmethod(gelu)

    def after_attention(self, x: np.ndarray) -> np.ndarray:
        """Return the output of attention, normed."""
        return self.norm(x, "post_attention_norm")

    def after_feed_forward(self, x: np.ndarray) -> np.ndarray:
        """Return the output of the feed-forward part, normed."""
        return self.norm(x, "post_ffw_norm")


def _heads(file: GgufFile) -> int:
    key = f"{file.architecture}.attention.head_count"
    heads = file.metadata.number(key)
    if not heads:
        raise FileFormatError(file.path, None, f"metadata key {key} is no number above 0")
    return heads


class Gemma3(Decoder):
    """A Gemma 3, its text part."""

    layer_type = Gemma3Layer

    @classmethod
    def read_hyperparameters(cls, file: GgufFile) -> Hyperparameters:
        """Read the metadata, with what llama.cpp knows of the architecture."""
        h = super().read_hyperparameters(file)
        key = f"{file.architecture}.rope.freq_base_swa"
        base = h.window_rope_base if key in file.metadata else WINDOW_ROPE_BASE
        scale = h.attention_scale
        if h.n_layer == LAYERS_OF_27B:
            scale = (h.n_embd // _heads(file)) ** -0.5
        return replace(h, window_rope_base=base, window_rope_scale=1.0, attention_scale=scale)

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Return the embeddings times the square root of their width."""
        return super().embed(tokens) * np.float32(np.sqrt(self.hyperparameters.n_embd))
