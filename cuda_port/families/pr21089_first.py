"""tbqp3_0 and tbqp4_0 of pr21089's first commit: a thread per block, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.pr21089_first`. A level takes the residual of its whole
block, so attention reads levels that are written out.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, float32

from cuda_port.device import ONE, ZERO, add, div, load_code, load_fp16, mul, sqrt, store_fp16
from cuda_port.groups import (
    DENSE,
    ORDERED,
    SCALE,
    SIZE,
    dense,
    grouped,
    load_and_measure,
    load_levels,
    plan_of,
    rotating,
    scale,
    store_bits,
    store_cells,
    threads_for,
    total_of_squares,
)
from cuda_port.port import BYTES, FLOATS, INTS, Kernel, Port
from tbq.families.dense import gaussian_matrix, qr_rotation
from tbq.families.pr21089_first import (
    MIN_NORM,
    QK_K,
    SCALE_DOWN,
    SCALE_UP,
    SHARE,
    DenseResidual,
)

PITCH = 2 * QK_K + 1
THREADS = threads_for(PITCH)
SIGN_BYTES = QK_K // 8  # which stand in front of the scales


@cuda.jit
def encode(x, plan, columns, rows, projection, edges, levels, packed):
    """Quantise flat float32; matrices are flat: Q by columns, Q, S by columns."""
    shared = cuda.shared.array((THREADS, PITCH), float32)
    block = cuda.grid(1)
    if block * QK_K < x.size:
        v, at, base = shared[cuda.threadIdx.x], block * QK_K, block * int(plan[SIZE])
        place = base + int(plan[SCALE])
        norm = load_and_measure(x, at, QK_K, ORDERED, v)
        if norm < MIN_NORM:
            norm = MIN_NORM
        for j in range(QK_K):
            v[j] = div(v[j], norm)
        dense(v, QK_K, columns, columns)
        scale(v, QK_K, SCALE_UP)
        store_cells(v, QK_K, edges, levels, plan, packed, base, False)
        dense(v, QK_K, rows, rows)
        for j in range(QK_K):
            v[j] = add(div(x[at + j], norm), -v[j])
        rest = sqrt(total_of_squares(v, QK_K, ORDERED))
        dense(v, QK_K, projection, projection)
        store_bits(v, QK_K, ZERO, packed, place - SIGN_BYTES)
        store_fp16(norm, packed, place)
        store_fp16(rest, packed, place + 2)


@cache
def decoder(restores: bool):
    """Return the kernel (packed, plan, turn, projection, levels, y).

    What restores multiplies centroids by Q, `turn`; what does not multiplies by Q, given by
    columns, what the residual adds, and leaves the centroids.
    """

    @cuda.jit
    def decode(packed, plan, turn, projection, levels, y):
        shared = cuda.shared.array((THREADS, PITCH), float32)
        block = cuda.grid(1)
        if block * QK_K < y.size:
            v, at, base = shared[cuda.threadIdx.x], block * QK_K, block * int(plan[SIZE])
            place = base + int(plan[SCALE])
            for j in range(QK_K):
                v[j] = ONE if load_code(packed, place - SIGN_BYTES, 1, j) else -ONE
            dense(v, QK_K, projection, projection)
            scale(v, QK_K, mul(SHARE, load_fp16(packed, place + 2)))
            if not restores:
                dense(v, QK_K, turn, turn)
            for j in range(QK_K):
                y[at + j] = v[j]
            load_levels(packed, base, levels, plan, QK_K, v)
            if restores:
                dense(v, QK_K, turn, turn)
            d = load_fp16(packed, place)
            for j in range(QK_K):
                y[at + j] = mul(d, add(v[j], y[at + j]))

    return decode


def port(codec: DenseResidual) -> Port | None:
    """Return the kernels of a tbqp format; None for wrong kernels."""
    if codec != DenseResidual(codec.cells):
        return None
    q, s = qr_rotation(QK_K), gaussian_matrix()
    levels, plan = codec.cells.levels * SCALE_DOWN, plan_of(codec, codec.cells.bits)
    types = (FLOATS, INTS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, BYTES)
    tables = (plan, q.T, q, s.T, codec.cells.edges, levels)

    def decoding(restores: bool) -> Kernel:
        types = (BYTES, INTS, FLOATS, FLOATS, FLOATS, FLOATS)
        tables = (plan, q if restores else q.T, s, levels)
        return grouped(decoder(restores), PITCH, QK_K, types, tables)

    return Port(
        grouped(encode, PITCH, QK_K, types, tables),
        None,
        levels,
        decoding(True),
        rotating(codec, DENSE, (q, q[:0])),
        decoding(False),
    )
