"""Byte-exact reference codec for the TurboQuant KV-cache formats of llama.cpp and its forks.

Importing this package imports NumPy and defines things; Numba is imported when a kernel first runs.
"""

from tbq.api import dequantize, dequantize_paired, quantize, quantize_paired
from tbq.attention import scores, weighted_sum
from tbq.codec import Codec, Layout
from tbq.dialect import Dialect, Release
from tbq.errors import (
    AmbiguousTypeError,
    BackendError,
    ClosedFileError,
    CorruptBlockError,
    FileFormatError,
    InputError,
    TbqError,
    UnknownFormatError,
    ValueOverflowError,
)
from tbq.format import Format
from tbq.registry import dialects, formats, get_format
from tbq.repacking import counterpart, repack, repackable
from tbq.rotations import Rotation, rotation

__version__ = "1.0.0"

__all__ = [
    "AmbiguousTypeError",
    "BackendError",
    "ClosedFileError",
    "Codec",
    "CorruptBlockError",
    "Dialect",
    "FileFormatError",
    "Format",
    "InputError",
    "Layout",
    "Release",
    "Rotation",
    "TbqError",
    "UnknownFormatError",
    "ValueOverflowError",
    "counterpart",
    "dequantize",
    "dequantize_paired",
    "dialects",
    "formats",
    "get_format",
    "quantize",
    "quantize_paired",
    "repack",
    "repackable",
    "rotation",
    "scores",
    "weighted_sum",
]
