"""What tbq-inspect's candidates come to: the answer, and each type over all layers."""

from __future__ import annotations

from collections.abc import Iterator

from tbq.registry import get_dialect

F16_BITS = 16
OTHERS = 5  # combinations beside the recommended one
PAYS = 0.95  # what layers of their own types must come down to, to be worth a line
# By what the types of a side are judged: the figure, the limit of it, and how it is called.
SIDES = {
    "K": ("kl", "max_kl", "softmax KL, nats"),
    "V": ("output_error", "max_output_error", "relative squared error of attention output"),
    "T": ("relative_mse", None, "relative squared error of the values"),
}


def answer(choice: dict) -> list[str]:
    """Return the recommended types, how small they are, and the next best of other dialects."""
    best, *others = choice["combinations"]
    lines = [f"{flags(best)}  {_smaller(best)}", *_by_layer(best)]
    lines += [f"or {flags(c)}  {_smaller(c)}" for c in others[:OTHERS]]
    if len(others) > OTHERS:
        lines.append(f"and {len(others) - OTHERS} more below")
    return lines


def flags(combination: dict) -> str:
    """Return llama.cpp's flags for a combination."""
    names = {"-ctk": combination["k"], "-ctv": combination["v"]}
    return " ".join(f"{flag} {bare(name)}" for flag, name in names.items() if name)


def bare(name: str) -> str:
    """Return what a fork calls a type: without dialect and choice, as in `amesianx:tbq4_0[...]`."""
    return name.rpartition(":")[2].partition("[")[0]


def _smaller(combination: dict) -> str:
    of = f"{combination['dialect']}: " if combination["dialect"] else ""
    bits = combination["bpw"]
    return f"{of}{bits:.2f} bits per value, {F16_BITS / bits:.1f} times smaller than f16"


def _by_layer(combination: dict) -> Iterator[str]:
    """Yield what each layer's own types would save, if that is worth it."""
    if combination["layers_bpw"] > PAYS * combination["bpw"]:
        return
    dialect = combination["dialect"]
    can = "" if dialect and get_dialect(dialect).state.mixed else ", which no flag of it can say"
    yield f"layer by layer {combination['layers_bpw']:.2f} bits{can}:"
    for names, k, v in collapsed(combination["layers"]):
        yield f"  {names}: K {k}" + (f", V {v}" if v else "")


def collapsed(layers: list[dict]) -> list[tuple[str, str, str | None]]:
    """Return (layers, K type, V type), those of a cache with the same types as one."""
    alike: dict[tuple, list[int]] = {}
    for layer in layers:
        cache, _, number = layer["layer"].rpartition("layer ")
        alike.setdefault((cache, layer["k"], layer["v"]), []).append(int(number))
    return [
        (f"{cache}layer{'s' if len(numbers) > 1 else ''} {ranges(numbers)}", k, v)
        for (cache, k, v), numbers in alike.items()
    ]


def ranges(numbers: list[int]) -> str:
    """Write numbers as llama.cpp's users do: 0-3,7."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def figure(result: dict, side: str) -> float | None:
    """Return by what a candidate, or a comparison with a reference, is judged; None if unknown."""
    key = SIDES[side][0]
    return result[key] if side == "T" else (result["attention"] or {}).get(key)


def over_layers(report: dict, side: str) -> list[dict]:
    """Return each candidate's figures over all K, V or tensors, those of fewest bits first.

    A candidate is left out where no layer can have it. `best` says that none of fewer bits does
    less harm, `good` that its worst layer is within the limit.
    """
    limit = (report["choice"] or {}).get(SIDES[side][1])
    found: dict[str, list] = {}
    for t in report["tensors"]:
        for c in t["candidates"] if t["kind"] == side else ():
            error = None if c["unfit"] else figure(c, side)
            if error is not None:
                found.setdefault(c["type"], []).append((error, t, c["bpw"]))
    rows = []
    for name, entries in found.items():
        errors = [error for error, _, _ in entries]
        worst, where, bits = max(entries, key=lambda entry: (entry[0] == entry[0], entry[0]))
        rows.append(
            {
                "type": name,
                "bpw": bits,
                "n_bytes": sum(bpw * (t["values"] or 0) / 8 for _, t, bpw in entries),
                "mean": sum(errors) / len(errors),
                "worst": worst,
                "where": where["name"],
                "good": limit is not None and worst <= limit,
            }
        )
    rows.sort(key=lambda row: (row["bpw"], row["worst"]))
    least = float("inf")
    for row in rows:
        row["best"] = row["worst"] < least
        least = min(least, row["worst"])
    return rows
