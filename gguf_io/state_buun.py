"""What buun's slot files have around tokens and memory.

    file        u32 GGSQ, u32 3, u64 bytes of the file, u64 FNV-1a-64 of everything after byte 24;
                u32 n, i32 words[n], memory
    words       an envelope, or a token list as llama-server's
    envelope    224 bytes: "BUUNSLOT", u32 version @8, u32 header size @12, u32 flags @16 (bit 0:
                logits, bit 2: resume key), u64 token bytes @24, u32 number of logits @48; SHA-256
                @56 of the runtime's identity, @88 of the adapter's, @120 of the tokens, @152 of
                the packed tokens, @184 of the logits; u64 bytes of logits @216; then the packed
                tokens, and the logits
    object      "BUUNRSMO", u32 1, u32 64, u32 kind, u32 flags, u64 payload bytes, u64 XXH3, u32 p0,
                u32 p1, u64 generation, u64 XXH3 of the 56 bytes before; payload

What the first three digests are taken of is not known, so that they are shown and not checked.

Source: spiritbuun/buun-llama-cpp, docs/development/server-resume-format.md and
tools/server/tests/unit/test_slot_save.py, as read; no file was at hand.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gguf_io.mapped import map_file
from gguf_io.slot_tokens import SlotTokens, slot_tokens

HEADER_BYTES = 24
ENVELOPE_MAGIC = b"BUUNSLOT"
ENVELOPE_BYTES = 224
OBJECT_MAGIC = b"BUUNRSMO"
RESUME_MAGICS = (OBJECT_MAGIC, b"BUUNRSME", b"BUUNRSMM")
OBJECT_BYTES = 64
OBJECT_KINDS = {1: "chunk", 2: "tail", 3: "VBR", 4: "placement", 5: "whole"}
DIGESTS = {"runtime": 56, "adapter": 88, "tokens": 120, "packed tokens": 152, "logits": 184}
CHECKED = ("packed tokens", "logits")
FNV_START, FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
MAX_OBJECTS = 1 << 16


@dataclass(frozen=True, eq=False)
class Envelope:
    """What stands around the packed tokens.

    Attributes:
        version, flags: as stated.
        digests: hexadecimal SHA-256 by what they are of.
        checks: what became of those that can be checked: "right", "wrong" or "not set".
        slot: the packed tokens, None if they are none.
        logits: how many there are.
    """

    version: int
    flags: int
    digests: dict[str, str]
    checks: dict[str, str]
    slot: SlotTokens | None
    logits: int


@dataclass(frozen=True)
class StoredObject:
    """One object of a resume store: what it says, and where its payload is."""

    kind: str
    start: int
    payload_bytes: int
    first: int
    last: int
    generation: int
    complete: bool


def states_size(mapped: Any) -> bool:
    """Tell whether a file has the header of 24 bytes: then its size stands in it."""
    return len(mapped) >= HEADER_BYTES and struct.unpack_from("<Q", mapped, 8)[0] == len(mapped)


def stated_checksum(mapped: Any) -> int:
    """Return the checksum that the header states."""
    return struct.unpack_from("<Q", mapped, 16)[0]


def fnv1a64(data: np.ndarray | bytes, state: int = FNV_START) -> int:
    """Return the FNV-1a-64 of bytes, going on from that of the bytes before."""
    data = np.frombuffer(data, np.uint8) if isinstance(data, (bytes, memoryview)) else data
    return int(_kernel()(np.ascontiguousarray(data).reshape(-1).view(np.uint8), np.uint64(state)))


@cache
def _kernel() -> Any:
    from tbq.kernels.checksum import fnv1a64  # imports Numba

    return fnv1a64


def envelope(words: np.ndarray) -> Envelope | None:
    """Decode an envelope from int32 words; None if they are none."""
    data = words.view(np.uint8)
    if len(data) < ENVELOPE_BYTES or data[:8].tobytes() != ENVELOPE_MAGIC:
        return None
    head = data[:ENVELOPE_BYTES].tobytes()
    version, size, flags = struct.unpack_from("<III", head, 8)
    (token_bytes,) = struct.unpack_from("<Q", head, 24)
    (logits,) = struct.unpack_from("<I", head, 48)
    (logit_bytes,) = struct.unpack_from("<Q", head, 216)
    if ENVELOPE_BYTES + token_bytes + logit_bytes > len(data):
        return None
    end = ENVELOPE_BYTES + token_bytes
    content = {"packed tokens": data[ENVELOPE_BYTES:end], "logits": data[end : end + logit_bytes]}
    digests = {name: head[at : at + 32] for name, at in DIGESTS.items()}
    checks = {}
    for name in CHECKED:
        right = hashlib.sha256(content[name].data).digest() == digests[name]
        checks[name] = "right" if right else "wrong" if any(digests[name]) else "not set"
    packed = content["packed tokens"]
    slot = slot_tokens(packed[: len(packed) // 4 * 4].view("<i4"))
    hexadecimal = {name: digest.hex() for name, digest in digests.items()}
    return Envelope(version, flags, hexadecimal, checks, slot, logits)


def stored_objects(path: str | os.PathLike[str]) -> list[StoredObject]:
    """List the objects of a resume store's file, or of an exported entry.

    Raises:
        FileFormatError: not a regular file, or empty.
        OSError: it cannot be opened.
    """
    mapped = map_file(path)
    found: list[StoredObject] = []
    at = mapped.find(OBJECT_MAGIC)
    while at >= 0 and len(found) < MAX_OBJECTS and at + OBJECT_BYTES <= len(mapped):
        one, size, kind, _, payload, _, first, last, generation = struct.unpack_from(
            "<IIIIQQIIQ", mapped, at + 8
        )
        begin = at + OBJECT_BYTES
        if (one, size) == (1, OBJECT_BYTES):
            name = OBJECT_KINDS.get(kind, f"kind {kind}")
            complete = payload <= len(mapped) - begin
            found.append(StoredObject(name, at, payload, first, last, generation, complete))
            begin += payload if complete else 0
        at = mapped.find(OBJECT_MAGIC, begin)
    return found


def is_resume_file(start: bytes) -> bool:
    """Tell whether bytes start an object, a manifest or an exported entry of a resume store."""
    return start[:8] in RESUME_MAGICS
