"""tbq-bench: speed of every format beside gguf-py's Q4_0 and a memory copy, in one process."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

import tbq
from tbq.api import index_step
from tbq.errors import InputError

from . import console

VALUES = 4 << 20
SECONDS = 1.0  # a case that would take longer gets fewer rows, and so does a check
WARM_UPS = 2
CHECKED_ROWS = 64


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="tbq-bench",
        description="Time quantisation and dequantisation of 4 Mi float32 values. Every kernel is "
        "compared with its specification first, and not timed if it differs. The cases of a round "
        "run one after the other, so that ratios survive a noisy machine.",
        epilog=console.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("formats", metavar="FORMAT", nargs="*", help="default: all registered formats")
    add("--rows", metavar="N,N", default="256,1024,4096", help="row lengths; default 256,1024,4096")
    add("--threads", metavar="N", type=int, default=1, help="worker threads; default 1")
    add("--rounds", metavar="N", type=int, default=9, help="timed runs per case; default 9")
    add("--out", metavar="FILE", help="append one JSON line per case to FILE")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return console.run(build_parser(), bench, argv, lists=lambda args: not args.out)


def bench(args: argparse.Namespace) -> int:
    """Measure, print a table, and append the records to a file."""
    chosen = [tbq.get_format(name) for name in args.formats] or tbq.formats()
    formats = [variant for fmt in chosen for variant in fmt.variants()]
    lengths = _lengths(args.rows)
    if args.rounds < 1 or args.threads < 1:
        raise InputError("--rounds, --threads", f"{args.rounds}, {args.threads}", "at least 1")
    if args.out:
        if os.path.exists(args.out) and not os.path.isfile(args.out):  # a FIFO would be waited for
            raise InputError("--out", args.out, "a regular file or a new path")
        open(args.out, "a").close()  # fails now rather than after minutes
    wrong = [fmt.label for fmt in formats if not _is_exact(fmt)]
    if wrong:
        print(f"tbq-bench: error: not exact, not timed: {', '.join(wrong)}", file=sys.stderr)
        return console.FAILED
    environment = _environment(args.threads)
    head = f"{'case':<34}{'row':>6}{'Mvalues/s':>11}{'min':>9}{'max':>9}{'x Q4_0':>8}{'x copy':>8}"
    print(head)
    for n in lengths:
        cases = _cases(formats, n, args.threads)
        speeds = _time(cases, args.rounds)
        for name, (_, values) in cases.items():
            record = _record(name, n, values, speeds) | environment
            print(
                f"{name:<34}{n:>6}{record['mvalues_per_s']:>11.3f}{record['min']:>9.3f}"
                f"{record['max']:>9.3f}{record['ratio_to_gguf_q4_0']:>8.2f}"
                f"{record['ratio_to_copy']:>8.3f}"
            )
            if args.out:
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    return console.OK


def _lengths(text: str) -> list[int]:
    """Parse `--rows`."""
    digits = [part.strip() for part in text.split(",")]
    lengths = [int(part) if part.isdecimal() and len(part) < 10 else 0 for part in digits]
    if not all(0 < n <= VALUES for n in lengths):
        raise InputError("--rows", text[:60], f"row lengths from 1 to {VALUES}, such as 256,4096")
    return lengths


def _is_exact(fmt: tbq.Format) -> bool:
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


# What is timed, and how many values it handles.
Case = tuple[Callable[[], object], int]


def _cases(formats: list[tbq.Format], n: int, threads: int) -> dict[str, Case]:
    import gguf

    x = np.random.default_rng(0).standard_normal((VALUES // n, n)).astype(np.float32)
    copy = np.empty_like(x)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    packed_q4_0 = gguf.quantize(x, q4_0)
    cases: dict[str, Case] = {
        "copy": (lambda: np.copyto(copy, x), x.size),
        "gguf-py q4_0 quantize": (lambda: gguf.quantize(x, q4_0), x.size),
        "gguf-py q4_0 dequantize": (lambda: gguf.dequantize(packed_q4_0, q4_0), x.size),
    }
    for fmt in formats:
        if n % fmt.group_values:
            continue
        some = x[: _affordable_rows(fmt, x)]
        packed = tbq.quantize(some, fmt)
        encode = {"x": some, "fmt": fmt, "out": packed.copy(), "threads": threads}
        repeated = np.resize(packed, (len(x), packed.shape[1]))
        decode = {"packed": repeated, "fmt": fmt, "out": copy, "threads": threads}
        cases[f"{fmt.label} quantize"] = (lambda kw=encode: tbq.quantize(**kw), some.size)
        cases[f"{fmt.label} dequantize"] = (lambda kw=decode: tbq.dequantize(**kw), x.size)
    return cases


def _affordable_rows(fmt: tbq.Format, x: np.ndarray) -> int:
    """Return how many rows one thread quantises in SECONDS, at least one."""
    tbq.quantize(x[:1], fmt)
    began = time.perf_counter()
    tbq.quantize(x[:1], fmt)
    return min(len(x), max(1, int(SECONDS / (time.perf_counter() - began))))


def _time(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Return the speeds of each case, values per second, one per round."""
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(WARM_UPS + rounds):
        for name, (call, values) in cases.items():
            start = time.perf_counter()
            call()
            if i >= WARM_UPS:
                speeds[name].append(values / (time.perf_counter() - start))
    return speeds


def _record(name: str, n: int, values: int, speeds: dict[str, list[float]]) -> dict:
    peer = f"gguf-py q4_0 {name.rpartition(' ')[2]}"
    median = statistics.median(speeds[name])
    return {
        "case": name,
        "row": n,
        "values": values,
        "mvalues_per_s": median / 1e6,
        "min": min(speeds[name]) / 1e6,
        "max": max(speeds[name]) / 1e6,
        "float_gb_per_s": 4 * median / 1e9,
        "ratio_to_gguf_q4_0": median / statistics.median(speeds.get(peer, speeds[name])),
        "ratio_to_copy": median / statistics.median(speeds["copy"]),
        "rounds": len(speeds[name]),
    }


def _environment(threads: int) -> dict:
    names = ("numpy", "numba", "gguf")
    return {
        "threads": threads,
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "commit": _commit(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
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


if __name__ == "__main__":
    sys.exit(main())
