"""Time two checkouts of this project against each other, in one process.

`python benchmarks/compare_checkouts.py OLD NEW OUT.jsonl`. Every format of OLD is quantised and
dequantised by both, in turns, in large and in single rows, after both gave the same bytes; a line
of OUT has the median of the ratios new / old.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from types import ModuleType

import numpy as np

ROUNDS = 11
ROWS, VALUES = 1024, 1024
SEARCHED_ROWS = 16  # of trellis formats, which take milliseconds a block
SINGLE_CALLS = 200


class Checkout:
    """The package of one checkout, whose modules take the other's place while it runs."""

    def __init__(self, path: str) -> None:
        self.modules: dict[str, ModuleType] = {}
        self._enter()
        sys.path.insert(0, path)
        import tbq

        sys.path.pop(0)
        if not tbq.__file__.startswith(path):
            raise SystemExit(f"{tbq.__file__} was imported, not that of {path}")
        self.tbq = tbq
        self._leave()

    def _enter(self) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tbq"]:
            del sys.modules[name]
        sys.modules.update(self.modules)

    def _leave(self) -> None:
        self.modules = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "tbq"}

    def names(self) -> list[str]:
        """Return the keys of the formats that stand alone."""
        self._enter()
        return [fmt.key for fmt in self.tbq.formats() if not fmt.sibling]

    def run(self, operation: str, x: np.ndarray, name: str, calls: int) -> tuple[float, np.ndarray]:
        """Return the seconds of a call, and its result."""
        self._enter()
        function = getattr(self.tbq, operation)
        start = time.perf_counter()
        for _ in range(calls):
            result = function(x, name, threads=1)
        seconds = (time.perf_counter() - start) / calls
        self._leave()
        return seconds, result


def compare(old: Checkout, new: Checkout, operation: str, x, name: str, calls: int) -> dict:
    """Return the record of one operation; SystemExit if the results differ."""
    results = [side.run(operation, x, name, 1)[1] for side in (old, new)]
    if results[0].tobytes() != results[1].tobytes():
        raise SystemExit(f"{operation} of {name} differs")
    times: dict[Checkout, list[float]] = {old: [], new: []}
    for i in range(ROUNDS):
        for side in (old, new) if i % 2 else (new, old):
            times[side].append(side.run(operation, x, name, calls)[0])
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    micro = [round(1e6 * statistics.median(seconds), 1) for seconds in times.values()]
    return {
        "format": name,
        "operation": operation,
        "rows": len(x),
        "row_values": VALUES,
        "ratio": round(ratio, 3),
        "old_us": micro[0],
        "new_us": micro[1],
        "rounds": ROUNDS,
    }


def main(old_path: str, new_path: str, out: str) -> None:
    """Compare all formats."""
    sys.path[:] = [path for path in sys.path if path]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    old, new = Checkout(old_path), Checkout(new_path)
    rng = np.random.default_rng(0)
    with open(out, "w", encoding="utf-8") as file:
        for name in old.names():
            searched = old.tbq.get_format(name).kernels().quantize.__module__.endswith("trellis")
            for rows, calls in ((SEARCHED_ROWS if searched else ROWS, 1), (1, SINGLE_CALLS)):
                x = rng.standard_normal((rows, VALUES)).astype(np.float32)
                packed = old.run("quantize", x, name, 1)[1]
                for operation, values in (("quantize", x), ("dequantize", packed)):
                    slow = searched and operation == "quantize"
                    record = compare(old, new, operation, values, name, 1 if slow else calls)
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
