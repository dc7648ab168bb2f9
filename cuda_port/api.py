"""Launching the kernels: arrays on either side, streams, chunks."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from cuda_port import attention
from cuda_port.port import (
    VALUE_THREADS,
    Kernel,
    port_of,
    score_kernel,
    sign_checker,
    sum_kernel,
    turns_back,
    value_decoder,
)
from tbq.attention import RUN_KEYS, rotated_queries, side_format
from tbq.errors import BackendError, CorruptBlockError, InputError
from tbq.format import Format
from tbq.registry import get_format

# Values of host arrays that are on the device at a time; device arrays are used whole.
CHUNK_VALUES = 1 << 25
SCRATCH_BYTES = 1 << 30


def has_device() -> bool:
    """Tell whether there is a device, or the simulator, to run on."""
    try:
        return cuda.is_available()
    except Exception:  # a driver that is there and broken fails in its own ways
        return False


def ported(fmt: Format) -> bool:
    """Tell whether a format has kernels, which know no more than a group's place in its row."""
    placed = fmt.codec.position in ("none", "row") and not fmt.layout.header_bytes
    return placed and port_of(fmt.codec) is not None


# --- arrays --------------------------------------------------------------------------------------


def require_device() -> None:
    """Raise BackendError, which says what to install, if there is no device to run on."""
    if not has_device():
        install = "pip install 'tbq-reference[cuda12]' on a machine with a GPU"
        raise BackendError("numba.cuda", f"no CUDA device or driver; {install}")


def _ported(fmt: Format) -> Format:
    require_device()
    if not ported(fmt):
        raise BackendError("cuda_port", f"{fmt.label} is not ported; tbq has it on the CPU")
    return fmt


def is_on_device(x: Any) -> bool:
    """Tell whether an array lives on the device (Numba's, CuPy's, PyTorch's)."""
    return hasattr(x, "__cuda_array_interface__") or hasattr(x, "copy_to_host")


def _device(x: Any, dtype: type, argument: str):
    """Return a device array as Numba sees it, without a copy."""
    array = x if hasattr(x, "copy_to_host") else cuda.as_cuda_array(x)
    if array.dtype != np.dtype(dtype) or not array.is_c_contiguous() or array.ndim == 0:
        got = f"{array.dtype} array of shape {array.shape}"
        raise InputError(argument, got, f"a C-contiguous {np.dtype(dtype)} array on the device")
    return array


def _host(x: Any, dtype: type, argument: str) -> np.ndarray:
    array = np.asarray(x)
    wanted = np.dtype(dtype)
    if array.dtype != wanted or array.ndim == 0:
        got = f"{array.dtype} array of shape {array.shape}"
        raise InputError(argument, got, f"a {wanted} array (..., n)")
    return np.ascontiguousarray(array)


def _to_device(x: np.ndarray, stream):
    try:
        return cuda.to_device(np.ascontiguousarray(x), stream=stream)
    except Exception as error:
        raise BackendError(
            "numba.cuda", f"cannot copy {x.nbytes} bytes to the device: {error}"
        ) from error


def _new(shape, dtype, stream):
    try:
        return cuda.device_array(shape, dtype, stream=stream)
    except Exception as error:
        n = math.prod(shape) * np.dtype(dtype).itemsize
        raise BackendError("numba.cuda", f"cannot allocate {n} bytes: {error}") from error


@cache
def _constants(device: int, kernel: Kernel, row_groups: int) -> tuple[Any, ...]:
    """Return a kernel's tables on a device, copied there once."""
    rows = kernel.row_tables(row_groups) if kernel.row_tables else ()
    return tuple(_to_device(table, 0) for table in (*rows, *kernel.tables))


@cache
def _levels(device: int, fmt: Format) -> Any:
    return _to_device(port_of(fmt.codec).levels, 0)


def _launch(kernel: Kernel, source, n: int, row_groups: int, out, stream) -> None:
    """Run a kernel over n values; `row_groups` matters where it has tables for a row."""
    if n == 0:
        return
    grid = -(-n // kernel.values)
    tables = _constants(_device_number(), kernel, row_groups if kernel.row_tables else 0)
    scratch: tuple[Any, ...] = ()
    if kernel.scratch_values:
        grid = max(1, min(grid, SCRATCH_BYTES // (4 * kernel.scratch_values)))
        scratch = (_new((grid, kernel.scratch_values), np.float32, stream),)
    kernel.function[grid, kernel.threads, stream](source, *tables, *scratch, out)


def _device_number() -> int:
    """Return the number of the current device; the simulators have none."""
    current = getattr(cuda, "get_current_device", None)
    return getattr(current(), "id", 0) if current else 0


# --- quantize and dequantize ---------------------------------------------------------------------


def quantize(
    x: Any,
    fmt: str | Format,
    *,
    head_dim: int | None = None,
    side: str | None = None,
    stream: Any = 0,
) -> Any:
    """Quantise rows on the device, byte for byte as `tbq.quantize` does.

    Args:
        x: float32 (..., n), n a multiple of the format's group: a NumPy array, which goes through
            the device in chunks, or anything with `__cuda_array_interface__`, used in place.
        fmt: a Format, a key, a bare name or an alias, of a format that is ported.
        head_dim, side: as for `tbq.quantize`.
        stream: a Numba stream; the result of a device array may still be in the making.

    Returns:
        uint8 (..., row_bytes) where x was: a NumPy array or a Numba device array.

    Raises:
        UnknownFormatError, AmbiguousTypeError: `fmt` names no format, or several.
        InputError: wrong dtype, layout or row length; a choice that is missing or means nothing.
        BackendError: no device, a format that is not ported, or not enough memory.
    """
    fmt = _ported(get_format(fmt).at(head_dim=head_dim, side=side))
    kernel = port_of(fmt.codec).encoder
    if is_on_device(x):
        source = _device(x, np.float32, "x")
        *lead, n = source.shape
        out = _new((*lead, fmt.row_bytes(n)), np.uint8, stream)
        groups = n // fmt.group_values
        flat = source.reshape(source.size), source.size, groups, out.reshape(out.size)
        _launch(kernel, *flat, stream)
        return out
    source = _host(x, np.float32, "x")
    width = fmt.row_bytes(source.shape[-1])
    rows = source.reshape(-1, source.shape[-1])
    out = np.empty((*source.shape[:-1], width), np.uint8)
    packed = out.reshape(-1, width)
    groups = rows.shape[1] // fmt.group_values
    for start, stop in _chunks(*rows.shape):
        piece = _to_device(rows[start:stop].reshape(-1), stream)
        result = _new(((stop - start) * width,), np.uint8, stream)
        _launch(kernel, piece, piece.size, groups, result, stream)
        packed[start:stop] = result.copy_to_host(stream=stream).reshape(-1, width)
        _wait(stream)
    return out


def dequantize(
    packed: Any,
    fmt: str | Format,
    *,
    head_dim: int | None = None,
    side: str | None = None,
    stream: Any = 0,
) -> Any:
    """Dequantise rows on the device, bit for bit as `tbq.dequantize` does.

    Args and errors as for `quantize`, with packed uint8 (..., row_bytes); also CorruptBlockError
    for host arrays with an outlier beyond its block (on the device it is left out).
    """
    fmt = _ported(get_format(fmt).at(head_dim=head_dim, side=side))
    kernel = value_decoder(fmt.codec)
    if is_on_device(packed):
        source = _device(packed, np.uint8, "packed")
        *lead, width = source.shape
        out = _new((*lead, fmt.row_values(width)), np.float32, stream)
        flat = source.reshape(source.size), out.size, 0, out.reshape(out.size)
        _launch(kernel, *flat, stream)
        return out
    source = _host(packed, np.uint8, "packed")
    n = fmt.row_values(source.shape[-1])
    _check_outliers(fmt, source)
    rows = source.reshape(-1, source.shape[-1])
    out = np.empty((*source.shape[:-1], n), np.float32)
    values = out.reshape(-1, n)
    for start, stop in _chunks(len(rows), n):
        piece = _to_device(rows[start:stop].reshape(-1), stream)
        result = _new(((stop - start) * n,), np.float32, stream)
        _launch(kernel, piece, result.size, 0, result, stream)
        values[start:stop] = result.copy_to_host(stream=stream).reshape(-1, n)
        _wait(stream)
    return out


def _wait(stream: Any) -> None:
    if stream:
        stream.synchronize()


def _chunks(rows: int, n: int):
    step = max(1, CHUNK_VALUES // max(1, n))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _check_outliers(fmt: Format, packed: np.ndarray) -> None:
    if fmt.layout.outliers:
        positions = packed.view(fmt.block)[fmt.layout.outliers[0]]
        beyond = (positions >= fmt.block_values).any(axis=-1).reshape(-1)
        if beyond.any():
            raise CorruptBlockError(fmt.label, int(beyond.argmax()), fmt.codec.corruption)


# --- attention -----------------------------------------------------------------------------------


def scores(q: np.ndarray, packed_k: Any, fmt: str | Format, *, stream: Any = 0) -> np.ndarray:
    """Return the dot products of queries with packed keys, bit for bit as `tbq.scores` does.

    Args:
        q: float32 (..., n) on the host; rotated there, once.
        packed_k: uint8 (keys, row_bytes), on the host or on the device. One row of ktq keys is
            copied to the host for its signs; all of them, if rows differ in their signs.
        fmt: a format for keys that is ported.
        stream: a Numba stream.

    Returns:
        float32 (..., keys), on the host.

    Raises:
        As `quantize`; also InputError for a format that is not for keys, or another shape.
    """
    fmt = _ported(side_format(fmt, "K"))
    if fmt.sibling:
        raise BackendError(
            "cuda_port", f"scores of {fmt.label} are not ported; tbq.scores has them"
        )
    q = _host(q, np.float32, "q")
    rows = _rows(packed_k, fmt)
    n = fmt.row_values(rows.shape[1])
    if q.shape[-1] != n:
        raise InputError("q", f"rows of {q.shape[-1]} values", f"{n}, as the keys have")
    queries = q.reshape(-1, n // fmt.group_values, fmt.group_values)
    out = np.empty((len(queries), rows.shape[0]), np.float32)
    levels = _levels(_device_number(), fmt)
    for start, stop in _chunks(rows.shape[0], n):
        piece = rows[start:stop]
        rotated, which = rotated_queries(queries, _sign_rows(piece, fmt, stream), fmt)
        which = np.broadcast_to(which, (stop - start, which.shape[1]))
        device = piece if is_on_device(piece) else _to_device(piece, stream)
        part = _new((len(queries), stop - start), np.float32, stream)
        if part.size:
            grid = (-(-(stop - start) // VALUE_THREADS), len(queries))
            arguments = _to_device(rotated, stream), _to_device(which.astype(np.int32), stream)
            flat = _readable(device, n, fmt, stream)
            score_kernel(fmt.codec)[grid, VALUE_THREADS, stream](flat, levels, *arguments, part)
        out[:, start:stop] = part.copy_to_host(stream=stream)
        _wait(stream)
    return out.reshape(*q.shape[:-1], rows.shape[0])


def _readable(rows: Any, n: int, fmt: Format, stream: Any) -> Any:
    """Return what the kernels of attention read: packed rows, flat, or their scaled levels."""
    flat, leveler = rows.reshape(rows.size), port_of(fmt.codec).leveler
    if leveler is None:
        return flat
    scaled = _new((rows.shape[0] * n,), np.float32, stream)
    _launch(leveler, flat, scaled.size, 0, scaled, stream)
    return scaled


def _sign_rows(rows: Any, fmt: Format, stream: Any) -> np.ndarray:
    """Return rows on the host with the signs of all: one row if they are the same, else all."""
    if not fmt.layout.signs:
        return np.zeros((1, rows.shape[1]), np.uint8)
    if is_on_device(rows) and rows.size:
        differs = _to_device(np.zeros(1, np.int32), stream)
        grid = -(-rows.size // fmt.block_bytes // VALUE_THREADS) + 1
        flat = rows.reshape(rows.size)
        checker = sign_checker(fmt.codec)[grid, VALUE_THREADS, stream]
        checker(flat, rows.shape[1], differs)
        found = differs.copy_to_host(stream=stream)
        _wait(stream)
        rows = (rows if found[0] else rows[:1]).copy_to_host(stream=stream)
        _wait(stream)
    return np.ascontiguousarray(rows)


def weighted_sum(p: np.ndarray, packed_v: Any, fmt: str | Format, *, stream: Any = 0) -> np.ndarray:
    """Return weighted sums of packed values, bit for bit as `tbq.weighted_sum` does.

    Args:
        p: float32 (..., keys) on the host.
        packed_v: uint8 (keys, row_bytes), on the host or on the device.
        fmt: a format for values that is ported.
        stream: a Numba stream.

    Returns:
        float32 (..., n), on the host.

    Raises:
        As `quantize`; also InputError for a format that is not for values, or another shape.
    """
    fmt = _ported(side_format(fmt, "V"))
    p = _host(p, np.float32, "p")
    rows = _rows(packed_v, fmt)
    if p.shape[-1] != rows.shape[0]:
        raise InputError("p", f"{p.shape[-1]} weights", f"{rows.shape[0]}, one per row of values")
    if not is_on_device(rows):
        _check_outliers(fmt, rows)
    n = fmt.row_values(rows.shape[1])
    weights = p.reshape(-1, rows.shape[0])
    total = _to_device(np.zeros((len(weights), n), np.float32), stream)
    if total.size:
        levels, columns = _levels(_device_number(), fmt), -(-n // VALUE_THREADS)
        step = max(1, CHUNK_VALUES // n // RUN_KEYS) * RUN_KEYS
        for start in range(0, rows.shape[0], step):
            stop = min(start + step, rows.shape[0])
            piece = rows[start:stop]
            device = piece if is_on_device(piece) else _to_device(piece, stream)
            runs = -(-(stop - start) // RUN_KEYS)
            partial = _new((runs, len(weights), n), np.float32, stream)
            mine = _to_device(weights[:, start:stop], stream)
            launch = sum_kernel(fmt.codec)[(columns, len(weights), runs), VALUE_THREADS, stream]
            launch(_readable(device, n, fmt, stream), levels, mine, partial)
            gather = attention.gather_kernel()[(columns, len(weights)), VALUE_THREADS, stream]
            gather(partial, total)
        if turns_back(fmt):
            turned = _new((len(weights), n), np.float32, stream)
            flat = total.reshape(total.size), total.size, 0, turned.reshape(turned.size)
            _launch(port_of(fmt.codec).rotator, *flat, stream)
            total = turned
    result = total.copy_to_host(stream=stream)
    _wait(stream)
    return result.reshape(*p.shape[:-1], n)


def _rows(packed: Any, fmt: Format):
    rows = (
        _device(packed, np.uint8, "packed")
        if is_on_device(packed)
        else _host(packed, np.uint8, "packed")
    )
    if rows.ndim != 2:
        raise InputError("packed rows", f"shape {rows.shape}", "two axes, (keys, row_bytes)")
    fmt.row_values(rows.shape[1])
    return rows
