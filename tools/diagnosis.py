"""Which bug explains a wrong output: hypotheses, each of which predicts what its bug would write.

A hypothesis takes a case and yields predictions of the whole output, or looks at the output itself
where the bug leaves its shape and not its values (lanes, tails, constants). What it is worth is the
share of the relevant groups (blocks, rows or heads that are wrong, or that it would make wrong) in
which the output is what it predicts. All cases of a format and operation are judged together.

Wrong encoders are right encoders of other input wherever that can be: to leave out the rotation T
is to encode T'(x). So every hypothesis is tried with the exact codec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

import tbq
from tbq import Format, TbqError
from tbq.families import ktq, pr21089, vtq
from tbq.numerics import fp16_bits, fwht

from .code_bits import bit_layout, code_counts, code_width, codes_of, with_codes
from .vector_compare import Comparison, decode, group_nmse, groups
from .vector_set import Case, block_index

# A prediction of floats agrees with a group if the error is no larger than this.
SAME = 1e-6
# A prediction of blocks agrees if nearly all codes do (rounding flips a few) and the scale does.
SAME_CODES = 0.93
SAME_SCALE = 0.02
SMALLEST_STEP = 2.0**-23  # two units of a subnormal float16
# An explanation that covers less than this is not worth printing.
WORTH = 0.5
# A coordinate so close to a boundary is on it, but for rounding.
TIE = 1e-6
# The bug changes nothing but ties; so few other codes may differ among them, by rounding.
TIES_AMONG_OTHERS = 0.05
# A row that is right for less than this share has no tail, it is wrong.
LEAST_RIGHT = 0.125
LANE_PERIODS = (2, 4, 8, 16, 32, 64)
FLOAT16_ERRORS = (1e-10, 3e-6)

Prediction = tuple[str, np.ndarray]


@dataclass(frozen=True)
class Diagnosis:
    """A bug, what is known of it, and the share of the evidence that it explains."""

    bug: str
    detail: str
    explained: float

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.bug}{detail}: explains {self.explained:.0%}"


def diagnose(evidence: Sequence[Comparison]) -> list[Diagnosis]:
    """Return the bugs that explain the outputs of one format and operation, the best first."""
    found = [d for bug, predict in _PREDICTED for d in _judge(bug, predict, evidence)]
    for bug, observe in _OBSERVED:
        found += [Diagnosis(bug, detail, share) for detail, share in observe(evidence)]
    best: dict[str, Diagnosis] = {}
    for d in sorted(found, key=lambda d: (-round(d.explained, 2), BUGS.index(d.bug))):
        if d.explained >= WORTH:
            best.setdefault(d.bug, d)
    return list(best.values())


def _judge(bug: str, predict: Predict, evidence: Sequence[Comparison]) -> Iterator[Diagnosis]:
    agreeing: dict[str, np.ndarray] = {}
    for c in evidence:
        for detail, predicted in _predictions(predict, c.case):
            if predicted.shape == c.case.expected.shape:
                counts = agreeing.setdefault(detail, np.zeros(2))
                counts += _agreement(c, predicted)
    for detail, (agree, relevant) in agreeing.items():
        if relevant:
            yield Diagnosis(bug, detail, agree / relevant)


@lru_cache(maxsize=1 << 14)
def _predictions(predict: Predict, case: Case) -> list[Prediction]:
    """Return what a bug would write for a case; kept, as it does not depend on the output."""
    try:
        with np.errstate(all="ignore"):
            return list(predict(case))
    except TbqError:
        return []  # what the bug would read does not decode


# --- agreement -----------------------------------------------------------------------------------


def _agreement(c: Comparison, predicted: np.ndarray) -> np.ndarray:
    """Return how many relevant groups agree with a prediction, and how many there are."""
    a, e, p = (groups(c.case, x) for x in (c.actual, c.case.expected, predicted))
    if c.case.expected.dtype == np.uint8:
        relevant = (a != e).any(axis=1) | (p != e).any(axis=1)
        agree = (a == p).all(axis=1)
        close = relevant & ~agree
        agree[close] = _same_blocks(c.case.format, a[close], p[close], e[close])
    else:
        limit = c.case.match["max"]
        relevant = ~(group_nmse(a, e) <= limit) | ~(group_nmse(p, e) <= limit)
        relevant &= np.isfinite(e).all(axis=1)
        agree = group_nmse(a, p) <= np.minimum(SAME, group_nmse(a, e) / 4)
    return np.array([(agree & relevant).sum(), relevant.sum()], float)


def _same_blocks(fmt: Format, a: np.ndarray, p: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Tell which blocks are the same but for a few codes, and nearer to each other than to e."""
    blocks = [np.ascontiguousarray(x).view(fmt.block).reshape(-1) for x in (a, p, e)]
    if not len(a):
        return np.empty(0, bool)
    with np.errstate(all="ignore"):
        d = [b["d"].astype(np.float32) for b in blocks]
        same = np.abs(d[0] - d[1]) <= np.maximum(SAME_SCALE * np.abs(d[1]), SMALLEST_STEP)
        same |= (d[0] == d[1]) | (np.isnan(d[0]) & np.isnan(d[1]))
    codes = [list(fmt.codes(fmt, b).values()) for b in blocks]
    for (x, _), (y, _), (z, _) in zip(*codes, strict=True):
        share = (x == y).mean(axis=1)
        same &= (share >= SAME_CODES) & (share > (x == z).mean(axis=1))
    if "sb" in fmt.block.names:
        same &= (blocks[0]["sb"] == blocks[1]["sb"]).all(axis=1)
    return same


# --- tools of the hypotheses ---------------------------------------------------------------------


def _encode(case: Case, x: np.ndarray) -> np.ndarray:
    if "sibling" in case.inputs:
        return tbq.quantize_paired(x, case.inputs["sibling"])
    return tbq.quantize(np.ascontiguousarray(x), case.format)


def _blocks(case: Case, packed: np.ndarray) -> np.ndarray:
    return packed.view(case.format.block).reshape(-1)


def _signs(case: Case) -> np.ndarray | None:
    """Return the signs (n, 32) of a ktq case's blocks, None for other formats."""
    fmt = case.format
    if fmt is None or "sb" not in fmt.block.names:
        return None
    if case.op == "quantize":
        seed = ktq.block_seed(block_index(fmt, case.inputs["x"]))
        return np.where(ktq.sign_bits(seed) == 1, np.float32(1), np.float32(-1))
    return ktq.block_signs(fmt, _blocks(case, case.inputs["packed"]))


def _from_rows(case: Case, y: np.ndarray) -> np.ndarray:
    """Turn wrongly decoded rows (rows, n) into the output of a case's operation."""
    if case.op == "scores":
        return (case.inputs["q"].astype(np.float64) @ y.T.astype(np.float64)).astype(np.float32)
    if case.op == "weighted_sum":
        return (case.inputs["p"].astype(np.float64) @ y.astype(np.float64)).astype(np.float32)
    return y.reshape(case.expected.shape)


def _levels(case: Case) -> np.ndarray:
    """Return the scaled levels of the case's packed rows, blocks (n, values)."""
    return case.format.levels_ref(case.format, _blocks(case, case.inputs["packed"]))


def _as_rows(case: Case, blocks: np.ndarray) -> np.ndarray:
    packed = case.inputs["packed"]
    return blocks.reshape(len(packed.reshape(-1, packed.shape[-1])), -1)


def _repacked(case: Case, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the output with changed blocks: encoded ones changed, or packed ones misread."""
    fmt = case.format
    if case.op == "quantize":
        return change(groups(case, case.expected).copy()).reshape(case.expected.shape)
    packed = case.inputs["packed"]
    changed = change(packed.reshape(-1, fmt.block_bytes).copy()).reshape(packed.shape)
    y = decode(case, changed)
    return _from_rows(case, y.reshape(-1, y.shape[-1]))


def _qs(fmt: Format) -> slice | None:
    """Return where the bytes of the codes lie in a block."""
    if "qs" not in fmt.block.names:
        return None
    kind, at, *_ = fmt.block.fields["qs"]
    return slice(at, at + kind.itemsize)


# --- hypotheses that predict the output ----------------------------------------------------------


def _negated(case: Case) -> Iterator[Prediction]:
    if case.op == "quantize":
        yield "", _encode(case, -case.inputs["x"])
    else:
        yield "", -case.expected


def _not_rotated(case: Case) -> Iterator[Prediction]:
    if case.op == "rotation":
        yield "", case.inputs["x"]
    elif _rotates(case):
        if case.op == "quantize":
            yield "", _encode_coordinates(case, lambda x: x)
        else:
            yield "", _from_rows(case, _as_rows(case, _levels(case)))


def _rotates(case: Case) -> bool:
    return case.format is not None and case.format.group_values > 1 and not case.format.sibling


def _encode_coordinates(case: Case, transform: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Encode so that the codes are chosen from transform(x) instead of the rotated x."""
    fmt, x = case.format, case.inputs["x"]
    flat = np.ascontiguousarray(x.reshape(-1, fmt.block_values))
    wanted = transform(flat)
    if fmt.dialect == "pr21089":
        undone = pr21089.unrotate_ref(fmt, wanted)
    else:
        undone = fwht(wanted) * ktq.SCALE * _signs(case)
    return _encode(case, undone.reshape(x.shape))


def _transposed(case: Case) -> Iterator[Prediction]:
    if case.format is None or case.format.dialect != "pr21089":
        return  # the other rotations are symmetric, or signs on the wrong side
    if case.op == "quantize":
        yield "", _encode_coordinates(case, lambda x: pr21089.unrotate_ref(case.format, x))
    else:
        y = pr21089.rotate_ref(case.format, _levels(case))
        yield "", _from_rows(case, _as_rows(case, y))


def _signs_missing(case: Case) -> Iterator[Prediction]:
    if case.op == "rotation":
        if case.rotation == "dhd64":
            yield (
                "",
                tbq.rotation("hadamard64", case.inputs["x"].shape[-1]).forward(case.inputs["x"]),
            )
        return
    if _signs(case) is None:
        return
    if case.op == "quantize":
        packed = _encode_coordinates(case, lambda x: fwht(x) * ktq.SCALE)
        yield "stored all the same", packed
        for name, byte in (("stored as zeros", 0), ("stored as ones", 0xFF)):
            changed = packed.copy()
            changed.view(case.format.block)["sb"] = byte
            yield name, changed
    else:
        yield "", _from_rows(case, _as_rows(case, fwht(_levels(case)) * ktq.SCALE))


def _signs_on_the_wrong_side(case: Case) -> Iterator[Prediction]:
    if case.op == "rotation":
        if case.rotation == "dhd64":
            x, r = case.inputs["x"], tbq.rotation("dhd64", case.inputs["x"].shape[-1])
            signs = np.tile(r.signs, x.shape[-1] // r.size)
            plain = tbq.rotation("hadamard64", x.shape[-1])
            yield "only before", plain.forward(x * signs)
            yield "only after", plain.forward(x) * signs
        return
    signs = _signs(case)
    if signs is None:
        return
    if case.op == "quantize":
        yield "", _encode_coordinates(case, lambda x: fwht(x) * ktq.SCALE * signs)
    else:
        y = fwht(_levels(case) * signs) * ktq.SCALE
        yield "", _from_rows(case, _as_rows(case, y))


def _nibbles_swapped(case: Case) -> Iterator[Prediction]:
    fmt = case.format
    if fmt is None or _qs(fmt) is None or bit_layout(fmt) is None:
        return
    if code_width(fmt) != 4:
        return

    def swap(raw: np.ndarray) -> np.ndarray:
        qs = raw[:, _qs(fmt)]
        raw[:, _qs(fmt)] = (qs >> 4) | (qs << 4)
        return raw

    yield "", _repacked(case, swap)


def _bit_order_reversed(case: Case) -> Iterator[Prediction]:
    fmt = case.format
    if fmt is None or _qs(fmt) is None:
        return

    def reverse_bytes(raw: np.ndarray) -> np.ndarray:
        bits = np.unpackbits(raw[:, _qs(fmt)], axis=1)
        raw[:, _qs(fmt)] = np.packbits(bits, axis=1, bitorder="little")
        return raw

    def reverse_codes(raw: np.ndarray) -> np.ndarray:
        codes = codes_of(fmt, raw)
        width = code_width(fmt)
        turned = sum((codes >> k & 1) << (width - 1 - k) for k in range(width)).astype(np.uint8)
        return with_codes(fmt, raw, turned)

    def high_codes_first(raw: np.ndarray) -> np.ndarray:
        per_byte = 8 // code_width(fmt)
        codes = codes_of(fmt, raw)
        return with_codes(
            fmt, raw, codes.reshape(len(raw), -1, per_byte)[..., ::-1].reshape(codes.shape)
        )

    yield "in each byte", _repacked(case, reverse_bytes)
    if bit_layout(fmt) is not None:
        if code_width(fmt) > 1:
            yield "in each code", _repacked(case, reverse_codes)
        if code_width(fmt) == 2:
            yield "codes in each byte", _repacked(case, high_codes_first)


def _codes_off_by_one(case: Case) -> Iterator[Prediction]:
    fmt = case.format
    if fmt is None or bit_layout(fmt) is None:
        return

    def shifted(step: int, wraps: bool) -> Callable[[np.ndarray], np.ndarray]:
        def change(raw: np.ndarray) -> np.ndarray:
            codes = codes_of(fmt, raw)
            limit = code_counts(fmt)
            moved = codes.astype(int) + step
            moved = moved % limit if wraps else np.clip(moved, 0, limit - 1)
            return with_codes(fmt, raw, moved.astype(np.uint8))

        return change

    for step in (1, -1):
        yield f"{step:+d}, clamped", _repacked(case, shifted(step, False))
        yield f"{step:+d}, wrapping", _repacked(case, shifted(step, True))


# every codebook of the registered families, by bits, for coordinates of variance 1
CODEBOOKS = {
    "pr21089": pr21089.CODEBOOKS,
    "ktq": ktq.CODEBOOKS,
    "vtq": vtq.CODEBOOKS,
}


def _another_codebook(case: Case) -> Iterator[Prediction]:
    fmt = case.format
    if fmt is None or fmt.boundaries is None and fmt.block_index != "tensor":
        return
    if fmt.sibling or vtq.is_mixed(fmt):
        return
    width = code_width(fmt)
    unit = np.float32(0.0625) if fmt.dialect == "pr21089" else ktq.SCALE
    for name, tables in CODEBOOKS.items():
        if width not in tables:
            continue
        table = tables[width] * unit
        if case.op == "quantize":
            yield name, _encode_with(case, tables[width])
            continue
        blocks = _blocks(case, case.inputs["packed"])
        codes, _ = next(iter(fmt.codes(fmt, blocks).values()))
        levels = table[codes] * blocks["d"].astype(np.float32)[:, None]
        y = fmt.unrotate_ref(fmt, levels, blocks)
        yield name, _from_rows(case, _as_rows(case, y))


def _encode_with(case: Case, table: np.ndarray) -> np.ndarray:
    """Encode with another table: its midpoints decide, its levels correct the scale."""
    fmt = case.format
    flat = np.ascontiguousarray(case.inputs["x"].reshape(-1, fmt.block_values))
    raw = groups(case, case.expected).copy()
    stages = fmt.stages_ref(
        fmt, flat, block_index(fmt, case.inputs["x"]), _blocks(case, case.expected)
    )
    unit = 1.0 if fmt.dialect == "pr21089" else float(ktq.SCALE)
    edges = (table[1:].astype(np.float64) + table[:-1]) / 2 * unit
    codes = np.searchsorted(edges, stages.coordinates, side="right").astype(np.uint8)
    raw = with_codes(fmt, raw, codes)
    if fmt.dialect != "pr21089":
        levels = table[codes] * ktq.SCALE
        scale = stages.norm / np.sqrt((levels.astype(np.float64) ** 2).sum(axis=1))
        raw.view(fmt.block).reshape(-1)["d"] = scale.astype(np.float16)
    zero = ~(groups(case, case.expected) > 0).any(axis=1)
    raw[zero] = 0
    return raw.reshape(case.expected.shape)


def _field_order(case: Case) -> Iterator[Prediction]:
    if case.format is None or len(case.format.block.names) < 2:
        return
    move = 2 if case.format.block.fields["d"][1] else -2  # written with the scale at the other end
    move = move if case.op == "quantize" else -move  # read so
    yield "scale at the other end", _repacked(case, lambda raw: np.roll(raw, move, axis=1))


def _scale_elsewhere(case: Case) -> Iterator[Prediction]:
    fmt = case.format
    if fmt is None or case.op == "quantize":
        return
    at = fmt.block.fields["d"][1]
    for offset in range(fmt.block_bytes - 1):
        if offset != at:
            yield (
                f"at byte {offset}",
                _repacked(case, lambda raw, o=offset: _take_scale(raw, at, o)),
            )


def _take_scale(raw: np.ndarray, at: int, offset: int) -> np.ndarray:
    raw[:, at : at + 2] = raw[:, offset : offset + 2].copy()
    return raw


def _scale_as_bf16(case: Case) -> Iterator[Prediction]:
    fmt = case.format
    if fmt is None:
        return
    if case.op == "quantize":
        packed = case.expected.copy()
        wide = _blocks(case, packed)["d"].astype("<f4").view("<u4")
        _blocks(case, packed)["d"] = ((wide + 0x8000) >> 16).astype("<u2").view("<f2")
        yield "", packed
    elif not fmt.sibling and "pos" not in fmt.block.names:
        packed = case.inputs["packed"]
        scale = (_blocks(case, packed)["d"].view("<u2").astype("<u4") << 16).view("<f4")
        unit = packed.reshape(-1, fmt.block_bytes).copy()
        unit.view(fmt.block).reshape(-1)["d"] = 1
        yield "", _from_rows(case, _as_rows(case, tbq.dequantize(unit, fmt) * scale[:, None]))


def _another_block_index(case: Case) -> Iterator[Prediction]:
    fmt = case.format
    if fmt is None or "sb" not in fmt.block.names:
        return
    if case.op == "quantize":
        x = case.inputs["x"]
        if fmt.block_index == "row":
            yield "flat", _encode(case, x.reshape(1, -1)).reshape(case.expected.shape)
        else:
            rows = [_encode(case, row) for row in x.reshape(-1, x.shape[-1])]
            yield "per row", np.stack(rows).reshape(case.expected.shape)
        return
    packed = case.inputs["packed"]
    rows = len(packed.reshape(-1, packed.shape[-1]))
    n = packed.size // fmt.block_bytes
    plus = ktq.plus_bit(fmt)
    for name, index in (("flat", np.arange(n)), ("per row", np.arange(n) % (n // rows))):
        bits = ktq.sign_bits(ktq.block_seed(index))
        signs = np.where(bits == plus, np.float32(1), np.float32(-1))
        y = fwht(_levels(case)) * ktq.SCALE * signs
        yield f"{name}, signs recomputed", _from_rows(case, _as_rows(case, y))


def _norm_not_corrected(case: Case) -> Iterator[Prediction]:
    fmt = case.format
    if case.op != "quantize" or fmt.sibling or fmt.dialect == "pr21089":
        return
    flat = np.ascontiguousarray(case.inputs["x"].reshape(-1, fmt.block_values))
    packed = case.expected.copy()
    stages = fmt.stages_ref(fmt, flat, block_index(fmt, case.inputs["x"]), _blocks(case, packed))
    _blocks(case, packed)["d"] = fp16_bits(stages.norm).view(np.float16)
    yield "", packed


def _as_another_dialect(case: Case) -> Iterator[Prediction]:
    fmt = case.format
    if fmt is None or fmt.sibling:
        return
    for other in tbq.formats():
        if other.key == fmt.key or other.block != fmt.block or other.name != fmt.name:
            continue
        if case.op == "quantize":
            yield other.key, tbq.quantize(case.inputs["x"], other)
        else:
            y = tbq.dequantize(case.inputs["packed"], other)
            yield other.key, _from_rows(case, y.reshape(-1, y.shape[-1]))


def _outliers_left_out(case: Case) -> Iterator[Prediction]:
    fmt = case.format
    if fmt is None or "pos" not in fmt.block.names or case.op == "quantize":
        return
    blocks = _blocks(case, case.inputs["packed"])
    plain = tbq.get_format(f"{fmt.dialect}:vtq{code_width(fmt)}_2")
    shorter = np.zeros(len(blocks), plain.block)
    for name in plain.block.names:
        shorter[name] = blocks[name]
    y = tbq.dequantize(shorter.view(np.uint8).reshape(len(blocks), -1), plain)
    yield "", _from_rows(case, _as_rows(case, y))


def _float16_input(case: Case) -> Iterator[Prediction]:
    if case.op == "quantize":
        yield "input rounded to float16", _encode(case, case.inputs["x"].astype(np.float16))
    elif case.op == "dequantize":
        yield "output rounded to float16", case.expected.astype(np.float16).astype(np.float32)


def _row_stride(case: Case) -> Iterator[Prediction]:
    """Rows read from where they would be with another stride."""
    fmt = case.format
    if fmt is None or fmt.sibling:
        return
    encodes = case.op == "quantize"
    source = case.inputs["x" if encodes else "packed"]
    row = source.shape[-1]
    flat, rows = source.reshape(-1), source.size // row
    if rows < 2:
        return
    unit = fmt.block_values if encodes else fmt.block_bytes
    strides = {0, row - unit, row + unit}
    strides |= {-(-row // step) * step for step in (4, 16, 32, 64, 128, 256)}
    for stride in sorted(strides - {row}):
        starts = [min(r * stride, flat.size - row) for r in range(rows)]
        moved = np.stack([flat[start : start + row] for start in starts])
        try:
            if encodes:
                output = _encode(case, moved.reshape(source.shape))
            else:
                output = _from_rows(case, tbq.dequantize(moved, fmt))
        except TbqError:
            continue  # outliers beyond a block
        yield _stride_name(stride, row, unit), output


def _stride_name(stride: int, row: int, unit: int) -> str:
    if stride == 0:
        return "the first row for all"
    if (stride - row) % unit == 0:
        return f"{(stride - row) // unit:+d} block"
    return f"padded to a multiple of {stride & -stride}"


def _another_width(case: Case) -> Iterator[Prediction]:
    if case.op != "rotation":
        return
    x = case.inputs["x"]
    for kind in ("hadamard", "hadamard64"):
        if kind != case.rotation and case.rotation != "dhd64":
            yield kind, tbq.rotation(kind, x.shape[-1]).forward(x)
    if case.rotation != "dhd64":
        yield "dhd64", tbq.rotation("dhd64", x.shape[-1]).forward(x)


# --- hypotheses that look at the output ----------------------------------------------------------


def _scaled(evidence: Sequence[Comparison]) -> Iterator[tuple[str, float]]:
    """Everything right but for one constant: the scale of blocks, or the values."""
    ratios, total = [], 0
    for c in evidence:
        a, e = groups(c.case, c.actual), groups(c.case, c.case.expected)
        wrong = (a != e).any(axis=1)
        total += int(wrong.sum())
        if wrong.any():
            with np.errstate(all="ignore"):
                ratios.append(_constant_ratios(c, a[wrong], e[wrong]))
    found = np.concatenate(ratios) if ratios else np.empty(0)
    found = found[np.isfinite(found)]
    if not len(found) or not total:
        return
    constant = float(np.median(found))
    if abs(constant) < 1e-6 or abs(abs(constant) - 1) < 1e-2:
        return
    share = (np.abs(found / constant - 1) < 5e-3).sum() / total
    yield f"by {constant:.4g}{_known_constant(constant, evidence[0].case)}", float(share)


def _constant_ratios(c: Comparison, a: np.ndarray, e: np.ndarray) -> np.ndarray:
    if a.dtype == np.uint8:
        fmt = c.case.format
        x, y = a.view(fmt.block).reshape(-1), e.view(fmt.block).reshape(-1)
        rest = [name for name in fmt.block.names if name != "d"]
        same = np.ones(len(a), bool)
        for name in rest:
            same &= (x[name] == y[name]).reshape(len(a), -1).all(axis=1)
        ratio = x["d"].astype(np.float64) / y["d"].astype(np.float64)
        small = np.abs(y["d"].astype(np.float32)) < 1e-3  # too few bits to tell a ratio
        return np.where(same & ~small, ratio, np.nan)
    wide, exact = a.astype(np.float64), e.astype(np.float64)
    ratio = (wide * exact).sum(axis=1) / (exact**2).sum(axis=1)
    residual = ((wide - ratio[:, None] * exact) ** 2).sum(axis=1) / (wide**2).sum(axis=1)
    return np.where(residual < SAME, ratio, np.nan)


def _known_constant(constant: float, case: Case) -> str:
    sizes = {128, 64, 32, 256}
    if case.format is not None:
        sizes |= {case.format.block_values, case.format.group_values}
    for n in sorted(sizes):
        for value, name in ((np.sqrt(n), f"sqrt({n})"), (1 / np.sqrt(n), f"1/sqrt({n})")):
            if n > 1 and abs(abs(constant) / value - 1) < 5e-3:
                return f" = {name}"
    return ""


def _right_elements(c: Comparison) -> np.ndarray:
    """Tell which elements of each group are right, (groups, elements)."""
    a, e = groups(c.case, c.actual), groups(c.case, c.case.expected)
    if a.dtype == np.uint8:
        if bit_layout(c.case.format) is None:
            return a == e
        return codes_of(c.case.format, a) == codes_of(c.case.format, e)
    with np.errstate(all="ignore"):
        rms = np.sqrt((e.astype(np.float64) ** 2).mean(axis=1, keepdims=True))
        return (
            (np.abs(a.astype(np.float64) - e) <= 1e-4 * rms)
            | (a == e)
            | (np.isnan(a) & np.isnan(e))
        )


def _has_elements(case: Case) -> bool:
    """Tell whether the output consists of values or codes, not only of scales."""
    return case.expected.dtype != np.uint8 or bit_layout(case.format) is not None


def _usable(evidence: Sequence[Comparison]) -> list[Comparison]:
    return [c for c in evidence if len(c.bad_groups)]


def _some_lanes(evidence: Sequence[Comparison]) -> Iterator[tuple[str, float]]:
    """The same lanes of every so many are right, the others as a rule are not."""
    if evidence[0].case.op == "scores" or not _has_elements(evidence[0].case):
        return
    right = [_right_elements(c)[c.bad_groups] for c in _usable(evidence)]
    right = [r for r in right if r.shape[1] >= 4]
    if not right:
        return
    for period in LANE_PERIODS:
        fitting = [r for r in right if r.shape[1] % period == 0 and r.shape[1] >= 2 * period]
        if not fitting:
            continue
        folded = np.concatenate([r.reshape(-1, period) for r in fitting])
        rate = folded.mean(axis=0)
        written = rate > 0.97
        if written.any() and not written.all() and rate[~written].max() < 0.8:
            lanes = _ranges(np.flatnonzero(written))
            share = sum(r.size for r in fitting) / sum(r.size for r in right)
            yield f"lanes {lanes} of every {period}", float(rate[written].mean() * share)
            return


def _another_tie_rule(evidence: Sequence[Comparison]) -> Iterator[tuple[str, float]]:
    """Codes that differ only where the coordinate is on a boundary."""
    at_ties = elsewhere = 0
    for c in evidence:
        case, fmt = c.case, c.case.format
        if case.op != "quantize" or fmt.boundaries is None:
            return
        flat = np.ascontiguousarray(case.inputs["x"].reshape(-1, fmt.block_values))
        blocks = _blocks(case, case.expected)
        stages = fmt.stages_ref(fmt, flat, block_index(fmt, case.inputs["x"]), blocks)
        edges = np.broadcast_to(fmt.boundaries, (fmt.block_values, np.shape(fmt.boundaries)[-1]))
        tied = np.zeros(flat.shape, bool)
        for edge in edges.T:
            tied |= np.abs(stages.coordinates - edge) <= TIE
        differs = ~_right_elements(c)
        at_ties += int((differs & tied)[c.bad_groups].sum())
        elsewhere += int((differs & ~tied)[c.bad_groups].sum())
    if at_ties > elsewhere / TIES_AMONG_OTHERS:
        yield "", at_ties / (at_ties + elsewhere)


def _ranges(numbers: np.ndarray) -> str:
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _stale_tail(evidence: Sequence[Comparison]) -> Iterator[tuple[str, float]]:
    """Rows right up to a point, and wrong from there on."""
    explained = total = 0
    tails = set()
    for c in _usable(evidence):
        per_row = _per_row(c.case)
        right = _right_elements(c)
        if per_row is None or right.size % per_row:
            continue
        rows = right.reshape(-1, per_row)
        bad = ~rows.all(axis=1)
        if not bad.any():
            continue  # scales are wrong, not codes
        total += int(bad.sum())
        first = int((~rows[bad]).argmax(axis=1).min())
        wrong = ~rows[bad][:, first:]
        if first < per_row * LEAST_RIGHT or wrong.mean() < 0.4:
            continue
        explained += int(bad.sum())
        tails.add(per_row - first)
    if total and explained:
        sizes = ", ".join(map(str, sorted(tails)[:3]))
        yield f"the last {sizes} values of a row", explained / total


def _per_row(case: Case) -> int | None:
    """Return how many elements a row of the output has; None if it is no row of elements."""
    if case.op == "scores":
        return None
    return case.inputs["x"].shape[-1] if case.op == "quantize" else case.expected.shape[-1]


def _stochastic(evidence: Sequence[Comparison]) -> Iterator[tuple[str, float]]:
    """Codes one up or one down at random, all else right."""
    ups = downs = others = seen = 0
    for c in evidence:
        if c.case.op != "quantize" or bit_layout(c.case.format) is None:
            return
        a, e = (groups(c.case, x) for x in (c.actual, c.case.expected))
        x, y = (codes_of(c.case.format, raw).astype(int) for raw in (a, e))
        finite = np.isfinite(_blocks(c.case, c.case.expected)["d"][c.bad_groups])
        step = (x - y)[c.bad_groups][finite]
        ups, downs = ups + int((step == 1).sum()), downs + int((step == -1).sum())
        others += int((abs(step) > 1).sum())
        seen += step.size
    moved = ups + downs
    if moved < 8 or others > 0.02 * moved or not 0.02 < moved / seen < 0.75:
        return
    if min(ups, downs) < 0.25 * max(ups, downs):
        return
    yield f"{moved / seen:.0%} of the codes are the second nearest", 0.85 * (1 - others / moved)


def _float16_errors(evidence: Sequence[Comparison]) -> Iterator[tuple[str, float]]:
    """Errors everywhere, of the size that float16 makes."""
    small = total = 0
    for c in evidence:
        if c.case.expected.dtype == np.uint8:
            return
        e = groups(c.case, c.case.expected)
        nmse = group_nmse(groups(c.case, c.actual), e)[np.isfinite(e).all(axis=1)]
        wrong = nmse > c.case.match["max"]
        total += int(wrong.sum())
        small += int(((nmse > FLOAT16_ERRORS[0]) & (nmse < FLOAT16_ERRORS[1])).sum())
    if total:
        yield "errors of that size everywhere", 0.9 * small / max(total, small)


Predict = Callable[[Case], Iterator[Prediction]]
Observe = Callable[[Sequence[Comparison]], Iterator[tuple[str, float]]]

# Of equally good explanations the first is named, the catch-all last.
_PREDICTED: tuple[tuple[str, Predict], ...] = (
    ("negated", _negated),
    ("not rotated", _not_rotated),
    ("rotated with the transpose", _transposed),
    ("sign diagonal missing", _signs_missing),
    ("sign diagonal on the wrong side", _signs_on_the_wrong_side),
    ("nibbles swapped", _nibbles_swapped),
    ("bit order reversed", _bit_order_reversed),
    ("codes off by one", _codes_off_by_one),
    ("norm not corrected", _norm_not_corrected),
    ("another block index", _another_block_index),
    ("another codebook", _another_codebook),
    ("fields in another order", _field_order),
    ("scale as bfloat16", _scale_as_bf16),
    ("scale read elsewhere", _scale_elsewhere),
    ("outliers left out", _outliers_left_out),
    ("wrong row stride", _row_stride),
    ("another rotation", _another_width),
    ("float16 intermediate", _float16_input),
    ("as another dialect does it", _as_another_dialect),  # whatever the difference is called
)
_OBSERVED: tuple[tuple[str, Observe], ...] = (
    ("scaled by a constant", _scaled),
    ("another tie rule", _another_tie_rule),
    ("only some lanes written", _some_lanes),
    ("stale or unwritten tail", _stale_tail),
    ("stochastic instead of nearest", _stochastic),
    ("float16 intermediate", _float16_errors),
)
_CATCH_ALL = "as another dialect does it"
_NAMES = tuple(dict.fromkeys(bug for bug, _ in (*_PREDICTED, *_OBSERVED)))
BUGS = (*(bug for bug in _NAMES if bug != _CATCH_ALL), _CATCH_ALL)
