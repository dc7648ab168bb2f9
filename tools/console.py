"""What the programs share: exit codes, one-line errors, JSON, progress."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from tbq.errors import BackendError, FileFormatError, InputError, TbqError

OK, FAILED, USAGE, BAD_FILE, NO_BACKEND, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 4, 130, 143

EXIT_CODES = """\
exit codes:
  0 done; 1 a verification failed; 2 wrong usage, or the request cannot be carried out;
  3 a file is bad, missing or cannot be written; 4 a library or device that is needed is
  missing or cannot do it; 130 interrupted (Ctrl-C); 143 terminated"""


def run(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
    *,
    has_subcommands: bool = False,
) -> int:
    """Parse the arguments, run the command, and turn every expected failure into one line.

    Positional arguments may stand anywhere between options, unless there are subcommands.
    """
    args = parser.parse_args(argv) if has_subcommands else parser.parse_intermixed_args(argv)
    try:
        with _terminate_as_exception():
            code = command(args)
            sys.stdout.flush()
            return code
    except TbqError as error:
        message, code = str(error), _exit_code(error)
    except BrokenPipeError:
        # The reader of stdout went away (`| head`); keep Python from flushing into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        message, code = _os_message(error), BAD_FILE
    except MemoryError:
        message, code = "out of memory", NO_BACKEND
    except KeyboardInterrupt:
        message, code = "interrupted; nothing was written", INTERRUPTED
    except _Terminated:
        message, code = "terminated; nothing was written", TERMINATED
    print(f"{parser.prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def refuse_flags(args: argparse.Namespace, names: Iterable[str], got: str, need: str) -> None:
    """Raise InputError if one of the flags was given; all of them default to something empty."""
    for name in names:
        if getattr(args, name):
            raise InputError("--" + name.replace("_", "-"), got, need)


class _Terminated(BaseException):
    """SIGTERM, raised as an exception so that temporary files are removed."""


@contextlib.contextmanager
def _terminate_as_exception() -> Iterator[None]:
    def stop(number, frame):
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit_code(error: TbqError) -> int:
    if isinstance(error, FileFormatError):
        return BAD_FILE
    return NO_BACKEND if isinstance(error, BackendError) else USAGE


def _os_message(error: OSError) -> str:
    what = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        what = "no space left on the device; nothing was written"
    return f"{error.filename}: {what}" if error.filename else what


def print_json(value: Any) -> None:
    """Print one JSON object on stdout; NaN and infinities become null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


class Progress:
    """A progress bar in bytes on stderr, if that is a terminal and tqdm is there."""

    def __init__(self, total: int, description: str) -> None:
        self._bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=description, unit="B", unit_scale=True, leave=False)

    def advance(self, n: int) -> None:
        """Count n more bytes."""
        if self._bar is not None:
            self._bar.update(n)

    def print(self, line: str, file: TextIO | None = None) -> None:
        """Print a line, on stdout unless told otherwise, without tearing the bar."""
        if self._bar is None:
            print(line, file=file or sys.stdout)
        else:
            self._bar.write(line, file=file or sys.stdout)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info) -> None:
        if self._bar is not None:
            self._bar.close()
