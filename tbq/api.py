"""`quantize` and `dequantize`: the only validation and the only large allocation of the codec."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tbq.errors import CorruptBlockError, InputError
from tbq.format import Format
from tbq.registry import get_format

# Values per unit of work: large enough to hide the call, small enough to stay in cache, and a
# few units per thread, for formats that take a millisecond per block.
MIN_CHUNK_VALUES, CHUNK_VALUES = 1 << 13, 1 << 17
SEARCH_VALUES = 1 << 12  # a search takes microseconds for each; a signal is answered between calls
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
    fmt = get_format(fmt).at(head_dim=head_dim, side=side)
    x = checked_floating(x)
    mean = _checked_mean(mean, fmt, x.shape[-1])
    packed_shape = (*x.shape[:-1], fmt.row_bytes(x.shape[-1]))
    step = index_step(fmt, x.shape[-1])
    if first_block and not step:
        need = f"0: blocks of {fmt.label} do not depend on their position in the tensor"
        raise InputError("first_block", str(first_block), need)
    if first_block < 0:
        raise InputError("first_block", str(first_block), "a non-negative block index")
    out = _output(out, packed_shape, UINT8)
    rows, packed = x.reshape(-1, x.shape[-1]), out.reshape(-1, packed_shape[-1])
    kernel = fmt.kernels().quantize

    def work(start: int, stop: int) -> None:
        values = as_float32(rows[start:stop])
        if mean is not None:
            with np.errstate(all="ignore"):  # each thread has its own
                values = values - mean
        kernel(values, packed[start:stop], first_block + start * step)

    most = SEARCH_VALUES if fmt.codec.searches else CHUNK_VALUES
    _for_row_chunks(work, *rows.shape, threads, most)
    return out


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
    fmt = get_format(fmt).at(head_dim=head_dim, side=side)
    packed = checked_packed(packed)
    shape = (*packed.shape[:-1], fmt.row_values(packed.shape[-1]))
    out = _output(out, shape, FLOAT32)
    rows, y = packed.reshape(-1, packed.shape[-1]), out.reshape(-1, shape[-1])
    mean = _checked_mean(mean, fmt, shape[-1])
    if mean is not None and not original and fmt.codec.gives != fmt.codec.takes:
        raise InputError("mean", "an array", "original=True too: the values would be rotated")
    kernel = _restorer(fmt) if original else fmt.kernels().dequantize

    def work(start: int, stop: int) -> None:
        corrupt = kernel(np.ascontiguousarray(rows[start:stop]), y[start:stop])
        if mean is not None:
            with np.errstate(all="ignore"):
                y[start:stop] += mean
        if corrupt is not None and corrupt >= 0:
            block = start * (shape[-1] // fmt.block_values) + corrupt
            raise CorruptBlockError(fmt.label, block, fmt.codec.corruption)

    _for_row_chunks(work, *y.shape, threads)
    return out


def _checked_mean(mean, fmt: Format, n: int) -> np.ndarray | None:
    if mean is None:
        return None
    if not fmt.takes_mean:
        raise InputError("mean", "an array", f"none: no mean is subtracted for {fmt.label}")
    mean = as_float32(checked_floating(mean, "mean"))
    if mean.shape != (n,):
        raise InputError("mean", f"shape {mean.shape}", f"({n},), one per value of a row")
    return mean


def _restorer(fmt: Format):
    """Return the kernel that decodes to the domain that the encoder takes."""
    kernels = fmt.kernels()
    if fmt.codec.gives == fmt.codec.takes:
        return kernels.dequantize
    if kernels.restore is not None:
        return kernels.restore
    size = fmt.block_bytes * fmt.codec.group_blocks

    def restore(packed, y):
        corrupt = kernels.dequantize(packed, y)
        kernels.unrotate(y.reshape(-1, fmt.group_values), packed.reshape(-1, size))
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
        kernel(values, lent, packed[start:stop].reshape(-1, fmt.block_bytes))

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
        kernel(blocks, lent, y[start:stop].reshape(-1, fmt.block_values))

    _for_row_chunks(work, *y.shape, threads)
    return out


def _pair(name: str | Format) -> tuple[Format, Format]:
    fmt = get_format(name)
    if not fmt.sibling:
        raise InputError("fmt", fmt.label, "a format that borrows the codes of a sibling")
    return fmt, get_format(fmt.sibling)


def _paired_kernels(fmt: Format):
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
    if rows.dtype == np.float32:
        return np.ascontiguousarray(rows, np.float32)
    with np.errstate(all="ignore"):  # of this thread; the caller's would raise or warn
        narrow = np.ascontiguousarray(rows, np.float32)
    if rows.dtype.itemsize <= 4:
        return narrow
    overflow = np.isinf(narrow) & np.isfinite(rows)
    if overflow.any():
        value = rows[overflow][0]
        raise InputError("x", f"{rows.dtype} value {value}", "values within float32's range")
    return narrow


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
    work, n_rows: int, row_values: int, threads: int | None, most: int = CHUNK_VALUES
) -> None:
    """Call work(start, stop) over chunks of rows that cover range(n_rows), on a thread pool."""
    if threads is not None and threads < 1:
        raise InputError("threads", str(threads), "at least 1")
    if n_rows and n_rows * row_values <= min(MIN_CHUNK_VALUES, most):
        work(0, n_rows)  # a token's rows: looking for cores would take longer
        return
    if threads is None:
        threads = available_cores()
    share = n_rows * row_values // (threads * CHUNKS_PER_THREAD)
    step = max(1, min(max(share, MIN_CHUNK_VALUES), most) // row_values)
    starts = range(0, n_rows, step)
    threads = min(threads, len(starts))
    if threads <= 1:
        for start in starts:
            work(start, min(start + step, n_rows))
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in [pool.submit(work, start, min(start + step, n_rows)) for start in starts]:
                done.result()
        except BaseException:  # Ctrl-C too: what has not begun is not worth waiting for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
