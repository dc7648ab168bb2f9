"""ktq1_1 ... ktq4_1 and xktq2_1 of llama-tq, and the same types as its CUDA code writes them.

What it is
    Keys in blocks of 32: pseudo-random signs, a Hadamard transform, and the nearest centroid of a
    Lloyd-Max codebook for N(0, 1) scaled by 1/sqrt(32). The signs follow from the block's position
    and are stored too. The scale is corrected so that the decoded block has the norm of the input.

Block, all fields little-endian
    offset 0        d        float16 scale
    offset 2        qs[4b]   32 b-bit codes, code j at bit b*j of a little-endian bit string
    offset 2 + 4b   sb[4]    sign bits, bit j%8 of byte j/8 is value j; 1 means +1
    xktq2_1: d, then six zero bytes; codes and signs are those of a sibling ktq2_1 block.

Quantise (S = 1/sqrtf(32); block index i counts from the start of the row)
    1. norm = sqrt(sum of x_j^2), j ascending. If norm < 1e-30: d = fp16(norm), all else 0.
    2. seed = the low 16 bits of FNV-1a over the four bytes of i; sign_j = +1 if
       philox6(j, seed) is odd, else -1.
    3. h_j = x_j * (1/norm); r = FWHT(h * sign), then every value times S.
    4. code_j = the first c with the smallest (r_j - cb_c*S)^2 below FLT_MAX; 0 if there is none,
       as for NaN. With one bit: r_j >= 0.
    5. g = FWHT(cb[code]*S)*S*sign; rn = sqrt(sum of g_j^2).
    6. d = fp16(norm/rn) if rn > 1e-30, else fp16(norm).
    xktq2_1: d = fp16(norm) alone; with a sibling ("paired") steps 5 and 6 on the sibling's codes.

Dequantise
    y_j = (FWHT(cb[code]*S)_j * S * sign_j) * d; zeros if d < 1e-30. An xktq2_1 block alone
    decodes to zeros, with a sibling to the sibling's codes and signs under its own d.

The CUDA code of the same fork (dialect llama-tq-cuda, same layout)
    The block index runs on through the whole tensor. The code is drawn at random between the two
    nearest centroids: with b1 < b2 their distances |r - cb*S| (the first of equals is nearest) and
    u = (philox6(j + 32, seed) & 0xFFFF) / 65536, the farther is taken if b1 + b2 > 1e-30 and
    u >= b2/(b1 + b2). With one bit: 1 if u < clamp((r - c0)/(c1 - c0), 0, 1).
    Its decoders read the sign bits the other way round, bit 1 as -1, while its encoder writes them
    as above: what is decoded is the negative of what was encoded.

Source
    LL4nc33/llama-tq @ 0f57a4ee6: ggml/src/ggml-quants.c, ggml-cuda/turboquant.cuh.
"""

from __future__ import annotations

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.format import Format, Stages, no_rotation
from tbq.numerics import fnv1a, fp16_bits, fwht, ordered_sum, philox6, symmetric

QK = 32
SCALE = np.float32(1.0) / np.sqrt(np.float32(32.0))
TINY = np.float32(1e-30)
CUDA = "llama-tq-cuda"


# source: ggml-quants.c at 0f57a4ee6; decimals as written there
CODEBOOKS = {
    1: symmetric(0.797885),
    2: symmetric(0.451428, 1.489560),
    3: symmetric(0.242405, 0.745325, 1.314996, 2.071926),
    4: symmetric(0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}


def code_bits(fmt: Format) -> int:
    """Return the bits per code, 1 to 4."""
    return fmt.block["qs"].itemsize * 8 // QK


def block_seed(index: np.ndarray) -> np.ndarray:
    """Return the 16-bit Philox key of block indices."""
    return fnv1a(index) & np.uint64(0xFFFF)


def sign_bits(seed: np.ndarray) -> np.ndarray:
    """Return the sign bits (n, 32) of seeds (n,); 1 means +1."""
    return (philox6(np.arange(QK), np.asarray(seed)[:, None]) & np.uint64(1)).astype(np.uint8)


def nearest(r: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the first index with the smallest squared distance below FLT_MAX, else 0."""
    best = np.full(r.shape, np.finfo(np.float32).max)
    codes = np.zeros(r.shape, np.uint8)
    for c, centroid in enumerate(centroids):
        distance = (r - centroid) * (r - centroid)
        closer = distance < best
        best = np.where(closer, distance, best)
        codes[closer] = c
    return codes


def exact_scale(norm: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """Return norm/rn, rn the norm of the reconstruction (n, values), or norm for a zero block."""
    rn = np.sqrt(ordered_sum(reconstructed * reconstructed))
    return np.where((rn > TINY) & ~(norm < TINY), norm / rn, norm)


def corrected_scale(norm: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """Return the float16 bits of `exact_scale`."""
    return fp16_bits(exact_scale(norm, reconstructed))


def midpoints(bits: int, centroids: np.ndarray) -> np.ndarray:
    """Return where the choice between neighbouring centroids lies, float64."""
    table = (centroids * SCALE).astype(np.float64)
    return np.zeros(1) if bits == 1 else (table[1:] + table[:-1]) / 2


def _choose(fmt: Format, r: np.ndarray, seed: np.ndarray) -> np.ndarray:
    bits = code_bits(fmt)
    centroids = CODEBOOKS[bits] * SCALE
    if fmt.dialect == CUDA:
        return _stochastic(r, seed, centroids)
    return (r >= 0).astype(np.uint8) if bits == 1 else nearest(r, centroids)


def _stochastic(r: np.ndarray, seed: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Draw between the two nearest centroids, as the CUDA encoder does."""
    words = philox6(np.arange(QK, 2 * QK), np.asarray(seed)[:, None]) & np.uint64(0xFFFF)
    u = words.astype(np.float32) / np.float32(65536)
    if len(centroids) == 2:
        p1 = (r - centroids[0]) / (centroids[1] - centroids[0])
        return (u < np.clip(p1, np.float32(0), np.float32(1))).astype(np.uint8)
    distance = np.abs(r[..., None] - centroids)
    order = np.argsort(distance, axis=-1, kind="stable")
    first, second = order[..., 0], order[..., 1]
    b1, b2 = np.sort(distance, axis=-1)[..., :2].transpose(2, 0, 1)
    total = b1 + b2
    return np.where((total > TINY) & (u >= b2 / total), second, first).astype(np.uint8)


def coordinates(x: np.ndarray, sign: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the norms of float32 (n, 32) and its normalised, signed, transformed values."""
    with np.errstate(all="ignore"):
        norm = np.sqrt(ordered_sum(x * x))
        h = x * (np.float32(1) / norm)[:, None]
        return norm, fwht(h * sign) * SCALE


def stages_ref(fmt: Format, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
    """Return what encoding float32 (n, 32) at block indices (n,) to blocks (n,) computes."""
    sign = np.where(sign_bits(block_seed(index)) == 1, np.float32(1), np.float32(-1))
    norm, r = coordinates(x, sign)
    with np.errstate(all="ignore"):
        return Stages(norm, r, exact_scale(norm, unscaled(blocks, code_bits(fmt))))


def quantize_ref(fmt: Format, x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Quantise float32 (n, 32) at block indices (n,) to blocks (n,)."""
    blocks = np.zeros(len(x), fmt.block)
    seed = block_seed(index)
    bits = sign_bits(seed)
    sign = np.where(bits == 1, np.float32(1), np.float32(-1))
    norm, r = coordinates(x, sign)
    with np.errstate(all="ignore"):
        codes = _choose(fmt, r, seed)
        g = fwht(CODEBOOKS[code_bits(fmt)][codes] * SCALE) * SCALE * sign
        live = ~(norm < TINY)
        blocks["qs"][live] = pack(codes, code_bits(fmt))[live]
        blocks["sb"][live] = pack(bits, 1)[live]
        d = np.where(live, corrected_scale(norm, g), fp16_bits(norm))
    blocks["d"] = d.view(np.float16)
    return blocks


def dequantize_ref(fmt: Format, blocks: np.ndarray) -> np.ndarray:
    """Dequantise blocks (n,) to float32 (n, 32)."""
    with np.errstate(all="ignore"):
        d = blocks["d"].astype(np.float32)[:, None]
        return np.where(
            d < TINY, np.float32(0), unscaled(blocks, code_bits(fmt), plus_bit(fmt)) * d
        )


def plus_bit(fmt: Format) -> int:
    """Return which value of a sign bit the dialect's decoders read as +1."""
    return 0 if fmt.dialect == CUDA else 1


def block_signs(fmt: Format, blocks: np.ndarray) -> np.ndarray:
    """Return the signs (n, 32) with which blocks (n,) are decoded."""
    plus = unpack(blocks["sb"], 1) == plus_bit(fmt)
    return np.where(plus, np.float32(1), np.float32(-1))


def levels_ref(fmt: Format, blocks: np.ndarray) -> np.ndarray:
    """Return the scaled levels of blocks (n,), float32 (n, 32), still rotated."""
    bits = code_bits(fmt)
    with np.errstate(all="ignore"):
        d = blocks["d"].astype(np.float32)[:, None]
        r = CODEBOOKS[bits][unpack(blocks["qs"], bits)] * SCALE
        return np.where(d < TINY, np.float32(0), r * d)


def rotate_ref(fmt: Format, x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Give float32 (n, 32) the signs of blocks (n,), then transform."""
    return fwht(x * block_signs(fmt, blocks)) * SCALE


def unrotate_ref(fmt: Format, x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Transform float32 (n, 32), then give it the signs of blocks (n,)."""
    return fwht(x) * SCALE * block_signs(fmt, blocks)


def unscaled(blocks: np.ndarray, bits: int = 2, plus: int = 1) -> np.ndarray:
    """Return what codes and signs of ktq blocks (n,) decode to before scaling, (n, 32)."""
    sign = np.where(unpack(blocks["sb"], 1) == plus, np.float32(1), np.float32(-1))
    return fwht(CODEBOOKS[bits][unpack(blocks["qs"], bits)] * SCALE) * SCALE * sign


def quantize_paired_ref(fmt: Format, x: np.ndarray, sibling: np.ndarray) -> np.ndarray:
    """Quantise float32 (n, 32) beside ktq2_1 blocks (n,) to xktq2_1 blocks (n,)."""
    blocks = np.zeros(len(x), fmt.block)
    with np.errstate(all="ignore"):
        norm = np.sqrt(ordered_sum(x * x))
        corrected = corrected_scale(norm, unscaled(sibling))
        d = np.where(norm < TINY, fp16_bits(norm), corrected)
    blocks["d"] = d.view(np.float16)
    return blocks


def dequantize_paired_ref(fmt: Format, blocks: np.ndarray, sibling: np.ndarray) -> np.ndarray:
    """Dequantise xktq2_1 blocks (n,) beside their ktq2_1 blocks (n,) to float32 (n, 32)."""
    with np.errstate(all="ignore"):
        d = blocks["d"].astype(np.float32)[:, None]
        return np.where(d < TINY, np.float32(0), unscaled(sibling) * d)


def codes(fmt: Format, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    """Return the codes of ktq blocks (n,)."""
    bits = code_bits(fmt)
    return {"codes": (unpack(blocks["qs"], bits), 1 << bits)}


def anomalies(fmt: Format, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
    """Find ktq blocks (n,) whose signs are not those that their indices (n,) seed."""
    expected = pack(sign_bits(block_seed(index)), 1)
    live = blocks["sb"].any(axis=-1) | blocks["qs"].any(axis=-1)  # a zero block has neither
    return {"signs that do not match their seed": live & (blocks["sb"] != expected).any(axis=-1)}


def padding(fmt: Format, blocks: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
    """Find blocks (n,) whose padding is not zero."""
    return {"padding that is not zero": blocks["pad"].any(axis=-1)}


def _no_codes(fmt: Format, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    return {}


def _quantize_alone(fmt: Format, x: np.ndarray, index: np.ndarray) -> np.ndarray:
    blocks = np.zeros(len(x), fmt.block)
    with np.errstate(all="ignore"):
        blocks["d"] = fp16_bits(np.sqrt(ordered_sum(x * x))).view(np.float16)
    return blocks


def _stages_alone(fmt: Format, x: np.ndarray, index: np.ndarray, blocks: np.ndarray) -> Stages:
    with np.errstate(all="ignore"):
        norm = np.sqrt(ordered_sum(x * x))
    return Stages(norm, np.zeros_like(x), norm)


def _dequantize_alone(fmt: Format, blocks: np.ndarray) -> np.ndarray:
    return np.zeros((len(blocks), QK), np.float32)


def _format(dialect: str, bits: int, type_id: int) -> Format:
    cuda = dialect == CUDA
    notes = (
        "Decodes to the negative of what was encoded: the CUDA code reads its sign bits inverted."
        if cuda
        else "A norm above 65504 decodes to infinity or NaN. Cache rows are Hadamard-rotated first."
    )
    return Format(
        dialect=dialect,
        name=f"ktq{bits}_1",
        type_id=type_id,
        block=np.dtype([("d", "<f2"), ("qs", "u1", 4 * bits), ("sb", "u1", 4)]),
        block_values=QK,
        group_values=QK,
        side="K",
        domain="original",
        source="LL4nc33/llama-tq @ 0f57a4ee6: ggml/src/"
        + ("ggml-cuda/turboquant.cuh" if cuda else "ggml-quants.c"),
        quantize_ref=quantize_ref,
        dequantize_ref=dequantize_ref,
        kernels_module="tbq.kernels.ktq",
        codes=codes,
        anomalies=anomalies,
        levels_ref=levels_ref,
        rotate_ref=rotate_ref,
        unrotate_ref=unrotate_ref,
        stages_ref=stages_ref,
        boundaries=None if cuda else midpoints(bits, CODEBOOKS[bits]),
        block_index="tensor" if cuda else "row",
        aliases=() if cuda else (f"ktq{bits}",),
        notes=notes,
    )


XKTQ2_1 = Format(
    dialect="llama-tq",
    name="xktq2_1",
    type_id=57,
    block=np.dtype([("d", "<f2"), ("pad", "u1", 6)]),
    block_values=QK,
    group_values=QK,
    side="K",
    domain="original",
    source="LL4nc33/llama-tq @ 0f57a4ee6: ggml/src/ggml-quants.c",
    quantize_ref=_quantize_alone,
    dequantize_ref=_dequantize_alone,
    kernels_module="tbq.kernels.xktq",
    codes=_no_codes,
    anomalies=padding,
    levels_ref=_dequantize_alone,
    rotate_ref=no_rotation,
    unrotate_ref=no_rotation,
    stages_ref=_stages_alone,
    sibling="llama-tq:ktq2_1",
    notes="Holds scales only; without a sibling ktq2_1 row it decodes to zeros, by design.",
)

FORMATS = (
    _format("llama-tq", bits=1, type_id=45),
    _format("llama-tq", bits=2, type_id=42),
    _format("llama-tq", bits=3, type_id=43),
    _format("llama-tq", bits=4, type_id=44),
    XKTQ2_1,
    _format(CUDA, bits=1, type_id=45),
    _format(CUDA, bits=2, type_id=42),
    _format(CUDA, bits=3, type_id=43),
    _format(CUDA, bits=4, type_id=44),
)
