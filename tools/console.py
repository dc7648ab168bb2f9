"""What the programs share: exit codes, one-line errors, JSON, progress."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

import tbq
from tbq.errors import BackendError, FileFormatError, InputError, TbqError, ValueOverflowError

from . import stops
from .streams import Unread, patient_streams

if TYPE_CHECKING:
    from distributed import Client

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
    speak_in_flags_of(parser)
    parser.add_argument("--version", action="version", version=f"%(prog)s {tbq.__version__}")
    with patient_streams() as stdout:
        args = parser.parse_args(argv) if has_subcommands else parser.parse_intermixed_args(argv)
        stdout.gives_up = lists(args)
        try:
            with stops.stop_on_signals(parser.prog), compiling_is_said(parser.prog):
                code = command(args)
                sys.stdout.flush()
        except Unread:
            return UNREAD
        except Exception as error:
            return report_failure(parser.prog, error)
        except (stops.Stopped, KeyboardInterrupt) as stop:
            verb, code = getattr(stop, "verb", "interrupted"), getattr(stop, "code", INTERRUPTED)
            message = f"{verb}; {stops.what_was_written()}"
            say_error(parser.prog, message)
        return code


def report_failure(prog: str, error: Exception) -> int:
    """Say what went wrong, with a traceback if it is a fault of ours; returns the exit code."""
    message, code = _failure(error)
    if message:
        say_error(prog, message)
    return code


def say_error(prog: str, message: str) -> None:
    """Print the one line that every failure has."""
    say(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.stderr.flush()


def _failure(error: Exception) -> tuple[str, int]:
    """Return what to say of an error, and the exit code."""
    if isinstance(error, TbqError):
        text = str(error)
        if isinstance(error, InputError) and error.argument in _flags:
            text = _flags[error.argument] + text.removeprefix(error.argument)
        return text, _exit_code(error)
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


# The flags of the program that runs, by what the library calls the same.
_flags: dict[str, str] = {}
# What the library tells a caller to use, and a user of a program cannot.
_PROGRAMS = {
    "use open_state": "tbq-inspect and tbq-quantize read it",
    "use open_gguf": "it is a model, not a dump of a cache",
    "see tbq.formats()": "see tbq-quantize --help",
    "see tbq.registry.all_formats()": "see tbq-quantize --help",
}
_PARAMETER = re.compile(r"(?<![\w-])(allow_\w+(?==?)|\w+(?==))=?(?=[\s,;:.')]|$)")


def speak_in_flags_of(parser: argparse.ArgumentParser) -> None:
    """Have messages name the flags of this program from now on, see `in_flags`."""
    _flags.clear()
    _flags.update(_flags_of(parser))


def _flags_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the long flag of each argument; `trailing` of the library is --keep-trailing."""
    found: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= _flags_of(command)
        for flag in action.option_strings:
            if flag.startswith("--"):
                found.setdefault(action.dest.removeprefix("keep_"), flag)
    return found


def in_flags(text: str) -> str:
    """Return a message of the library in words of the program: `model=` becomes `--model`."""
    for said, meant in _PROGRAMS.items():
        text = text.replace(said, meant)
    return _PARAMETER.sub(lambda found: _flags.get(found[1], found[0]), text)


def say(line: object = "", file: TextIO | None = None) -> None:
    """Print one line, on stdout unless told otherwise, in flags and as `shown` makes it."""
    print(shown(in_flags(str(line))), file=file or sys.stdout)


@contextlib.contextmanager
def compiling_is_said(prog: str) -> Iterator[None]:
    """Say, where a person sees it, that time goes by because kernels are compiled.

    One line for each format, on stderr if that is a terminal; what programs read stays as it is.
    """
    if not sys.stderr.isatty():
        yield
        return
    log, handler = logging.getLogger("tbq.compile"), _Compiling(prog)
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.setLevel(before[0])
        log.propagate = before[1]
        log.removeHandler(handler)


class _Compiling(logging.Handler):
    """Prints each message of the compiler once, above the progress bar if there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__()
        self._prog = prog
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self._prog}: {record.getMessage()}"
        if line not in self._said:
            self._said.add(line)
            printed = Progress.shown[-1].print if Progress.shown else say
            printed(line, sys.stderr)


def refuse_flags(args: argparse.Namespace, names: Iterable[str], got: str, need: str) -> None:
    """Raise InputError if one of the flags was given; all of them default to something empty."""
    for name in names:
        if getattr(args, name):
            raise InputError("--" + name.replace("_", "-"), got, need)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the flags that have other processes do the work."""
    where = parser.add_argument_group("work on other processes (needs dask.distributed)")
    where.add_argument(
        "--workers", metavar="N", type=int, help="start N processes of one thread each"
    )
    where.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="use the workers of a dask scheduler, tcp://HOST:PORT",
    )


@contextlib.contextmanager
def workers(args: argparse.Namespace) -> Iterator[Client | None]:
    """Yield a client of the workers that the flags ask for, or None."""
    if args.workers is None and args.scheduler is None:
        yield None
        return
    if args.workers is not None and args.workers < 1:
        raise InputError("--workers", str(args.workers), "at least 1")
    if args.workers is not None and args.scheduler is not None:
        raise InputError("--scheduler", args.scheduler, "one of --scheduler and --workers")
    from gguf_io.distributed import connected

    with contextlib.suppress(ImportError):
        import distributed  # noqa: F401 (which sets up its log)
    # Its threads log what they find closed, some after they were asked to end; what concerns a user
    # is an error of ours.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with connected(args.workers, args.scheduler) as client:
        yield client


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
    """A progress bar on stderr, by default in bytes, if that is a terminal and tqdm is there.

    Attributes:
        shown: the bars that are there now, for whoever prints a line meanwhile.
    """

    shown: ClassVar[list[Progress]] = []

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
            self._bar.write(shown(in_flags(line)), file=file or sys.stdout)

    def __enter__(self) -> Progress:
        self.shown.append(self)
        return self

    def __exit__(self, *exc_info) -> None:
        self.shown.remove(self)
        if self._bar is not None:
            self._bar.close()
