"""The registry: every format of every family, in a fixed order.

To add a format, add one entry to a family module; to add a family, add its module to `FAMILIES`.
Reader, writer, programs, tests, documentation and benchmarks all iterate `formats()`.
"""

from __future__ import annotations

import difflib

from tbq.errors import AmbiguousTypeError, UnknownFormatError
from tbq.families import ktq, pr21089, trellis, vtq
from tbq.format import Format

FAMILIES = (pr21089, ktq, vtq, trellis)

# A bare name that several dialects use means the first of these that has it.
DEFAULT_DIALECTS = ("pr21089", "llama-tq")

# A dialect that shares all layouts and ids with another and differs in arithmetic only: no file
# can tell them apart, so the other is meant unless the caller says otherwise.
BACKEND_OF = {"llama-tq-cuda": "llama-tq"}


def _index(families) -> dict[str, Format]:
    index: dict[str, Format] = {}
    for family in families:
        for fmt in family.FORMATS:
            if fmt.key in index:
                raise AssertionError(f"{fmt.key} is registered twice")
            index[fmt.key] = fmt
    return index


_FORMATS = _index(FAMILIES)


def formats() -> tuple[Format, ...]:
    """Return every registered format, in registry order."""
    return tuple(_FORMATS.values())


def dialects() -> tuple[str, ...]:
    """Return every registered dialect, in registry order."""
    return tuple(dict.fromkeys(fmt.dialect for fmt in formats()))


def get_format(name: str | Format) -> Format:
    """Return the format called `name`: a key (`pr21089:tbq3_0`), a bare name or an alias.

    Case does not matter. A bare name used by several dialects means the default dialect's.

    >>> get_format("TBQ3_0").key
    'pr21089:tbq3_0'

    Raises:
        UnknownFormatError: nothing has that name; `.near` holds close ones.
        AmbiguousTypeError: several dialects have it and none of them is a default.
    """
    if isinstance(name, Format):
        return name
    wanted = str(name).strip().lower()
    dialect, colon, bare = wanted.rpartition(":")
    found = [
        fmt
        for fmt in formats()
        if bare in (fmt.name, *fmt.aliases) and (not colon or fmt.dialect == dialect)
    ]
    if not found:
        raise UnknownFormatError(wanted, near_misses(wanted))
    if len(found) == 1:
        return found[0]
    for default in DEFAULT_DIALECTS:
        for fmt in found:
            if fmt.dialect == default:
                return fmt
    raise AmbiguousTypeError(wanted, [fmt.key for fmt in found], "name one of these in full")


def near_misses(wanted: str, others: tuple[str, ...] = ()) -> list[str]:
    """Return up to three names like `wanted`, from the registry and from `others`."""
    names = {*others}
    for fmt in formats():
        names.update((fmt.key, fmt.name, *fmt.aliases))
    return difflib.get_close_matches(wanted, sorted(names), n=3, cutoff=0.6)
