"""The architecture "llama": Llama 1 to 3, Mistral and what else is converted to it.

Converters permute the rows of q and k so that position rotates neighbours. Llama 3's scaling of
angles is in a tensor, rope_freqs. Mistral's window is not in its metadata, nor applied by
llama.cpp.

Source: ggml-org/llama.cpp, src/models/llama.cpp
"""

from gguf_io.evaluation.transformer import ROPE_FACTORS, Decoder, Layer


class LlamaLayer(Layer):
    """A layer of Llama."""

    adjacent = True


class Llama(Decoder):
    """A Llama."""

    layer_type = LlamaLayer
    extra_tensors = frozenset({ROPE_FACTORS})
