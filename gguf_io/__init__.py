"""GGUF files and llama.cpp state files that carry TurboQuant rows: reading, writing, dialects."""

from gguf_io.atomic import AtomicFiles
from gguf_io.cache_tensor import CacheTensor
from gguf_io.graph_rotation import RotationChoice
from gguf_io.metadata import Field, Metadata, StringArray
from gguf_io.model_shape import ModelShape, model_shape
from gguf_io.reader import GgufFile, GgufTensor, open_gguf, split_path
from gguf_io.state import StateFile, open_state
from gguf_io.state_writer import Conversion, Plan, plan_conversion, write_state
from gguf_io.types import GgmlType, TensorType, Unknown, resolve_type
from gguf_io.writer import OutputTensor, write_gguf, write_gguf_shards

__all__ = [
    "AtomicFiles",
    "CacheTensor",
    "Conversion",
    "Field",
    "GgmlType",
    "GgufFile",
    "GgufTensor",
    "Metadata",
    "ModelShape",
    "OutputTensor",
    "Plan",
    "RotationChoice",
    "StateFile",
    "StringArray",
    "TensorType",
    "Unknown",
    "model_shape",
    "open_gguf",
    "open_state",
    "plan_conversion",
    "resolve_type",
    "split_path",
    "write_gguf",
    "write_gguf_shards",
    "write_state",
]
