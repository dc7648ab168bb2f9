"""llama-server's packed token list, which stands where a sequence file has its tokens.

    words    i32 -1, u32 version 1, u32 n, i32 tokens[n], u32 m, u32 start[m], m times u32 size and
             so many bytes; zeros up to whole words

A medium's tokens are -1 in the list, from its start on. What the bytes of a medium are is the
server's. A list whose first word is not -1 is a plain one.

Source: ggml-org/llama.cpp @ 0c1e57098, tools/server/server-common.cpp: server_tokens::serialize.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

MARK = -1
VERSION = 1


@dataclass(frozen=True, eq=False)
class Media:
    """One image or sound: where its tokens start, and what the server keeps of it, uint8."""

    start: int
    data: np.ndarray


@dataclass(frozen=True, eq=False)
class SlotTokens:
    """A packed list, decoded.

    Attributes:
        version: its version.
        tokens: int32 (n,), -1 where a medium stands.
        media: in the order of the file.
    """

    version: int
    tokens: np.ndarray
    media: tuple[Media, ...] = ()

    def words(self) -> bytes:
        """Return the list as the server packs it."""
        out = struct.pack("<iII", MARK, self.version, len(self.tokens))
        out += self.tokens.astype("<i4").tobytes() + struct.pack("<I", len(self.media))
        out += b"".join(struct.pack("<I", m.start) for m in self.media)
        out += b"".join(struct.pack("<I", len(m.data)) + m.data.tobytes() for m in self.media)
        return out + bytes(-len(out) % 4)


def slot_tokens(words: np.ndarray) -> SlotTokens | None:
    """Decode a packed list from int32 words; None if they are no such list."""
    unsigned = words.view("<u4")
    if len(words) < 4 or words[0] != MARK or words[1] != VERSION or unsigned[2] > len(words) - 4:
        return None
    at = 3 + int(unsigned[2])
    tokens, count = words[3:at], int(unsigned[at])
    at += 1
    if count > len(words) - at:
        return None
    begins = unsigned[at : at + count].tolist()
    data, place = words.view(np.uint8), 4 * (at + count)
    media = []
    for start in begins:
        size = int.from_bytes(data[place : place + 4].tobytes(), "little")
        if place + 4 + size > len(data):
            return None
        media.append(Media(start, data[place + 4 : place + 4 + size]))
        place += 4 + size
    if len(data) - place >= 4 or data[place:].any():
        return None
    return SlotTokens(VERSION, tokens, tuple(media))
