"""Launching the kernels: arrays on either side, streams, chunks, and which formats are ported."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from cuda_port import attention, blocks32, pr21089, trellis
from tbq.attention import RUN_KEYS, rotated_queries
from tbq.errors import BackendError, CorruptBlockError, InputError
from tbq.families.trellis import code_table
from tbq.format import Format
from tbq.registry import get_format

# Values of host arrays that are on the device at a time; device arrays are used whole.
CHUNK_VALUES = 1 << 25
SCRATCH_BYTES = 1 << 30
VALUE_THREADS = 256
DIALECTS = ("pr21089", "llama-tq")


def has_device() -> bool:
    """Tell whether there is a device, or the simulator, to run on."""
    try:
        return cuda.is_available()
    except Exception:  # a driver that is there and broken fails in its own ways
        return False


def ported(fmt: Format) -> bool:
    """Tell whether a format has kernels: those of pr21089 and llama-tq do."""
    return fmt.dialect in DIALECTS


class Decoding(NamedTuple):
    """How a format's values are read: the table of its levels, and the device function of one."""

    levels: np.ndarray
    level: Any


@cache
def decoding(fmt: Format) -> Decoding:
    """Return the table and the level function of a format."""
    if fmt.dialect == "pr21089":
        return Decoding(pr21089.tables(fmt)[0], pr21089.level_at(fmt))
    if "start" in fmt.block.names:
        return Decoding(np.array(code_table()), trellis.level_at(fmt))
    return Decoding(blocks32.tables(fmt)[0], blocks32.level_at(fmt))


@cache
def value_decoder(fmt: Format):
    """Return the decoder of a format without a rotation of its own."""
    return attention.value_decoder(decoding(fmt).level, fmt.block_values, fmt.block_bytes)


@cache
def score_kernel(fmt: Format):
    """Return the kernel of `scores`."""
    return attention.score_kernel(decoding(fmt).level, fmt.block_values, fmt.block_bytes)


@cache
def sum_kernel(fmt: Format):
    """Return the kernel of `weighted_sum`."""
    return attention.sum_kernel(decoding(fmt).level, fmt.block_values, fmt.block_bytes)


# --- arrays --------------------------------------------------------------------------------------


def require_device() -> None:
    """Raise BackendError, which says what to install, if there is no device to run on."""
    if not has_device():
        install = "pip install 'tbq-reference[cuda12]' on a machine with a GPU"
        raise BackendError("numba.cuda", f"no CUDA device or driver; {install}")


def _format(fmt: str | Format) -> Format:
    found = get_format(fmt)
    require_device()
    if not ported(found):
        raise BackendError("cuda_port", f"{found.key} is not ported; tbq has it on the CPU")
    return found


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
def _constants(device: int, fmt: Format, row_blocks: int) -> dict[str, Any]:
    """Return a format's tables on a device, copied there once."""
    tables = {"levels": decoding(fmt).levels}
    if fmt.dialect == "pr21089":
        tables["matrix"], tables["transposed"] = pr21089.matrices()
        tables["limits"] = pr21089.tables(fmt)[1]
    elif "start" not in fmt.block.names:
        tables["limits"] = blocks32.tables(fmt)[1]
        tables["signs"] = blocks32.row_signs(fmt, row_blocks)
    return {name: _to_device(table, 0) for name, table in tables.items()}


def _tables(fmt: Format, row_blocks: int = 1) -> dict[str, Any]:
    signed = "sb" in fmt.block.names  # nothing else depends on the row
    return _constants(_device_number(), fmt, row_blocks if signed else 1)


def _device_number() -> int:
    """Return the number of the current device; the simulators have none."""
    current = getattr(cuda, "get_current_device", None)
    return getattr(current(), "id", 0) if current else 0


# --- quantize and dequantize ---------------------------------------------------------------------


def quantize(x: Any, fmt: str | Format, *, stream: Any = 0) -> Any:
    """Quantise rows on the device, byte for byte as `tbq.quantize` does.

    Args:
        x: float32 (..., n), n a multiple of the format's block: a NumPy array, which goes through
            the device in chunks, or anything with `__cuda_array_interface__`, used in place.
        fmt: a Format, a key, a bare name or an alias, of pr21089 or llama-tq.
        stream: a Numba stream; the result of a device array may still be in the making.

    Returns:
        uint8 (..., row_bytes) where x was: a NumPy array or a Numba device array.

    Raises:
        UnknownFormatError, AmbiguousTypeError: `fmt` names no format, or several.
        InputError: wrong dtype, layout or row length.
        BackendError: no device, a format that is not ported, or not enough memory.
    """
    fmt = _format(fmt)
    if is_on_device(x):
        source = _device(x, np.float32, "x")
        *lead, n = source.shape
        out = _new((*lead, fmt.row_bytes(n)), np.uint8, stream)
        _launch_encoder(fmt, source.reshape(source.size), n, out.reshape(out.size), stream)
        return out
    source = _host(x, np.float32, "x")
    width = fmt.row_bytes(source.shape[-1])
    rows = source.reshape(-1, source.shape[-1])
    out = np.empty((*source.shape[:-1], width), np.uint8)
    packed = out.reshape(-1, width)
    for start, stop in _chunks(*rows.shape):
        piece = _to_device(rows[start:stop].reshape(-1), stream)
        result = _new(((stop - start) * width,), np.uint8, stream)
        _launch_encoder(fmt, piece, rows.shape[1], result, stream)
        packed[start:stop] = result.copy_to_host(stream=stream).reshape(-1, width)
        _wait(stream)
    return out


def dequantize(packed: Any, fmt: str | Format, *, stream: Any = 0) -> Any:
    """Dequantise rows on the device, bit for bit as `tbq.dequantize` does.

    Args and errors as for `quantize`, with packed uint8 (..., row_bytes); also CorruptBlockError
    for host arrays with an outlier beyond its block (on the device it is left out).
    """
    fmt = _format(fmt)
    if is_on_device(packed):
        source = _device(packed, np.uint8, "packed")
        *lead, width = source.shape
        out = _new((*lead, fmt.row_values(width)), np.float32, stream)
        _launch_decoder(fmt, source.reshape(source.size), out.reshape(out.size), stream)
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
        _launch_decoder(fmt, piece, result, stream)
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
    if "pos" in fmt.block.names:
        beyond = (packed.view(fmt.block)["pos"] >= fmt.block_values).any(axis=-1).reshape(-1)
        if beyond.any():
            reason = "an outlier lies outside the block"
            raise CorruptBlockError(fmt.key, int(beyond.argmax()), reason)


def _launch_encoder(fmt: Format, x, row: int, packed, stream) -> None:
    n = x.size // fmt.block_values
    if n == 0:
        return
    t = _tables(fmt, row // fmt.block_values)
    if fmt.dialect == "pr21089":
        launch = pr21089.encoder(fmt)[n, pr21089.THREADS, stream]
        launch(x, t["transposed"], t["limits"], packed)
    elif "start" in fmt.block.names:
        scratch_values = trellis.scratch_values(fmt)
        grid = max(1, min(n, SCRATCH_BYTES // (4 * scratch_values)))
        scratch = _new((grid, scratch_values), np.float32, stream)
        trellis.encoder(fmt)[grid, trellis.THREADS, stream](x, t["levels"], scratch, packed)
    elif fmt.sibling:
        blocks32.norm_encoder(fmt)[-(-n // VALUE_THREADS), VALUE_THREADS, stream](x, packed)
    else:
        launch = blocks32.encoder(fmt)[-(-n // blocks32.GROUPS), blocks32.THREADS, stream]
        launch(x, t["signs"], t["levels"], t["limits"], packed)


def _launch_decoder(fmt: Format, packed, y, stream) -> None:
    n = y.size // fmt.block_values
    if n == 0:
        return
    t = _tables(fmt)
    if fmt.dialect == "pr21089":
        launch = pr21089.decoder(fmt)[n, pr21089.THREADS, stream]
        launch(packed, t["matrix"], t["levels"], y)
    elif "sb" in fmt.block.names:
        launch = blocks32.signed_decoder(fmt)[-(-n // blocks32.GROUPS), blocks32.THREADS, stream]
        launch(packed, t["levels"], y)
    else:
        grid = -(-y.size // VALUE_THREADS)
        value_decoder(fmt)[grid, VALUE_THREADS, stream](packed, t["levels"], y)


# --- attention -----------------------------------------------------------------------------------


def scores(q: np.ndarray, packed_k: Any, fmt: str | Format, *, stream: Any = 0) -> np.ndarray:
    """Return the dot products of queries with packed keys, bit for bit as `tbq.scores` does.

    Args:
        q: float32 (..., n) on the host; rotated there, once.
        packed_k: uint8 (keys, row_bytes), on the host or on the device. One row of ktq keys is
            copied to the host for its signs; all of them, if rows differ in their signs.
        fmt: a format for keys, of pr21089 or llama-tq.
        stream: a Numba stream.

    Returns:
        float32 (..., keys), on the host.

    Raises:
        As `quantize`; also InputError for a format that is not for keys, or another shape.
    """
    fmt = _side(_format(fmt), "K")
    if fmt.sibling:
        raise BackendError("cuda_port", f"scores of {fmt.key} are not ported; tbq.scores has them")
    q = _host(q, np.float32, "q")
    rows = _rows(packed_k, fmt)
    n = fmt.row_values(rows.shape[1])
    if q.shape[-1] != n:
        raise InputError("q", f"rows of {q.shape[-1]} values", f"{n}, as the keys have")
    queries = q.reshape(-1, n // fmt.block_values, fmt.block_values)
    out = np.empty((len(queries), rows.shape[0]), np.float32)
    levels = _tables(fmt)["levels"]
    for start, stop in _chunks(rows.shape[0], n):
        piece = rows[start:stop]
        rotated, which = rotated_queries(queries, _sign_rows(piece, fmt, stream), fmt)
        which = np.broadcast_to(which, (stop - start, which.shape[1]))
        device = piece if is_on_device(piece) else _to_device(piece, stream)
        part = _new((len(queries), stop - start), np.float32, stream)
        if part.size:
            grid = (-(-(stop - start) // VALUE_THREADS), len(queries))
            arguments = _to_device(rotated, stream), _to_device(which.astype(np.int32), stream)
            flat = device.reshape(device.size)
            score_kernel(fmt)[grid, VALUE_THREADS, stream](flat, levels, *arguments, part)
        out[:, start:stop] = part.copy_to_host(stream=stream)
        _wait(stream)
    return out.reshape(*q.shape[:-1], rows.shape[0])


def _sign_rows(rows: Any, fmt: Format, stream: Any) -> np.ndarray:
    """Return blocks on the host with the signs of rows: one row if all have the same, else all."""
    if "sb" not in fmt.block.names:
        return np.zeros((1, rows.shape[1] // fmt.block_bytes), fmt.block)
    if is_on_device(rows) and rows.size:
        differs = _to_device(np.zeros(1, np.int32), stream)
        grid = -(-rows.size // fmt.block_bytes // VALUE_THREADS) + 1
        flat = rows.reshape(rows.size)
        checker = blocks32.sign_checker(fmt)[grid, VALUE_THREADS, stream]
        checker(flat, rows.shape[1], differs)
        found = differs.copy_to_host(stream=stream)
        _wait(stream)
        rows = (rows if found[0] else rows[:1]).copy_to_host(stream=stream)
        _wait(stream)
    return np.ascontiguousarray(rows).view(fmt.block)


def weighted_sum(p: np.ndarray, packed_v: Any, fmt: str | Format, *, stream: Any = 0) -> np.ndarray:
    """Return weighted sums of packed values, bit for bit as `tbq.weighted_sum` does.

    Args:
        p: float32 (..., keys) on the host.
        packed_v: uint8 (keys, row_bytes), on the host or on the device.
        fmt: a format for values, of pr21089 or llama-tq.
        stream: a Numba stream.

    Returns:
        float32 (..., n), on the host.

    Raises:
        As `quantize`; also InputError for a format that is not for values, or another shape.
    """
    fmt = _side(_format(fmt), "V")
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
        tables, columns = _tables(fmt), -(-n // VALUE_THREADS)
        step = max(1, CHUNK_VALUES // n // RUN_KEYS) * RUN_KEYS
        for start in range(0, rows.shape[0], step):
            stop = min(start + step, rows.shape[0])
            piece = rows[start:stop]
            device = piece if is_on_device(piece) else _to_device(piece, stream)
            runs = -(-(stop - start) // RUN_KEYS)
            partial = _new((runs, len(weights), n), np.float32, stream)
            mine = _to_device(weights[:, start:stop], stream)
            launch = sum_kernel(fmt)[(columns, len(weights), runs), VALUE_THREADS, stream]
            launch(device.reshape(device.size), tables["levels"], mine, partial)
            gather = attention.gather_kernel()[(columns, len(weights)), VALUE_THREADS, stream]
            gather(partial, total)
        if fmt.dialect == "pr21089":
            turned = _new((len(weights), n), np.float32, stream)
            flat = total.reshape(total.size), tables["matrix"], turned.reshape(turned.size)
            pr21089.rotator()[total.size // fmt.block_values, pr21089.THREADS, stream](*flat)
            total = turned
    result = total.copy_to_host(stream=stream)
    _wait(stream)
    return result.reshape(*p.shape[:-1], n)


def _side(fmt: Format, side: str) -> Format:
    if side not in fmt.side:
        raise InputError("fmt", fmt.key, f"a format for {side}; this one is for {fmt.side}")
    return fmt


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
