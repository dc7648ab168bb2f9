"""Kernels with one bug each, written from the specification and not from the diagnosis.

They compute in float64 and sum as NumPy likes, as a kernel on another machine would, so that even
`right` differs from the C code by rounding.
"""

import numpy as np

import tbq
from tbq import rotations
from tbq.bitpack import pack, unpack
from tbq.families import ktq, pr21089, trellis, vtq
from tools.vector_set import Case


def is_trellis(fmt):
    return "start" in fmt.block.names


def is_tbq(fmt):
    return fmt.dialect == "pr21089"


def has_signs(fmt):
    return "sb" in fmt.block.names


def width(fmt):
    if is_trellis(fmt):
        return trellis.emission_bits(fmt)
    return pr21089.code_bits(fmt) if is_tbq(fmt) else ktq.code_bits(fmt)


def table_of(fmt):
    if is_tbq(fmt):
        return pr21089.CODEBOOKS[width(fmt)]
    return (ktq if has_signs(fmt) else vtq).CODEBOOKS[width(fmt)]


def hadamard32(x):
    from scipy.linalg import hadamard

    return x @ hadamard(32) / np.sqrt(32)


def signs_at(index):
    return np.where(ktq.sign_bits(ktq.block_seed(index)) == 1, 1.0, -1.0)


def rotate(fmt, x, signs, how):
    """Rotate blocks (n, values) into the domain of the codes."""
    if is_tbq(fmt):
        q = rotations.qr_rotation().astype(np.float64)
        halves = x.reshape(-1, 128)
        turned = {"right": halves @ q.T, "none": halves, "transpose": halves @ q}[how]
        return turned.reshape(x.shape)
    if not has_signs(fmt):
        return x
    return {
        "right": lambda: hadamard32(x * signs),
        "none": lambda: x,
        "no signs": lambda: hadamard32(x),
        "wrong side": lambda: hadamard32(x) * signs,
    }[how]()


def unrotate(fmt, r, signs, how):
    if is_tbq(fmt):
        q = rotations.qr_rotation().astype(np.float64)
        halves = r.reshape(-1, 128)
        return {"right": halves @ q, "none": halves, "transpose": halves @ q.T}[how].reshape(
            r.shape
        )
    if not has_signs(fmt):
        return r
    return {
        "right": lambda: hadamard32(r) * signs,
        "none": lambda: r,
        "no signs": lambda: hadamard32(r),
        "wrong side": lambda: hadamard32(r * signs),
    }[how]()


def choose(fmt, v, table, unit, ties_up=None, rng=None):
    """Return the code of each coordinate: nearest, with the tie rule of the format or the other."""
    if vtq.is_mixed(fmt):
        codes = np.empty(v.shape, np.uint8)
        codes[:, vtq.FINE] = choose_from(v[:, vtq.FINE], vtq.CODEBOOKS[3] * unit, ties_up or False)
        codes[:, vtq.COARSE] = choose_from(
            v[:, vtq.COARSE], vtq.CODEBOOKS[2] * unit, ties_up or False
        )
        return codes
    up = is_tbq(fmt) or (len(table) == 2 and fmt.dialect != "llama-tq-cuda")
    up = up if ties_up is None else up != ties_up
    edges = None
    if is_tbq(fmt) and np.array_equal(table, table_of(fmt)):
        edges = pr21089.BOUNDARIES[width(fmt)].astype(np.float64)
    return choose_from(v, table * unit, up, edges, rng)


def choose_from(v, levels, ties_up, edges=None, rng=None):
    levels = levels.astype(np.float64)
    edges_given = edges is not None  # pr21089: NaN gets the last code, elsewhere the first
    edges = (levels[1:] + levels[:-1]) / 2 if edges is None else edges
    codes = np.searchsorted(
        edges,
        np.nan_to_num(v, nan=np.inf if edges_given else -np.inf),
        side="right" if ties_up else "left",
    )
    if rng is not None:  # to the farther neighbour with the probability of a dithered rounding
        below = np.clip(np.searchsorted(levels, v) - 1, 0, len(levels) - 2)
        fraction = (v - levels[below]) / (levels[below + 1] - levels[below])
        codes = below + (rng.random(v.shape) < np.clip(fraction, 0, 1))
    return codes.astype(np.uint8)


def encode(
    case: Case,
    *,
    rotation="right",
    index=None,
    table=None,
    other_ties=False,
    correct=True,
    rng=None,
    x=None,
):
    fmt = case.format
    x = case.inputs["x"] if x is None else x
    flat = x.reshape(-1, fmt.block_values).astype(np.float64)
    if index is None:
        index = fmt.block_indices(x.size // x.shape[-1], x.shape[-1] // fmt.block_values)
    signs = signs_at(index) if has_signs(fmt) else None
    own = table_of(fmt) if table is None else table
    with np.errstate(all="ignore"):
        # as float32 sums: they overflow, and what underflows is gone
        norm = np.sqrt((flat.astype(np.float32) ** 2).sum(axis=1, dtype=np.float64)).astype(
            np.float32
        )
        norm = np.where((flat**2).sum(axis=1) > 3.4e38, np.float32(np.inf), norm).astype(np.float64)
        v = rotate(fmt, flat / np.maximum(norm, 1e-38)[:, None], signs, rotation)
        if is_tbq(fmt):
            norm = np.where(norm < 1e-10, 1e-10, norm)
            v = rotate(fmt, flat / norm[:, None], signs, rotation) * 16
        unit = 1.0 if is_tbq(fmt) else 1 / np.sqrt(32)
        codes = choose(fmt, v, own, unit, other_ties or None, rng)
        if vtq.is_mixed(fmt):
            levels = np.where(
                np.arange(32) % 4 == 0, vtq.CODEBOOKS[3][codes], vtq.CODEBOOKS[2][codes & 3]
            )
        else:
            levels = own[codes]
        d = norm
        if not is_tbq(fmt) and correct:
            d = norm / np.sqrt(((levels * unit) ** 2).sum(axis=1))
        blocks = np.zeros(len(flat), fmt.block)
        live = is_tbq(fmt) | ~(norm < 1e-30)
        d = np.where(live, d, norm)
        blocks["d"] = d.astype(np.float32).astype(np.float16)
    packed = vtq.pack_mixed(codes) if vtq.is_mixed(fmt) else pack(codes, width(fmt))
    blocks["qs"][live] = packed[live]
    if has_signs(fmt):
        blocks["sb"][live] = pack((signs > 0).astype(np.uint8), 1)[live]
    return blocks.view(np.uint8).reshape(case.expected.shape)


def decode(
    case: Case, *, rotation="right", table=None, codes=None, d=None, signs=None, packed=None
):
    """Return decoded rows (rows, n) of a format that is no trellis."""
    fmt = case.format
    packed = case.inputs["packed"] if packed is None else packed
    blocks = np.ascontiguousarray(packed).view(fmt.block).reshape(-1)
    if codes is None:
        codes = (
            vtq.unpack_mixed(blocks["qs"])
            if vtq.is_mixed(fmt)
            else unpack(blocks["qs"], width(fmt))
        )
    if signs is None and has_signs(fmt):
        signs = np.where(unpack(blocks["sb"], 1) == ktq.plus_bit(fmt), 1.0, -1.0)
    unit = 1 / 16 if is_tbq(fmt) else 1 / np.sqrt(32)
    if vtq.is_mixed(fmt):
        levels = np.where(
            np.arange(32) % 4 == 0, vtq.CODEBOOKS[3][codes], vtq.CODEBOOKS[2][codes & 3]
        )
    else:
        levels = (table_of(fmt) if table is None else table)[codes]
    d = blocks["d"].astype(np.float64) if d is None else d
    with np.errstate(all="ignore"):
        if not is_tbq(fmt):
            d = np.where(d < 1e-30, 0, d)
        y = unrotate(fmt, levels * unit, signs, rotation) * d[:, None]
        if not is_tbq(fmt):
            y[d == 0] = 0
        return y.astype(np.float32).reshape(len(packed.reshape(-1, packed.shape[-1])), -1)


def with_blocks(packed, fmt, change):
    """Return packed rows in which `change` edited the blocks."""
    out = packed.copy()
    change(out.view(fmt.block).reshape(-1))
    return out


def raw(packed, fmt):
    return packed.reshape(-1, fmt.block_bytes)


def swap_nibbles(packed, fmt):
    def change(blocks):
        blocks["qs"] = blocks["qs"] >> 4 | blocks["qs"] << 4

    return with_blocks(packed, fmt, change)


REVERSED = np.array([int(f"{b:08b}"[::-1], 2) for b in range(256)], np.uint8)


def reverse_bits(packed, fmt):
    def change(blocks):
        blocks["qs"] = REVERSED[blocks["qs"]]

    return with_blocks(packed, fmt, change)


def shift_codes(packed, fmt):
    def change(blocks):
        if vtq.is_mixed(fmt):
            codes = vtq.unpack_mixed(blocks["qs"])
            top = np.where(np.arange(32) % 4 == 0, 7, 3)
            blocks["qs"] = vtq.pack_mixed(np.minimum(codes + 1, top).astype(np.uint8))
        else:
            codes = unpack(blocks["qs"], width(fmt))
            blocks["qs"] = pack(
                np.minimum(codes + 1, (1 << width(fmt)) - 1).astype(np.uint8), width(fmt)
            )

    return with_blocks(packed, fmt, change)


def other_order(packed, fmt, written):
    """Blocks with the scale at the other end, as they would be written, or read."""
    at_end = fmt.block.fields["d"][1] > 0
    forward = 2 if at_end == written else -2
    return np.roll(raw(packed, fmt), forward, axis=1).reshape(packed.shape)


def rows_of(case, y):
    """Turn decoded rows into the output of the case's operation."""
    if case.op == "scores":
        return (case.inputs["q"].astype(np.float64) @ y.astype(np.float64).T).astype(np.float32)
    if case.op == "weighted_sum":
        return (case.inputs["p"].astype(np.float64) @ y.astype(np.float64)).astype(np.float32)
    return y.reshape(case.expected.shape)


def decoded(case, packed=None, **bugs):
    """Decode with bugs; of trellis formats and borrowed codes only the bytes can be wrong."""
    fmt = case.format
    packed = case.inputs["packed"] if packed is None else packed
    if fmt.sibling:
        return rows_of(case, tbq.dequantize_paired(packed, case.inputs["sibling"]))
    if is_trellis(fmt):
        return rows_of(case, tbq.dequantize(packed, fmt))
    return rows_of(case, decode(case, packed=packed, **bugs))


def strided(flat, rows, row, stride):
    return np.stack([flat[min(r * stride, flat.size - row) :][:row] for r in range(rows)])


# --- one function per bug; each returns the output, or None where the bug cannot occur ---


def right(case):
    if case.op != "quantize":
        return decoded(case)
    if is_trellis(case.format) or case.format.sibling or case.format.dialect == "llama-tq-cuda":
        return case.expected
    return encode(case)


def negated(case):
    if case.op == "rotation" or case.op != "quantize":
        return -case.expected
    if case.format.sibling or (has_signs(case.format) and case.format.dialect == "llama-tq-cuda"):
        return None  # scales do not change; codes are drawn at random
    return tbq.quantize(-case.inputs["x"], case.format)


def scaled(case):
    if case.op != "quantize":
        return case.expected * np.float32(np.sqrt(32))

    def change(blocks):
        with np.errstate(all="ignore"):
            blocks["d"] = (blocks["d"].astype(np.float32) / np.float32(np.sqrt(32))).astype(
                np.float16
            )

    return with_blocks(case.expected, case.format, change)


def rotated_wrongly(how):
    def kernel(case):
        fmt = case.format
        if fmt.sibling or not (is_tbq(fmt) or has_signs(fmt)):
            return None
        if how == "transpose" and not is_tbq(fmt) or "sign" in how and not has_signs(fmt):
            return None
        if how == "wrong side" and not has_signs(fmt):
            return None
        if case.op != "quantize":
            return decoded(case, rotation=how)
        return None if fmt.dialect == "llama-tq-cuda" else encode(case, rotation=how)

    return kernel


def on_bytes(change, formats=lambda fmt: True):
    def kernel(case):
        fmt = case.format
        if "qs" not in fmt.block.names or not formats(fmt):
            return None
        if case.op == "quantize":
            return change(case.expected, fmt)
        return decoded(case, change(case.inputs["packed"], fmt))

    return kernel


def wrong_table(case):
    fmt = case.format
    if fmt.sibling or is_trellis(fmt) or vtq.is_mixed(fmt) or width(fmt) == 1:
        return None
    own = table_of(fmt)
    others = [ktq.CODEBOOKS, vtq.CODEBOOKS, pr21089.CODEBOOKS]
    tables = [t[width(fmt)] for t in others if width(fmt) in t]
    table = max(tables, key=lambda t: np.abs(t - own).max())
    if np.abs(table - own).max() < 0.01:
        return None  # the same numbers to three digits
    if case.op != "quantize":
        return decoded(case, table=table)
    if fmt.dialect == "llama-tq-cuda" and has_signs(fmt):
        return None
    return encode(case, table=table)


def other_tie(case):
    fmt = case.format
    if case.op != "quantize" or fmt.sibling or is_trellis(fmt):
        return None
    if fmt.dialect == "llama-tq-cuda" and has_signs(fmt):
        return None
    return encode(case, other_ties=True)


def field_order(case):
    fmt = case.format
    if case.op == "quantize":
        return other_order(case.expected, fmt, written=True)
    if "pos" in fmt.block.names:
        return None  # positions beyond the block: the C code would write out of bounds
    return decoded(case, other_order(case.inputs["packed"], fmt, written=False))


def bfloat16(case):
    fmt = case.format
    if case.op == "quantize":

        def change(blocks):
            wide = blocks["d"].astype("<f4").view("<u4")
            blocks["d"] = ((wide + 0x8000) >> 16).astype("<u2").view("<f2")

        return with_blocks(case.expected, fmt, change)
    if fmt.sibling or is_trellis(fmt):
        return None
    bits = case.inputs["packed"].view(fmt.block)["d"].view("<u2").astype("<u4") << 16
    return decoded(case, d=bits.view("<f4").astype(np.float64).reshape(-1))


def scale_elsewhere(case):
    fmt = case.format
    if case.op == "quantize" or fmt.sibling:
        return None
    at = fmt.block.fields["d"][1]
    offset = 4 if fmt.block_bytes > 8 else 3
    moved = case.inputs["packed"].copy()
    raw(moved, fmt)[:, at : at + 2] = raw(case.inputs["packed"], fmt)[:, offset : offset + 2]
    return decoded(case, moved)


def flat_index(case):
    fmt = case.format
    if not has_signs(fmt):
        return None
    if case.op == "quantize":
        n = case.expected.size // fmt.block_bytes
        if fmt.block_index == "row":
            return encode(case, index=np.arange(n))
        rows = [
            tbq.quantize(row, fmt)
            for row in case.inputs["x"].reshape(-1, case.inputs["x"].shape[-1])
        ]
        return np.stack(rows).reshape(case.expected.shape)
    n = case.inputs["packed"].size // fmt.block_bytes
    rows = case.inputs["packed"].size // case.inputs["packed"].shape[-1]
    index = np.arange(n) if fmt.block_index == "row" else np.arange(n) % (n // rows)
    sign = 1 if ktq.plus_bit(fmt) else -1
    return decoded(case, signs=signs_at(index) * sign)


def some_lanes(case):
    if case.op == "scores":
        return None  # one value per key: no lanes
    if case.op != "quantize":
        out = case.expected.reshape(-1, 8).copy()
        out[:, 4:] = 0
        return out.reshape(case.expected.shape)
    fmt = case.format
    if "qs" not in fmt.block.names or vtq.is_mixed(fmt):
        return None

    def change(blocks):
        codes = unpack(blocks["qs"], width(fmt)).reshape(len(blocks), -1, 8)
        codes[:, :, 4:] = 0
        blocks["qs"] = pack(codes.reshape(len(blocks), -1), width(fmt))

    return with_blocks(case.expected, fmt, change)


def stale_tail(case):
    """The last block of every row is not written, where a row has several."""
    if case.op in ("scores", "rotation"):
        return None
    unit = case.format.block_bytes if case.op == "quantize" else case.format.block_values
    out = case.expected.copy()
    rows = out.reshape(-1, out.shape[-1])
    if rows.shape[1] > unit:
        rows[:, -unit:] = 0xAA if case.op == "quantize" else np.float32(1e3)
    return out


def stochastic(case):
    fmt = case.format
    if case.op != "quantize" or fmt.sibling or is_trellis(fmt) or vtq.is_mixed(fmt):
        return None
    if fmt.dialect == "llama-tq-cuda" or width(fmt) == 1:
        return None
    return encode(case, rng=np.random.default_rng(5))


def float16(case):
    if case.op == "quantize":
        if case.format.sibling or case.format.dialect == "llama-tq-cuda":
            return None
        with np.errstate(all="ignore"):
            x = case.inputs["x"].astype(np.float16).astype(np.float32)
        return tbq.quantize(x, case.format)
    with np.errstate(all="ignore"):
        return case.expected.astype(np.float16).astype(np.float32)


def row_stride(case):
    fmt = case.format
    if fmt.sibling:
        return None
    source = case.inputs["x" if case.op == "quantize" else "packed"]
    row = source.shape[-1]
    unit = fmt.block_values if case.op == "quantize" else fmt.block_bytes
    if source.size == row:
        return case.expected
    moved = strided(source.reshape(-1), source.size // row, row, row - unit)
    if case.op == "quantize":
        return (
            None
            if fmt.dialect == "llama-tq-cuda"
            else tbq.quantize(moved.reshape(source.shape), fmt)
        )
    return rows_of(case, tbq.dequantize(moved, fmt))


def uncorrected(case):
    fmt = case.format
    if case.op != "quantize" or fmt.sibling or is_tbq(fmt) or is_trellis(fmt):
        return None
    if fmt.dialect == "llama-tq-cuda" and has_signs(fmt):
        return None
    return encode(case, correct=False)


def no_outliers(case):
    fmt = case.format
    if "pos" not in fmt.block.names or case.op == "quantize":
        return None
    walk = trellis.code_table()[
        trellis.walk(fmt, case.inputs["packed"].view(fmt.block).reshape(-1))
    ]
    d = case.inputs["packed"].view(fmt.block).reshape(-1)["d"].astype(np.float32)
    with np.errstate(all="ignore"):
        y = np.where(d[:, None] == 0, np.float32(0), walk * d[:, None])
    return rows_of(
        case, y.reshape(len(case.inputs["packed"].reshape(-1, case.inputs["packed"].shape[-1])), -1)
    )


BROKEN = {
    "negated": negated,
    "scaled by a constant": scaled,
    "not rotated": rotated_wrongly("none"),
    "rotated with the transpose": rotated_wrongly("transpose"),
    "sign diagonal missing": rotated_wrongly("no signs"),
    "sign diagonal on the wrong side": rotated_wrongly("wrong side"),
    "nibbles swapped": on_bytes(swap_nibbles, lambda fmt: width(fmt) == 4),
    "bit order reversed": on_bytes(reverse_bits),
    "codes off by one": on_bytes(shift_codes),
    "another codebook": wrong_table,
    "another tie rule": other_tie,
    "fields in another order": field_order,
    "scale as bfloat16": bfloat16,
    "scale read elsewhere": scale_elsewhere,
    "another block index": flat_index,
    "only some lanes written": some_lanes,
    "stale or unwritten tail": stale_tail,
    "stochastic instead of nearest": stochastic,
    "float16 intermediate": float16,
    "wrong row stride": row_stride,
    "norm not corrected": uncorrected,
    "outliers left out": no_outliers,
}
