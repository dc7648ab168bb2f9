"""What the programs share: exit codes, one-line errors, JSON, progress."""

from __future__ import annotations

import argparse
import errno
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import tbq
from tbq.errors import BackendError, FileFormatError, InputError, TbqError, ValueOverflowError

from . import stops
from .streams import Unread, patient_streams

OK, FAILED, USAGE, BAD_FILE, NO_BACKEND, INTERRUPTED, UNREAD = 0, 1, 2, 3, 4, 130, 141
FAULT = 70  # a fault of the program itself, with a traceback; sysexits.h calls it EX_SOFTWARE

EXIT_CODES = """\
exit codes:
  0 done; 1 a verification failed, or finite values would become infinite; 2 wrong usage, or
  the request cannot be carried out; 3 a file is bad, missing or cannot be written; 4 a library
  or device that is needed is missing or cannot do it; 70 a fault of the program itself; 129,
  130, 143 stopped by SIGHUP, Ctrl-C, SIGTERM; 141 a listing that nobody reads any more (other
  work is done all the same, and its exit code stands)"""


def run(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
    *,
    has_subcommands: bool = False,
    lists: Callable[[argparse.Namespace], bool] = lambda args: False,
) -> int:
    """Parse the arguments, run the command, and turn every expected failure into one line.

    Positional arguments may stand anywhere between options, unless there are subcommands. `lists`
    tells whether all that the command does is print: it ends when nobody reads that any more,
    where other commands go on.
    """
    stops.forget_what_was_written()
    parser.add_argument("--version", action="version", version=f"%(prog)s {tbq.__version__}")
    with patient_streams() as stdout:
        args = parser.parse_args(argv) if has_subcommands else parser.parse_intermixed_args(argv)
        stdout.gives_up = lists(args)
        try:
            with stops.stop_on_signals(parser.prog):
                code = command(args)
                sys.stdout.flush()
        except Unread:
            return UNREAD
        except Exception as error:
            message, code = _failure(error)
        except (stops.Stopped, KeyboardInterrupt) as stop:
            verb, code = getattr(stop, "verb", "interrupted"), getattr(stop, "code", INTERRUPTED)
            message = f"{verb}; {stops.what_was_written()}"
        else:
            return code
        if message:
            say(f"{parser.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.stderr.flush()
        return code


def _failure(error: Exception) -> tuple[str, int]:
    """Return what to say of an error, and the exit code."""
    if isinstance(error, TbqError):
        return str(error), _exit_code(error)
    if isinstance(error, OSError):
        return _os_message(error), BAD_FILE
    if isinstance(error, MemoryError):
        return "out of memory", NO_BACKEND
    traceback.print_exc()
    return "", FAULT


def shown(text: object) -> str:
    r"""Return text as one line that is safe on a terminal.

    Whatever is not printable is escaped: newlines (`\n`), control characters that a terminal would
    obey (`\x1b`), marks that reorder a line (`\u202e`), bytes that were not UTF-8 (`\xff`).
    Everything that comes out of a file, names above all, is printed through this.
    """
    text = str(text)
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def say(line: object = "", file: TextIO | None = None) -> None:
    """Print one line, on stdout unless told otherwise, as `shown` makes it."""
    print(shown(line), file=file or sys.stdout)


def refuse_flags(args: argparse.Namespace, names: Iterable[str], got: str, need: str) -> None:
    """Raise InputError if one of the flags was given; all of them default to something empty."""
    for name in names:
        if getattr(args, name):
            raise InputError("--" + name.replace("_", "-"), got, need)


def _exit_code(error: TbqError) -> int:
    if isinstance(error, FileFormatError):
        return BAD_FILE
    if isinstance(error, ValueOverflowError):
        return FAILED
    return NO_BACKEND if isinstance(error, BackendError) else USAGE


def _os_message(error: OSError) -> str:
    what = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        what = f"no space left on the device; {stops.what_was_written()}"
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
    """A progress bar on stderr, by default in bytes, if that is a terminal and tqdm is there."""

    def __init__(self, total: int, description: str, unit: str = "B") -> None:
        self._bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=description, unit=unit, unit_scale=True, leave=False)

    def advance(self, n: int) -> None:
        """Count n more."""
        if self._bar is not None:
            self._bar.update(n)

    def print(self, line: str, file: TextIO | None = None) -> None:
        """Print a line as `say` does, without tearing the bar."""
        if self._bar is None:
            say(line, file)
        else:
            self._bar.write(shown(line), file=file or sys.stdout)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info) -> None:
        if self._bar is not None:
            self._bar.close()
