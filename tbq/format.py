"""`Format`: what a fork calls a codec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from tbq.codec import Codec, Layout, RowKernels
from tbq.errors import InputError

Side = Literal["K", "V", "KV"]
Evidence = Literal["vectors", "read", "gguf-py"]
EVIDENCE = {
    "vectors": "equals what the fork's own code wrote, for every vector",
    "read": "follows the fork's text; nothing of the fork was run",
    "gguf-py": "gguf-py's arithmetic, not ours",
}


@dataclass(frozen=True, eq=False)
class Format:
    """A dialect's name for a codec.

    Attributes:
        dialect: the code base (and backend) whose bytes are meant.
        name: the ggml type name within the dialect.
        codec: the codec; where there are several, that of a format without a choice made.
        side: which half of a KV cache the dialect uses it for.
        source: repository, commit and file of the arithmetic.
        release: a release that has this codec under this name, where the newest has another one or
            none; part of the key then.
        by_head_dim: other codecs for caches with heads of so many values.
        by_side: the codecs for K and for V, where they differ.
        takes_mean: whether channel means can be subtracted before (`quantize(..., mean=)`).
        sibling: key of the format whose blocks lend theirs the codes; None if they stand alone.
        evidence: what its exactness rests on, a key of EVIDENCE.
        aliases: other names by which the dialect's programs know it.
        notes: what a user should know before trusting it.
        choice: which codec was chosen, such as "head_dim=512"; empty where there is no choice.
    """

    dialect: str
    name: str
    codec: Codec
    side: Side
    source: str
    release: str = ""
    by_head_dim: Mapping[int, Codec] = field(default_factory=dict)
    by_side: Mapping[Side, Codec] = field(default_factory=dict)
    takes_mean: bool = False
    sibling: str | None = None
    evidence: Evidence = "vectors"
    aliases: tuple[str, ...] = ()
    notes: str = ""
    choice: str = ""

    # --- names -----------------------------------------------------------------------------------

    @cached_property
    def key(self) -> str:
        """The unique name, `dialect:name`, or `dialect@release:name` of an older codec."""
        return f"{self.dialect}{'@' + self.release if self.release else ''}:{self.name}"

    @cached_property
    def label(self) -> str:
        """The key with the choice that was made; the bare name of ggml's own types."""
        bare = self.name if self.is_ggml else self.key
        return f"{bare}[{self.choice}]" if self.choice else bare

    @property
    def is_ggml(self) -> bool:
        """Whether it is one of ggml's own types, which every code base has."""
        return self.dialect in UPSTREAM

    # --- choices ---------------------------------------------------------------------------------

    def at(self, head_dim: int | None = None, side: str | None = None) -> Format:
        """Return the format with its codec for these heads and this side.

        Raises:
            InputError: a choice is needed and not made, or made and means nothing here.
        """
        if head_dim is None and side is None and not (self.by_head_dim or self.by_side):
            return self
        if head_dim is not None and not self.by_head_dim:
            raise InputError("head_dim", str(head_dim), f"none: {self.key} is the same for all")
        if side is not None and not self.by_side:
            raise InputError("side", repr(side), f"none: {self.key} is the same for K and V")
        if self.by_side and side not in self.by_side:
            need = f"{' or '.join(map(repr, self.by_side))}, for which {self.key} differs"
            raise InputError("side", repr(side), need)
        if self.by_head_dim and head_dim is None:
            widths = ", ".join(map(str, self.by_head_dim))
            raise InputError("head_dim", "none", f"values per head: {self.key} differs at {widths}")
        return self._chosen(head_dim, side)

    def fitting(self, *, head_dim: int | None = None, side: str | None = None) -> Format:
        """As `at`, with what is known of a cache: what means nothing here is left out."""
        return self.at(
            head_dim=head_dim if self.by_head_dim else None, side=side if self.by_side else None
        )

    def _chosen(self, head_dim: int | None, side: str | None) -> Format:
        if self.by_side:
            return self._variants[f"side={side}"]
        if self.by_head_dim:
            return self._variants[f"head_dim={head_dim}" if head_dim in self.by_head_dim else ""]
        return self

    @cached_property
    def _variants(self) -> dict[str, Format]:
        if self.choice or not (self.by_side or self.by_head_dim):
            return {"": self}
        if self.by_side:
            return {
                f"side={s}": replace(self, codec=c, by_side={}, side=s, choice=f"side={s}")
                for s, c in self.by_side.items()
            }
        found = {"": replace(self, by_head_dim={}, choice="head_dim=other")}
        for n, c in self.by_head_dim.items():
            found[f"head_dim={n}"] = replace(self, codec=c, by_head_dim={}, choice=f"head_dim={n}")
        return found

    def variants(self) -> Iterator[Format]:
        """Yield the format with every choice that can be made; itself if there is none."""
        yield from self._variants.values()

    # --- the codec's -----------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """The stored block: dtype and what its fields are for."""
        return self.codec.layout

    @property
    def block(self) -> np.dtype:
        """The block as a NumPy structured dtype, with what a file has once in front of a row."""
        return self.codec.layout.dtype

    @property
    def block_values(self) -> int:
        """Values per block."""
        return self.codec.block_values

    @property
    def group_values(self) -> int:
        """Values that are encoded together."""
        return self.codec.group_values

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return self.codec.block_bytes

    @property
    def bpw(self) -> float:
        """Bits per value, without what stands in front of rows."""
        return 8 * self.block_bytes / self.block_values

    @property
    def is_quantized(self) -> bool:
        """Whether values share blocks; false for floats and integers."""
        return self.block_values > 1

    def row_bytes(self, n: int) -> int:
        """Return the packed size of a row of n values; InputError if groups do not divide it."""
        return self.codec.row_bytes(n, self.label)

    def row_values(self, n_bytes: int) -> int:
        """Return the values in a packed row; InputError if groups do not divide it."""
        return self.codec.row_values(n_bytes, self.label)

    def kernels(self) -> RowKernels:
        """Return the kernels; the first call imports Numba."""
        Codec.asked = self.label
        return self.codec.kernels

    def __repr__(self) -> str:
        return f"<Format {self.label}>"


# The dialect of ggml's own types, which every fork has.
GGML = "ggml"
UPSTREAM = frozenset({GGML})
