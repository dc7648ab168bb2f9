"""Time two checkouts of this project against each other, in one process.

`python benchmarks/compare_checkouts.py OLD NEW OUT.jsonl [FORMAT ...]`. Every format of OLD, or
those named, is quantised and dequantised by both and a copy is made, in turns, in large and in
single rows, after both gave the same bytes; a line of OUT has the median of the ratios new / old,
and of those of a copy of the floats to both. What is measured is the processor's time.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from types import ModuleType

import numpy as np

ROUNDS = 11
ROWS, VALUES = 4096, 1024
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
        self.found = self.formats()
        self._leave()

    def _enter(self) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tbq"]:
            del sys.modules[name]
        sys.modules.update(self.modules)

    def _leave(self) -> None:
        self.modules = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "tbq"}

    def formats(self) -> dict:
        """Return the formats that stand alone, by label, with every choice that they offer."""
        self._enter()
        alone = [fmt for fmt in self.tbq.formats() if not fmt.sibling]
        return {own.label: own for fmt in alone for own in fmt.variants()}

    def run(self, operation: str, x: np.ndarray, name: str, calls: int) -> tuple[float, np.ndarray]:
        """Return the seconds of a call, and its result."""
        self._enter()
        function, fmt = getattr(self.tbq, operation), self.found[name]
        start = time.thread_time()
        for _ in range(calls):
            result = function(x, fmt, threads=1)
        seconds = (time.thread_time() - start) / calls
        self._leave()
        return seconds, result


def compare(old: Checkout, new: Checkout, operation: str, x, name: str, calls: int) -> dict:
    """Return the record of one operation; SystemExit if the results differ."""
    results = [side.run(operation, x, name, 1)[1] for side in (old, new)]
    if results[0].tobytes() != results[1].tobytes():
        raise SystemExit(f"{operation} of {name} differs")
    floats = np.ones_like(results[0] if operation == "dequantize" else x)
    copy = np.ones_like(floats)
    times: dict[Checkout, list[float]] = {old: [], new: []}
    copies = []
    for i in range(ROUNDS):
        for side in (old, new) if i % 2 else (new, old):
            times[side].append(side.run(operation, x, name, calls)[0])
        start = time.thread_time()
        for _ in range(calls):
            np.copyto(copy, floats)
        copies.append((time.thread_time() - start) / calls)
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    micro = [round(1e6 * statistics.median(seconds), 1) for seconds in times.values()]
    to_copy = [
        round(statistics.median(c / t for c, t in zip(copies, seconds, strict=True)), 4)
        for seconds in times.values()
    ]
    return {
        "format": name,
        "operation": operation,
        "rows": len(x),
        "row_values": VALUES,
        "ratio": round(ratio, 3),
        "old_us": micro[0],
        "new_us": micro[1],
        "old_to_copy": to_copy[0],
        "new_to_copy": to_copy[1],
        "old_mvalues_per_s": round(floats.size / micro[0], 1),
        "new_mvalues_per_s": round(floats.size / micro[1], 1),
        "rounds": ROUNDS,
    }


def main(old_path: str, new_path: str, out: str, *chosen: str) -> None:
    """Compare all formats, or those chosen."""
    sys.path[:] = [path for path in sys.path if path]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    old, new = Checkout(old_path), Checkout(new_path)
    rng = np.random.default_rng(0)
    with open(out, "w", encoding="utf-8") as file:
        for name, fmt in old.found.items():
            if (chosen and name not in chosen) or VALUES % fmt.group_values:
                continue
            searched = fmt.codec.searches
            for rows, calls in ((SEARCHED_ROWS if searched else ROWS, 1), (1, SINGLE_CALLS)):
                x = rng.standard_normal((rows, VALUES)).astype(np.float32)
                packed = old.run("quantize", x, name, 1)[1]
                for operation, values in (("quantize", x), ("dequantize", packed)):
                    slow = searched and operation == "quantize"
                    record = compare(old, new, operation, values, name, 1 if slow else calls)
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
