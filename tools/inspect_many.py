"""tbq-inspect on several files: one after the other, or one per worker at a time."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import threading
from typing import NamedTuple

from gguf_io.mapped import Mark, find_marked, map_file
from tbq.errors import BackendError, TbqError

from . import console
from .tbq_inspect import build_parser, inspect_one

PROG = "tbq-inspect"
# Flags whose output, or whose other input, is for one file.
SINGLE = ("html", "reference")
_STREAMS = threading.Lock()  # stdout and stderr are the process's


class Text(NamedTuple):
    """What the program said about one file."""

    code: int
    out: str
    err: str


def inspect_all(args: argparse.Namespace) -> int:
    """Print what is found about every file, in order; returns the largest of their exit codes."""
    many = f"{len(args.files)} FILES"
    console.refuse_flags(args, SINGLE if len(args.files) > 1 else (), many, "one FILE")
    with console.workers(args) as client:
        if client is None:
            return max([_inspect(one) for one in _each(args)])
        from gguf_io.distributed import in_order

        codes = []
        for text in in_order(client, text_of, ((one, _mark(one.file)) for one in _each(args))):
            sys.stderr.write(text.err)
            sys.stdout.write(text.out)
            codes.append(text.code)
        return max(codes)


def _each(args: argparse.Namespace) -> list[argparse.Namespace]:
    return [argparse.Namespace(**vars(args) | {"file": path}) for path in args.files]


def _inspect(args: argparse.Namespace) -> int:
    try:
        return inspect_one(args)
    except Exception as error:
        return console.report_failure(PROG, error)


def _mark(path: str) -> Mark | None:
    """Return what a file is known by; None if it cannot be opened, which its worker will say."""
    try:
        return map_file(path).mark()
    except (OSError, TbqError):
        return None


def text_of(task: tuple[argparse.Namespace, Mark | None]) -> Text:
    """Inspect the file of a task, (arguments, mark), on a worker."""
    args, mark = task
    if mark is not None and find_marked(mark) is None:
        need = f"does not see {mark.path} as it is here; files have to be on a shared file system"
        raise BackendError("dask", f"a worker {need}")
    out, err = io.StringIO(), io.StringIO()
    with _STREAMS, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        console.speak_in_flags_of(build_parser())
        code = _inspect(args)
    return Text(code, out.getvalue(), err.getvalue())
