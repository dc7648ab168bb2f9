"""tbq-inspect: what is in a GGUF file or a KV-cache dump, and which types it would tolerate."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tbq
from tbq.errors import InputError

from . import console, state_options

if TYPE_CHECKING:  # imported where they are used, --help needs none
    from gguf_io import GgufFile, StateFile
    from gguf_io.candidates import Combination
    from gguf_io.queries import Queries

DEFAULT_MAX_KL = 0.01
DEFAULT_MAX_ROWS = 4096
LAYER_RANGE = re.compile(r"([0-9]{1,30})(?:-([0-9]{1,30}))?")
SHOWN_CHARACTERS = 60  # of an argument that may be of any length


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="tbq-inspect",
        usage="tbq-inspect [options] FILE...",
        description="Say what is in a GGUF file or a llama.cpp state file (prompt cache, slot "
        "save, sequence blob): layout, types, health and statistics per layer; the error against "
        "an unquantised twin; what other types would do to it, and which is the cheapest good one.",
        epilog=console.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", help="GGUF file (or first shard), or state file")
    add("--dialect", metavar="D", help=f"dialect of type ids: {', '.join(tbq.dialects())}")
    add("--reference", metavar="F", help="unquantised dump of the same prompt, or model")
    add(
        "--candidates",
        metavar="LIST",
        help="types to try, separated by commas, or all; "
        "trellis types take seconds per layer and thousand rows",
    )
    add(
        "--max-kl",
        metavar="NATS",
        type=float,
        help="divergence of attention weights that a K type may cause; "
        f"default {DEFAULT_MAX_KL} with --candidates",
    )
    add(
        "--max-output-error",
        metavar="E",
        type=float,
        help="relative squared error of attention output that a V type may cause; "
        "default: the number of --max-kl",
    )
    add(
        "--queries",
        metavar="NPZ",
        help="the model's own queries, as tbq-eval --save-queries writes them; without them, and "
        "better with --model, random ones stand in",
    )
    add("--details", action="store_true", help="every tensor and every candidate on it")
    add("--layers", metavar="LIST", help="only these layers, such as 0,5-8")
    add(
        "--max-rows",
        metavar="N",
        type=int,
        default=DEFAULT_MAX_ROWS,
        help="rows (cells) per tensor for statistics, attention and candidates, evenly spaced; "
        f"0: all; default {DEFAULT_MAX_ROWS}. Health and reference errors use every row",
    )
    add("--keys", action="store_true", help="list what stands in the header, and look no further")
    add("--tensors", action="store_true", help="list the tensors likewise; with --keys both")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--html", metavar="OUT", help="write a page with tables and plots")
    add("--threads", metavar="N", type=int, help="worker threads; default: all cores")
    console.add_workers(parser)
    state_options.add(parser.add_argument_group("state files"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    parser = build_parser()
    parser.set_defaults(command=_command_line(sys.argv[1:] if argv is None else argv))
    return console.run(parser, inspect_command, argv, lists=lambda args: not args.html)


def _command_line(argv: list[str]) -> str:
    return shlex.join(["tbq-inspect", *argv])


def inspect_command(args: argparse.Namespace) -> int:
    """Carry out the inspections; returns the exit code."""
    _check(args)
    if len(args.files) == 1 and args.workers is None and args.scheduler is None:
        (args.file,) = args.files
        return inspect_one(args)
    from .inspect_many import inspect_all

    return inspect_all(args)


def inspect_one(args: argparse.Namespace) -> int:
    """Inspect `args.file`; returns the exit code."""
    from gguf_io.atomic import refuse_inputs
    from gguf_io.candidates import parse_candidates
    from gguf_io.inspection import Settings, inspect_file, selected_tensors

    from . import inspect_report

    if _is_resume_file(args.file):
        return _list_objects(args)
    if args.keys or args.tensors:
        return _list_keys(args)
    candidates = parse_candidates(args.candidates, args.dialect) if args.candidates else []
    layers = None if args.layers is None else Layers(args.layers)
    queries = _queries(args)
    settings = Settings(args.max_rows, candidates, layers, args.threads, queries)
    with contextlib.ExitStack() as files:
        file = files.enter_context(_open(args, args.file))
        reference = None
        if args.reference:
            plain = {"dialect": None, "rotation": "auto"}
            reference = files.enter_context(_open(args, args.reference, **plain))
            if type(file) is not type(reference):
                got = f"{args.reference}, another kind of file than {args.file}"
                raise InputError("--reference", got, "a twin of it")
        if args.html:
            refuse_inputs([args.html], _inputs(args, file, reference))
        tensors = selected_tensors(file, settings.layers)
        if args.layers and not tensors:
            raise InputError("--layers", args.layers[:SHOWN_CHARACTERS], "layers that the file has")
        total = sum(t.n_bytes for t in tensors) * (1 + len(candidates))
        with console.Progress(total, "inspecting") as progress:
            found = inspect_file(file, reference, settings, progress)
        chosen = _cheapest(args, found)
        report = inspect_report.report(found, args.reference, _limits(args), chosen, queries)
        if args.html:
            from .inspect_html import write_html

            write_html(args.html, report, args.command)
        if args.json:
            console.print_json(report)
        else:
            from .inspect_text import print_report

            print_report(report, args.details)
            if args.html:
                print()
                console.say(f"wrote {args.html}")
    return console.OK


def _queries(args: argparse.Namespace) -> Queries:
    """Return what is known of the model's queries."""
    from gguf_io.queries import NONE, queries_of_model, read_queries

    if args.queries:
        return read_queries(args.queries)
    return queries_of_model(args.model) if args.model else NONE


def _is_resume_file(path: str) -> bool:
    """Tell whether a file is one of buun's resume store."""
    from gguf_io.mapped import map_file
    from gguf_io.state_buun import is_resume_file

    return is_resume_file(bytes(map_file(path)[:8]))


def _list_objects(args: argparse.Namespace) -> int:
    """List the objects of a file of buun's resume store; returns the exit code."""
    from dataclasses import asdict

    from gguf_io.state_buun import stored_objects

    from .columns import table, wrapped

    if args.html or args.reference or args.candidates:
        need = "a state file or a GGUF file with --html, --reference or --candidates"
        raise InputError("FILE", f"{args.file}, of buun's resume store", need)
    found = [asdict(one) for one in stored_objects(args.file)]
    if args.json:
        console.print_json({"schema": "tbq-inspect-objects/1", "path": args.file, "objects": found})
        return console.OK
    console.say(args.file)
    what = "a file of buun-llama-cpp's resume store; payloads are not looked into, and their XXH3"
    print(wrapped("  ", f"{what} checksums not compared"))
    header = ("kind", "at byte", "payload", "first", "last", "generation", "complete")
    rows = [tuple(map(str, one.values())) for one in found]
    table(header, rows) if rows else print("  no object in it")
    return console.OK


def _list_keys(args: argparse.Namespace) -> int:
    """List the keys of a file, its tensors, or both; returns the exit code."""
    from .inspect_keys import print_listing, refuse_others

    refuse_others(args)
    with _open(args, args.file) as file:
        print_listing(file, args)
        file.check_unchanged()
    return console.OK


def _inputs(args: argparse.Namespace, *files: GgufFile | StateFile | None) -> list[Path]:
    """Return every file that is read."""
    found = [Path(path) for path in (args.model, args.queries) if path]
    for file in filter(None, files):
        found += getattr(file, "shard_paths", None) or [file.path]
    return found


def _check(args: argparse.Namespace) -> None:
    if args.threads is not None and args.threads < 1:
        raise InputError("--threads", str(args.threads), "at least 1")
    if args.max_rows < 0 or args.max_rows == 1:
        raise InputError("--max-rows", str(args.max_rows), "at least 2, or 0 for all")
    for name in ("max_kl", "max_output_error"):
        value = getattr(args, name)
        flag = "--" + name.replace("_", "-")
        if value is not None and not value >= 0:
            raise InputError(flag, str(value), "a number from 0 up")
        if value is not None and not args.candidates:
            raise InputError(flag, str(value), "--candidates to choose from")


class Layers:
    """The layer numbers that `--layers` names: ranges, which may be as long as they like."""

    def __init__(self, text: str) -> None:
        self.ranges = []
        for part in text.split(","):
            match = LAYER_RANGE.fullmatch(part.strip())
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if last < first:
                need = "numbers and ranges, such as 0,5-8"
                raise InputError("--layers", text[:SHOWN_CHARACTERS], need)
            self.ranges.append(range(first, last + 1))

    def __contains__(self, layer: int | None) -> bool:
        return layer is not None and any(layer in some for some in self.ranges)


def _open(args: argparse.Namespace, path: str, **changes) -> GgufFile | StateFile:
    from gguf_io import open_gguf
    from gguf_io.state import is_state_file

    if is_state_file(path):
        return state_options.open_from(args, path, **changes)
    console.refuse_flags(args, state_options.NAMES, f"{path} is a GGUF file", "a state file")
    return open_gguf(path, changes.get("dialect", args.dialect))


def _limits(args: argparse.Namespace) -> dict[str, float]:
    max_kl = DEFAULT_MAX_KL if args.max_kl is None else args.max_kl
    output = max_kl if args.max_output_error is None else args.max_output_error
    return {"max_kl": max_kl, "max_output_error": output}


def _cheapest(args: argparse.Namespace, found) -> list[Combination]:
    from gguf_io.candidates import cheapest

    layers = found.layer_candidates()
    return cheapest(layers, **_limits(args)) if layers else []


if __name__ == "__main__":
    sys.exit(main())
