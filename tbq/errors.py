"""Every exception the packages of this project raise on purpose.

Each class inherits the builtin a careful caller would already catch, keeps what it was told as
attributes, and says in one line what was given, what was needed and where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class TbqError(Exception):
    """Base class of all errors of tbq, gguf_io, cuda_port and the programs."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what was kept: unpickling would call the class with the message alone."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[TbqError], args: tuple[Any, ...], attributes: dict[str, Any]) -> TbqError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class UnknownFormatError(TbqError, LookupError):
    """No registered format, dialect or release has this name."""

    def __init__(
        self,
        name: str,
        near: Sequence[str] = (),
        known: str = "tbq.formats()",
        kind: str = "format",
    ) -> None:
        self.name = name
        self.near = tuple(near)
        hint = f"did you mean {' or '.join(self.near)}?" if self.near else f"see {known}"
        super().__init__(f"no {kind} is called {name!r}; {hint}")


class AmbiguousTypeError(TbqError, LookupError):
    """A bare name or a ggml type id that several dialects claim."""

    def __init__(self, given: str, candidates: Sequence[str], remedy: str) -> None:
        self.given = given
        self.candidates = tuple(candidates)
        super().__init__(f"{given} could be {', '.join(self.candidates)}; {remedy}")


class InputError(TbqError, ValueError):
    """An argument has the wrong shape, dtype, length or value."""

    def __init__(self, argument: str, got: str, need: str) -> None:
        self.argument = argument
        self.got = got
        self.need = need
        super().__init__(f"{argument}: got {got}, need {need}")


class CorruptBlockError(TbqError, ValueError):
    """A packed block holds a field that no encoder writes and that cannot be decoded."""

    def __init__(self, fmt: str, block: int, reason: str) -> None:
        self.format = fmt
        self.block = block
        self.reason = reason
        super().__init__(f"block {block} of {fmt}: {reason}")


class ValueOverflowError(TbqError, OverflowError):
    """Finite values would come back as infinite or NaN from the types they were to be written in.

    Attributes:
        counts: how many, by the name of the tensor.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = dict(counts)
        listed = ", ".join(f"{n} of {name}" for name, n in [*self.counts.items()][:5])
        listed += f" and {len(self.counts) - 5} more tensors" if len(self.counts) > 5 else ""
        super().__init__(
            f"finite values that become infinite or NaN: {listed}; nothing was written "
            "(allow_overflow= writes them all the same)"
        )


class FileFormatError(TbqError, ValueError):
    """A file is truncated, inconsistent, hostile or of an unsupported kind."""

    def __init__(self, path: object, offset: int | None, reason: str) -> None:
        self.path = str(path)
        self.offset = offset
        self.reason = reason
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{self.path}{where}: {reason}")


class ClosedFileError(TbqError, ValueError):
    """A file was asked for something after it was closed."""

    def __init__(self, path: object) -> None:
        self.path = str(path)
        super().__init__(
            f"{self.path}: the file is closed; what is needed of it is to be read before"
        )


class BackendError(TbqError, RuntimeError):
    """The operation exists, but what would carry it out is missing or cannot do it."""

    def __init__(self, backend: str, reason: str) -> None:
        self.backend = backend
        self.reason = reason
        super().__init__(f"{backend}: {reason}")
