"""Regular expressions as llama-quantize's users write them, POSIX classes included."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

from tbq.errors import InputError

# What std::regex has in brackets, as parts of a set of Python.
CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "blank": r" \t",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "d": "0-9",
    "graph": r"\x21-\x7e",
    "lower": "a-z",
    "print": r"\x20-\x7e",
    "punct": r"\x21-\x2f\x3a-\x40\x5b-\x60\x7b-\x7e",
    "space": r"\s",
    "s": r"\s",
    "upper": "A-Z",
    "w": r"\w",
    "word": r"\w",
    "xdigit": "0-9A-Fa-f",
}
_CLASS = re.compile(r"\[:([^\]:]*):\]")


def compiled(flag: str, text: str) -> re.Pattern:
    """Compile a regular expression that the user gave with a flag.

    Raises:
        InputError: it is none; or it has a bracket that would mean something else here.
    """
    try:
        with warnings.catch_warnings():  # of what other versions of Python could read in it
            warnings.simplefilter("ignore")
            return re.compile("".join(_translated(text)))
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise InputError(flag, text, f"a regular expression ({error})") from None


def _translated(text: str) -> Iterator[str]:
    """Yield the pieces of an expression, POSIX classes as sets of Python."""
    at, inside = 0, False
    while at < len(text):
        two = text[at : at + 2]
        if two[0] == "\\":
            yield two
            at += 2
        elif not inside and two[0] == "[":
            start = re.compile(r"\[\^?\]?").match(text, at)[0]  # a bracket that comes first is one
            if _CLASS.match(text, at):
                raise ValueError(f"write [{_CLASS.match(text, at)[0]}] for a class")
            yield start
            at, inside = at + len(start), True
        elif inside and two in ("[:", "[.", "[="):
            found = _CLASS.match(text, at)
            if found is None or found[1].lower() not in CLASSES:
                raise ValueError(f"{text[at : at + 20]!r} is no class that is known")
            yield CLASSES[found[1].lower()]
            at = found.end()
        else:
            inside = inside and two[0] != "]"
            yield "\\[" if inside and two[0] == "[" else two[0]
            at += 1
