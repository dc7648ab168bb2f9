"""Which dialect's types the ids of a file mean.

A GGUF file stores type ids, and from 42 up every fork has its own. A file that this project wrote
says which dialect is meant; for any other the caller does, or the sizes, the offsets and the scales
in the data have to leave exactly one registered dialect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

import tbq
from gguf_io.parser import ParsedFile, TensorRecord
from gguf_io.types import FIRST_FORK_ID, TensorType, Unknown, ggml_types
from tbq import (
    AmbiguousTypeError,
    FileFormatError,
    Format,
    InputError,
    TbqError,
    UnknownFormatError,
)
from tbq.registry import BACKEND_OF

DIALECT_KEY = "tbq.dialect"
SAMPLED_BLOCKS = 256
MISPLACED_SHARE = 0.2


@dataclass(frozen=True)
class DialectChoice:
    """The dialect a file is read with, why, and what else it could have been.

    Attributes:
        dialect: the dialect, or None where no id needs one or none can be told.
        reason: one sentence for the user.
        guessed: whether it was inferred rather than stated.
        candidates: the dialects that fit, if none could be told.
    """

    dialect: str | None
    reason: str
    guessed: bool = False
    candidates: tuple[str, ...] = ()


def choose_dialect(files: list[ParsedFile], given: str | None) -> DialectChoice:
    """Decide with which dialect the fork types of a (split) file are read.

    Raises:
        UnknownFormatError: `given` is not a registered dialect.
        FileFormatError: `given` does not fit the file.
    """
    if given is not None:
        given = checked_dialect(given)
        misfit = _misfit(files, given)
        if misfit:
            raise FileFormatError(files[0].path, None, f"dialect {given} does not fit: {misfit}")
        return DialectChoice(given, "given by the caller")
    ids = sorted({r.type_id for f in files for r in f.records if r.type_id >= FIRST_FORK_ID})
    if not ids:
        return DialectChoice(None, f"no type id from {FIRST_FORK_ID} up")
    stated = files[0].fields.get(DIALECT_KEY)
    stated = stated.value if stated is not None else None
    if stated in tbq.dialects() and not _misfit(files, stated):
        return DialectChoice(stated, f"stated by the metadata key {DIALECT_KEY}")
    if stated is not None:
        reason = f"the file states {DIALECT_KEY} = {stated!r}, which is not registered or misfits"
        return DialectChoice(None, reason)
    return guess_dialect([d for d in tbq.dialects() if not _misfit(files, d)], ids)


def checked_dialect(given: str) -> str:
    """Return a dialect's name in lower case; UnknownFormatError if it is not registered."""
    if given.lower() not in tbq.dialects():
        raise UnknownFormatError(given, tbq.dialects(), "tbq.dialects()")
    return given.lower()


def guess_dialect(fitting: list[str], ids: list[int]) -> DialectChoice:
    """Choose among the dialects whose types fit the fork's type ids of a file."""
    candidates = tuple(d for d in fitting if BACKEND_OF.get(d) not in fitting)
    if len(candidates) == 1:
        reason = f"the only registered dialect whose sizes and scales fit type ids {ids}"
        return DialectChoice(candidates[0], reason, guessed=True, candidates=candidates)
    reason = f"{len(candidates) or 'none'} of the registered dialects fit type ids {ids}"
    return DialectChoice(None, reason, candidates=candidates)


def tensor_type(type_id: int, dialect: str | None) -> TensorType:
    """Return what a type id means in a dialect; the dialect's own ids come first."""
    for fmt in tbq.formats():
        if fmt.dialect == dialect and fmt.type_id == type_id:
            return fmt
    return ggml_types().get(type_id) or Unknown(type_id)


def undecodable(kind: Unknown, what: str, choice: DialectChoice) -> TbqError:
    """Return the error for values of `what` whose type id the chosen dialect does not explain."""
    if choice.candidates:
        keys = [tensor_type(kind.type_id, d).key for d in choice.candidates]
        given = f"type id {kind.type_id} of tensor {what!r}"
        return AmbiguousTypeError(given, keys, "pass dialect=")
    got = f"{kind.name} ({choice.reason})"
    return InputError(f"tensor {what!r}", got, "a type that can be decoded")


def _misfit(files: list[ParsedFile], dialect: str) -> str | None:
    """Say why the fork types of the files cannot be this dialect's; None if they can."""
    for file in files:
        for record, stop in zip(file.records, extents(file), strict=True):
            if record.type_id < FIRST_FORK_ID:
                continue
            fmt = tensor_type(record.type_id, dialect)
            if isinstance(fmt, Unknown):
                return f"{dialect} has no type id {record.type_id} (tensor {record.name!r})"
            reason = _size_misfit(file, record, fmt, stop) or _scale_misfit(file, record, fmt)
            if reason:
                return reason
    return None


def extents(file: ParsedFile) -> list[int]:
    """Return where the space of each tensor ends: at the next tensor, or at the end of the file."""
    data_bytes = max(0, file.size - file.data_start)
    following = [record.offset for record in file.records[1:]]
    return [min(stop, data_bytes) for stop in [*following, data_bytes]][: len(file.records)]


def _size_misfit(file: ParsedFile, record: TensorRecord, fmt: Format, stop: int) -> str | None:
    if record.ne[0] % fmt.block_values:
        need = f"{fmt.key} needs a multiple of {fmt.block_values}"
        return f"rows of {record.name!r} have {record.ne[0]} values, {need}"
    need = math.prod(record.ne) // fmt.block_values * fmt.block_bytes
    room = stop - record.offset
    is_last = record is file.records[-1]
    if room < need or (not is_last and room != -(-need // file.alignment) * file.alignment):
        return f"{record.name!r} has room for {room} bytes, as {fmt.key} it takes {need}"
    return None


def _scale_misfit(file: ParsedFile, record: TensorRecord, fmt: Format) -> str | None:
    n = math.prod(record.ne) // fmt.block_values
    if scales_misplaced(fmt, file.map, file.data_start + record.offset, n):
        return f"{record.name!r} has negative scales where {fmt.key} keeps its norms"
    return None


def scales_misplaced(fmt: Format, buffer, start: int, n: int) -> bool:
    """Tell from the first of n blocks whether they cannot be of this format.

    A scale is never negative, half of all wrongly placed ones are; a few may be mere damage.
    """
    blocks = np.frombuffer(buffer, fmt.block, count=min(SAMPLED_BLOCKS, n), offset=start)
    return any((blocks[name] < 0).mean() > MISPLACED_SHARE for name in fmt.scales)
