"""The two halves of attention over packed rows, without dequantising them.

A block decodes to y = d * T'(c): levels c of the codebook under a scale d, T' the inverse of the
format's own rotation T (Q of pr21089, signed Hadamard of ktq, none of vtq). As T is orthogonal,
q . y = T(q) . (d c), so the query is rotated once and the keys never; and sum_t p_t y_t =
T'(sum_t p_t (d c)_t), so the sum is rotated back once. Rotations that the attention graph applies
outside the block (`tbq.rotation`) are the caller's business on both sides.

Arithmetic, all in float32, nothing fused or reassociated:

    level_i  = (codebook[code_i] * c) * d, as the format's docstring has it; c its constant factor
    q~       = T(q), group by group (a group is what is encoded together, mostly one block), summed
               as the format's encoder does
    score    = sum over groups, in order, of (sum over i in the group, in order, of q~_i * level_i)
    a_i      = sum over runs of 512 keys, in order, of (sum over the run's keys t, in order, of
               p_t * level_ti), so that runs can be summed side by side
    result   = T'(a), group by group, summed as the format's decoder does; a where the decoder
               leaves the rotation to the graph

ktq blocks carry their signs. Those of one column of blocks are the same in all rows of llama-tq's
CPU code, so there is one rotated query per column; where they differ, one per sign pattern.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tbq.api import as_float32, checked_floating, checked_packed, kernel_input, sibling_blocks
from tbq.errors import CorruptBlockError, InputError
from tbq.format import Format
from tbq.registry import get_format

# Float32 values of scaled levels that are held at a time.
CHUNK_VALUES = 1 << 20
# Keys that are summed before their sum is added to the others'.
RUN_KEYS = 512


@np.errstate(all="ignore")
def scores(
    q: np.ndarray, packed_k: np.ndarray, fmt: str | Format, *, sibling: np.ndarray | None = None
) -> np.ndarray:
    """Return the dot products of queries with packed keys, in a fixed order of operations.

    Args:
        q: real floats (..., n), rounded to float32, in the domain that the codec takes; n values
            like a row of keys. A query of one head among several in a row is zero elsewhere.
        packed_k: uint8 (keys, row_bytes) of a format for keys.
        fmt: a Format, a key, a bare name or an alias.
        sibling: for xktq2_1, the packed ktq2_1 rows that lend it their codes.

    Returns:
        float32 (..., keys), not scaled by 1/sqrt(head_dim).

    Raises:
        UnknownFormatError, AmbiguousTypeError: `fmt` names no format, or several.
        InputError: wrong dtype or shape; a format that is not for keys; a sibling that is missing;
            a format whose choices are open (`Format.at`).
    """
    fmt = side_format(fmt, "K")
    q, packed_k = _checked(q, "q", packed_k)
    n = fmt.row_values(packed_k.shape[1])
    if q.shape[-1] != n:
        raise InputError("q", f"rows of {q.shape[-1]} values", f"{n}, as the keys have")
    packed_k, fmt = _with_codes(packed_k, fmt, sibling)
    queries = q.reshape(-1, n // fmt.group_values, fmt.group_values)
    out = np.empty((len(queries), len(packed_k)), np.float32)
    from tbq.kernels.attention import dot_blocks  # imports Numba

    for start, stop, levels in _levels(packed_k, fmt, n * max(1, len(queries))):
        rotated, which = rotated_queries(queries, packed_k[start:stop], fmt)
        by_group = levels.reshape(stop - start, -1, fmt.group_values)
        part = np.empty((len(queries), stop - start), np.float32)
        dot_blocks(by_group, rotated, which, part)
        out[:, start:stop] = part
    return out.reshape(*q.shape[:-1], len(packed_k))


@np.errstate(all="ignore")
def weighted_sum(p: np.ndarray, packed_v: np.ndarray, fmt: str | Format) -> np.ndarray:
    """Return weighted sums of packed values, in a fixed order of operations.

    Args:
        p: real floats (..., keys), rounded to float32.
        packed_v: uint8 (keys, row_bytes) of a format for values.
        fmt: a Format, a key, a bare name or an alias.

    Returns:
        float32 (..., n), in the domain that `dequantize` returns.

    Raises:
        UnknownFormatError, AmbiguousTypeError: `fmt` names no format, or several.
        InputError: wrong dtype or shape; a format that is not for values, or whose choices are
            open (`Format.at`).
        CorruptBlockError: an outlier's position is beyond its block.
    """
    fmt = side_format(fmt, "V")
    p, packed_v = _checked(p, "p", packed_v)
    n = fmt.row_values(packed_v.shape[1])
    if p.shape[-1] != len(packed_v):
        raise InputError("p", f"{p.shape[-1]} weights", f"{len(packed_v)}, one per row of values")
    weights = p.reshape(-1, len(packed_v))
    total = np.zeros((len(weights), n), np.float32)
    from tbq.kernels.attention import add_weighted  # imports Numba

    for first in range(0, len(packed_v), RUN_KEYS):
        run = packed_v[first : first + RUN_KEYS]
        partial = np.zeros_like(total)
        for start, stop, levels in _levels(run, fmt, n, first):
            mine = weights[:, first + start : first + stop]
            add_weighted(np.ascontiguousarray(mine), levels, partial)
        total += partial
    unrotate = fmt.kernels().unrotate
    if unrotate is not None and rotates_back(fmt):
        unrotate(total.reshape(-1, fmt.group_values), np.empty((0, 0), np.uint8))
    return total.reshape(*p.shape[:-1], n)


def rotates_back(fmt: Format) -> bool:
    """Tell whether the decoder undoes the codec's own rotation, and so a weighted sum does."""
    return fmt.codec.gives == fmt.codec.takes


def scores_ref(q: np.ndarray, packed_k: np.ndarray, fmt: Format) -> np.ndarray:
    """The specification of `scores` in NumPy, for q float32 (queries, n), no borrowed codes."""
    codec = fmt.codec
    blocks = codec.blocks(packed_k).reshape(len(packed_k), -1, codec.group_blocks)
    keys, row_groups = blocks.shape[:2]
    levels = codec.levels(blocks.reshape(-1)).reshape(keys, row_groups, codec.group_values)
    total = np.zeros((len(q), keys), np.float32)
    with np.errstate(all="ignore"):
        for b in range(row_groups):
            query = np.repeat(q.reshape(len(q), row_groups, -1)[:, b], keys, axis=0)
            signs = np.tile(blocks[:, b], (len(q), 1)).reshape(-1)
            rotated = codec.rotate(query, signs).reshape(len(q), keys, -1)
            partial = np.zeros_like(total)
            for i in range(codec.group_values):
                partial += rotated[:, :, i] * levels[:, b, i]
            total += partial
    return total


def weighted_sum_ref(p: np.ndarray, packed_v: np.ndarray, fmt: Format) -> np.ndarray:
    """The specification of `weighted_sum` in NumPy, for p float32 (queries, keys)."""
    codec = fmt.codec
    blocks = codec.blocks(packed_v)
    levels = codec.levels(blocks.reshape(-1)).reshape(len(blocks), -1)
    total = np.zeros((len(p), levels.shape[1]), np.float32)
    with np.errstate(all="ignore"):
        for first in range(0, len(levels), RUN_KEYS):
            partial = np.zeros_like(total)
            for t in range(first, min(first + RUN_KEYS, len(levels))):
                partial += p[:, t, None] * levels[t]
            total += partial
        if not rotates_back(fmt):
            return total
        by_group = total.reshape(-1, codec.group_values)
        return codec.unrotate(by_group, np.empty(0, codec.layout.dtype)).reshape(total.shape)


def side_format(fmt: str | Format, side: str) -> Format:
    """Return a format for one side with its choices made; InputError if it is not for that side."""
    found = get_format(fmt)
    if side not in found.side:
        raise InputError("fmt", found.label, f"a format for {side}; this one is for {found.side}")
    return found.at(side=side if found.by_side else None)


def _checked(x: np.ndarray, name: str, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    packed = checked_packed(packed)
    if packed.ndim != 2:
        raise InputError("packed rows", f"shape {packed.shape}", "two axes, (keys, row_bytes)")
    return as_float32(checked_floating(x, name)), np.ascontiguousarray(packed)


def _with_codes(
    packed: np.ndarray, fmt: Format, sibling: np.ndarray | None
) -> tuple[np.ndarray, Format]:
    """Return rows that have codes: for a format that borrows them, its scales in its sibling."""
    if not fmt.sibling:
        if sibling is not None:
            raise InputError("sibling", "rows", f"none: {fmt.label} has codes of its own")
        return packed, fmt
    lender = get_format(fmt.sibling)
    if sibling is None:
        raise InputError("sibling", "none", f"packed rows of {lender.label}")
    blocks = packed.view(fmt.block)
    lent = sibling_blocks(sibling, lender, (*packed.shape[:1], fmt.row_values(packed.shape[1])))
    whole = lent.reshape(len(packed), -1).copy()
    for name in fmt.layout.scales:
        whole.view(lender.block)[name] = blocks[name]
    return whole, lender


def _levels(
    packed: np.ndarray, fmt: Format, values_per_row: int, first_row: int = 0
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (start, stop, scaled levels float32 (rows, n)) for a few rows at a time.

    `first_row` is where `packed` stands among the caller's rows, for errors.
    """
    kernel = fmt.kernels().levels
    n = fmt.row_values(packed.shape[1])
    step = max(1, CHUNK_VALUES // values_per_row)
    for start in range(0, len(packed), step):
        stop = min(start + step, len(packed))
        levels = np.empty((stop - start, n), np.float32)
        corrupt = kernel(kernel_input(packed[start:stop]), levels)
        if corrupt is not None and corrupt >= 0:
            block = (first_row + start) * (n // fmt.block_values) + corrupt
            raise CorruptBlockError(fmt.label, block, fmt.codec.corruption)
        yield start, stop, levels


def rotated_queries(
    queries: np.ndarray, packed: np.ndarray, fmt: Format
) -> tuple[np.ndarray, np.ndarray]:
    """Return the queries rotated for each sign pattern, and which pattern each group has.

    Args:
        queries: float32 (queries, groups, group_values).
        packed: uint8 (keys, row_bytes), of which the sign bits matter.
        fmt: a format for keys.

    Returns:
        float32 (queries, groups, patterns, group_values) and intp (keys, groups).
    """
    m, row_groups, size = queries.shape
    blocks = fmt.codec.blocks(packed).reshape(len(packed), row_groups, fmt.codec.group_blocks)
    which = np.zeros((len(packed), row_groups), np.intp)
    patterns = [blocks[:1, g] for g in range(row_groups)]
    if fmt.layout.signs:
        for g in range(row_groups):
            signs = blocks[fmt.layout.signs][:, g].reshape(len(packed), -1)
            _, first, inverse = np.unique(signs, axis=0, return_index=True, return_inverse=True)
            which[:, g] = inverse.reshape(-1)  # NumPy 2.0 keeps the axis
            patterns[g] = blocks[first, g]
    variants = max(map(len, patterns))
    rotated = np.zeros((m, row_groups, variants, size), np.float32)
    rotate = fmt.kernels().rotate
    for g, signs in enumerate(patterns):
        turned = np.repeat(queries[:, g], len(signs), axis=0)
        if rotate is not None:
            rotate(turned, np.tile(signs, (m, 1)).view(np.uint8))
        rotated[:, g, : len(signs)] = turned.reshape(m, len(signs), size)
    return rotated, which
