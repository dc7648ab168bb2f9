"""Put the bundled keys and values through caches of each type and print what is lost.

As a fork's cache does it: rotated by its graph first, quantised, and back. Types are measured in
several processes, because all that takes time is compiling their kernels, once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator

import numpy as np

import tbq
from tbq.errors import InputError

from . import console
from .demo_data import DEMO_FILE

HEAD_DIM = 128
# What llama.cpp offers without a fork, and the main types of each fork, those first that are
# compiled soon; `--all` has the others.
CHOSEN = (
    "q8_0",
    "q4_0",
    "pr21089:tbq3_0",
    "pr21089:tbq4_0",
    "ik_llama:q6_0",
    "llama-tq:ktq2_1",
    "llama-tq:vtq2_1",
    "llama-tq:vtq3_v8",
    "unixsysdev:tq3_0",
    "animehacker:tq3_0",
    "buun:turbo3",
    "buun:turbo3_tcq",
    "thetom:turbo3",
    "dusterbloom:tbq3",
    "excidos-cpu:planar3_0",
    "amesianx:tbq3_0",
)
# Above this something is wrong, which the notes of the format explain.
HOPELESS = 0.7
EPILOG = "make demo has the main types of each fork, in about a minute on a fresh machine."


def measure(name: str) -> dict:
    """Return stored bits and, by tensor, the relative MSE of a type; None where it is not for."""
    from gguf_io import open_gguf
    from gguf_io.evaluation.cache_path import cache_path

    kind = tbq.get_format(name)
    found: dict = {"type": kind.label, "bits": None, "errors": {}, "why": ""}
    with open_gguf(DEMO_FILE) as file:
        tensors = {t.removesuffix(".weight"): np.asarray(x) for t, x in file.tensors.items()}
    for tensor, rows in tensors.items():
        side = {"cache_k": "K", "cache_v": "V"}.get(tensor, kind.side[-1])
        if side not in kind.side:
            found["errors"][tensor] = None
            continue
        x = rows.reshape(len(rows), -1, HEAD_DIM)
        try:
            path = cache_path(kind, side, x.shape[1], HEAD_DIM)
        except InputError as error:
            return found | {"why": f"needs {error.need}"}
        y = path(x, threads=1)
        found["bits"] = 8 * path.row_bytes(x.shape[1]) / rows.shape[1]
        found["errors"][tensor] = float(((y - x) ** 2).sum() / (x**2).sum())
    return found


def measured(names: list[str]) -> Iterator[dict]:
    """Yield what `measure` returns, in order, from as many processes as there are cores."""
    workers = min(len(names), os.cpu_count() or 1)
    # what they print if they are interrupted would be about them, not about the demo
    with multiprocessing.get_context("spawn").Pool(workers, *_deaf_to_interrupts()) as pool:
        yield from pool.imap(measure, names)


def _deaf_to_interrupts() -> tuple:
    return signal.signal, (signal.SIGINT, signal.SIG_IGN)


def selected(names: list[str], everything: bool) -> list[str]:
    """Return the names of the types to measure, checked."""
    if everything:
        baselines = [name for name in CHOSEN if ":" not in name]
        ours = [fmt.key for fmt in tbq.formats() if not fmt.sibling]
        return list(dict.fromkeys([*(tbq.get_format(b).key for b in baselines), *ours]))
    return [tbq.get_format(name).key for name in names or CHOSEN]


def line(row: dict) -> str:
    """Return a line of the table."""
    if row["bits"] is None:
        return f"{row['type']:<30}{row['why'] or 'not for keys and values alone'}"
    only = "K only" if row["errors"]["cache_v"] is None else "V only"
    errors = "".join(
        f"{only:>12}" if error is None else f"{error:12.5f}" for error in row["errors"].values()
    )
    return f"{row['type']:<30}{row['bits']:>10.4f}{errors}"


def command(args: argparse.Namespace) -> int:
    """Print the table."""
    names = selected(args.types, args.all)
    print("Relative MSE of bundled keys and values, as a cache of the type gives them back\n")
    print(f"{'TYPE':<30}{'bits/value':>10}{'cache_k':>12}{'cache_v':>12}{'gauss':>12}", flush=True)
    hopeless = []
    with console.Progress(len(names), "compiling", unit=" types") as progress:
        for row in measured(names):
            progress.print(line(row))
            sys.stdout.flush()
            progress.advance(1)
            if max((e for e in row["errors"].values() if e is not None), default=0) > HOPELESS:
                hopeless.append(row["type"])
    if hopeless:
        print("\nErrors that large are the forks' own:")
        for name in hopeless:
            print(f"  {name}: {tbq.get_format(name.partition('[')[0]).notes}")
    if not (args.types or args.all):
        print(f"\nAll {len(selected([], True))} types: {sys.executable} -m tools.demo --all")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, epilog=EPILOG)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="types to measure")
    parser.add_argument("--all", action="store_true", help="every registered type")
    return console.run(parser, command, argv, lists=lambda args: True)


if __name__ == "__main__":
    sys.exit(main())
