"""The tables of tbq-inspect's report, for its text and its page alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .columns import MIB, number
from .inspect_summary import SIDES, bare, flags, over_layers


class Table(NamedTuple):
    """A table with its title, and notes of what its columns are.

    In a grouped one many rows have the same first column.
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    grouped: bool = False


def tensor_table(report: dict) -> Table:
    """Return one line per tensor; of several heads the median, of channel ratios the largest."""
    rows = []
    for t in report["tensors"]:
        heads = t["statistics"]["heads"] if t["statistics"] else []
        rows.append(
            (
                t["name"],
                bare(t["type"]),
                "x".join(map(str, t["ggml_shape"])),
                number(t["bpw"], ".2f"),
                number(_median(h["norm_mean"] for h in heads), ".3g"),
                number(max((h["channel_ratio"] for h in heads), default=None), ".1f"),
                number(_median(h["kurtosis"] for h in heads), ".1f"),
                number(_median(h["kurtosis_rotated"] for h in heads), ".1f"),
                number(_median(h["marginal_distance"] for h in heads), ".3f"),
            )
        )
    header = ("tensor", "type", "shape", "bits", "norm", "chan", "kurt", "rot", "KS")
    return Table("Tensors", header, rows, (STATISTICS,))


STATISTICS = (
    "bits: per value; norm: mean L2 norm of a row's head; chan: largest channel over the median "
    "one; kurt, rot: kurtosis as it is and rotated, 3 is a Gaussian's; KS: distance from the "
    "codebooks' normal, 0 is none."
)


def head_table(report: dict) -> Table:
    """Return one line per head."""
    rows = []
    for t in report["tensors"]:
        for i, head in enumerate(t["statistics"]["heads"] if t["statistics"] else ()):
            rows.append(
                (
                    t["name"],
                    str(i),
                    number(head["norm_mean"], ".4g"),
                    number(head["channel_ratio"], ".2f"),
                    number(head["kurtosis"], ".2f"),
                    number(head["kurtosis_rotated"], ".2f"),
                    number(head["marginal_distance"], ".4f"),
                )
            )
    header = ("tensor", "head", "norm", "chan", "kurt", "rot", "KS")
    return Table("Heads", header, rows, (STATISTICS,))


def reference_table(report: dict) -> Table | None:
    """Return the errors against the reference; None if there is none."""
    if report["reference"] is None:
        return None
    rows = []
    for t in report["tensors"]:
        if t["reference"]:
            a = t["reference"]["attention"] or {}
            rows.append(
                (
                    t["name"],
                    bare(t["type"]),
                    number(t["reference"]["relative_mse"], ".2e"),
                    number(t["reference"]["cosine"], ".5f"),
                    number(a.get("logit_rmse"), ".4f"),
                    number(a.get("kl"), ".1e"),
                    number(a.get("output_error"), ".1e"),
                )
            )
    cells = report["reference"]["cells"]
    over = f" over {cells} cells" if cells is not None else ""
    notes = ["rel. MSE: squared error of the values over their squares."]
    if any(t["reference"] and t["reference"]["attention"] for t in report["tensors"]):
        notes = [
            f"{notes[0]} logit: root mean square error of logits; KL: divergence of attention "
            "weights, nats; output: relative squared error of attention output. The attention of "
            "a layer is that of its K and V together."
        ]
    header = ("tensor", "type", "rel. MSE", "cosine", "logit", "KL", "output")
    return Table(f"Against {report['reference']['path']}{over}", header, rows, tuple(notes))


def candidate_table(report: dict) -> Table | None:
    """Return every candidate on every tensor; None if there are none.

    Those that cannot be tried are notes, but for those that are made for a tensor's other side.
    """
    rows = []
    unfit: dict[tuple[str, str], list[str]] = {}
    for t in report["tensors"]:
        for c in t["candidates"]:
            if c["unfit"]:
                if not c["unfit"].endswith(" only"):
                    unfit.setdefault((c["type"], c["unfit"]), []).append(t["name"])
                continue
            a = c["attention"] or {}
            rows.append(
                (
                    t["name"],
                    c["type"],
                    number(c["bpw"], ".2f"),
                    number(c["relative_mse"], ".2e"),
                    number(a.get("kl") if t["kind"] == "K" else None, ".1e"),
                    number(a.get("output_error"), ".1e"),
                )
            )
    if not rows and not unfit:
        return None
    header = ("tensor", "candidate", "bits", "rel. MSE", "KL", "output")
    about = (
        "rel. MSE: squared error of the values over their squares; KL: what a K type does to "
        "attention weights, nats; output: relative squared error of attention output."
    )
    notes = [about, *(f"{_on(n)}: {name} {why}" for (name, why), n in unfit.items())]
    return Table("Candidates", header, rows, tuple(notes), grouped=True)


def side_table(report: dict, side: str) -> Table | None:
    """Return each candidate for K, V or tensors over all of them; None if there are none."""
    rows = over_layers(report, side)
    if not rows:
        return None
    limit, words = SIDES[side][1:]
    within = f"; limit {report['choice'][limit]:g}" if report["choice"] else ""
    body = [
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
    ]
    header = ("type", "bits", "size", "mean", "worst", "in", "")
    note = "* no type of fewer bits does less harm"
    note += "; ok: within the limit in every layer" if report["choice"] else ""
    what = "all tensors" if side == "T" else f"{side}, over all layers"
    title = f"Candidates for {what} ({words}{within})"
    return Table(title, header, body, (note,))


def choice_table(report: dict) -> Table | None:
    """Return the cheapest types of each dialect within the limits; None if there are none."""
    choice = report["choice"]
    if choice is None:
        return None
    rows = [
        (c["dialect"] or "ggml", flags(c), f"{c['bpw']:.2f}", f"{c['layers_bpw']:.2f}")
        for c in choice["combinations"]
    ]
    limits = f"KL up to {choice['max_kl']:g}, output error up to {choice['max_output_error']:g}"
    header = ("dialect", "flags", "bits", "bits by layer")
    return Table(f"Cheapest types with {limits}", header, rows)


def notes(report: dict) -> list[str]:
    """Return what the numbers were computed under."""
    return [report["assumptions"]] if report["assumptions"] else []


def _on(names: list[str]) -> str:
    more = len(names) - 1
    return names[0] + (f" and {more} more" if more else "")


def _median(values: Iterable[float | None]) -> float | None:
    known = sorted(v for v in values if v is not None and v == v)
    return known[len(known) // 2] if known else None
