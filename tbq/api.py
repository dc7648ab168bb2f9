"""`quantize` and `dequantize`: the only validation and the only large allocation of the codec."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tbq.errors import CorruptBlockError, InputError
from tbq.format import Format
from tbq.registry import get_format

# Values per unit of work: large enough to hide the call, small enough to stay in cache, and a
# few units per thread, for formats that take a millisecond per block.
MIN_CHUNK_VALUES, CHUNK_VALUES = 1 << 13, 1 << 17
CHUNKS_PER_THREAD = 8


def quantize(
    x: np.ndarray,
    fmt: str | Format,
    *,
    first_block: int = 0,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Quantise rows of floats into packed blocks, byte for byte as the dialect's C code does.

    Args:
        x: real floating array (..., n); the last axis is a row and n a multiple of the format's
            block. float16, bfloat16, float64 and longdouble are rounded to float32 first. Any
            strides and byte order. NaN and infinities give what the C code gives.
        fmt: a Format, a key such as "pr21089:tbq3_0", a bare name or an alias.
        first_block: where the block index starts, for formats whose index runs on through the
            tensor (`block_index == "tensor"`); 0 for all others.
        out: C-contiguous uint8 array (..., row_bytes) to write into.
        threads: worker threads; None uses all available cores. Never changes a byte.

    Returns:
        uint8 array (..., row_bytes), `out` if that was given.

    Raises:
        UnknownFormatError, AmbiguousTypeError: `fmt` names no format, or several.
        InputError: wrong dtype, row length or `out`; a finite value beyond float32.

    >>> import numpy as np
    >>> quantize(np.zeros((2, 256), np.float32), "tbq3_0").shape
    (2, 98)
    """
    fmt = get_format(fmt)
    x = checked_floating(x)
    packed_shape = (*x.shape[:-1], fmt.row_bytes(x.shape[-1]))
    if first_block and fmt.block_index != "tensor":
        need = f"0: blocks of {fmt.key} do not depend on their position in the tensor"
        raise InputError("first_block", str(first_block), need)
    if first_block < 0:
        raise InputError("first_block", str(first_block), "a non-negative block index")
    out = _output(out, packed_shape, np.dtype(np.uint8))
    rows, packed = x.reshape(-1, x.shape[-1]), out.reshape(-1, packed_shape[-1])
    row_blocks = x.shape[-1] // fmt.block_values if fmt.block_index == "tensor" else 0
    kernel = fmt.kernels().quantize

    def work(start: int, stop: int) -> None:
        kernel(as_float32(rows[start:stop]), packed[start:stop], first_block + start * row_blocks)

    _for_row_chunks(work, *rows.shape, threads)
    return out


def dequantize(
    packed: np.ndarray,
    fmt: str | Format,
    *,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Dequantise packed rows to float32, bit for bit as the dialect's C code does.

    Args:
        packed: uint8 array (..., row_bytes), row_bytes a multiple of the format's block bytes.
        fmt: a Format, a key such as "pr21089:tbq3_0", a bare name or an alias.
        out: C-contiguous float32 array (..., n) to write into.
        threads: worker threads; None uses all available cores. Never changes a bit.

    Returns:
        float32 array (..., n), `out` if that was given.

    Raises:
        UnknownFormatError, AmbiguousTypeError: `fmt` names no format, or several.
        InputError: wrong dtype, row length or `out`.
        CorruptBlockError: an outlier's position is beyond its block, where C writes out of bounds.
    """
    fmt = get_format(fmt)
    packed = checked_packed(packed)
    shape = (*packed.shape[:-1], fmt.row_values(packed.shape[-1]))
    out = _output(out, shape, np.dtype(np.float32))
    rows, y = packed.reshape(-1, packed.shape[-1]), out.reshape(-1, shape[-1])
    kernel = fmt.kernels().dequantize

    def work(start: int, stop: int) -> None:
        corrupt = kernel(np.ascontiguousarray(rows[start:stop]), y[start:stop])
        if corrupt is not None and corrupt >= 0:
            block = start * (shape[-1] // fmt.block_values) + corrupt
            raise CorruptBlockError(fmt.key, block, "an outlier lies outside the block")

    _for_row_chunks(work, *y.shape, threads)
    return out


def quantize_paired(
    x: np.ndarray, sibling: np.ndarray, *, out: np.ndarray | None = None, threads: int | None = None
) -> np.ndarray:
    """Quantise rows to xktq2_1 beside rows of its sibling format, whose codes they borrow.

    Args:
        x: real floating array (..., n), as for `quantize`.
        sibling: packed ktq2_1 rows, uint8 (..., n/32*14), leading axes as in x.
        out: C-contiguous uint8 array (..., n/32*8) to write into.
        threads: worker threads; None uses all available cores.

    Returns:
        uint8 array (..., n/32*8): the sibling's shape under scales that restore the norms of x.

    Raises:
        InputError: wrong dtype, row length, sibling or `out`; a finite value beyond float32.
    """
    fmt, lender = _pair()
    x = checked_floating(x)
    out = _output(out, (*x.shape[:-1], fmt.row_bytes(x.shape[-1])), np.dtype(np.uint8))
    siblings = sibling_blocks(sibling, lender, x.shape)
    kernel, levels = _paired_kernels()
    rows, packed = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
    row_blocks = x.shape[-1] // fmt.block_values

    def work(start: int, stop: int) -> None:
        values = as_float32(rows[start:stop]).reshape(-1, fmt.block_values)
        lent = siblings[start * row_blocks : stop * row_blocks]
        kernel.quantize_paired(
            values, lent, levels, packed[start:stop].reshape(-1, fmt.block_bytes)
        )

    _for_row_chunks(work, *rows.shape, threads)
    return out


def dequantize_paired(
    packed: np.ndarray,
    sibling: np.ndarray,
    *,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Dequantise xktq2_1 rows beside rows of their sibling format; see `quantize_paired`.

    Returns:
        float32 array (..., n), `out` if that was given.

    Raises:
        InputError: wrong dtype, row length, sibling or `out`.
    """
    fmt, lender = _pair()
    packed = checked_packed(packed)
    shape = (*packed.shape[:-1], fmt.row_values(packed.shape[-1]))
    out = _output(out, shape, np.dtype(np.float32))
    siblings = sibling_blocks(sibling, lender, shape)
    kernel, levels = _paired_kernels()
    rows, y = packed.reshape(-1, packed.shape[-1]), out.reshape(-1, shape[-1])
    row_blocks = shape[-1] // fmt.block_values

    def work(start: int, stop: int) -> None:
        blocks = np.ascontiguousarray(rows[start:stop]).reshape(-1, fmt.block_bytes)
        lent = siblings[start * row_blocks : stop * row_blocks]
        kernel.dequantize_paired(blocks, lent, levels, y[start:stop].reshape(-1, fmt.block_values))

    _for_row_chunks(work, *y.shape, threads)
    return out


def _pair() -> tuple[Format, Format]:
    fmt = get_format("llama-tq:xktq2_1")
    return fmt, get_format(fmt.sibling)


def _paired_kernels():
    from tbq.kernels import xktq  # imports Numba

    return xktq, xktq.LEVELS


def sibling_blocks(sibling: np.ndarray, lender: Format, shape: tuple[int, ...]) -> np.ndarray:
    """Check packed sibling rows for values of this shape; return their blocks (n, bytes)."""
    sibling = np.asarray(sibling)
    need = (*shape[:-1], lender.row_bytes(shape[-1]))
    if sibling.dtype != np.uint8 or sibling.shape != need:
        got = f"{sibling.dtype} array of shape {sibling.shape}"
        raise InputError("sibling", got, f"packed {lender.key} rows, uint8 array of shape {need}")
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
    if rows.dtype.itemsize <= 4:
        return np.ascontiguousarray(rows, np.float32)
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(rows, np.float32)
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


def _for_row_chunks(work, n_rows: int, row_values: int, threads: int | None) -> None:
    """Call work(start, stop) over chunks of rows that cover range(n_rows), on a thread pool."""
    if threads is None:
        threads = available_cores()
    if threads < 1:
        raise InputError("threads", str(threads), "at least 1")
    share = n_rows * row_values // (threads * CHUNKS_PER_THREAD)
    step = max(1, min(max(share, MIN_CHUNK_VALUES), CHUNK_VALUES) // row_values)
    starts = range(0, n_rows, step)
    threads = min(threads, len(starts))
    if threads <= 1:
        for start in starts:
            work(start, min(start + step, n_rows))
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, start, min(start + step, n_rows)) for start in starts]:
            done.result()
