"""ktq1_1 ... ktq4_1 and xktq2_1: a thread per block of 32 values, see `cuda_port.kernels`.

The arithmetic is that of `tbq.families.ktq`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, uint32

from cuda_port import kernels, sums
from cuda_port.cells import corrected, finder, table_of
from cuda_port.device import (
    ONE,
    ZERO,
    device,
    div,
    fp16_bits,
    fp16_value,
    index,
    mul,
    put,
    sqrt,
    take,
)
from cuda_port.fields import Fields, whole_block, write_unit, writer
from cuda_port.port import Port, Signs
from cuda_port.unroll import by_eights
from tbq.families.ktq import (
    CODEBOOKS,
    QK,
    SCALE,
    TINY,
    BorrowedCodes,
    SignedBlocks,
    block_seed,
    sign_words,
)
from tbq.nearest import squared, thresholds

HALF_BITS = 16


def row_signs(row_blocks: int) -> tuple[np.ndarray, ...]:
    """Return the 32 sign bits of each block of a row, uint32 (row_blocks,)."""
    return (sign_words()[block_seed(np.arange(row_blocks))].view(np.uint32),)


def tables(bits: int, distance=squared) -> np.ndarray:
    """Return the levels of a codebook, then the thresholds between them."""
    levels = CODEBOOKS[bits] * SCALE
    return table_of(levels, thresholds(levels, distance) if bits > 1 else np.zeros(1, np.float32))


@cache
def transform():
    """Return the device function (v) of the transform of 32 values, scaled."""
    turn = sums.transform(QK)

    @device
    def scaled(v):
        turn(v)
        for j in range(QK):
            v[j] = mul(v[j], SCALE)

    return scaled


@device
def give_signs(v, word, plus, minus):
    """Multiply v[:32] by `plus` where a sign bit is set, else by `minus`."""
    for j in range(QK):
        v[j] = mul(v[j], plus if (word >> j) & 1 else minus)


@cache
def body(size: int, signed: bool, code):
    """Return what encodes a block; `code` (v, words, lut) codes v, and leaves levels in it."""
    fields = whole_block(size, QK)
    write, count = writer(fields, QK), fields.words(QK)
    measure, turn = sums.squares(QK, "ordered"), transform()
    sign_bit = 8 * (size - 4)

    @device
    def encode(v, row, packed, group, extra, lut):
        words = cuda.local.array(count, uint32)
        for k in range(count):
            words[k] = 0
        norm = sqrt(measure(v))
        inverse, signs = div(ONE, norm), 0
        if signed:
            signs = np.int64(extra[group % extra.size])
            give_signs(v, signs, inverse, -inverse)
            turn(v)
        else:
            for j in range(QK):
                v[j] = mul(v[j], inverse)
        code(v, words, lut)
        if signed:
            turn(v)
            put(words, sign_bit, 32, signs)
        restored = sqrt(measure(v))
        if norm < TINY:
            for k in range(count):
                words[k] = 0
            restored = ZERO
        put(words, 0, HALF_BITS, fp16_bits(corrected(norm, restored, TINY)))
        write(words, packed, group, 0)

    return encode


@cache
def coder(bits: int):
    """Return the device function (v, words, lut) that codes v[:32] after the scale of a block."""
    cell = finder(bits)

    @device
    def eight(first, v, words, lut):
        for j in range(first, first + 8):
            code = cell(v[j], lut)
            v[j] = lut[index(code)]
            put(words, HALF_BITS + bits * j, bits, code)

    return by_eights(QK, eight)


@cache
def levels_of(fields: Fields, bits: int):
    """Return what makes `levels` for slices; nothing is left of a block without a scale."""

    @cache
    def of(n: int):
        at = fields.starts(n)[-1]

        @device
        def eight(first, words, v, place, lut):
            d = fp16_value(take(words, at, HALF_BITS))
            for k in range(first, first + 8):
                level = mul(lut[index(take(words, bits * k, bits))], d)
                v[place + k] = ZERO if d < TINY else level

        return by_eights(n, eight)

    return of


# --- decoders ------------------------------------------------------------------------------------


@cache
def decoding(fields: Fields, bits: int):
    """Return `levels` and `finish` of a decoder: centroids, then transform, signs and scale."""
    _, at_signs, at = fields.starts(QK)
    turn = transform()

    @device
    def levels(words, v, first, lut):
        for j in range(QK):
            v[first + j] = lut[index(take(words, bits * j, bits))]

    @device
    def finish(words, v):
        d = fp16_value(take(words, at, HALF_BITS))
        turn(v)
        give_signs(v, take(words, at_signs, 32), d, -d)
        if d < TINY:
            for j in range(QK):
                v[j] = ZERO

    return levels, finish


MEASURE = sums.squares(QK, "ordered")


@device
def norm_alone(v, row, packed, group, extra, lut):
    """Encode an xktq2_1 block without its sibling: its norm."""
    packed[index(4 * group)] = fp16_bits(sqrt(MEASURE(v)))
    for k in range(1, 4):
        packed[index(4 * group + k)] = 0


@cache
def nothing_of(n: int):
    """Return `levels` of xktq2_1 blocks without their sibling."""

    @device
    def levels(words, v, first, lut):
        for k in range(n):
            v[first + k] = ZERO

    return levels


@cache
def forward():
    """Return the device function (v, signs) that rotates v[:32] by a block's signs."""
    turn = transform()

    @device
    def rotate(v, signs):
        give_signs(v, signs, ONE, -ONE)
        turn(v)

    return rotate


def port(codec: SignedBlocks | BorrowedCodes) -> Port | None:
    """Return the kernels of a ktq format; None for the CUDA code's own random draws."""
    if isinstance(codec, BorrowedCodes):
        nothing = np.zeros(1, np.float32)
        encode = kernels.encoder(QK, norm_alone, nothing, 2)
        return Port(encode, whole_block(codec.block_bytes, QK), nothing_of, nothing)
    if codec != SignedBlocks(codec.bits):
        return None
    bits, size, sb = codec.bits, codec.block_bytes, codec.layout.offset("sb")
    fields = Fields(size, QK, ((2, bits),), ((0, 2),))
    with_signs = fields._replace(whole=((sb, 4), (0, 2)))
    table = tables(bits)
    return Port(
        kernels.encoder(
            QK,
            body(size, True, coder(bits)),
            table,
            write_unit(whole_block(size, QK)),
            row_signs,
        ),
        fields,
        levels_of(fields, bits),
        table[: 1 << bits],
        kernels.decoder(QK, with_signs, QK, *decoding(with_signs, bits), table[: 1 << bits]),
        signs=Signs(sb, forward()),
    )
