"""tbq3_0 and tbq4_0 of llama.cpp pull request 21089.

What it is
    256 values share one L2 norm; each 128-value half of the normalised block is multiplied by one
    fixed dense orthogonal matrix Q, and every rotated coordinate becomes the index of the
    Lloyd-Max cell for N(0, 1) that holds it.

Block, all fields little-endian
    tbq3_0   offset 0   qs[96]    256 3-bit codes, code j at bit 3j of a little-endian bit string
             offset 96  d         float16, the norm
    tbq4_0   offset 0   qs[128]   256 4-bit codes, even code in the low nibble
             offset 128 d         float16, the norm

Quantise
    1. norm = sqrt(sum of x_j^2), j ascending; below 1e-10 it is set to 1e-10.
    2. unit_j = x_j / norm, a division.
    3. per half, rot_i = sum of Q_ij unit_j, j ascending.
    4. v_i = 16 rot_i (16 = sqrt 256); code_i = the number of boundaries b that do not satisfy
       v_i < b. A value on a boundary takes the upper cell, NaN takes the last.
    5. d = fp16(norm); norms from 65520 up become infinity.

Dequantise
    1. r_i = codebook[code_i] * 0.0625.
    2. per half, u_j = sum of Q_ij r_i, i ascending.
    3. y_j = u_j * d.

Source
    ggml-org/llama.cpp pull request 21089 at f112d6de7, ggml/src/ggml-turboq.c and
    ggml-turboq-tables.h, built without FMA contraction, which is what ships on x86-64: the file
    belongs to ggml-base and gets no architecture flags. Builds that contract may choose the
    neighbouring code where a rotated value lies within rounding of a boundary.
"""

from __future__ import annotations

import numpy as np

from tbq.bitpack import pack, unpack
from tbq.format import Format, Stages, no_anomalies
from tbq.numerics import fp16_bits, ordered_sum, symmetric
from tbq.rotations import QR_SIZE, qr_rotation

QK_K = 256
MIN_NORM = np.float32(1e-10)
SCALE_UP = np.float32(16.0)  # sqrtf(256)
SCALE_DOWN = np.float32(0.0625)  # 1 / sqrtf(256)


def _boundaries(*positive: float) -> np.ndarray:
    half = symmetric(*positive)
    table = np.insert(half, len(positive), np.float32(0.0))
    table.setflags(write=False)
    return table


# source: ggml-turboq-tables.h at f112d6de7; decimals as written there
CODEBOOKS = {
    3: symmetric(0.2451, 0.7560, 1.3440, 2.1520),
    4: symmetric(0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6180, 2.0690, 2.7326),
}
BOUNDARIES = {
    3: _boundaries(0.5006, 1.0500, 1.7480),
    4: _boundaries(0.2583, 0.5225, 0.7996, 1.0993, 1.4371, 1.8435, 2.4008),
}


def _matvec(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Multiply every row of x by the matrix, each output summed over the input in index order."""
    y = np.zeros_like(x)
    for j in range(x.shape[-1]):
        y += x[..., j, None] * matrix[:, j]
    return y


def code_bits(fmt: Format) -> int:
    """Return the bits per code, 3 or 4."""
    return fmt.block["qs"].itemsize * 8 // QK_K


def stages_ref(fmt: Format, x: np.ndarray, index: np.ndarray, blocks=None) -> Stages:
    """Return what encoding float32 (n, 256) computes; neither index nor blocks matter."""
    with np.errstate(all="ignore"):
        norm = np.sqrt(ordered_sum(x * x))
        norm = np.where(norm < MIN_NORM, MIN_NORM, norm)
        return Stages(norm, rotate_ref(fmt, x / norm[:, None]) * SCALE_UP, norm)


def quantize_ref(fmt: Format, x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Quantise float32 (n, 256) to blocks (n,); the block index does not matter."""
    bits = code_bits(fmt)
    norm, v, _ = stages_ref(fmt, x, index)
    codes = (~(v[..., None] < BOUNDARIES[bits])).sum(axis=-1)
    blocks = np.zeros(len(x), fmt.block)
    blocks["qs"] = pack(codes, bits)
    blocks["d"] = fp16_bits(norm).view(np.float16)
    return blocks


def dequantize_ref(fmt: Format, blocks: np.ndarray) -> np.ndarray:
    """Dequantise blocks (n,) to float32 (n, 256)."""
    bits = code_bits(fmt)
    with np.errstate(all="ignore"):
        r = CODEBOOKS[bits][unpack(blocks["qs"], bits)] * SCALE_DOWN
        return unrotate_ref(fmt, r) * blocks["d"].astype(np.float32)[:, None]


def levels_ref(fmt: Format, blocks: np.ndarray) -> np.ndarray:
    """Return the scaled levels of blocks (n,), float32 (n, 256), still rotated."""
    bits = code_bits(fmt)
    with np.errstate(all="ignore"):
        r = CODEBOOKS[bits][unpack(blocks["qs"], bits)] * SCALE_DOWN
        return r * blocks["d"].astype(np.float32)[:, None]


def rotate_ref(fmt: Format, x: np.ndarray, blocks: np.ndarray | None = None) -> np.ndarray:
    """Rotate each half of float32 (n, 256) by Q."""
    return _matvec(qr_rotation(), x.reshape(-1, QR_SIZE)).reshape(x.shape)


def unrotate_ref(fmt: Format, x: np.ndarray, blocks: np.ndarray | None = None) -> np.ndarray:
    """Rotate each half of float32 (n, 256) by the transpose of Q."""
    return _matvec(qr_rotation().T, x.reshape(-1, QR_SIZE)).reshape(x.shape)


def codes(fmt: Format, blocks: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    """Return the codes of blocks (n,)."""
    bits = code_bits(fmt)
    return {"codes": (unpack(blocks["qs"], bits), 1 << bits)}


def _format(name: str, bits: int, type_id: int, ftype: int) -> Format:
    return Format(
        dialect="pr21089",
        name=name,
        type_id=type_id,
        block=np.dtype([("qs", "u1", QK_K * bits // 8), ("d", "<f2")]),
        block_values=QK_K,
        group_values=QR_SIZE,
        side="KV",
        domain="original",
        source="ggml-org/llama.cpp PR 21089 @ f112d6de7: ggml/src/ggml-turboq.c",
        quantize_ref=quantize_ref,
        dequantize_ref=dequantize_ref,
        kernels_module="tbq.kernels.pr21089",
        codes=codes,
        anomalies=no_anomalies,
        levels_ref=levels_ref,
        rotate_ref=rotate_ref,
        unrotate_ref=unrotate_ref,
        stages_ref=stages_ref,
        boundaries=BOUNDARIES[bits].astype(np.float64),
        ftype=ftype,
        notes="256 values of a row may span heads; a norm above 65504 decodes to infinity or NaN.",
    )


FORMATS = (
    _format("tbq3_0", bits=3, type_id=42, ftype=41),
    _format("tbq4_0", bits=4, type_id=43, ftype=42),
)
