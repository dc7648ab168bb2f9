"""The mixtures of K-quants that llama-quantize makes, such as Q4_K_M.

A mixture has a type that most tensors get, and more bits for some: attention's V and output, the
FFN's last matrix, in all layers, in the first and the last, or in every third. What the output and
the token embeddings get does not depend on the mixture, see `gguf_io.type_policy`.

Source: llama.cpp, src/llama-quant.cpp: llama_tensor_get_type_impl, llama_ftype_get_default_type,
without an importance matrix; src/models: what is LLM_TYPE_70B; tools/quantize/quantize.cpp: names.
"""

from __future__ import annotations

import re

import numpy as np

from gguf_io.reader import GgufFile
from tbq import FileFormatError, InputError

# What llama-quantize means by the names of these types.
OF_TYPES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

ATTENTION_V = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
ATTENTION_K = "attn_k.weight"
ATTENTION_Q = "attn_q.weight"
ATTENTION_OUTPUT = "attn_output.weight"
EARLIER = ("ffn_up", "ffn_gate")  # a name that has one of these is not looked at for the next
FFN_DOWN = "ffn_down"
# With eight experts these get q5_K for attention's output.
MORE_FOR_EIGHT = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl")
# Layers of models that llama.cpp calls 70B; of llama only if heads share keys.
LAYERS_OF_70B = {"llama": 80, "qwen2": 80, "qwen2vl": 80, "deci": 80, "jais2": 68}


class Mixture:
    """The types of a file's tensors, which are asked for in the order they are written in.

    Tensors of a kind are counted as they come, as llama-quantize does: the count stands for the
    layer.
    """

    def __init__(self, target: str, name: str, file: GgufFile) -> None:
        """Prepare for a file; `target` names the type, `name` the mixture if it is given."""
        name = name or target.lower()
        self.name, self.base, self.path = OF_TYPES.get(name, name), target, file.path
        self.architecture, metadata = file.architecture, file.metadata
        self._layers_key = f"{self.architecture}.block_count"
        self._layers = metadata.number(self._layers_key)
        self.experts = metadata.number(f"{self.architecture}.expert_count") or 0
        heads = _first(metadata.get(f"{self.architecture}.attention.head_count"), 0)
        keys = _first(metadata.get(f"{self.architecture}.attention.head_count_kv"), heads)
        self.shared = heads // keys if keys else 0
        is_70b = self._layers is not None and self._layers == LAYERS_OF_70B.get(
            self.architecture or ""
        )
        self.is_70b = is_70b and (self.architecture != "llama" or heads != keys)
        self.values = sum(_is_value(name) for name in file.tensors)
        self.values_seen = self.downs_seen = 0

    def type_of(self, tensor: str) -> str:
        """Return the name of the type that the next tensor gets.

        Raises:
            FileFormatError: the number of layers is needed and not in the file.
            InputError: the tensor's layer is needed and not in its name.
        """
        if _is_value(tensor):
            return self._value()
        if ATTENTION_K in tensor:
            return "q8_0" if self.experts == 8 else self.base
        if ATTENTION_Q in tensor:
            return self.base
        if ATTENTION_OUTPUT in tensor:
            return self._output()
        if FFN_DOWN in tensor and not any(part in tensor for part in EARLIER):
            return self._down(tensor)
        return self.base

    def _value(self) -> str:
        at, base = self.values_seen, self.base
        self.values_seen += 1
        if self.experts == 8:
            return "q8_0"
        kind = {
            "q2_k": "q4_K" if self.shared >= 4 else "q3_K",
            "q3_k_m": "q5_K" if at < 2 else "q4_K",
            "q3_k_l": "q5_K",
            "q4_k_s": "q5_K" if at < 4 else base,
            "q4_k_m": "q6_K" if _more(at, self.values) else base,
            "q5_k_m": "q6_K" if _more(at, self.values) else base,
            "iq4_nl": "q5_K" if self.shared >= 4 else base,
        }.get(self.name, base)
        return "q5_K" if self.is_70b and kind in ("q3_K", "q4_K") else kind

    def _output(self) -> str:
        if self.architecture == "falcon":
            return "q4_K" if self.name == "q3_k_l" else self.base
        if self.experts == 8:
            return "q5_K" if self.name in MORE_FOR_EIGHT else self.base
        more = {"q2_k": "q3_K", "q3_k_m": "q4_K", "q3_k_l": "q5_K"}
        return more.get(self.name, self.base)

    def _down(self, tensor: str) -> str:
        at, base, falcon = self.downs_seen, self.base, self.architecture == "falcon"
        self.downs_seen += 1
        if self.name == "q2_k":
            return "q3_K"
        if self.name == "q3_k_l":
            return "q4_K" if falcon else "q5_K"
        if self.name not in ("q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "iq4_nl"):
            return base
        n = self._n_layers()
        at = self._layer(tensor, n) if self.experts > 1 else at
        first, more = at < n // 16, _more(at, n)
        if self.name == "q3_k_m":
            return "q5_K" if first else "q4_K" if not falcon or more else base
        if self.name == "q4_k_m" and falcon:
            return "q6_K" if first else "q5_K" if more else base
        if self.name in ("q4_k_m", "q5_k_m"):
            return "q6_K" if more else base
        early = at < n // 8 and (self.name == "iq4_nl" or not falcon)
        return "q5_K" if early else base

    def _n_layers(self) -> int:
        if self._layers is None:
            need = f"a number: {self.name.upper()} has more bits for some layers"
            reason = f"metadata key {self._layers_key:.200} is missing or none, need {need}"
            raise FileFormatError(self.path, None, reason)
        return self._layers

    def _layer(self, tensor: str, n: int) -> int:
        match = re.match(r"blk\.(\d{1,9})\.", tensor)
        if match is None or int(match[1]) >= n:
            need = f"blk.0. to blk.{n - 1}. in front, as {self.name.upper()} depends on the layer"
            raise InputError("tensor name", repr(tensor), need)
        return int(match[1])


def _is_value(tensor: str) -> bool:
    return any(part in tensor for part in ATTENTION_V)


def _more(at: int, n: int) -> bool:
    """Tell whether a layer is in the first or last eighth, or a third one between them."""
    return at < n // 8 or at >= 7 * n // 8 or (at - n // 8) % 3 == 2


def _first(value: object, default: int) -> int:
    """Return a number, or the first of an array of them; the default for anything else."""
    if isinstance(value, np.ndarray) and value.size:
        value = value[0].item()
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return default
