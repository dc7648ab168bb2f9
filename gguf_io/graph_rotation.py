"""Which rotation the attention graph applies to K and V before they are stored.

llama.cpp (pull request 21089) and llama-tq rotate the keys and values of a cache whose type is
quantised: keys by the widest Hadamard matrix that fits the head, values by Hadamard blocks of 64,
and values that go into llama-tq's vtq types by its own signed Hadamard blocks. They do not if heads
differ in width or are no multiple of 64, nor if LLAMA_ATTN_ROT_DISABLE is set when the program
runs. No file records which of these happened.

Each cache decides from the heads of its own layers: of a model whose window layers have narrower
heads (Gemma 4: 512 and 256), both caches are rotated, each by its own width. The type that decides
is the one the user asked for. Layers that the fork keeps in another type (llama-tq's boundary
layers), and rows of type f16 that llama-tq has staged until it quantises them, are rotated all the
same.

Source: ggml-org/llama.cpp pull request 21089 @ f112d6de7, LL4nc33/llama-tq @ 0f57a4ee6:
src/llama-kv-cache.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tbq
from gguf_io.types import TensorType
from tbq import InputError, Rotation
from tbq.format import GGML
from tbq.registry import get_dialect

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
        unfit: the caches, (kind, memory), whose heads cannot be rotated.
    """

    keys: str | None
    values: str | None
    reason: str
    unclear: bool = False
    unfit: frozenset[tuple[str, int]] = frozenset()

    def of(self, tensor: CacheTensor) -> Rotation | None:
        """Return the rotation that the rows of a view are stored under."""
        name = {"K": self.keys, "V": self.values}.get(tensor.kind)
        if not name or not tensor.head_dim or (tensor.kind, tensor.memory) in self.unfit:
            return None
        return tbq.rotation(name, tensor.head_dim)


def rotation_kind(kind: str, types: Sequence[TensorType], dialect: str | None = None) -> str | None:
    """Return which rotation a dialect's graph applies to the K or V of a cache of these types.

    Without a dialect it is that of the types, else upstream's.
    """
    own = [t.dialect for t in types if t.dialect not in (None, GGML)]
    dialect = dialect or (own[0] if own else GGML)
    return get_dialect(dialect).rotation.kind(kind, types)


def choose_rotation(
    mode: str, tensors: Sequence[CacheTensor], staging: bool, dialect: str | None = None
) -> RotationChoice:
    """Decide what K and V of a dump are stored under.

    Args:
        mode: "auto", "on", "off", "k" (only keys) or "v" (only values).
        tensors: the views of the dump.
        staging: whether llama-tq was holding back rows of type f16 to quantise them later. It does
            not say whether those are the keys, the values or both.
        dialect: whose graph it was; None if nothing in the dump says so.

    Raises:
        InputError: no such mode; or a rotation is demanded that no fork applies to such heads.
    """
    if mode not in ROTATION_MODES:
        raise InputError("rotation", repr(mode), f"one of {', '.join(ROTATION_MODES)}")
    sides = {kind: [t for t in tensors if t.kind == kind] for kind in "KV"}
    plain = {kind: not any(t.format.is_quantized for t in sides[kind]) for kind in "KV"}
    unclear = staging and plain["K"] and plain["V"] and mode == "auto"
    kinds: dict[str, str | None] = {}
    why = []
    unfit = unfit_widths(tensors)
    for kind, other, name in (("K", "V", "keys"), ("V", "K", "values")):
        mine = sides[kind]
        staged = staging and plain[kind]
        if mode != "auto":
            rotates, reason = mode in ("on", kind.lower()), "as told"
        elif not plain[kind]:
            names = dict.fromkeys(t.format.name for t in mine if t.format.is_quantized)
            rotates, reason = True, f"the default for {', '.join(names)} caches"
        elif staged and not plain[other]:
            rotates, reason = True, "these rows wait to be quantised (deferred state: staging)"
        elif staged:
            rotates = kind == "K"
            reason = "assumed, as keys, values or both wait to be quantised; rotation= decides"
        else:
            rotates, reason = False, "the type is not quantised"
        widths = [unfit.get((t.kind, t.memory)) for t in mine]
        if rotates and mine and all(widths):
            if mode != "auto":
                raise InputError("rotation", repr(mode), f"heads that are rotated, not {widths[0]}")
            rotates, reason = False, f"heads are {widths[0]}"
        elif rotates and any(widths):
            reason += f"; but not of the cache whose heads are {next(filter(None, widths))}"
        own = rotation_kind(kind, [t.format for t in mine], dialect)
        if staged and kind == "V":
            own = get_dialect(dialect).rotation.rotated_values
        if rotates and own is None and mine:
            if mode != "auto":
                raise InputError("rotation", repr(mode), f"none: the graph of {dialect} has none")
            rotates, reason = False, f"the graph of {dialect} rotates nothing before it is stored"
        kinds[name] = own if rotates and mine else None
        if mine:
            why.append(f"{name} {kinds[name] or 'not rotated'}: {reason}")
    reason = "; ".join(why) or "no keys or values"
    return RotationChoice(kinds["keys"], kinds["values"], reason, unclear, frozenset(unfit))


def unfit_widths(tensors: Sequence[CacheTensor]) -> dict[tuple[str, int], str]:
    """Say of each cache, (kind, memory), that is not rotated which heads forbid it."""
    widths: dict[tuple[str, int], set[int]] = {}
    for t in tensors:
        if t.head_dim:
            widths.setdefault((t.kind, t.memory), set()).add(t.head_dim)
    found = {cache: _unfit(sorted(own)) for cache, own in widths.items()}
    return {cache: reason for cache, reason in found.items() if reason}


def _unfit(widths: list[int]) -> str | None:
    if len(widths) > 1:
        return f"of several widths, {widths}"
    unfit = [n for n in widths if n % ROTATED_MULTIPLE]
    return f"{unfit[0]} values wide, no multiple of {ROTATED_MULTIPLE}" if unfit else None
