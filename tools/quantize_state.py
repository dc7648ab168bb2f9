"""tbq-quantize on a state file: change the types of K and V."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_io import CacheTensor, StateFile, TensorType, plan_conversion, resolve_type, write_state
from gguf_io.state_writer import CHUNK_VALUES, Conversion, Plan, is_unknown
from tbq.metrics import Distortion

from . import console, state_options
from .tbq_quantize import Job, Result, announce, overrides, pattern, report

# Flags that mean something for models only.
MODEL_FLAGS = (
    "pure",
    "output_tensor_type",
    "token_embedding_type",
    "leave_output_tensor",
    "keep_split",
)


@dataclass(frozen=True)
class CacheChoice:
    """What a tensor becomes, as `tbq_quantize` reports it."""

    conversion: Conversion
    fallback: bool = False

    @property
    def tensor(self) -> CacheTensor:
        """The source."""
        return self.conversion.tensor

    @property
    def type(self) -> TensorType:
        """The type that is written."""
        return self.conversion.format

    @property
    def converts(self) -> bool:
        """Whether the bytes change."""
        return self.conversion.converts

    @property
    def note(self) -> str:
        """What the user should know about it."""
        if self.converts and self.type == self.tensor.format:
            kind = self.conversion.rotation.kind if self.conversion.rotation else "none"
            return f"type {self.type.name} stays, its rotation becomes {kind}"
        return ""


def convert_state(args: argparse.Namespace) -> int:
    """Carry out one conversion; returns the exit code."""
    console.refuse_flags(args, MODEL_FLAGS, f"{args.input} is a state file", "a GGUF file")
    chosen = {"K": args.type_k or args.type, "V": args.type_v or args.type}
    with state_options.open_from(args, args.input) as state:
        plan = plan_conversion(
            state,
            _policy(args, chosen),
            rotate=not args.no_rotate,
            allow_requantize=args.allow_requantize,
            allow_mixed=args.allow_mixed,
        )
        target = ",".join(f"{kind}={name}" for kind, name in chosen.items() if name)
        output = Path(args.output) if args.output else _default_output(state.path, chosen)
        job = Job(args, state, target, (state.path,), [output])
        _notes(job, state, plan)
        job.results = [
            Result(CacheChoice(c), c.n_bytes) for c in plan.conversions.values() if c.tensor.n_bytes
        ]
        _write(job, plan)
        if args.verify and not args.dry_run:
            _verify(job, plan)
        report(job)
        return console.FAILED if any(r.failed for r in job.results) else console.OK


def _policy(args: argparse.Namespace, chosen: dict[str, str | None]):
    """Return the function from a tensor to its new type, None where it keeps its own."""
    types = {k: None if n is None else resolve_type(n, args.dialect) for k, n in chosen.items()}
    named = overrides(args)
    include = [pattern("--include", text) for text in args.include]
    exclude = [pattern("--exclude", text) for text in args.exclude]

    def choose(tensor: CacheTensor) -> TensorType | None:
        name = tensor.name
        if include and not any(p.search(name) for p in include):
            return None
        if any(p.search(name) for p in exclude):
            return None
        return next((kind for p, kind in named if p.search(name)), types[tensor.kind])

    return choose


def _default_output(source: Path, chosen: dict[str, str | None]) -> Path:
    names = [name.lower().replace(":", "-") for name in chosen.values() if name]
    return source.with_name(".".join([source.stem, *dict.fromkeys(names)]) + source.suffix)


def _notes(job: Job, state: StateFile, plan: Plan) -> None:
    """Say what was assumed."""
    if state.dialect_guessed:
        job.note(f"reading {state.path} as dialect {state.dialect}: {state.dialect_reason}")
    if plan.changes:
        job.note(f"input rotation: {state.rotation.reason}")
        job.note(state.head_dim_reason)
    if state.dialect and plan.dialect != state.dialect:
        job.note(f"the output is a dump of {plan.dialect}, the input one of {state.dialect}")


def _write(job: Job, plan: Plan) -> None:
    """Write the output, or only say what would be written."""
    by_name = {result.choice.tensor.name: result for result in job.results}
    left = {name: result.choice.tensor.n_bytes for name, result in by_name.items()}
    with console.Progress(sum(left.values()), "quantising") as progress:
        if job.args.dry_run:
            for result in job.results:
                announce(job, result, progress)
            return

        def advance(tensor: CacheTensor, n_bytes: int) -> None:
            progress.advance(n_bytes)
            left[tensor.name] -= n_bytes
            if not left[tensor.name]:
                announce(job, by_name[tensor.name], progress)

        write_state(job.outputs[0], plan, threads=job.args.threads, progress=advance)


def _verify(job: Job, plan: Plan) -> None:
    """Read the output back and compare every tensor with the input."""
    rotation = "off" if job.args.no_rotate else "auto"
    total = sum(result.choice.tensor.n_bytes for result in job.results)
    path = str(job.outputs[0])
    with (
        state_options.open_from(job.args, path, dialect=plan.dialect, rotation=rotation) as written,
        console.Progress(total, "verifying") as progress,
    ):
        for result in job.results:
            source, copy = result.choice.tensor, written.tensors[result.choice.tensor.name]
            distortion = Distortion()
            identical = True
            step = source.n_cells if is_unknown(source) else max(1, CHUNK_VALUES // source.n_embd)
            for start in range(0, source.n_cells, step):
                stop = min(start + step, source.n_cells)
                if result.choice.converts:
                    a, b = (t.values(start, stop, threads=job.args.threads) for t in (source, copy))
                    result.nonfinite += a.size - int(np.isfinite(a).sum())
                    distortion.add(a, b)
                elif not np.array_equal(source.rows(start, stop), copy.rows(start, stop)):
                    identical = False
                source.release(start, stop)
                copy.release(start, stop)
                progress.advance((stop - start) * source.row_bytes)
            if result.choice.converts:
                result.distortion = distortion
            else:
                result.identical = identical
