"""tbq-plan's report for a terminal."""

from __future__ import annotations

from .columns import MIB, number, table, wrapped
from .console import say
from .inspect_summary import ranges

GIB = 1 << 30


def print_report(report: dict) -> None:
    """Print a report that `plan_report.report` returned."""
    _print_head(report)
    if report["pairs"]:
        _print_pairs(report)
    _print_caches(report)
    if report["caches"] and not report["pairs"]:
        _print_layers(report)
    _print_model(report)
    _print_unfit(report)
    if report["notes"]:
        say()
        say("Notes")
        for note in report["notes"]:
            print(wrapped("  ! ", note))
    say()
    say(f"llama.cpp flags: {report['command']}")


def size(n_bytes: int | None) -> str:
    """Return bytes as MiB, or as GiB from ten of them on."""
    if n_bytes is None:
        return "-"
    if n_bytes >= 10 * GIB:
        return f"{n_bytes / GIB:.2f} GiB"
    return f"{n_bytes / MIB:.2f} MiB"


def _print_head(report: dict) -> None:
    context = report["context"]
    say(report["path"])
    say(f"  architecture {report['architecture']}, types of {report['dialect']}")
    line = f"  context {context['n_ctx']} tokens, {context['n_parallel']} sequence(s)"
    say(f"{line}, {context['n_ctx_seq']} cells each stream")


def _print_model(report: dict) -> None:
    if not report["model_groups"]:
        say("  no tensors: a file of metadata only")
        return
    rows = [
        (group["name"], str(group["tensors"]), str(group["parameters"]), size(group["bytes"]))
        for group in report["model_groups"]
    ]
    total = [group["tensors"] for group in report["model_groups"]]
    parameters = [group["parameters"] for group in report["model_groups"]]
    rows.append(("all", str(sum(total)), str(sum(parameters)), size(report["model_bytes"])))
    say()
    say("Model")
    table(("tensors", "count", "parameters", "size"), rows)


def _print_caches(report: dict) -> None:
    types = report["types"]
    assumed = " (not asked for: as a measure)" if types["assumed"] else ""
    say()
    say(f"Memory with K {types['k']}, V {types['v']}{assumed}")
    rows = [
        (
            cache["name"],
            str(cache["cells"]),
            str(cache["streams"]),
            str(cache["layers"]),
            size(cache["k_bytes"]),
            size(cache["v_bytes"]),
            size(cache["k_bytes"] + cache["v_bytes"]),
        )
        for cache in report["caches"]
    ]
    if rows:
        table(("cache", "cells", "streams", "layers", "K", "V", "size"), rows)
    for part in report["recurrent"]:
        states = part["r_bytes"] + part["s_bytes"] + part["p_bytes"]
        layers = len(part["state_layers"])
        say(f"  recurrent state: {part['cells']} cell(s), {layers} layers, {size(states)}")
    for part in report["compressors"]:
        say(f"  compressor {part['name']}: {part['layers']} layer(s), {size(part['bytes'])}")
    if report["staging_bytes"]:
        say(f"  staging as f16: {size(report['staging_bytes'])}")
    line = (
        f"  in all {size(report['memory_bytes'])}, {number(report['bits_per_value'], '.4g')} bits"
    )
    say(f"{line} per value; as f16 {size(report['f16_bytes'])}")
    _print_policy(report["policy"])
    if report["model_bytes"]:
        say(f"  with the model {size(report['total_bytes'])}")
    if report["vram_bytes"] is not None:
        fits = report["total_bytes"] <= report["vram_bytes"]
        verdict = "fits" if fits else "does not fit"
        line = f"  {verdict} in {size(report['vram_bytes'])}"
        say(f"{line}; the longest context that does: {report['largest_context']} tokens")


def _print_policy(policy: dict | None) -> None:
    if policy is None:
        return
    extra = policy["extra_bytes"]
    sign = "more" if extra >= 0 else "less"
    say(f"  {len(policy['layers'])} layers of their own types: {size(abs(extra))} {sign}")


def _print_layers(report: dict) -> None:
    """Print what layers have, those that are alike in one line."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for cache in report["caches"]:
        for entry in cache["by_layer"]:
            row = (
                cache["name"],
                f"{entry['heads']} x {entry['head_k']}",
                f"{entry['heads']} x {entry['head_v']}" if entry["head_v"] else "-",
                entry["k_type"],
                entry["v_type"] or "-",
                size(entry["k_bytes"]),
                size(entry["v_bytes"]),
            )
            alike.setdefault(row, []).append(entry["layer"])
    rows = [(ranges(layers), *row) for row, layers in sorted(alike.items(), key=lambda r: r[1][0])]
    say()
    say("Each of the layers")
    table(("layers", "cache", "K", "V", "type of K", "type of V", "K", "V"), rows)


def _print_pairs(report: dict) -> None:
    say()
    say("Types, the smallest first (error: relative MSE of Gaussian values; class: as good as a")
    say("Lloyd-Max quantiser of so many bits)")
    vram = report["vram_bytes"] is not None
    rows = []
    for pair in report["pairs"]:
        error_v = number(pair["error_v"], ".2g")
        row = [
            pair["k"],
            pair["v"] or "-",
            size(pair["memory_bytes"]),
            number(pair["bits_per_value"], ".4g"),
            number(pair["error_k"], ".2g"),
            error_v,
            f"{pair['class_k'] or '-'}/{pair['class_v'] or '-'}",
        ]
        rows.append((*row, str(pair["largest_context"])) if vram else tuple(row))
    header = ("K", "V", "size", "bits/value", "error K", "error V", "class")
    table((*header, "longest -c") if vram else header, rows)


def _print_unfit(report: dict) -> None:
    reasons: dict[tuple[str, str], str] = {}
    for entry in report["unfit"]:
        key = entry["type"], entry["reason"]
        reasons[key] = reasons.get(key, "") + entry["side"]
    if reasons and report["pairs"]:
        say()
        say("Types that this model cannot have")
        for (name, reason), sides in reasons.items():
            print(wrapped(f"  {name} for {' and '.join(sides)}: ", reason))
