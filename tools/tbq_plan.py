"""tbq-plan: which types a model's KV cache can have, and how much memory it takes."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING

import tbq
from tbq.errors import InputError

from . import console

if TYPE_CHECKING:  # imported where they are used, --help needs none
    from gguf_io.cache_shapes import CacheShapes
    from gguf_io.layer_types import Boundary
    from gguf_io.planner import Types

    from .plan_report import Request

DEFAULT_DIALECT = "pr21089"
DEFAULT_UBATCH = 512
DEFAULT_PROTECT_TYPE = "q8_0"
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="tbq-plan",
        usage="tbq-plan [options] MODEL\n       tbq-plan train [options] MODEL",
        description="Say what llama.cpp will allocate for a model's context: bytes per cache and "
        "layer, exactly, from the metadata of its GGUF file. Without types, list every pair of "
        "types for K and V that the model can have. Flags are llama.cpp's where it has them.",
        epilog=console.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", metavar="MODEL", help="GGUF file, or the first shard of a split one")
    add("-c", "--ctx-size", metavar="N", type=int, help="tokens; default: as it was trained with")
    add("-np", "--parallel", metavar="N", type=int, default=1, help="sequences; default 1")
    add(
        "-ub",
        "--ubatch-size",
        metavar="N",
        type=int,
        default=DEFAULT_UBATCH,
        help=f"tokens evaluated together; default {DEFAULT_UBATCH}",
    )
    add("-kvu", "--kv-unified", action="store_true", help="all sequences share one stream of cells")
    add("--swa-full", action="store_true", help="caches of sliding windows as long as the others")
    add("-fa", "--flash-attn", choices=("on", "off", "auto"), default="auto", help="default auto")
    add("-ctk", "--cache-type-k", metavar="T", help="type of K")
    add("-ctv", "--cache-type-v", metavar="T", help="type of V; default of both: f16")
    add(
        "--dialect",
        metavar="D",
        help="whose types: "
        f"{', '.join(tbq.dialects())}; default: that of the types, or {DEFAULT_DIALECT}",
    )
    add(
        "--vram",
        metavar="SIZE",
        help="memory for model and context, such as 12G (GiB) or 12GB (10^9 bytes): the longest "
        "context that fits is said",
    )
    add("--protect-first", metavar="N", type=int, help="keep N layers, of those with a cache, in T")
    add("--protect-last", metavar="N", type=int, help="the same of the last layers")
    add("--protect-type", metavar="T", help=f"their type; default {DEFAULT_PROTECT_TYPE}")
    add("--layers", metavar="LIST", help="types of layers, K/V: 0-10=q8_0,11-31=q8_0/q4_0")
    add(
        "--override-kv",
        metavar="KEY=TYPE:VALUE",
        action="append",
        default=[],
        help="stand in for a metadata key of the file; TYPE: int, float, bool or str",
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        from . import plan_train

        return plan_train.main(argv[1:])
    return console.run(build_parser(), plan_command, argv, lists=lambda args: True)


def plan_command(args: argparse.Namespace) -> int:
    """Carry out one plan; returns the exit code."""
    from gguf_io import open_gguf
    from gguf_io.cache_shapes import cache_shapes

    from .plan_report import report
    from .quantize_arguments import metadata_overrides

    overrides = {key: field.value for key, field in metadata_overrides(args).items()}
    with open_gguf(args.file) as file:
        shapes = cache_shapes(file, overrides)
        found = report(file, shapes, _request(args, shapes))
    if args.json:
        console.print_json(found)
    else:
        from .plan_text import print_report

        print_report(found)
    return console.OK


def _request(args: argparse.Namespace, shapes: CacheShapes) -> Request:
    from gguf_io.layer_types import loader, parse_layers, protected
    from gguf_io.planner import Context

    from .plan_report import Request

    n_ctx = args.ctx_size or shapes.n_ctx_train
    if n_ctx is None:
        need = f"-c, for the file has no {shapes.architecture}.context_length"
        raise InputError("context", "none", need)
    types = _types(args, shapes)
    dialect = _dialect(args, types)
    edges = _edges(args, dialect)
    if edges and args.layers:
        raise InputError("--layers", "--protect-first or --protect-last too", "one of them")
    layers = protected(edges, shapes) if edges else {}
    if args.layers:
        layers = parse_layers(args.layers, dialect, shapes)
    return Request(
        context=Context(
            n_ctx=n_ctx,
            n_parallel=args.parallel,
            n_ubatch=args.ubatch_size,
            kv_unified=args.kv_unified,
            swa_full=args.swa_full,
            flash_attn=args.flash_attn != "off",
        ),
        n_ctx_assumed=not args.ctx_size,
        types=types,
        dialect=dialect,
        layers=layers,
        edges=edges,
        loader=loader(dialect) if layers else None,
        vram=None if args.vram is None else parse_size(args.vram),
    )


def _types(args: argparse.Namespace, shapes: CacheShapes) -> Types | None:
    """Return the types that were asked for; what llama.cpp takes if only one was."""
    from gguf_io.planner import Types
    from gguf_io.types import resolve_type

    if args.cache_type_k is None and args.cache_type_v is None:
        return None
    k, v = args.cache_type_k or "f16", args.cache_type_v or "f16"
    if shapes.same_types:  # where llama.cpp would refuse the one that was left out
        k, v = args.cache_type_k or v, args.cache_type_v or k
    return Types(resolve_type(k, args.dialect), resolve_type(v, args.dialect))


def _dialect(args: argparse.Namespace, types: Types | None) -> str:
    """Return whose types are meant: those of the flag, or of the types that are not ggml's."""
    if args.dialect:
        tbq.registry.split_dialect(args.dialect)
        return args.dialect
    own = {fmt.dialect for fmt in (types.k, types.v) if not fmt.is_ggml} if types else set()
    if len(own) > 1:
        raise InputError("types", " and ".join(sorted(own)), "those of one dialect")
    return own.pop() if own else DEFAULT_DIALECT


def _edges(args: argparse.Namespace, dialect: str) -> Boundary | None:
    from gguf_io.layer_types import Boundary
    from gguf_io.types import resolve_type

    first, last = args.protect_first or 0, args.protect_last or 0
    for name, value in (("--protect-first", first), ("--protect-last", last)):
        if value < 0:
            raise InputError(name, str(value), "0 or more layers")
    if not (first or last):
        if args.protect_type:
            raise InputError("--protect-type", args.protect_type, "--protect-first or -last")
        return None
    return Boundary(first, last, resolve_type(args.protect_type or DEFAULT_PROTECT_TYPE, dialect))


def parse_size(text: str) -> int:
    """Return the bytes of a size: K, M, G and T are powers of 1024, with B behind them of 1000.

    Raises:
        InputError: not a size.
    """
    match = re.fullmatch(r"(\d{1,15})(?:\.(\d{1,6}))?\s*([KMGT]?)(i?B)?", text.strip(), re.I)
    if match is None:
        raise InputError("--vram", text, "a size, such as 24G or 12GB")
    whole, part, unit, suffix = match.groups()
    unit = unit.upper()
    power = list(UNITS).index(unit)
    factor = 1000**power if suffix and suffix.upper() == "B" else UNITS[unit]
    return int(whole) * factor + (int(part) * factor // 10 ** len(part) if part else 0)


if __name__ == "__main__":
    sys.exit(main())
