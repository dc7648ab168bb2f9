"""`tbq-plan train`: which tensors llama.cpp would train, their memory, and whether it can."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from . import console

SCHEMA = "tbq-plan-train/1"
KEYS_NOTE = "llama.cpp trains projections of K and V only if -ub is as large as -c"


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="tbq-plan train",
        usage="tbq-plan train [options] MODEL",
        description="Say which tensors of a model llama.cpp's finetune trains, what gradients and "
        "optimiser take, and which operations on the backward graph have no backward: there it "
        "aborts.",
        epilog=console.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", metavar="MODEL", help="GGUF file, or the first shard of a split one")
    add("--train-skip-regex", metavar="R", help="leave alone tensors in whose name it is found")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw", help="default adamw")
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: list[str]) -> int:
    """Run the program; returns the exit code."""
    return console.run(build_parser(), train_command, argv, lists=lambda args: True)


def train_command(args: argparse.Namespace) -> int:
    """Carry out one plan; returns the exit code."""
    from gguf_io import open_gguf
    from gguf_io.training import plan_training

    from .patterns import compiled

    skip = args.train_skip_regex
    pattern = None if skip is None else compiled("--train-skip-regex", skip)
    with open_gguf(args.file) as file:
        found = plan_training(file, pattern, args.optimizer)
        result = report(str(file.path), file.architecture, args, found)
    if args.json:
        console.print_json(result)
    else:
        _print(result)
    return console.OK


def report(path: str, architecture: str | None, args: argparse.Namespace, found) -> dict:
    """Return everything as plain Python values."""
    from gguf_io.training import ACTIVATIONS, BUILDS

    return {
        "schema": SCHEMA,
        "path": path,
        "architecture": architecture,
        "optimizer": args.optimizer,
        "skip_regex": args.train_skip_regex,
        "trained": [{"name": name, "parameters": n} for name, n in found.trained.items()],
        "skipped": dict(found.skipped),
        "parameters": found.parameters,
        "gradient_bytes": found.gradient_bytes,
        "optimizer_bytes": found.optimizer_bytes,
        "total_bytes": found.gradient_bytes + found.optimizer_bytes,
        "backward": [
            {"layer": step.layer, "name": step.name, "operations": list(step.operations)}
            for step in found.backward
        ],
        "builds": [
            {
                "name": build,
                "works": not found.missing(build),
                "can_skip": build != "llama.cpp" and not ACTIVATIONS & set(found.missing(build)),
                "missing": [
                    {"operation": operation, "layer": step.layer, "step": step.name}
                    for operation, step in found.missing(build).items()
                ],
            }
            for build in BUILDS
        ],
    }


def _print(report: dict) -> None:
    from .columns import table, wrapped
    from .plan_text import size

    say = console.say
    say(report["path"])
    counts = ", ".join(f"{n} {reason}" for reason, n in report["skipped"].items() if n)
    line = f"  {len(report['trained'])} tensors are trained, {report['parameters']} parameters"
    say(f"{line}; left alone: {counts or 'none'}")
    gradients, optimizer = (size(report[f"{what}_bytes"]) for what in ("gradient", "optimizer"))
    line = f"  gradients {gradients}, {report['optimizer']} {optimizer}"
    say(f"{line}, together {size(report['total_bytes'])}")
    say()
    say("On the backward graph")
    builds = [build["name"] for build in report["builds"]]
    rows = list(_operations(report))
    table(("operation", "layers", *builds), rows)
    say()
    for build in report["builds"]:
        print(wrapped(f"{build['name']}: ", _verdict(build)))
    if any("attn_k" in tensor["name"] for tensor in report["trained"]):
        print(wrapped("  ! ", KEYS_NOTE))


def _operations(report: dict) -> Iterator[tuple[str, ...]]:
    """Yield each operation, how many layers have it, and which build has a backward for it."""
    layers: dict[str, set] = {}
    for step in report["backward"]:
        for operation in step["operations"]:
            layers.setdefault(operation, set()).add(step["layer"])
    for operation in sorted(layers):
        lacks = [operation in {m["operation"] for m in b["missing"]} for b in report["builds"]]
        count = len(layers[operation] - {None})
        yield operation, str(count or "-"), *("none" if lack else "yes" for lack in lacks)


def _verdict(build: dict) -> str:
    if build["works"]:
        return "works"
    first = build["missing"][0]
    where = "behind all layers" if first["layer"] is None else f"in layer {first['layer']}"
    text = f"aborts at {first['operation']} {where} ({first['step']})"
    if build["can_skip"]:
        text += "; with GGML_BACKWARD_SKIP_INPLACE=1 it goes on and drops the gradient there"
    return text
