"""The C functions of a fork's libggml-base, through ctypes, as a kernel for `vector_check`."""

from __future__ import annotations

import ctypes
import os

import numpy as np

from tbq import BackendError, Format

from .vector_check import Kernel
from .vector_set import Case


def library_kernel(path: str, dialects: set[str]) -> Kernel:
    """Return a kernel that runs `quantize_row_NAME_ref` and `dequantize_row_NAME` row by row.

    Functions are named by the type alone, so a library is of one dialect.

    Args:
        path: the shared library, such as libggml-base.so.
        dialects: the dialects of the cases that will be run.

    Raises:
        BackendError: the library cannot be loaded, or has none of the functions; or the cases are
            of several dialects.
    """
    if len(dialects) > 1:
        names = ", ".join(sorted(dialects))
        raise BackendError("libggml", f"a library is of one dialect, the cases are of {names}")
    if not os.path.isfile(path):
        raise BackendError("libggml", f"{path}: no such file")
    try:
        library = ctypes.CDLL(os.path.abspath(path))
    except OSError as error:
        raise BackendError("libggml", f"cannot load {path}: {error}") from None

    def run(case: Case) -> np.ndarray | None:
        if case.op not in ("quantize", "dequantize") or case.format.sibling:
            return None
        function = _function(library, case.op, case.format)
        if function is None:
            return None
        source = case.inputs["x" if case.op == "quantize" else "packed"]
        out = np.empty_like(case.expected)
        rows_in = np.ascontiguousarray(source).reshape(-1, source.shape[-1])
        rows_out = out.reshape(-1, out.shape[-1])
        values = case.format.row_values((rows_out if case.op == "quantize" else rows_in).shape[-1])
        for row, result in zip(rows_in, rows_out, strict=True):
            function(row.ctypes.data, result.ctypes.data, values)
        return out

    return run


def require_functions(path: str, formats: list[Format]) -> None:
    """Raise BackendError if a library that loads has no function for any of the formats."""
    library = ctypes.CDLL(os.path.abspath(path))
    for fmt in formats:
        if any(_function(library, op, fmt) for op in ("quantize", "dequantize")):
            return
    names = ", ".join(sorted({_name("quantize", fmt) for fmt in formats})[:3])
    raise BackendError("libggml", f"{path} has none of the functions, such as {names}")


def _name(op: str, fmt: Format) -> str:
    return f"quantize_row_{fmt.name}_ref" if op == "quantize" else f"dequantize_row_{fmt.name}"


def _function(library: ctypes.CDLL, op: str, fmt: Format):
    function = getattr(library, _name(op, fmt), None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        function.restype = None
    return function
