"""tbq-cuda-check: the GPU port against the CPU oracle, and how fast it is, as a JSON report."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cuda_port
import tbq
from tbq.errors import InputError

from . import console

SCHEMA = "tbq-cuda-check/2"
VALUES, QUICK_VALUES, SIMULATED_VALUES = 1 << 26, 1 << 24, 1 << 8
MINUTES, QUICK_MINUTES = 8.0, 1.0
MOST_WORKERS, MOST_SANITIZERS = 12, 6
RESERVED_SECONDS, LEAST_SECONDS = 100, 10  # for what follows the formats
SANITIZERS = ("memcheck", "racecheck", "initcheck")
SANITIZED = ("vtq2_1", "ktq2_1", "tbq3_0", "buun:turbo3", "buun:turbo1_tcq", "vtq2_2", "q8_0")
SANITIZER_SECONDS = 60  # a tool and a format may take
SIMULATED = ("vtq1_1", "ktq1_1", "q4_0")
PACKAGES = ("numba-cuda", "numba", "numpy", "llvmlite", "cuda-bindings", "cupy-cuda13x", "torch")
TRIAL_SECONDS = 240  # that a format may take before it is given up
WIDE_VALUES = (1 << 31) + (1 << 20)  # more than 32 bits count


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="tbq-cuda-check",
        description="Check every ported format on a CUDA device against the CPU and the forks' own "
        "bytes, time it beside a copy on the same device, and report it as JSON, within a budget.",
        epilog=console.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("formats", metavar="FORMAT", nargs="*", help="default: all that are ported")
    add("--quick", action="store_true", help="a format of each kind, in a minute")
    add("--minutes", metavar="N", type=float, help="of time budget; default 8, quick 1")
    add("--values", metavar="N", type=int, help="float32 values that are timed; 0: nothing is")
    add("--workers", metavar="N", type=int, help="processes; default: of processors, at most 12")
    add("--simulate", action="store_true", help="a small run in Numba's simulator, without a GPU")
    add("--out", metavar="JSON", help="write the report here, again after each format")
    add("--json", action="store_true", help="print the report instead of a table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return console.run(build_parser(), check, argv)


def check(args: argparse.Namespace) -> int:
    """Check and time formats; returns the exit code."""
    if (args.minutes or 1) <= 0 or (args.values or 0) < 0 or (args.workers or 1) < 1:
        given = f"{args.minutes}, {args.values}, {args.workers}"
        raise InputError("--minutes, --values, --workers", given, "positive numbers")
    if args.simulate:
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    cuda_port.require_device()
    run = Run(args)
    run.describe()
    run.formats()
    if run.is_whole():
        run.step("wide", wide)
        run.step("other libraries", other_libraries)
        run.sanitize()
    run.finish()
    if args.json:
        console.print_json(run.report)
    return console.OK if run.is_good() else console.FAILED


class Run:
    """One run: what is asked, what is found, and how much time is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        minutes = args.minutes or (QUICK_MINUTES if args.quick else MINUTES)
        self.args, self.start = args, time.monotonic()
        self.end = self.start + 60 * minutes
        values = QUICK_VALUES if args.quick else SIMULATED_VALUES if args.simulate else VALUES
        self.values = values if args.values is None else args.values
        self.folder = tempfile.TemporaryDirectory(prefix="tbq-cuda-check-")
        self.lock = str(Path(self.folder.name, "lock"))
        self.guard = threading.Lock()
        self.report: dict[str, Any] = {"schema": SCHEMA, "minutes": minutes, "finished": False}
        self.report |= {"values": self.values, "formats": [], "not_reached": []}

    def is_whole(self) -> bool:
        """Tell whether all is asked that there is."""
        return not (self.args.quick or self.args.simulate or self.args.formats)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.end - time.monotonic()

    def save(self) -> None:
        """Write the report as it is."""
        self.report["seconds"] = round(time.monotonic() - self.start, 1)
        if self.args.out:
            place = Path(self.args.out)
            fresh = place.with_name(place.name + ".tmp")
            fresh.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
            os.replace(fresh, place)

    def say(self, text: str) -> None:
        """Print a line, if the report is not what is printed."""
        if not self.args.json:
            print(text, flush=True)

    def step(self, name: str, function) -> None:
        """Do what is no format's, and report what it returns, or why it failed."""
        if self.left < 30:
            self.report["not_reached"].append(name)
            return
        try:
            self.report[name] = function()
        except Exception as error:
            self.report[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
        self.say(f"{name}: {self.report[name]}")
        self.save()

    def describe(self) -> None:
        """Report the device, its clocks, versions, and how fast it copies."""
        self.report["device"] = device()
        self.report["versions"] = versions()
        self.report["clocks"] = clocks()
        from .cuda_trial import copy_rate

        self.report["device_copy_gb_s"] = copy_rate(max(1, self.values), self.args.simulate)
        self.save()

    def chosen(self) -> list[str]:
        """Return the labels of what is checked: those of a family side by side."""
        from cuda_port import api

        if self.args.formats:
            given = [tbq.get_format(name) for name in self.args.formats]
        elif self.args.simulate:
            given = [tbq.get_format(name) for name in SIMULATED]
        else:
            given = list(tbq.formats())
        variants = [variant for fmt in given for variant in fmt.variants()]
        ported = [fmt for fmt in variants if api.ported(fmt)]
        if self.args.formats and len(ported) < len(variants):
            missing = next(fmt.label for fmt in variants if not api.ported(fmt))
            raise InputError("FORMAT", missing, "a format that is ported")
        if self.args.quick:
            kinds = {(type(f.codec), f.codec.group_values): f for f in reversed(ported)}
            ported = list(kinds.values())
        ported.sort(key=lambda fmt: type(fmt.codec).__module__)
        return [fmt.label for fmt in ported]

    def formats(self) -> None:
        """Check all formats, in several processes."""
        waiting: queue.Queue[str] = queue.Queue()
        labels = self.chosen()
        for label in labels:
            waiting.put(label)
        count = self.args.workers or min(MOST_WORKERS, os.cpu_count() or 1, len(labels))
        threads = [
            threading.Thread(target=self.work, args=(waiting,), daemon=True) for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while not waiting.empty():
            self.report["not_reached"].append(waiting.get())
        self.save()

    def work(self, waiting: queue.Queue) -> None:
        """Hand formats to a process of its own, a new one after each failure."""
        worker = Worker()
        while self.left > (RESERVED_SECONDS if self.is_whole() else LEAST_SECONDS):
            try:
                label = waiting.get_nowait()
            except queue.Empty:
                break
            request = {"format": label, "lock": self.lock, "values": self.values}
            request |= {"simulated": self.args.simulate}
            request |= {"copy_gb_s": self.report["device_copy_gb_s"]}
            result = worker.ask(request, min(TRIAL_SECONDS, max(1.0, self.left)))
            with self.guard:
                self.report["formats"].append(result)
                self.save()
                self.say(line(result))
        worker.close()

    def sanitize(self) -> None:
        """Run compute-sanitizer's tools on a few formats side by side, as far as time allows."""
        program = shutil.which("compute-sanitizer")
        self.report["sanitizer"] = {} if program else "not installed"
        pairs = [(tool, label) for tool in SANITIZERS for label in SANITIZED] if program else []
        with ThreadPoolExecutor(min(MOST_SANITIZERS, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda pair: self.run_tool(program, *pair), pairs))

    def run_tool(self, program: str, tool: str, label: str) -> None:
        """Report what one tool says of one format, if there is time."""
        name = f"{tool} {label}"
        said = self.sanitized(program, tool, label) if self.left > 20 else None
        with self.guard:
            if said is None:
                self.report["not_reached"].append(name)
            else:
                self.report["sanitizer"][name] = said
                self.say(f"{name}: {said}")
            self.save()

    def sanitized(self, program: str, tool: str, label: str) -> str:
        """Return what one tool says of one format."""
        request = {"format": label, "lock": self.lock, "values": 0, "simulated": False}
        request |= {"copy_gb_s": 1.0}
        command = [program, "--tool", tool, "--error-exitcode", "9", *TRIAL]
        try:
            ran = subprocess.run(
                command,
                input=json.dumps(request) + "\n",
                capture_output=True,
                text=True,
                timeout=min(SANITIZER_SECONDS, max(1.0, self.left)),
            )
        except subprocess.TimeoutExpired:
            return "ran out of time"
        said = re.findall(r"=========.*SUMMARY.*", ran.stdout + ran.stderr)
        return f"exit {ran.returncode}; {said[-1].strip('= ') if said else ran.stderr[-200:]}"

    def finish(self) -> None:
        """Note that nothing was cut short."""
        self.report["clocks_after"] = clocks()
        self.report["finished"] = not self.report["not_reached"]
        self.save()
        results = self.report["formats"]
        right = sum(result.get("exact", False) for result in results)
        self.say(f"{right} of {len(results)} exact; not reached: {len(self.report['not_reached'])}")

    def is_good(self) -> bool:
        """Tell whether all that was reached is exact, and no tool found a fault."""
        said = self.report.get("sanitizer")
        clean = not isinstance(said, dict) or not any("exit 9" in text for text in said.values())
        failed = any("error" in (self.report.get(name) or {}) for name in ("wide",))
        exact = all(result.get("exact", False) for result in self.report["formats"])
        return exact and clean and not failed and bool(self.report["formats"])


TRIAL = (sys.executable, "-W", "ignore", "-m", f"{__package__}.cuda_trial")


class Worker:
    """A process that answers a line of JSON with one."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.errors: Any = None

    def ask(self, request: dict, timeout: float) -> dict:
        """Return the answer, or an error if there is none in time."""
        if self.process is None:
            self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                TRIAL, stdin=pipe, stdout=pipe, stderr=self.errors, text=True
            )
        process = self.process
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        timer.cancel()
        if answer:
            result = json.loads(answer)
        else:
            process.wait()
            result = {"format": request["format"], "exact": False}
            self.errors.seek(0)
            reason = self.errors.read()[-400:] or f"none within {timeout:.0f} s"
            result["error"] = f"no answer, exit {process.returncode}: {reason}"
        if "error" in result:
            self.close()
        return result

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.kill()
            self.process.wait()
            self.errors.close()
            self.process = None


def line(result: dict) -> str:
    """Return a line about a format."""
    name = f"{result['format']:<28}"
    if "error" in result:
        return f"{name}FAILED {result['error'][:120]!r}"
    wrong = [check for check, found in result["checks"].items() if found["wrong"]]
    text = f"{name}exact " if not wrong else f"{name}WRONG {', '.join(wrong)} "
    for operation, timing in result["timings"].items():
        text += f" {operation} {timing['gb_s']:.0f} GB/s ({timing['of_copy']:.0%})"
    return text.rstrip()


# --- the machine ---------------------------------------------------------------------------------


def device() -> dict:
    """Return what the driver says of the device."""
    from numba import cuda

    from cuda_port import arrays

    current = getattr(cuda, "get_current_device", None)  # Numba's own simulator has none
    found = current() if current else None
    name = getattr(found, "name", b"simulator")
    free = arrays.free_bytes()
    described = {
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "compute_capability": list(getattr(found, "compute_capability", ())),
        "multiprocessors": getattr(found, "MULTIPROCESSOR_COUNT", None),
        "free_bytes": free if free != float("inf") else None,
    }
    try:
        described["runtime"] = list(cuda.runtime.get_version())
    except Exception:  # the simulator has no such thing
        described["runtime"] = None
    return described


def versions() -> dict:
    """Return the versions of what matters."""
    found = {"python": platform.python_version(), "tbq": tbq.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def clocks() -> str | None:
    """Return what nvidia-smi says of clocks, limits and driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    command = [program, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


# --- what is no format's -------------------------------------------------------------------------


def wide() -> dict:
    """Decode and encode more than 2^31 values in one array, and compare a few rows of it."""
    import numpy as np
    from numba import cuda

    from cuda_port import arrays

    fmt, n = tbq.get_format("vtq1_1"), 1 << 15
    rows = WIDE_VALUES // n
    need = rows * n * 4 + 3 * rows * fmt.row_bytes(n)
    if need > arrays.free_bytes():
        return {"skipped": f"{need} bytes are needed"}
    few = np.random.default_rng(2).standard_normal((7, n)).astype(np.float32)
    packed = tbq.quantize(few, fmt)
    y = cuda_port.dequantize(cuda.to_device(np.resize(packed, (rows, packed.shape[1]))), fmt)
    decoded = tbq.dequantize(packed, fmt)
    again = cuda_port.quantize(y, fmt)
    expected = tbq.quantize(decoded, fmt)
    wrong = {"dequantize": 0, "quantize": 0}
    for row in (0, rows // 2, (1 << 31) // n - 1, (1 << 31) // n, rows - 1):
        found = y[row : row + 1].copy_to_host()[0], again[row : row + 1].copy_to_host()[0]
        wrong["dequantize"] += int((found[0] != decoded[row % 7]).sum())
        wrong["quantize"] += int((found[1] != expected[row % 7]).sum())
    if any(wrong.values()):
        raise ArithmeticError(f"{wrong} of {rows * n} values are wrong")
    return {"values": rows * n, "wrong": wrong}


def other_libraries() -> dict:
    """Hand arrays of CuPy and PyTorch to the port, strided ones and empty ones among them."""
    import numpy as np

    found, x = {}, np.random.default_rng(0).standard_normal((6, 256)).astype(np.float32)
    makers = {"cupy": lambda m: m.asarray(x), "torch": lambda m: m.from_numpy(x).cuda()}
    for name, make in makers.items():
        try:
            array = make(__import__(name))
            for label, part, host in (
                ("whole", array, x),
                ("strided", array[::2, :128], x[::2, :128]),
                ("empty", array[:0], x[:0]),
            ):
                packed = cuda_port.quantize(part, "ktq2_1").copy_to_host()
                same = np.array_equal(packed, tbq.quantize(host, "ktq2_1"))
                found[f"{name} {label}"] = "exact" if same else "WRONG"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


if __name__ == "__main__":
    sys.exit(main())
