"""The C functions of a fork's libggml-base, through ctypes, as a kernel for `vector_check`."""

from __future__ import annotations

import ctypes
import os

import numpy as np

from tbq import BackendError, Format
from tbq.registry import get_dialect
from tbq.vectors import Case

from .vector_check import Kernel, Output


def library_kernel(path: str, dialects: set[str]) -> Kernel:
    """Return a kernel that runs the C functions of a dialect (`Dialect.functions`) row by row.

    Functions are named by the type alone, so a library is of one dialect.

    Args:
        path: the shared library, such as libggml-base.so.
        dialects: the dialects of the cases that will be run.

    Raises:
        BackendError: the library cannot be loaded, or has none of the functions; or the cases are
            of several dialects.
    """
    library = open_library(path, dialects)

    def run(case: Case) -> Output | None:
        if case.op not in ("quantize", "dequantize") or case.format.sibling:
            return None
        function = c_function(library, case.op, case.format)
        if function is None:
            return None
        return Output(*(_called(function, case, old) for old in (0, 0xFF)))

    return run


def open_library(path: str, dialects: set[str]) -> ctypes.CDLL:
    """Load a library whose functions are those of one dialect; BackendError as `library_kernel`."""
    if len(dialects) > 1:
        names = ", ".join(sorted(dialects))
        raise BackendError("libggml", f"a library is of one dialect, the cases are of {names}")
    if not os.path.isfile(path):
        raise BackendError("libggml", f"{path}: no such file")
    try:
        return ctypes.CDLL(os.path.abspath(path))
    except OSError as error:
        raise BackendError("libggml", f"cannot load {path}: {error}") from None


def _called(function, case: Case, old: int) -> np.ndarray:
    """Return what a function makes of a case's rows in a destination of bytes `old`."""
    source = case.inputs["x" if case.op == "quantize" else "packed"]
    out = np.full(case.expected.nbytes, old, np.uint8).view(case.expected.dtype)
    rows_in = np.ascontiguousarray(source).reshape(-1, source.shape[-1])
    rows_out = out.reshape(-1, case.expected.shape[-1])
    values = case.format.row_values((rows_out if case.op == "quantize" else rows_in).shape[-1])
    run_rows(function, rows_in, rows_out, values)
    return out.reshape(case.expected.shape)


def run_rows(function, rows_in: np.ndarray, rows_out: np.ndarray, values: int) -> None:
    """Run a C function on each of some contiguous rows, of so many values."""
    for row, result in zip(rows_in, rows_out, strict=True):
        function(row.ctypes.data, result.ctypes.data, values)


def require_functions(path: str, formats: list[Format]) -> None:
    """Raise BackendError if a library that loads has no function for any of the formats."""
    library = ctypes.CDLL(os.path.abspath(path))
    for fmt in formats:
        if any(c_function(library, op, fmt) for op in ("quantize", "dequantize")):
            return
    names = sorted({name for fmt in formats if (name := _name("quantize", fmt))})[:3]
    found = f"none of the functions, such as {', '.join(names)}" if names else "no functions"
    raise BackendError("libggml", f"{path} has {found}")


def _name(op: str, fmt: Format) -> str | None:
    """Return what a C function is called; None if the library of the dialect has none."""
    functions = get_dialect(fmt.dialect).functions
    if functions is None:
        return None
    return functions[op == "dequantize"].format(name=fmt.name)


def c_function(library: ctypes.CDLL, op: str, fmt: Format):
    """Return the C function of an operation on a format; None if the library does not have it."""
    name = _name(op, fmt)
    function = getattr(library, name, None) if name else None
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        function.restype = None
    return function
