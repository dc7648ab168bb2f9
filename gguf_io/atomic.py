"""Output files that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

from tbq import InputError


class AtomicFiles:
    """A context in which files are written beside their destination and renamed together.

    Leaving it normally flushes every file to disk and renames them; leaving it by any exception,
    Ctrl-C included, removes them. A destination that already exists keeps its permissions, and a
    symbolic link keeps pointing where it did.

    Raises:
        InputError: a destination exists and is no regular file.
        OSError: a file cannot be created, written or renamed.
    """

    def __init__(self) -> None:
        self._open: list[tuple[BinaryIO, Path, Path]] = []

    def create(self, destination: str | os.PathLike) -> BinaryIO:
        """Open a temporary file that will become `destination`."""
        final = Path(os.path.realpath(destination))
        mode = 0o666
        if final.exists():
            status = final.stat()
            if not stat.S_ISREG(status.st_mode):
                raise InputError("output", str(destination), "a regular file or a new path")
            if not os.access(final, os.W_OK):
                raise PermissionError(13, "Permission denied", str(destination))
            mode = stat.S_IMODE(status.st_mode)
        temporary = final.with_name(f".{final.name[:100]}.{secrets.token_hex(6)}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            file = os.fdopen(os.open(temporary, flags, mode), "wb")
        except OSError as error:  # say the path the user gave, not the temporary one
            raise type(error)(error.errno, error.strerror, str(destination)) from None
        self._open.append((file, temporary, final))
        return file

    def __enter__(self) -> AtomicFiles:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._discard()

    def _publish(self) -> None:
        for file, _, _ in self._open:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        while self._open:
            _, temporary, final = self._open[0]
            os.replace(temporary, final)
            self._open.pop(0)
            _sync_directory(final.parent)

    def _discard(self) -> None:
        for file, temporary, _ in self._open:
            try:
                file.close()
            except OSError:
                pass  # a full disk fails the last flush again; the file goes anyway
            temporary.unlink(missing_ok=True)
        self._open = []


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
