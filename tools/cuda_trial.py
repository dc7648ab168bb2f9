"""What `tbq-cuda-check` does with one format, in a process of its own.

`python -m tools.cuda_trial` reads a line of JSON per format and answers with one. Kernels are
compiled and the oracle asked side by side with other processes; what runs on the device runs alone,
under a lock, so that times mean something.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import tbq

VECTORS = Path(__file__).parents[1] / "tests" / "vectors"
ROW = 1024  # values, or the next multiple of a format's group
SPECIALS = (0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-42, -1e-20, 65504.0, 1e30, 3e38)
LEAST_SECONDS = 0.02  # of a timed burst of launches
BLOCKS_SEARCHED = 4096
MORE_KEYS = 4  # times the rows, for attention, whose sums are less parallel


def main() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = trial(request)
        except BaseException as error:  # a failure is a result too; the parent starts another
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
            answer["traceback"] = traceback.format_exc()[-1500:]
        print(json.dumps({"format": request["format"], **answer}), flush=True)
        if "error" in answer:  # the device may be in a state in which nothing else works
            sys.exit(1)


@contextlib.contextmanager
def alone(path: str) -> Iterator[None]:
    """Hold the lock of the device."""
    import fcntl

    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def variant_of(label: str) -> tbq.Format:
    """Return the format, or the variant of one, with a label."""
    for fmt in tbq.formats():
        for variant in fmt.variants():
            if variant.label == label:
                return variant
    return next(tbq.get_format(label).variants())


def trial(request: dict) -> dict:
    """Check a format, and time it if a number of values says so."""
    fmt, started = variant_of(request["format"]), time.perf_counter()
    simulated = request["simulated"]
    compiled = {} if simulated else compile_all(fmt)
    cases = list(all_cases(fmt, simulated))
    prepared = time.perf_counter()
    with alone(request["lock"]):
        checks, took = {}, time.perf_counter()
        for name, run, expected, differ in cases:
            wrong = differ(run(), expected)
            checks[name] = {"wrong": len(wrong), "of": int(expected.size)}
            if len(wrong):
                checks[name]["first"] = int(wrong[0])
        timings = {}
        if request["values"] and not any(check["wrong"] for check in checks.values()):
            timings = times(fmt, request["values"], request["copy_gb_s"], simulated)
    return {
        "exact": not any(check["wrong"] for check in checks.values()),
        "checks": checks,
        "timings": timings,
        "kernels": compiled,
        "seconds": {"prepared": prepared - started, "on_device": time.perf_counter() - took},
    }


# --- compiled kernels ----------------------------------------------------------------------------


def compile_all(fmt: tbq.Format) -> dict:
    """Compile every kernel for this device; returns what each takes, and how many fit."""
    from numba import cuda, types

    from cuda_port.port import kernels_of
    from cuda_port.signatures import argument_types

    context, found = cuda.current_context(), {}
    for operation, kernel in kernels_of(fmt):
        start = time.perf_counter()
        compiled = kernel.function.compile(types.void(*argument_types(kernel)))
        row = {"seconds": time.perf_counter() - start, "threads": kernel.threads}
        for name in ("regs_per_thread", "shared_mem_per_block", "local_mem_per_thread"):
            row[name] = getattr(compiled, name, None)
        with contextlib.suppress(Exception):  # a private way to the driver's own figure
            function = compiled._codelibrary.get_cufunc()
            count = context.get_active_blocks_per_multiprocessor(function, kernel.threads, 0)
            row["warps_per_multiprocessor"] = count * kernel.threads // 32
        found[operation] = row
    return found


# --- checks --------------------------------------------------------------------------------------


def inputs(fmt: tbq.Format, simulated: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yield float32 rows: ordinary ones whose blocks of threads have tails, and unusual ones."""
    rng, n = np.random.default_rng(7), fmt.group_values
    slow = fmt.codec.searches
    rows, groups = (1, 1) if simulated else (2, 1) if slow else (67, 3)
    yield "normal", rng.standard_normal((rows, groups * n)).astype(np.float32)
    if simulated:
        return
    x = rng.standard_normal((4 if slow else len(SPECIALS), n)).astype(np.float32)
    for row, value in zip(x, SPECIALS[:: 3 if slow else 1], strict=False):
        row[rng.integers(n, size=2)] = value
    yield "special values", x
    scaled = rng.standard_normal((3 if slow else 9, n))
    scaled *= 10.0 ** np.linspace(-30, 30, len(scaled))[:, None]
    yield "scales", scaled.astype(np.float32)
    ties = np.round(2 * rng.standard_normal((3, n))).astype(np.float32)
    ties[0] = 0
    ties[1, 1:] = 0
    yield "zeros and ties", ties


def all_cases(fmt: tbq.Format, simulated: bool) -> Iterator[tuple[str, Callable, Any, Callable]]:
    """Yield (name, what runs on the device, what it should return, where two differ)."""
    import cuda_port
    from cuda_port.compare import wrong_bytes, wrong_values

    def bytes_differ(found, expected):
        return wrong_bytes(fmt, found, expected)

    def encode(x):
        return lambda: cuda_port.quantize(x, fmt)

    def decode(packed):
        return lambda: cuda_port.dequantize(packed, fmt)

    from tbq.families.trellis import Trellis

    encodes = not (simulated and isinstance(fmt.codec, Trellis))  # 65536 states are too many
    for name, x in inputs(fmt, simulated):
        if encodes:
            yield f"quantize {name}", encode(x), tbq.quantize(x, fmt), bytes_differ
    rng = np.random.default_rng(3)
    rows, groups = (1, 1) if simulated else (131, 3)
    width = fmt.row_bytes(groups * fmt.group_values)
    packed = rng.integers(0, 256, (rows, width), dtype=np.uint8)
    blocks = packed.view(fmt.block)
    if fmt.layout.outliers:
        blocks[fmt.layout.outliers[0]] %= fmt.block_values
    yield "dequantize random bytes", decode(packed), tbq.dequantize(packed, fmt), wrong_values
    codes = packed.copy()
    for name in fmt.layout.scales:
        codes.view(fmt.block)[name] = np.float16(0.37)
    yield "dequantize random codes", decode(codes), tbq.dequantize(codes, fmt), wrong_values
    yield from vector_cases(fmt, encodes, simulated)
    yield from attention_cases(fmt, codes, simulated)


def vector_cases(fmt: tbq.Format, encodes: bool, simulated: bool):
    """Yield what the fork's own code made of the vectors, where the repository has them."""
    import cuda_port
    from cuda_port.compare import wrong_values

    release = f"@{fmt.release}" if fmt.release else ""
    choice = f".{fmt.choice.replace('=', '')}" if fmt.choice else ""
    whole = VECTORS / fmt.dialect / f"{fmt.name}{release}{choice}.npz"
    for path in [whole] if whole.exists() else []:
        with np.load(path) as file:
            v = {key: file[key] for key in file.files}
        some = slice(0, 1 if simulated else 32 if fmt.codec.searches else None)
        x, expected = np.ascontiguousarray(v["x"][some]), v["packed"][some]
        written = ~v["undefined"][some] if "undefined" in v else np.ones(expected.shape, bool)
        if encodes and not simulated:

            def differ(found, expected, written=written):
                return np.flatnonzero((found != expected) & written)

            yield "quantize vectors", lambda x=x: cuda_port.quantize(x, fmt), expected, differ
        if "y" in v:
            packed = np.ascontiguousarray(expected)
            y = np.ascontiguousarray(v["y"][some])

            def decode(packed=packed):
                return cuda_port.dequantize(packed, fmt)

            yield "dequantize vectors", decode, y, wrong_values


def attention_cases(fmt: tbq.Format, packed: np.ndarray, simulated: bool):
    """Yield scores and weighted sums: several sets, signs of rows that differ, several runs."""
    import cuda_port
    from cuda_port.compare import wrong_values

    rng, rows = np.random.default_rng(5), len(packed)
    n = fmt.row_values(packed.shape[1])
    if "K" in fmt.side and not fmt.sibling:
        q = rng.standard_normal((1 if simulated else 6, n)).astype(np.float32)

        def scores(packed):
            return lambda: cuda_port.scores(q, packed, fmt)

        yield "scores", scores(packed), tbq.scores(q, packed, fmt), wrong_values
        if fmt.layout.signs:
            same = packed.copy()
            same.view(fmt.block)[fmt.layout.signs][1:] = packed.view(fmt.block)[fmt.layout.signs][
                :1
            ]
            yield "scores, one sign", scores(same), tbq.scores(q, same, fmt), wrong_values
    if "V" in fmt.side:
        keys = rows if simulated else 1300  # three runs
        longer = np.ascontiguousarray(np.resize(packed, (keys, packed.shape[1])))
        p = rng.random((1 if simulated else 6, keys), dtype=np.float32)

        def total():
            return cuda_port.weighted_sum(p, longer, fmt)

        yield "weighted_sum", total, tbq.weighted_sum(p, longer, fmt), wrong_values


# --- times ---------------------------------------------------------------------------------------


def seconds(launch: Callable[[], object], simulated: bool = False) -> float:
    """Return the median seconds of a launch, by events around bursts of them."""
    from numba import cuda

    launch()
    if simulated:
        start = time.perf_counter()
        launch()
        return time.perf_counter() - start
    cuda.synchronize()

    def burst(count: int) -> float:
        first, last = cuda.event(), cuda.event()
        first.record()
        for _ in range(count):
            launch()
        last.record()
        last.synchronize()
        return cuda.event_elapsed_time(first, last) / 1e3 / count

    count = max(1, int(LEAST_SECONDS / max(burst(1), 1e-7)))
    return statistics.median(burst(count) for _ in range(5))


def copy_rate(values: int, simulated: bool) -> float:
    """Return how fast the device copies float32 values, bytes read and written, GB/s."""
    from numba import cuda

    x, y = (cuda.to_device(np.zeros(values, np.float32)) for _ in range(2))
    return 8 * values / seconds(lambda: y.copy_to_device(x), simulated) / 1e9


def times(fmt: tbq.Format, values: int, copy: float, simulated: bool) -> dict:
    """Return the times of all operations on rows in buffers that are there before."""
    from numba import cuda

    import cuda_port
    from cuda_port import api
    from cuda_port.port import port_of, value_decoder
    from tbq.families.trellis import Trellis

    rng, group = np.random.default_rng(1), fmt.group_values
    n = group if simulated else -(-ROW // group) * group
    rows = max(1, values // n) | 1  # odd, so that the last block of threads has a tail
    few = rng.standard_normal((1 if simulated else 8, n)).astype(np.float32)
    packed = tbq.quantize(few, fmt)
    stored = cuda.to_device(np.resize(packed, (rows, packed.shape[1])))
    x = cuda.to_device(np.resize(few, (rows, n)))
    found, port = {}, port_of(fmt.codec)

    def add(name: str, launch: Callable, n_bytes: int, n_values: int) -> None:
        taken = seconds(launch, simulated)
        rate = n_bytes / taken / 1e9
        found[name] = {"seconds": taken, "gb_s": rate, "of_copy": rate / copy}
        found[name] |= {
            "values_s": n_values / taken,
            "blocks_s": n_values / taken / fmt.block_values,
        }

    decoder, y = value_decoder(fmt.codec), cuda.device_array((rows, n), np.float32)
    both = 4 * rows * n + stored.size
    add("dequantize", lambda: api._decode(decoder, stored, y, 0), both, rows * n)
    if not (simulated and isinstance(fmt.codec, Trellis)):
        count = min(rows, BLOCKS_SEARCHED * fmt.block_values // n) if fmt.codec.searches else rows
        source, target = x[:count], stored[:count]
        launch = partial(api._encode, port.encoder, source, n // group, target, 0)
        add("quantize", launch, both * count // rows, count * n)
    rows *= 1 if simulated else MORE_KEYS
    stored = cuda.to_device(np.resize(packed, (rows, packed.shape[1])))
    for sets in (1, 4):
        if "K" in fmt.side and not fmt.sibling:
            q = cuda.to_device(rng.standard_normal((sets, n)).astype(np.float32))
            s = cuda.device_array((sets, rows), np.float32)
            launch = partial(cuda_port.scores, q, stored, fmt, out=s)
            add(f"scores of {sets}", launch, stored.size, rows * n * sets)
        if "V" in fmt.side:
            p = cuda.to_device(rng.random((sets, rows), dtype=np.float32))
            o = cuda.device_array((sets, n), np.float32)
            launch = partial(cuda_port.weighted_sum, p, stored, fmt, out=o)
            add(f"weighted_sum of {sets}", launch, stored.size, rows * n * sets)
    return found


if __name__ == "__main__":
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        from cuda_port import attention, tiles

        tiles.MOST_THREADS, attention.THREADS = 4, 8  # threads cost the simulator most
    main()
