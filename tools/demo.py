"""Quantise the bundled data to every registered format with tbq-quantize and print a table."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import tbq

from . import tbq_quantize
from .demo_data import DEMO_FILE

# For scale: what llama.cpp offers without a fork.
BASELINES = ("q8_0", "q4_0")


def measure(kind: str, folder: Path) -> dict:
    """Run `tbq-quantize --pure --verify --json` on the demo file; return what it printed."""
    output = folder / f"{kind.replace(':', '-')}.gguf"
    printed = io.StringIO()
    flags = ["--pure", "--verify", "--json"]
    with contextlib.redirect_stdout(printed):
        code = tbq_quantize.main([*flags, str(DEMO_FILE), str(output), kind])
    if code > 1:  # 1: an error above 100 %, which the table shows
        sys.exit(code)
    return json.loads(printed.getvalue())


def main() -> None:
    """Print the table."""
    kinds = [*BASELINES, *(fmt.key for fmt in tbq.formats() if not fmt.sibling)]
    print(f"tbq-quantize --pure --verify {DEMO_FILE.name} OUTPUT TYPE, relative MSE per tensor\n")
    with tempfile.TemporaryDirectory() as folder:
        for i, kind in enumerate(kinds):
            report = measure(kind, Path(folder))
            tensors = report["tensors"]
            if i == 0:
                names = "".join(f"{t['name'].removesuffix('.weight'):>12}" for t in tensors)
                print(f"{'TYPE':<20}{'bits/value':>12}{names}")
            errors = "".join(f"{t['relative_mse']:12.5f}" for t in tensors)
            print(f"{kind:<20}{report['quant_bpw']:>12.4f}{errors}")


if __name__ == "__main__":
    main()
