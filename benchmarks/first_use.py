"""Measure what the first use of each format takes, where nothing is compiled yet.

`python benchmarks/first_use.py OUT.jsonl [FORMAT...]`. Each format and direction runs in a process
of its own with an empty cache. A line of OUT has the processor seconds of one call for one group,
imports excluded; of them those in LLVM, and in the five functions that took most; and how many
functions were compiled. About 0.4 s are Numba's own start, which a full cache does not save.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIRECTIONS = ("quantize", "dequantize")


def measure(label: str, direction: str) -> dict:
    """Return the record of one format and direction, in this process."""
    from numba.core import event

    from tools.bench_compile import calls

    class Timer(event.Listener):
        """Adds up the processor seconds of events, without those inside them."""

        def __init__(self) -> None:
            self.running: list[list[float]] = []
            self.seconds, self.calls = Counter(), 0

        def on_start(self, event) -> None:
            self.running.append([time.process_time(), 0.0])

        def on_end(self, event) -> None:
            began, inner = self.running.pop()
            taken = time.process_time() - began
            if self.running:
                self.running[-1][1] += taken
            self.calls += 1
            self.seconds[_name(event)] += taken - inner

    call = calls(_variant(label))[direction]
    _variant(label).kernels()
    compiled, llvm = Timer(), Timer()
    event.register("numba:compile", compiled)
    event.register("numba:llvm_lock", llvm)
    began = time.process_time()
    call()
    return {
        "format": label,
        "operation": direction,
        "cpu_s": round(time.process_time() - began, 2),
        "llvm_s": round(llvm.seconds.total(), 2),
        "functions": compiled.calls,
        "most": {name: round(s, 2) for name, s in compiled.seconds.most_common(5)},
    }


def _name(event) -> str:
    if not event.data or "dispatcher" not in event.data:
        return event.kind
    function = event.data["dispatcher"].py_func
    return f"{function.__module__.removeprefix('tbq.kernels.')}.{function.__qualname__}"


def _labels() -> list[str]:
    """Return all formats, those of the newest releases first."""
    import tbq

    variants = [variant for fmt in tbq.formats() for variant in fmt.variants()]
    return [fmt.label for fmt in sorted(variants, key=lambda fmt: bool(fmt.release))]


def _variant(label: str):
    import tbq

    return next(v for fmt in tbq.formats() for v in fmt.variants() if v.label == label)


def main(out: str, labels: list[str]) -> None:
    """Measure all formats, or some."""
    with open(out, "w", encoding="utf-8") as file:
        for label in labels or _labels():
            for direction in DIRECTIONS:
                with tempfile.TemporaryDirectory() as cache:
                    command = [sys.executable, __file__, "--one", label, direction]
                    environment = os.environ | {"NUMBA_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
                    done = subprocess.run(
                        command, env=environment, check=True, capture_output=True, text=True
                    )
                file.write(done.stdout)
                file.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "--one":
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main(sys.argv[1], sys.argv[2:])
