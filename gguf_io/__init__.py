"""GGUF files that carry TurboQuant tensors: reading, writing, dialects."""

from gguf_io.atomic import AtomicFiles
from gguf_io.metadata import Field, Metadata, StringArray
from gguf_io.reader import GgufFile, GgufTensor, open_gguf, split_path
from gguf_io.types import GgmlType, TensorType, Unknown, resolve_type
from gguf_io.writer import OutputTensor, write_gguf, write_gguf_shards

__all__ = [
    "AtomicFiles",
    "Field",
    "GgmlType",
    "GgufFile",
    "GgufTensor",
    "Metadata",
    "OutputTensor",
    "StringArray",
    "TensorType",
    "Unknown",
    "open_gguf",
    "resolve_type",
    "split_path",
    "write_gguf",
    "write_gguf_shards",
]
