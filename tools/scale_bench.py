"""What a conversion on workers costs as the file grows: time, memory, and the scheduler's tasks."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

import tbq

from . import bench_report, console

if TYPE_CHECKING:
    from distributed import Client

WIDTH = 4096
TENSOR_VALUES = 1 << 24
TILE_ROWS = 256
SIZES = (1 << 20, 50_000_000, 250_000_000, 1_000_000_000)
TYPE = "tbq3_0"
IN_FLIGHT = 512  # tasks of the scheduler's case


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="scale_bench",
        description="Convert synthetic f16 models of growing size in this process and on workers, "
        "compare the bytes, and record time and the workers' peak memory; then count how many "
        "tasks without work the scheduler takes per second.",
        epilog=console.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workers", metavar="N", type=int, default=2, help="processes; default 2")
    add("--values", metavar="N", type=int, nargs="*", default=SIZES, help="sizes of the models")
    add("--tasks", metavar="N", type=int, default=5000, help="tasks for the scheduler")
    add("--folder", metavar="DIR", help="where the models are made and removed again")
    add("--out", metavar="FILE", help="append one JSON line per case to FILE")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return console.run(build_parser(), bench, argv)


def bench(args: argparse.Namespace) -> int:
    """Measure, print, and append the records to a file."""
    environment = bench_report.environment(args.workers)
    equal = True
    for record in _records(args):
        equal &= record.get("equal", True)
        print(json.dumps(record))
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(record | environment) + "\n")
    return console.OK if equal else console.FAILED


def _records(args: argparse.Namespace) -> Iterator[dict]:
    for n in args.values:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            source = Path(folder) / "in.gguf"
            make_model(source, n)
            here, there = (_conversion(source, w) for w in (None, args.workers))
        equal = here.pop("sha256") == there.pop("sha256")
        yield {"case": "one process", **here}
        yield {"case": "workers", "workers": args.workers, "equal": equal, **there}
    yield _scheduler(args)


def make_model(path: Path, n_values: int) -> None:
    """Write about so many f16 values: tensors of rows of 4096, of a few repeated tiles."""
    from gguf_io import OutputTensor, resolve_type, write_gguf

    rows = max(1, n_values // WIDTH)
    most = TENSOR_VALUES // WIDTH
    tile = np.random.default_rng(0).standard_normal((TILE_ROWS, WIDTH)).astype(np.float16)
    kind = resolve_type("f16")

    def tensor(i: int) -> OutputTensor:
        n = min(most, rows - i * most)
        starts = range(0, n, TILE_ROWS)
        return OutputTensor(
            f"blk.{i}.ffn_up.weight",
            (n, WIDTH),
            kind,
            kind.row_bytes(WIDTH) * n,
            lambda: (np.roll(tile, i, axis=1)[: min(TILE_ROWS, n - start)] for start in starts),
        )

    tensors = [tensor(i) for i in range(-(-rows // most))]
    write_gguf(path, {"general.architecture": "llama"}, tensors)


def _conversion(source: Path, workers: int | None) -> dict:
    """Convert a model and return what that took."""
    from gguf_io import open_gguf, resolve_type
    from gguf_io.convert import plan_model, write_model
    from gguf_io.distributed import connected
    from gguf_io.type_policy import Options

    output = source.with_name("out.gguf")
    target = resolve_type(TYPE)
    with contextlib.ExitStack() as stack:
        client = None if workers is None else stack.enter_context(connected(workers))
        if client is not None:
            client.wait_for_workers(workers)
            client.run(_warm_up)
        else:
            _warm_up()
        file = stack.enter_context(open_gguf(source))
        outcomes = plan_model(file, Options(target=target, pure=True))
        began, cpu = time.perf_counter(), _cpu_seconds(client)
        write_model(file, outcomes, [output], target, client=client, threads=1)
        seconds, cpu = time.perf_counter() - began, _cpu_seconds(client) - cpu
        peaks = {} if client is None else client.run(peak_bytes)
    values = sum(outcome.tensor.n_values for outcome in outcomes)
    with open(output, "rb") as written:
        digest = _digest(written)
    return {
        "type": TYPE,
        "values": values,
        "tasks": sum(1 for outcome in outcomes for _ in outcome.steps()),
        "seconds": seconds,
        "ns_per_value": 1e9 * seconds / values,
        "cpu_ns_per_value": 1e9 * cpu / values,
        "worker_peak_bytes": max(peaks.values(), default=None),
        "own_peak_bytes": peak_bytes(),
        "sha256": digest,
    }


def _cpu_seconds(client: Client | None) -> float:
    """Return the processor time of this process and of all workers."""
    return time.process_time() + sum(client.run(time.process_time).values() if client else ())


def _warm_up() -> None:
    """Have a process compile, or load, what it needs: a long run does not notice that."""
    from gguf_io import resolve_type

    x = np.zeros((1, WIDTH), np.float16)
    tbq.quantize(tbq.dequantize(x.view(np.uint8), resolve_type("f16")), TYPE)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 24):
        digest.update(piece)
    return digest.hexdigest()


def peak_bytes() -> int | None:
    """Return the most memory that this process ever had resident; Linux only."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return None


def _scheduler(args: argparse.Namespace) -> dict:
    """Return how many tasks per second go through when they do nothing."""
    from gguf_io import distributed

    distributed.TASKS_PER_THREAD = IN_FLIGHT // args.workers  # as if there were more of them
    with distributed.connected(args.workers) as client:
        client.wait_for_workers(args.workers)
        numbers = iter(range(args.tasks))
        began, cpu = time.perf_counter(), time.process_time()
        needs = distributed.Needs.of()
        found = distributed.results(client, abs, lambda: next(numbers, None), needs)
        n = sum(1 for _ in found)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "case": "scheduler",
        "tasks": n,
        "seconds": seconds,
        "tasks_per_s": n / seconds,
        "client_and_scheduler_cpu_ms_per_task": 1e3 * cpu / n,
    }


if __name__ == "__main__":
    sys.exit(main())
