"""A cache of Hugging Face transformers whose keys and values go through a fork's types.

A model that is given it computes with what attention would get back from such a cache, so that
anything that runs the model measures the types:

    from tbq.integrations.transformers import QuantizedCache, quantized_caches

    cache = QuantizedCache("buun:turbo3", "q8_0", config=model.config)
    model.generate(**inputs, past_key_values=cache)  # transformers 5.24 renames it: cache=cache
    print(cache.bytes())

    with quantized_caches(model, "buun:turbo3", "q8_0"):  # whatever calls the model
        evaluate(model)

New rows are rotated as the graph of the type's fork rotates them, padded where it pads heads,
quantised, dequantised, and all of that is undone (`gguf_io.evaluation.cache_path`, which tbq-eval
uses too). That happens once for each row, as soon as it arrives; attention over the tokens of the
same call sees it too, as in llama.cpp. What comes back is kept in the model's own dtype, so the
cache takes as much memory as any other; `bytes` says what the fork's would. Arithmetic is NumPy's:
rows travel to the CPU and back, which is slow on a device, and have no gradient.

Assumptions:

* Keys come after position has rotated them, as transformers and llama.cpp both cache them. In
  transformers it rotates value i of a head with value i + head_dim/2. llama.cpp's converter
  permutes Llama's and its relatives' weights so that it rotates neighbours, and caches keys in that
  order; blocks and rotations then hold other values together. `rope` says which it is. All of a
  head is permuted, so a model whose position rotates a part of it only has to say "halves".
* Each sequence of a batch has cells of its own, counted from 0, its padding included. That matters
  only to types whose bytes depend on the cell.
* Layers with a sliding window keep what transformers keeps, and their cells are counted on; a fork
  starts again in a ring.
* The channel means that buun's fork subtracts for two models are not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import numpy as np

from gguf_io.evaluation.cache_path import cache_path, cache_type
from tbq.errors import BackendError, InputError
from tbq.extras import install_command

try:
    from transformers import DynamicCache
except ImportError as error:
    need = f"not installed, or without torch ({error}): {install_command('transformers')}"
    raise BackendError("transformers", need) from None

Rope = Literal["interleaved", "halves"]
ROPES = ("interleaved", "halves")
# Types of models whose q and k llama.cpp's converter permutes.
# Source: ggml-org/llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute
INTERLEAVED = frozenset({"llama", "mistral", "mixtral"})
# What models call the cache they are given: since transformers 5.24, and before.
ARGUMENTS = ("cache", "past_key_values")

_path = cache(cache_path)


class QuantizedCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache whose rows went through a cache of a fork's types.

    Attributes:
        type_k, type_v: names of the types.
        rope: how llama.cpp orders the values of a key's head.
    """

    def __init__(
        self, type_k: str, type_v: str, *, config: Any = None, rope: Rope | None = None
    ) -> None:
        """Make an empty cache.

        Args:
            type_k, type_v: any type of `tbq.formats()` that can hold that side, or ggml's.
            config: the model's, from which layers with a sliding window follow, and `rope`.
            rope: "interleaved" if llama.cpp's converter permutes the model's q and k, "halves" if
                it does not. By default the former for models of the types in INTERLEAVED.

        Raises:
            UnknownFormatError, AmbiguousTypeError: no type has that name, or several.
            InputError: a type of the other side, one that cannot be written, or no such `rope`.
                From the model's first call: heads that no cache of the type holds.
        """
        super().__init__(config=config)
        if rope is None:
            rope = "interleaved" if _model_type(config) in INTERLEAVED else "halves"
        if rope not in ROPES:
            raise InputError("rope", repr(rope), f"one of {', '.join(ROPES)}")
        cache_type(type_k, "K")
        cache_type(type_v, "V")
        self.type_k, self.type_v, self.rope = type_k, type_v, rope

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append keys and values of new tokens, each (batch, heads, tokens, head_dim).

        Returns:
            All keys and values of the layer as attention gets them, in the dtype and on the device
            of what was given.
        """
        first = self.get_seq_length(layer_idx)
        keys = _through(key_states, self.type_k, "K", first, self.rope == "interleaved")
        values = _through(value_states, self.type_v, "V", first)
        return super().update(keys, values, layer_idx, *args, **kwargs)

    def bytes(self) -> int:
        """Return what the rows that it holds take in a fork's cache, padding of heads included."""
        sides = (("keys", self.type_k, "K"), ("values", self.type_v, "V"))
        return sum(
            _packed_bytes(getattr(layer, attribute, None), name, side)
            for layer in self.layers
            for attribute, name, side in sides
        )


@contextmanager
def quantized_caches(
    model: Any, type_k: str, type_v: str, *, rope: Rope | None = None
) -> Iterator[Any]:
    """Give every call of a model that comes without a cache, or with an empty one, a quantised one.

    For programs that call the model themselves, such as evaluation harnesses, which mostly pass
    none and ask for none: `use_cache=False` is overruled.

    Args:
        model: a torch module that takes a cache and `use_cache`, and has a `config`.
        type_k, type_v, rope: as for QuantizedCache, with the model's config.

    Yields:
        The model.

    Raises:
        InputError: as QuantizedCache; and where the model is called, a cache that holds rows which
            were not quantised.
    """
    QuantizedCache(type_k, type_v, config=model.config, rope=rope)  # complains now, not in a call

    argument = _argument(model)

    def give(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        passed = {name: kwargs.pop(name) for name in ARGUMENTS if name in kwargs}
        given = next((own for own in passed.values() if own is not None), None)
        if given is not None and not isinstance(given, QuantizedCache) and given.get_seq_length():
            got = f"a {type(given).__name__} with {given.get_seq_length()} tokens"
            raise InputError(argument, got, "none, an empty cache or a QuantizedCache")
        if not isinstance(given, QuantizedCache):
            given = QuantizedCache(type_k, type_v, config=model.config, rope=rope)
        return args, kwargs | {argument: given, "use_cache": True}

    hook = model.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield model
    finally:
        hook.remove()


def _argument(model: Any) -> str:
    """Return what a model calls the cache it is given."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ARGUMENTS if name in taken), ARGUMENTS[-1])


def _model_type(config: Any) -> str | None:
    """Return what kind of decoder a configuration is of, inside a model of several parts too."""
    return None if config is None else config.get_text_config(decoder=True).model_type


def _through(x: Any, name: str, side: str, first: int, interleaved: bool = False) -> Any:
    """Return a tensor (batch, heads, tokens, head_dim) as it comes back from a cache of a type."""
    rows = x.detach().to("cpu").float().numpy().transpose(0, 2, 1, 3)
    order = _neighbours(rows.shape[3]) if interleaved else slice(None)
    path = _path(name, side, *rows.shape[2:])
    back = np.empty(rows.shape, np.float32)
    for one, into in zip(rows, back, strict=True):
        into[..., order] = path(one[..., order], first_cell=first)
    return x.new_tensor(back.transpose(0, 2, 1, 3))


@cache
def _neighbours(head_dim: int) -> np.ndarray:
    """Return which value of a head stands where when value i + head_dim/2 follows value i."""
    return np.arange(head_dim).reshape(2, -1).T.reshape(-1)


def _packed_bytes(x: Any, name: str, side: str) -> int:
    """Return the packed size of a tensor (batch, heads, cells, head_dim); 0 of what is not yet."""
    if x is None or len(x.shape) != 4:
        return 0
    batch, heads, cells, head_dim = x.shape
    return int(batch * cells * _path(name, side, heads, head_dim).row_bytes(heads))
