"""What tbq-inspect says about a file: the answer in a few lines, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator

from .columns import MIB, number
from .inspect_summary import answer

# What is said, and under which heading; an empty heading continues the one before.
Fact = tuple[str, str]

CONTAINERS = {"session": "session file (GGSN)", "sequence": "sequence file (GGSQ)"}
KINDS = {"K": "keys", "V": "values", "R": "recurrent R", "S": "recurrent S", "P": "recurrent P"}
LOADS = {True: "yes", False: "no", None: "unknown"}
# Of the counts in a tensor's health, those that no healthy one has.
FAULTS = (
    "nonfinite_scales",
    "large_scales",
    "subnormal_scales",
    "nonfinite_values",
    "dead_codes",
)
TYPES_SHOWN = 6  # of a model's types, those with most bytes


def verdict(report: dict) -> list[Fact]:
    """Return the answer: what it is, its types and size, whether it is healthy, what to choose."""
    found = [("what", _what(report)), ("types", _types(report)), ("size", _size(report))]
    found.append(("health", _health(report)))
    if report["reference"]:
        found.append(("error", _error(report)))
    if report["gguf"] and report["gguf"]["cache"]:
        found.append(("KV cache", _cache(report["gguf"]["cache"], report["path"])))
    if report["choice"]:
        choice = report["choice"]
        first, *others = answer(choice)
        found += [("choose", first), *(("", line) for line in others)]
        limits = f"KL up to {choice['max_kl']:g}, output error up to {choice['max_output_error']:g}"
        found.append(("", f"cheapest within the limits in every layer: {limits}"))
    if report["state"]:
        found.append(("loads in", _loads_in(report["state"])))
    return found


def facts(report: dict) -> list[Fact]:
    """Return what the answer rests on, and everything else about the file but its tensors."""
    state = report["state"]
    dialect = ("dialect", f"{report['dialect'] or 'none'}: {report['dialect_reason']}")
    return [*(_state_facts(state) if state else ()), dialect]


def has_faults(tensor: dict) -> bool:
    """Tell whether something in a tensor is what no healthy one has."""
    health = tensor["health"]
    return any(health[name] for name in FAULTS) or any(health["anomalies"].values())


# --- the answer ----------------------------------------------------------------------------------


def _what(report: dict) -> str:
    state, gguf = report["state"], report["gguf"]
    if state is None:
        line = f"GGUF v{gguf['version']}, architecture {gguf['architecture']}"
        return f"{line}, {len(gguf['shards'])} file(s), {gguf['metadata_keys']} metadata keys"
    line = CONTAINERS.get(state["container"], state["container"])
    line += f" v{state['version']}" if state["version"] is not None else ""
    line += " (newer than what was checked)" if state["version_newer"] else ""
    line += f", architecture {state['architecture']}" if state["architecture"] else ""
    line += f", {state['tokens']} tokens" if state["tokens"] is not None else ""
    line += " (llama-server's packed list)" if state["server_tokens"] else ""
    caches = [
        f"{m['name']} of {sum(s['cells'] for s in m['streams'])} cells in {m['layers']} layers"
        for m in state["memories"]
        if m["streams"]
    ]
    return "; ".join([f"KV-cache dump: {line}", *caches])


def _types(report: dict) -> str:
    groups: dict[tuple[str, str], list[int]] = {}
    for t in report["tensors"]:
        side = KINDS.get(t["kind"], "")
        groups.setdefault((side, t["type"]), []).append(t["n_bytes"])
    ordered = list(groups.items())
    if report["gguf"]:
        ordered.sort(key=lambda group: -sum(group[1]))
    parts = []
    for (side, name), sizes in ordered[:TYPES_SHOWN]:
        unit = "layer" if side else "tensor"
        count = f"{len(sizes)} {unit}{'s' if len(sizes) > 1 else ''}"
        parts.append(f"{side} {name} in {count}".strip())
    if len(ordered) > TYPES_SHOWN:
        parts.append(f"and {len(ordered) - TYPES_SHOWN} more types")
    guess = " (whose types they are is a guess)" if report["dialect_guessed"] else ""
    return (", ".join(parts) or "none") + guess


def _size(report: dict) -> str:
    totals = report["totals"]
    # of unknown types nobody knows how many bits a value takes
    some = any(t["bpw"] is None for t in report["tensors"])
    known = " where the type is known" if some else ""
    size = f"{totals['tensors']} tensors, {totals['n_bytes'] / MIB:.2f} MiB"
    size += f", {number(totals['bpw'], '.2f')} bits per value{known}"
    return f"{size}, {number(totals['compression'], '.2f')} times smaller than f16"


def _health(report: dict) -> str:
    tensors, n = report["tensors"], len(report["warnings"])
    faulty = sum(map(has_faults, tensors))
    unread = sum(t["undecodable"] is not None for t in tensors)
    blocks = sum(t["health"]["blocks"] for t in tensors)
    where = f"{blocks} blocks" if blocks else f"{len(tensors)} tensors"
    text = f"no fault found in {where}" if tensors else "there is nothing to check"
    if faulty:
        text = f"faults in {faulty} of {len(tensors)} tensors"
    text += f"; {unread} of {len(tensors)} tensors not looked into" if unread else ""
    return text + (f"; {n} warning{'s' if n > 1 else ''}, see below" if n else "")


def _error(report: dict) -> str:
    """Say how far the file is from its twin, at the tensor where it is farthest."""
    compared = [t for t in report["tensors"] if t["reference"]]
    figures = {
        "softmax KL": [(t["reference"]["attention"] or {}).get("kl") for t in compared],
        "output error": [(t["reference"]["attention"] or {}).get("output_error") for t in compared],
        "relative MSE": [t["reference"]["relative_mse"] for t in compared],
    }
    parts = []
    for words, values in figures.items():
        known = [(v, t["name"]) for v, t in zip(values, compared, strict=True) if v is not None]
        if known:
            value, name = max(known, key=lambda one: (one[0] != one[0], one[0]))
            parts.append(f"{words} {number(value, '.1e')} ({name})")
    return f"at most {', '.join(parts)}" if parts else "nothing to compare"


def _cache(cache: dict, path: str) -> str:
    parts = [f"{c['name']} {c['cells']} cells in {c['layers']} layers" for c in cache["caches"]]
    size = f"{cache['n_bytes'] / MIB:.2f} MiB at {cache['n_ctx']} tokens as {cache['type']}"
    return f"{size} ({', '.join(parts) or 'none'}); other types: tbq-plan {path}"


def _loads_in(state: dict) -> str:
    able = [loads["program"] for loads in state["loads"] if loads["loads"]]
    unsure = [loads["program"] for loads in state["loads"] if loads["loads"] is None]
    if able:
        return "; ".join(able)
    return f"perhaps {'; '.join(unsure)}" if unsure else "none of the programs below"


# --- where it comes from -------------------------------------------------------------------------


def _state_facts(state: dict) -> Iterator[Fact]:
    yield from _surroundings(state)
    origin = state["origin"]
    yield "written by", f"{origin['program']}: {'; '.join(origin['reasons'])}"
    yield "layout", f"{state['layout']}: {state['layout_reason']}"
    for memory in state["memories"]:
        if memory["class"] == "compressed":
            yield memory["name"], f"{memory['layers']} layers, compressed: no cells of its own"
        for i, stream in enumerate(memory["streams"]):
            yield memory["name"], _stream(memory, i, stream)
    yield "rotation", state["rotation"]["reason"]
    yield "heads", state["heads"]
    for loads in state["loads"]:
        yield "loads in", f"{loads['program']}: {LOADS[loads['loads']]}, {loads['reason']}"


def _surroundings(state: dict) -> Iterator[Fact]:
    """Yield what a packed list, an envelope and an appendix hold."""
    if state["slot"]:
        media = state["slot"]["media"]
        text = f"packed list of version {state['slot']['version']}, {len(media)} media"
        text += "".join(f"; at token {m['start']} one of {m['bytes']} bytes" for m in media)
        yield "tokens", text
    if state["envelope"]:
        e = state["envelope"]
        text = f"BUUNSLOT version {e['version']}, flags {e['flags']:#x}, {e['logits']} logits"
        text += "".join(f"; SHA-256 of the {name} {check}" for name, check in e["checks"].items())
        yield "envelope", text
    if state["appendix"]:
        a = state["appendix"]
        text = f"{a['name']}, {a['bytes']} bytes from byte {a['start']}"
        text += "".join(
            f"; {c['tokens']} tokens at positions {c['first']} to {c['last']}, {c['bytes']} bytes"
            for c in a["checkpoints"]
        )
        yield "appendix", text


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
