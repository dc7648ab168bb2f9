"""tbq-quantize on a state file: change the types of K and V."""

from __future__ import annotations

import argparse
from pathlib import Path

from gguf_io import CacheTensor, StateFile, TensorType, plan_conversion, resolve_type, write_state
from gguf_io.atomic import refuse_inputs
from gguf_io.convert import state_outcomes, verify_state
from gguf_io.state_writer import Plan
from tbq import InputError, counterpart
from tbq.format import GGML
from tbq.registry import writers

from . import console, quantize_arguments, state_options
from .patterns import compiled
from .quantize_report import Job, announce, overflow_note, overrides, report, warn_unmatched

# Flags that mean something for models only.
MODEL_FLAGS = (
    "pure",
    "output_tensor_type",
    "token_embedding_type",
    "leave_output_tensor",
    "keep_split",
    "override_kv",
    "include_weights",
    "exclude_weights",
    "workers",
    "scheduler",
)


def convert_state(args: argparse.Namespace) -> int:
    """Carry out one conversion; returns the exit code."""
    console.refuse_flags(args, MODEL_FLAGS, f"{args.input} is a state file", "a GGUF file")
    if args.type is not None and args.type.upper() == quantize_arguments.COPY:
        args.type = None
    chosen = {"K": args.type_k or args.type, "V": args.type_v or args.type}
    with state_options.open_from(args, args.input) as state:
        plan = plan_conversion(
            state,
            _policy(args, chosen),
            dialect=args.to_dialect,
            rotate=not args.no_rotate,
            allow_requantize=args.allow_requantize or args.to_dialect is not None,
            allow_mixed=args.allow_mixed,
            version=args.state_version,
        )
        target = ",".join(f"{kind}={name}" for kind, name in chosen.items() if name)
        output = Path(args.output) if args.output else _default_output(state.path, chosen)
        inputs = [state.path, *args.tensor_type_file, *([args.model] if args.model else [])]
        refuse_inputs([output], inputs)
        job = Job(args, state, target, (state.path,), [output])
        _notes(job, state, plan)
        warn_unmatched(job, (t.name for t in state.tensors.values() if t.kind in "KV"))
        job.results = state_outcomes(plan)
        _write(job, plan)
        if args.verify and not args.dry_run:
            _verify(job, plan)
        report(job)
        return job.code


def _policy(args: argparse.Namespace, chosen: dict[str, str | None]):
    """Return the function from a tensor to its new type, None where it keeps its own."""
    place = args.to_dialect or args.dialect
    types = {k: None if n is None else resolve_type(n, place) for k, n in chosen.items()}
    named = overrides(args)
    include = [compiled("--include", text) for text in args.include]
    exclude = [compiled("--exclude", text) for text in args.exclude]

    def choose(tensor: CacheTensor) -> TensorType | None:
        name = tensor.name
        if include and not any(p.search(name) for p in include):
            return None
        if any(p.search(name) for p in exclude):
            return None
        kind = next((kind for p, kind in named if p.search(name)), types[tensor.kind])
        if kind is None and args.to_dialect is not None:
            return _moved(tensor, args.to_dialect)
        return kind

    return choose


def _moved(tensor: CacheTensor, to: str) -> TensorType | None:
    """Return what a tensor becomes in another dialect; None if every dialect has its type."""
    if tensor.format.dialect in (None, GGML):
        return None
    kind = counterpart(tensor.format, to)
    if kind is None:
        need = f"--type-{tensor.kind.lower()}: no type of {to} holds the same or has its name"
        raise InputError(f"tensor {tensor.name}", tensor.format.label, need)
    return kind


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
    new = {c.format for c in plan.conversions.values() if c.converts}
    for kind in sorted((k for k in new if len(writers(k)) > 1), key=lambda k: k.label):
        job.note(f"{kind.label}: {kind.notes}")
    for note in plan.version.notes if plan.version else ():
        job.note(note)
    if state.dialect and plan.dialect != state.dialect:
        job.note(f"the output is a dump of {plan.dialect}, the input one of {state.dialect}")


def _write(job: Job, plan: Plan) -> None:
    """Write the output, or only say what would be written."""
    by_name = {result.tensor.name: result for result in job.results}
    left = {name: result.tensor.n_bytes for name, result in by_name.items()}
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

        overflow = write_state(
            job.outputs[0],
            plan,
            allow_overflow=job.args.allow_overflow,
            threads=job.args.threads,
            progress=advance,
        )
    for name, n in overflow.items():
        by_name[name].overflowed = n
        job.note(overflow_note(by_name[name]))


def _verify(job: Job, plan: Plan) -> None:
    """Read the output back and compare every tensor with the input."""
    rotation = "off" if job.args.no_rotate else "auto"
    dialect = f"{plan.dialect}@{plan.release}" if plan.dialect else None
    total = sum(result.tensor.n_bytes for result in job.results)
    path = str(job.outputs[0])
    with (
        state_options.open_from(job.args, path, dialect=dialect, rotation=rotation) as written,
        console.Progress(total, "verifying") as progress,
    ):
        verify_state(job.results, written, threads=job.args.threads, advance=progress.advance)
