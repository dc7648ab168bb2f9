"""The architecture "qwen2": biases on q, k and v.

Source: ggml-org/llama.cpp, src/models/qwen2.cpp
"""

from gguf_io.evaluation.transformer import Decoder, Layer


class Qwen2Layer(Layer):
    """A layer of Qwen 2 or 2.5."""

    biased = ("attn_q", "attn_k", "attn_v")


class Qwen2(Decoder):
    """A Qwen 2 or 2.5."""

    layer_type = Qwen2Layer
