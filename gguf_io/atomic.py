"""Output files, and folders, that appear complete or not at all, and never in place of an input."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tbq import InputError

try:
    import fcntl
except ImportError:  # Windows, where a temporary file that is open cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
# What file systems answer that cannot sync a directory (SMB, FUSE, WSL), or may not even open it.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM)
MAX_FILE_NAME = 255  # bytes, on every usual file system
_TEMPORARY = re.compile(r"\..*\.(\d+)-[0-9a-f]{12}\.tmp", re.DOTALL)

# Every file or folder that appeared, in order: what a program that is stopped has to own up to.
PUBLISHED: list[Path] = []
_ALIVE: dict[Path, None] = {}  # temporary files and folders of this process


class AtomicFiles:
    """A context in which files are written beside their destination and renamed together.

    Leaving it normally flushes every file to disk and renames them; leaving it by any exception,
    Ctrl-C included, removes them. A destination that already exists keeps its permissions, and a
    symbolic link keeps pointing where it did. Temporary files that a process which died left in
    the same folder are removed.

    Raises:
        InputError: a destination exists and is no regular file.
        OSError: a file cannot be created, written or renamed.
    """

    def __init__(self) -> None:
        self._open: list[tuple[BinaryIO, Path, Path]] = []

    def create(self, destination: str | os.PathLike[str]) -> BinaryIO:
        """Open a temporary file that will become `destination`, to be read back and written.

        Its `name` is where it is.
        """
        final = Path(os.path.realpath(destination))
        mode = None
        if final.exists():
            status = final.stat()
            if not stat.S_ISREG(status.st_mode):
                raise InputError("output", str(destination), "a regular file or a new path")
            if not os.access(final, os.W_OK):
                raise PermissionError(errno.EACCES, "Permission denied", str(destination))
            mode = stat.S_IMODE(status.st_mode)
        remove_stale(final.parent)
        temporary = temporary_path(final)
        _ALIVE[temporary] = None
        try:
            file = open(temporary, "x+b")  # noqa: SIM115
        except OSError as error:  # say the path the user gave, not the temporary one
            del _ALIVE[temporary]
            raise type(error)(error.errno, error.strerror, str(destination)) from None
        self._open.append((file, temporary, final))
        _lock(file.fileno())
        if mode is not None:
            with contextlib.suppress(OSError, AttributeError):
                os.fchmod(file.fileno(), mode)
        return file

    def __enter__(self) -> AtomicFiles:
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._discard()

    def _publish(self) -> None:
        for file, _, _ in self._open:
            file.flush()
            with _no_sync_is_no_failure():
                os.fsync(file.fileno())
        folders = dict.fromkeys(final.parent for _, _, final in self._open)
        with signals_wait():
            while self._open:
                file, temporary, final = self._open[0]
                file.close()
                os.replace(temporary, final)
                PUBLISHED.append(final)
                _ALIVE.pop(temporary, None)
                self._open.pop(0)
        for folder in folders:
            _sync_directory(folder)

    def _discard(self) -> None:
        for file, temporary, _ in self._open:
            with contextlib.suppress(OSError):
                file.close()  # a full disk fails the last flush again; the file goes anyway
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            _ALIVE.pop(temporary, None)
        self._open = []


@contextlib.contextmanager
def new_folder(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that becomes `destination`, new or empty, if all goes well."""
    final = Path(destination)
    remove_stale(final.parent)
    temporary = temporary_path(final)
    _ALIVE[temporary] = None
    descriptor = None
    try:
        temporary.mkdir()
        with contextlib.suppress(OSError):  # Windows opens no folders
            descriptor = os.open(temporary, os.O_RDONLY)
            _lock(descriptor)
        yield temporary
        with signals_wait():
            if final.exists():
                final.rmdir()
            temporary.rename(final)
            PUBLISHED.append(final)
    finally:
        _remove(temporary)
        _ALIVE.pop(temporary, None)
        if descriptor is not None:
            os.close(descriptor)


def discard_all() -> None:
    """Remove every temporary file of this process: for one that is about to be ended."""
    for temporary in list(_ALIVE):
        _remove(temporary)


def _remove(path: str | os.PathLike[str]) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def refuse_inputs(
    outputs: Iterable[str | os.PathLike[str]], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Raise InputError if an output is one of the inputs, by whatever path or link."""
    inputs = list(inputs)
    for output in outputs:
        for source in inputs:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samefile(output, source):
                    got = f"{output}, which is the input {source}"
                    raise InputError("output", got, "a file that is not read")


def temporary_path(final: Path) -> Path:
    """Return a new hidden path beside a file; its name says which process it is of."""
    end = f".{os.getpid()}-{secrets.token_hex(6)}.tmp"
    name = os.fsencode(final.name)[: MAX_FILE_NAME - 1 - len(end)]
    # cut between characters: some file systems take no other names than valid ones
    return final.with_name(f".{name.decode('utf-8', errors='ignore')}{end}")


def remove_stale(folder: Path) -> None:
    """Remove temporary files and folders that processes which are dead left in a folder."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = _TEMPORARY.fullmatch(entry.name)
            ours = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
            if match and ours and not _is_running(int(match[1])):
                with contextlib.suppress(OSError):
                    _remove_unlocked(entry.path)


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # cannot be asked without side effects; the file stays
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _lock(descriptor: int) -> None:
    """Hold a file as long as it is open: its process may be one of another container."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_unlocked(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Put signals off to the end, so that several renames are not torn apart by one."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
        return
    arrived: list[int] = []
    handlers = {n: signal.signal(n, lambda number, frame: arrived.append(number)) for n in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    for number in arrived[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def _no_sync_is_no_failure() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return
    with _no_sync_is_no_failure():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
