"""Context checkpoints that a patched llama-server appends to a slot file.

    appendix    "SCKP", u32 1, u32 count, checkpoints up to the end of the file
    checkpoint  i64 tokens, i32 first position, i32 last position, and three times u64 size and so
                many bytes: states of the target, of a draft and of speculation

llama.cpp loads a sequence file without looking behind its memory, so that it can have one.

Source: ggml-org/llama.cpp pull request 26004 (open) as other readers describe it; no file was at
hand.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

MAGIC = b"SCKP"
VERSION = 1
MAX_CHECKPOINTS = 1024


@dataclass(frozen=True)
class Appendix:
    """What follows a memory.

    Attributes:
        start, n_bytes: where it is.
        name: what it is.
        checkpoints: tokens, first and last position, and bytes of each checkpoint.
    """

    start: int
    n_bytes: int
    name: str
    checkpoints: tuple[tuple[int, int, int, int], ...] = ()


def appendix_at(mapped: Any, at: int) -> Appendix | None:
    """Return the appendix that starts at `at` and ends where the file does; None if none does."""
    if mapped[at : at + 4] != MAGIC:
        return None
    checkpoints = _checkpoints(mapped, at)
    if checkpoints is None:
        return None
    name = f"context checkpoints of llama-server (SCKP {VERSION})"
    return Appendix(at, len(mapped) - at, name, tuple(checkpoints))


def _checkpoints(mapped: Any, at: int) -> list[tuple[int, int, int, int]] | None:
    """Read checkpoints up to the end of the file; None if that is not what is there."""
    end = len(mapped)
    if at + 12 > end:
        return None
    version, count = struct.unpack_from("<II", mapped, at + 4)
    if version != VERSION or count > MAX_CHECKPOINTS:
        return None
    at, found = at + 12, []
    for _ in range(count):
        if at + 16 > end:
            return None
        tokens, first, last = struct.unpack_from("<qii", mapped, at)
        at, begin = at + 16, at
        for _ in range(3):
            if at + 8 > end:
                return None
            at += 8 + struct.unpack_from("<Q", mapped, at)[0]
        found.append((tokens, first, last, at - begin))
    return found if at == end else None
