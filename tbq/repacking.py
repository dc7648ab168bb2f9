"""The same codes and scales in another container: what moves between forks without loss."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from tbq.api import checked_packed
from tbq.errors import CorruptBlockError, InputError
from tbq.format import Format
from tbq.registry import get_format, split_dialect


def repackable(source: Format, target: Format) -> bool:
    """Tell whether every row of one format holds what a row of another can, bit for bit.

    The codecs store the same codes and scales for the same values; order of fields, size of blocks
    and the encoder's own rounding may differ. Where a format has several codecs (`by_side`,
    `by_head_dim`) each has to match.
    """
    one, other = _contents(source), _contents(target)
    if len(one) == len(other) == 1:
        return list(one.values()) == list(other.values())
    return one == other


def _contents(fmt: Format) -> dict[str, tuple[type, Hashable]]:
    return {v.choice: (type(v.codec), v.codec.content) for v in fmt.variants()}


def repack(packed: np.ndarray, source: str | Format, target: str | Format) -> np.ndarray:
    """Move packed rows of one format into another's blocks, without decoding them.

    Args:
        packed: uint8 (..., row_bytes), rows of `source`.
        source, target: formats of which `repackable` is true.

    Returns:
        uint8 (..., row_bytes), the rows as `target` has them.

    Raises:
        InputError: the formats do not store the same, or rows do not fit.
        CorruptBlockError: blocks of a group disagree about its scale, which `target` has once.
    """
    source, target = get_format(source), get_format(target)
    if not repackable(source, target):
        need = f"a format with the codes and scales of {source.label}"
        raise InputError("target", target.label, need)
    packed = checked_packed(packed)
    n = source.row_values(packed.shape[-1])
    target.row_bytes(n)
    rows = packed.reshape(-1, packed.shape[-1])
    blocks = source.codec.blocks(rows).reshape(-1)
    if target.codec.layout.dtype != source.codec.layout.dtype:
        _require_one_scale(source, blocks)
    moved = target.codec.repacked(blocks, source.codec)
    return moved.view(np.uint8).reshape(*packed.shape[:-1], -1)


def _require_one_scale(fmt: Format, blocks: np.ndarray) -> None:
    for name in fmt.layout.scales:
        raw = blocks[name].view(np.uint16).reshape(-1, fmt.codec.group_blocks)
        differs = (raw != raw[:, :1]).any(axis=1)
        if differs.any():
            block = int(differs.argmax()) * fmt.codec.group_blocks
            reason = f"its group has several values of {name}, in other blocks it has one"
            raise CorruptBlockError(fmt.label, block, reason)


def counterpart(fmt: Format, place: str) -> Format | None:
    """Return what a format becomes in another dialect or release, `dialect[@release]`.

    That is the format with the same codes and scales, of the same name if there are several; else
    the one of the same name; else None.

    Raises:
        UnknownFormatError: there is no such dialect or release.
    """
    dialect, release = split_dialect(place)
    listed = list(dict.fromkeys(dialect.release(release).types.values()))
    same = [other for other in listed if repackable(fmt, other)]
    named = [other for other in listed if other.name == fmt.name]
    both = [other for other in same if other in named]
    return next(iter((*both, *same, *named)), None)
