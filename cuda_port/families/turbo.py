"""turbo2, turbo3, turbo4, turbo8 and Excidos' kin: a thread per group, see `cuda_port.groups`.

The arithmetic is that of `tbq.families.turbo`.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, float32

from cuda_port.device import (
    ONE,
    ZERO,
    add,
    device,
    div,
    load_code,
    load_fp16,
    mul,
    rint,
    sqrt,
    store_fp16,
)
from cuda_port.groups import (
    HADAMARD,
    ORDER,
    ORDERED,
    SIZE,
    TINY,
    cell,
    corrected,
    decoding,
    encoding,
    grouped,
    hadamard,
    inverse_norm,
    level_of,
    load_and_measure,
    plan_of,
    rotating,
    scale,
    store_bits,
    store_word,
    threads_for,
    total_of_squares,
)
from cuda_port.port import BYTES, FLOATS, FLOATS2, INTS, Kernel, Port
from tbq.codec import Codec
from tbq.families.turbo import (
    GROUP,
    QJL,
    THREE,
    THREE_UNIT,
    OverwrittenCodes,
    ResidualSigns,
    RotatedGrid,
    Rotation,
    grid,
)
from tbq.numerics import word_signs

HALF_STEPS, TOP = np.float32(127.5), np.float32(255.0)
PITCH = GROUP + 1
THREADS = threads_for(PITCH)
QS, SIGNS = ResidualSigns.layout.offset("qs"), ResidualSigns.layout.offset("signs")
RESIDUAL_BYTES, OVERWRITTEN_BYTES = ResidualSigns().block_bytes, OverwrittenCodes().block_bytes


def forward(rotation: Rotation) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors before and after the transform of R."""
    return word_signs(rotation.before), word_signs(rotation.after) * np.float32(rotation.scale)


def backward(rotation: Rotation) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors before and after the transform of the inverse of R."""
    return word_signs(rotation.after), word_signs(rotation.before) * np.float32(rotation.scale)


def port(codec: Codec) -> Port | None:
    """Return the kernels of a codec of the family; None for wrong kernels."""
    if codec.rotation.width != GROUP:
        return None
    if isinstance(codec, RotatedGrid):
        return grid_port(codec) if codec.peaked else None
    if isinstance(codec, ResidualSigns):
        return residual_port(codec) if codec.residual.width == GROUP else None
    if isinstance(codec, OverwrittenCodes):
        return overwritten_port(codec)
    third = "signs" if codec.cells.bits == 3 else None
    plan = plan_of(
        codec,
        codec.cells.bits,
        total=codec.total,
        clears=codec.clears_nan,
        corrected=codec.corrected,
        third=third,
    )
    levels, turn = codec.cells.levels, forward(codec.rotation)
    encode = encoding(codec, plan, HADAMARD, TINY, turn, codec.cells.edges, levels)
    return Port(encode, level_of(plan), levels, *turned_back(codec, plan, levels))


def turned_back(codec: Codec, plan: np.ndarray, levels: np.ndarray) -> tuple[Kernel, ...]:
    """Return decoder and rotator of a codec that leaves nothing to the graph."""
    if codec.gives == "rotated":
        return ()
    back = backward(codec.rotation)
    return decoding(codec, plan, HADAMARD, back, levels), rotating(codec, HADAMARD, back)


# --- turbo8 --------------------------------------------------------------------------------------


@cuda.jit
def encode_grid(x, plan, before, after, packed):
    """Quantise flat float32 to turbo8."""
    rows = cuda.shared.array((THREADS, PITCH), float32)
    group = cuda.grid(1)
    if group * GROUP < x.size:
        v, base = rows[cuda.threadIdx.x], group * int(plan[SIZE])
        norm = load_and_measure(x, group * GROUP, GROUP, plan[ORDER], v)
        scale(v, GROUP, inverse_norm(norm, TINY))
        hadamard(v, GROUP, before, after)
        peak = TINY
        for j in range(GROUP):
            if abs(v[j]) > peak:
                peak = abs(v[j])
        inverse = div(ONE, peak)
        for j in range(GROUP):
            steps = rint(add(mul(mul(v[j], inverse), HALF_STEPS), HALF_STEPS))
            steps = steps if steps > ZERO else ZERO  # NaN too
            packed[base + 2 + j] = int(steps if steps < TOP else TOP)
        store_fp16(mul(norm, peak), packed, base)


def grid_port(codec: RotatedGrid) -> Port:
    """Return the kernels of turbo8."""
    plan = plan_of(codec, 8, total=codec.total)
    types = (FLOATS, INTS, FLOATS, FLOATS, BYTES)
    tables = (plan, *forward(codec.rotation))
    encode = grouped(encode_grid, PITCH, GROUP, types, tables)
    return Port(encode, level_of(plan), grid())


# --- turbo4 of March 2026 ------------------------------------------------------------------------


@cuda.jit
def encode_residual(x, tables, edges, levels, packed):
    """Quantise flat float32; tables: factors (4, 128) around R's transform and the residual's."""
    rows = cuda.shared.array((THREADS, PITCH), float32)
    group = cuda.grid(1)
    if group * GROUP < x.size:
        v, base = rows[cuda.threadIdx.x], group * RESIDUAL_BYTES
        norm = load_and_measure(x, group * GROUP, GROUP, ORDERED, v)
        inverse = inverse_norm(norm, TINY)
        scale(v, GROUP, inverse)
        hadamard(v, GROUP, tables[0], tables[1])
        for g in range(GROUP // 8):
            word = 0
            for k in range(8):
                code = cell(v[8 * g + k], edges, 3, True)
                word |= code << (3 * k)
                unit = mul(x[group * GROUP + 8 * g + k], inverse)
                v[8 * g + k] = add(unit, -levels[code])
            store_word(word, 3, packed, base + QS + 3 * g)
        rest = sqrt(total_of_squares(v, GROUP, ORDERED))
        hadamard(v, GROUP, tables[2], tables[3])
        store_bits(v, GROUP, ZERO, packed, base + SIGNS)
        shift = mul(QJL, rest)
        for j in range(GROUP):
            code = load_code(packed, base + QS, 3, j)
            v[j] = add(levels[code], shift if v[j] >= ZERO else -shift)
        norm = corrected(norm, sqrt(total_of_squares(v, GROUP, ORDERED)))
        store_fp16(norm, packed, base)
        store_fp16(rest, packed, base + 2)


@device
def moved_level(packed, base, i, levels):
    """Return value i of a block: its centroid, moved by the residual's share, times the norm."""
    shift = mul(QJL, load_fp16(packed, base + 2))
    if not load_code(packed, base + SIGNS, 1, i):
        shift = -shift
    level = add(levels[load_code(packed, base + QS, 3, i)], shift)
    return mul(level, load_fp16(packed, base))


def residual_port(codec: ResidualSigns) -> Port:
    """Return the kernels of turbo4 of March 2026."""
    factors = np.stack([*forward(codec.rotation), *forward(codec.residual)])
    values = THREADS * GROUP
    types = (FLOATS, FLOATS2, FLOATS, FLOATS, BYTES)
    tables = (factors, THREE.edges, THREE.levels)
    encode = Kernel(encode_residual, THREADS, values, types, tables)
    return Port(encode, moved_level, THREE.levels)


# --- tbq3_0 of Excidos ---------------------------------------------------------------------------


@cuda.jit
def encode_overwritten(x, before, after, edges, levels, packed):
    """Quantise flat float32 to tbq3_0 of Excidos, whose packer loses codes."""
    rows = cuda.shared.array((THREADS, PITCH), float32)
    group = cuda.grid(1)
    if group * GROUP < x.size:
        v, base = rows[cuda.threadIdx.x], group * OVERWRITTEN_BYTES
        norm = load_and_measure(x, group * GROUP, GROUP, ORDERED, v)
        if norm < TINY:
            norm = TINY
        for j in range(GROUP):
            v[j] = div(v[j], norm)
        hadamard(v, GROUP, before, after)
        for g in range(GROUP // 8):
            word = 0
            for k in range(8):
                code = cell(v[8 * g + k], edges, 3, True)
                v[8 * g + k] = levels[code]
                word |= code << (3 * k if k < 3 else 0)
            store_word(word & 0xFF, 3, packed, base + 2 + 3 * g)
        restored = sqrt(total_of_squares(v, GROUP, ORDERED))
        store_fp16(div(norm, TINY if restored < TINY else restored), packed, base)


def overwritten_port(codec: OverwrittenCodes) -> Port:
    """Return the kernels of tbq3_0 of Excidos."""
    plan, levels = plan_of(codec, 3), THREE_UNIT.levels
    types = (FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, BYTES)
    tables = (*forward(codec.rotation), THREE_UNIT.edges, levels)
    encode = grouped(encode_overwritten, PITCH, GROUP, types, tables)
    return Port(encode, level_of(plan), levels, *turned_back(codec, plan, levels))
