"""What stands around the memory in a state file: magics, versions, tokens, architecture.

    session     u32 GGSN, u32 version, u32 n, i32 tokens[n], u32 length, architecture, memory
    sequence    u32 GGSQ, u32 version, u32 n, i32 words[n], memory, [appendix]; buun's has a header
                of 24 bytes, see `state_buun`
    blobs       u32 0xaf143cd8, i32 sequence, memory; or memory alone; or u32 length, architecture,
                memory

Source: ggml-org/llama.cpp pull request 21089 @ f112d6de7 and 0c1e57098, src/llama-context.cpp.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gguf_io import state_buun
from gguf_io.mapped import MappedFile
from gguf_io.parser import MAGIC as GGUF_MAGIC
from gguf_io.slot_appendix import Appendix, appendix_at
from gguf_io.slot_tokens import MARK, SlotTokens, slot_tokens
from gguf_io.state_cursor import Cursor, Mismatch
from tbq import FileFormatError

SESSION_MAGIC = 0x6767736E  # GGSN
SEQUENCE_MAGIC = 0x67677371  # GGSQ
BLOB_MAGIC = 0xAF143CD8
MAGICS = (SESSION_MAGIC, SEQUENCE_MAGIC, BLOB_MAGIC)
# Versions of llama.cpp whose files were looked at. A version does not tell the forks apart: each
# wrote other bytes under these numbers.
CHECKED_VERSIONS = {"session": (9, 10), "sequence": (2, 3)}
# The version from which on cells have a token beside their coordinates, and classes were added.
NEW_VERSIONS = {"session": 10, "sequence": 3}
MOST = (1 << 32) - 1


@dataclass(frozen=True)
class Container:
    """What stands around the memory.

    Attributes:
        kind: "session" (GGSN), "sequence" (GGSQ), "sequence blob" or "state blob".
        version: the file's version, None for blobs.
        tokens: int32 view of the words where the tokens stand, None for blobs.
        architecture: such as "llama", where the file says it.
        sequence_id: of a blob that says it.
        memory_at: where the memory starts.
        slot: the words decoded, where they are llama-server's packed list.
        envelope: buun's envelope, where the words are one.
        long_header: whether the header is buun's, of 24 bytes with size and checksum.
        appendix: what follows the memory; None if nothing does.
    """

    kind: str
    version: int | None = None
    tokens: np.ndarray | None = None
    architecture: str | None = None
    sequence_id: int | None = None
    memory_at: int = 0
    slot: SlotTokens | None = None
    envelope: state_buun.Envelope | None = None
    long_header: bool = False
    appendix: Appendix | None = None

    @property
    def token_list(self) -> np.ndarray | None:
        """int32, the tokens themselves, -1 where a medium stands; None where there are none."""
        if self.slot is not None:
            return self.slot.tokens
        return None if self.envelope is not None else self.tokens

    @property
    def is_packed(self) -> bool:
        """Whether the words are llama-server's packed list, decoded or not."""
        first = self.tokens is not None and len(self.tokens) > 0 and int(self.tokens[0]) == MARK
        return first or (self.envelope is not None and self.slot is not None)

    @property
    def checked(self) -> bool:
        """Whether files of llama.cpp of this kind and version were looked at."""
        return self.version is None or self.version in CHECKED_VERSIONS[self.kind]

    @property
    def newer(self) -> bool:
        """Whether the version is newer than those that were looked at."""
        return self.version is not None and self.version > max(CHECKED_VERSIONS[self.kind])

    @property
    def old(self) -> bool:
        """Whether the version is that of trees before cells had tokens."""
        return self.version is not None and self.version < NEW_VERSIONS[self.kind]

    def header(self, version: int | None = None, words: bytes | None = None) -> bytes:
        """Return the bytes before the memory, with another version or other words if given.

        The size and checksum of buun's header are zero.
        """
        version = self.version if version is None else version
        own = b"" if self.tokens is None else self.tokens.tobytes()
        words = own if words is None else words
        name = (self.architecture or "").encode()
        arch = struct.pack("<I", len(name)) + name if self.architecture is not None else b""
        if self.kind in ("session", "sequence"):
            magic = SESSION_MAGIC if self.kind == "session" else SEQUENCE_MAGIC
            out = struct.pack("<II", magic, version) + bytes(16 if self.long_header else 0)
            return out + struct.pack("<I", len(words) // 4) + words + arch
        if self.sequence_id is not None:
            return struct.pack("<Ii", BLOB_MAGIC, self.sequence_id)
        return arch


def containers(path: Path, mapped: MappedFile) -> list[Container]:
    """Return what the start of a file can be; several only for blobs without a magic.

    Raises:
        FileFormatError: nothing, or something that is not read.
    """
    cursor = Cursor(mapped)
    try:
        magic = cursor.number("I", "magic", 0, MOST)
        if magic in (SESSION_MAGIC, SEQUENCE_MAGIC):
            return [_file_container(path, cursor, mapped, magic)]
        if magic == BLOB_MAGIC:
            sequence = cursor.number("i", "sequence id", -(1 << 31), (1 << 31) - 1)
            return [Container("sequence blob", sequence_id=sequence, memory_at=cursor.at)]
    except Mismatch as failure:
        raise FileFormatError(path, failure.at, failure.reason) from None
    start = bytes(mapped[:8])
    if start[:4] == GGUF_MAGIC:
        raise FileFormatError(path, 0, "a GGUF file, not a state file; use open_gguf")
    if state_buun.is_resume_file(start):
        reason = "a file of buun's resume store; tbq-inspect lists its objects"
        raise FileFormatError(path, 0, reason)
    if struct.unpack(">I", start[:4])[0] in MAGICS:
        raise FileFormatError(path, 0, "a big-endian state file; only little-endian is supported")
    found = [Container("sequence blob")]
    try:
        cursor = Cursor(mapped)
        name = _architecture(cursor)
        found.append(Container("state blob", architecture=name, memory_at=cursor.at))
    except Mismatch:
        pass
    return found


def with_appendix(container: Container, mapped: MappedFile, at: int) -> Container | None:
    """Return the container with the appendix that starts somewhere; None if none does."""
    appendix = appendix_at(mapped, at)
    return None if appendix is None else replace(container, appendix=appendix)


def with_trailing(container: Container, at: int, size: int) -> Container:
    """Return the container with all that follows the memory as an appendix nobody knows."""
    return replace(container, appendix=Appendix(at, size - at, "bytes that nothing explains"))


def _file_container(path: Path, cursor: Cursor, mapped: MappedFile, magic: int) -> Container:
    version = cursor.number("I", "version", 0, MOST)
    long_header = magic == SEQUENCE_MAGIC and state_buun.states_size(mapped)
    if long_header:
        cursor.skip(16, "size and checksum")
        _check_sum(path, mapped)
    tokens = cursor.array(cursor.number("I", "token count", 0, MOST), "tokens")
    envelope = state_buun.envelope(tokens)
    if envelope is not None and "wrong" in envelope.checks.values():
        wrong = next(name for name, check in envelope.checks.items() if check == "wrong")
        reason = f"the SHA-256 of the {wrong} is not that which the BUUNSLOT envelope states"
        raise FileFormatError(path, cursor.at - tokens.nbytes, reason)
    slot = envelope.slot if envelope is not None else slot_tokens(tokens)
    own: dict[str, Any] = {"slot": slot, "envelope": envelope, "long_header": long_header}
    if magic == SEQUENCE_MAGIC:
        return Container("sequence", version, tokens, memory_at=cursor.at, **own)
    name = _architecture(cursor)
    return Container("session", version, tokens, name, memory_at=cursor.at, **own)


def _check_sum(path: Path, mapped: MappedFile) -> None:
    stated = state_buun.stated_checksum(mapped)
    body = np.frombuffer(mapped, np.uint8, offset=state_buun.HEADER_BYTES)
    found = state_buun.fnv1a64(body)
    if found != stated:
        reason = f"the checksum of what follows is {found:016x}, the header states {stated:016x}"
        raise FileFormatError(path, 16, reason)


def _architecture(cursor: Cursor) -> str:
    where = cursor.at
    length = cursor.number("I", "length of the architecture's name", 1, 64)
    start = cursor.skip(length, "architecture")
    name = bytes(cursor.buffer[start : cursor.at])
    if not name.isascii() or not name.decode().isprintable():
        raise Mismatch(where, f"architecture {name!r} is not printable")
    return name.decode()
