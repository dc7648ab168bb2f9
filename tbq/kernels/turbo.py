"""Numba kernels of `tbq.families.turbo`, most of them put together from `tbq.kernels.rotated`."""

from __future__ import annotations

from functools import cache

import numpy as np

from tbq.cells import Cells
from tbq.codec import Codec, RowKernels
from tbq.families.turbo import (
    QJL,
    THREE,
    THREE_UNIT,
    OverwrittenCodes,
    ResidualSigns,
    RotatedCells,
    RotatedGrid,
    Rotation,
    grid,
)
from tbq.kernels import rotated
from tbq.kernels.compile import jit
from tbq.kernels.lanes import chooser, load
from tbq.kernels.numerics import load_fp16, store_fp16
from tbq.kernels.rotated import (
    GROUP,
    LANES,
    ONE,
    ORDERS,
    OVERWRITTEN,
    SIZE,
    SPLIT,
    STREAM3,
    STREAMS,
    TINY,
    WORDS,
    ZERO,
    Plan,
)
from tbq.kernels.simd import level_table
from tbq.numerics import word_signs

HALF_STEPS, TOP = np.float32(127.5), np.float32(255.0)
ORDERED = ORDERS["ordered"]
UPWARD = "not <"  # a value on a boundary, or NaN, goes up
SIGN_LEVELS = level_table(np.array([-1, 1], np.float32))


def _forward(rotation: Rotation) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors before and after the transform of R."""
    if rotation.width != GROUP:
        raise NotImplementedError("kernels rotate 128 values; other widths are mutants")
    before = rotated.in_lanes(word_signs(rotation.before))
    return before, rotated.in_lanes(word_signs(rotation.after) * np.float32(rotation.scale))


def _inverse(rotation: Rotation) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors before and after the transform of the inverse of R."""
    swapped = Rotation(rotation.after, rotation.before, rotation.scale, rotation.width)
    return _forward(swapped)


def _plan(codec: Codec, cells: Cells, places: np.ndarray, **fields) -> Plan:
    before, after = _forward(codec.rotation)
    plan = {
        "divides": False,
        "floor": ZERO,
        "corrected": True,
        "clears_nan": False,
        "before": before,
        "after": after,
        "scales": rotated.scale_places(codec),
        "places": places,
        "zeros": rotated.zero_places(codec),
    }
    return Plan(**plan | rotated.cell_tables(cells) | fields)


def kernels(codec: Codec) -> RowKernels:
    """Return the kernels of a codec of the family."""
    if isinstance(codec, RotatedGrid):
        return _grid(codec)
    if isinstance(codec, ResidualSigns):
        return _residual(codec)
    return _overwritten(codec) if isinstance(codec, OverwrittenCodes) else _cells(codec)


def _cells(codec: RotatedCells) -> RowKernels:
    kind = SPLIT if codec.cells.bits == 3 else STREAMS[codec.cells.bits]
    plan = _plan(
        codec,
        codec.cells,
        rotated.stored(codec, *codec.layout.codes),
        corrected=codec.corrected,
        clears_nan=codec.clears_nan,
    )
    order = ORDERS[codec.total]
    return _row_kernels(codec, plan, order, kind, kind, codec.cells)


def _overwritten(codec: OverwrittenCodes) -> RowKernels:
    # r exceeds 1e-10 whatever the codes are
    plan = _plan(codec, THREE_UNIT, rotated.stored(codec, "qs"), divides=True, floor=TINY)
    return _row_kernels(codec, plan, ORDERED, OVERWRITTEN, STREAM3, THREE_UNIT)


def _row_kernels(
    codec: Codec, plan: Plan, order: int, written: int, read: int, cells: Cells
) -> RowKernels:
    """Return kernels for codes that are packed as words of one kind and unpacked as another."""
    size = codec.block_bytes * codec.group_blocks
    where, table = (plan.places, plan.scales), level_table(cells.levels)
    back = _inverse(codec.rotation)
    encode = rotated.quantizer(written, cells.bits, UPWARD, order)
    read_levels, decode = rotated.leveller(read), rotated.restorer(read)

    def quantize(x, packed, first):
        encode(x.reshape(-1, GROUP), plan, packed.reshape(-1, size))

    def levels(packed, y):
        read_levels(packed.reshape(-1, size), *where, table, y.reshape(-1, GROUP))

    def restore(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, GROUP)
        decode(blocks, *where, table, *back, values)

    dequantize = levels if codec.gives == "rotated" else restore
    return RowKernels(quantize, dequantize, levels, *_rotations(codec.rotation), restore)


def _rotations(rotation: Rotation):
    forward, back = _forward(rotation), _inverse(rotation)

    def rotate(x, blocks):
        rotated.rotate(x, *forward)

    def unrotate(x, blocks):
        rotated.rotate(x, *back)

    return rotate, unrotate


# --- turbo8 --------------------------------------------------------------------------------------


@cache
def _grid_quantizer(order: int):
    norms = rotated.norming(order)

    @jit
    def quantize(x, plan, peaked, packed):
        v, kept = np.empty(SIZE, np.float32), np.empty(LANES, np.int32)
        norm, peak = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        inverse, codes = np.empty(LANES, np.float32), np.empty(SIZE, np.int32)
        for start in range(0, x.shape[0], LANES):
            count = min(LANES, x.shape[0] - start)
            load(x, start, count, v)
            norms(v, norm)
            rotated.turn(v, norm, plan, peak, kept)
            peak[:] = TINY
            for j in range(GROUP):
                for lane in range(LANES):
                    size = abs(v[j * LANES + lane])
                    peak[lane] = size if size > peak[lane] else peak[lane]
            for lane in range(LANES):
                inverse[lane] = ONE / peak[lane]
            for j in range(GROUP):
                for lane in range(LANES):
                    k = j * LANES + lane
                    steps = np.rint((v[k] * inverse[lane]) * HALF_STEPS + HALF_STEPS)
                    steps = steps if steps > ZERO else ZERO  # NaN too
                    codes[k] = np.int32(steps if steps < TOP else TOP)
            for lane in range(count):
                out = packed[start + lane]
                store_fp16(norm[lane] * peak[lane] if peaked else norm[lane], out, 0)
                for j in range(GROUP):
                    out[2 + j] = np.uint8(codes[j * LANES + lane])

    return quantize


@jit
def _levels_grid(packed, table, y):
    for b in range(packed.shape[0]):
        norm = load_fp16(packed[b], 0)
        for j in range(GROUP):
            y[b, j] = table[packed[b, 2 + j]] * norm


@jit
def _restore_grid(packed, table, scales, before, after, y):
    for b in range(packed.shape[0]):
        for j in range(GROUP):
            y[b, j] = table[packed[b, 2 + j]]
    rotated.rotate_and_scale(packed, scales, before, after, y)


def _grid(codec: RotatedGrid) -> RowKernels:
    size, table = codec.block_bytes, grid()
    plan = _plan(codec, THREE, rotated.stored(codec, "qs"))
    back, encode = _inverse(codec.rotation), _grid_quantizer(ORDERS[codec.total])

    def quantize(x, packed, first):
        blocks = packed.reshape(-1, size)
        encode(x.reshape(-1, GROUP), plan, codec.peaked, blocks)

    def levels(packed, y):
        _levels_grid(packed.reshape(-1, size), table, y.reshape(-1, GROUP))

    def restore(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, GROUP)
        _restore_grid(blocks, table, plan.scales, *back, values)

    return RowKernels(quantize, levels, levels, *_rotations(codec.rotation), restore)


# --- turbo4 of March 2026 ------------------------------------------------------------------------


_norms, _correct = rotated.norming(ORDERED), rotated.correcting(ORDERED)
_choose, _write = chooser(3, UPWARD, GROUP), rotated.writer(STREAM3)
_read_row, _read_signs = rotated.row_reader(STREAM3), rotated.code_reader(1)


@jit
def _quantize_residual(x, plan, table, before, after, packed):
    """Quantise x (n, 128); table has the centroids, before and after are of the residual."""
    v, c, s = np.empty(SIZE, np.float32), np.empty(SIZE, np.float32), np.empty(SIZE, np.float32)
    unit, codes = np.empty(SIZE, np.float32), np.empty(SIZE, np.int32)
    words = np.empty(WORDS * LANES, np.int32)
    norm, scratch = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    rnorm, kept = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        load(x, start, count, v)
        _norms(v, norm)
        rotated.normalise(v, norm, plan, scratch, kept)
        for k in range(SIZE):
            unit[k] = v[k]
        rotated.give_signs(unit, plan.before)  # twice the same signs
        rotated.fwht(v, plan.after)
        _choose(v, plan.edges, table, codes, c)
        _write(codes, start, count, plan.places, words, packed)
        for k in range(SIZE):
            v[k] = unit[k] - c[k]
        _norms(v, rnorm)
        rotated.give_signs(v, before)
        rotated.fwht(v, after)
        for j in range(GROUP):
            for lane in range(LANES):
                k = j * LANES + lane
                shift = QJL * rnorm[lane]
                moved = c[k] + (shift if v[k] >= ZERO else -shift)
                s[k] = moved * moved
        _correct(norm, s, scratch)
        for lane in range(count):
            out = packed[start + lane]
            store_fp16(norm[lane], out, 0)
            store_fp16(rnorm[lane], out, 2)
            for g in range(WORDS):
                byte = 0
                for i in range(8):
                    byte |= (1 if v[(8 * g + i) * LANES + lane] >= ZERO else 0) << i
                out[52 + g] = np.uint8(byte)


@jit
def _moved(block, places, tables, e, out):
    """Set out (128,) to the centroids of a block, moved by the residual's share; e is scratch."""
    levels, signs = tables
    _read_row(block, places, levels, 0, WORDS, ONE, out, 0)
    _read_signs(block[52:], signs, QJL * load_fp16(block, 2), e)
    for j in range(GROUP):
        out[j] += e[j]


@jit
def _levels_residual(packed, places, tables, y):
    e = np.empty(GROUP, np.float32)
    for b in range(packed.shape[0]):
        _moved(packed[b], places, tables, e, y[b])
        norm = load_fp16(packed[b], 0)
        for j in range(GROUP):
            y[b, j] *= norm


@jit
def _restore_residual(packed, places, tables, scales, before, after, y):
    e = np.empty(GROUP, np.float32)
    for b in range(packed.shape[0]):
        _moved(packed[b], places, tables, e, y[b])
    rotated.rotate_and_scale(packed, scales, before, after, y)


def _residual(codec: ResidualSigns) -> RowKernels:
    size = codec.block_bytes
    places = rotated.stored(codec, "qs")
    plan = _plan(codec, THREE, places)
    residual, back = _forward(codec.residual), _inverse(codec.rotation)
    table = level_table(THREE.levels)
    tables = (table, SIGN_LEVELS)

    def quantize(x, packed, first):
        blocks = packed.reshape(-1, size)
        _quantize_residual(x.reshape(-1, GROUP), plan, table, *residual, blocks)

    def levels(packed, y):
        _levels_residual(packed.reshape(-1, size), places, tables, y.reshape(-1, GROUP))

    def restore(packed, y):
        blocks, values = packed.reshape(-1, size), y.reshape(-1, GROUP)
        _restore_residual(blocks, places, tables, plan.scales, *back, values)

    return RowKernels(quantize, levels, levels, *_rotations(codec.rotation), restore)
