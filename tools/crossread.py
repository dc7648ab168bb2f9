"""What one format wrote, read as another: `python -m tools.crossread FORMAT [FORMAT ...]`.

Gaussian rows are written as each format and read as each that has blocks as large. A line has the
relative squared error, in the domain that the writer takes, and how many rows have other bytes in
the two formats.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import numpy as np

import tbq
from tbq import Format

ROWS, VALUES = 1000, 512


def variant(name: str) -> Format:
    """Return a format, or what `name[side=K]` chooses of it.

    Raises:
        TbqError: there is no such format, or it has no such choice.
    """
    plain, _, choice = name.rstrip("]").partition("[")
    fmt = tbq.get_format(plain)
    return next((v for v in fmt.variants() if choice and v.choice == choice), fmt)


def lines(formats: list[Format], rows: int) -> Iterator[str]:
    """Yield the report."""
    x = np.random.default_rng(0).standard_normal((rows, VALUES), dtype=np.float32)
    written = [tbq.quantize(x, fmt) for fmt in formats]
    width = max(len(fmt.label) for fmt in formats)
    for (a, packed), (b, other) in itertools.product(zip(formats, written, strict=True), repeat=2):
        if packed.shape != other.shape:
            continue
        y = tbq.dequantize(packed, b, original=True)
        error = ((y - x) ** 2).sum(dtype=np.float64) / (x**2).sum(dtype=np.float64)
        line = f"{a.label:{width}}  read as {b.label:{width}}  error {error:.4f}"
        if a is not b:
            line += f"  {(packed != other).any(axis=1).sum()} of {rows} rows have other bytes"
        yield line


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m tools.crossread", description=__doc__)
    parser.add_argument("formats", nargs="+", metavar="FORMAT")
    parser.add_argument(
        "--rows", type=int, default=ROWS, help=f"of {VALUES} values, default {ROWS}"
    )
    args = parser.parse_args(argv)
    try:
        print(*lines([variant(name) for name in args.formats], args.rows), sep="\n")
    except tbq.TbqError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
