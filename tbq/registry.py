"""The registry: every dialect, its releases and its formats, in a fixed order.

Dialects are found by name: each module of `tbq.dialects` has some in `DIALECTS`. Reader, writer,
programs, tests, documentation and benchmarks all iterate what is here.
"""

from __future__ import annotations

import copyreg
import difflib
import importlib
import pkgutil
import threading
from collections.abc import Callable
from functools import cache
from types import ModuleType

from tbq import dialects as _package
from tbq.dialect import Dialect
from tbq.errors import AmbiguousTypeError, UnknownFormatError
from tbq.format import GGML, Format

_DIALECTS: dict[str, Dialect] = {}
_loading = threading.RLock()


def _registered() -> dict[str, Dialect]:
    """Return every dialect by name; the first call imports those of `tbq.dialects`.

    Importing `tbq` would take a fifth longer with all families.
    """
    if not _DIALECTS:
        with _loading:
            if not _DIALECTS:
                found: dict[str, Dialect] = {}
                for dialect in _discover():
                    _add(dialect, found)
                _DIALECTS.update(found)
    return _DIALECTS


def _add(dialect: Dialect, known: dict[str, Dialect]) -> None:
    if dialect.name in known:
        raise ValueError(f"dialect {dialect.name} is registered twice")
    keys = [fmt.key for fmt in dialect.formats]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{dialect.name} has two formats of one key: {sorted(keys)}")
    known[dialect.name] = dialect


def register(dialect: Dialect) -> None:
    """Add a dialect; ValueError if its name or the key of a format of it is taken."""
    _add(dialect, _registered())
    _forget()


def unregister(name: str) -> None:
    """Take a dialect out again."""
    del _registered()[name]
    _forget()


def _forget() -> None:
    for cached in (all_formats, _by_name, meanings):
        cached.cache_clear()


# --- what there is -------------------------------------------------------------------------------


def dialects() -> tuple[str, ...]:
    """Return the name of every registered dialect, in registry order."""
    return tuple(_registered())


def get_dialect(name: str) -> Dialect:
    """Return a dialect by name; case does not matter.

    Raises:
        UnknownFormatError: it is not registered.
    """
    found = _registered().get(name.strip().lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), dialects()) or dialects()
        raise UnknownFormatError(name, near, "tbq.dialects()", "dialect")
    return found


def split_dialect(text: str) -> tuple[Dialect, str | None]:
    """Return the dialect and the release of `dialect` or `dialect@release`.

    Raises:
        UnknownFormatError: one of them is not registered.
    """
    name, _, release = text.partition("@")
    found = get_dialect(name)
    return found, found.release(release.strip().lower()).name if release else None


@cache
def all_formats() -> tuple[Format, ...]:
    """Return every format of every dialect, those of other libraries' arithmetic among them."""
    return tuple(fmt for dialect in _registered().values() for fmt in dialect.formats)


def formats() -> tuple[Format, ...]:
    """Return every format whose arithmetic is ours, in registry order."""
    return tuple(fmt for fmt in all_formats() if fmt.evidence != "gguf-py")


def families() -> tuple[ModuleType, ...]:
    """Return the modules with the specifications of all formats, in registry order."""
    names = dict.fromkeys(type(fmt.codec).__module__ for fmt in all_formats())
    return tuple(importlib.import_module(name) for name in names)


# --- names ---------------------------------------------------------------------------------------


def _sent(key: str, choice: str) -> Format:
    fmt = get_format(key)
    return next(one for one in (fmt, *fmt.variants()) if one.choice == choice)


# Formats are compared by identity: what is pickled is the name, and another process has its own.
copyreg.pickle(Format, lambda fmt: (_sent, (fmt.key, fmt.choice)))


def get_format(name: str | Format) -> Format:
    """Return the format called `name`: a key (`pr21089:tbq3_0`), a bare name or an alias.

    Case does not matter. `dialect@release:name` is what that release calls so; without a release
    the newest that has the name is meant. A bare name used by several dialects means the default
    dialect's.

    >>> get_format("TBQ3_0").key
    'pr21089:tbq3_0'

    Raises:
        UnknownFormatError: nothing has that name; `.near` holds close ones.
        AmbiguousTypeError: several dialects have it and none of them is a default.
    """
    return name if isinstance(name, Format) else _by_name(str(name))


@cache
def _by_name(name: str) -> Format:
    wanted = name.strip().lower()
    place, colon, bare = wanted.rpartition(":")
    if colon:
        base, _, release = place.partition("@")
        dialect = _registered().get(base)
        if dialect is None:
            raise UnknownFormatError(wanted, near_misses(wanted))
        found = list(dialect.named(bare, dialect.release(release).name if release else None))
    else:
        found = [fmt for dialect in _registered().values() for fmt in dialect.named(bare)]
    if not found:
        raise UnknownFormatError(wanted, near_misses(wanted))
    if len(found) == 1:
        return found[0]
    meant = _preferred(found)
    if meant is None:
        raise AmbiguousTypeError(wanted, [fmt.key for fmt in found], "name one of these in full")
    return meant


def _preferred(found: list[Format]) -> Format | None:
    """Return which of several formats of one bare name is meant; None if that cannot be told."""
    ranks = [get_dialect(fmt.dialect).precedence for fmt in found]
    ranked = [(rank, at) for at, rank in enumerate(ranks) if rank is not None]
    if ranked:
        return found[min(ranked)[1]]
    places = {fmt.dialect for fmt in found}
    own = [fmt for fmt in found if get_dialect(fmt.dialect).backend_of not in places]
    return own[0] if len(own) == 1 else None


def near_misses(wanted: str, accept: Callable[[Format], bool] = lambda fmt: True) -> list[str]:
    """Return up to three registered names like `wanted`, of formats that are accepted."""
    bare: dict[str, list[Format]] = {}
    names: set[str] = set()
    for fmt in filter(accept, all_formats()):
        names.add(fmt.label)
        for name in (fmt.name, *fmt.aliases):
            bare.setdefault(name, []).append(fmt)
    names |= {name for name, own in bare.items() if len(own) == 1 or _preferred(own)}
    # What another dialect calls so, what is like it, what starts so.
    elsewhere = [fmt.label for fmt in bare.get(wanted.rpartition(":")[2], ())]
    like = difflib.get_close_matches(wanted, sorted(names), n=3, cutoff=0.6)
    longer = sorted(name for name in names if name.startswith(wanted))
    return list(dict.fromkeys([*elsewhere, *like, *longer]))[:3]


# --- ids -----------------------------------------------------------------------------------------


@cache
def meanings(type_id: int) -> tuple[tuple[str, str, Format], ...]:
    """Return what a ggml type id means where: (dialect, release, format), newest releases first."""
    return tuple(
        (dialect.name, release.name, release.types[type_id])
        for dialect in _registered().values()
        for release in dialect.releases
        if type_id in release.types
    )


def meaning(type_id: int, dialect: str | None, release: str | None = None) -> Format | None:
    """Return what a type id means in a release of a dialect; None if that is not known.

    Without a dialect it is what ggml means; without a release, what the newest means that has it.
    """
    ours = get_dialect(GGML).releases[0].types.get(type_id)
    if dialect is None:
        return ours
    chosen = get_dialect(dialect)
    releases = chosen.releases if release is None else (chosen.release(release),)
    for candidate in releases:
        if type_id in candidate.types:
            return candidate.types[type_id]
    return ours if type_id <= releases[0].upstream else None


def undisputed(type_id: int) -> Format | None:
    """Return what a type id means if it means the same everywhere; else None.

    Other writers of ggml's own types do not count: nothing tells their rows apart.
    """
    known = meaning(type_id, None)
    found = [f for name, _, f in meanings(type_id) if get_dialect(name).backend_of != GGML]
    return known if all(fmt is known for fmt in found) else None


def writers(fmt: Format) -> list[Format]:
    """Return all formats that write one of ggml's own types, each by other arithmetic."""
    own = (d for d in _registered().values() if GGML in (d.name, d.backend_of))
    found = [other for dialect in own for other in dialect.formats if other.name == fmt.name]
    return found if fmt in found else [fmt]


def type_id(fmt: Format, dialect: str | None = None, release: str | None = None) -> int:
    """Return the ggml type id that a release of a dialect gives a format.

    Without a dialect it is the format's own; without a release, the newest that lists it.

    Raises:
        InputError: it has none there.
    """
    chosen = get_dialect(dialect or fmt.dialect)
    if fmt.is_ggml and not chosen.owns(fmt):
        listed = chosen.releases[0] if release is None else chosen.release(release)
        for number, other in listed.types.items():
            if other is fmt:
                return number
        number = get_dialect(GGML).type_id(fmt)
        if number <= listed.upstream:
            return number
    return chosen.type_id(fmt, release)


def _discover() -> list[Dialect]:
    names = [module.name for module in pkgutil.iter_modules(_package.__path__)]
    found = [
        dialect
        for name in names
        for dialect in importlib.import_module(f"{_package.__name__}.{name}").DIALECTS
    ]
    last = 1 + max((d.precedence or 0) for d in found)
    return sorted(found, key=lambda d: last if d.precedence is None else d.precedence)
