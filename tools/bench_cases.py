"""What `tbq-bench` times, how, and what is exact enough to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

import tbq
from tbq.api import index_step

VALUES = 4 << 20
SECONDS = 1.0  # a case that would take longer gets fewer rows, and so does a check
WARM_UPS = 2
CHECKED_ROWS = 64
OPERATIONS = ("quantize", "dequantize")
COPY = "copy"
C_PREFIX = "C: "


class Case(NamedTuple):
    """What is timed, and how many values it handles."""

    call: Callable[[], object]
    values: int


def peer(name: str) -> str:
    """Return the case of gguf-py that does what a case does."""
    return f"gguf-py q4_0 {name.rpartition(' ')[2]}"


def is_exact(fmt: tbq.Format) -> bool:
    """Compare the kernels with the specification, row by row of one group each."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((CHECKED_ROWS, fmt.group_values)).astype(np.float32)
    packed = tbq.quantize(x, fmt)
    y = tbq.dequantize(packed, fmt)
    began = time.perf_counter()
    for i in range(CHECKED_ROWS):
        row = fmt.codec.quantize_rows(x[i : i + 1], i * index_step(fmt, x.shape[1]))
        expected = fmt.codec.dequantize_rows(row)
        if row.tobytes() != packed[i].tobytes() or expected.tobytes() != y[i].tobytes():
            return False
        if time.perf_counter() - began > SECONDS:
            break
    return True


def cases(
    formats: list[tbq.Format], n: int, threads: int, library: object = None
) -> dict[str, Case]:
    """Return the cases of rows of n values, by name: the yardsticks first.

    With a fork's library (`libggml.open_library`), each case of a format whose C function it has
    is followed by that, its name under C_PREFIX.
    """
    import gguf

    x = np.random.default_rng(0).standard_normal((VALUES // n, n)).astype(np.float32)
    copy = np.empty_like(x)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    packed_q4_0 = gguf.quantize(x, q4_0)
    found = {
        COPY: Case(lambda: np.copyto(copy, x), x.size),
        peer("quantize"): Case(lambda: gguf.quantize(x, q4_0), x.size),
        peer("dequantize"): Case(lambda: gguf.dequantize(packed_q4_0, q4_0), x.size),
    }
    for fmt in formats:
        if n % fmt.group_values:
            continue
        some = x[: _affordable_rows(fmt, x)]
        packed = tbq.quantize(some, fmt)
        encode = {"x": some, "fmt": fmt, "out": packed.copy(), "threads": threads}
        repeated = np.resize(packed, (len(x), packed.shape[1]))
        decode = {"packed": repeated, "fmt": fmt, "out": copy, "threads": threads}
        found[f"{fmt.label} quantize"] = Case(lambda kw=encode: tbq.quantize(**kw), some.size)
        found |= _c_case(library, "quantize", fmt, some, packed.copy())
        found[f"{fmt.label} dequantize"] = Case(lambda kw=decode: tbq.dequantize(**kw), x.size)
        found |= _c_case(library, "dequantize", fmt, repeated, copy)
    return found


def _c_case(library, operation: str, fmt: tbq.Format, source, target) -> dict[str, Case]:
    """Return the case of a C function, by name; none if the library does not have it."""
    if library is None or fmt.sibling:
        return {}
    from .libggml import c_function, run_rows

    function = c_function(library, operation, fmt)
    if function is None:
        return {}
    values = source if operation == "quantize" else target
    whole = not fmt.layout.header_bytes  # one call for all rows, if they are like one long row
    rows = (source.reshape(1, -1), target.reshape(1, -1)) if whole else (source, target)
    call = lambda: run_rows(function, *rows, values.size // len(rows[0]))  # noqa: E731
    return {f"{C_PREFIX}{fmt.label} {operation}": Case(call, values.size)}


def _affordable_rows(fmt: tbq.Format, x: np.ndarray) -> int:
    """Return how many rows one thread quantises in SECONDS, at least one."""
    tbq.quantize(x[:1], fmt)
    began = time.perf_counter()
    tbq.quantize(x[:1], fmt)
    return min(len(x), max(1, int(SECONDS / (time.perf_counter() - began))))


def clock_of(threads: int) -> Callable[[], float]:
    """Return the clock of cases: of one thread, what others do meanwhile takes no time by it."""
    return time.thread_time if threads == 1 else time.perf_counter


def measured(
    found: dict[str, Case], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the speeds of each case, values per second, one per round.

    The cases of a round run one after the other, so that those of one round can be compared.
    """
    speeds: dict[str, list[float]] = {name: [] for name in found}
    for i in range(WARM_UPS + rounds):
        for name, (call, values) in found.items():
            start = clock()
            call()
            if i >= WARM_UPS:
                speeds[name].append(values / (clock() - start))
    return speeds


def with_yardsticks(found: dict[str, Case], names: Collection[str]) -> dict[str, Case]:
    """Return the cases of these names, and what they are measured by."""
    kept = {COPY, *map(peer, OPERATIONS), *names}
    return {name: case for name, case in found.items() if name in kept}
