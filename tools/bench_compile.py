"""`tbq-bench --compile`: compile all that formats need, and say what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

import tbq
from tbq.attention import rotates_back

processor_seconds = time.process_time
Calls = dict[str, Callable[[], object]]


def calls(fmt: tbq.Format) -> Calls:
    """Return calls that need every kernel of a format, each for one group of zeros.

    Quantising comes before dequantising, and what attention needs besides comes last.
    """
    x = np.zeros((1, fmt.group_values), np.float32)
    packed = np.zeros((1, fmt.row_bytes(fmt.group_values)), np.uint8)
    found: Calls = {
        "quantize": lambda: tbq.quantize(x, fmt),
        "dequantize": lambda: tbq.dequantize(packed, fmt),
    }
    lent = None
    if fmt.sibling:
        lender = tbq.get_format(fmt.sibling)
        lent = np.zeros((1, lender.row_bytes(fmt.group_values)), np.uint8)
        found["quantize paired"] = lambda: tbq.quantize_paired(x, lent, fmt)
        found["dequantize paired"] = lambda: tbq.dequantize_paired(packed, lent, fmt)
    if not rotates_back(fmt):
        found["restore"] = lambda: tbq.dequantize(packed, fmt, original=True)
    if "K" in fmt.side:
        found["scores"] = lambda: tbq.scores(x, packed, fmt, sibling=lent)
    if "V" in fmt.side:
        found["weighted sum"] = lambda: tbq.weighted_sum(x[:, :1], packed, fmt)
    return found


def graph_calls() -> Calls:
    """Return calls that need what belongs to no format."""
    from tbq.kernels.checksum import fnv1a64  # imports Numba

    turn = tbq.rotation("dhd64", 64)
    return {
        "rotation": lambda: turn.forward(np.zeros((1, 64), np.float32)),
        "checksum": lambda: fnv1a64(np.zeros(8, np.uint8), np.uint64(0)),
    }


def compiled(formats: list[tbq.Format]) -> Iterator[dict]:
    """Compile what formats need, and what belongs to none; yield what each call took."""
    named = [(fmt.label, calls(fmt)) for fmt in formats]
    for label, group in [*named, ("", graph_calls())]:
        for operation, call in group.items():
            began = processor_seconds()
            call()
            seconds = round(processor_seconds() - began, 3)
            yield {"format": label, "operation": operation, "cpu_s": seconds}


def cache_folder() -> str | None:
    """Return where compiled kernels are kept; None if nothing can be written."""
    from tbq.kernels.rotation import rotate

    return rotate._cache.cache_path
