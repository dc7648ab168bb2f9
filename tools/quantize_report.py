"""What tbq-quantize tells its user about a model or a dump: a line per tensor, totals, JSON."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tbq
from tbq.errors import InputError

from . import console
from .patterns import compiled
from .quantize_arguments import tensor_types

if TYPE_CHECKING:  # imported where they are used: gguf alone costs 0.2 s, --help needs none
    from gguf_io import GgufFile, StateFile
    from gguf_io.convert import Outcome

MIB = 1024 * 1024
SCHEMA = "tbq-quantize/1"


@dataclass
class Job:
    """One run of the program: what was asked for, found and done."""

    args: argparse.Namespace
    file: GgufFile | StateFile
    target: str
    sources: tuple[Path, ...]
    outputs: list[Path]
    results: list[Outcome] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    announced: int = 0

    def note(self, text: str, progress: console.Progress | None = None) -> None:
        """Tell the user something that is not an error."""
        self.notes.append(text)
        write = console.say if progress is None else progress.print
        write(f"tbq-quantize: {text}", file=sys.stderr)

    @property
    def code(self) -> int:
        """The exit code: whether what was read back is what it should be."""
        return console.FAILED if any(r.failed for r in self.results) else console.OK


def overrides(args: argparse.Namespace) -> list[tuple[re.Pattern, tbq.Format]]:
    """Return the (pattern, type) pairs of --tensor-type."""
    from gguf_io import resolve_type

    found = []
    for text in tensor_types(args):
        expression, equals, name = text.rpartition("=")
        if not equals or not expression:
            raise InputError("--tensor-type", text, "REGEX=TYPE")
        kind = resolve_type(name, args.to_dialect or args.dialect)
        found.append((compiled("--tensor-type", expression.lower()), kind))
    return found


def warn_unmatched(job: Job, names: Iterable[str]) -> None:
    """Say which patterns match no tensor: they do nothing, which is seldom meant."""
    names = list(names)
    given = [("--tensor-type", text.rpartition("=")[0].lower()) for text in tensor_types(job.args)]
    given += [("--include", text) for text in job.args.include]
    given += [("--exclude", text) for text in job.args.exclude]
    for flag, text in given:
        if not any(map(compiled(flag, text).search, names)):
            job.note(f"warning: {flag} {text} matches no tensor")


def announce(job: Job, outcome: Outcome, progress: console.Progress) -> None:
    """Print a tensor's line as llama-quantize does, and what there is to say about it."""
    tensor = outcome.tensor
    job.announced += 1
    if not job.args.json:
        ne = [*tensor.ggml_shape, 1, 1, 1][:4]
        line = f"[{job.announced:4d}/{len(job.results):4d}] {tensor.name:<36} - "
        line += f"[{', '.join(f'{n:5d}' for n in ne)}], type = {tensor.format.name:>6}, "
        if outcome.converts:
            line += f"converting to {outcome.type.name} .. size = {tensor.n_bytes / MIB:8.2f} MiB"
            line += f" -> {outcome.n_bytes / MIB:8.2f} MiB"
        else:
            line += f"size = {tensor.n_bytes / MIB:8.3f} MiB"
        progress.print(line)
    if outcome.note:
        job.note(f"{tensor.name}: {outcome.note}", progress)
    if outcome.nonfinite:
        job.note(f"{tensor.name}: {outcome.nonfinite} values are NaN or infinite", progress)
    if outcome.overflowed:
        job.note(overflow_note(outcome), progress)


def overflow_note(outcome: Outcome) -> str:
    """Say how many finite values were too large."""
    n, name = outcome.overflowed, outcome.tensor.name
    return f"{name}: {n} finite values become infinite or NaN as {outcome.type.name}"


def report(job: Job) -> None:
    """Print the totals, and what --verify found."""
    tensors = [result.tensor for result in job.results]
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
        bits = _bits(job, size, values)
        bits = "unknown" if bits is None else f"{bits:.2f}"
        print(f"{name} size  = {size / MIB:8.2f} MiB ({bits} BPW)")
    fallbacks = sum(result.fallback for result in job.results)
    if fallbacks:
        text = f"{fallbacks} of {len(tensors)} tensor(s) required fallback quantization"
        print(f"WARNING: {text}")
    if job.args.dry_run:
        print("dry run: nothing was written")
    else:
        console.say(f"wrote {', '.join(map(str, job.outputs))}")


def _bits(job: Job, size: int, values: int) -> float | None:
    """Return the bits per value of a file; None with a type of which only the room is known."""
    unknown = any(result.type.dialect is None for result in job.results)
    return 8 * size / values if values and not unknown else None


def _print_verification(job: Job) -> None:
    print(f"\n{'tensor':<36} {'type':>10} {'relative MSE':>13} {'cosine':>10}")
    for result in job.results:
        line = f"{result.tensor.name:<36} {result.type.name:>10} "
        d = result.distortion
        line += f"{d.relative_mse:13.3e} {d.cosine:10.6f}" if d else f"{'copied':>13} {'':>10}"
        console.say(line + ("  FAILED" if result.failed else ""))
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
        "model_bpw": _bits(job, sizes["model"], values),
        "quant_bpw": _bits(job, sizes["quant"], values),
        "fallbacks": sum(result.fallback for result in job.results),
        "notes": job.notes,
    }


def _json_tensor(result: Outcome) -> dict:
    d = result.distortion
    return {
        "name": result.tensor.name,
        "ggml_shape": list(result.tensor.ggml_shape),
        "from": result.tensor.format.name,
        "to": result.type.name,
        "model_bytes": result.tensor.n_bytes,
        "quant_bytes": result.n_bytes,
        "nonfinite": result.nonfinite,
        "overflowed": result.overflowed,
        "note": result.note or None,
        "relative_mse": d.relative_mse if d else None,
        "cosine": d.cosine if d else None,
        "identical": result.identical,
        "failed": result.failed,
    }
