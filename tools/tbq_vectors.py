"""tbq-vectors: golden vectors for kernel tests, and a verifier that says what is wrong."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tbq
from tbq.errors import InputError
from tbq.registry import get_dialect

from . import console

if TYPE_CHECKING:  # imported where they are used, --help needs none
    from tbq import Format

    from .vector_files import VectorSet

MIB = 1024 * 1024


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="tbq-vectors",
        description="Write golden vectors of the formats, or check a kernel against them.",
        epilog=console.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="write a set of vectors")
    generate.add_argument("--out", metavar="DIR", required=True, help="a new or an empty folder")
    generate.add_argument("--seed", metavar="N", type=int, default=0, help="default 0")
    generate.add_argument("--size", choices=("small", "full"), default="small")
    _add_selection(generate)
    check = commands.add_parser(
        "check",
        help="compare outputs with a set",
        description="Compare outputs with a set of vectors. Exit code 1 if any is wrong.",
    )
    check.add_argument("vectors", metavar="VECTORS", help="a folder that generate wrote")
    check.add_argument(
        "actual",
        metavar="ACTUAL_DIR",
        nargs="?",
        help="a folder with outputs, named as the expected files are",
    )
    check.add_argument("--libggml", metavar="PATH", help="run a fork's libggml-base.so instead")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.add_argument("--junit", metavar="XML", help="write a JUnit report")
    check.add_argument("--verbose", action="store_true", help="say more of every case")
    _add_selection(check)
    listing = commands.add_parser("list", help="print the cases of a set, or that there would be")
    listing.add_argument("vectors", metavar="VECTORS", nargs="?", help="default: the small set")
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    _add_selection(listing)
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", metavar="LIST", help="names, keys or dialects; default: all")
    parser.add_argument(
        "--ops",
        metavar="LIST",
        help="of quantize, dequantize, scores, weighted_sum, rotation, sigmoid_back, silu_back; "
        "default: all",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    lists = lambda args: args.command == "list"  # noqa: E731
    return console.run(build_parser(), run, argv, has_subcommands=True, lists=lists)


def run(args: argparse.Namespace) -> int:
    """Carry out one command; returns the exit code."""
    return {"generate": _generate, "check": _check, "list": _list}[args.command](args)


def _formats(args: argparse.Namespace) -> list[Format] | None:
    """Return the formats that were asked for; None if nothing was."""
    if args.formats is None:
        return None
    ours = tbq.formats()
    found: list[Format] = []
    for name in args.formats.split(","):
        if name.strip().lower() in tbq.dialects():
            asked = get_dialect(name).formats
        else:
            asked = (tbq.get_format(name),)
        chosen = [fmt for fmt in ours if fmt in asked]
        if not chosen:
            raise InputError("--formats", name.strip(), "formats of a fork; ggml tests its own")
        found += chosen
    return list(dict.fromkeys(found))


def _operations(args: argparse.Namespace) -> list[str] | None:
    from tbq.vectors import OPERATIONS

    if args.ops is None:
        return None
    names = [name.strip() for name in args.ops.split(",")]
    for name in names:
        if name not in OPERATIONS:
            raise InputError("--ops", name, f"some of {', '.join(OPERATIONS)}")
    return names


def _cases(args: argparse.Namespace, seed: int, size: str):
    from tbq.vectors import GRAPH_OPERATIONS, OPERATIONS, cases

    formats, operations = _formats(args), _operations(args)
    if formats is not None and operations is None:
        operations = [op for op in OPERATIONS if op not in GRAPH_OPERATIONS]  # of no format
    chosen = tbq.formats() if formats is None else formats
    return cases(chosen, operations or OPERATIONS, seed, size)


def _generate(args: argparse.Namespace) -> int:
    from .vector_files import write_set

    if args.seed < 0:
        raise InputError("--seed", str(args.seed), "a number from 0 up")
    folder = Path(args.out)
    manifest = write_set(folder, _cases(args, args.seed, args.size), args.seed, args.size)
    size = sum(record["bytes"] for record in manifest["files"].values())
    size += (folder / "manifest.json").stat().st_size
    counts = f"{len(manifest['cases'])} cases in {len(manifest['files'])} files"
    console.say(f"wrote {counts}, {size / MIB:.2f} MiB, to {folder}")
    return console.OK


def _check(args: argparse.Namespace) -> int:
    from . import vector_check
    from .vector_files import open_set

    if (args.actual is None) == (args.libggml is None):
        raise InputError("arguments", "neither or both", "one of ACTUAL_DIR and --libggml")
    vectors = open_set(Path(args.vectors))
    entries = vectors.entries(_formats(args), _operations(args))
    if not entries:
        raise InputError("--formats, --ops", "no case of the set", "some that it has")
    if args.libggml:
        kernel = _library(args, vectors, entries)
    else:
        kernel = vector_check.files_kernel(Path(args.actual))
    if args.junit:
        _refuse_inputs(args)
    with console.Progress(len(entries), "checking", unit=" cases") as progress:
        outcome = vector_check.check(vectors, entries, kernel, progress.advance)
    if args.junit:
        from gguf_io import AtomicFiles

        with AtomicFiles() as output:
            output.create(args.junit).write(vector_check.junit(vectors, outcome))
    if args.json:
        console.print_json(vector_check.report(vectors, outcome))
    else:
        for line in vector_check.lines(vectors, outcome, args.verbose):
            console.say(line)
    return console.FAILED if outcome.wrong else console.OK


def _refuse_inputs(args: argparse.Namespace) -> None:
    from gguf_io.atomic import refuse_inputs

    folders = [Path(name) for name in (args.vectors, args.actual) if name]
    inputs = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    refuse_inputs([args.junit], inputs + ([args.libggml] if args.libggml else []))


def _library(args: argparse.Namespace, vectors: VectorSet, entries: list[dict]):
    from .libggml import library_kernel, require_functions

    named = {entry["format"]: entry for entry in entries if entry["format"]}
    formats = [vectors.format(entry) for entry in named.values()]
    kernel = library_kernel(args.libggml, {fmt.dialect for fmt in formats})
    require_functions(args.libggml, formats)
    return kernel


def _list(args: argparse.Namespace) -> int:
    from .vector_files import open_set

    if args.vectors:
        found = open_set(Path(args.vectors)).entries(_formats(args), _operations(args))
        rows = [(e["id"], e["match"]["mode"], e["flags"], e["comment"]) for e in found]
    else:
        found = _cases(args, 0, "small")
        rows = [(c.id, c.match["mode"], list(c.flags), c.comment) for c in found]
    if args.json:
        keys = ("id", "match", "flags", "comment")
        console.print_json({"cases": [dict(zip(keys, row, strict=True)) for row in rows]})
        return console.OK
    for name, mode, flags, comment in rows:
        console.say(f"{name:<48} {mode:<9} {comment} [{', '.join(flags)}]")
    return console.OK


if __name__ == "__main__":
    sys.exit(main())
