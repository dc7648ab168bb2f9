"""tbq-inspect's report as one self-contained page: tables, and plots as inline SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gguf_io import AtomicFiles
from tbq import BackendError

from .console import shown
from .inspect_text import (
    CANDIDATE_HEADER,
    MIB,
    REFERENCE_HEADER,
    candidate_rows,
    number,
    reference_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gguf_io.inspection import Inspection

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: #666; } dd { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4;
  white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.warnings li { color: #9a3412; } svg { max-width: 100%; height: auto; } p { max-width: 50rem; }
"""
COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
MARKERS = "osD^vP*X"
SIDES = {"K": "keys", "V": "values", "T": "tensors"}


def escape(text: object) -> str:
    """Return text as HTML, what is not printable as `console.shown` writes it."""
    return html.escape(shown(text))


def require_matplotlib() -> None:
    """Raise BackendError, which says what to install, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        need = "--html needs it: pip install 'tbq-reference[html]'"
        raise BackendError("matplotlib", need) from None


def write_html(path: str, report: dict, found: Inspection) -> None:
    """Write the page, atomically.

    Raises:
        BackendError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    require_matplotlib()
    with AtomicFiles() as output:
        output.create(path).write(_page(report, found).encode())


def _page(report: dict, found: Inspection) -> str:
    body = [f"<h1>{escape(report['path'])}</h1>", _facts(report)]
    if report["warnings"]:
        items = "".join(f"<li>{escape(text)}</li>" for text in report["warnings"])
        body.append(f'<h2>Warnings</h2><ul class="warnings">{items}</ul>')
    body.append(_choice(report))
    body += _plots(found)
    path = report["reference"]["path"] if report["reference"] else ""
    body.append(_table(f"Against {path}", REFERENCE_HEADER, reference_rows(report)))
    body.append(_table("Candidates", CANDIDATE_HEADER, candidate_rows(report)))
    body.append(_tensor_table(report))
    head = f'<meta charset="utf-8"><title>tbq-inspect: {escape(report["path"])}</title>'
    head += '<meta name="viewport" content="width=device-width">'
    head += f"<style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


# --- text ----------------------------------------------------------------------------------------


def _facts(report: dict) -> str:
    totals = report["totals"]
    facts = {
        "size": f"{totals['tensors']} tensors, {totals['n_bytes'] / MIB:.2f} MiB, "
        f"{number(totals['bpw'], '.2f')} bits per value, "
        f"{number(totals['compression'], '.2f')} times smaller than f16",
        "dialect": f"{report['dialect'] or 'none'}: {report['dialect_reason']}",
    }
    state = report["state"]
    if state:
        cells = [stream["cells"] for memory in state["memories"] for stream in memory["streams"]]
        facts |= {
            "container": f"{state['container']}, version {state['version']}",
            "layout": f"{state['layout']}: {state['layout_reason']}",
            "cells": ", ".join(map(str, cells)),
            "rotation": state["rotation"]["reason"],
            "heads": state["heads"],
        }
    if report["gguf"]:
        facts["architecture"] = str(report["gguf"]["architecture"])
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{rows}</dl>"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _tensor_table(report: dict) -> str:
    rows = []
    for t in report["tensors"]:
        for i, head in enumerate(t["statistics"]["heads"] if t["statistics"] else [{}]):
            rows.append(
                [
                    t["name"],
                    t["type"],
                    str(i),
                    number(t["bpw"], ".3f"),
                    number(head.get("norm_mean"), ".4g"),
                    number(head.get("channel_ratio"), ".2f"),
                    number(head.get("kurtosis"), ".2f"),
                    number(head.get("kurtosis_rotated"), ".2f"),
                    number(head.get("marginal_distance"), ".4f"),
                ]
            )
    header = [
        "tensor",
        "type",
        "head",
        "bits",
        "norm",
        "channel ratio",
        "kurtosis",
        "rotated",
        "KS",
    ]
    return _table("Layers and heads", header, rows)


def _choice(report: dict) -> str:
    choice = report["choice"]
    note = f"<p>{escape(report['assumptions'])}</p>" if report["assumptions"] else ""
    if choice is None:
        return note
    rows = []
    for c in choice["combinations"]:
        dialect = c["dialect"] or "ggml"
        rows.append([dialect, "all", c["k"], c["v"] or "–", number(c["bpw"], ".2f")])
        for i, layer in enumerate(c["layers"]):
            bits = number(c["layers_bpw"], ".2f") if i == 0 else ""
            rows.append([dialect, layer["layer"], layer["k"], layer["v"] or "–", bits])
    limits = f"KL up to {choice['max_kl']:g}, output error up to {choice['max_output_error']:g}"
    header = ["dialect", "layer", "K", "V", "bits per value"]
    return _table(f"Cheapest types with {limits}", header, rows) + note


# --- plots ---------------------------------------------------------------------------------------


def _plots(found: Inspection) -> Iterator[str]:
    for title, draw in (
        ("Error per layer", _error_per_layer),
        ("Channels: root mean square over the head's median, as a power of two", _channel_map),
        ("Codes, the share of each", _code_histograms),
        ("Size against error, mean over layers", _size_against_error),
    ):
        figure = draw(found)
        if figure is not None:
            yield f"<h2>{escape(title)}</h2>{_svg(figure, title)}"


def _svg(figure: Figure, name: str) -> str:
    import matplotlib

    out = io.StringIO()
    # text stays text, and ids depend on the plot alone, so that the page is reproducible
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _looks(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Give each name a colour and a marker, the same in all panels of a plot."""
    return {
        name: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)],
            "linestyle": "-",
        }
        for i, name in enumerate(dict.fromkeys(names))
    }


def _series(found: Inspection) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Return, per side, the error of each candidate and of the file itself by layer."""
    sides: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for place, f in enumerate(found.findings):
        layer = place if f.tensor.layer is None else f.tensor.layer
        points = [(c.type.name, c.relative_mse) for c in f.candidates if c.unfit is None]
        if f.distortion is not None:
            points.append((f"this file ({f.tensor.format.name})", f.relative_mse))
        for name, error in points:
            xs, ys = sides.setdefault(f.tensor.kind, {}).setdefault(name, ([], []))
            xs.append(layer)
            ys.append(error)
    return sides


def _error_per_layer(found: Inspection) -> Figure | None:
    sides = {kind: lines for kind, lines in _series(found).items() if kind in SIDES}
    if not sides:
        return None
    looks = _looks(name for lines in sides.values() for name in lines)
    figure, grid = _figure(1, len(sides), 5.5 * len(sides), 3.8)
    for axes, (kind, lines) in zip(grid[0], sides.items(), strict=True):
        for name, (xs, ys) in lines.items():
            order = np.argsort(xs, kind="stable")
            x, y = np.array(xs)[order], np.array(ys)[order]
            axes.plot(x, y, label=name, ms=5, lw=1.2, **looks[name])
        if all(y > 0 for _, ys in lines.values() for y in ys):
            axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=SIDES[kind], xlabel="layer", ylabel="relative MSE")
        _style(axes)
        axes.legend(fontsize="small", frameon=False)
    return figure


def _channel_map(found: Inspection) -> Figure | None:
    sides = {
        kind: [f for f in found.findings if f.tensor.kind == kind and f.heads] for kind in "KV"
    }
    sides = {kind: fs for kind, fs in sides.items() if fs}
    if not sides:
        return None
    heads = max(sum(len(f.heads) for f in fs) for fs in sides.values())
    figure, grid = _figure(1, len(sides), 5.5 * len(sides), min(12, 1.6 + 0.16 * heads))
    for axes, (kind, fs) in zip(grid[0], sides.items(), strict=True):
        image = _channel_image([h.channel_rms for f in fs for h in f.heads])
        limit = max(1.0, float(np.abs(image).max()))
        picture = axes.imshow(
            image, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        starts = np.cumsum([0] + [len(f.heads) for f in fs[:-1]])
        every = max(1, len(fs) // 16)
        axes.set_yticks(starts[::every], [f.tensor.layer for f in fs[::every]])
        axes.set(
            title=SIDES[kind], xlabel="channel of the head", ylabel="layer (one line per head)"
        )
        figure.colorbar(picture, ax=axes)
    return figure


def _channel_image(channels: list[np.ndarray]) -> np.ndarray:
    """Return the logarithm of each channel over its head's median, one line per head."""
    image = np.zeros((len(channels), max(map(len, channels))))
    for row, rms in zip(image, channels, strict=True):
        median = np.median(rms)
        if median > 0:
            row[: len(rms)] = np.log2(np.maximum(rms / median, 2.0**-8))
    return image


def _code_histograms(found: Inspection) -> Figure | None:
    totals: dict[str, np.ndarray] = {}
    for f in found.findings:
        for name, counts in f.health.histograms.items():
            label = f"{f.tensor.kind} {f.tensor.format.name}, {name}"
            totals[label] = totals.get(label, 0) + counts
    totals = {label: counts for label, counts in totals.items() if counts.sum()}
    if not totals:
        return None
    columns = min(3, len(totals))
    rows = -(-len(totals) // columns)
    figure, grid = _figure(rows, columns, 3.7 * columns, 2.6 * rows)
    for axes in grid.flat[len(totals) :]:
        axes.set_visible(False)
    for axes, (label, counts) in zip(grid.flat, totals.items(), strict=False):
        axes.bar(
            np.arange(len(counts)), counts / counts.sum(), width=1, color=COLORS[0], ec="white"
        )
        axes.set_title(label, fontsize="medium")
        axes.set(xlabel="code")
        _style(axes)
    return figure


def _size_against_error(found: Inspection) -> Figure | None:
    sides: dict[str, dict[str, tuple[float, list[float]]]] = {}
    for f in found.findings:
        for c in f.candidates:
            if c.unfit is None:
                entry = sides.setdefault(f.tensor.kind, {})
                entry.setdefault(c.type.name, (c.type.bpw, []))[1].append(c.relative_mse)
    if not sides:
        return None
    looks = _looks(name for points in sides.values() for name in points)
    figure, grid = _figure(1, len(sides), 5.5 * len(sides), 3.8)
    for axes, (kind, points) in zip(grid[0], sides.items(), strict=True):
        for name, (bits, errors) in points.items():
            look = looks[name] | {"linestyle": "none"}
            axes.plot([bits], [float(np.mean(errors))], label=name, ms=7, **look)
        if all(np.mean(errors) > 0 for _, errors in points.values()):
            axes.set_yscale("log")
        axes.margins(x=0.1)
        axes.set(title=SIDES[kind], xlabel="bits per value", ylabel="relative MSE")
        _style(axes)
        axes.legend(fontsize="small", frameon=False)
    return figure
