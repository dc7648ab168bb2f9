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
from tbq.errors import InputError

from . import console

VALUES = 4 << 20
WARM_UPS = 2
CHECKED_BLOCKS = 64


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
    add("--rows", metavar="N,N", default="256,4096", help="row lengths; default 256,4096")
    add("--threads", metavar="N", type=int, default=1, help="worker threads; default 1")
    add("--rounds", metavar="N", type=int, default=9, help="timed runs per case; default 9")
    add("--out", metavar="FILE", help="append one JSON line per case to FILE")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return console.run(build_parser(), bench, argv)


def bench(args: argparse.Namespace) -> int:
    """Measure, print a table, and append the records to a file."""
    formats = [tbq.get_format(name) for name in args.formats] or list(tbq.formats())
    try:
        lengths = [int(text) for text in args.rows.split(",")]
    except ValueError:
        raise InputError("--rows", args.rows, "row lengths such as 256,4096") from None
    if args.rounds < 1 or args.threads < 1:
        raise InputError("--rounds, --threads", f"{args.rounds}, {args.threads}", "at least 1")
    wrong = [fmt.key for fmt in formats if not _is_exact(fmt)]
    if wrong:
        print(f"tbq-bench: error: not exact, not timed: {', '.join(wrong)}", file=sys.stderr)
        return console.FAILED
    environment = _environment(args.threads)
    head = f"{'case':<34}{'row':>6}{'Mvalues/s':>11}{'min':>8}{'max':>8}{'x Q4_0':>8}{'x copy':>8}"
    print(head)
    for n in lengths:
        cases = _cases(formats, n, args.threads)
        seconds = _time(cases, args.rounds)
        for name, times in seconds.items():
            record = _record(name, n, times, seconds) | environment
            print(
                f"{name:<34}{n:>6}{record['mvalues_per_s']:>11.1f}{record['min']:>8.1f}"
                f"{record['max']:>8.1f}{record['ratio_to_gguf_q4_0']:>8.2f}"
                f"{record['ratio_to_copy']:>8.3f}"
            )
            if args.out:
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    return console.OK


def _is_exact(fmt: tbq.Format) -> bool:
    """Compare the kernels with the specification on a few blocks."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((CHECKED_BLOCKS, fmt.block_values)).astype(np.float32)
    blocks = fmt.quantize_ref(fmt, x, fmt.block_indices(CHECKED_BLOCKS, 1))
    packed = blocks.view(np.uint8).reshape(CHECKED_BLOCKS, fmt.block_bytes)
    same = np.array_equal(tbq.quantize(x, fmt), packed)
    y = fmt.dequantize_ref(fmt, blocks)
    return same and tbq.dequantize(packed, fmt).tobytes() == y.tobytes()


def _cases(formats: list[tbq.Format], n: int, threads: int) -> dict[str, Callable[[], object]]:
    import gguf

    x = np.random.default_rng(0).standard_normal((VALUES // n, n)).astype(np.float32)
    copy = np.empty_like(x)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    packed_q4_0 = gguf.quantize(x, q4_0)
    cases: dict[str, Callable[[], object]] = {
        "copy": lambda: np.copyto(copy, x),
        "gguf-py q4_0 quantize": lambda: gguf.quantize(x, q4_0),
        "gguf-py q4_0 dequantize": lambda: gguf.dequantize(packed_q4_0, q4_0),
    }
    for fmt in formats:
        if n % fmt.block_values:
            continue
        packed, y = tbq.quantize(x, fmt), np.empty_like(x)
        encode = {"fmt": fmt, "out": packed, "threads": threads}
        decode = {"fmt": fmt, "out": y, "threads": threads}
        cases[f"{fmt.key} quantize"] = lambda kw=encode: tbq.quantize(x, **kw)
        cases[f"{fmt.key} dequantize"] = lambda p=packed, kw=decode: tbq.dequantize(p, **kw)
    return cases


def _time(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(WARM_UPS + rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if i >= WARM_UPS:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _record(name: str, n: int, times: list[float], seconds: dict[str, list[float]]) -> dict:
    verb = name.rpartition(" ")[2]
    peer = f"gguf-py q4_0 {verb}"
    median = statistics.median(times)
    return {
        "case": name,
        "row": n,
        "mvalues_per_s": VALUES / median / 1e6,
        "min": VALUES / max(times) / 1e6,
        "max": VALUES / min(times) / 1e6,
        "float_gb_per_s": 4 * VALUES / median / 1e9,
        "ratio_to_gguf_q4_0": statistics.median(seconds.get(peer, times)) / median,
        "ratio_to_copy": statistics.median(seconds["copy"]) / median,
        "rounds": len(times),
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
