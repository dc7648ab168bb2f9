"""tbq-inspect's report for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tbq.registry import get_dialect

from .console import say, shown

MIB = 1024 * 1024
WIDTH = 100


def print_report(report: dict) -> None:
    """Print a report that `inspect_report.report` returned."""
    _print_file(report)
    _print_tensors(report["tensors"])
    _print_reference(report)
    _print_candidates(report)
    if report["warnings"]:
        print("\nWarnings")
        for warning in report["warnings"]:
            print(_wrapped("  ! ", warning))


def _wrapped(prefix: str, text: str) -> str:
    import textwrap

    return textwrap.fill(
        shown(text), WIDTH, initial_indent=prefix, subsequent_indent=" " * len(prefix)
    )


def number(value: float | None, spec: str) -> str:
    """Format a number; a dash for None and NaN."""
    return "-" if value is None or value != value else format(value, spec)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column left-aligned, the others to the right."""
    rows = [tuple(map(shown, row)) for row in rows]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        say("  " + "  ".join(cells).rstrip())


def _print_file(report: dict) -> None:
    say(report["path"])
    if report["state"]:
        _print_state(report["state"])
    else:
        gguf = report["gguf"]
        line = f"  GGUF v{gguf['version']}, architecture {gguf['architecture']}"
        say(f"{line}, {len(gguf['shards'])} file(s), {gguf['metadata_keys']} metadata keys")
    print(_wrapped("  dialect   ", f"{report['dialect'] or 'none'}: {report['dialect_reason']}"))
    totals = report["totals"]
    size = f"{totals['tensors']} tensors, {totals['n_bytes'] / MIB:.2f} MiB"
    size += f", {number(totals['bpw'], '.2f')} bits per value"
    print(f"  size      {size}, {number(totals['compression'], '.2f')} times smaller than f16")


def _print_state(state: dict) -> None:
    kind = {"session": "session file (GGSN)", "sequence": "sequence file (GGSQ)"}
    line = kind.get(state["container"], state["container"])
    line += f" v{state['version']}" if state["version"] is not None else ""
    line += f", architecture {state['architecture']}" if state["architecture"] else ""
    line += f", {state['tokens']} tokens" if state["tokens"] is not None else ""
    line += " (llama-server's serialised list)" if state["server_tokens"] else ""
    say(f"  {line}")
    print(_wrapped("  layout    ", f"{state['layout']}: {state['layout_reason']}"))
    for memory in state["memories"]:
        for i, stream in enumerate(memory["streams"]):
            text = f"stream {i}: {stream['cells']} cells"
            if stream["positions"]:
                text += f", positions {stream['positions'][0]} to {stream['positions'][1]}"
            for sequence, count in stream["sequences"].items():
                text += f", sequence {sequence} in {count}"
            state_text = f", deferred state: {memory['deferred_state']}"
            text += state_text if memory["deferred_state"] else ""
            print(_wrapped(f"  {memory['name']:<10}", text))
    print(_wrapped("  rotation  ", state["rotation"]["reason"]))
    print(_wrapped("  heads     ", state["heads"]))


def _median(values: list[float | None]) -> float | None:
    known = sorted(v for v in values if v is not None and v == v)
    return known[len(known) // 2] if known else None


def _print_tensors(tensors: list[dict]) -> None:
    """Print one line per tensor; of several heads the median, of channel ratios the largest."""
    print("\nTensors (kurtosis: as it is, and rotated; KS: distance from the codebooks' normal)")
    header = ("tensor", "type", "shape", "bits", "norm", "channels", "kurtosis", "rotated", "KS")
    rows = []
    for t in tensors:
        heads = t["statistics"]["heads"] if t["statistics"] else []
        rows.append(
            (
                t["name"],
                t["type"].rpartition(":")[2],
                "x".join(map(str, t["ggml_shape"])),
                number(t["bpw"], ".2f"),
                number(_median([h["norm_mean"] for h in heads]), ".3g"),
                number(max((h["channel_ratio"] for h in heads), default=None), ".1f"),
                number(_median([h["kurtosis"] for h in heads]), ".1f"),
                number(_median([h["kurtosis_rotated"] for h in heads]), ".1f"),
                number(_median([h["marginal_distance"] for h in heads]), ".3f"),
            )
        )
    table(header, rows)


REFERENCE_HEADER = (
    "tensor",
    "type",
    "relative MSE",
    "cosine",
    "logit error",
    "softmax KL",
    "output error",
)
CANDIDATE_HEADER = ("tensor", "candidate", "bits", "relative MSE", "softmax KL", "output error")


def reference_rows(report: dict) -> list[tuple[str, ...]]:
    """Return the table of errors against the reference."""
    rows = []
    for t in report["tensors"]:
        if t["reference"]:
            a = t["reference"]["attention"] or {}
            rows.append(
                (
                    t["name"],
                    t["type"],
                    number(t["reference"]["relative_mse"], ".3e"),
                    number(t["reference"]["cosine"], ".6f"),
                    number(a.get("logit_rmse"), ".4f"),
                    number(a.get("kl"), ".2e"),
                    number(a.get("output_error"), ".2e"),
                )
            )
    return rows


def candidate_rows(report: dict) -> list[tuple[str, ...]]:
    """Return the table of candidates, but for those that are made for a tensor's other side."""
    rows = []
    for t in report["tensors"]:
        for c in t["candidates"]:
            if (c["unfit"] or "").endswith(" only"):
                continue
            a = c["attention"] or {}
            rows.append(
                (
                    t["name"],
                    c["type"],
                    number(c["bpw"], ".2f"),
                    number(c["relative_mse"], ".3e"),
                    number(a.get("kl") if t["kind"] == "K" else None, ".2e"),
                    c["unfit"] or number(a.get("output_error"), ".2e"),
                )
            )
    return rows


def _print_reference(report: dict) -> None:
    if report["reference"] is None:
        return
    cells = report["reference"]["cells"]
    over = f" over {cells} cells" if cells is not None else ""
    print()
    say(f"Against {report['reference']['path']}{over}")
    table(REFERENCE_HEADER, reference_rows(report))
    if any(t["reference"] and t["reference"]["attention"] for t in report["tensors"]):
        print(_wrapped("  ", "The attention of a layer is that of its K and V together."))


def _print_candidates(report: dict) -> None:
    rows = candidate_rows(report)
    if not rows:
        return
    print("\nCandidates (K: what it does to attention weights; V: to attention output)")
    table(CANDIDATE_HEADER, rows)
    _print_choice(report["choice"])
    if report["assumptions"]:
        print(_wrapped("  ", report["assumptions"]))


def _print_choice(choice: dict | None) -> None:
    if choice is None:
        return
    limits = f"KL up to {choice['max_kl']:g}, output error up to {choice['max_output_error']:g}"
    print(f"\nCheapest types with {limits}")
    for c in choice["combinations"]:
        of = f" ({c['dialect']})" if c["dialect"] else ""
        types = f"K {c['k']}" + (f", V {c['v']}" if c["v"] else "")
        print(f"  all layers alike{of}: {types}: {c['bpw']:.2f} bits per value")
        if c["layers_bpw"] < c["bpw"]:
            mixed = c["dialect"] and get_dialect(c["dialect"]).state.mixed
            can = "" if mixed else ", which it cannot load as one cache"
            print(f"  layer by layer{of}: {c['layers_bpw']:.2f} bits per value{can}")
            for layer in c["layers"]:
                v = f", V {layer['v']}" if layer["v"] else ""
                say(f"    {layer['layer']}: K {layer['k']}{v}")
