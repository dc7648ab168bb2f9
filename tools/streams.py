"""stdout and stderr of a program that goes on working when nobody reads them any more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Unread(BaseException):
    """A listing has nowhere to go: the reader of stdout left, or it is full or closed."""


class PatientStream:
    """A text stream that swallows what can no longer be written, or gives up at once.

    Attributes:
        lost: whether something could not be written.
        gives_up: whether `Unread` is raised then, because there is nothing else to do.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.lost = False
        self.gives_up = False

    def write(self, text: str) -> int:
        """Write, if there is still somebody to read it."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush, likewise."""
        self._try("flush")

    def isatty(self) -> bool:
        """Whether it is a terminal; nothing is not one."""
        return self._stream is not None and self._stream.isatty()

    def _try(self, method: str, *args: str) -> None:
        if not self.lost:
            try:
                if self._stream is None:
                    raise OSError("closed")
                getattr(self._stream, method)(*args)
                return
            except (OSError, ValueError) as error:
                if isinstance(error, UnicodeError):
                    raise
                self.lost = True
                self._let_go()
        if self.gives_up:
            raise Unread

    def _let_go(self) -> None:
        """Keep Python from flushing into it again at its end, which would change the exit code."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def patient_streams() -> Iterator[PatientStream]:
    """Make stdout and stderr patient, and yield the first."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):  # names are shown, whatever the encoding
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = map(PatientStream, before)
    try:
        yield sys.stdout
    finally:
        for stream in (sys.stdout, sys.stderr):  # else Python does at its end, and exits with 120
            if isinstance(stream, PatientStream):
                stream.gives_up = False
                stream.flush()
        sys.stdout, sys.stderr = before
