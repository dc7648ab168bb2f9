"""AmesianX/TurboQuant, whose CUDA code alone writes these types."""

from typing import Any

from tbq.codec import Codec
from tbq.dialect import Dialect, Release
from tbq.families.amesianx import (
    CELLS,
    PROJECTED_SIGNS,
    SIGNS,
    TWICE,
    HadamardCells,
    LatentAndRope,
    PolarPairs,
    Residual,
    Transform,
)
from tbq.format import Format, Side

NAME = "amesianx"
SOURCE = "AmesianX/TurboQuant @ {}: ggml/src/ggml-cuda/set-rows.cu"
NEWEST, BEFORE_V1_6 = "cb3c258c6", "68098947b"
NAMES = ("tbq3", "tbq4", "tbqp3", "tbqp4")
BYTES_ONLY = (
    "The fork has no decoder: values are what attention's scores amount to, before factors that it "
    "puts on them."
)
DECODED = "The fork's CPU code decodes it."


def _format(
    name: str, codec: Codec, side: Side, notes: str, commit: str = NEWEST, **fields: Any
) -> Format:
    return Format(NAME, name, codec, side, SOURCE.format(commit), notes=notes, **fields)


def _cells(name: str, width: int, projected: bool = False, **fields: Any) -> HadamardCells:
    """Return the codec of tbqN or tbqpN for heads of so many values."""
    bits, residual = int(name[-1]), None
    if name.startswith("tbqp"):  # a bit goes to the residual's sign
        bits, residual = bits - 1, Residual(PROJECTED_SIGNS[width] if projected else "")
    fields = {"transform": Transform((SIGNS[width],), width), "residual": residual} | fields
    return HadamardCells(CELLS[bits], **fields)


def _wide(name: str) -> HadamardCells:
    return _cells(name, 512, projected=True, measured="rms")


def _side(name: str) -> Side:
    """Return K for tbqp, for which the fork takes tbq on the side of V."""
    return "K" if name.startswith("tbqp") else "KV"


def _by_head(name: str) -> Format:
    codec = _cells(name, 256, projected=True)
    notes = (
        "In heads of 512 values two blocks are one group; releases before v1.5.3 wrote these "
        f"otherwise. {BYTES_ONLY}"
    )
    return _format(f"{name}_0", codec, _side(name), notes, by_head_dim={512: _wide(name)})


def _twice(name: str) -> Format:
    codec = _cells(name, 64, transform=Transform(TWICE, 64), measured="rms")
    notes = f"{BYTES_ONLY} On the side of V attention decodes something else than was encoded."
    return _format(f"{name}_3", codec, _side(name), notes)


def _latent(name: str) -> Format:
    notes = (
        f"512 values of a latent vector, then 64 as they are. {BYTES_ONLY} Its kernels for "
        "several queries disagree: they decode two blocks of 256."
    )
    return _format(f"{name}_4", LatentAndRope(_wide(name)), "K", notes)


def _halves(name: str) -> Format:
    codec = LatentAndRope(_cells(name, 256, projected=True))
    notes = f"As two blocks of {name}_0 for heads of up to 256 values, then 64 values as they are."
    fields = {"release": "v1.5.3", "evidence": "read"}
    return _format(f"{name}_4", codec, "K", notes, BEFORE_V1_6, **fields)


HEADS = [_by_head(name) for name in NAMES]
HEADS_128 = [_format(f"{n}_1", _cells(n, 128), _side(n), BYTES_ONLY) for n in NAMES]
HEADS_64 = [
    _format(f"{n}_2", _cells(n, 64), _side(n), BYTES_ONLY if "p" in n else DECODED) for n in NAMES
]
TWICE_64 = [_twice(name) for name in NAMES]
LATENT = [_latent(name) for name in NAMES]
LATENT_HALVES = [_halves(name) for name in NAMES]
AMX3 = _format(
    "amx3_1",
    PolarPairs(_cells("tbq3", 128)),
    "K",
    "tbq3_1 and 58 bytes that serve eviction alone and depend on the cell's number. Their codes "
    "come from sine, cosine and arc tangent, which C libraries round differently: of 300 blocks "
    "two had another phase on another library.",
)
AMXV3 = _format("amxv3_1", _cells("tbq3", 128), "V", f"tbq3_1 by another name. {BYTES_ONLY}")


def _numbered(first: int, *formats: list[Format]) -> dict[int, Format]:
    return dict(enumerate((fmt for some in formats for fmt in some), first))


OLDEST = (HEADS, HEADS_128, HEADS_64)

DIALECTS = (
    Dialect(
        name=NAME,
        title="AmesianX/TurboQuant",
        releases=(
            # 938774f98
            Release("v1.7.0", types=_numbered(42, *OLDEST, TWICE_64, LATENT, [AMX3, AMXV3])),
            # 2fb6c5cd6; 62 is tbqx3_1 of 58 bytes, whose arithmetic is not known
            Release("v1.6.0", types=_numbered(42, *OLDEST, TWICE_64, LATENT)),
            # 68098947b: upstream took 41
            Release("v1.5.3", types=_numbered(42, *OLDEST, TWICE_64, LATENT_HALVES)),
            # 6a5000877; 53 to 56 are types _3 with one transform over eight heads
            Release(
                "v1.4.1",
                types=_numbered(41, *OLDEST) | _numbered(57, LATENT_HALVES),
                upstream=40,
            ),
            # 950a172ab; v1.4.0 had types _4 with rotary values in codes
            Release("v1.1.0", types=_numbered(41, *OLDEST), upstream=40),
            # 9209093cf
            Release("v1.0.0", types=_numbered(41, HEADS), upstream=40),
        ),
        functions=None,
    ),
)
