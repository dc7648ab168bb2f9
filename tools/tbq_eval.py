"""tbq-eval: perplexity and divergence of cache types on a model, without a build of any fork."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import TYPE_CHECKING

import tbq
from tbq.errors import InputError

from . import console

if TYPE_CHECKING:  # imported where they are used, --help needs none
    from gguf_io import GgufFile
    from gguf_io.evaluation import Run, Task

DEFAULT_PAIRS = (
    "q8_0/q8_0,q4_0/q4_0,tbq4_0/tbq4_0,tbq3_0/tbq3_0,q8_0/tbq4_0,q8_0/tbq3_0,tbq3_0/q8_0"
)
BASE = ("f16", "f16")
# What the CPU code rounds queries to, for all types that it multiplies as integers.
CPU_QUERIES = "q8_0"
GIB = 1 << 30
LEAST_CTX = 8


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="tbq-eval",
        usage="tbq-eval [options] MODEL --tokens FILE | --text FILE",
        description="Run a model over windows of tokens with its K and V going through caches of "
        "other types, and say what that does to its predictions: perplexity, divergence from f16, "
        "share of equal likeliest tokens, bits per value.",
        epilog=console.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="GGUF file of a dense decoder, or its first shard")
    add("--tokens", metavar="FILE", help="token ids: .npy, int32, or a state file, whose prompt")
    add("--text", metavar="FILE", help="text, for the tokenizer in the model")
    add(
        "--pairs",
        metavar="LIST",
        default=DEFAULT_PAIRS,
        help="types of K and V, such as q8_0/tbq4_0,buun:turbo3/buun:turbo3; all: each type that "
        f"K and V can both have, and pairs of a fork's own; default {DEFAULT_PAIRS}",
    )
    add("--ctx", metavar="N", type=int, default=1024, help="tokens per window; default 1024")
    add("--windows", metavar="N", type=int, help="windows; default: all that the tokens fill")
    add("--layers", metavar="LIST", help="quantise only these layers, such as 0,5-8")
    add("--side", choices=("K", "V", "KV"), default="KV", help="quantise only this side")
    add("--attribute", action="store_true", help="divergence of each layer and side alone")
    add(
        "--policy",
        metavar="NATS",
        type=float,
        help="the cheapest types of the pairs, layer by layer, within this divergence",
    )
    add(
        "--cpu",
        action="store_true",
        help="round activations to 8 bits as llama.cpp's CPU code does, queries too where keys are "
        "quantised; adds the divergence that this causes",
    )
    add("--means", metavar="FILE", help=".npz of k0, v0, k1 …: means of types whose fork has them")
    add("--save-queries", metavar="FILE", help="write q, k, v of the first window as .npz")
    add("--save-dump", metavar="FILE", help="write K and V of the first window as a state file")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--plot", metavar="PNG", help="draw divergence over bits (needs matplotlib)")
    add("--dialect", metavar="D", help=f"dialect of the model: {', '.join(tbq.dialects())}")
    add("--memory", metavar="GIB", type=float, default=1.0, help="for states of runs; default 1")
    add("--threads", metavar="N", type=int, help="worker threads; default: all cores")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return console.run(build_parser(), evaluate_command, argv)


def evaluate_command(args: argparse.Namespace) -> int:
    """Carry out one evaluation; returns the exit code."""
    from gguf_io import evaluation, open_gguf
    from tbq.api import available_cores

    from . import eval_report

    _check(args)
    if args.plot:
        from .eval_plot import require_matplotlib

        require_matplotlib()
    started = time.monotonic()
    threads = args.threads or available_cores()
    with open_gguf(args.model, args.dialect) as file:
        _refuse_inputs(args, file)
        model = evaluation.load(file, threads, args.cpu)
        windows = _windows(args, file, model.n_vocab)
        task = evaluation.Task(model, windows, threads, round(args.memory * GIB))
        base = evaluation.make_run(model, *BASE)
        pairs = _pairs(args, model)
        runs = _runs(args, model, base, pairs)
        plan = _Plan(args, task, base, pairs, runs)
        plan.announce()
        report = plan.carry_out()
    report["cost"] = eval_report.cost(time.monotonic() - started)
    if args.plot:
        from .eval_plot import write_plot

        write_plot(args.plot, report)
    if args.json:
        console.print_json(report)
    else:
        eval_report.print_report(report)
        if args.plot:
            console.say(f"wrote {args.plot}")
    return console.OK


def _check(args: argparse.Namespace) -> None:
    if (args.tokens is None) == (args.text is None):
        got = "neither" if args.tokens is None else "both"
        raise InputError("--tokens and --text", got, "one of them")
    for name, least in (("ctx", LEAST_CTX), ("windows", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name}", str(value), f"at least {least}")
    for name in ("policy", "memory"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name}", str(value), "a number above 0")
    if args.policy and args.layers:
        raise InputError("--policy", "--layers too", "all layers to choose types for")


def _refuse_inputs(args: argparse.Namespace, file: GgufFile) -> None:
    from gguf_io.atomic import refuse_inputs

    outputs = [path for path in (args.save_queries, args.save_dump, args.plot) if path]
    inputs = [path for path in (args.tokens, args.text, args.means) if path]
    refuse_inputs(outputs, [*file.shard_paths, *inputs])


def _windows(args: argparse.Namespace, file: GgufFile, n_vocab: int) -> list:
    import numpy as np

    from gguf_io.evaluation import tokenizer, tokens

    bos = tokenizer.bos_token(file)
    if args.text is not None:
        with open(args.text, encoding="utf-8", errors="surrogateescape", newline="") as text:
            ids = tokenizer.tokenize(file, text.read())
        ids = ids if bos is None else np.append(np.int32(bos), ids)  # where llama.cpp has it
    else:
        ids = tokens.read_tokens(args.tokens)
    return tokens.windows(ids, args.ctx, args.windows, n_vocab, bos)


def _pairs(args: argparse.Namespace, model) -> list[tuple[str, str]]:
    """Return the names of K and V of each pair, as given."""
    if args.pairs.strip().lower() == "all":
        return all_pairs(model)
    found = []
    for part in filter(None, (p.strip() for p in args.pairs.split(","))):
        k, slash, v = part.partition("/")
        if not (k and slash and v):
            raise InputError("--pairs", repr(part), "types of K and V, such as q8_0/tbq4_0")
        found.append((k.strip(), v.strip()))
    if not found:
        raise InputError("--pairs", repr(args.pairs), "at least one pair")
    return list(dict.fromkeys(found))


def all_pairs(model) -> list[tuple[str, str]]:
    """Return every pair that a cache of the model's can have: a type with itself.

    A type that is for K only stands with that of its fork for V whose bits are nearest.
    """
    from gguf_io.candidates import parse_candidates
    from gguf_io.evaluation.forward import make_run, paths

    kinds, for_v = parse_candidates("all", None), {}
    for kind in kinds:
        for_v.setdefault(kind.dialect, []).extend([kind] if "V" in kind.side else [])
    found = [BASE]
    for kind in kinds:
        own = for_v[kind.dialect]
        if "K" not in kind.side or not own:
            continue
        v = kind if kind in own else min(own, key=lambda v: abs(v.bpw - kind.bpw))
        with contextlib.suppress(InputError):  # heads that it does not fit
            make_run(model, kind, v)
            found.append((kind.label, v.label))
    for v in (v for v in kinds if v.side == "V"):
        with contextlib.suppress(InputError):
            paths(model, "V", v)
            found.append(("q8_0", v.label))
    return found


def _runs(args: argparse.Namespace, model, base: Run, pairs) -> list[Run]:
    from dataclasses import replace

    from gguf_io import resolve_type
    from gguf_io.evaluation import make_run

    layers = _layers(args, model.n_layer)
    queries = resolve_type(CPU_QUERIES) if args.cpu else None
    means = _means(args.means, model.n_layer) if args.means else None
    runs = []
    for k, v in pairs:
        run = replace(make_run(model, k, v), queries=queries)
        if means:
            run = replace(run, **_taken(run, means))
        runs.append(run.where(base, layers, args.side))
    if means and not any(run.k_means or run.v_means for run in runs):
        raise InputError("--means", args.means, "a pair with a type whose fork subtracts means")
    return runs


def _layers(args: argparse.Namespace, n_layer: int):
    if not args.layers:
        return range(n_layer)
    from .tbq_inspect import Layers

    layers = Layers(args.layers)
    if not any(layer in layers for layer in range(n_layer)):
        raise InputError("--layers", args.layers[:60], f"layers of the model, 0 to {n_layer - 1}")
    return layers


def _means(path: str, n_layer: int) -> dict[str, dict]:
    """Read the means of an .npz: those of K and of V, by layer."""
    from gguf_io.arrays import read_npz

    arrays = read_npz(path)
    return {
        f"{side}_means": {i: arrays[f"{side}{i}"] for i in range(n_layer) if f"{side}{i}" in arrays}
        for side in "kv"
    }


def _taken(run: Run, means: dict[str, dict]) -> dict[str, dict]:
    """Return the means that the types of a run take."""
    sides = {"k_means": run.k, "v_means": run.v}
    return {
        name: {i: mean for i, mean in means[name].items() if paths[i].format.takes_mean}
        for name, paths in sides.items()
    }


class _Plan:
    """What is run, in which order, and what comes out."""

    def __init__(self, args, task: Task, base: Run, pairs, runs: list[Run]) -> None:
        self.args, self.task, self.base, self.pairs, self.runs = args, task, base, pairs, runs

    def counts(self) -> list[int]:
        """Return the runs of each evaluation."""
        from gguf_io.evaluation import attribution

        counts = [len(self.runs)]
        if self.args.attribute:
            counts += [len(attribution.parts(run, self.base)) for run in self.attributed()]
        if self.args.policy:
            counts += [len(attribution.cost_runs(self.runs, self.base)), len(self.dialects())]
        return counts

    def attributed(self) -> list[Run]:
        """Return the runs that differ from the base."""
        from gguf_io.evaluation.attribution import slots

        return [run for run in self.runs if slots(run, self.base)]

    def dialects(self) -> list[str | None]:
        """Return whose types the pairs have beside ggml's; None if no others."""
        named = {d for run in self.runs if (d := _dialect(run)) and d != "mixed"}
        return sorted(named) or [None]

    def announce(self) -> None:
        """Say on stderr what is coming."""
        n = sum(self.counts())
        peak = self.task.peak_bytes(max(self.counts()))
        line = f"{n} runs of {len(self.task.windows)} windows of {self.task.ctx} tokens"
        console.say(f"{line}, up to about {peak / 1e9:.1f} GB of memory", file=sys.stderr)

    def carry_out(self) -> dict:
        """Evaluate everything and return the report."""
        from gguf_io.evaluation import attribution, evaluate
        from gguf_io.evaluation.evaluate import total_steps

        from . import eval_report

        total = sum(total_steps(self.task, n) for n in self.counts())
        with console.Progress(total, "evaluating", "tok") as bar, _Taps(self.args, self.task) as t:
            scores = evaluate(self.task, self.runs, base=self.base, progress=bar.advance, tap=t.tap)
            report = eval_report.report(self.args.model, self.task, self.pairs, self.runs, scores)
            if self.args.attribute:
                report["attribution"] = [
                    {"k": k, "v": v}
                    | attribution.attribution(self.task, run, self.base, bar.advance).report()
                    for (k, v), run in zip(self.pairs, self.runs, strict=True)
                    if run in self.attributed()
                ]
            if self.args.policy:
                report["policy"] = self.policies(bar.advance)
        return report

    def policies(self, progress) -> dict:
        """Choose types layer by layer, of one dialect at a time."""
        from gguf_io.evaluation import attribution

        from . import eval_report

        costs = attribution.measured_costs(self.task, self.runs, self.base, progress)
        found = []
        for dialect in self.dialects():
            candidates = [run for run in self.runs if _dialect(run) in (None, dialect)]
            chosen = attribution.policy(
                self.task, candidates, self.base, costs, self.args.policy, progress=progress
            )
            if chosen is not None:
                found.append(eval_report.policy(dialect, chosen, self.task.model))
        found.sort(key=lambda p: p["bpw"])
        return {"budget": self.args.policy, "choices": found}


def _dialect(run: Run) -> str | None:
    """Return whose types a run has beside ggml's own; None if no others, "mixed" of several."""
    names = {p.format.dialect for p in (*run.k, *run.v) if not p.format.is_ggml}
    return None if not names else names.pop() if len(names) == 1 else "mixed"


class _Taps:
    """The files that the first window's q, k and v go to, if any; a context."""

    def __init__(self, args: argparse.Namespace, task: Task) -> None:
        from gguf_io import AtomicFiles

        self._args, self._task = args, task
        self._files = AtomicFiles()
        self._queries = self._dump = None

    @property
    def tap(self):
        """What `evaluate` takes, or None."""
        return self._both if self._queries or self._dump else None

    def _both(self, layer, q, k, v) -> None:
        for writer in filter(None, (self._queries, self._dump)):
            writer.add(layer, q, k, v)

    def __enter__(self) -> _Taps:
        from gguf_io.evaluation.dump import QueryWriter, StateDump

        self._files.__enter__()
        if self._args.save_queries:
            file = self._files.create(self._args.save_queries)
            self._queries = QueryWriter(file, self._task.model)
        if self._args.save_dump:
            self._dump = StateDump(self._task.windows[0])
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException as error:
            self._files.__exit__(type(error), error, error.__traceback__)
            raise
        self._files.__exit__(kind, value, traceback)

    def _finish(self) -> None:
        if self._queries:
            self._queries.close()
        if self._dump:
            file = self._files.create(self._args.save_dump)
            for piece in self._dump.pieces():
                file.write(piece)


if __name__ == "__main__":
    sys.exit(main())
