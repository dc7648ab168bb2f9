"""Launching the kernels: arrays on either side, streams, chunks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from cuda_port import arrays, attention
from cuda_port.arrays import contiguous, fetch, flat, is_on_device, new, to_device, words
from cuda_port.port import WORD_BYTES, Kernel, Port, port_of, turns_back, value_decoder
from tbq.attention import RUN_KEYS, rotated_queries, side_format
from tbq.errors import BackendError, CorruptBlockError, InputError
from tbq.extras import install_command
from tbq.format import Format
from tbq.registry import get_format

# Values of host arrays that are on the device at a time; device arrays are used whole.
CHUNK_VALUES = 1 << 25
CHUNK_SHARE, SCRATCH_SHARE = 0.25, 0.5  # of free memory, that chunks and scratch take at most
BLOCKS_WANTED = 1024  # of threads, before one has several batches of keys
RESIDENT = 4  # blocks of threads per multiprocessor that have scratch
BYTES_PER_VALUE = 8  # of float32 and its codes, rounded up


def has_device() -> bool:
    """Tell whether there is a device, or the simulator, to run on."""
    try:
        return cuda.is_available()
    except Exception:  # a driver that is there and broken fails in its own ways
        return False


def require_device() -> None:
    """Raise BackendError, which says what to install, if there is no device to run on."""
    if not has_device():
        install = f"{install_command('cuda12')} on a machine with a GPU"
        raise BackendError("numba.cuda", f"no CUDA device or driver; {install}")


def ported(fmt: Format) -> bool:
    """Tell whether a format has kernels, which know no more than a group's place in its row."""
    placed = fmt.codec.position in ("none", "row") and not fmt.layout.header_bytes
    return placed and port_of(fmt.codec) is not None


def _ported(fmt: Format) -> Format:
    require_device()
    if not ported(fmt):
        raise BackendError("cuda_port", f"{fmt.label} is not ported; tbq has it on the CPU")
    return fmt


def _port(fmt: Format) -> Port:
    port = port_of(fmt.codec)
    assert port is not None, "the format is ported"
    return port


# --- launching -----------------------------------------------------------------------------------


@cache
def _constants(device: int, kernel: Kernel, row_groups: int) -> tuple[Any, ...]:
    """Return a kernel's tables on a device, copied there once, whatever the stream."""
    rows = kernel.row_tables(row_groups) if kernel.row_tables else ()
    tables = tuple(to_device(table) for table in (*rows, *kernel.tables))
    arrays.wait(0)
    return tables


@cache
def _table(device: int, fmt: Format) -> Any:
    table = to_device(_port(fmt).table)
    arrays.wait(0)
    return table


def _launch(kernel: Kernel, source: Any, n: int, row_groups: int, out: Any, stream: Any) -> None:
    """Run a kernel over n values; `row_groups` matters where it has tables for a row."""
    if n == 0:
        return
    grid = -(-n // kernel.values)
    tables = _constants(_device_number(), kernel, row_groups if kernel.row_tables else 0)
    scratch: tuple[Any, ...] = ()
    if kernel.scratch_bytes:
        grid = min(grid, scratch_blocks(kernel))
        scratch = (new((grid, kernel.scratch_bytes // 4), np.float32, stream),)
    kernel.function[grid, kernel.threads, stream](source, *tables, *scratch, out)


def scratch_blocks(kernel: Kernel) -> int:
    """Return how many blocks of threads have scratch: as many as run, or as memory allows."""
    current = getattr(cuda, "get_current_device", None)
    running = RESIDENT * getattr(current() if current else None, "MULTIPROCESSOR_COUNT", 1)
    room = arrays.free_bytes() * SCRATCH_SHARE // kernel.scratch_bytes
    return int(max(1, min(running, room)))


def _device_number() -> int:
    """Return the number of the current device; the simulators have none."""
    current = getattr(cuda, "get_current_device", None)
    return getattr(current(), "id", 0) if current else 0


def _encode(kernel: Kernel, source: Any, row_groups: int, packed: Any, stream: Any) -> None:
    """Encode float32 rows on the device into uint8 rows there, both in C order."""
    if source.size == 0:
        return
    target = words(flat(packed), WORD_BYTES[kernel.types[-1]])
    _launch(kernel, flat(source), source.size, row_groups, target, stream)


def _decode(kernel: Kernel, packed: Any, values: Any, stream: Any) -> None:
    """Decode uint8 rows on the device into float32 rows there, both in C order."""
    if packed.size == 0:
        return
    source = words(flat(packed), WORD_BYTES[kernel.types[0]])
    _launch(kernel, source, values.size, 0, flat(values), stream)


def _chunks(rows: int, n: int) -> Iterator[tuple[int, int]]:
    values = int(min(CHUNK_VALUES, arrays.free_bytes() * CHUNK_SHARE // BYTES_PER_VALUE))
    step = max(1, values // max(1, n))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _target(out: Any, shape: tuple[int, ...], dtype: type, there: bool, stream: Any) -> Any:
    """Return where a result goes: `out` if it is given and right, else a new array."""
    if out is None:
        return new(shape, dtype, stream) if there else np.empty(shape, dtype)
    if is_on_device(out) != there:
        raise InputError("out", "an array on the other side", "one where the input is")
    if there:
        found = arrays.on_device(out, dtype, "out")
        right = found.is_c_contiguous() and arrays.is_aligned(found, 4)
    else:
        found = out
        right = isinstance(out, np.ndarray) and out.dtype == dtype and out.flags.c_contiguous
        right = right and out.flags.writeable
    if not right or tuple(found.shape) != tuple(shape):
        need = f"a C-contiguous {np.dtype(dtype)} array of shape {tuple(shape)}"
        raise InputError("out", f"shape {tuple(out.shape)}", need)
    return found


# --- quantize and dequantize ---------------------------------------------------------------------


def quantize(
    x: Any,
    fmt: str | Format,
    *,
    head_dim: int | None = None,
    side: str | None = None,
    out: Any = None,
    stream: Any = 0,
) -> Any:
    """Quantise rows on the device, byte for byte as `tbq.quantize` does.

    Args:
        x: float32 (..., n), n a multiple of the format's group: a NumPy array, which goes through
            the device in chunks, or anything with `__cuda_array_interface__`, used in place.
        fmt: a Format, a key, a bare name or an alias, of a format that is ported.
        head_dim, side: as for `tbq.quantize`.
        out: uint8 (..., row_bytes), C-contiguous, where x is; a new array if there is none.
        stream: a Numba stream; the result of a device array may still be in the making.

    Returns:
        uint8 (..., row_bytes) where x was: a NumPy array or a Numba device array.

    Raises:
        UnknownFormatError, AmbiguousTypeError: `fmt` names no format, or several.
        InputError: wrong dtype, layout or row length; a choice that is missing or means nothing.
        BackendError: no device, or a format that is not ported; DeviceMemoryError: no room there.
    """
    fmt = _ported(get_format(fmt).at(head_dim=head_dim, side=side))
    kernel, there = _port(fmt).encoder, is_on_device(x)
    source = arrays.on_device(x, np.float32, "x") if there else arrays.on_host(x, np.float32, "x")
    *lead, n = source.shape
    width, groups = fmt.row_bytes(n), n // fmt.group_values
    packed = _target(out, (*lead, width), np.uint8, there, stream)
    if there:
        _encode(kernel, contiguous(source, stream), groups, packed, stream)
        return packed
    rows, target = source.reshape(-1, n), packed.reshape(-1, width)
    for start, stop in _chunks(*rows.shape):
        result = new((stop - start, width), np.uint8, stream)
        _encode(kernel, to_device(rows[start:stop], stream), groups, result, stream)
        fetch(result, stream, target[start:stop])
    return packed


def dequantize(
    packed: Any,
    fmt: str | Format,
    *,
    head_dim: int | None = None,
    side: str | None = None,
    out: Any = None,
    stream: Any = 0,
) -> Any:
    """Dequantise rows on the device, bit for bit as `tbq.dequantize` does.

    Args and errors as for `quantize`, with packed uint8 (..., row_bytes) and out float32 (..., n);
    also CorruptBlockError for host arrays with an outlier beyond its block (on the device it is
    left out).
    """
    fmt = _ported(get_format(fmt).at(head_dim=head_dim, side=side))
    kernel, there = value_decoder(fmt.codec), is_on_device(packed)
    take = arrays.on_device if there else arrays.on_host
    source = take(packed, np.uint8, "packed")
    *lead, width = source.shape
    n = fmt.row_values(width)
    values = _target(out, (*lead, n), np.float32, there, stream)
    if there:
        _decode(kernel, contiguous(source, stream, 4), values, stream)
        return values
    _check_outliers(fmt, source)
    rows, target = source.reshape(-1, width), values.reshape(-1, n)
    for start, stop in _chunks(len(rows), n):
        result = new((stop - start, n), np.float32, stream)
        _decode(kernel, to_device(rows[start:stop], stream), result, stream)
        fetch(result, stream, target[start:stop])
    return values


def _check_outliers(fmt: Format, packed: np.ndarray) -> None:
    if fmt.layout.outliers:
        positions = packed.view(fmt.block)[fmt.layout.outliers[0]]
        beyond = (positions >= fmt.block_values).any(axis=-1).reshape(-1)
        if beyond.any():
            raise CorruptBlockError(fmt.label, int(beyond.argmax()), fmt.codec.corruption)


# --- attention -----------------------------------------------------------------------------------


def scores(q: Any, packed_k: Any, fmt: str | Format, *, out: Any = None, stream: Any = 0) -> Any:
    """Return the dot products of queries with packed keys, bit for bit as `tbq.scores` does.

    Args:
        q: float32 (..., n), on the host or on the device.
        packed_k: uint8 (keys, row_bytes), on the host or on the device.
        fmt: a format for keys that is ported.
        out: float32 (..., keys), C-contiguous, where q is; a new array if there is none.
        stream: a Numba stream.

    Returns:
        float32 (..., keys), where q was.

    Raises:
        As `quantize`; also InputError for a format that is not for keys, or another shape.
    """
    fmt = _ported(side_format(fmt, "K"))
    if fmt.sibling:
        raise BackendError(
            "cuda_port", f"scores of {fmt.label} are not ported; tbq.scores has them"
        )
    rows, keys, n = _rows(packed_k, fmt)
    queries, lead = _given(q, "q", n, f"rows of {n} values, as the keys have", stream)
    there = is_on_device(q)
    result = _target(out, (*lead, keys), np.float32, there, stream)
    if queries.size == 0 or keys == 0:
        return result
    turned, signs = _turned(queries, rows, fmt, stream)
    for start, stop in _row_chunks(rows, n):
        part = new((queries.shape[0], stop - start), np.float32, stream)
        _score(queries, turned, signs, _piece(rows, start, stop, fmt, stream), part, fmt, stream)
        if there:
            target = result.reshape(queries.shape[0], keys)
            arrays.copy(part, target[:, start:stop], stream)
        else:
            fetch(part, stream, result.reshape(-1, keys)[:, start:stop])
    return result


def _given(x: Any, name: str, n: int, need: str, stream: Any) -> tuple[Any, tuple[int, ...]]:
    """Return float32 (rows, n) on the device, and the axes before the last."""
    there = is_on_device(x)
    array = arrays.on_device(x, np.float32, name) if there else arrays.on_host(x, np.float32, name)
    *lead, length = array.shape
    if length != n:
        raise InputError(name, f"{length} in a row", need)
    device = contiguous(array, stream) if there else to_device(array, stream)
    return device.reshape(device.size // max(1, n), n), tuple(lead)


def _rows(packed: Any, fmt: Format) -> tuple[Any, int, int]:
    """Return packed rows where they are, how many, and their values."""
    take = arrays.on_device if is_on_device(packed) else arrays.on_host
    rows = take(packed, np.uint8, "packed")
    if rows.ndim != 2:
        raise InputError("packed rows", f"shape {rows.shape}", "two axes, (keys, row_bytes)")
    return rows, rows.shape[0], fmt.row_values(rows.shape[1])


def _row_chunks(rows: Any, n: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield what is handled at a time: all rows that are on the device, or some from the host."""
    if is_on_device(rows):
        yield 0, rows.shape[0]
        return
    start = 0
    for _, stop in _chunks(-(-rows.shape[0] // multiple), n * multiple):
        stop = min(stop * multiple, rows.shape[0])
        yield start, stop
        start = stop


def _piece(rows: Any, start: int, stop: int, fmt: Format, stream: Any) -> Any:
    """Return what the kernels of attention read of some rows: packed, or their scaled levels."""
    if is_on_device(rows):
        device = contiguous(rows, stream, 4)
    else:
        device = to_device(rows[start:stop], stream)
    leveler = _port(fmt).leveler
    if leveler is None:
        return flat(device)
    scaled = new((stop - start, fmt.row_values(rows.shape[1])), np.float32, stream)
    _decode(leveler, device, scaled, stream)
    return flat(scaled)


def _turned(queries: Any, rows: Any, fmt: Format, stream: Any) -> tuple[Any, Any]:
    """Return the queries rotated by the codec, and the signs of the first key's blocks."""
    port, n = _port(fmt), queries.shape[1]
    groups = n // fmt.group_values
    signs = new((groups if port.signs else 1,), np.uint32, stream)
    if port.signs:
        turned = new(queries.shape, np.float32, stream)
        kernel = attention.sign_rotator(fmt.codec)
        there = is_on_device(rows)
        first = contiguous(rows[:1], stream, 4) if there else to_device(rows[:1], stream)
        grid = -(-groups // attention.THREADS)
        packed = words(flat(first), WORD_BYTES[kernel.types[0]])
        kernel.function[grid, attention.THREADS, stream](packed, queries, turned, signs)
    elif port.rotate is not None:
        turned = new(queries.shape, np.float32, stream)
        _launch(port.rotate, flat(queries), queries.size, 0, flat(turned), stream)
    elif fmt.kernels().rotate is not None:
        by_group = fetch(queries, stream).reshape(-1, groups, fmt.group_values)
        none = np.zeros((1, fmt.row_bytes(n)), np.uint8)
        turned = to_device(rotated_queries(by_group, none, fmt)[0].reshape(-1, n), stream)
    else:
        turned = queries
    return turned, signs


def _sets(count: int) -> Iterator[tuple[int, int]]:
    """Yield (first, how many) of queries or weights that one launch handles."""
    first = 0
    while first < count:
        size = max(n for n in attention.SETS if n <= count - first)
        yield first, size
        first += size


def _score(
    queries: Any, turned: Any, signs: Any, packed: Any, part: Any, fmt: Format, stream: Any
) -> None:
    """Set part (queries, keys) to scores of some keys."""
    keys, width = part.shape[1], fmt.group_values
    table = _table(_device_number(), fmt)
    for first, size in _sets(queries.shape[0]):
        kernel = attention.score_kernel(fmt.codec, size)
        groups, per_block = attention.score_layout(width, size, queries.shape[1] // width)
        batches = max(1, min(attention.BATCHES, keys // (per_block * BLOCKS_WANTED)))
        grid = -(-keys // (per_block * batches))
        source = _as_words(packed, kernel.types[0])
        mine = slice(first, first + size)
        arguments = source, table, queries[mine], turned[mine], signs, groups, batches, part[mine]
        kernel.function[grid, kernel.threads, stream](*arguments)


def _as_words(packed: Any, type_name: str) -> Any:
    """Return packed rows, or levels, flat on the device, as the words that a kernel reads."""
    return words(packed, WORD_BYTES[type_name]) if packed.dtype == np.uint8 else packed.view("u4")


def weighted_sum(
    p: Any, packed_v: Any, fmt: str | Format, *, out: Any = None, stream: Any = 0
) -> Any:
    """Return weighted sums of packed values, bit for bit as `tbq.weighted_sum` does.

    Args:
        p: float32 (..., keys), on the host or on the device.
        packed_v: uint8 (keys, row_bytes), on the host or on the device.
        fmt: a format for values that is ported.
        out: float32 (..., n), C-contiguous, where p is; a new array if there is none.
        stream: a Numba stream.

    Returns:
        float32 (..., n), where p was.

    Raises:
        As `quantize`; also InputError for a format that is not for values, or another shape.
    """
    fmt = _ported(side_format(fmt, "V"))
    rows, keys, n = _rows(packed_v, fmt)
    weights, lead = _given(p, "p", keys, f"{keys} weights, one per row of values", stream)
    if not is_on_device(rows):
        _check_outliers(fmt, rows)
    there = is_on_device(p)
    result = _target(out, (*lead, n), np.float32, there, stream)
    sets = result.size // n
    if sets == 0:
        return result
    total = to_device(np.zeros((sets, n), np.float32), stream)
    for start, stop in _row_chunks(rows, n, RUN_KEYS):
        if stop > start:
            mine = weights
            if stop - start < keys:
                mine = new((sets, stop - start), np.float32, stream)
                arrays.copy(weights[:, start:stop], mine, stream)
            _add_runs(mine, _piece(rows, start, stop, fmt, stream), total, fmt, stream)
    if turns_back(fmt):
        turned = new((sets, n), np.float32, stream)
        unrotate = _port(fmt).unrotate
        assert unrotate is not None, "sums are turned back"
        _launch(unrotate, flat(total), total.size, 0, flat(turned), stream)
        total = turned
    if there:
        arrays.copy(total, result.reshape(sets, n), stream)
        return result
    return fetch(total, stream, result)


def _add_runs(weights: Any, packed: Any, total: Any, fmt: Format, stream: Any) -> None:
    """Add the runs of some keys to total (sets, n), in order."""
    n, runs = total.shape[1], -(-weights.shape[1] // RUN_KEYS)
    table, per_run = _table(_device_number(), fmt), n // attention.sum_slice(fmt.codec)
    blocks = -(-per_run // attention.THREADS)
    for first, size in _sets(total.shape[0]):
        kernel, gather = attention.sum_kernel(fmt.codec, size), attention.gather_kernel()
        partial = new((runs, size, n), np.float32, stream)
        mine, source = slice(first, first + size), _as_words(packed, kernel.types[0])
        launch = kernel.function[runs * blocks, attention.THREADS, stream]
        launch(source, table, weights[mine], partial)
        grid = -(-size * n // attention.THREADS)
        gather.function[grid, attention.THREADS, stream](partial, total[mine])
