"""tbq-quantize: change the types in a GGUF file, as llama-quantize does, or in a KV-cache dump."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tbq
from tbq.errors import InputError

from . import console, quantize_arguments, state_options
from .patterns import compiled
from .quantize_report import Job, announce, overrides, report, warn_unmatched

if TYPE_CHECKING:  # imported where they are used: gguf alone costs 0.2 s, --help needs none
    from gguf_io import GgufFile
    from gguf_io.type_policy import Options

STATE_FLAGS = (
    *("type_k", "type_v", "no_rotate", "allow_mixed", "state_version"),
    *state_options.NAMES,
)


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    keys = "\n".join(f"  {_describe(fmt)}" for fmt in tbq.formats())
    parser = argparse.ArgumentParser(
        prog="tbq-quantize",
        usage="tbq-quantize [options] INPUT [OUTPUT] TYPE [NTHREADS]\n"
        "       tbq-quantize [options] --type-k TYPE --type-v TYPE INPUT OUTPUT",
        description="Change the tensor types of a GGUF file, as llama-quantize does, or the types "
        "of K and V in a llama.cpp state file (prompt cache, slot save). "
        "Types f32, f16 and bf16 dequantise.",
        epilog=f"TYPE is a registered format,\n{keys}\n"
        "or f32, f16, bf16; a mixture "
        f"({', '.join(quantize_arguments.MIXTURES).upper()}); "
        "the number of a llama.cpp file type; or COPY, which changes no tensor.\n\n"
        + console.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "operands",
        metavar="INPUT [OUTPUT] TYPE",
        nargs="+",
        help="INPUT: a GGUF file, the first shard of a split model, or a state file; OUTPUT: by "
        "default ggml-model-TYPE.gguf beside INPUT, or INPUT's name with the types in it for a "
        "state file; TYPE: see below, case does not matter",
    )
    add("--pure", action="store_true", help="give every quantisable tensor TYPE, no mixture")
    add(
        "--tensor-type",
        metavar="REGEX=TYPE",
        action="append",
        default=[],
        help="type for tensors whose name contains a match; repeatable, the first match wins",
    )
    add("--output-tensor-type", metavar="T", help="type for output.weight")
    add("--token-embedding-type", metavar="T", help="type for the token embeddings")
    add("--leave-output-tensor", action="store_true", help="keep output.weight as it is")
    add(
        "--allow-requantize",
        action="store_true",
        help="quantise tensors that are quantised already; quality suffers",
    )
    add(
        "--include",
        metavar="REGEX",
        action="append",
        default=[],
        help="convert only tensors whose name contains a match; repeatable",
    )
    add(
        "--exclude",
        metavar="REGEX",
        action="append",
        default=[],
        help="keep tensors whose name contains a match; repeatable",
    )
    add(
        "--dialect",
        metavar="D",
        help=f"dialect of INPUT's type ids and of bare format names: {', '.join(tbq.dialects())}",
    )
    add(
        "--to-dialect",
        metavar="D",
        help="write OUTPUT for another fork or release, DIALECT[@RELEASE]: tensors in its formats "
        "of the same codes and scales, without loss where there are such, and its type ids; TYPE "
        "can be left out",
    )
    add("--keep-split", action="store_true", help="write as many shards as INPUT has")
    add(
        "--allow-overflow",
        action="store_true",
        help="write finite values that become infinite or NaN; otherwise nothing is written then",
    )
    add("--dry-run", action="store_true", help="check and print everything, write nothing")
    add(
        "--verify",
        action="store_true",
        help="read OUTPUT back and print relative MSE and cosine per tensor",
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--threads", metavar="N", type=int, help="worker threads; default: all cores")
    console.add_workers(parser)
    quantize_arguments.add(parser)
    group = parser.add_argument_group("state files")
    group.add_argument("--type-k", metavar="T", help="type for K; TYPE is for the other side")
    group.add_argument("--type-v", metavar="T", help="type for V")
    state_options.add(group)
    group.add_argument(
        "--no-rotate",
        action="store_true",
        help="write quantised rows unrotated, for LLAMA_ATTN_ROT_DISABLE=1",
    )
    group.add_argument(
        "--allow-mixed",
        action="store_true",
        help="let layers differ in type where the fork itself could not load that",
    )
    group.add_argument(
        "--state-version",
        metavar="N",
        type=int,
        choices=(9, 10),
        help="write session version 9 (sequence 2) or 10 (sequence 3) of llama.cpp; TYPE can be "
        "COPY",
    )
    return parser


def _describe(fmt: tbq.Format) -> str:
    aliases = f" ({', '.join(fmt.aliases)})" if fmt.aliases else ""
    read = f"; {tbq.format.EVIDENCE['read']}" if fmt.evidence == "read" else ""
    return f"{fmt.key}{aliases}  {fmt.bpw:g} bits per value, blocks of {fmt.block_values}{read}"


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return console.run(build_parser(), convert, argv)


def convert(args: argparse.Namespace) -> int:
    """Carry out one conversion; returns the exit code."""
    from gguf_io.state import is_state_file

    quantize_arguments.refuse_unsupported(args)
    quantize_arguments.name_operands(args)
    if args.threads is not None and args.threads < 1:
        raise InputError("--threads", str(args.threads), "at least 1")
    if args.threads is not None and (args.workers or args.scheduler):
        need = "none with --workers or --scheduler: a task has one thread"
        raise InputError("--threads", str(args.threads), need)
    if is_state_file(args.input):
        from .quantize_state import convert_state

        return convert_state(args)
    return _convert_gguf(args)


def _convert_gguf(args: argparse.Namespace) -> int:
    from gguf_io import open_gguf
    from gguf_io.convert import plan_model

    console.refuse_flags(args, STATE_FLAGS, f"{args.input} is a GGUF file", "a state file")
    options = _options(args)
    name = quantize_arguments.COPY
    if options.target:
        name = options.mixture.upper() or options.target.label
    with open_gguf(args.input, args.dialect) as file:
        outputs = _output_paths(args, options, file)
        job = Job(args, file, name, file.shard_paths, outputs)
        if file.dialect_guessed:
            job.note(f"reading {args.input} as dialect {file.dialect}: {file.dialect_reason}")
        if args.include_weights or args.exclude_weights:
            job.note("--include-weights and --exclude-weights choose importance data; none is used")
        quantized = options.target is not None and options.target.is_quantized
        if options.overrides and (options.pure or not quantized):
            job.note("--tensor-type is ignored with --pure and with types that are not quantised")
        warn_unmatched(job, file.tensors)
        order = file.tensors.values() if args.keep_split else None
        job.results = plan_model(file, options, order)
        _write(job, options)
        if not args.dry_run and args.verify:
            _verify(job)
        report(job)
        return job.code


def _options(args: argparse.Namespace) -> Options:
    from gguf_io import resolve_type
    from gguf_io.type_policy import Options

    def type_(name: str | None):
        return None if name is None else resolve_type(name, args.to_dialect or args.dialect)

    return Options(
        target=quantize_arguments.target_type(args.type, args.to_dialect or args.dialect),
        pure=args.pure,
        overrides=overrides(args),
        output_type=type_(args.output_tensor_type),
        embedding_type=type_(args.token_embedding_type),
        leave_output=args.leave_output_tensor,
        include=[compiled("--include", text) for text in args.include],
        exclude=[compiled("--exclude", text) for text in args.exclude],
        allow_requantize=args.allow_requantize,
        to=args.to_dialect,
        mixture=quantize_arguments.mixture(args.type),
    )


def _output_paths(args: argparse.Namespace, options: Options, file: GgufFile) -> list[Path]:
    from gguf_io import split_path
    from gguf_io.atomic import refuse_inputs

    kind = options.mixture or options.target.name if options.target else quantize_arguments.COPY
    name = f"ggml-model-{kind.upper()}.gguf"
    output = Path(args.output) if args.output else file.path.with_name(name)
    paths = [output]
    if args.keep_split:
        count = len(file.shard_paths)
        prefix = output.with_suffix("") if output.suffix == ".gguf" else output
        paths = [split_path(prefix, no, count) for no in range(count)]
    refuse_inputs(paths, [*file.shard_paths, *args.tensor_type_file])
    return paths


def _write(job: Job, options: Options) -> None:
    """Write the output, or only say what would be written."""
    from gguf_io.convert import write_model

    total = sum(outcome.tensor.n_bytes for outcome in job.results)
    if job.args.dry_run:
        with console.Progress(total, "quantising") as progress:
            for outcome in job.results:
                announce(job, outcome, progress)
        return
    with (
        console.workers(job.args) as client,
        console.Progress(total, "quantising") as progress,
    ):
        write_model(
            job.file,
            job.results,
            job.outputs,
            options.target,
            mixture=options.mixture,
            dialect=job.args.to_dialect,
            metadata=quantize_arguments.metadata_overrides(job.args),
            keep_split=job.args.keep_split,
            allow_overflow=job.args.allow_overflow,
            threads=job.args.threads,
            client=client,
            done=lambda outcome: announce(job, outcome, progress),
            advance=progress.advance,
        )


def _verify(job: Job) -> None:
    """Read the output back and compare every tensor with the input."""
    from gguf_io import open_gguf
    from gguf_io.convert import verify_model

    total = sum(outcome.tensor.n_bytes for outcome in job.results)
    with (
        open_gguf(job.outputs[0]) as written,
        console.Progress(total, "verifying") as progress,
    ):
        verify_model(job.results, written, threads=job.args.threads, advance=progress.advance)


if __name__ == "__main__":
    sys.exit(main())
