"""tbqp3_0 and tbqp4_0 of pr21089's first commit: a thread per output, see `cuda_port.dense`.

The arithmetic is that of `tbq.families.pr21089_first`. A level takes the residual of its whole
block, so attention reads levels that are written out.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32, int32, uint32

from cuda_port import dense
from cuda_port.cells import finder, table_of
from cuda_port.dense import ALIGNMENT, VECTORS
from cuda_port.device import (
    ONE,
    ZERO,
    add,
    barrier,
    block,
    device,
    div,
    fp16_bits,
    fp16_value,
    index,
    mul,
    sqrt,
    take,
    thread,
)
from cuda_port.fields import Fields, reader
from cuda_port.groups import Plan, levels_of, plan_of, put_half
from cuda_port.kernels import load_lut
from cuda_port.port import FLOATS, WORDS, Kernel, Port
from tbq.families.dense import gaussian_matrix, qr_rotation
from tbq.families.pr21089_first import (
    MIN_NORM,
    QK_K,
    SCALE_DOWN,
    SCALE_UP,
    SHARE,
    DenseResidual,
)

ROOM = VECTORS * QK_K


def sign_fields(codec: DenseResidual) -> Fields:
    """Return where the residual's signs are."""
    signs = codec.layout.offset("signs")
    return Fields(codec.block_bytes, QK_K, ((signs, 1),), ((0, 2),), word=2)


@cache
def encoder(plan: Plan, signs: Fields):
    """Return the kernel (x, columns, rows, projection, table, packed); matrices are flat.

    columns: Q by columns, rows: Q, projection: S by columns.
    """
    n_table, size, at = 2 * (1 << plan.bits) - 1, plan.fields.size, plan.scale
    multiply, cell = dense.product(QK_K), finder(plan.bits, True)
    store_codes = dense.code_storer(QK_K, plan.fields._replace(whole=()))
    store_signs = dense.code_storer(QK_K, signs._replace(whole=()))

    @cuda.jit
    def encode(x, columns, rows, projection, table, packed):
        v = cuda.shared.array(ROOM, float32, alignment=ALIGNMENT)
        unit = cuda.shared.array(ROOM, float32)
        codes = cuda.shared.array(ROOM, int32)
        lut = cuda.shared.array(n_table, float32)
        norms = cuda.shared.array(VECTORS, float32)
        total = cuda.local.array(VECTORS, float32)
        i, first = thread(), block() * VECTORS
        n_blocks = x.size // QK_K
        load_lut(table, lut, i, QK_K, n_table)
        dense.load_vectors(x, first, QK_K, v, i)
        barrier()
        if i < VECTORS:
            norm = sqrt(dense.squares(v, i, 1, QK_K))
            norms[i] = MIN_NORM if norm < MIN_NORM else norm
        barrier()
        for h in range(VECTORS):
            total[h] = div(v[index(VECTORS * i + h)], norms[h])
            unit[index(VECTORS * i + h)] = total[h]
        dense.keep(v, i, total)
        multiply(columns, v, i, total)
        for h in range(VECTORS):
            code = cell(mul(total[h], SCALE_UP), lut)
            codes[index(VECTORS * i + h)] = code
            total[h] = lut[index(code)]
        dense.keep(v, i, total)
        store_codes(codes, packed, first, n_blocks, i)
        multiply(rows, v, i, total)
        for h in range(VECTORS):
            total[h] = add(unit[index(VECTORS * i + h)], -total[h])
        dense.keep(v, i, total)
        rest = ZERO
        if i < VECTORS:
            rest = sqrt(dense.squares(v, i, 1, QK_K))
        multiply(projection, v, i, total)
        barrier()
        for h in range(VECTORS):
            codes[index(VECTORS * i + h)] = 1 if total[h] >= ZERO else 0
        barrier()
        store_signs(codes, packed, first, n_blocks, i)
        if i < VECTORS and first + i < n_blocks:
            put_half(packed, (first + i) * size, at, fp16_bits(norms[i]))
            put_half(packed, (first + i) * size, at + 2, fp16_bits(rest))

    return encode


@cache
def sign_levels(fields: Fields):
    """Return what makes `levels`: +1 and -1."""

    @cache
    def of(n: int):
        @device
        def levels(words, v, at, lut):
            for k in range(n):
                v[at + k] = ONE if take(words, k, 1) else -ONE

        return levels

    return of


@cache
def decoder(plan: Plan, signs: Fields, restores: bool):
    """Return the kernel (packed, turn, projection, table, y).

    What restores multiplies centroids by Q, `turn`; what does not multiplies by Q, given by
    columns, what the residual adds, and leaves the centroids.
    """
    n_table, multiply = 1 << plan.bits, dense.product(QK_K)
    load_codes = dense.level_loader(QK_K, plan.fields, levels_of(plan, False))
    load_signs = dense.level_loader(QK_K, signs, sign_levels(signs))
    both = Fields(plan.fields.size, QK_K, (), ((plan.scale, 4),), word=2)
    read, count = reader(both, QK_K), both.words(QK_K)

    @cuda.jit
    def decode(packed, turn, projection, table, y):
        v = cuda.shared.array(ROOM, float32, alignment=ALIGNMENT)
        lut = cuda.shared.array(n_table, float32)
        scales = cuda.shared.array((2, VECTORS), float32)
        total = cuda.local.array(VECTORS, float32)
        own = cuda.local.array(VECTORS, float32)
        i, first = thread(), block() * VECTORS
        n_blocks = y.size // QK_K
        load_lut(table, lut, i, QK_K, n_table)
        load_signs(packed, lut, first, n_blocks, v, i)
        if i < VECTORS and first + i < n_blocks:
            words = cuda.local.array(count, uint32)
            read(packed, first + i, 0, words)
            scales[0, i] = fp16_value(take(words, 0, 16))
            scales[1, i] = mul(SHARE, fp16_value(take(words, 16, 16)))
        barrier()
        multiply(projection, v, i, total)
        for h in range(VECTORS):
            own[h] = mul(total[h], scales[1, h])
        if not restores:
            dense.keep(v, i, own)
            multiply(turn, v, i, own)
        barrier()
        load_codes(packed, lut, first, n_blocks, v, i)
        barrier()
        if restores:
            multiply(turn, v, i, total)
        else:
            for h in range(VECTORS):
                total[h] = v[index(VECTORS * i + h)]
        for h in range(VECTORS):
            total[h] = mul(scales[0, h], add(total[h], own[h]))
        dense.store_vectors(total, first, QK_K, y, i)

    return decode


def port(codec: DenseResidual) -> Port | None:
    """Return the kernels of a tbqp format; None for wrong kernels."""
    if codec != DenseResidual(codec.cells):
        return None
    q, s, signs = qr_rotation(QK_K), gaussian_matrix(), sign_fields(codec)
    levels = np.float32(codec.cells.levels * SCALE_DOWN).reshape(-1)
    plan, table = plan_of(codec, codec.cells.bits), table_of(levels, codec.cells.edges)
    plan = plan._replace(fields=plan.fields._replace(word=2))
    flat = [np.float32(matrix).reshape(-1) for matrix in (q.T, q, s.T)]
    types = (FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, WORDS[2])
    products = QK_K // dense.AT_ONCE
    tables = (*flat, table)
    encode = Kernel(encoder(plan, signs), QK_K, ROOM, types, tables, turns=3 * products)

    def decoding(restores: bool) -> Kernel:
        types = (WORDS[2], *(FLOATS,) * 4)
        turn = np.float32(q if restores else q.T).reshape(-1)
        tables = (turn, np.float32(s).reshape(-1), levels)
        function = decoder(plan, signs, restores)
        return Kernel(function, QK_K, ROOM, types, tables, turns=2 * products)

    return Port(
        encode,
        None,
        None,
        levels,
        decoding(True),
        dense.rotating(QK_K, q.T),
        dense.rotating(QK_K, q),
        leveler=decoding(False),
    )
