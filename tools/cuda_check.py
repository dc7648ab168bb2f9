"""tbq-cuda-check: the GPU port against the CPU oracle, and how fast it is, as a JSON report."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import cuda_port
import tbq
from tbq.errors import InputError

from . import console

SCHEMA = "tbq-cuda-check/1"
ROW = 1024  # values, or the next multiple of a format's group
CHECKED_ROWS = 64
QUERIES = 4


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="tbq-cuda-check",
        description="Check every ported format on a CUDA device against the CPU, to the bit, then "
        "time it beside a device copy in the same process.",
        epilog=console.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("formats", metavar="FORMAT", nargs="*", help="default: all that are ported")
    rows = "rows of 1024 values or a little more; default 65536"
    add("--rows", metavar="N", type=int, default=1 << 16, help=rows)
    add("--rounds", metavar="N", type=int, default=9, help="timed rounds; default 9")
    add("--out", metavar="JSON", help="write the report here too")
    add("--json", action="store_true", help="print the report instead of a table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return console.run(build_parser(), check, argv)


def check(args: argparse.Namespace) -> int:
    """Check and time every format; returns the exit code."""
    if args.rows < 1 or args.rounds < 1:
        raise InputError("--rows, --rounds", f"{args.rows}, {args.rounds}", "at least 1")
    cuda_port.require_device()
    from cuda_port import api

    chosen = [tbq.get_format(name) for name in args.formats] or tbq.formats()
    formats = [variant for fmt in chosen for variant in fmt.variants()]
    if not args.formats:
        formats = [fmt for fmt in formats if api.ported(fmt)]
    clock = _Clock(args.rounds)
    copy = _device_copy(args.rows, clock)
    results = []
    for fmt in formats:
        result = _one(fmt, args.rows, clock)
        results.append(result)
        if not args.json:
            print(_line(result, copy))
    report = {
        "schema": SCHEMA,
        "device": _device(),
        "rows": args.rows,
        "row_values": ROW,
        "device_copy_gb_s": copy,
        "formats": results,
    }
    if args.out:
        from gguf_io import AtomicFiles

        with AtomicFiles() as output:
            output.create(Path(args.out)).write(json.dumps(report, indent=1).encode() + b"\n")
    if args.json:
        console.print_json(report)
    return console.OK if all(r["exact"] for r in results) else console.FAILED


def _line(result: dict, copy: float) -> str:
    text = f"{result['format']:<20}{'exact' if result['exact'] else 'WRONG':<7}"
    for name, timing in result["timings"].items():
        text += f"{name} {timing['gb_s']:.1f} GB/s ({timing['gb_s'] / copy:.0%} of a copy)  "
    return text.rstrip()


class _Clock:
    """Medians of a few rounds, each long enough to time."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def seconds(self, launch: Callable[[], object]) -> float:
        """Return the median time of a launch, synchronised, after a warm-up."""
        from numba import cuda

        launch()
        cuda.synchronize()
        times = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            launch()
            cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def _device() -> dict:
    from numba import cuda

    current = getattr(cuda, "get_current_device", None)  # Numba's own simulator has none
    device = current() if current else None
    name = getattr(device, "name", b"simulator")
    return {
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "compute_capability": list(getattr(device, "compute_capability", ())),
        "multiprocessors": getattr(device, "MULTIPROCESSOR_COUNT", None),
    }


def _device_copy(rows: int, clock: _Clock) -> float:
    """Return how fast the device copies float32 rows, bytes read and written, GB/s."""
    from numba import cuda

    x = cuda.to_device(np.zeros(rows * ROW, np.float32))
    y = cuda.device_array_like(x)
    return 2 * 4 * rows * ROW / clock.seconds(lambda: y.copy_to_device(x)) / 1e9


def _one(fmt: tbq.Format, rows: int, clock: _Clock) -> dict:
    from numba import cuda

    rng = np.random.default_rng(1)
    n = -(-ROW // fmt.group_values) * fmt.group_values
    # a trellis search is milliseconds of work per block on the CPU, which has to agree
    searches = fmt.codec.searches
    checked = rng.standard_normal((max(1, CHECKED_ROWS // (16 if searches else 1)), n))
    x = checked.astype(np.float32)
    packed = tbq.quantize(x, fmt)
    checks = {"quantize": np.array_equal(cuda_port.quantize(x, fmt), packed)}
    y = tbq.dequantize(packed, fmt)
    checks["dequantize"] = np.array_equal(cuda_port.dequantize(packed, fmt), y)
    q = rng.standard_normal((QUERIES, n)).astype(np.float32)
    p = rng.random((QUERIES, len(x)), dtype=np.float32)
    if "K" in fmt.side and not fmt.sibling:
        expected = tbq.scores(q, packed, fmt)
        checks["scores"] = np.array_equal(cuda_port.scores(q, packed, fmt), expected)
    if "V" in fmt.side:
        expected = tbq.weighted_sum(p, packed, fmt)
        checks["weighted_sum"] = np.array_equal(cuda_port.weighted_sum(p, packed, fmt), expected)
    exact = all(checks.values())
    timings = {}
    if exact:  # a wrong kernel is not timed
        few = max(1, rows // 64) if searches else rows
        source = cuda.to_device(np.resize(x, (few, n)))
        stored = cuda.to_device(np.resize(packed, (rows, packed.shape[1])))
        n_bytes = (4 * n + packed.shape[1]) * rows
        seconds = clock.seconds(lambda: cuda_port.quantize(source, fmt))
        blocks = few * n // fmt.block_values
        timings["quantize"] = _timing(seconds, n_bytes * few // rows, few * n, blocks)
        seconds = clock.seconds(lambda: cuda_port.dequantize(stored, fmt))
        timings["dequantize"] = _timing(seconds, n_bytes, rows * n, rows * n // fmt.block_values)
        weights = rng.random((QUERIES, rows), dtype=np.float32)
        attention = {
            "scores": lambda: cuda_port.scores(q, stored, fmt),
            "weighted_sum": lambda: cuda_port.weighted_sum(weights, stored, fmt),
        }
        for name in attention.keys() & checks.keys():  # bytes of the packed rows alone
            seconds = clock.seconds(attention[name])
            blocks = stored.size // fmt.block_bytes
            timings[name] = _timing(seconds, stored.size, rows * n, blocks)
    return {"format": fmt.label, "exact": exact, "checks": checks, "timings": timings}


def _timing(seconds: float, n_bytes: int, values: int, blocks: int) -> dict:
    return {
        "seconds": seconds,
        "gb_s": n_bytes / seconds / 1e9,
        "mvalues_s": values / seconds / 1e6,
        "blocks_s": blocks / seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
