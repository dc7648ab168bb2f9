"""tbq-inspect's report as one self-contained page: the answer, plots, tables, facts.

It has what the text has, from the same places, and the plots. It needs no network and no script;
its colours follow the reader's theme, and it is read on a telephone as well as on paper.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

import tbq
from gguf_io import AtomicFiles

from .console import in_flags, shown
from .inspect_facts import Fact, facts, has_faults, verdict
from .inspect_plots import Plot, channel_plot, code_plot, layers_plot, types_plot
from .inspect_tables import (
    Table,
    candidate_table,
    choice_table,
    head_table,
    notes,
    reference_table,
    side_table,
    tensor_table,
)

FOLDED = 24  # rows from which on a table is folded away

# Text has a contrast of 4.5 or more, marks of 3 or more. Marks are Okabe and Ito's colours.
LIGHT = {
    "page": "#ffffff",
    "panel": "#f4f5f7",
    "text": "#1a1d21",
    "muted": "#565d66",
    "line": "#d0d5da",
    "mark": "#0072b2",
    "quiet": "#7d858e",
    "limit": "#d55e00",
    "warning": "#a03f00",
    "good": "#00684c",
}
DARK = {
    "page": "#14171a",
    "panel": "#1d2125",
    "text": "#e6e8ea",
    "muted": "#a3abb3",
    "line": "#3a4046",
    "mark": "#56b4e9",
    "quiet": "#7b848d",
    "limit": "#e69f00",
    "warning": "#f0b040",
    "good": "#3fc79a",
}
STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem;
  color: var(--text); background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.25; margin: .2rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-top: 1px solid var(--line);
  padding-top: .8rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
p { max-width: 46rem; margin: .4rem 0; }
.small, figcaption, .note, footer { color: var(--muted); font-size: .875rem; }
dl { display: grid; grid-template-columns: 6.2rem minmax(0, 1fr); gap: .3rem 1rem; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; grid-column: 2; }
#answer { background: var(--panel); border: 1px solid var(--line); border-left: 5px solid
  var(--good); border-radius: 6px; padding: .9rem 1rem; margin: 1rem 0; }
#answer.faulty, #answer.noted { border-left-color: var(--limit); }
#answer .strong { font-weight: 600; }
.health { color: var(--good); } .faulty .health { color: var(--warning); }
ul.warnings { margin: .7rem 0 0; padding-left: 1.2rem; color: var(--warning); }
figure { margin: 1.2rem 0; } figure h3 { margin: 0; }
.panels { display: grid; gap: 1rem 1.4rem; margin: .6rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); }
.pair { display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
svg { display: block; width: 100%; height: auto; } .wide svg { max-width: 36rem; }
.panels svg { max-width: 20rem; }
svg text { font: 10.5px system-ui, sans-serif; fill: var(--muted); }
svg .name, svg .best text { fill: var(--text); font-weight: 600; }
svg .limit { stroke: var(--limit); stroke-dasharray: 4 3; fill: none; }
svg text.limit { stroke: none; fill: var(--warning); }
svg .grid { stroke: var(--line); } svg .frame { fill: none; stroke: var(--quiet); }
svg image { image-rendering: pixelated; }
svg .best { fill: var(--mark); stroke: var(--mark); } svg .other { fill: var(--quiet);
  stroke: var(--quiet); } svg .best text, svg .other text { stroke: none; }
svg .other text { fill: var(--muted); }
svg .best rect, svg .other rect, svg .best path { stroke: none; }
svg circle.mean { fill: var(--page); } svg polyline { fill: none; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
caption span { display: block; width: max-content; max-width: min(30rem, calc(100vw - 2.2rem)); }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; overflow-wrap: normal; }
thead th { color: var(--muted); font-weight: 600; }
tr > :first-child { text-align: left; padding-left: 0; font-weight: 400; }
details { margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; padding: .2rem 0; }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
footer { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: .8rem; }
code { font: .875em ui-monospace, monospace; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; }
  dd { grid-column: 1; margin-bottom: .45rem; } dd + dd { margin-top: -.3rem; } }
@media print { body { max-width: none; font-size: 10pt; padding: 0; } .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; }
  figure, tr, #answer { break-inside: avoid; } h2, h3, caption { break-after: avoid; } }
"""


def write_html(path: str, report: dict, command: str) -> None:
    """Write the page, atomically.

    Args:
        path: where to.
        report: what `inspect_report.report` returned.
        command: the command line that asked for it.

    Raises:
        OSError: the file cannot be written.
    """
    with AtomicFiles() as output:
        output.create(path).write(_page(report, command).encode())


def escape(text: object) -> str:
    """Return text as HTML, what is not printable as `console.shown` writes it."""
    return html.escape(shown(in_flags(str(text))))


def _page(report: dict, command: str) -> str:
    title = escape(Path(report["path"]).name)
    head = f'<meta charset="utf-8"><title>tbq-inspect: {title}</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += '<meta name="color-scheme" content="light dark">'
    head += f"<style>{_colours()}{STYLE}</style>"
    body = [
        f'<header><h1>{title}</h1><p class="small">{escape(report["path"])}</p></header><main>',
        _answer(report),
        _section("Types to choose from", _choice(report)),
        _section("Layer by layer", _layers(report)),
        _section("Distributions", _distributions(report)),
        _section("The file", [_list(facts(report))]),
        f"</main><footer><p>tbq-inspect {escape(tbq.__version__)}</p>",
        # not `escape`: what was typed stays as it is
        f"<p><code>{html.escape(shown(command))}</code></p></footer>",
    ]
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _colours() -> str:
    light, dark = (
        "".join(f"--{name}: {colour}; " for name, colour in theme.items())
        for theme in (LIGHT, DARK)
    )
    return (
        f":root {{ color-scheme: light dark; {light}}}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"
    )


# --- sections ------------------------------------------------------------------------------------


def _answer(report: dict) -> str:
    kind = "noted" if report["warnings"] else "sound"
    kind = "faulty" if any(map(has_faults, report["tensors"])) else kind
    warnings = "".join(f"<li>{escape(text)}</li>" for text in report["warnings"])
    warnings = f'<ul class="warnings" aria-label="warnings">{warnings}</ul>' if warnings else ""
    return (
        f'<section id="answer" class="{kind}" aria-label="the answer">{_list(verdict(report))}'
        f"{warnings}</section>"
    )


def _choice(report: dict) -> list[str]:
    sides = [side for side in "KVT" if types_plot(report, side)]
    figures = "".join(_figure(types_plot(report, side)) for side in sides)
    parts = [f'<div class="pair">{figures}</div>' if figures else "", _table(choice_table(report))]
    tables = "".join(f"<div>{_table(side_table(report, side))}</div>" for side in sides)
    parts.append(f'<div class="pair">{tables}</div>' if tables else "")
    return [*parts, *(f'<p class="note">{escape(note)}</p>' for note in notes(report))]


def _layers(report: dict) -> list[str]:
    parts = [_figure(layers_plot(report, side)) for side in "KVT"]
    tables = (reference_table(report), tensor_table(report), candidate_table(report))
    return [*parts, *map(_table, tables), _table(head_table(report))]


def _distributions(report: dict) -> list[str]:
    channels = "".join(_figure(channel_plot(report, side)) for side in "KV")
    pair = f'<div class="pair">{channels}</div>' if channels else ""
    return [pair, _figure(code_plot(report))]


# --- parts ---------------------------------------------------------------------------------------


def _section(title: str, parts: Iterable[str]) -> str:
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _list(found: Iterable[Fact]) -> str:
    lines, last = [], ""
    for label, text in found:
        kind = {"what": "strong", "health": "strong health", "choose": "strong"}.get(label, "")
        kind = f' class="{kind}"' if kind else ""
        if label and label != last:
            lines.append(f"<dt>{escape(label)}</dt>")
        last = label or last
        lines.append(f"<dd{kind}>{escape(text)}</dd>")
    return f"<dl>{''.join(lines)}</dl>"


def _figure(plot: Plot | None) -> str:
    if plot is None:
        return ""
    drawings = "".join(f"<div>{drawing}</div>" for drawing in plot.drawings)
    return (
        f"<figure><h3>{escape(plot.title)}</h3>"
        f'<div class="{"wide" if plot.wide else "panels"}">{drawings}</div>'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _table(found: Table | None) -> str:
    """Return a table in a box that scrolls, folded away if it is long, and its notes."""
    if found is None or not (found.rows or found.notes):
        return ""
    below = "".join(f'<p class="note">{escape(note)}</p>' for note in found.notes)
    if not found.rows:
        return below if found.title == "Candidates" else ""
    head = "".join(f'<th scope="col">{escape(name) or "&nbsp;"}</th>' for name in found.header)
    lines = []
    for name, *cells in found.rows:
        line = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{line}</tr>')
    title = escape(found.title)
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table>'
        f"<caption><span>{title}</span></caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>{below}"
    )
    if len(lines) <= FOLDED:
        return table
    return f"<details><summary>{title}: {len(lines)} rows</summary>{table}</details>"
