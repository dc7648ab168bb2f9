"""Input files: mapped to be parsed, read in pieces to be converted, and watched for changes."""

from __future__ import annotations

import mmap
import os
import stat
import weakref
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tbq import ClosedFileError, FileFormatError

HEAD_BYTES = 1 << 16  # that a file is known by


class Mark(NamedTuple):
    """What tells a file from another one under its path, here or on another machine."""

    path: str
    n_bytes: int
    modified: int
    digest: bytes


class MappedFile(mmap.mmap):
    """A read-only map of a file, which also reads pieces of it in a way that cannot crash.

    Touching a mapped page that the file no longer has kills the process (SIGBUS), and a file that
    is overwritten changes under its reader. Bulk data are therefore read with `read_at`, and that
    fails where the file is not what it was when it was opened.
    """

    path: Path
    _descriptor: int
    _state: tuple[int, int]
    _closed = False

    def close(self) -> None:
        """Unmap the file; BufferError, and the map lives on, while arrays view it."""
        self._closed = True
        super().close()

    def require_open(self) -> None:
        """Raise ClosedFileError if the file was closed."""
        if self._closed:
            raise ClosedFileError(self.path)

    def read_at(self, start: int, n_bytes: int) -> np.ndarray:
        """Return bytes [start, start + n_bytes) as a new uint8 array.

        Raises:
            FileFormatError: the file was truncated, or written to, after it was opened.
        """
        return self.read_grid(start, n_bytes, 1, n_bytes)[0]

    def read_grid(self, start: int, stride: int, count: int, n_bytes: int) -> np.ndarray:
        """Return n_bytes from each of `count` places, `stride` bytes apart: uint8 (count, n_bytes).

        Raises:
            FileFormatError: the file was truncated, or written to, after it was opened.
        """
        data = np.empty((count, n_bytes), np.uint8)
        if stride == n_bytes:
            self._fill(data.reshape(-1), start)
        else:
            for i, row in enumerate(data):
                self._fill(row, start + i * stride)
        self.check_unchanged()
        return data

    def read_rows(self, start: int, n_bytes: int, rows: np.ndarray) -> np.ndarray:
        """Return some rows, int (n,), of those that start at `start`: uint8 (n, n_bytes).

        Raises:
            FileFormatError: the file was truncated, or written to, after it was opened.
        """
        data = np.empty((len(rows), n_bytes), np.uint8)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for first, last in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            if first < last:  # rows that lie one after the other are read together
                self._fill(data[first:last].reshape(-1), start + int(rows[first]) * n_bytes)
        self.check_unchanged()
        return data

    def mark(self) -> Mark:
        """Return size, modification time and a digest of the first bytes, under the full path.

        Raises:
            FileFormatError: the file was truncated, or written to, after it was opened.
        """
        n_bytes, modified = self._state
        head = self.read_at(0, min(n_bytes, HEAD_BYTES))
        return Mark(os.path.abspath(self.path), n_bytes, modified, blake2b(head.data).digest())

    def _fill(self, out: np.ndarray, start: int) -> None:
        """Read into contiguous uint8 `out`; FileFormatError if the file ends before."""
        self.require_open()
        done = 0
        while done < len(out):
            piece = _read_into(self._descriptor, out[done:], start + done)
            if not piece:
                self.check_unchanged()  # says so if the file is shorter now
                raise FileFormatError(self.path, start + done, "the file ends here")
            done += piece

    def check_unchanged(self) -> None:
        """Raise FileFormatError if size or modification time are not what they were."""
        size, modified = _state(self._descriptor)
        if size != self._state[0]:
            reason = f"had {self._state[0]} bytes when it was opened and has {size} now"
            raise FileFormatError(self.path, None, reason)
        if modified != self._state[1]:
            raise FileFormatError(self.path, None, "was written to while it was read")


def find_marked(mark: Mark) -> MappedFile | None:
    """Return the file that was marked, if this machine sees it as the one that marked it did."""
    try:
        file = map_file(mark.path)
        return file if file.mark() == mark else None
    except (OSError, FileFormatError):
        return None


def map_file(path: str | os.PathLike[str]) -> MappedFile:
    """Map a regular, non-empty file read-only.

    Raises:
        FileFormatError: the path is not a regular file, or it is empty.
        OSError: it cannot be opened.
    """
    path = Path(path)
    # Asked before opening, which waits for a writer where the path is a FIFO.
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL in the path
        raise FileFormatError(path, None, str(error)) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise FileFormatError(path, None, "not a regular file")
    with open(path, "rb") as file:  # refuses a folder
        descriptor = os.dup(file.fileno())
    try:
        state = _state(descriptor)
        if state[0] == 0:
            raise FileFormatError(path, 0, "the file is empty")
        mapped = MappedFile(descriptor, 0, access=mmap.ACCESS_READ)
    except BaseException:
        os.close(descriptor)
        raise
    mapped.path, mapped._descriptor, mapped._state = path, descriptor, state
    weakref.finalize(mapped, os.close, descriptor)
    return mapped


def _read_into(descriptor: int, out: np.ndarray, at: int) -> int:
    """Read what a single call gives into uint8 `out`; return how many bytes that were."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out.data], at)
    os.lseek(descriptor, at, os.SEEK_SET)  # Windows, where files of a map cannot be truncated
    data = os.read(descriptor, len(out))
    out[: len(data)] = np.frombuffer(data, np.uint8)
    return len(data)


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
