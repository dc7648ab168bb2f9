"""vtq1_1 ... vtq4_1 and vtq_mixed of llama-tq, and vtq*_1 as its CUDA code writes them.

What it is
    Values in blocks of 32, already rotated by the graph (64 at a time, see `tbq.rotation`): the
    nearest centroid of a codebook scaled by 1/sqrt(32), under a norm-corrected scale.

Block, all fields little-endian
    offset 0   d        float16 scale
    offset 2   qs[4b]   32 b-bit codes, code j at bit b*j of a little-endian bit string
               pad[2]   two zero bytes, in vtq3_1 only
    vtq_mixed  d, then ten bytes. The first three hold the eight values with j%4 == 0 as 3-bit
               codes; the other 24 are 2-bit codes at slot j - j/4 of the bytes after them. Slots
               run from 1 to 24: slot 0 stays 0, and slot 24 (j = 31) lies in the byte that the C
               struct has as padding. The code is written there all the same, and read back.

Quantise (S = 1/sqrtf(32))
    1. norm = sqrt(sum of x_j^2), j ascending. If norm < 1e-30: d = fp16(norm), all else 0.
    2. h_j = x_j * (1/norm); code_j = the first c with the smallest (h_j - cb_c*S)^2 below FLT_MAX,
       0 if there is none. With one bit: h_j >= 0. vtq_mixed: the 3-bit codebook where j%4 == 0.
    3. rn = sqrt(sum of (cb[code_j]*S)^2), j ascending; d = fp16(norm/rn) if rn > 1e-30, else
       fp16(norm).

Dequantise
    y_j = (cb[code_j] * S) * d; zeros if d < 1e-30.

The CUDA code of the same fork (dialect llama-tq-cuda, same layout)
    compares |h - cb*S| instead of the squares, first of equals; with one bit too.

Source
    LL4nc33/llama-tq @ 0f57a4ee6: ggml/src/ggml-quants.c, ggml-cuda/turboquant.cuh.
"""

from __future__ import annotations

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.families import ktq
from tbq.families.ktq import CUDA, QK, SCALE, TINY, code_bits, corrected_scale, nearest
from tbq.format import Format, Stages, no_anomalies, no_rotation
from tbq.numerics import fp16_bits, ordered_sum, symmetric

# source: ggml-quants.c at 0f57a4ee6; only the 2-bit table differs from that of the keys
CODEBOOKS = ktq.CODEBOOKS | {2: symmetric(0.395, 1.81)}

# vtq_mixed: positions of the 3-bit values, and of the rest.
FINE = np.arange(0, QK, 4)
COARSE = np.setdiff1d(np.arange(QK), FINE)


def _choose(fmt: Format, h: np.ndarray, bits: int) -> np.ndarray:
    centroids = CODEBOOKS[bits] * SCALE
    if fmt.dialect == CUDA:
        return np.abs(h[..., None] - centroids).argmin(axis=-1).astype(np.uint8)
    return (h >= 0).astype(np.uint8) if bits == 1 else nearest(h, centroids)


def is_mixed(fmt: Format) -> bool:
    """Tell vtq_mixed from the rest."""
    return fmt.name == "vtq_mixed"


def pack_mixed(codes: np.ndarray) -> np.ndarray:
    """Pack vtq_mixed codes (n, 32) into its ten bytes (n, 10)."""
    slots = np.zeros((len(codes), 28), np.uint8)  # slots 0 to 27 fill the seven bytes
    slots[:, 1:25] = codes[:, COARSE]
    return np.concatenate([pack(codes[:, FINE], 3), pack(slots, 2)], axis=-1)


def unpack_mixed(qs: np.ndarray) -> np.ndarray:
    """Unpack the ten bytes (n, 10) of vtq_mixed into codes (n, 32)."""
    codes = np.empty((len(qs), QK), np.uint8)
    codes[:, FINE] = unpack(qs[:, :3], 3)
    codes[:, COARSE] = unpack(qs[:, 3:], 2)[:, 1:25]
    return codes


def _levels(fmt: Format, codes: np.ndarray) -> np.ndarray:
    """Return cb[code] * S for codes (n, 32)."""
    if not is_mixed(fmt):
        return CODEBOOKS[code_bits(fmt)][codes] * SCALE
    levels = np.empty(codes.shape, np.float32)
    levels[:, FINE] = CODEBOOKS[3][codes[:, FINE]] * SCALE
    levels[:, COARSE] = CODEBOOKS[2][codes[:, COARSE]] * SCALE
    return levels


def _coordinates(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the norms of float32 (n, 32) and its normalised values."""
    with np.errstate(all="ignore"):
        norm = np.sqrt(ordered_sum(x * x))
        return norm, x * (np.float32(1) / norm)[:, None]


def stages_ref(fmt: Format, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
    """Return what encoding float32 (n, 32) to blocks (n,) computes; the index does not matter."""
    norm, h = _coordinates(x)
    qs = blocks["qs"]
    codes = unpack_mixed(qs) if is_mixed(fmt) else unpack(qs, code_bits(fmt))
    with np.errstate(all="ignore"):
        return Stages(norm, h, ktq.exact_scale(norm, _levels(fmt, codes)))


def _boundaries(name: str, bits: int) -> np.ndarray:
    if name != "vtq_mixed":
        return ktq.midpoints(bits, CODEBOOKS[bits])
    table = np.full((QK, 7), np.nan)
    table[FINE] = ktq.midpoints(3, CODEBOOKS[3])
    table[COARSE, :3] = ktq.midpoints(2, CODEBOOKS[2])
    return table


def quantize_ref(fmt: Format, x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Quantise float32 (n, 32) to blocks (n,); the block index does not matter."""
    blocks = np.zeros(len(x), fmt.block)
    norm, h = _coordinates(x)
    with np.errstate(all="ignore"):
        if is_mixed(fmt):
            codes = np.empty(x.shape, np.uint8)
            codes[:, FINE] = _choose(fmt, h[:, FINE], 3)
            codes[:, COARSE] = _choose(fmt, h[:, COARSE], 2)
            qs = pack_mixed(codes)
        else:
            codes = _choose(fmt, h, code_bits(fmt))
            qs = pack(codes, code_bits(fmt))
        live = ~(norm < TINY)
        blocks["qs"][live] = qs[live]
        d = np.where(live, corrected_scale(norm, _levels(fmt, codes)), fp16_bits(norm))
    blocks["d"] = d.view(np.float16)
    return blocks


def dequantize_ref(fmt: Format, blocks: np.ndarray) -> np.ndarray:
    """Dequantise blocks (n,) to float32 (n, 32)."""
    with np.errstate(all="ignore"):
        d = blocks["d"].astype(np.float32)[:, None]
        qs = blocks["qs"]
        codes = unpack_mixed(qs) if is_mixed(fmt) else unpack(qs, code_bits(fmt))
        return np.where(d < TINY, np.float32(0), _levels(fmt, codes) * d)


def codes(fmt: Format, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    """Return the codes of blocks (n,); in vtq_mixed those with j%4 != 0 stay below 4."""
    return {"codes": (unpack_mixed(blocks["qs"]), 8)} if is_mixed(fmt) else ktq.codes(fmt, blocks)


def _unused_slots(fmt: Format, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
    """Find vtq_mixed blocks (n,) with bits in the slots that hold no value."""
    slots = unpack(blocks["qs"][:, 3:], 2)
    return {"padding that is not zero": slots[:, 0].astype(bool) | slots[:, 25:].any(axis=-1)}


def _format(dialect: str, name: str, type_id: int, bits: int, **fields) -> Format:
    cuda = dialect == CUDA
    block = [("d", "<f2"), ("qs", "u1", 4 * bits)] + ([("pad", "u1", 2)] if bits == 3 else [])
    defaults = {
        "block": np.dtype(block),
        "anomalies": ktq.padding if bits == 3 else no_anomalies,
        "aliases": (),
        "notes": "The graph rotates 64 values at a time before and after; the block does not.",
    }
    return Format(
        dialect=dialect,
        name=name,
        type_id=type_id,
        block_values=QK,
        group_values=1,
        side="V",
        domain="rotated",
        source="LL4nc33/llama-tq @ 0f57a4ee6: ggml/src/"
        + ("ggml-cuda/turboquant.cuh" if cuda else "ggml-quants.c"),
        quantize_ref=quantize_ref,
        dequantize_ref=dequantize_ref,
        kernels_module="tbq.kernels.vtq",
        codes=codes,
        levels_ref=dequantize_ref,
        rotate_ref=no_rotation,
        unrotate_ref=no_rotation,
        stages_ref=stages_ref,
        boundaries=_boundaries(name, bits),
        **(defaults | fields),
    )


FORMATS = (
    _format("llama-tq", "vtq1_1", 46, 1, aliases=("vtq1",)),
    _format("llama-tq", "vtq2_1", 47, 2),
    _format("llama-tq", "vtq3_1", 48, 3),
    _format("llama-tq", "vtq4_1", 49, 4),
    _format(
        "llama-tq",
        "vtq_mixed",
        53,
        2,
        block=np.dtype([("d", "<f2"), ("qs", "u1", 10)]),
        anomalies=_unused_slots,
        notes="C declares qs[9] and writes the last code past it, into the padding byte.",
    ),
    _format(CUDA, "vtq1_1", 46, 1),
    _format(CUDA, "vtq2_1", 47, 2),
    _format(CUDA, "vtq3_1", 48, 3),
    _format(CUDA, "vtq4_1", 49, 4),
)
