"""The two halves of attention over packed rows, without dequantising them.

A block decodes to y = d * T'(c): levels c of the codebook under a scale d, T' the inverse of the
format's own rotation T (Q of pr21089, signed Hadamard of ktq, none of vtq). As T is orthogonal,
q . y = T(q) . (d c), so the query is rotated once and the keys never; and sum_t p_t y_t =
T'(sum_t p_t (d c)_t), so the sum is rotated back once. Rotations that the attention graph applies
outside the block (`tbq.rotation`) are the caller's business on both sides.

Arithmetic, all in float32, nothing fused or reassociated:

    level_i  = (codebook[code_i] * c) * d, as the format's docstring has it; c its constant factor
    q~       = T(q), block by block, summed as the format's encoder does
    score    = sum over blocks, in order, of (sum over i in the block, in order, of q~_i * level_i)
    a_i      = sum over runs of 512 keys, in order, of (sum over the run's keys t, in order, of
               p_t * level_ti), so that runs can be summed side by side
    result   = T'(a), block by block, summed as the format's decoder does

ktq blocks carry their signs. Those of one column of blocks are the same in all rows of llama-tq's
CPU code, so there is one rotated query per column; where they differ, one per sign pattern.
"""

from __future__ import annotations

import numpy as np

from tbq.api import as_float32, checked_floating, checked_packed, sibling_blocks
from tbq.errors import CorruptBlockError, InputError
from tbq.format import Format
from tbq.registry import get_format

# Float32 values of scaled levels that are held at a time.
CHUNK_VALUES = 1 << 20
# Keys that are summed before their sum is added to the others'.
RUN_KEYS = 512


def scores(
    q: np.ndarray, packed_k: np.ndarray, fmt: str | Format, *, sibling: np.ndarray | None = None
) -> np.ndarray:
    """Return the dot products of queries with packed keys, in a fixed order of operations.

    Args:
        q: real floats (..., n), rounded to float32; n values like a row of keys. A query of one
            head among several in a row is zero elsewhere.
        packed_k: uint8 (keys, row_bytes) of a format for keys.
        fmt: a Format, a key, a bare name or an alias.
        sibling: for xktq2_1, the packed ktq2_1 rows that lend it their codes.

    Returns:
        float32 (..., keys), not scaled by 1/sqrt(head_dim).

    Raises:
        UnknownFormatError, AmbiguousTypeError: `fmt` names no format, or several.
        InputError: wrong dtype or shape; a format that is not for keys; a sibling that is missing.
    """
    fmt = get_format(fmt)
    q, packed_k = _checked(q, "q", packed_k, fmt, "K")
    n = fmt.row_values(packed_k.shape[1])
    if q.shape[-1] != n:
        raise InputError("q", f"rows of {q.shape[-1]} values", f"{n}, as the keys have")
    packed_k, fmt = _with_codes(packed_k, fmt, sibling)
    queries = q.reshape(-1, n // fmt.block_values, fmt.block_values)
    out = np.empty((len(queries), len(packed_k)), np.float32)
    from tbq.kernels.attention import dot_blocks  # imports Numba

    for start, stop, levels in _levels(packed_k, fmt, n * max(1, len(queries))):
        blocks = packed_k[start:stop].view(fmt.block)
        rotated, which = rotated_queries(queries, blocks, fmt)
        by_block = levels.reshape(stop - start, -1, fmt.block_values)
        part = np.empty((len(queries), stop - start), np.float32)
        dot_blocks(by_block, rotated, which, part)
        out[:, start:stop] = part
    return out.reshape(*q.shape[:-1], len(packed_k))


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
        InputError: wrong dtype or shape; a format that is not for values.
        CorruptBlockError: an outlier's position is beyond its block.
    """
    fmt = get_format(fmt)
    p, packed_v = _checked(p, "p", packed_v, fmt, "V")
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
    blocks = total.reshape(-1, fmt.block_values)
    with np.errstate(all="ignore"):
        result = fmt.unrotate_ref(fmt, blocks, np.empty(0, fmt.block))
    return result.reshape(*p.shape[:-1], n)


def scores_ref(q: np.ndarray, packed_k: np.ndarray, fmt: Format) -> np.ndarray:
    """The specification of `scores` in NumPy, for q float32 (queries, n), no borrowed codes."""
    blocks = packed_k.view(fmt.block)
    keys, row_blocks = blocks.shape
    levels = fmt.levels_ref(fmt, blocks.reshape(-1)).reshape(keys, row_blocks, fmt.block_values)
    total = np.zeros((len(q), keys), np.float32)
    with np.errstate(all="ignore"):
        for b in range(row_blocks):
            query = np.repeat(q.reshape(len(q), row_blocks, -1)[:, b], keys, axis=0)
            signs = np.tile(blocks[:, b], len(q))
            rotated = fmt.rotate_ref(fmt, query, signs).reshape(len(q), keys, -1)
            partial = np.zeros_like(total)
            for i in range(fmt.block_values):
                partial += rotated[:, :, i] * levels[:, b, i]
            total += partial
    return total


def weighted_sum_ref(p: np.ndarray, packed_v: np.ndarray, fmt: Format) -> np.ndarray:
    """The specification of `weighted_sum` in NumPy, for p float32 (queries, keys)."""
    blocks = packed_v.view(fmt.block)
    levels = fmt.levels_ref(fmt, blocks.reshape(-1)).reshape(len(blocks), -1)
    total = np.zeros((len(p), levels.shape[1]), np.float32)
    with np.errstate(all="ignore"):
        for first in range(0, len(levels), RUN_KEYS):
            partial = np.zeros_like(total)
            for t in range(first, min(first + RUN_KEYS, len(levels))):
                partial += p[:, t, None] * levels[t]
            total += partial
        by_block = total.reshape(-1, fmt.block_values)
        return fmt.unrotate_ref(fmt, by_block, np.empty(0, fmt.block)).reshape(total.shape)


def _checked(x, name: str, packed: np.ndarray, fmt: Format, side: str):
    if side not in fmt.side:
        raise InputError("fmt", fmt.key, f"a format for {side}; this one is for {fmt.side}")
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
            raise InputError("sibling", "rows", f"none: {fmt.key} has codes of its own")
        return packed, fmt
    lender = get_format(fmt.sibling)
    if sibling is None:
        raise InputError("sibling", "none", f"packed rows of {lender.key}")
    blocks = packed.view(fmt.block)
    lent = sibling_blocks(sibling, lender, (*packed.shape[:1], fmt.row_values(packed.shape[1])))
    whole = lent.reshape(len(packed), -1).copy()
    whole.view(lender.block)["d"] = blocks["d"]
    return whole, lender


def _levels(packed: np.ndarray, fmt: Format, values_per_row: int, first_row: int = 0):
    """Yield (start, stop, scaled levels float32 (rows, n)) for a few rows at a time.

    `first_row` is where `packed` stands among the caller's rows, for errors.
    """
    kernel = fmt.kernels().levels
    n = fmt.row_values(packed.shape[1])
    step = max(1, CHUNK_VALUES // values_per_row)
    for start in range(0, len(packed), step):
        stop = min(start + step, len(packed))
        levels = np.empty((stop - start, n), np.float32)
        corrupt = kernel(packed[start:stop], levels)
        if corrupt is not None and corrupt >= 0:
            block = (first_row + start) * (n // fmt.block_values) + corrupt
            raise CorruptBlockError(fmt.key, block, "an outlier lies outside the block")
        yield start, stop, levels


def rotated_queries(
    queries: np.ndarray, blocks: np.ndarray, fmt: Format
) -> tuple[np.ndarray, np.ndarray]:
    """Return the queries rotated for each sign pattern, and which pattern each block has."""
    m, row_blocks, size = queries.shape
    which = np.zeros(blocks.shape, np.intp)
    patterns = [blocks[:1, b] for b in range(row_blocks)]
    if "sb" in fmt.block.names:
        for b in range(row_blocks):
            _, first, inverse = np.unique(
                blocks["sb"][:, b], axis=0, return_index=True, return_inverse=True
            )
            which[:, b] = inverse.reshape(-1)  # NumPy 2.0 keeps the axis
            patterns[b] = blocks[first, b]
    variants = max(map(len, patterns))
    rotated = np.zeros((m, row_blocks, variants, size), np.float32)
    with np.errstate(all="ignore"):
        for b, signs in enumerate(patterns):
            repeated = np.repeat(queries[:, b], len(signs), axis=0)
            found = fmt.rotate_ref(fmt, repeated, np.tile(signs, m))
            rotated[:, b, : len(signs)] = found.reshape(m, len(signs), size)
    return rotated, which
