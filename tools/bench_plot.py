"""tbq-bench's plot: how fast each format is encoded and decoded, beside a memory copy."""

from __future__ import annotations

import io
import os

from gguf_io import AtomicFiles
from tbq.errors import InputError

from .bench_cases import COPY

KINDS = (".svg", ".png")
# Of Okabe and Ito, who chose them for every kind of sight; the markers differ as well.
ENCODE, DECODE, YARDSTICK = "#d55e00", "#0072b2", "#555555"
STYLES = {"quantize": ("encode", ENCODE, "s"), "dequantize": ("decode", DECODE, "o")}


def checked_kind(path: str) -> str:
    """Return what kind of file a plot is, by its name; InputError if it is none of KINDS."""
    kind = os.path.splitext(path)[1].lower()
    if kind not in KINDS:
        raise InputError("--plot", path, f"a name that ends in {' or '.join(KINDS)}")
    return kind[1:]


def write_plot(path: str, records: list[dict]) -> None:
    """Write the plot, atomically: a column for each length of rows, a line for each format.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lengths = [*dict.fromkeys(record["row"] for record in records)]
    names = [*dict.fromkeys(_format(record) for record in records if record["case"] != COPY)]
    size = (4 + 4 * len(lengths), 1.4 + 0.24 * len(names))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tbq"}):
        figure = Figure(figsize=size, layout="constrained")
        columns = figure.subplots(1, len(lengths), sharex=True, sharey=True, squeeze=False)[0]
        for axes, n in zip(columns, lengths, strict=True):
            _draw(axes, [record for record in records if record["row"] == n], names)
            axes.set_title(f"rows of {n}")
        columns[0].set_yticks(range(len(names)), names, fontsize=8)
        columns[0].set_ylim(len(names) - 0.4, -0.6)
        handles, labels = columns[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        figure.supxlabel("million values per second")
        data = io.BytesIO()
        figure.savefig(data, format=checked_kind(path), dpi=120)
    with AtomicFiles() as files:
        files.create(path).write(data.getbuffer())


def _draw(axes, records: list[dict], names: list[str]) -> None:
    for operation, (label, color, marker) in STYLES.items():
        own = [record for record in records if record["case"].endswith(f" {operation}")]
        rows = [names.index(_format(record)) for record in own]
        speeds = [record["mvalues_per_s"] for record in own]
        axes.scatter(speeds, rows, s=26, color=color, marker=marker, label=label, zorder=3)
        by_c = [
            (r["c_mvalues_per_s"], y) for r, y in zip(own, rows, strict=True) if "ratio_to_c" in r
        ]
        if by_c:
            label = f"{label}, the fork's C"
            style = {"facecolors": "none", "edgecolors": color, "marker": marker, "label": label}
            axes.scatter(*zip(*by_c, strict=True), s=60, zorder=3, **style)
    for record in records:
        if record["case"] == COPY:
            axes.axvline(record["mvalues_per_s"], color=YARDSTICK, ls="--", label="memory copy")
    axes.set_xscale("log")
    axes.grid(axis="both", alpha=0.3)


def _format(record: dict) -> str:
    return record["case"].rpartition(" ")[0]
