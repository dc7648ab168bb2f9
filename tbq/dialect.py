"""`Dialect` and `Release`: a code base, its names for codecs, and the numbers it gives them.

Three facts are kept apart, because they change at different paces: what bytes mean (`Codec`), what
a fork calls them (`Format`), and which ggml type id a release gives that name (`Release`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property

from tbq.errors import InputError, UnknownFormatError
from tbq.format import Format


@dataclass(frozen=True, eq=False)
class Release:
    """The ids of one state of a code base.

    Attributes:
        name: a date or a tag, as in `dialect@name:format`.
        types: ggml type id to format.
        upstream: ids up to this one that are not in `types` mean what they mean in ggml.
        file_types: llama.cpp's file type numbers (`general.file_type`) by format name.
        note: what else marks it.
    """

    name: str
    types: Mapping[int, Format]
    upstream: int = 41
    file_types: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class GraphRotation:
    """What the attention graph does to K and V of a quantised cache before they are stored.

    Kinds for `tbq.rotation`, or None. Source of each: the dialect that has it.

    Attributes:
        keys, values: for types that take original values.
        rotated_values: for V types whose codec takes rotated values.
        optional: whether it is done only if the program is told to.
    """

    keys: str | None = None
    values: str | None = None
    rotated_values: str | None = None
    optional: bool = False

    def kind(self, side: str, formats: Collection[object]) -> str | None:
        """Return the rotation of the K or V of a cache that holds these types."""
        if side == "K":
            return self.keys
        rotated = any(isinstance(f, Format) and f.codec.takes == "rotated" for f in formats)
        return self.rotated_values if rotated else self.values


@dataclass(frozen=True)
class StateTraits:
    """What a dialect's state files have of their own.

    Attributes:
        deferred: whether KV memories start with a byte that says which rows are staged.
        staged: names of the formats whose rows are first collected as f16.
        mixed: whether layers of one cache can have different types.
        footed: names of the formats after whose rows each stream ends in a footer (TQCF).
        padded: names of the formats whose caches pad each head to whole groups.
        keeps_padding: whether rows in files have that padding. Where they do not, the fork cuts
            padded rows as if they had none, and what is in such a file is no row.
    """

    deferred: bool = False
    staged: frozenset[str] = frozenset()
    mixed: bool = False
    footed: frozenset[str] = frozenset()
    padded: frozenset[str] = frozenset()
    keeps_padding: bool = True

    def head_values(self, fmt: Format, head_dim: int) -> int:
        """Return the values that a cache row of a format has for a head, padding included."""
        unit = fmt.group_values if fmt.name in self.padded else 1
        return -(-head_dim // unit) * unit

    def of(self, names: Collection[str]) -> StateTraits:
        """Return what shows in files with formats of these names only."""
        mine = (self.staged, self.footed, self.padded)
        staged, footed, padded = (own & set(names) for own in mine)
        return replace(self, staged=staged, footed=footed, padded=padded)


@dataclass(frozen=True, eq=False)
class Dialect:
    """One code base, or one backend of it.

    Attributes:
        name: as in `dialect:format`.
        title: what it is, for people.
        releases: newest first; the first is the one that is written.
        backend_of: the dialect whose layouts and ids it shares while its arithmetic differs: no
            file can tell the two apart, so the other is meant unless the caller says otherwise.
        precedence: a bare name of several dialects means the one with the lowest; None: never.
        rotation, state: traits of its graph and of its state files.
        unnumbered: formats that have no ggml type id, or none that is known.
        functions: names of the C encoder and decoder of a type, `{name}` standing for it; empty if
            its library has none.
    """

    name: str
    title: str
    releases: tuple[Release, ...]
    backend_of: str | None = None
    precedence: int | None = None
    rotation: GraphRotation = field(default_factory=GraphRotation)
    state: StateTraits = field(default_factory=StateTraits)
    unnumbered: tuple[Format, ...] = ()
    functions: tuple[str, str] | None = ("quantize_row_{name}_ref", "dequantize_row_{name}")

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """Every format: those that a release lists, of the newest first, then the unnumbered."""
        listed = [fmt for release in self.releases for fmt in release.types.values()]
        return tuple(fmt for fmt in dict.fromkeys((*listed, *self.unnumbered)) if self.owns(fmt))

    def owns(self, fmt: Format) -> bool:
        """Tell whether a format that a release lists is this dialect's, not another's it shares."""
        return fmt.dialect in {self.name}

    def numbers(self, fmt: Format) -> bool:
        """Tell whether some release has a type id for a format."""
        return any(fmt.key == f.key for r in self.releases for f in r.types.values())

    def release(self, name: str | None = None) -> Release:
        """Return a release by name, the newest without one; UnknownFormatError if it has none."""
        if name is None:
            return self.releases[0]
        for release in self.releases:
            if release.name == name:
                return release
        known = {release.name: f"{self.name}@{release.name}" for release in self.releases}
        near = [known[close] for close in get_close_matches(name, known)] or list(known.values())
        what = f"releases of {self.name}"
        raise UnknownFormatError(f"{self.name}@{name}", near, what, "release")

    def type_id(self, fmt: Format, release: str | None = None) -> int:
        """Return the id of a format in a release, or in the newest that lists it.

        Raises:
            InputError: no release, or not that one, lists the format.
        """
        chosen = self.releases if release is None else (self.release(release),)
        for candidate in chosen:
            for type_id, listed in candidate.types.items():
                if listed.key == fmt.key:
                    return type_id
        where = f"release {release} of {self.name}" if release else f"any release of {self.name}"
        raise InputError("type", fmt.label, f"a type of {where}")

    def file_type(self, fmt: Format, release: str | None = None) -> int | None:
        """Return llama.cpp's number for a file mostly of this format; None if there is none."""
        return self.release(release).file_types.get(fmt.name)

    def named(self, name: str, release: str | None = None) -> Iterator[Format]:
        """Yield the format with a name or alias: of a release, or of the newest that has it."""
        if release is None:
            yield from [f for f in self.formats if name in (f.name.lower(), *f.aliases)][:1]
            return
        for fmt in self.release(release).types.values():
            if self.owns(fmt) and name in (fmt.name.lower(), *fmt.aliases):
                yield fmt

    def __repr__(self) -> str:
        return f"<Dialect {self.name}>"
