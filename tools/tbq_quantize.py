"""tbq-quantize: change the types in a GGUF file, as llama-quantize does, or in a KV-cache dump."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tbq
from tbq.errors import InputError
from tbq.metrics import Distortion

from . import console, state_options

if TYPE_CHECKING:  # imported where they are used: gguf alone costs 0.2 s, --help needs none
    from gguf_io import GgmlType, GgufFile, GgufTensor, OutputTensor, StateFile

    from .type_policy import Choice, Options

# Float32 values that are held at a time.
CHUNK_VALUES = 1 << 21
MIB = 1024 * 1024
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
SCHEMA = "tbq-quantize/1"
STATE_FLAGS = ("type_k", "type_v", "no_rotate", "allow_mixed", *state_options.NAMES)


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    keys = "\n".join(f"  {_describe(fmt)}" for fmt in tbq.formats())
    parser = argparse.ArgumentParser(
        prog="tbq-quantize",
        usage="tbq-quantize [options] INPUT [OUTPUT] TYPE\n"
        "       tbq-quantize [options] --type-k TYPE --type-v TYPE INPUT OUTPUT",
        description="Change the tensor types of a GGUF file, as llama-quantize does, or the types "
        "of K and V in a llama.cpp state file (prompt cache, slot save). "
        "Types f32, f16 and bf16 dequantise.",
        epilog=f"TYPE is a registered format,\n{keys}\n"
        "or f32, f16, bf16, or a type that gguf-py quantises to "
        "(q8_0, q4_0, q4_1, q5_0, q5_1, tq1_0, tq2_0, mxfp4).\n\n" + console.EXIT_CODES,
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
    add("--keep-split", action="store_true", help="write as many shards as INPUT has")
    add("--dry-run", action="store_true", help="check and print everything, write nothing")
    add(
        "--verify",
        action="store_true",
        help="read OUTPUT back and print relative MSE and cosine per tensor",
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--threads", metavar="N", type=int, help="worker threads; default: all cores")
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
    return parser


def _describe(fmt: tbq.Format) -> str:
    aliases = f" ({', '.join(fmt.aliases)})" if fmt.aliases else ""
    return f"{fmt.key}{aliases}  {fmt.bpw:g} bits per value, blocks of {fmt.block_values}"


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return console.run(build_parser(), convert, argv)


@dataclass
class Result:
    """What became of one tensor."""

    choice: Choice
    n_bytes: int
    nonfinite: int = 0
    distortion: Distortion | None = None
    identical: bool | None = None

    @property
    def failed(self) -> bool:
        """Whether the tensor read back is not what it should be."""
        if self.identical is not None:
            return not self.identical
        d = self.distortion
        if d is None:
            return False
        return d.nonfinite_decoded > d.nonfinite_original or d.relative_mse > 1


@dataclass
class Job:
    """One run of the program: what was asked for, found and done."""

    args: argparse.Namespace
    file: GgufFile | StateFile
    target: str
    sources: tuple[Path, ...]
    outputs: list[Path]
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str, progress: console.Progress | None = None) -> None:
        """Tell the user something that is not an error."""
        self.notes.append(text)
        write = print if progress is None else progress.print
        write(f"tbq-quantize: {text}", file=sys.stderr)


def convert(args: argparse.Namespace) -> int:
    """Carry out one conversion; returns the exit code."""
    from gguf_io.state import is_state_file

    if args.threads is not None and args.threads < 1:
        raise InputError("--threads", str(args.threads), "at least 1")
    _name_operands(args)
    if is_state_file(args.input):
        from .quantize_state import convert_state

        return convert_state(args)
    return _convert_gguf(args)


def _name_operands(args: argparse.Namespace) -> None:
    """Tell the positional arguments apart: INPUT [OUTPUT] TYPE, TYPE optional with --type-k, -v."""
    args.input, *rest = args.operands
    typed = args.type_k is not None or args.type_v is not None
    least, most = (0, 2) if typed else (1, 2)
    if not least <= len(rest) <= most:
        need = "INPUT [OUTPUT] with --type-k and --type-v" if typed else "INPUT [OUTPUT] TYPE"
        raise InputError("arguments", f"{len(args.operands)} of them", need)
    has_type = len(rest) == 2 or not typed
    args.type = rest.pop() if has_type else None
    args.output = rest[0] if rest else None


def _convert_gguf(args: argparse.Namespace) -> int:
    from gguf_io import open_gguf
    from gguf_io.types import row_bytes, type_key

    from .type_policy import choose_types, is_quantized

    console.refuse_flags(args, STATE_FLAGS, f"{args.input} is a GGUF file", "a state file")
    options = _options(args)
    with open_gguf(args.input, args.dialect) as file:
        outputs = _output_paths(args, options, file)
        job = Job(args, file, type_key(options.target), file.shard_paths, outputs)
        if file.dialect_guessed:
            job.note(f"reading {args.input} as dialect {file.dialect}: {file.dialect_reason}")
        if options.overrides and (options.pure or not is_quantized(options.target)):
            job.note("--tensor-type is ignored with --pure and with types that are not quantised")
        for choice in choose_types(file, options, _order(file, args.keep_split)):
            tensor = choice.tensor
            size = tensor.n_bytes
            if choice.converts:
                size = row_bytes(choice.type, tensor.ggml_shape[0]) * tensor.n_rows
            job.results.append(Result(choice, size))
        _convert(job, options)
        if not job.args.dry_run and args.verify:
            _verify(job)
        report(job)
        return console.FAILED if any(r.failed for r in job.results) else console.OK


def _options(args: argparse.Namespace) -> Options:
    from gguf_io import resolve_type

    from .type_policy import Options

    def type_(name: str | None):
        return None if name is None else resolve_type(name, args.dialect)

    return Options(
        target=type_(args.type),
        pure=args.pure,
        overrides=overrides(args),
        output_type=type_(args.output_tensor_type),
        embedding_type=type_(args.token_embedding_type),
        leave_output=args.leave_output_tensor,
        include=[pattern("--include", text) for text in args.include],
        exclude=[pattern("--exclude", text) for text in args.exclude],
        allow_requantize=args.allow_requantize,
    )


def overrides(args: argparse.Namespace) -> list[tuple[re.Pattern, tbq.Format | GgmlType]]:
    """Return the (pattern, type) pairs of --tensor-type."""
    from gguf_io import resolve_type

    found = []
    for text in args.tensor_type:
        expression, equals, name = text.rpartition("=")
        if not equals or not expression:
            raise InputError("--tensor-type", text, "REGEX=TYPE")
        kind = resolve_type(name, args.dialect)
        found.append((pattern("--tensor-type", expression.lower()), kind))
    return found


def pattern(flag: str, text: str) -> re.Pattern:
    """Compile a regular expression that the user gave with a flag."""
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(flag, text, f"a regular expression ({error})") from None


def _output_paths(args: argparse.Namespace, options: Options, file: GgufFile) -> list[Path]:
    from gguf_io import split_path

    name = f"ggml-model-{options.target.name.upper()}.gguf"
    output = Path(args.output) if args.output else file.path.with_name(name)
    paths = [output]
    if args.keep_split:
        count = len(file.shard_paths)
        prefix = output.with_suffix("") if output.suffix == ".gguf" else output
        paths = [split_path(prefix, no, count) for no in range(count)]
    for path in paths:
        for source in file.shard_paths:
            if path.exists() and os.path.samefile(path, source):
                raise InputError("OUTPUT", str(path), "a file other than INPUT")
    return paths


def _order(file: GgufFile, keep_split: bool) -> list[GgufTensor]:
    """Order the tensors as llama-quantize writes them: by layer and name, or as in the shards."""
    tensors = list(file.tensors.values())
    if keep_split:
        return tensors

    def layer_and_name(tensor: GgufTensor) -> tuple[int, bytes]:
        layer = re.match(r"blk\.(\d+)", tensor.name)
        return int(layer[1]) if layer else -1, tensor.name.encode()

    return sorted(tensors, key=layer_and_name)


def _convert(job: Job, options: Options) -> None:
    """Write the output, or only say what would be written."""
    from gguf_io import write_gguf, write_gguf_shards
    from gguf_io.writer import file_dialect

    file_dialect(result.choice.type for result in job.results)  # before anything is written
    total = sum(result.choice.tensor.n_bytes for result in job.results)
    with console.Progress(total, "quantising") as progress:
        if job.args.dry_run:
            for result in job.results:
                announce(job, result, progress)
            return
        fields = _metadata(job, options)
        outputs = [_output_tensor(job, result, progress) for result in job.results]
        if not job.args.keep_split:
            write_gguf(job.outputs[0], fields, outputs)
            return
        shards: list[list[OutputTensor]] = [[] for _ in job.outputs]
        for result, output in zip(job.results, outputs, strict=True):
            shards[result.choice.tensor.shard].append(output)
        prefix = str(job.outputs[0]).removesuffix(f"-00001-of-{len(job.outputs):05d}.gguf")
        write_gguf_shards(prefix, fields, shards)


def _metadata(job: Job, options: Options) -> dict:
    """Copy the input's metadata and set what llama-quantize sets, where it sets it: at the end."""
    from gguf import GGUFValueType

    from gguf_io import Field

    from .type_policy import file_type

    fields = dict(job.file.metadata.fields)
    numbers = {
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": file_type(options.target),
    }
    for key, number in numbers.items():
        fields.pop(key, None)
        if number is not None:
            fields[key] = Field.of(number, GGUFValueType.UINT32)
    return fields


def _output_tensor(job: Job, result: Result, progress: console.Progress) -> OutputTensor:
    from gguf_io import OutputTensor

    tensor = result.choice.tensor

    def chunks() -> Iterator:
        for start, stop in _row_chunks(tensor):
            yield _convert_rows(job, result, start, stop)
            tensor.release(start, stop)
            progress.advance((stop - start) * (tensor.n_bytes // tensor.n_rows))
        announce(job, result, progress)

    return OutputTensor(tensor.name, tensor.shape, result.choice.type, result.n_bytes, chunks)


def _row_chunks(tensor: GgufTensor) -> Iterator[tuple[int, int]]:
    """Yield the rows piece by piece; in one piece if its bytes are not known to fall into rows."""
    from gguf_io import Unknown

    is_unknown = isinstance(tensor.format, Unknown)
    step = tensor.n_rows if is_unknown else max(1, CHUNK_VALUES // tensor.ggml_shape[0])
    for start in range(0, tensor.n_rows, step):
        yield start, min(start + step, tensor.n_rows)


def _convert_rows(job: Job, result: Result, start: int, stop: int):
    import numpy as np

    from gguf_io.types import Unknown, quantize_rows

    tensor, kind = result.choice.tensor, result.choice.type
    if not result.choice.converts:
        return tensor.raw if isinstance(kind, Unknown) else tensor.rows(start, stop)
    threads = job.args.threads
    x = tensor.dequantize_rows(start, stop, threads=threads)
    result.nonfinite += x.size - int(np.isfinite(x).sum())
    first_block = start * (x.shape[-1] // kind.block_values)
    indexed = isinstance(kind, tbq.Format) and kind.block_index == "tensor"
    return quantize_rows(x, kind, first_block=first_block if indexed else 0, threads=threads)


def announce(job: Job, result: Result, progress: console.Progress) -> None:
    """Print a tensor's line as llama-quantize does, and what there is to say about it."""
    choice = result.choice
    tensor = choice.tensor
    number = job.results.index(result) + 1
    if not job.args.json:
        ne = [*tensor.ggml_shape, 1, 1, 1][:4]
        line = f"[{number:4d}/{len(job.results):4d}] {tensor.name:<36} - "
        line += f"[{', '.join(f'{n:5d}' for n in ne)}], type = {tensor.format.name:>6}, "
        if choice.converts:
            line += f"converting to {choice.type.name} .. size = {tensor.n_bytes / MIB:8.2f} MiB"
            line += f" -> {result.n_bytes / MIB:8.2f} MiB"
        else:
            line += f"size = {tensor.n_bytes / MIB:8.3f} MiB"
        progress.print(line)
    if choice.note:
        job.note(f"{tensor.name}: {choice.note}", progress)
    if result.nonfinite:
        job.note(f"{tensor.name}: {result.nonfinite} values are NaN or infinite", progress)


def _verify(job: Job) -> None:
    """Read the output back, compare every tensor with the input, and keep the result."""
    import numpy as np

    from gguf_io import open_gguf
    from gguf_io.types import Unknown

    total = sum(result.choice.tensor.n_bytes for result in job.results)
    with (
        open_gguf(job.outputs[0]) as written,
        console.Progress(total, "verifying") as progress,
    ):
        for result in job.results:
            source, copy = result.choice.tensor, written.tensors[result.choice.tensor.name]
            result.identical = not result.choice.converts
            if isinstance(source.format, Unknown):
                result.identical = np.array_equal(source.raw, copy.raw[: source.n_bytes])
                continue
            distortion = Distortion()
            for start, stop in _row_chunks(source):
                if result.choice.converts:
                    threads = job.args.threads
                    distortion.add(
                        source.dequantize_rows(start, stop, threads=threads),
                        copy.dequantize_rows(start, stop, threads=threads),
                    )
                elif not np.array_equal(source.rows(start, stop), copy.rows(start, stop)):
                    result.identical = False
                source.release(start, stop)
                copy.release(start, stop)
                progress.advance((stop - start) * (source.n_bytes // source.n_rows))
            if result.choice.converts:
                result.identical, result.distortion = None, distortion


def report(job: Job) -> None:
    """Print the totals, and what --verify found."""
    tensors = [result.choice.tensor for result in job.results]
    values = sum(tensor.n_values for tensor in tensors)
    sizes = {
        "model": sum(tensor.n_bytes for tensor in tensors),
        "quant": sum(result.n_bytes for result in job.results),
    }
    if job.args.json:
        console.print_json(_json(job, values, sizes))
        return
    if any(result.distortion is not None or result.identical is not None for result in job.results):
        _print_verification(job)
    for name, size in sizes.items():
        bits = 8 * size / values if values else 0.0
        print(f"{name} size  = {size / MIB:8.2f} MiB ({bits:.2f} BPW)")
    fallbacks = sum(result.choice.fallback for result in job.results)
    if fallbacks:
        text = f"{fallbacks} of {len(tensors)} tensor(s) required fallback quantization"
        print(f"WARNING: {text}")
    if job.args.dry_run:
        print("dry run: nothing was written")
    else:
        print(f"wrote {', '.join(map(str, job.outputs))}")


def _print_verification(job: Job) -> None:
    print(f"\n{'tensor':<36} {'type':>10} {'relative MSE':>13} {'cosine':>10}")
    for result in job.results:
        line = f"{result.choice.tensor.name:<36} {result.choice.type.name:>10} "
        d = result.distortion
        line += f"{d.relative_mse:13.3e} {d.cosine:10.6f}" if d else f"{'copied':>13} {'':>10}"
        print(line + ("  FAILED" if result.failed else ""))
    print()


def _json(job: Job, values: int, sizes: dict[str, int]) -> dict:
    return {
        "schema": SCHEMA,
        "input": [str(path) for path in job.sources],
        "output": [] if job.args.dry_run else [str(path) for path in job.outputs],
        "type": job.target,
        "input_dialect": job.file.dialect,
        "input_dialect_reason": job.file.dialect_reason,
        "tensors": [_json_tensor(result) for result in job.results],
        "values": values,
        "model_bytes": sizes["model"],
        "quant_bytes": sizes["quant"],
        "model_bpw": 8 * sizes["model"] / values if values else None,
        "quant_bpw": 8 * sizes["quant"] / values if values else None,
        "fallbacks": sum(result.choice.fallback for result in job.results),
        "notes": job.notes,
    }


def _json_tensor(result: Result) -> dict:
    choice, d = result.choice, result.distortion
    return {
        "name": choice.tensor.name,
        "ggml_shape": list(choice.tensor.ggml_shape),
        "from": choice.tensor.format.name,
        "to": choice.type.name,
        "model_bytes": choice.tensor.n_bytes,
        "quant_bytes": result.n_bytes,
        "nonfinite": result.nonfinite,
        "note": choice.note or None,
        "relative_mse": d.relative_mse if d else None,
        "cosine": d.cosine if d else None,
        "identical": result.identical,
        "failed": result.failed,
    }


if __name__ == "__main__":
    sys.exit(main())
