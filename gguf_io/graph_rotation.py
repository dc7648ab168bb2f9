"""Which rotation the attention graph applies to K and V before they are stored.

llama.cpp (pull request 21089) and llama-tq rotate the keys and values of a cache whose type is
quantised: keys by the widest Hadamard matrix that fits the head, values by Hadamard blocks of 64,
and values that go into llama-tq's vtq types by its own signed Hadamard blocks. They do not if heads
differ in width or are no multiple of 64, nor if LLAMA_ATTN_ROT_DISABLE is set when the program
runs. No file records which of these happened.

The decision is made once per cache, from the type the user asked for. Layers that the fork keeps in
another type (llama-tq's boundary layers), and rows of type f16 that llama-tq has staged until it
quantises them, are rotated all the same.

Source: ggml-org/llama.cpp pull request 21089 @ f112d6de7, LL4nc33/llama-tq @ 0f57a4ee6:
src/llama-kv-cache.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tbq
from gguf_io.types import FLOAT_TYPES, TensorType
from tbq import Format, InputError, Rotation

if TYPE_CHECKING:
    from gguf_io.cache_tensor import CacheTensor

ROTATION_MODES = ("auto", "on", "off", "k", "v")
ROTATED_MULTIPLE = 64


@dataclass(frozen=True)
class RotationChoice:
    """The rotations that K and V are taken to be stored under.

    Attributes:
        keys, values: a kind for `tbq.rotation`, or None.
        reason: one sentence for the user.
        unclear: whether the file leaves open which rows are rotated.
    """

    keys: str | None
    values: str | None
    reason: str
    unclear: bool = False

    def of(self, kind: str, head_dim: int | None) -> Rotation | None:
        """Return the rotation of K or V rows with heads of head_dim values."""
        name = {"K": self.keys, "V": self.values}.get(kind)
        return tbq.rotation(name, head_dim) if name and head_dim else None


def is_quantized(kind: TensorType) -> bool:
    """Tell whether a cache type makes the graph rotate."""
    return isinstance(kind, Format) or kind.name not in FLOAT_TYPES


def rotation_kind(kind: str, types: Sequence[TensorType]) -> str:
    """Return which rotation the graph applies to the K or V of a cache of these types, if any."""
    if kind == "K":
        return "hadamard"
    rotated = any(isinstance(t, Format) and t.domain == "rotated" for t in types)
    return "dhd64" if rotated else "hadamard64"


def choose_rotation(mode: str, tensors: Sequence[CacheTensor], staging: bool) -> RotationChoice:
    """Decide what K and V of a dump are stored under.

    Args:
        mode: "auto", "on", "off", "k" (only keys) or "v" (only values).
        tensors: the views of the dump.
        staging: whether llama-tq was holding back rows of type f16 to quantise them later. It does
            not say whether those are the keys, the values or both.

    Raises:
        InputError: no such mode; or a rotation is demanded that no fork applies to such heads.
    """
    if mode not in ROTATION_MODES:
        raise InputError("rotation", repr(mode), f"one of {', '.join(ROTATION_MODES)}")
    sides = {kind: [t for t in tensors if t.kind == kind] for kind in "KV"}
    plain = {kind: not any(is_quantized(t.format) for t in sides[kind]) for kind in "KV"}
    unclear = staging and plain["K"] and plain["V"] and mode == "auto"
    kinds: dict[str, str | None] = {}
    why = []
    for kind, other, name in (("K", "V", "keys"), ("V", "K", "values")):
        mine = sides[kind]
        staged = staging and plain[kind]
        if mode != "auto":
            rotates, reason = mode in ("on", kind.lower()), "as told"
        elif not plain[kind]:
            names = dict.fromkeys(t.format.name for t in mine if is_quantized(t.format))
            rotates, reason = True, f"the default for {', '.join(names)} caches"
        elif staged and not plain[other]:
            rotates, reason = True, "these rows wait to be quantised (deferred state: staging)"
        elif staged:
            rotates = kind == "K"
            reason = "assumed, as keys, values or both wait to be quantised; rotation= decides"
        else:
            rotates, reason = False, "the type is not quantised"
        width = unfit_width(mine)
        if rotates and width:
            if mode != "auto":
                raise InputError("rotation", repr(mode), f"heads that are rotated, not {width}")
            rotates, reason = False, f"heads are {width}"
        own = "dhd64" if staged and kind == "V" else rotation_kind(kind, [t.format for t in mine])
        kinds[name] = own if rotates and mine else None
        if mine:
            why.append(f"{name} {kinds[name] or 'not rotated'}: {reason}")
    reason = "; ".join(why) or "no keys or values"
    return RotationChoice(kinds["keys"], kinds["values"], reason, unclear)


def unfit_width(tensors: Sequence[CacheTensor]) -> str | None:
    """Say which head width keeps the graph from rotating; None if all can be rotated."""
    widths = sorted({t.head_dim for t in tensors if t.head_dim})
    if len(widths) > 1:
        return f"of several widths, {widths}"
    unfit = [n for n in widths if n % ROTATED_MULTIPLE]
    return f"{unfit[0]} values wide, no multiple of {ROTATED_MULTIPLE}" if unfit else None
