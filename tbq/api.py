"""`quantize` and `dequantize`: the only validation and the only large allocation of the codec."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import numpy as np

from tbq.errors import CorruptBlockError, InputError
from tbq.format import Format
from tbq.registry import get_format

# Values per unit of work: large enough to hide the call, small enough to stay in cache, and a
# few units per thread, for formats that take a millisecond per block.
MIN_CHUNK_VALUES, CHUNK_VALUES = 1 << 13, 1 << 17
SEARCH_VALUES = SMALL_VALUES = (
    1 << 12
)  # a search takes microseconds for each; a signal is answered between calls
CHUNKS_PER_THREAD = 8
# What arrays hold; made once, as a call for one row is short.
UINT8, FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)


def quantize(
    x: np.ndarray,
    fmt: str | Format,
    *,
    head_dim: int | None = None,
    side: str | None = None,
    mean: np.ndarray | None = None,
    first_block: int = 0,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Quantise rows of floats into packed blocks, byte for byte as the dialect's own code does.

    Args:
        x: real floating array (..., n); the last axis is a row and n a multiple of the format's
            group of blocks. float16, bfloat16, float64 and longdouble are rounded to float32
            first. Any strides and byte order. NaN and infinities give what the C code gives.
        fmt: a Format, a key such as "pr21089:tbq3_0", a bare name or an alias.
        head_dim: values per head of the cache, for formats that depend on it.
        side: "K" or "V", for formats that differ between them.
        mean: float32 (n,), subtracted from every row first, for formats whose fork does that.
        first_block: where the index of groups (or cells) starts, for codecs whose `position` runs
            on through the tensor; 0 for all others.
        out: C-contiguous uint8 array (..., row_bytes) to write into.
        threads: worker threads; None uses all available cores. Never changes a byte.

    Returns:
        uint8 array (..., row_bytes), `out` if that was given.

    Raises:
        UnknownFormatError, AmbiguousTypeError: `fmt` names no format, or several.
        InputError: wrong dtype, row length or `out`; a finite value beyond float32; a choice of
            head_dim or side that is missing, or made where there is none.

    >>> import numpy as np
    >>> quantize(np.zeros((2, 256), np.float32), "tbq3_0").shape
    (2, 98)
    """
    fmt = get_format(fmt).at(head_dim, side)
    x = checked_floating(x)
    n = x.shape[-1]
    if mean is not None:
        mean = _checked_mean(mean, fmt, n)
    if first_block:
        _check_first_block(first_block, fmt, n)
    out = _output(out, (*x.shape[:-1], fmt.row_bytes(n)), UINT8)
    rows, packed = _as_rows(x), _as_rows(out)
    kernel = fmt.kernels().quantize
    if mean is None and _is_small(x.size, threads):
        kernel(kernel_input(as_float32(rows)), packed, first_block)
        return out
    step = index_step(fmt, n)

    def work(start: int, stop: int) -> None:
        values = as_float32(rows[start:stop])
        if mean is not None:
            with np.errstate(all="ignore"):  # each thread has its own
                values = values - mean
        kernel(kernel_input(values), packed[start:stop], first_block + start * step)

    most = SEARCH_VALUES if fmt.codec.searches else CHUNK_VALUES
    _for_row_chunks(work, len(rows), n, threads, most)
    return out


def _check_first_block(first_block: int, fmt: Format, n: int) -> None:
    if not index_step(fmt, n):
        need = f"0: blocks of {fmt.label} do not depend on their position in the tensor"
        raise InputError("first_block", str(first_block), need)
    if first_block < 0:
        raise InputError("first_block", str(first_block), "a non-negative block index")


def _is_small(size: int, threads: int | None) -> bool:
    """Return whether values are few, as a token's are: looking for cores would take longer."""
    return 0 < size <= SMALL_VALUES and (threads is None or threads > 0)


def _as_rows(array: np.ndarray) -> np.ndarray:
    return array if array.ndim == 2 else array.reshape(-1, array.shape[-1])


def dequantize(
    packed: np.ndarray,
    fmt: str | Format,
    *,
    head_dim: int | None = None,
    side: str | None = None,
    original: bool = False,
    mean: np.ndarray | None = None,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Dequantise packed rows to float32, bit for bit as the dialect's own code does.

    Args:
        packed: uint8 array (..., row_bytes), row_bytes a multiple of the bytes of a group.
        fmt: a Format, a key such as "pr21089:tbq3_0", a bare name or an alias.
        head_dim: values per head of the cache, for formats that depend on it.
        side: "K" or "V", for formats that differ between them.
        original: undo the rotation that the encoder applied and the decoder leaves to the graph,
            so that the values are in the domain the encoder takes.
        mean: what was subtracted when the rows were quantised, float32 (n,); it is added again.
            Needs `original` where the decoder gives rotated values.
        out: C-contiguous float32 array (..., n) to write into.
        threads: worker threads; None uses all available cores. Never changes a bit.

    Returns:
        float32 array (..., n), `out` if that was given; in the domain that the codec `gives`.

    Raises:
        UnknownFormatError, AmbiguousTypeError: `fmt` names no format, or several.
        InputError: wrong dtype, row length or `out`; a choice that is missing or means nothing.
        CorruptBlockError: an outlier's position is beyond its block, where C writes out of bounds.
    """
    fmt = get_format(fmt).at(head_dim, side)
    packed = checked_packed(packed)
    n = fmt.row_values(packed.shape[-1])
    out = _output(out, (*packed.shape[:-1], n), FLOAT32)
    rows, y = _as_rows(packed), _as_rows(out)
    if mean is not None:
        mean = _checked_mean(mean, fmt, n)
        if not original and fmt.codec.gives != fmt.codec.takes:
            raise InputError("mean", "an array", "original=True too: the values would be rotated")
    kernel = _restorer(fmt) if original else fmt.kernels().dequantize

    def decode(rows: np.ndarray, y: np.ndarray, start: int) -> None:
        corrupt = kernel(kernel_input(rows), y)
        if mean is not None:
            with np.errstate(all="ignore"):
                y += mean
        if corrupt is not None and corrupt >= 0:
            block = start * (n // fmt.block_values) + corrupt
            raise CorruptBlockError(fmt.label, block, fmt.codec.corruption)

    if _is_small(y.size, threads):
        decode(rows, y, 0)
    else:
        _for_row_chunks(lambda i, j: decode(rows[i:j], y[i:j], i), len(rows), n, threads)
    return out


def _checked_mean(mean: Any, fmt: Format, n: int) -> np.ndarray:
    if not fmt.takes_mean:
        raise InputError("mean", "an array", f"none: no mean is subtracted for {fmt.label}")
    mean = as_float32(checked_floating(mean, "mean"))
    if mean.shape != (n,):
        raise InputError("mean", f"shape {mean.shape}", f"({n},), one per value of a row")
    return mean


def _restorer(fmt: Format) -> Callable[[np.ndarray, np.ndarray], Any]:
    """Return the kernel that decodes to the domain that the encoder takes."""
    kernels = fmt.kernels()
    if fmt.codec.gives == fmt.codec.takes:
        return kernels.dequantize
    if kernels.restore is not None:
        return kernels.restore
    size, unrotate = fmt.block_bytes * fmt.codec.group_blocks, kernels.unrotate
    assert unrotate is not None, "the codec rotates"

    def restore(packed: np.ndarray, y: np.ndarray) -> int | None:
        corrupt = kernels.dequantize(packed, y)
        unrotate(y.reshape(-1, fmt.group_values), packed.reshape(-1, size))
        return corrupt

    return restore


def index_step(fmt: Format, n: int) -> int:
    """Return how far the index of a row of n values is from that of the row before."""
    position = fmt.codec.position
    if position == "tensor":
        return n // fmt.group_values
    return 1 if position == "cell" else 0


def quantize_paired(
    x: np.ndarray,
    sibling: np.ndarray,
    fmt: str | Format = "xktq2_1",
    *,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Quantise rows beside rows of the format's sibling, whose codes they borrow.

    Args:
        x: real floating array (..., n), as for `quantize`.
        sibling: packed rows of the sibling format (for xktq2_1: ktq2_1, uint8 (..., n/32*14)),
            leading axes as in x.
        fmt: a format that borrows codes.
        out: C-contiguous uint8 array (..., row_bytes) to write into.
        threads: worker threads; None uses all available cores.

    Returns:
        uint8 array (..., row_bytes): the sibling's shape under scales that restore the norms of x.

    Raises:
        InputError: wrong dtype, row length, sibling or `out`; a finite value beyond float32; a
            format that does not borrow.
    """
    fmt, lender = _pair(fmt)
    x = checked_floating(x)
    out = _output(out, (*x.shape[:-1], fmt.row_bytes(x.shape[-1])), UINT8)
    siblings = sibling_blocks(sibling, lender, x.shape)
    kernel, _ = _paired_kernels(fmt)
    rows, packed = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
    row_blocks = x.shape[-1] // fmt.block_values

    def work(start: int, stop: int) -> None:
        values = as_float32(rows[start:stop]).reshape(-1, fmt.block_values)
        lent = siblings[start * row_blocks : stop * row_blocks]
        target = packed[start:stop].reshape(-1, fmt.block_bytes)
        kernel(kernel_input(values), kernel_input(lent), target)

    _for_row_chunks(work, *rows.shape, threads)
    return out


def dequantize_paired(
    packed: np.ndarray,
    sibling: np.ndarray,
    fmt: str | Format = "xktq2_1",
    *,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Dequantise rows beside rows of the format's sibling; see `quantize_paired`.

    Returns:
        float32 array (..., n), `out` if that was given.

    Raises:
        InputError: wrong dtype, row length, sibling or `out`; a format that does not borrow.
    """
    fmt, lender = _pair(fmt)
    packed = checked_packed(packed)
    shape = (*packed.shape[:-1], fmt.row_values(packed.shape[-1]))
    out = _output(out, shape, FLOAT32)
    siblings = sibling_blocks(sibling, lender, shape)
    _, kernel = _paired_kernels(fmt)
    rows, y = packed.reshape(-1, packed.shape[-1]), out.reshape(-1, shape[-1])
    row_blocks = shape[-1] // fmt.block_values

    def work(start: int, stop: int) -> None:
        blocks = np.ascontiguousarray(rows[start:stop]).reshape(-1, fmt.block_bytes)
        lent = siblings[start * row_blocks : stop * row_blocks]
        target = y[start:stop].reshape(-1, fmt.block_values)
        kernel(kernel_input(blocks), kernel_input(lent), target)

    _for_row_chunks(work, *y.shape, threads)
    return out


def _pair(name: str | Format) -> tuple[Format, Format]:
    fmt = get_format(name)
    if not fmt.sibling:
        raise InputError("fmt", fmt.label, "a format that borrows the codes of a sibling")
    return fmt, get_format(fmt.sibling)


def _paired_kernels(fmt: Format) -> Any:
    return sys.modules[fmt.kernels().quantize.__module__].paired_kernels(fmt.codec)


def sibling_blocks(sibling: np.ndarray, lender: Format, shape: tuple[int, ...]) -> np.ndarray:
    """Check packed sibling rows for values of this shape; return their blocks (n, bytes)."""
    sibling = np.asarray(sibling)
    need = (*shape[:-1], lender.row_bytes(shape[-1]))
    if sibling.dtype != np.uint8 or sibling.shape != need:
        got = f"{sibling.dtype} array of shape {sibling.shape}"
        raise InputError("sibling", got, f"packed {lender.label} rows, uint8 array of shape {need}")
    return np.ascontiguousarray(sibling).reshape(-1, lender.block_bytes)


def checked_packed(packed: np.ndarray) -> np.ndarray:
    """Return packed rows as an array; InputError if they are not uint8 (..., row_bytes)."""
    packed = np.asarray(packed)
    if packed.dtype != np.uint8 or packed.ndim == 0:
        got = f"{packed.dtype} array of shape {packed.shape}"
        raise InputError("packed", got, "uint8 array (..., row_bytes)")
    return packed


def checked_floating(x: np.ndarray, argument: str = "x") -> np.ndarray:
    """Return floats as an array (..., n) of their dtype; InputError if they are not real floats."""
    x = np.asarray(x)
    # bfloat16 comes from ml_dtypes, which registers it with NumPy as a dtype of kind "V".
    if x.dtype.kind != "f" and x.dtype.name != "bfloat16":
        raise InputError(argument, f"dtype {x.dtype}", "a real floating dtype")
    if x.ndim == 0:
        raise InputError(argument, "a scalar", "an array (..., n)")
    return x


def as_float32(rows: np.ndarray) -> np.ndarray:
    """Return rows as native, contiguous float32; refuse finite values that would overflow."""
    if rows.dtype == FLOAT32:
        return rows if rows.flags.c_contiguous else rows.copy()
    with np.errstate(all="ignore"):  # of this thread; the caller's would raise or warn
        narrow = np.ascontiguousarray(rows, np.float32)
    if rows.dtype.itemsize <= 4:
        return narrow
    overflow = np.isinf(narrow) & np.isfinite(rows)
    if overflow.any():
        value = rows[overflow][0]
        raise InputError("x", f"{rows.dtype} value {value}", "values within float32's range")
    return narrow


def kernel_input(rows: np.ndarray) -> np.ndarray:
    """Return what a kernel is to read: contiguous, aligned and a view that cannot be written.

    Kernels are compiled for such arrays alone. Those of a file that is mapped, or written to, or at
    an odd place in it, would each be another type, for which all is compiled again.
    """
    flags = rows.flags
    if not (flags.c_contiguous and flags.aligned):
        rows = rows.copy()
    elif not flags.writeable:
        return rows
    rows = rows.view()
    rows.setflags(write=False)
    return rows


def _output(out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype)
    if (
        not isinstance(out, np.ndarray)
        or out.shape != shape
        or out.dtype != dtype
        or not out.flags.c_contiguous
        or not out.flags.writeable
    ):
        got = (
            f"{out.dtype} {out.shape} array, contiguous={out.flags.c_contiguous}, "
            f"writeable={out.flags.writeable}"
            if isinstance(out, np.ndarray)
            else type(out).__name__
        )
        raise InputError("out", got, f"writeable C-contiguous {dtype} array of shape {shape}")
    return out


def available_cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _for_row_chunks(
    work: Callable[[int, int], Any],
    n_rows: int,
    row_values: int,
    threads: int | None,
    most: int = CHUNK_VALUES,
) -> None:
    """Call work(start, stop) over chunks of rows that cover range(n_rows), on a thread pool."""
    if threads is not None and threads < 1:
        raise InputError("threads", str(threads), "at least 1")
    if threads is None:
        threads = available_cores()
    share = n_rows * row_values // (threads * CHUNKS_PER_THREAD)
    step = max(1, min(max(share, MIN_CHUNK_VALUES), most) // row_values)
    starts = range(0, n_rows, step)
    if min(threads, len(starts)) <= 1:
        for start in starts:
            work(start, min(start + step, n_rows))
        return
    failed: list[tuple[int, Exception]] = []
    remaining = iter(starts)

    def run() -> None:
        for start in remaining:  # of all threads: each takes what is next
            if failed:
                return
            try:
                work(start, min(start + step, n_rows))
            except Exception as error:
                failed.append((start, error))

    others = [_pool(threads - 1).submit(run) for _ in range(min(threads, len(starts)) - 1)]
    try:
        run()
    except BaseException:  # Ctrl-C
        for _ in remaining:  # nothing else begins
            pass
        raise
    finally:
        wait([other for other in others if not other.cancel()])
    if failed:
        raise min(failed, key=lambda found: found[0])[1]  # whichever thread was first


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that wait for work: starting some takes as long as a thousand rows."""
    return ThreadPoolExecutor(threads, thread_name_prefix="tbq")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
