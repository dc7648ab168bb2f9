"""Types that differ from layer to layer: which ones are meant, and which forks can load them.

Sources: LL4nc33/llama-tq, llama-kv-cache.cpp (tq_protect_layers); ikawrakow/ik_llama.cpp pull
request 1599; TheTom/llama-cpp-turboquant, CONTRIBUTING (TURBO_LAYER_ADAPTIVE);
spiritbuun/buun-llama-cpp, VBR documentation and llama-kv-cache.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gguf_io.cache_shapes import CacheShapes
from gguf_io.planner import Types, boundary
from gguf_io.types import resolve_type
from tbq import Format, InputError

_RANGE = re.compile(r"(?P<first>\d{1,4})(?:-(?P<last>\d{1,4}))?=(?P<k>[^/=]+)(?:/(?P<v>[^/=]+))?")


BOUNDARY_V_LAYERS = 8


@dataclass(frozen=True)
class Boundary:
    """The first and last layers that keep another type than the rest, counted as in `boundary`."""

    first: int
    last: int
    type: Format


def parse_layers(text: str, dialect: str | None, shapes: CacheShapes) -> dict[int, Types]:
    """Return the types of `0-10=q8_0,11-31=q8_0/q4_0`: one for K and V, or K's and V's.

    Raises:
        InputError: not of that form, a layer without a cache, or a layer twice.
        UnknownFormatError: no type has such a name.
    """
    found: dict[int, Types] = {}
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (
            (int(match["first"]), int(match["last"] or match["first"])) if match else (1, 0)
        )
        if match is None or last < first:
            need = "ranges of layers and types, such as 0-10=q8_0,11-31=q8_0/q4_0"
            raise InputError("--layers", text, need)
        k = resolve_type(match["k"], dialect)
        types = Types(k, resolve_type(match["v"], dialect) if match["v"] else k)
        for layer in range(first, last + 1):
            if layer in found:
                raise InputError("--layers", f"layer {layer} twice", "each layer once")
            if layer >= shapes.n_layer:
                raise InputError("--layers", f"layer {layer}", f"layers below {shapes.n_layer}")
            found[layer] = types
    return found


def protected(edges: Boundary, shapes: CacheShapes) -> dict[int, Types]:
    """Return the types of the layers at both ends."""
    layers = boundary(shapes, edges.first, edges.last)
    return dict.fromkeys(sorted(layers), Types(edges.type, edges.type))


# --- who can load it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Loader:
    """How a fork is told about layers of their own types.

    Attributes:
        dialect: whose cache it is.
        how: what it can do, in a sentence.
        flags: the flags for some first and last layers; None where it cannot do that.
    """

    dialect: str
    how: str
    flags: Callable[[Boundary], str | None]


def _llama_tq(edges: Boundary) -> str | None:
    same = edges.first == edges.last and edges.type.name == "q8_0"
    return f"--tq-protect-layers {edges.first}" if same else None


def _ik_llama(edges: Boundary) -> str | None:
    ends = (("first", edges.first), ("last", edges.last))
    return " ".join(
        f"-ct{side}-{end} {edges.type.name},{n}" for side in "kv" for end, n in ends if n
    )


LOADERS: Sequence[Loader] = (
    Loader(
        "llama-tq",
        "--tq-protect-layers N keeps the first and the last N layers that have a cache in q8_0, if "
        "the types are its own",
        _llama_tq,
    ),
    Loader(
        "ik_llama",
        "-ctk-first TYPE,N, -ctk-last, -ctv-first and -ctv-last",
        _ik_llama,
    ),
    Loader(
        "thetom",
        "the environment variable TURBO_LAYER_ADAPTIVE chooses among fixed policies; 7 keeps V of "
        "the first and the last two layers in q8_0 and gives the others turbo2",
        lambda edges: None,
    ),
    Loader(
        "buun",
        "the environment variable VBR_LAYER_SCHEDULE, since 2026-07; TURBO_LAYER_ADAPTIVE before",
        lambda edges: None,
    ),
)


def loader(dialect: str) -> Loader | None:
    """Return how the fork of a dialect is told; None if no way is known."""
    name = dialect.partition("@")[0]
    return next((known for known in LOADERS if name.startswith(known.dialect)), None)


def own_choices(dialect: str, types: Types, n_layer: int) -> Iterator[str]:
    """Yield what a fork does with types unless it is told not to, one sentence each."""
    if not dialect.startswith("thetom"):
        return
    if types.v.name == "turbo2" and n_layer >= BOUNDARY_V_LAYERS:
        yield (
            "with turbo2 for V this fork keeps V of the first and the last two layers in q8_0; "
            "TURBO_LAYER_ADAPTIVE=0 makes it as planned here"
        )
    if types.k.name.startswith("turbo"):
        yield (
            "with six or more query heads per key head this fork makes K q8_0; "
            "TURBO_AUTO_ASYMMETRIC=0 makes it as planned here"
        )
