"""Ctrl-C, SIGTERM and SIGHUP: the temporary files go, and the program ends within a second."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

# Handlers of Python run between two of its own instructions. A compiler or a kernel may take
# longer than this before the next; then the process is ended from another thread.
PATIENCE = 0.7
VERBS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "the terminal is gone"}
NUMBERS = {getattr(signal, name): verb for name, verb in VERBS.items() if hasattr(signal, name)}


class Stopped(BaseException):
    """One of the signals arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number
        self.verb = NUMBERS[number]


@contextlib.contextmanager
def stop_on_signals(prog: str) -> Iterator[None]:
    """Raise `Stopped` where a signal arrives, and end the process if that cannot be raised."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        sys.unraisablehook = lambda unraisable: None  # destructors of what was cut off half-made
        raise Stopped(number)

    previous, hook = {}, sys.unraisablehook
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            previous[number] = signal.signal(number, stop)
    with _watch(prog):
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            sys.unraisablehook = hook


@contextlib.contextmanager
def _watch(prog: str) -> Iterator[None]:
    """Have a thread wait for signals, and end the process if one is not obeyed in time."""
    theirs, ours = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    finished = threading.Event()

    def watch() -> None:
        while number := ours.recv(1):
            if number[0] in NUMBERS and signal.getsignal(number[0]) is not signal.SIG_IGN:
                if not finished.wait(PATIENCE):
                    _end(prog, number[0])
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        signal.set_wakeup_fd(before)
        theirs.close()
        thread.join()
        ours.close()


def _end(prog: str, number: int) -> None:
    discard_temporary_files()
    with contextlib.suppress(Exception):
        print(
            f"{prog}: error: {NUMBERS[number]}; {what_was_written()}", file=sys.stderr, flush=True
        )
    os._exit(128 + number)


def _atomic():
    """Return gguf_io.atomic if anything was written through it; --help does not import it."""
    return sys.modules.get("gguf_io.atomic")


def discard_temporary_files() -> None:
    """Remove the temporary files of this process."""
    if _atomic():
        _atomic().discard_all()


def what_was_written() -> str:
    """Say which outputs are there."""
    published = _atomic().PUBLISHED if _atomic() else []
    if not published:
        return "nothing was written"
    verb = "was" if len(published) == 1 else "were"
    return f"{', '.join(map(str, published))} {verb} written before"


def forget_what_was_written() -> None:
    """Start anew: one process may run several programs."""
    if _atomic():
        _atomic().PUBLISHED.clear()
