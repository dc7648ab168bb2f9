"""The records and lines of `tbq-bench`, and what an older record says of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tbq.errors import FileFormatError

from .bench_cases import C_PREFIX, COPY, peer

# A case that reaches less of its recorded speed than this is slower.
LEAST = 0.9
TRIES = 3
Key = tuple[str, int, int]
YARDSTICKS = ("ratio_to_copy", "ratio_to_gguf_q4_0")


def record(name: str, n: int, values: int, speeds: dict[str, list[float]]) -> dict:
    """Return what is recorded of a case: medians, and medians of the ratios within a round."""
    own = speeds[name]
    median = statistics.median(own)
    found = {
        "case": name,
        "row": n,
        "values": values,
        "mvalues_per_s": median / 1e6,
        "min": min(own) / 1e6,
        "max": max(own) / 1e6,
        "float_gb_per_s": 4 * median / 1e9,
        "ratio_to_gguf_q4_0": _ratio(own, speeds.get(peer(name), own)),
        "ratio_to_copy": _ratio(own, speeds[COPY]),
        "rounds": len(own),
    }
    by_c = speeds.get(C_PREFIX + name)
    if by_c:
        found["c_mvalues_per_s"] = statistics.median(by_c) / 1e6
        found["ratio_to_c"] = _ratio(own, by_c)
    return found


def _ratio(speeds: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(speeds, others, strict=True))


# --- lines ---------------------------------------------------------------------------------------


def head(with_c: bool, compared: bool) -> str:
    """Return the line above the table."""
    text = f"{'case':<34}{'row':>6}{'Mvalues/s':>11}{'min':>9}{'max':>9}{'x Q4_0':>8}{'x copy':>8}"
    text += f"{'C':>9}{'x C':>7}" if with_c else ""
    return text + (f"{'x record':>10}" if compared else "")


def line(found: dict, with_c: bool, change: float | None = None) -> str:
    """Return the line of a record."""
    text = (
        f"{found['case']:<34}{found['row']:>6}{found['mvalues_per_s']:>11.3f}{found['min']:>9.3f}"
        f"{found['max']:>9.3f}{found['ratio_to_gguf_q4_0']:>8.2f}{found['ratio_to_copy']:>8.3f}"
    )
    if with_c:
        has_c = "ratio_to_c" in found
        text += f"{found['c_mvalues_per_s']:>9.3f}" if has_c else f"{'-':>9}"
        text += f"{found['ratio_to_c']:>7.2f}" if has_c else f"{'-':>7}"
    return text if change is None else f"{text}{change:>10.2f}"


# --- an older record -----------------------------------------------------------------------------


def read_records(path: str) -> dict[Key, dict]:
    """Return the cases that a file of `--out` has, the last of each.

    Raises:
        FileFormatError: a line is no such record.
        OSError: the file cannot be read.
    """
    found = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                entry = json.loads(text)
                if not all(float(entry[name]) > 0 for name in YARDSTICKS):
                    raise ValueError(f"{' and '.join(YARDSTICKS)} are not above zero")
                found[str(entry["case"]), int(entry["row"]), int(entry["threads"])] = entry
            except (ValueError, TypeError, KeyError) as error:
                reason = f"line {number} is no record of tbq-bench: {error!r}"
                raise FileFormatError(path, None, reason) from None
    return found


def change(found: dict, before: dict) -> float:
    """Return what share of its recorded speed a case has, measured by copy or by gguf-py's Q4_0.

    The larger share: machines differ in both, and a case that became slower did by both.
    """
    return max(found[name] / before[name] for name in YARDSTICKS)


def slower(
    changes: dict[str, float], again: Callable[[list[str]], dict[str, float]]
) -> dict[str, float]:
    """Return the cases, by name, that are slower than recorded in every one of TRIES.

    Args:
        changes: what share of its recorded speed each case has.
        again: measures some cases anew; returns their shares.
    """
    found = {name: share for name, share in changes.items() if share < LEAST}
    for _ in range(TRIES - 1):
        if not found:
            break
        better = again([*found])
        found = {name: max(share, better[name]) for name, share in found.items()}
        found = {name: share for name, share in found.items() if share < LEAST}
    return found


# --- where it ran --------------------------------------------------------------------------------


def environment(threads: int) -> dict:
    """Return what is recorded of the machine and of what ran."""
    names = ("numpy", "numba", "gguf")
    return {
        "threads": threads,
        "clock": "processor" if threads == 1 else "wall",
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "commit": _commit(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _cpu_model() -> str:
    try:
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        here = Path(__file__).parent
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
