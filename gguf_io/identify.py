"""Whose types the ids of a file mean: one answer for GGUF files and state files.

A file stores type ids, and every fork and every release has its own. A file that this project
wrote says which dialect and release are meant; for any other the caller does, or the evidence has
to leave exactly one: which ids a release has, sizes, scales that are never negative, and, among
those that still fit, what no encoder writes (signs that do not match their seed, norms that differ
in a group). Releases, and code bases, that give the same codecs for all ids of a file are one
candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gguf_io.metadata import brief
from gguf_io.types import TensorType, Unknown
from tbq import (
    AmbiguousTypeError,
    FileFormatError,
    Format,
    InputError,
    TbqError,
)
from tbq.dialect import Dialect, Release
from tbq.registry import dialects, get_dialect, meaning, split_dialect, undisputed

DIALECT_KEY = "tbq.dialect"
RELEASE_KEY = "tbq.release"
SAMPLED_BLOCKS = 256
# What random bytes show: half of all wrongly placed scales are negative; a few may be mere damage.
MISPLACED_SHARE = 0.2
ANOMALOUS_SHARE = 0.2


@dataclass(frozen=True)
class DialectChoice:
    """The dialect a file is read with, why, and what else it could have been.

    Attributes:
        dialect: the dialect, or None where no id needs one or none can be told.
        reason: one sentence for the user.
        guessed: whether it was inferred rather than stated.
        candidates: what fits, if none could be told: `dialect` or `dialect@release`.
        release: the release of the dialect.
    """

    dialect: str | None
    reason: str
    guessed: bool = False
    candidates: tuple[str, ...] = ()
    release: str | None = None

    def type_of(self, type_id: int) -> TensorType:
        """Return what a type id means; Unknown if that depends on a dialect that is not known."""
        if self.dialect is None:
            return undisputed(type_id) or Unknown(type_id)
        return meaning(type_id, self.dialect, self.release) or Unknown(type_id)


@dataclass(frozen=True)
class StoredRows:
    """Rows of one type as they lie in a file.

    Attributes:
        where: what they are, for messages.
        type_id: the ggml type id.
        buffer, start: the file's bytes, and where the rows start.
        rows: how many there are.
        row_values: values per row, where the file says it.
        row_bytes: bytes per row, where the file says it.
        room: bytes there are for them, and what its end is aligned to, where only that is known.
        is_last: whether what follows them may belong to nothing.
    """

    where: str
    type_id: int
    buffer: Any = field(repr=False)
    start: int
    rows: int
    row_values: int | None = None
    row_bytes: int | None = None
    room: tuple[int, int] | None = None
    is_last: bool = False

    @property
    def values(self) -> int:
        """Values per row, where bytes are not known."""
        assert self.row_values is not None, "a row is of so many bytes or so many values"
        return self.row_values

    def misfit(self, fmt: Format) -> str | None:
        """Say why the rows cannot be of a format; None if they can."""
        return self._size_misfit(fmt) or self._scale_misfit(fmt)

    def _size_misfit(self, fmt: Format) -> str | None:
        if self.row_bytes is not None:
            group = fmt.codec.group_blocks * fmt.block_bytes
            if (self.row_bytes - fmt.layout.header_bytes) % group:
                return (
                    f"{self.where} are {self.row_bytes} bytes long, blocks of {fmt.label} {group}"
                )
            return None
        if self.values % fmt.group_values:
            need = f"{fmt.label} needs a multiple of {fmt.group_values}"
            return f"rows of {self.where} have {self.row_values} values, {need}"
        assert self.room is not None, "where row_bytes is not known, the room is"
        taken, room = self.rows * fmt.row_bytes(self.values), self.room[0]
        if room < taken or not (self.is_last or self.fills(fmt)):
            return f"{self.where} has room for {room} bytes, as {fmt.label} it takes {taken}"
        return None

    def fills(self, fmt: Format) -> bool:
        """Tell whether rows of a format leave nothing over but what aligns the next."""
        if self.room is None:
            return True
        need, (room, alignment) = self.rows * fmt.row_bytes(self.values), self.room
        return room in (need, -(-need // alignment) * alignment)

    @np.errstate(all="ignore")
    def _scale_misfit(self, fmt: Format) -> str | None:
        if fmt.codec.signed_scales or not fmt.layout.scales:
            return None
        blocks = self.sample(fmt)
        for name in fmt.layout.scales:
            if blocks.size and (blocks[name] < 0).mean() > MISPLACED_SHARE:
                return f"{self.where} has negative scales where {fmt.label} keeps its norms"
        return None

    @np.errstate(all="ignore")
    def anomalies(self, fmt: Format) -> tuple[str, ...]:
        """Name what the first rows hold, and not just here and there, that no encoder writes."""
        blocks = self.sample(fmt)
        if not blocks.size:
            return ()
        codec = fmt.codec
        index = codec.indices(len(blocks), blocks.shape[1] // codec.group_blocks)
        index = np.repeat(index, codec.group_blocks)
        found = codec.anomalies(blocks.reshape(-1), index)
        return tuple(name for name, which in found.items() if which.mean() > ANOMALOUS_SHARE)

    def sample(self, fmt: Format) -> np.ndarray:
        """Return the blocks of the first rows as those of a format, (rows, blocks)."""
        width = self.row_bytes if self.row_bytes is not None else fmt.row_bytes(self.values)
        if not width or not self.rows:
            return np.empty((0, 0), fmt.block)
        blocks = (width - fmt.layout.header_bytes) // fmt.block_bytes
        if blocks > SAMPLED_BLOCKS:  # the start of one very wide row
            some = max(1, SAMPLED_BLOCKS // fmt.codec.group_blocks)
            return fmt.codec.part(np.frombuffer(self.buffer, np.uint8, width, self.start), 0, some)[
                None
            ]
        rows = min(self.rows, max(1, SAMPLED_BLOCKS // max(1, blocks)))
        raw = np.frombuffer(self.buffer, np.uint8, rows * width, self.start)
        return fmt.codec.blocks(raw.reshape(rows, width))


def identify(
    stored: Sequence[StoredRows],
    path: object,
    given: str | None = None,
    stated: tuple[object, object] | None = None,
    among: Iterable[str] | None = None,
) -> DialectChoice:
    """Decide with which dialect and release the types of a file are read.

    Args:
        stored: rows of every type that occurs.
        path: the file, for errors.
        given: what the caller says, `dialect` or `dialect@release`. Without a release: that which
            the file states, else the newest of those that fit best.
        stated: dialect and release that the file itself states; None if it states nothing.
        among: the dialects that the rest of the file allows; all if omitted.

    Raises:
        UnknownFormatError: `given` is not registered.
        FileFormatError: `given` does not fit the file.
    """
    ids = sorted({rows.type_id for rows in stored})
    misfits = _Misfits(stored)
    if given is not None:
        dialect, release = split_dialect(given)
        own = stated is not None and isinstance(stated[0], str) and stated[0] == dialect.name
        if release is None and stated is not None and own:
            choice = _stated(stated, misfits)
            if choice.dialect is not None:
                return replace(choice, reason="given by the caller")
        chosen = dialect.releases if release is None else (dialect.release(release),)
        found = [(dialect, r) for r in chosen if not misfits.of(dialect, r)]
        if not found:
            reason = misfits.of(dialect, chosen[0])
            raise FileFormatError(path, None, f"dialect {given} does not fit: {reason}")
        ((_, best), *_), _ = misfits.cleanest(found)
        return DialectChoice(dialect.name, "given by the caller", release=best.name)
    disputed = [i for i in ids if undisputed(i) is None]
    if stated is not None and (disputed or _lists(stated[0], ids)):
        return _stated(stated, misfits)
    if not disputed:
        return DialectChoice(None, "every type id means the same in all dialects")
    allowed = dialects() if among is None else tuple(among)
    return _guess(misfits, allowed, disputed)


def known_dialect(given: str) -> str:
    """Return `dialect` or `dialect@release` in its registered spelling.

    Raises:
        UnknownFormatError: it is not registered.
    """
    dialect, release = split_dialect(given)
    return dialect.name if release is None else f"{dialect.name}@{release}"


def undecodable(kind: Unknown, what: str, choice: DialectChoice) -> TbqError:
    """Return the error for values of `what` whose type id the chosen dialect does not explain."""
    if choice.candidates:
        places = [split_dialect(name) for name in choice.candidates]
        found = [meaning(kind.type_id, dialect.name, release) for dialect, release in places]
        keys = [
            fmt.label if fmt.key.startswith(name) else f"{name}:{fmt.name}"
            for fmt, name in zip(found, choice.candidates, strict=True)
            if fmt is not None
        ]
        given = f"type id {kind.type_id} of tensor {what!r}"
        if keys:
            return AmbiguousTypeError(given, keys, "pass dialect=")
    got = f"{kind.name} ({choice.reason})"
    return InputError(f"tensor {what!r}", got, "a type that can be decoded")


class _Misfits:
    """Why the rows of a file cannot be what a release says, each type looked at once."""

    def __init__(self, stored: Sequence[StoredRows]) -> None:
        self.stored = stored
        self.disputed = {rows.type_id: rows.where for rows in reversed(stored)}
        self.disputed = {i: w for i, w in self.disputed.items() if undisputed(i) is None}
        self._reasons: dict[tuple[int, str], str | None] = {}

    def of(self, dialect: Dialect, release: Release) -> str | None:
        """Say why the rows cannot be a release's; None if they can."""
        for type_id, where in self.disputed.items():
            fmt = meaning(type_id, dialect.name, release.name)
            if fmt is None:
                return f"{dialect.name} has no type id {type_id} ({where})"
            reason = self._reason(type_id, fmt)
            if reason:
                return reason
        return None

    def _reason(self, type_id: int, fmt: Format) -> str | None:
        key = type_id, fmt.key
        if key not in self._reasons:
            mine = (rows for rows in self.stored if rows.type_id == type_id)
            found = (rows.misfit(fmt) for rows in mine)
            self._reasons[key] = next((reason for reason in found if reason), None)
        return self._reasons[key]

    def overflowing(self, dialect: Dialect, release: Release) -> bool:
        """Tell whether a release's formats leave bytes over that belong to nothing."""
        mine = (rows for rows in self.stored if rows.type_id in self.disputed)
        return not all(r.fills(_meaning(r.type_id, dialect, release)) for r in mine)

    def anomalous(self, dialect: Dialect, release: Release) -> bool:
        """Tell whether rows hold what no encoder of a release, on any backend, writes."""
        backends = [get_dialect(name) for name in dialects()]
        backends = [d for d in backends if dialect.name in (d.name, d.backend_of)]
        for rows in self.stored:
            if rows.type_id not in self.disputed:
                continue
            fmt = _meaning(rows.type_id, dialect, release)
            own = [f for d in backends for f in d.named(fmt.name.lower())] or [fmt]
            same = [f for f in {fmt, *own} if f.block == fmt.block]
            if all(rows.anomalies(f) for f in same):
                return True
        return False

    def cleanest(
        self, found: list[tuple[Dialect, Release]]
    ) -> tuple[list[tuple[Dialect, Release]], bool]:
        """Return those that leave no bytes over and whose encoders write such rows.

        All if none does; and whether some were left out.
        """
        before = len(found)
        for doubtful in (self.overflowing, self.anomalous):
            if len(found) > 1:
                found = [(d, r) for d, r in found if not doubtful(d, r)] or found
        return found, len(found) < before


def _lists(name: object, ids: Sequence[int]) -> bool:
    """Tell whether a dialect of this name has a type of its own under some of these ids."""
    if not isinstance(name, str) or name not in dialects():
        return False
    return any(i in release.types for release in get_dialect(name).releases for i in ids)


def _stated(stated: tuple[object, object], misfits: _Misfits) -> DialectChoice:
    name, release_name = stated
    if isinstance(name, str) and name in dialects():
        dialect = get_dialect(name)
        named = isinstance(release_name, str)
        fitting = [r for r in dialect.releases if release_name is None or named]
        fitting = [r for r in fitting if not named or r.name == release_name]
        found = next((r for r in fitting if not misfits.of(dialect, r)), None)
        if found is not None:
            reason = f"stated by the metadata key {DIALECT_KEY}"
            return DialectChoice(name, reason, release=found.name)
    release = f", {RELEASE_KEY} = {brief(release_name)}" if release_name is not None else ""
    what = f"the file states {DIALECT_KEY} = {brief(name)}{release}"
    return DialectChoice(None, f"{what}, which is not registered or misfits")


def _guess(misfits: _Misfits, allowed: Sequence[str], ids: list[int]) -> DialectChoice:
    fitting = [
        (dialect, release)
        for dialect in map(get_dialect, allowed)
        for release in dialect.releases
        if not misfits.of(dialect, release)
    ]
    names = {dialect.name for dialect, _ in fitting}
    fitting = [(d, r) for d, r in fitting if d.backend_of not in names]
    found, fewer = misfits.cleanest(_distinct(fitting, ids))
    basis = "sizes, scales and regularities" if fewer else "sizes and scales"
    candidates = _candidate_names(found)
    if len(found) == 1:
        ((dialect, release),) = found
        reason = f"the only registered dialect whose {basis} fit type ids {ids}"
        return DialectChoice(dialect.name, reason, True, candidates, release.name)
    reason = f"{len(found) or 'none'} of the registered dialects fit type ids {ids}"
    return DialectChoice(None, reason, candidates=candidates)


def _distinct(
    fitting: list[tuple[Dialect, Release]], ids: list[int]
) -> list[tuple[Dialect, Release]]:
    """Keep one of those that read the ids in the same way, traits of the cache included."""
    kept: dict[tuple[Any, ...], tuple[Dialect, Release]] = {}
    for dialect, release in fitting:
        formats = [_meaning(i, dialect, release) for i in ids]
        own = all(fmt.is_ggml for fmt in formats)
        state = dialect.state.of({fmt.name for fmt in formats})
        traits = None if own else (dialect.rotation, state)
        codecs = tuple(
            (fmt.codec, *fmt.by_head_dim.items(), *fmt.by_side.items()) for fmt in formats
        )
        kept.setdefault((codecs, traits), (dialect, release))
    return list(kept.values())


def _meaning(type_id: int, dialect: Dialect, release: Release) -> Format:
    """Return what an id means in a release that has it."""
    fmt = meaning(type_id, dialect.name, release.name)
    assert fmt is not None, (type_id, dialect.name, release.name)
    return fmt


def _candidate_names(found: list[tuple[Dialect, Release]]) -> tuple[str, ...]:
    names = [dialect.name for dialect, _ in found]
    return tuple(
        dialect.name
        if names.count(dialect.name) == 1 and release is dialect.releases[0]
        else f"{dialect.name}@{release.name}"
        for dialect, release in found
    )


def gguf_rows(file: Any, records_and_stops: Any) -> list[StoredRows]:
    """Return the tensors of a parsed GGUF file as rows; those without values are left out."""
    found = []
    for record, stop in records_and_stops:
        if not record.rows:
            continue
        found.append(
            StoredRows(
                repr(record.name),
                record.type_id,
                file.map,
                file.data_start + record.offset,
                record.rows,
                row_values=record.row_values,
                room=(stop - record.offset, file.alignment),
                is_last=record is file.records[-1],
            )
        )
    return found
