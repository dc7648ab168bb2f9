"""tbq-bench: speed of every format beside gguf-py's Q4_0 and a memory copy, in one process."""

from __future__ import annotations

import argparse
import json
import os
import sys

import tbq
from tbq.errors import InputError

from . import bench_cases, bench_report, console

MEASURING = ("compare", "plot", "libggml")  # flags that mean nothing to --compile
MOST_ROUNDS = 10_000


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="tbq-bench",
        description="Time quantisation and dequantisation of 4 Mi float32 values. Every kernel is "
        "compared with its specification first, and not timed if it differs. The cases of a round "
        "run one after the other, so that ratios survive a noisy machine; with one thread it is "
        "the processor's time that counts.",
        epilog=console.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("formats", metavar="FORMAT", nargs="*", help="default: all registered formats")
    add("--rows", metavar="N,N", default="256,1024,4096", help="row lengths; default 256,1024,4096")
    add("--threads", metavar="N", type=int, default=1, help="worker threads; default 1")
    add("--rounds", metavar="N", type=int, default=9, help="timed runs per case; default 9")
    add("--out", "--record", metavar="FILE", help="append one JSON line per case to FILE")
    add(
        "--compare",
        metavar="FILE",
        help="print what share of its speed in FILE (of --out) each case has, both over gguf-py's "
        "Q4_0 or over a copy, whichever is kinder; exit code 1 if one has less than "
        f"{bench_report.LEAST:g}, {bench_report.TRIES} times in a row",
    )
    add("--libggml", metavar="PATH", help="time the C of a fork's libggml-base.so beside ours")
    add("--plot", metavar="FILE", help="draw speeds, as .svg or .png (needs matplotlib)")
    add(
        "--compile",
        action="store_true",
        help="time nothing: compile all kernels that the formats need, for an image of a container "
        "say, and print the processor seconds and where the result is kept",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    works = lambda args: args.out or args.plot or args.compare or args.compile  # noqa: E731
    return console.run(build_parser(), bench, argv, lists=lambda args: not works(args))


def bench(args: argparse.Namespace) -> int:
    """Measure, print a table, and append the records to a file; or compile."""
    chosen = [tbq.get_format(name) for name in args.formats] or tbq.formats()
    formats = [variant for fmt in chosen for variant in fmt.variants()]
    if args.compile:
        console.refuse_flags(args, MEASURING, "beside --compile", "nothing: that times no case")
        _open_record(args.out)
        return _compile(formats, args.out)
    lengths = _lengths(args.rows)
    if not (0 < args.rounds <= MOST_ROUNDS and args.threads > 0):
        need = f"at least 1, and at most {MOST_ROUNDS} rounds"
        raise InputError("--rounds, --threads", f"{args.rounds}, {args.threads}", need)
    _check_plot(args.plot)
    library = _library(args, formats)
    before = _recorded(args, formats, lengths)
    _open_record(args.out)
    wrong = [fmt.label for fmt in formats if not bench_cases.is_exact(fmt)]
    if wrong:
        print(f"tbq-bench: error: not exact, not timed: {', '.join(wrong)}", file=sys.stderr)
        return console.FAILED
    print(bench_report.head(library is not None, before is not None))
    records, slower = [], {}
    for n in lengths:
        found, slow = _measure(args, formats, n, library, before)
        records += found
        slower |= {f"{name}, rows of {n}": share for name, share in slow.items()}
    if args.plot:
        from .bench_plot import write_plot

        write_plot(args.plot, records)
    if before is None:
        return console.OK
    count = sum((r["case"], r["row"], r["threads"]) in before for r in records)
    return _say_slower(args.compare, count, slower)


def _measure(args, formats, n: int, library, before) -> tuple[list[dict], dict[str, float]]:
    """Time rows of n values, print and keep their records; return those, and what is slower."""
    cases = bench_cases.cases(formats, n, args.threads, library)
    where = bench_report.environment(args.threads)
    clock = bench_cases.clock_of(args.threads)
    records, changes = [], {}

    def timed(names) -> dict[str, dict]:
        some = bench_cases.with_yardsticks(cases, names)
        speeds = bench_cases.measured(some, args.rounds, clock)
        return {name: bench_report.record(name, n, cases[name].values, speeds) for name in names}

    def change(record: dict) -> float | None:
        old = (before or {}).get((record["case"], n, args.threads))
        return bench_report.change(record, old) if old else None

    every = bench_cases.measured(cases, args.rounds, clock)
    for name in (name for name in cases if not name.startswith(bench_cases.C_PREFIX)):
        record = bench_report.record(name, n, cases[name].values, every) | where
        share = change(record)
        console.say(bench_report.line(record, library is not None, share))
        if share is not None:
            changes[name] = share
        records.append(record)
    _keep(args.out, records)
    again = lambda names: {name: change(record) for name, record in timed(names).items()}  # noqa: E731
    return records, bench_report.slower(changes, again)


def _say_slower(path: str, count: int, slower: dict[str, float]) -> int:
    """Print what is slower than in a record; returns the exit code."""
    console.say(f"compared with {path}: {count} cases, {len(slower)} slower")
    for name, share in slower.items():
        console.say(f"  {name}: {share:.2f} of the recorded speed")
    return console.FAILED if slower else console.OK


def _compile(formats: list[tbq.Format], out: str | None) -> int:
    """Compile all that formats need, and print what it took; returns the exit code."""
    from .bench_compile import cache_folder, compiled

    console.say(f"{'format':<34}{'operation':<18}{'CPU seconds':>12}")
    total = 0.0
    for record in compiled(formats):
        console.say(f"{record['format']:<34}{record['operation']:<18}{record['cpu_s']:>12.2f}")
        total += record["cpu_s"]
        _keep(out, [record])
    console.say(f"{total:.1f} CPU seconds; kept in {cache_folder() or 'no cache'}")
    return console.OK


def _lengths(text: str) -> list[int]:
    """Parse `--rows`."""
    digits = [part.strip() for part in text.split(",")]
    lengths = [int(part) if part.isdecimal() and len(part) < 10 else 0 for part in digits]
    most = bench_cases.VALUES
    if not all(0 < n <= most for n in lengths):
        raise InputError("--rows", text[:60], f"row lengths from 1 to {most}, such as 256,4096")
    return [*dict.fromkeys(lengths)]


def _check_plot(path: str | None) -> None:
    """Refuse before minutes of work what would fail after them."""
    if path:
        from .bench_plot import checked_kind
        from .eval_plot import require_matplotlib

        checked_kind(path)
        require_matplotlib()


def _library(args: argparse.Namespace, formats: list[tbq.Format]):
    """Return the library of `--libggml`; None without."""
    if not args.libggml:
        return None
    if args.threads != 1:
        raise InputError("--threads", str(args.threads), "1 beside --libggml: C runs on one")
    from .libggml import open_library, require_functions

    library = open_library(args.libggml, {fmt.dialect for fmt in formats})
    require_functions(args.libggml, formats)
    return library


def _recorded(args, formats: list[tbq.Format], lengths: list[int]) -> dict | None:
    """Return the records of `--compare`; None without."""
    if not args.compare:
        return None
    before = bench_report.read_records(args.compare)
    names = [f"{fmt.label} {op}" for fmt in formats for op in bench_cases.OPERATIONS]
    keys = {(name, n, args.threads) for name in names for n in lengths}
    if not keys & set(before):
        need = "a file of --out with some of these cases, rows and threads"
        raise InputError("--compare", f"{args.compare}, which has none of {len(keys)} cases", need)
    return before


def _open_record(path: str | None) -> None:
    """Make sure that a file can be appended to: now rather than after minutes."""
    if path:
        if os.path.exists(path) and not os.path.isfile(path):  # a FIFO would be waited for
            raise InputError("--out", path, "a regular file or a new path")
        open(path, "a").close()


def _keep(path: str | None, records: list[dict]) -> None:
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    sys.exit(main())
