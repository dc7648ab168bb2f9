"""Byte-exact reference codec for the TurboQuant KV-cache formats of llama.cpp and its forks.

Importing this package imports NumPy and defines things; Numba is imported when a kernel first runs.
"""

from tbq.api import dequantize, quantize
from tbq.errors import (
    AmbiguousTypeError,
    BackendError,
    FileFormatError,
    InputError,
    TbqError,
    UnknownFormatError,
)
from tbq.format import Format
from tbq.registry import dialects, formats, get_format

__all__ = [
    "AmbiguousTypeError",
    "BackendError",
    "FileFormatError",
    "Format",
    "InputError",
    "TbqError",
    "UnknownFormatError",
    "dequantize",
    "dialects",
    "formats",
    "get_format",
    "quantize",
]
