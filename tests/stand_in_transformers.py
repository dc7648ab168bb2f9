"""What of torch and transformers a cache touches, in NumPy, for machines that have neither.

As in transformers 4.56 to 5.24: `Cache.update` appends to `keys` and `values` of a layer and
returns all of them, each (batch, heads, tokens, head_dim).
"""

import types

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Tensor:
    """A tensor on a device, which has to leave it before NumPy sees it."""

    def __init__(self, array, dtype="float32", device="cpu"):
        self.array = np.asarray(array).astype(DTYPES[dtype])
        self.dtype, self.device = dtype, device

    @property
    def shape(self):
        return self.array.shape

    def detach(self):
        return self

    def to(self, device):
        return Tensor(self.array, self.dtype, device)

    def float(self):
        return Tensor(self.array, "float32", self.device)

    def numpy(self):
        assert self.device == "cpu", "can't convert a device's tensor to numpy"
        assert self.dtype != "bfloat16", "got unsupported ScalarType BFloat16"
        return self.array

    def new_tensor(self, data):
        return Tensor(data, self.dtype, self.device)


class Layer:
    keys = values = None

    def update(self, keys, values):
        if self.keys is None:
            self.keys, self.values = keys, values
        else:
            for side, new in (("keys", keys), ("values", values)):
                old = getattr(self, side)
                setattr(self, side, old.new_tensor(np.concatenate([old.array, new.array], axis=-2)))
        return self.keys, self.values


class DynamicCache:
    def __init__(self, ddp_cache_data=None, config=None):
        self.layers, self.config = [], config

    def update(self, key_states, value_states, layer_idx, cache_kwargs=None):
        while len(self.layers) <= layer_idx:
            self.layers.append(Layer())
        return self.layers[layer_idx].update(key_states, value_states)

    def get_seq_length(self, layer_idx=0):
        written = len(self.layers) > layer_idx and self.layers[layer_idx].keys is not None
        return self.layers[layer_idx].keys.shape[-2] if written else 0


class Config:
    def __init__(self, model_type):
        self.model_type = model_type

    def get_text_config(self, decoder):
        return self


class Model:
    """A module that returns what it was called with."""

    def __init__(self, model_type="llama"):
        self.config, self.hooks = Config(model_type), []

    def register_forward_pre_hook(self, hook, with_kwargs):
        assert with_kwargs
        self.hooks.append(hook)
        return types.SimpleNamespace(remove=lambda: self.hooks.remove(hook))

    def __call__(self, *args, **kwargs):
        for hook in self.hooks:
            args, kwargs = hook(self, args, kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, input_ids=None, past_key_values=None, use_cache=None):
        return {"past_key_values": past_key_values, "use_cache": use_cache}


def module():
    """Return what `import transformers` is to give."""
    made = types.ModuleType("transformers")
    made.DynamicCache = DynamicCache
    return made
