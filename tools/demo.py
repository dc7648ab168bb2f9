"""Quantise the bundled data to every registered format with tbq-quantize and print a table."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import tbq
from tbq.registry import get_dialect

from . import tbq_quantize
from .demo_data import DEMO_FILE, WIDTH

# For scale: what llama.cpp offers without a fork.
BASELINES = ("q8_0", "q4_0")


def in_files(fmt: tbq.Format) -> bool:
    """Return whether a GGUF file can hold it: some release gives it a number."""
    return get_dialect(fmt.dialect).numbers(fmt)


def fits(fmt: tbq.Format) -> bool:
    """Return whether it is the same for keys, values and all heads, and divides the demo's rows."""
    return in_files(fmt) and [*fmt.variants()] == [fmt] and WIDTH % fmt.group_values == 0


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


def chosen(names: list[str]) -> list[tbq.Format]:
    """Return the named formats; `all`; or one for each codec that forks' caches now hold."""
    ours = [fmt for fmt in tbq.formats() if not fmt.sibling]
    if names == ["all"]:
        return ours
    if names:
        return [tbq.get_format(name) for name in names]
    current = {}
    for fmt in ours:
        if not (fmt.release or get_dialect(fmt.dialect).backend_of):
            current.setdefault(fmt.codec, fmt)
    return list(current.values())


def main(names: list[str]) -> None:
    """Print the table."""
    ours = chosen(names)
    kinds = [*BASELINES, *(fmt.key for fmt in ours if fits(fmt))]
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
    left = [fmt for fmt in ours if not fits(fmt)]
    for why, numbered in (
        ("for keys, values or a width of heads, which differ", True),
        ("for caches only, without a GGUF type number", False),
    ):
        keys = [fmt.key for fmt in left if in_files(fmt) == numbered]
        if keys:
            print(f"\nNot for these tensors, but {why}:")
            print("\n".join(f"  {key}" for key in keys))
    if not names:
        print("\nEvery format, those of older releases and other backends too: append `all`")


if __name__ == "__main__":
    main(sys.argv[1:])
