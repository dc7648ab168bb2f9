"""Kernels with one bug each, written from the specification and not from the diagnosis.

They compute in float64 and sum as NumPy likes, as a kernel on another machine would, so that even
`right` differs from the C code by rounding. A name is a bug's; what follows " / " tells two kernels
with one bug apart.
"""

import broken_rotated
import numpy as np

import tbq
from tbq.bitpack import pack, unpack
from tbq.families import dense, ktq, pr21089, trellis, vtq
from tbq.vectors import Case


def is_trellis(fmt):
    return isinstance(fmt.codec, trellis.Trellis)


def is_tbq(fmt):
    return isinstance(fmt.codec, pr21089.DenseRotated)


def has_signs(fmt):
    return isinstance(fmt.codec, ktq.SignedBlocks)


def is_mixed(fmt):
    return isinstance(fmt.codec, vtq.MixedBlocks)


def is_written_out(fmt):
    """Whether the arithmetic is below; of other formats only bytes and values can be wrong."""
    return is_tbq(fmt) or has_signs(fmt) or is_mixed(fmt) or isinstance(fmt.codec, vtq.PlainBlocks)


def is_known(fmt):
    """Whether the fields of the block are those below."""
    return is_written_out(fmt) or is_trellis(fmt) or isinstance(fmt.codec, ktq.BorrowedCodes)


def on_cuda(fmt):
    return fmt.dialect == "llama-tq-cuda"


def width(fmt):
    return 3 if is_mixed(fmt) else fmt.codec.bits


def table_of(fmt):
    if is_tbq(fmt):
        return pr21089.CODEBOOKS[width(fmt)]
    return (ktq if has_signs(fmt) else vtq).CODEBOOKS[width(fmt)]


def hadamard32(x):
    from scipy.linalg import hadamard

    return x @ hadamard(32) / np.sqrt(32)


def hadamard16(x):
    from scipy.linalg import hadamard

    return (x.reshape(len(x), 2, 16) @ hadamard(16)).reshape(x.shape) / 4


FIRST_HALF = np.arange(32) < 16


def signs_at(index):
    return np.where(ktq.sign_bits(ktq.block_seed(index)) == 1, 1.0, -1.0)


def rotate(fmt, x, signs, how):
    """Rotate blocks (n, values) into the domain of the codes."""
    if is_tbq(fmt):
        q = dense.qr_rotation().astype(np.float64)
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
        "sixteen": lambda: hadamard16(x * signs),
        "half read": lambda: hadamard32(x * signs * FIRST_HALF),
    }[how]()


def unrotate(fmt, r, signs, how):
    if is_tbq(fmt):
        q = dense.qr_rotation().astype(np.float64)
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
        "sixteen": lambda: hadamard16(r) * signs,
        "half read": lambda: hadamard32(r * FIRST_HALF) * signs,
    }[how]()


def choose(fmt, v, table, unit, ties_up=None, rng=None):
    """Return the code of each coordinate: nearest, with the tie rule of the format or the other."""
    if is_mixed(fmt):
        codes = np.empty(v.shape, np.uint8)
        codes[:, vtq.FINE] = choose_from(v[:, vtq.FINE], vtq.CODEBOOKS[3] * unit, ties_up or False)
        codes[:, vtq.COARSE] = choose_from(v[:, vtq.COARSE], coarse(table) * unit, ties_up or False)
        return codes
    up = is_tbq(fmt) or (len(table) == 2 and not on_cuda(fmt))
    up = up if ties_up is None else up != ties_up
    edges = None
    if is_tbq(fmt) and np.array_equal(table, table_of(fmt)):
        edges = pr21089.BOUNDARIES[width(fmt)].astype(np.float64)
    return choose_from(v, table * unit, up, edges, rng)


def coarse(table):
    """Return the 2-bit table of vtq_mixed, or the one that a wrong kernel has in its place."""
    return table if len(table) == 4 else vtq.CODEBOOKS[2]


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
        index = fmt.codec.indices(x.size // x.shape[-1], x.shape[-1] // fmt.block_values)
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
        if is_mixed(fmt):
            levels = np.where(
                np.arange(32) % 4 == 0, vtq.CODEBOOKS[3][codes], coarse(own)[codes & 3]
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
    packed = vtq.pack_mixed(codes) if is_mixed(fmt) else pack(codes, width(fmt))
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
            vtq.unpack_mixed(blocks["qs"]) if is_mixed(fmt) else unpack(blocks["qs"], width(fmt))
        )
    if signs is None and has_signs(fmt):
        signs = np.where(unpack(blocks["sb"], 1) == fmt.codec.plus_bit, 1.0, -1.0)
    unit = 1 / 16 if is_tbq(fmt) else 1 / np.sqrt(32)
    if is_mixed(fmt):
        levels = np.where(
            np.arange(32) % 4 == 0,
            vtq.CODEBOOKS[3][codes],
            coarse(table_of(fmt) if table is None else table)[codes & 3],
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
    blocks = fmt.codec.blocks(packed.reshape(-1, packed.shape[-1])).copy()
    flat = blocks.reshape(-1)
    change(flat)
    return fmt.codec.rows(flat.reshape(blocks.shape)).reshape(packed.shape)


def raw(packed, fmt):
    return packed.reshape(-1, fmt.block_bytes)


def swap_nibbles(packed, fmt):
    return with_blocks(
        packed, fmt, lambda blocks: edit_codes(blocks, fmt, lambda b: b >> 4 | b << 4)
    )


def edit_codes(blocks, fmt, change):
    for name in fmt.layout.codes:
        blocks[name] = change(blocks[name])


REVERSED = np.array([int(f"{b:08b}"[::-1], 2) for b in range(256)], np.uint8)


def reverse_bits(packed, fmt):
    return with_blocks(packed, fmt, lambda blocks: edit_codes(blocks, fmt, lambda b: REVERSED[b]))


def shift_codes(packed, fmt):
    def change(blocks):
        if is_mixed(fmt):
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
    """Decode with bugs; of formats that are not written out only the bytes can be wrong."""
    fmt = case.format
    packed = case.inputs["packed"] if packed is None else packed
    if fmt.sibling:
        return rows_of(case, tbq.dequantize_paired(packed, case.inputs["sibling"]))
    if not is_written_out(fmt):
        return rows_of(case, tbq.dequantize(packed, fmt, original=case.op == "scores"))
    return rows_of(case, decode(case, packed=packed, **bugs))


def strided(flat, rows, row, stride):
    return np.stack([flat[min(r * stride, flat.size - row) :][:row] for r in range(rows)])


# --- one function per bug; each returns the output, or None where the bug cannot occur ---


def right(case):
    if case.op != "quantize":
        return decoded(case)
    if not is_written_out(case.format) or on_cuda(case.format):
        return case.expected
    return encode(case)


def negated(case):
    if case.op == "rotation" or case.op != "quantize":
        return -case.expected
    if case.format.sibling or (has_signs(case.format) and on_cuda(case.format)):
        return None  # scales do not change; codes are drawn at random
    if not is_written_out(case.format) and not is_trellis(case.format):
        return None  # what is encoded may be symmetric
    return tbq.quantize(-case.inputs["x"], case.format)


def scaled(case):
    if case.op != "quantize":
        return case.expected * np.float32(np.sqrt(32))
    if not case.format.layout.scales:
        return None  # there is nothing that could be multiplied

    def change(blocks):
        for name in case.format.layout.scales:
            with np.errstate(all="ignore"):
                d = blocks[name].astype(np.float32) / np.float32(np.sqrt(32))
                blocks[name] = d.astype(np.float16)

    return with_blocks(case.expected, case.format, change)


def rotated_wrongly(how):
    def kernel(case):
        fmt = case.format
        if not (is_tbq(fmt) or has_signs(fmt)):
            return None
        if how == "transpose" and not is_tbq(fmt) or "sign" in how and not has_signs(fmt):
            return None
        if how in ("wrong side", "sixteen") and not has_signs(fmt):
            return None
        if case.op != "quantize":
            return decoded(case, rotation=how)
        return None if on_cuda(fmt) else encode(case, rotation=how)

    return kernel


def on_bytes(change, formats=lambda fmt: True):
    def kernel(case):
        fmt = case.format
        if not fmt.layout.codes or not formats(fmt):
            return None
        if case.op == "quantize":
            return change(case.expected, fmt)
        return decoded(case, change(case.inputs["packed"], fmt))

    return kernel


def wrong_table(case):
    fmt = case.format
    if not is_written_out(fmt) or width(fmt) == 1:
        return None
    if is_mixed(fmt):
        table = ktq.CODEBOOKS[2]
        return decoded(case, table=table) if case.op != "quantize" else encode(case, table=table)
    own = table_of(fmt)
    others = [ktq.CODEBOOKS, vtq.CODEBOOKS, pr21089.CODEBOOKS]
    tables = [t[width(fmt)] for t in others if width(fmt) in t]
    table = max(tables, key=lambda t: np.abs(t - own).max())
    if np.abs(table - own).max() < 0.01:
        return None  # the same numbers to three digits
    if case.op != "quantize":
        return decoded(case, table=table)
    if on_cuda(fmt) and has_signs(fmt):
        return None
    return encode(case, table=table)


def other_tie(case):
    fmt = case.format
    if case.op != "quantize" or not is_written_out(fmt):
        return None
    if on_cuda(fmt) and has_signs(fmt):
        return None
    return encode(case, other_ties=True)


def field_order(case):
    fmt = case.format
    if not is_known(fmt):
        return None
    if case.op == "quantize":
        return other_order(case.expected, fmt, written=True)
    if fmt.layout.outliers:
        return None  # positions beyond the block: the C code would write out of bounds
    return decoded(case, other_order(case.inputs["packed"], fmt, written=False))


def bfloat16(case):
    fmt = case.format
    if not is_known(fmt):
        return None
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
    if case.op == "quantize" or fmt.sibling or not is_known(fmt):
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
        if fmt.codec.position == "row":
            return encode(case, index=np.arange(n))
        rows = [
            tbq.quantize(row, fmt)
            for row in case.inputs["x"].reshape(-1, case.inputs["x"].shape[-1])
        ]
        return np.stack(rows).reshape(case.expected.shape)
    n = case.inputs["packed"].size // fmt.block_bytes
    rows = case.inputs["packed"].size // case.inputs["packed"].shape[-1]
    index = np.arange(n) if fmt.codec.position == "row" else np.arange(n) % (n // rows)
    sign = 1 if fmt.codec.plus_bit else -1
    return decoded(case, signs=signs_at(index) * sign)


def some_lanes(case):
    if case.op == "scores":
        return None  # one value per key: no lanes
    if case.op != "quantize":
        out = case.expected.reshape(-1, 8).copy()
        out[:, 4:] = 0
        return out.reshape(case.expected.shape)
    fmt = case.format
    if not is_known(fmt) or fmt.sibling or is_mixed(fmt):
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
    codec = case.format.codec
    unit = codec.group_blocks * codec.block_bytes if case.op == "quantize" else codec.group_values
    unit *= max(1, 32 // codec.group_values)  # values that stand for themselves: as if in blocks
    out = case.expected.copy()
    rows = out.reshape(-1, out.shape[-1])
    if rows.shape[1] > unit:
        rows[:, -unit:] = 0xAA if case.op == "quantize" else np.float32(1e3)
    return out


def stochastic(case):
    fmt = case.format
    if case.op != "quantize" or not is_written_out(fmt) or is_mixed(fmt):
        return None
    if on_cuda(fmt) or width(fmt) == 1:
        return None
    return encode(case, rng=np.random.default_rng(5))


def float16(case):
    if case.op == "quantize":
        if case.format.sibling or on_cuda(case.format):
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
    group_bytes = fmt.codec.group_blocks * fmt.block_bytes
    unit = fmt.group_values if case.op == "quantize" else group_bytes
    if source.size == row:
        return case.expected
    moved = strided(source.reshape(-1), source.size // row, row, row - unit)
    if case.op == "quantize":
        return None if on_cuda(fmt) else tbq.quantize(moved.reshape(source.shape), fmt)
    return rows_of(case, tbq.dequantize(moved, fmt, original=case.op == "scores"))


def uncorrected(case):
    fmt = case.format
    if case.op != "quantize" or not is_written_out(fmt) or is_tbq(fmt):
        return None
    if on_cuda(fmt) and has_signs(fmt):
        return None
    return encode(case, correct=False)


def half_read(case):
    """Half of a block's lanes are left out, the norm's among them."""
    fmt = case.format
    if case.op == "quantize" and is_written_out(fmt) and not is_tbq(fmt) and not on_cuda(fmt):
        x = np.where(FIRST_HALF, case.inputs["x"].reshape(-1, 32), np.float32(0))
        return encode(case, x=x.reshape(case.inputs["x"].shape))
    if case.op == "quantize" or not has_signs(fmt):
        return None
    return decoded(case, rotation="half read")


def no_outliers(case):
    fmt = case.format
    if not is_trellis(fmt) or not fmt.codec.outliers or case.op == "quantize":
        return None
    blocks = case.inputs["packed"].view(fmt.block).reshape(-1)
    walk = trellis.code_table()[fmt.codec.walk(blocks)]
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
    "nibbles swapped": on_bytes(swap_nibbles, lambda fmt: is_known(fmt) and width(fmt) == 4),
    "bit order reversed": on_bytes(reverse_bits),
    "codes off by one": on_bytes(shift_codes, is_known),
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
    "rotated in halves": rotated_wrongly("sixteen"),
    "only some lanes read": half_read,
}


def either(kernel, other):
    """Return a kernel that is one of two, whichever knows a case's format."""

    def first(case):
        output = kernel(case)
        return other(case) if output is None else output

    return first


for _bug, _kernel in broken_rotated.BROKEN.items():
    BROKEN[_bug] = either(BROKEN[_bug], _kernel) if _bug in BROKEN else _kernel
