"""tbq-eval's results: as one JSON object, and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tbq.registry import get_dialect

from .columns import number, table
from .console import say

if TYPE_CHECKING:
    from gguf_io.evaluation import Run, Task, TokenScores
    from gguf_io.evaluation.attribution import Policy

SCHEMA = "tbq-eval/1"
HEADER = ("K / V", "bits", "ppl", "+-", "KLD", "+-", "median", "99 %", "same top")
# What llama-tq's --tq-v-override takes. Source: LL4nc33/llama-tq, common/tq-profile.cpp
V_OVERRIDES = ("vtq2_2", "vtq3_2", "vtq4_2", "vtq2_3", "vtq3_3", "vtq4_3", "f16", "q8_0")
OVERRIDING = "llama-tq"


def report(
    path: str,
    task: Task,
    pairs: Sequence[tuple[str, str]],
    runs: Sequence[Run],
    scores: Sequence[TokenScores],
) -> dict:
    """Return the results as plain Python values, the fewest bits first."""
    results = [
        {"k": k, "v": v, **s.summary(), "bpw": run.bits(task.model)}
        for (k, v), run, s in zip(pairs, runs, scores, strict=True)
    ]
    results.sort(key=lambda r: (r["bpw"], r["kld"]))
    for r in results:
        r["front"] = not any(_beats(other, r) for other in results)
    return {
        "schema": SCHEMA,
        "model": str(path),
        "architecture": task.model.hyperparameters.shape.architecture,
        "ctx": task.ctx,
        "windows": len(task.windows),
        "base": "f16/f16",
        "cpu_rounding": task.model.cpu_rounding,
        "results": results,
    }


def _beats(a: dict, b: dict) -> bool:
    better = a["bpw"] < b["bpw"] or a["kld"] < b["kld"]
    return a["bpw"] <= b["bpw"] and a["kld"] <= b["kld"] and better


def cost(seconds: float) -> dict:
    """Return what it took: time, processor time, memory; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return {"seconds": seconds, "user_seconds": None, "peak_bytes": None}
    used = resource.getrusage(resource.RUSAGE_SELF)
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    peak = used.ru_maxrss * unit
    return {"seconds": seconds, "user_seconds": used.ru_utime, "peak_bytes": peak}


def policy(dialect: str | None, chosen: Policy, model) -> dict:
    """Return one choice of types layer by layer."""
    run = chosen.run
    summary = chosen.scores.summary() if chosen.scores else {}
    layers = [
        {"layer": i, "k": k.format.label, "v": v.format.label}
        for i, (k, v) in enumerate(zip(run.k, run.v, strict=True))
    ]
    return {
        "dialect": dialect,
        "bpw": run.bits(model),
        "kld_predicted": chosen.predicted,
        "kld": summary.get("kld"),
        "ppl": summary.get("ppl"),
        "layers": layers,
        "flags": flags(run, dialect),
    }


def flags(run: Run, dialect: str | None) -> str | None:
    """Return the flags of the fork that loads such a cache; None if none is known."""
    k, v = ([path.format.name for path in side] for side in (run.k, run.v))
    if len(set(k)) == 1 and len(set(v)) == 1:
        return f"-ctk {k[0]} -ctv {v[0]}"
    if len(set(k)) > 1 or dialect not in (None, OVERRIDING) or not set(v) <= set(V_OVERRIDES):
        return None
    rules = ",".join(f"{layer}:{name}" for layer, name in enumerate(v))
    base = max(set(v), key=v.count)
    return f"-ctk {k[0]} -ctv {base} --tq-v-strategy manual --tq-v-override {rules}"


def _no_flags(dialect: str | None) -> str:
    """Say why there are no flags."""
    if dialect and get_dialect(dialect).state.mixed:
        return "none known; layers can differ, but not by any flag in this way"
    return "none known; the fork takes one type for all layers of a side"


# --- text ----------------------------------------------------------------------------------------


def print_report(report: dict) -> None:
    """Print a report for a terminal."""
    n = report["windows"]
    size = f"{n} window{'s' * (n > 1)} of {report['ctx']} tokens"
    against = f"against {report['base']}{', 8-bit activations' * report['cpu_rounding']}"
    say(f"{report['model']}: {report['architecture']}, {size}, {against}")
    print()
    table(HEADER, [_row(r) for r in report["results"]])
    say("  * no other has fewer bits and less divergence")
    for found in report.get("attribution", ()):
        _print_attribution(found)
    if "policy" in report:
        _print_policy(report["policy"])
    used = report["cost"]
    print()
    line = f"{used['seconds']:.0f} s"
    if used["peak_bytes"] is not None:
        line += f", {used['user_seconds']:.0f} s of processor time"
        line += f", at most {used['peak_bytes'] / 1e9:.2f} GB of memory"
    say(line)


def _row(r: dict) -> tuple[str, ...]:
    return (
        f"{r['k']}/{r['v']}{' *' if r['front'] else ''}",
        number(r["bpw"], ".4f"),
        number(r["ppl"], ".4f"),
        number(r["ppl_se"], ".4f"),
        number(r["kld"], ".5f"),
        number(r["kld_se"], ".5f"),
        number(r["kld_median"], ".5f"),
        number(r["kld_99"], ".4f"),
        number(100 * r["same_top"], ".2f") + " %",
    )


def _print_attribution(found: dict) -> None:
    print()
    say(f"{found['k']}/{found['v']}, divergence of each layer and side alone")
    layers: dict[int, dict[str, dict]] = {}
    for part in found["parts"]:
        layers.setdefault(part["layer"], {})[part["side"]] = part
    rows = [
        (str(layer), *(number(sides.get(s, {}).get(x), ".5f") for s in "KV" for x in PART))
        for layer, sides in layers.items()
    ]
    table(("layer", "K", "+-", "V", "+-"), rows)
    k, v = found["sides"]["K"], found["sides"]["V"]
    say(f"  sum {found['sum']:.5f}, together {found['kld']:.5f}: {_interaction(found)}")
    say(f"  all K {k:.5f}, all V {v:.5f}: sum {k + v:.5f}")


PART = ("kld", "kld_se")


def _interaction(found: dict) -> str:
    share = found["interaction"] / found["kld"] if found["kld"] else 0.0
    return f"interaction {found['interaction']:+.5f} ({100 * share:+.0f} %)"


def _print_policy(found: dict) -> None:
    print()
    say(f"The cheapest types, layer by layer, within a divergence of {found['budget']:g}")
    if not found["choices"]:
        say("  none of these types stays within it")
    for choice in found["choices"]:
        measured = f"measured {number(choice['kld'], '.5f')}, ppl {number(choice['ppl'], '.4f')}"
        sums = f"sum {choice['kld_predicted']:.5f}, {measured}"
        say(f"  {choice['dialect'] or 'ggml'}: {choice['bpw']:.4f} bits, {sums}")
        for side in "kv":
            say(f"    {side.upper()}  {_ranges([row[side] for row in choice['layers']])}")
        say(f"    flags: {choice['flags'] or _no_flags(choice['dialect'])}")


def _ranges(names: Sequence[str]) -> str:
    """Return names per layer with the layers that share one put together."""
    at: dict[str, list[str]] = {}
    start = 0
    for i in range(1, len(names) + 1):
        if i == len(names) or names[i] != names[start]:
            last = i - 1
            at.setdefault(names[start], []).append(f"{start}-{last}" if last > start else f"{last}")
            start = i
    return "; ".join(f"{name}: {','.join(layers)}" for name, layers in at.items())
