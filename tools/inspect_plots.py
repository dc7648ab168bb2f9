"""The plots of tbq-inspect's page, as SVG whose colours and letters are those of the page.

Each is drawn at about the size that it is seen in, so that its text is as large as the page's.
Colours are the page's variables: `--mark` for what is measured, `--quiet` for what is outdone,
`--limit` for a limit. Nothing is told by colour alone.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .console import shown
from .inspect_summary import SIDES, figure, over_layers

CHARACTER = 6.4  # width of a bold letter of the plots' size, about
MOST_TYPES = 24  # lines of a plot
MOST_PANELS = 8  # types that are drawn layer by layer
PANEL = (240, 160)
LOUD, SOFT = (213, 94, 0), (0, 114, 178)  # Okabe and Ito's vermillion and blue
UNITS = {"K": "KL, nats", "V": "relative error of output", "T": "relative error of values"}


class Plot(NamedTuple):
    """One or more drawings with a caption; `wide` says how large each may become."""

    title: str
    caption: str
    drawings: list[str]
    wide: bool = False


def types_plot(report: dict, side: str) -> Plot | None:
    """Draw each candidate's size beside what it does at worst and on average; None without any."""
    rows = over_layers(report, side)
    if not rows:
        return None
    shown_rows = rows if len(rows) <= MOST_TYPES else _of_interest(report, side, rows)
    limit = (report["choice"] or {}).get(SIDES[side][1])
    left = CHARACTER * max(len(_name(row["type"])) for row in shown_rows) + 8
    bar, start = left + 34, left + 84
    width, line, top = max(420.0, start + 180), 17, 34
    axis = LogAxis.over([row[key] for row in shown_rows for key in ("mean", "worst")], [limit])
    place = axis.placed(start, width - 14)
    bottom = top + line * len(shown_rows)
    out = [
        _text(0, 12, "type"),
        _text(bar - 4, 12, "bits", "end"),
        _text(start, 12, f"{UNITS[side]} →"),
        *(_line(place(t), top - 6, place(t), bottom, "grid") for t in axis.ticks),
        *(_text(place(t), bottom + 14, _short(t), "middle") for t in axis.labels),
    ]
    if limit:
        out.append(_line(place(limit), top - 6, place(limit), bottom, "limit"))
        out.append(_text(place(limit), top - 9, f"limit {limit:g}", "middle", "limit"))
    most = max(row["bpw"] for row in shown_rows)
    for i, row in enumerate(shown_rows):
        y = top + line * (i + 0.5)
        kind = "best" if row["best"] else "other"
        length = 40 * row["bpw"] / most
        out.append(f'<g class="{kind}">{_text(0, y + 4, _name(row["type"]))}')
        out.append(_text(bar - 4, y + 4, f"{row['bpw']:.2f}", "end"))
        out.append(f'<rect x="{bar:.1f}" y="{y - 4:.1f}" width="{length:.1f}" height="8"/>')
        x, end = place(row["mean"]), place(row["worst"])
        out.append(_line(x, y, end, y, "span"))
        out.append(f'<circle class="mean" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>')
        out.append(f'<circle cx="{end:.1f}" cy="{y:.1f}" r="4"/></g>')
    what = {"K": "keys", "V": "values", "T": "tensors"}[side]
    one = "tensor" if side == "T" else "layer"
    caption = (
        f"To the right: {SIDES[side][2]}. Filled: the worst {one}, which decides; hollow: the "
    )
    caption += (
        "mean. Coloured and bold: no type of fewer bits does less harm. Bars: bits per value."
    )
    caption += " Dashed: the limit." if limit else ""
    left_out = len(rows) - len(shown_rows)
    caption += f" {left_out} more types, all outdone, are in the table." if left_out else ""
    best = min((r for r in rows if r["good"]), key=lambda r: r["bpw"], default=None)
    told = f"{len(shown_rows)} types from {shown_rows[0]['bpw']:.2f} to {most:.2f} bits per value."
    if limit:
        words = (
            f"the smallest within the limit is {_name(best['type'])}" if best else "none is within"
        )
        told += f" Of all, {words}."
    title = f"Types for {what}: size, and what it costs"
    return Plot(title, caption, [_svg(title, told, width, bottom + 20, out)], wide=True)


def layers_plot(report: dict, side: str) -> Plot | None:
    """Draw what types, and the file itself, do to each layer, one panel each on one scale."""
    lines = _by_layer(report, side)
    if not lines:
        return None
    limit = (report["choice"] or {}).get(SIDES[side][1])
    axis = LogAxis.over([y for points in lines.values() for _, y in points], [limit])
    layers = [x for points in lines.values() for x, _ in points]
    span = min(layers), max(layers)
    drawings = [
        _layer_panel(name, points, side, axis, span, limit) for name, points in lines.items()
    ]
    what = {"K": "Keys", "V": "Values", "T": "Tensors"}[side]
    caption = f"Upwards: {SIDES[side][2]}, the same scale in each panel; to the right: the layer."
    caption += f" Dashed: the limit, {limit:g}." if limit else ""
    return Plot(f"{what}, layer by layer", caption, drawings)


def channel_plot(report: dict, side: str) -> Plot | None:
    """Draw how loud each channel of each head is beside the median channel; None without any."""
    tensors = [t for t in report["tensors"] if t["kind"] == side and t["statistics"]]
    heads = [h["channel_rms"] for t in tensors for h in t["statistics"]["heads"]]
    if not heads:
        return None
    picture = _loudness(heads)
    most = max(1, math.ceil(float(np.abs(picture).max())))
    left, top, width, height = 44, 12, 300, min(360, max(72, 6 * len(heads)))
    right, bottom = left + width, top + height
    starts = np.cumsum([0] + [len(t["statistics"]["heads"]) for t in tensors[:-1]])
    every = math.ceil(len(tensors) / max(1, height // 14))
    out = [
        f'<image x="{left}" y="{top}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none" href="{_png(picture / most)}"/>',
        f'<rect class="frame" x="{left}" y="{top}" width="{width}" height="{height}"/>',
        _text(left - 6, bottom + 14, "layer", "end"),
        *(
            _text(left - 6, top + height * start / len(heads) + 9, str(t["layer"]), "end")
            for t, start in list(zip(tensors, starts, strict=True))[::every]
        ),
        _text(left, bottom + 14, "0"),
        _text(left + width / 2, bottom + 14, "channel of the head", "middle"),
        _text(right, bottom + 14, str(picture.shape[1] - 1), "end"),
        f'<image x="{right + 14}" y="{top}" width="12" height="{height}" '
        f'preserveAspectRatio="none" href="{_png(np.linspace(1, -1, 64)[:, None])}"/>',
        f'<rect class="frame" x="{right + 14}" y="{top}" width="12" height="{height}"/>',
        _text(right + 30, top + 9, f"×{2**most}"),
        _text(right + 30, top + height / 2 + 4, "×1"),
        _text(right + 30, bottom, f"×1/{2**most}"),
    ]
    title = f"{'Keys' if side == 'K' else 'Values'}: how loud each channel is"
    ratio = max(h["channel_ratio"] for t in tensors for h in t["statistics"]["heads"])
    told = f"{len(heads)} heads; the loudest channel is {ratio:.1f} times its head's median one."
    caption = "Root mean square of each channel over that of its head's median channel; one line "
    caption += "per head. Orange is louder, blue is quieter."
    return Plot(title, caption, [_svg(title, told, right + 70, bottom + 20, out)], wide=True)


def code_plot(report: dict) -> Plot | None:
    """Draw how often each code occurs, one panel for each type and kind of code."""
    totals: dict[str, np.ndarray] = {}
    for t in report["tensors"]:
        for name, counts in t["health"]["histograms"].items():
            label = f"{t['kind']} {t['type'].rpartition(':')[2]}, {name}"
            totals[label] = totals.get(label, 0) + np.array(counts, np.float64)
    drawings = [_codes_panel(label, n) for label, n in totals.items() if n.sum()]
    if not drawings:
        return None
    caption = (
        "Upwards: share of all codes; to the right: the code. A gap is a code that never occurs."
    )
    return Plot("How often each code occurs", caption, drawings)


# --- panels --------------------------------------------------------------------------------------


def _layer_panel(name, points, side, axis, span, limit) -> str:
    width, height = PANEL
    left, top, bottom = 46, 42, height - 24
    y = axis.placed(bottom, top)
    first, last = span
    step = (width - 14 - left - 8) / max(1, last - first)
    x = [left + 8 + step * (layer - first) for layer, _ in points]
    out = [
        _text(0, 11, name, kind="name"),
        _text(0, 26, UNITS[side]),
        *(_line(left, y(t), width - 6, y(t), "grid") for t in axis.ticks),
        *(_text(left - 5, y(t) + 4, _short(t), "end") for t in axis.labels),
        _text(left - 5, height - 8, "layer", "end"),
    ]
    out += [
        _text(left + 8 + step * (n - first), height - 8, str(n), "middle")
        for n in dict.fromkeys((first, (first + last) // 2, last))
    ]
    if limit:
        out.append(_line(left, y(limit), width - 6, y(limit), "limit"))
    places = [(a, y(value)) for a, (_, value) in zip(x, points, strict=True)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    joined = "" if side == "T" else f'<polyline points="{path}"/>'  # a layer has many tensors
    out.append(f'<g class="best">{joined}')
    radius = 3 if len(points) <= 40 else 1.6
    out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius}"/>' for a, b in places]
    out.append("</g>")
    layer, worst = max(points, key=lambda point: (point[1] != point[1], point[1]))
    told = f"{SIDES[side][2]} of {name} in layers {first} to {last}; "
    told += f"the worst is {worst:.1e}, in layer {layer}."
    return _svg(name, told, width, height, out)


def _codes_panel(label: str, counts: np.ndarray) -> str:
    width, height = PANEL
    left, top, bottom = 40, 42, height - 24
    share = 100 * counts / counts.sum()
    most = _round_up(float(share.max()))
    step = (width - 6 - left) / len(share)
    tall = (bottom - top) / most
    bars = "".join(
        f"M{left + step * i:.2f} {bottom}v{-tall * s:.2f}h{0.86 * step:.2f}V{bottom}z"
        for i, s in enumerate(share)
        if s
    )
    out = [
        _text(0, 11, label, kind="name"),
        _text(0, 26, "share, %"),
        *(_line(left, y, width - 6, y, "grid") for y in (top, (top + bottom) / 2)),
        _text(left - 5, top + 4, f"{most:g}", "end"),
        _text(left - 5, (top + bottom) / 2 + 4, f"{most / 2:g}", "end"),
        _text(left - 5, bottom, "0", "end"),
        f'<g class="best"><path d="{bars}"/></g>',
        _line(left, bottom, width - 6, bottom, "grid"),
        _text(left - 5, height - 8, "code", "end"),
        _text(left, height - 8, "0"),
        _text(width - 6, height - 8, str(len(share) - 1), "end"),
    ]
    unused = int((counts == 0).sum())
    told = f"{len(share)} codes, of which {unused} never occur; "
    told += f"the most frequent is {share.max():.1f} % of all."
    return _svg(label, told, width, height, out)


# --- what is drawn -------------------------------------------------------------------------------


def _of_interest(report: dict, side: str, rows: list[dict]) -> list[dict]:
    """Return the candidates that are outdone by none, or recommended."""
    names = _recommended(report, side)
    return [row for row in rows if row["best"] or row["type"] in names][:MOST_TYPES]


def _recommended(report: dict, side: str) -> list[str]:
    combinations = report["choice"]["combinations"] if report["choice"] and side != "T" else []
    return [c[side.lower()] for c in combinations]


def _by_layer(report: dict, side: str) -> dict[str, list[tuple[int, float]]]:
    """Return the figure of each type in each layer: the file itself first, then the best types."""
    rows = over_layers(report, side)
    wanted = dict.fromkeys(
        [*_recommended(report, side)[:1], *(r["type"] for r in rows if r["best"])]
    )
    if len(wanted) < MOST_PANELS:
        wanted |= dict.fromkeys(row["type"] for row in rows)
    places = {name: place for place, name in enumerate(list(wanted)[:MOST_PANELS])}
    lines: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for t in (t for t in report["tensors"] if t["kind"] == side and t["layer"] is not None):
        part = t["name"].rpartition("cache_")[0] if side != "T" else ""
        found = [(-1, f"this file, {_name(t['type'])}", t["reference"] or {"unfit": "no twin"})]
        tried = (c for c in t["candidates"] if c["type"] in places)
        found += [(places[c["type"]], _name(c["type"]), c) for c in tried]
        for place, name, result in found:
            error = None if result.get("unfit") else figure(result, side)
            if error is not None and error == error:
                lines.setdefault((place, f"{part}{name}"), []).append((t["layer"], error))
    return {name: sorted(points) for (_, name), points in sorted(lines.items())}


def _loudness(heads: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the binary logarithm of each channel over its head's median, one line per head."""
    image = np.zeros((len(heads), max(map(len, heads))))
    for row, rms in zip(image, heads, strict=True):
        median = np.median(rms)
        if median > 0 and np.isfinite(rms).all():
            row[: len(rms)] = np.log2(np.maximum(np.array(rms) / median, 2.0**-8))
    return image


# --- drawing -------------------------------------------------------------------------------------


class LogAxis(NamedTuple):
    """A logarithmic axis from one power of ten to another."""

    first: int
    last: int

    @classmethod
    def over(cls, values: Iterable[float], limits: Iterable[float | None]) -> LogAxis:
        """Return the axis that ends at the powers of ten around all values; zeros have no place."""
        known = [v for v in (*values, *limits) if v is not None and 0 < v < math.inf]
        if not known:
            return cls(-1, 0)
        first = math.floor(math.log10(min(known)))
        return cls(first, max(math.ceil(math.log10(max(known))), first + 1))

    @property
    def ticks(self) -> list[float]:
        """Every power of ten."""
        return [10.0**n for n in range(self.first, self.last + 1)]

    @property
    def labels(self) -> list[float]:
        """Those of them that have a label, at most five, the largest among them."""
        every = math.ceil((self.last - self.first) / 4)
        return [10.0**n for n in range(self.last, self.first - 1, -every)]

    def placed(self, start: float, end: float):
        """Return where a value stands; what has no place is at the end that it is nearer to."""

        def place(value: float) -> float:
            if not value < math.inf:  # NaN too
                return end
            at = math.log10(max(value, 10.0**self.first)) - self.first
            return start + (end - start) * min(1.0, at / (self.last - self.first))

        return place


def _svg(title: str, description: str, width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
        f"<title>{_escape(title)}</title><desc>{_escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    attributes = f' text-anchor="{anchor}"' if anchor != "start" else ""
    attributes += f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{_escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{kind}" {ends}/>'


def _escape(text: object) -> str:
    return html.escape(shown(text))


def _name(label: str) -> str:
    """Return a type without the choice that the file made."""
    return label.partition("[")[0]


def _short(value: float) -> str:
    """Write a power of ten in few letters: 0.01, 1e-5."""
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 5, 10, … times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 5, 10) if step * unit >= value * (1 - 1e-9))


def _png(values: np.ndarray) -> str:
    """Return values from -1 to 1 as the address of a PNG: blue to clear to vermillion."""
    rows, columns = values.shape
    pixels = np.zeros((rows, columns, 4), np.uint8)
    pixels[..., :3] = np.where(values[..., None] > 0, LOUD, SOFT)
    pixels[..., 3] = np.round(255 * np.clip(np.abs(values), 0, 1))
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    data = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    for name, body in ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
