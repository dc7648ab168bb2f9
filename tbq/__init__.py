"""Byte-exact reference codec for the TurboQuant KV-cache formats of llama.cpp and its forks.

Importing this package imports NumPy and defines things; Numba is imported when a kernel first runs.
"""

from tbq.api import dequantize, dequantize_paired, quantize, quantize_paired
from tbq.attention import scores, weighted_sum
from tbq.errors import (
    AmbiguousTypeError,
    BackendError,
    CorruptBlockError,
    FileFormatError,
    InputError,
    TbqError,
    UnknownFormatError,
)
from tbq.format import Format
from tbq.registry import dialects, formats, get_format
from tbq.rotations import Rotation, rotation

__all__ = [
    "AmbiguousTypeError",
    "BackendError",
    "CorruptBlockError",
    "FileFormatError",
    "Format",
    "InputError",
    "Rotation",
    "TbqError",
    "UnknownFormatError",
    "dequantize",
    "dequantize_paired",
    "dialects",
    "formats",
    "get_format",
    "quantize",
    "quantize_paired",
    "rotation",
    "scores",
    "weighted_sum",
]
