"""Vectors times a dense matrix: a thread per output, eight vectors at a time.

An output is a sum in index order, which threads cannot share. Thread i has output i of eight
vectors, so one element of the matrix, which neighbouring threads read side by side, feeds eight
products; the eight factors lie together in shared memory, v[8 j + h], and are read at once.
Norms are sums in order too: a thread each.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import config, cuda, float32, int32, uint32

from cuda_port.cells import finder, table_of
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
    put,
    sqrt,
    take,
    thread,
)
from cuda_port.fields import Fields, reader, writer
from cuda_port.groups import DIVIDED, MULTIPLIED, TINY, Plan, put_half
from cuda_port.kernels import load_lut
from cuda_port.port import FLOATS, WORDS, Kernel

VECTORS = 8
AT_ONCE = 8  # elements of the matrix per turn of a loop
ALIGNMENT = None if config.ENABLE_CUDASIM else 16  # bytes, for reads of four values at once


# --- pieces: all threads of a block call them ----------------------------------------------------


@cache
def product(width: int):
    """Return the device function (matrix, v, i, total): output i of each vector, in registers."""

    @device
    def multiply(matrix, v, i, total):
        for h in range(VECTORS):
            total[h] = ZERO
        j = 0
        while j < width:
            for k in range(AT_ONCE):
                element = matrix[index(j * width + i + k * width)]
                for h in range(VECTORS):
                    value = v[index(VECTORS * j + VECTORS * k + h)]
                    total[h] = add(total[h], mul(element, value))
            j += AT_ONCE

    return multiply


@device
def load_vectors(x, first, width, v, i):
    """Let thread i put its value of each vector into v; beyond the end there are zeros."""
    for h in range(VECTORS):
        at = (first + h) * width + i
        v[index(VECTORS * i + h)] = x[index(at)] if at < x.size else ZERO


@device
def store_vectors(total, first, width, y, i):
    """Let thread i write its value of each vector."""
    for h in range(VECTORS):
        at = (first + h) * width + i
        if at < y.size:
            y[index(at)] = total[h]


@device
def keep(v, i, total):
    """Put output i of each vector where the inputs were; on either side of it is a barrier."""
    barrier()
    for h in range(VECTORS):
        v[index(VECTORS * i + h)] = total[h]
    barrier()


@device
def squares(v, first, vectors, width):
    """Return the sum of squares, in order, of neighbouring vectors."""
    total = ZERO
    for h in range(first, first + vectors):
        for j in range(width):
            value = v[index(VECTORS * j + h)]
            total = add(total, mul(value, value))
    return total


@cache
def level_loader(width: int, fields: Fields, levels_of):
    """Return the device function (packed, table, first, n_vectors, v, i) that loads levels."""
    n = fields.least_slice()
    read, levels, count = reader(fields, n), levels_of(n), fields.words(n)
    per_vector, per_block, vectors = width // n, fields.values // n, fields.values // width

    @device
    def load(packed, table, first, n_vectors, v, i):
        words = cuda.local.array(count, uint32)
        found = cuda.local.array(n, float32)
        item = i
        while item < VECTORS * per_vector:
            h, s = item % VECTORS, item // VECTORS
            if first + h < n_vectors:
                part = (first + h) % vectors * per_vector + s
                read(packed, (first + h) // vectors, part % per_block, words)
                levels(words, found, 0, table)
                for k in range(n):
                    v[index(VECTORS * (s * n + k) + h)] = found[k]
            item += width

    return load


@cache
def code_storer(width: int, fields: Fields):
    """Return the device function (codes, packed, first, n_vectors, i), codes[8 j + h]."""
    n, bits = fields.least_slice(), fields.parts[0][1]
    write, count = writer(fields, n), fields.words(n)
    per_vector, vectors = width // n, fields.values // width

    @device
    def store(codes, packed, first, n_vectors, i):
        words = cuda.local.array(count, uint32)
        item = i
        while item < VECTORS * per_vector:
            h, s = item % VECTORS, item // VECTORS
            if first + h < n_vectors:
                for k in range(count):
                    words[k] = 0
                for k in range(n):
                    put(words, bits * k, bits, codes[index(VECTORS * (s * n + k) + h)])
                part = (first + h) % vectors * per_vector + s
                write(words, packed, (first + h) // vectors, part)
            item += width

    return store


# --- kernels -------------------------------------------------------------------------------------


def encoding(plan: Plan, width: int, matrix, factor, edges, levels) -> Kernel:
    """Return the encoder of groups of vectors: scaled, multiplied, times `factor`, coded."""
    table = table_of(levels, edges)
    function = _encoder(plan, width, np.float32(factor), len(table))
    types = (FLOATS, FLOATS, FLOATS, WORDS[2])
    tables = (np.float32(matrix).reshape(-1), table)
    return Kernel(function, width, VECTORS * width, types, tables, turns=width // AT_ONCE)


@cache
def _encoder(plan: Plan, width: int, factor, n_table: int):
    vectors, size, at = plan.width // width, plan.fields.size, plan.scale
    fields = plan.fields._replace(whole=())
    multiply, store_codes = product(width), code_storer(width, fields)
    cell, room = finder(plan.bits, plan.last), VECTORS * width
    multiplied, divided, least = plan.scaling == MULTIPLIED, plan.scaling == DIVIDED, plan.least
    clears, corrects = plan.clears, plan.corrected
    assert multiplied or divided

    @cuda.jit
    def encode(x, matrix, table, packed):
        v = cuda.shared.array(room, float32, alignment=ALIGNMENT)
        codes = cuda.shared.array(room, int32)
        lut = cuda.shared.array(n_table, float32)
        norms = cuda.shared.array(VECTORS, float32)
        total = cuda.local.array(VECTORS, float32)
        i, first = thread(), block() * VECTORS
        n_vectors = x.size // width
        load_lut(table, lut, i, width, n_table)
        load_vectors(x, first, width, v, i)
        barrier()
        norm = ZERO
        if i % vectors == 0 and i < VECTORS:
            norm = sqrt(squares(v, i, vectors, width))
            if divided and norm < least:
                norm = least
            for h in range(vectors):
                norms[i + h] = norm
        barrier()
        for h in range(VECTORS):
            own, value = norms[h], v[index(VECTORS * i + h)]
            if divided:
                value = div(value, own)
            else:
                value = mul(value, div(ONE, own) if own > least else ZERO)
                if clears and own != own:
                    value = ZERO
            v[index(VECTORS * i + h)] = value
        barrier()
        multiply(matrix, v, i, total)
        barrier()
        for h in range(VECTORS):
            code = cell(mul(total[h], factor), lut)
            codes[index(VECTORS * i + h)] = code
            v[index(VECTORS * i + h)] = lut[index(code)]
        barrier()
        store_codes(codes, packed, first, n_vectors, i)
        if i % vectors == 0 and i < VECTORS and first + i < n_vectors:
            if corrects:
                restored = sqrt(squares(v, i, vectors, width))
                norm = div(norm, restored) if restored > TINY else norm
            put_half(packed, (first + i) // vectors * size, at, fp16_bits(norm))

    return encode


def decoding(plan: Plan, width: int, matrix, levels_of, levels) -> Kernel:
    """Return the decoder: levels, multiplied by `matrix`, times scale."""
    function = _decoder(plan, width, levels_of, len(levels))
    unit = plan.fields.unit(plan.fields.least_slice())
    types = (WORDS[unit], FLOATS, FLOATS, FLOATS)
    tables = (np.float32(matrix).reshape(-1), np.float32(levels))
    return Kernel(function, width, VECTORS * width, types, tables, turns=width // AT_ONCE)


@cache
def _decoder(plan: Plan, width: int, levels_of, n_table: int):
    vectors, room = plan.width // width, VECTORS * width
    multiply, load = product(width), level_loader(width, plan.fields, levels_of)
    scale = _scale_of(plan)

    @cuda.jit
    def decode(packed, matrix, table, y):
        v = cuda.shared.array(room, float32, alignment=ALIGNMENT)
        lut = cuda.shared.array(n_table, float32)
        scales = cuda.shared.array(VECTORS, float32)
        total = cuda.local.array(VECTORS, float32)
        i, first = thread(), block() * VECTORS
        n_vectors = y.size // width
        load_lut(table, lut, i, width, n_table)
        barrier()
        load(packed, lut, first, n_vectors, v, i)
        if i < VECTORS and first + i < n_vectors:
            scales[i] = scale(packed, (first + i) // vectors)
        barrier()
        multiply(matrix, v, i, total)
        for h in range(VECTORS):
            total[h] = mul(total[h], scales[h])
        store_vectors(total, first, width, y, i)

    return decode


def _scale_of(plan: Plan):
    """Return the device function (packed, block) of a block's scale, in the decoder's words."""
    n = plan.fields.least_slice()
    read, count, at = reader(plan.fields, n), plan.fields.words(n), plan.fields.starts(n)[-1]

    @device
    def scale(packed, number):
        words = cuda.local.array(count, uint32)
        read(packed, number, 0, words)
        return fp16_value(take(words, at, 16))

    return scale


def rotating(width: int, matrix: np.ndarray) -> Kernel:
    """Return the kernel (x, matrix, y) that multiplies flat vectors."""
    tables = (np.float32(matrix).reshape(-1),)
    return Kernel(
        _rotator(width),
        width,
        VECTORS * width,
        (FLOATS, FLOATS, FLOATS),
        tables,
        turns=width // AT_ONCE,
    )


@cache
def _rotator(width: int):
    multiply, room = product(width), VECTORS * width

    @cuda.jit
    def rotate(x, matrix, y):
        v = cuda.shared.array(room, float32, alignment=ALIGNMENT)
        total = cuda.local.array(VECTORS, float32)
        i, first = thread(), block() * VECTORS
        load_vectors(x, first, width, v, i)
        barrier()
        multiply(matrix, v, i, total)
        store_vectors(total, first, width, y, i)

    return rotate
