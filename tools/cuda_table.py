"""What the kernels take, and how fast they can be: `python -m tools.cuda_table`.

`--record` compiles the kernels of formats and adds what the assembler and the disassembler say to
benchmarks/cuda-sass.jsonl; without it the table in docs/cuda.md is written from that file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import tbq

ROOT = Path(__file__).parents[1]
RECORD, DOCUMENT = ROOT / "benchmarks" / "cuda-sass.jsonl", ROOT / "docs" / "cuda.md"
START, END = "<!-- table: python -m tools.cuda_table -->\n", "<!-- end of the table -->\n"
# H100 at 1.7 GHz: lanes that get an instruction, per second; bytes that a copy reads and writes.
LANES, COPY = 132 * 128 * 1.7e9, {"H100": 3.0e12, "H200": 4.8e12}
ISSUED = 0.6  # of issue slots that a kernel is expected to use
MOVED = 16  # values at least in a turn of a loop that fills or empties a tile
SMALLER = ((8, 0), (7, 5))  # compiled for the last one
CODECS = ("dequantize", "quantize")
HEAD = """\
| format | simulator | PTX | SASS | dequantize | of a copy | quantize | of a copy | hardware |
|---|---|---|---|---|---|---|---|---|
"""
ATTENTION_HEAD = """
| format | operation | registers | instructions per value and set | bound | of the bound |
|---|---|---:|---:|---:|---:|
"""


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(prog="cuda_table", description=__doc__)
    parser.add_argument("formats", nargs="*", help="what to record; default: one of each kind")
    parser.add_argument("--record", action="store_true", help="compile, and add to the record")
    parser.add_argument("--only", help="record operations that start with this")
    args = parser.parse_args(argv)
    if args.record:
        record(args.formats or representatives(), args.only or "")
    else:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, rest = text.split(START)
        DOCUMENT.write_text(before + START + table() + END + rest.split(END)[1], encoding="utf-8")
    return 0


def representatives() -> list[str]:
    """Return a format of each family, width and number of bits."""
    from cuda_port import api

    kinds = {}
    for fmt in tbq.formats():
        if api.ported(next(fmt.variants())):
            codec = fmt.codec
            kinds.setdefault((type(codec), codec.group_values, codec.block_bytes), fmt.label)
    return list(kinds.values())


def record(names: list[str], start: str) -> None:
    """Compile the kernels of formats, and add a line for each to the record."""
    from cuda_port.port import kernels_of

    done = {(row["format"], row["operation"]) for row in rows()}
    for name in names:
        fmt = next(tbq.get_format(name).variants())
        for operation, kernel in kernels_of(fmt):
            if operation.startswith(start) and (name, operation) not in done:
                row = {"format": name, "operation": operation, **measure(fmt, operation, kernel)}
                with RECORD.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, file=sys.stderr, flush=True)


def measure(fmt: tbq.Format, operation: str, kernel) -> dict:
    """Return what a kernel takes, and its instructions per value on sm_90."""
    from cuda_port import sass, signatures

    row = {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        taken = sass.assemble(signatures.ptx(kernel, (9, 0)), (9, 0), cubin)
        row |= {"registers": [taken.registers], "shared": taken.shared}
        row |= {"spilled": [taken.spilled], "stack": [taken.stack]}
        listing = sass.instructions(cubin)
        oldest = signatures.ptx(kernel, SMALLER[-1]) if operation in CODECS else ""
        for target in SMALLER if oldest else ():
            other = sass.assemble(oldest, target)
            row["registers"].append(other.registers)
            row["spilled"].append(other.spilled)
            row["stack"].append(other.stack)
    if listing is not None:
        counted = per_value(operation, kernel, listing)
        if counted is not None:
            row["instructions"] = round(counted, 2)
        row["total"] = sum(len(block.opcodes) for block in listing)
    return row


def per_value(operation: str, kernel, listing) -> float | None:
    """Return the instructions per value: of a search per state, of attention per value and set.

    Of a search and of attention only the hottest block counts; it has a product per state, or one
    per value and one more per value and set.
    """
    from cuda_port import sass

    hot = sass.hottest(listing)
    products = max(1, hot.count("FMUL"))
    if kernel.scratch_bytes:
        loops = [block for block in listing if block.loops] or listing
        hot = max(loops, key=lambda block: block.count("FMNMX"))
        return len(hot.opcodes) / max(1, hot.count("FMUL"))
    if " of " in operation:
        sets = int(operation.split()[-1])
        return len(hot.opcodes) / (products / (1 + sets))
    if not kernel.turns:
        return None
    total = sum(len(block.opcodes) for block in listing)
    loops = [block for block in listing if block.loops]
    repeated = [block for block in loops if block.count("LDG", "STG") >= MOVED]
    if loops and sass.hottest(loops).count("FADD", "LDS") >= MOVED:
        repeated.append(sass.hottest(loops))
    total += sum((kernel.turns - 1) * len(block.opcodes) for block in repeated)
    return total / (kernel.values / kernel.threads)


def rows() -> list[dict]:
    """Return what is recorded."""
    if not RECORD.exists():
        return []
    return [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]


def table() -> str:
    """Return the tables of what is recorded: of formats, and of attention."""
    by_format: dict[str, dict[str, dict]] = {}
    for row in rows():
        by_format.setdefault(row["format"], {})[row["operation"]] = row
    lines = [_line(name, found) for name, found in by_format.items() if set(CODECS) <= set(found)]
    attention = [_bounded(row) for row in rows() if " of " in row["operation"]]
    return HEAD + "".join(lines) + ATTENTION_HEAD + "".join(attention)


def _line(name: str, found: dict[str, dict]) -> str:
    searched = "trellis" in type(tbq.get_format(name).codec).__module__
    clean = not any(sum(row["stack"] + row["spilled"]) for row in found.values())
    cells = [f"`{name}`", "exact, 2^8 states" if searched else "exact", "ok"]
    cells.append("ok" if clean else "stack")
    for operation in CODECS:
        row = found[operation]
        counted = f" · {row['instructions']:.1f}" if "instructions" in row else ""
        cells.append("/".join(map(str, row["registers"])) + counted)
        shares = [share(row, copy) for copy in COPY.values()]
        cells.append(" · ".join(f"{value:.0%}" for value in shares if value is not None))
    return "| " + " | ".join([*cells, "not run"]) + " |\n"


def _bounded(row: dict) -> str:
    """Return a line about attention: multiplications and additions that no order can do without."""
    sets = int(row["operation"].split()[-1])
    bound, counted = (2 * sets + 5) / sets, row["instructions"] / sets
    registers = str(row["registers"][0])
    cells = [f"`{row['format']}`", row["operation"], registers, f"{counted:.1f}", f"{bound:.1f}"]
    return "| " + " | ".join([*cells, f"{bound / counted:.0%}"]) + " |\n"


def share(row: dict, copy: float) -> float | None:
    """Return the predicted share of a copy: what is issued, or all of it if memory is the limit."""
    if "instructions" not in row:
        return None
    fmt = tbq.get_format(row["format"])
    if fmt.codec.searches and row["operation"] == "quantize":
        return None
    n_bytes = 4 + fmt.bpw / 8
    return min(1.0, ISSUED * LANES / row["instructions"] * n_bytes / copy)


if __name__ == "__main__":
    sys.exit(main())
