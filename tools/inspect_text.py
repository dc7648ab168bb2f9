"""tbq-inspect's report for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from .console import say, shown
from .inspect_summary import SIDES, answer, over_layers

MIB = 1024 * 1024
WIDTH = 100


def print_report(report: dict, details: bool = False) -> None:
    """Print a report that `inspect_report.report` returned; details even where candidates are."""
    _print_file(report)
    tried = any(t["candidates"] for t in report["tensors"])
    if details or not tried:
        _print_tensors(report["tensors"])
    _print_reference(report)
    if details:
        _print_candidates(report)
    if report["warnings"]:
        print("\nWarnings")
        for warning in report["warnings"]:
            print(wrapped("  ! ", warning))
    if tried:
        _print_summary(report)
        if not details:
            print()
            say("--details shows every tensor and every candidate on it")


def wrapped(prefix: str, text: str) -> str:
    """Return text in lines that are not too long, indented below a prefix."""
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
        if gguf["cache"]:
            print(wrapped("  KV cache  ", _cache(gguf["cache"], report["path"])))
    print(wrapped("  dialect   ", f"{report['dialect'] or 'none'}: {report['dialect_reason']}"))
    totals = report["totals"]
    size = f"{totals['tensors']} tensors, {totals['n_bytes'] / MIB:.2f} MiB"
    size += f", {number(totals['bpw'], '.2f')} bits per value{_of_known(report)}"
    print(f"  size      {size}, {number(totals['compression'], '.2f')} times smaller than f16")


def _cache(cache: dict, path: str) -> str:
    parts = [f"{c['name']} {c['cells']} cells in {c['layers']} layers" for c in cache["caches"]]
    size = f"{cache['n_bytes'] / MIB:.2f} MiB at {cache['n_ctx']} tokens as {cache['type']}"
    return f"{size} ({', '.join(parts) or 'none'}); other types: tbq-plan {path}"


def _of_known(report: dict) -> str:
    """Say that there are tensors of which nobody knows how many bits a value takes."""
    return " where the type is known" if any(t["bpw"] is None for t in report["tensors"]) else ""


def _print_state(state: dict) -> None:
    kind = {"session": "session file (GGSN)", "sequence": "sequence file (GGSQ)"}
    line = kind.get(state["container"], state["container"])
    line += f" v{state['version']}" if state["version"] is not None else ""
    line += " (newer than what was checked)" if state["version_newer"] else ""
    line += f", architecture {state['architecture']}" if state["architecture"] else ""
    line += f", {state['tokens']} tokens" if state["tokens"] is not None else ""
    line += " (llama-server's packed list)" if state["server_tokens"] else ""
    say(f"  {line}")
    _print_surroundings(state)
    origin = state["origin"]
    print(wrapped("  written by ", f"{origin['program']}: {'; '.join(origin['reasons'])}"))
    print(wrapped("  layout    ", f"{state['layout']}: {state['layout_reason']}"))
    for memory in state["memories"]:
        if memory["class"] == "compressed":
            text = f"{memory['layers']} layers, compressed: no cells of its own"
            print(wrapped(f"  {memory['name']:<10}", text))
        for i, stream in enumerate(memory["streams"]):
            print(wrapped(f"  {memory['name']:<10}", _stream(memory, i, stream)))
    print(wrapped("  rotation  ", state["rotation"]["reason"]))
    print(wrapped("  heads     ", state["heads"]))
    answers = {True: "yes", False: "no", None: "unknown"}
    for loads in state["loads"]:
        text = f"{loads['program']}: {answers[loads['loads']]}, {loads['reason']}"
        print(wrapped("  loads in  ", text))


def _print_surroundings(state: dict) -> None:
    """Print what a packed list, an envelope and an appendix hold."""
    if state["slot"]:
        media = state["slot"]["media"]
        text = f"packed list of version {state['slot']['version']}, {len(media)} media"
        text += "".join(f"; at token {m['start']} one of {m['bytes']} bytes" for m in media)
        print(wrapped("  tokens    ", text))
    if state["envelope"]:
        e = state["envelope"]
        text = f"BUUNSLOT version {e['version']}, flags {e['flags']:#x}, {e['logits']} logits"
        text += "".join(f"; SHA-256 of the {name} {check}" for name, check in e["checks"].items())
        print(wrapped("  envelope  ", text))
    if state["appendix"]:
        a = state["appendix"]
        text = f"{a['name']}, {a['bytes']} bytes from byte {a['start']}"
        text += "".join(
            f"; {c['tokens']} tokens at positions {c['first']} to {c['last']}, {c['bytes']} bytes"
            for c in a["checkpoints"]
        )
        print(wrapped("  appendix  ", text))


def _stream(memory: dict, i: int, stream: dict) -> str:
    text = f"stream {i}: {stream['cells']} cells"
    if stream["positions"]:
        text += f", positions {stream['positions'][0]} to {stream['positions'][1]}"
    for sequence, count in stream["sequences"].items():
        text += f", sequence {sequence} in {count}"
    if not memory["layers"] and stream["cells"]:
        text += ", no layers"
    state_text = f", deferred state: {memory['deferred_state']}"
    return text + (state_text if memory["deferred_state"] else "")


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
        print(wrapped("  ", "The attention of a layer is that of its K and V together."))


def _print_candidates(report: dict) -> None:
    """Print the candidates of each tensor."""
    rows = candidate_rows(report)
    if rows:
        print("\nCandidates (K: what it does to attention weights; V: to attention output)")
        table(CANDIDATE_HEADER, rows)


def _print_summary(report: dict) -> None:
    """Print what the candidates come to over all layers, and which of them to choose."""
    for side, (_, limit, words) in SIDES.items():
        rows = over_layers(report, side)
        if not rows:
            continue
        within = f"; limit {report['choice'][limit]:g}" if report["choice"] else ""
        print(f"\nCandidates for {side}, over all layers ({words}{within})")
        table(
            ("type", "bits", "size", "mean", "worst", "in", ""),
            [
                (
                    row["type"],
                    f"{row['bpw']:.2f}",
                    f"{row['n_bytes'] / MIB:.2f} MiB",
                    number(row["mean"], ".1e"),
                    number(row["worst"], ".1e"),
                    row["where"],
                    ("*" if row["best"] else " ") + (" ok" if row["good"] else "   "),
                )
                for row in rows
            ],
        )
    if report["choice"]:
        choice = report["choice"]
        say("  * no type of fewer bits does less harm; ok: within the limit in every layer")
        limits = f"KL up to {choice['max_kl']:g}, output error up to {choice['max_output_error']:g}"
        print(f"\nCheapest types with {limits}")
        for line in answer(choice):
            say(f"  {line}")
    if report["assumptions"] and any(t["candidates"] for t in report["tensors"]):
        print(wrapped("  ", report["assumptions"]))
