"""Wrong kernels of the formats that rotate, normalise, and look up cells: float64, as matrices.

Like `broken_kernels` they follow the specification and know nothing of the diagnosis. A kernel
returns None for cases in which its bug cannot occur.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from scipy.linalg import block_diag, hadamard

import tbq
from tbq.bitpack import pack, unpack
from tbq.families import (
    amesianx,
    dense,
    dusterbloom,
    planar,
    pr21089,
    qvac,
    tcq,
    trellis,
    turbo,
    turbo_cpu,
    vllm,
)

# Blocks for which a slow search is run; in larger cases it is right.
SEARCHED = 6


class Plan(NamedTuple):
    """How a format encodes: v = gain * matrix * x / |x|; it decodes d * unit * matrix' * c.

    down: whether a value on a boundary goes down. restores: whether d is the norm over that of the
    centroids. normalises: whether the decoder makes centroids a unit vector.
    """

    matrix: np.ndarray
    gain: float
    cells: tbq.cells.Cells
    unit: float = 1.0
    down: bool = False
    restores: bool = True
    normalises: bool = False


def signs_in(words):
    return np.array([-1.0 if words[i // 32] >> i % 32 & 1 else 1.0 for i in range(32 * len(words))])


def signs_in_bytes(digits):
    data = bytes.fromhex(digits)
    return np.array([-1.0 if data[i // 8] >> i % 8 & 1 else 1.0 for i in range(8 * len(data))])


def transform(n, before, after, how):
    """Return diag(after) H diag(before), orthogonal, or what a wrong kernel has in its place."""
    if how == "none":
        return np.eye(n)
    if how in ("no first", "no signs"):
        before = np.ones(n)
    if how in ("no second", "no signs"):
        after = np.ones(n)
    if how == "swapped":
        before, after = after, before
    if how == "halves":
        half = hadamard(n // 2) / np.sqrt(n // 2)
        return after[:, None] * block_diag(half, half) * before
    return after[:, None] * hadamard(n) / np.sqrt(n) * before


def mixed(n, how):
    return {"none": 1, "halves": n // 2}.get(how, n)


def turned_by(matrix, how):
    return {"right": matrix, "transpose": matrix.T, "none": np.eye(len(matrix))}[how]


def parts(kind, how):
    """Return planar's or iso's matrix, from what it does to unit vectors."""
    if how == "none":
        return np.eye(128)
    blocks = []
    for q in planar.ROTATIONS[kind].astype(np.float64):
        if kind == "planar":
            blocks.append([[q[0], -q[1]], [q[1], q[0]]])
        else:
            w, x, y, z = q
            s = -1 if how == "mirrored" else 1  # multiplied from the right, the vector part turns
            blocks.append(
                [
                    [w, -x, -y, -z],
                    [x, w, -s * z, s * y],
                    [y, s * z, w, -s * x],
                    [z, -s * y, s * x, w],
                ]
            )
    matrix = block_diag(*blocks)
    if how == "apart":
        size = len(blocks[0])
        order = np.arange(128).reshape(size, -1).T.reshape(-1)
        matrix = matrix[np.argsort(order)][:, np.argsort(order)]
    return matrix.T if how == "transpose" else matrix


NO_SIGNS = np.ones(128)
APPLIES = {
    turbo.RotatedCells: {"none", "halves", "swapped", "no first", "no second", "no signs"},
    dusterbloom.SignedHadamard: {"none", "halves", "no first"},
    amesianx.HadamardCells: {"none", "halves", "no first"},
    vllm.UnitKeys: {"none", "halves"},
    turbo_cpu.DenseCells: {"none", "transpose"},
    planar.RotatedParts: {"none", "transpose", "apart", "mirrored"},
    qvac.UnitCells: set(),
    pr21089.DenseRotated: set(),
}


def plan_of(fmt, how="right"):
    """Return how a format encodes, or a kernel that rotates so; None if it is not known here."""
    codec = fmt.codec
    if how != "right" and how not in APPLIES.get(type(codec), ()):
        return None
    match codec:
        case turbo.RotatedCells():
            s1, s2 = signs_in(turbo.S1), signs_in(turbo.S2)
            if how == "halves":  # both have the signs of the first half
                s1, s2 = np.tile(s1[:64], 2), np.tile(s2[:64], 2)
            return Plan(transform(128, s1, s2, how), 1.0, codec.cells)
        case dusterbloom.SignedHadamard(forward=1.0):
            m = transform(128, signs_in(dusterbloom.SIGNS), NO_SIGNS, how)
            return Plan(m, np.sqrt(mixed(128, how)), codec.cells, down=True)
        case amesianx.HadamardCells(measured="norm", residual=None):
            n = codec.group_values
            m = transform(n, signs_in_bytes(amesianx.SIGNS[n]), np.ones(n), how)
            gain = np.sqrt(mixed(n, how))
            return Plan(m, gain, codec.cells, 1 / gain, restores=False)
        case vllm.UnitKeys():
            m = transform(128, NO_SIGNS, NO_SIGNS, how)
            return Plan(m, 1.0, codec.cells, restores=False, normalises=True)
        case turbo_cpu.DenseCells(bits=4):
            return Plan(turned_by(turbo_cpu.matrix().astype(float), how), 1.0, turbo.FOUR)
        case pr21089.DenseRotated():
            q = dense.qr_rotation().astype(float)
            tables = pr21089.CODEBOOKS[codec.bits], pr21089.BOUNDARIES[codec.bits]
            cells = tbq.cells.Cells(*(tuple(t[t > 0].tolist()) for t in tables))
            return Plan(block_diag(q, q), 16.0, cells, 1 / 16, restores=False)
        case planar.RotatedParts():
            if how == "mirrored" and codec.kind == "planar":
                return None
            c = codec.cells
            middles = tuple((a + b) / 2 for a, b in zip(c.centroids, c.centroids[1:], strict=False))
            m = parts(codec.kind, how)
            return Plan(m, 1.0, tbq.cells.Cells(c.centroids, middles), down=True)
        case qvac.UnitCells(signs=()):
            return Plan(np.eye(codec.block_values), 1.0, codec.cells, restores=False)
    return None


def half_of(n):
    return np.arange(n) < n // 2


def codes_in(fmt, blocks):
    if len(fmt.layout.codes) == 2:
        return unpack(blocks["qs"], 2) | unpack(blocks["signs"], 1) << 2
    return unpack(blocks["qs"], plan_of(fmt).cells.bits)


def encoded(case, plan, lanes=None):
    """Encode by a plan, from some lanes only."""
    fmt = case.format
    n = fmt.group_values
    x = case.inputs["x"].reshape(-1, n).astype(np.float64)
    if lanes is not None:
        x = np.where(lanes, x, 0)
    with np.errstate(all="ignore"):
        norm = np.sqrt((x * x).sum(axis=1))
        unit = np.nan_to_num(x / np.where(norm > 1e-10, norm, np.inf)[:, None])
        v = unit @ (plan.gain * plan.matrix.T)
        edges = plan.cells.edges.astype(np.float64)
        codes = np.searchsorted(edges, v, side="left" if plan.down else "right").astype(np.uint8)
        c = plan.cells.levels.astype(np.float64)[codes]
        d = norm / np.sqrt((c * c).sum(axis=1)) / plan.unit if plan.restores else norm
        blocks = np.zeros(len(x) * fmt.codec.group_blocks, fmt.block)
        d = np.repeat(d, fmt.codec.group_blocks).astype(np.float32).astype(np.float16)
    special = ~np.isfinite(x).all(axis=1) | ~((norm > 1e-6) & (norm < 1e18))
    blocks[fmt.layout.scales[0]] = d
    codes = codes.reshape(len(blocks), -1)
    if len(fmt.layout.codes) == 2:
        blocks["qs"], blocks["signs"] = pack(codes & 3, 2), pack(codes >> 2, 1)
    else:
        blocks["qs"] = pack(codes, plan.cells.bits)
    raw = blocks.view(np.uint8).reshape(len(x), -1)
    raw[special] = case.expected.reshape(raw.shape)[special]  # NaN and the like are done right
    return raw.reshape(case.expected.shape)


def decoded(case, plan, lanes=None, factor=1.0):
    """Decode by a plan, from the levels of some lanes only."""
    fmt = case.format
    packed = case.inputs["packed"]
    blocks = np.ascontiguousarray(packed).view(fmt.block).reshape(-1)
    c = plan.cells.levels.astype(np.float64)[codes_in(fmt, blocks)]
    c = c.reshape(-1, fmt.group_values)
    d = np.repeat(blocks[fmt.layout.scales[0]].astype(np.float64), fmt.block_values)
    with np.errstate(all="ignore"):
        if plan.normalises:
            c = c / np.sqrt((c * c).sum(axis=1))[:, None]
        if lanes is not None:
            c = np.where(lanes, c, 0)
        if case.op == "scores" or fmt.codec.gives == fmt.codec.takes:
            c = c @ plan.matrix
        y = (c * plan.unit * factor * d.reshape(c.shape)).astype(np.float32)
    y = y.reshape(packed.size // packed.shape[-1], -1).astype(np.float64)
    if case.op == "scores":
        return (case.inputs["q"].astype(np.float64) @ y.T).astype(np.float32)
    if case.op == "weighted_sum":
        return (case.inputs["p"].astype(np.float64) @ y).astype(np.float32)
    return y.astype(np.float32).reshape(case.expected.shape)


def seen(case):
    """Whether a decoder's rotation shows: in scores, and where it rotates back."""
    codec = case.format.codec
    return case.op in ("quantize", "scores") or codec.gives == codec.takes


def run(case, plan, **bugs):
    return encoded(case, plan, **bugs) if case.op == "quantize" else decoded(case, plan, **bugs)


def right(case):
    plan = plan_of(case.format)
    return None if plan is None else run(case, plan)


# --- one function per bug ---


def rotated(*ways):
    """Return a kernel that rotates in the first way that its format can be wrong in."""

    def kernel(case):
        codec = case.format.codec
        if case.op == "quantize" and isinstance(codec, tcq.TrellisCoded):
            return turned(case, ways[0])
        for how in ways:
            plan = plan_of(case.format, how)
            if plan is not None and seen(case):
                return run(case, plan)
        return None

    return kernel


def turned(case, how):
    """Encode what the right rotation makes of it what a wrong one should have."""
    if how not in APPLIES[turbo.RotatedCells]:
        return None
    s1, s2 = signs_in(turbo.S1), signs_in(turbo.S2)
    m = transform(128, s1, s2, how)
    x = case.inputs["x"].reshape(-1, 128).astype(np.float64)
    with np.errstate(all="ignore"):
        x = x @ m.T @ transform(128, s1, s2, "right")
    return tbq.quantize(x.astype(np.float32).reshape(case.inputs["x"].shape), case.format)


def other_cells(case):
    """N(0, 1)'s and N(0, 1/128)'s tables of another code base in place of its own."""
    plan = plan_of(case.format)
    named = turbo_cpu.DenseCells | pr21089.DenseRotated  # their tables have names, not fields
    if plan is None or isinstance(case.format.codec, named):
        return None
    tables = {2: dusterbloom.CELLS[2], 3: dusterbloom.CELLS[3], 4: dusterbloom.CELLS[4]}
    if plan.cells.centroids[-1] < 1:
        tables = {3: turbo.THREE, 4: turbo.FOUR_NARROW}
        if plan.cells.centroids == turbo.THREE.centroids:
            tables[3] = turbo.THREE_TRAINED
        if plan.cells.centroids == turbo.FOUR_NARROW.centroids:
            tables[4] = turbo.FOUR
    cells = tables.get(plan.cells.bits)
    if cells is None or cells == plan.cells or cells.centroids[-1] > 2 * plan.cells.centroids[-1]:
        return None
    far = np.abs(cells.levels - plan.cells.levels).max() / cells.centroids[-1]
    if case.op == "quantize" and far < 1e-3:
        return None  # hardly a code is another
    if isinstance(case.format.codec, planar.RotatedParts):
        c = cells.centroids
        middles = tuple((a + b) / 2 for a, b in zip(c, c[1:], strict=False))
        cells = tbq.cells.Cells(c, middles)
    return run(case, plan._replace(cells=cells))


def uncorrected(case):
    plan = plan_of(case.format)
    if case.op != "quantize":
        return None
    if case.format.sibling:
        return tbq.quantize(case.inputs["x"], case.format)  # alone it stores norms
    if plan is None or not plan.restores:
        return None
    return encoded(case, plan._replace(restores=False))


def corrected(case):
    plan = plan_of(case.format)
    if plan is None or plan.restores or case.op != "quantize":
        return None
    return encoded(case, plan._replace(restores=True))


def without_constant(case):
    """The transform's constant left out of the encoder; the decoder's is a constant of values."""
    plan = plan_of(case.format)
    if plan is None or case.op != "quantize" or isinstance(case.format.codec, qvac.UnitCells):
        return None
    n = case.format.codec.rotation_values
    return encoded(case, plan._replace(gain=np.sqrt(n) if plan.gain == 1 else 1.0))


def lanes(case):
    plan = plan_of(case.format)
    if case.op == "quantize" and isinstance(case.format.codec, tcq.TrellisCoded | trellis.Trellis):
        x = np.where(half_of(128), case.inputs["x"].reshape(-1, 128), np.float32(0))
        return tbq.quantize(x.reshape(case.inputs["x"].shape), case.format)
    if plan is None or not seen(case):
        return None
    if case.op != "quantize" and case.format.codec.rotation_values == 1:
        return None  # the others' are right
    return run(case, plan, lanes=half_of(case.format.group_values))


def other_root(case):
    """1/sqrt(128) in as many digits as another kernel has it, all else to the bit."""
    codec = case.format.codec
    own = isinstance(codec, dusterbloom.SignedHadamard) and codec.forward == 1  # as CUDA has it
    if case.op != "dequantize" or not own:
        return None
    blocks = np.ascontiguousarray(case.inputs["packed"]).view(case.format.block).reshape(-1)
    y = codec.cells.levels[codes_in(case.format, blocks)]
    for length in (1, 2, 4, 8, 16, 32, 64):
        pairs = y.reshape(len(y), -1, 2, length)
        y = np.concatenate(
            [pairs[:, :, :1] + pairs[:, :, 1:], pairs[:, :, :1] - pairs[:, :, 1:]], axis=2
        ).reshape(y.shape)
    with np.errstate(all="ignore"):
        y = y * np.float32(0.08838834764831845) * signs_in(dusterbloom.SIGNS).astype(np.float32)
        y = y * blocks["norm"].astype(np.float32)[:, None]
    return y.reshape(case.expected.shape)


def residual(case, change):
    """Change the residual's signs, in blocks that are written or read."""
    fmt = case.format
    name = next((n for n in ("qjl", "qr", "signs") if n in fmt.layout.codes), None)
    names = [name] if name else [n for n in fmt.layout.codes if n.startswith("qjl")]
    kinds = fmt.codec.codes(np.zeros(1, fmt.block))
    if not names or not {"signs", "residual signs"} & set(kinds):
        return None
    unread = isinstance(fmt.codec, qvac.UnitCells) or "residual signs" in kinds
    if case.op != "quantize" and unread:
        return None
    packed = (case.expected if case.op == "quantize" else case.inputs["packed"]).copy()
    blocks = packed.reshape(-1, fmt.block_bytes).view(fmt.block)
    for name in names:
        blocks[name] = change(blocks[name])
    if case.op == "quantize":
        return packed
    return values(case, packed)


def values(case, packed, fmt=None):
    y = tbq.dequantize(packed, fmt or case.format, original=case.op == "scores").astype(np.float64)
    y = y.reshape(-1, y.shape[-1])
    if case.op == "scores":
        return (case.inputs["q"].astype(np.float64) @ y.T).astype(np.float32)
    if case.op == "weighted_sum":
        return (case.inputs["p"].astype(np.float64) @ y).astype(np.float32)
    return y.astype(np.float32)


def no_residual(case):
    """A decoder that adds nothing for the residual, as if its size were zero."""
    fmt = case.format
    sizes = [n for n in fmt.layout.scales[1:] if n.startswith(("d_qjl", "gamma", "rnorm"))]
    if case.op == "quantize" or not sizes:
        return None
    packed = case.inputs["packed"].copy()
    blocks = packed.reshape(-1, fmt.block_bytes).view(fmt.block)
    for name in sizes:
        blocks[name] = 0
    return values(case, packed)


def another_release(case):
    """What a release of the same fork, with as large blocks of the same name, does."""
    fmt = case.format
    for other in (v for f in tbq.formats() for v in f.variants()):
        if (other.dialect, other.name, other.block) != (fmt.dialect, fmt.name, fmt.block):
            continue
        alike = other.codec.content == fmt.codec.content  # but for the encoder's sums
        if fmt.sibling or alike or other.group_values != fmt.group_values:
            continue
        if case.op == "quantize":
            return tbq.quantize(case.inputs["x"], other)
        return values(case, case.inputs["packed"], other)
    return None


def lookahead(case, greedy):
    """A search that starts in state 0, or none; of 65536 states only in cases that are small."""
    codec = case.format.codec
    if case.op != "quantize" or not codec.searches:
        return None
    slow = isinstance(codec, trellis.Trellis) and not greedy
    if case.inputs["x"].size > SEARCHED * 128 and slow:
        return case.expected
    x = case.inputs["x"].reshape(-1, 128).astype(np.float64)
    blocks = case.expected.reshape(-1, codec.block_bytes).copy().view(codec.layout.dtype)
    blocks = blocks.reshape(-1)
    if isinstance(codec, tcq.TrellisCoded):
        table, register = codec.levels_of_states, codec.state_bits
        x = x @ transform(128, signs_in(turbo.S1), signs_in(turbo.S2), "right").T
    else:
        table, register = trellis.code_table(), 16
        for row, block in zip(x, blocks, strict=True):
            if codec.outliers:
                row[block["pos"]] = 0
    with np.errstate(all="ignore"):
        norm = np.sqrt((x * x).sum(axis=1))
    levels = table.astype(np.float64)
    for b in np.flatnonzero(np.isfinite(norm) & (norm > 1e-10)):
        states = np.empty(129, np.int64)
        walk(x[b] / norm[b], levels, codec.bits, register, greedy, states)
        symbols = (states[1:] >> register - codec.bits)[None].astype(np.uint8)
        level = table[states[1:]].astype(np.float64)
        scale = blocks.dtype.names[0]
        with np.errstate(all="ignore"):
            blocks[scale][b] = norm[b] / np.sqrt((level * level).sum())
        if isinstance(codec, tcq.TrellisCoded):
            prefix = np.zeros((1, register - codec.bits), np.uint8)
            bits = symbols[0][:, None] >> np.arange(codec.bits) & 1
            bits = np.concatenate([prefix, bits.reshape(1, -1).astype(np.uint8)], axis=1)
            blocks["qs"][b] = np.packbits(bits, axis=1, bitorder="little")[0]
        else:
            blocks["start"][b] = 0
            blocks["qs"][b] = pack(symbols, codec.bits)[0]
    return blocks.view(np.uint8).reshape(case.expected.shape)


@numba.njit
def walk(u, table, bits, register, greedy, states):
    """Set states (129,) to a walk from state 0: the best, or one that never looks ahead."""
    fan, groups = 1 << bits, 1 << (register - bits)
    states[0] = 0
    if greedy:
        for t in range(128):
            best = np.inf
            for e in range(fan):
                to = (states[t] >> bits) + e * groups
                if (u[t] - table[to]) ** 2 < best:
                    best, states[t + 1] = (u[t] - table[to]) ** 2, to
        return
    cost = np.empty(fan * groups)
    cost[:] = np.inf
    cost[0] = 0.0
    came = np.empty((128, groups), np.int64)
    for t in range(128):
        after = np.empty(fan * groups)
        for g in range(groups):
            best = 0
            for p in range(1, fan):
                if cost[g * fan + p] < cost[g * fan + best]:
                    best = p
            came[t, g] = g * fan + best
            for e in range(fan):
                after[e * groups + g] = cost[came[t, g]] + (u[t] - table[e * groups + g]) ** 2
        cost = after
    states[128] = cost.argmin()
    for t in range(127, -1, -1):
        states[t] = came[t, states[t + 1] % groups]


def kept_beam(case):
    """A search that keeps the eight best states of each step, from any state."""
    codec = case.format.codec
    if case.op != "quantize" or not isinstance(codec, trellis.Trellis) or codec.outliers:
        return None
    x = case.inputs["x"].reshape(-1, 128).astype(np.float64)
    table = trellis.code_table().astype(np.float64)
    blocks = case.expected.reshape(-1, codec.block_bytes).copy().view(codec.layout.dtype)
    blocks, groups = blocks.reshape(-1), 1 << (16 - codec.bits)
    for b in range(len(x)):
        norm = np.sqrt((x[b] * x[b]).sum())
        if not 1e-10 < norm < np.inf or b >= SEARCHED:
            continue
        nearest = np.argsort(np.abs(table - x[b][0] / norm))[:8]
        beam = [((x[b][0] / norm - table[s]) ** 2, int(s), ((), int(s))) for s in nearest]
        for value in x[b][1:] / norm:
            tried = {}
            for cost, s, path in beam:
                for e in range(1 << codec.bits):
                    to = (s >> codec.bits) + e * groups
                    total = cost + (value - table[to]) ** 2
                    if total < tried.get(to, (np.inf,))[0]:
                        tried[to] = (total, to, (path, to))
            beam = sorted(tried.values(), key=lambda entry: entry[0])[:8]
        path, states = beam[0][2], []
        while path:
            path, state = path
            states.append(state)
        states = np.array(states[::-1])
        level = table[states]
        blocks["d"][b] = norm / np.sqrt((level * level).sum())
        blocks["start"][b] = states[0] << codec.bits & 0xFFFF
        symbols = (states >> 16 - codec.bits).astype(np.uint8)
        blocks["qs"][b] = pack(symbols[None], codec.bits)[0]
    return blocks.view(np.uint8).reshape(case.expected.shape)


BROKEN = {
    "not rotated": rotated("none"),
    "rotated with the transpose": rotated("transpose"),
    "rotated in halves": rotated("halves"),
    "sign vectors swapped": rotated("swapped"),
    "sign diagonal missing": rotated("no first"),
    "another codebook": other_cells,
    "norm not corrected": uncorrected,
    "norm corrected": corrected,
    "transform scaled otherwise": without_constant,
    "only some lanes read": lanes,
    "another 1/sqrt(128)": other_root,
    "residual signs ignored": lambda case: residual(case, np.zeros_like),
    "residual signs negated": lambda case: residual(case, np.invert),
    "residual left out": no_residual,
    "greedy instead of a search": lambda case: lookahead(case, True),
    "walk from one state": lambda case: lookahead(case, False),
    "not the best walk": kept_beam,
    "as another release does it": another_release,
    "sign diagonal missing / the second": rotated("no second"),
    "sign diagonal missing / both": rotated("no signs"),
    "parts of values far apart": rotated("apart"),
    "multiplied from the right": rotated("mirrored"),
}
