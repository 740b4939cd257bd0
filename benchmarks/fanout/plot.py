"""The plot of a run, as SVG written by hand: it needs no library, and README shows it as it is.

It lies on a card of its own, because a page that shows it may be light or dark without saying so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from . import words
from .compare import Everything

_GROUPS = ("busy", "busy-100")
_WIDTH = 980
_MARGIN = 28
_LINE = 30  # height of a contender
_BAR = 16
_TOP = 84
_LABELS = 292  # where the labels end and the first panel begins
_STYLE = """
    text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
      paint-order: stroke; stroke: #ffffff; stroke-width: 3px; stroke-linejoin: round; }
    .card { fill: #ffffff; stroke: #d0d7de; }
    .title { fill: #1f2328; font-size: 19px; font-weight: 600; }
    .group, .strong { fill: #1f2328; font-weight: 600; }
    .text { fill: #1f2328; }
    .quiet { fill: #59636e; font-size: 12px; }
    .trouble { fill: #bc4c00; font-size: 12px; }
    .grid { stroke: #d8dee4; }
    .offered { stroke: #59636e; stroke-dasharray: 3 3; }
    .ours { fill: #1a7f5a; } .limit { fill: #59636e; } .other { fill: #a4b1c0; }
    .cut { fill-opacity: .45; }
    @media (prefers-color-scheme: dark) {
      text { stroke: #0d1117; }
      .card { fill: #0d1117; stroke: #30363d; }
      .title, .group, .strong, .text { fill: #e6edf3; }
      .quiet { fill: #9198a1; } .trouble { fill: #f0883e; }
      .grid { stroke: #262c36; } .offered { stroke: #9198a1; }
      .ours { fill: #3fb98a; } .limit { fill: #9198a1; } .other { fill: #4b5868; }
    }
"""


@dataclass(frozen=True)
class Panel:
    """Bars of one figure on a logarithmic scale."""

    title: str
    figure: str
    left: float
    width: float
    low: int  # powers of ten
    high: int

    def x(self, value: float) -> float:
        share = (math.log10(max(value, 1e-9)) - self.low) / (self.high - self.low)
        return self.left + self.width * min(1.0, max(0.0, share))


def svg(everything: Everything) -> str:
    """The plot: for each group of contenders, deliveries a second and CPU per delivery."""
    groups = [
        (name, found)
        for name in _GROUPS
        if (found := [c for c in everything["contenders"].values() if name in c["rows"]])
    ]
    panels = (
        _panel(everything, groups, "deliveries a second", "per_second", _LABELS, 300),
        _panel(everything, groups, "server CPU per delivery, µs", "cpu_us", 700, 170),
    )
    height = _TOP + sum(_LINE * (len(found) + 1) + 22 for _, found in groups) + 64
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img">',
            f"  <title>{_TITLE}</title>",
            f"  <style>{_STYLE}  </style>",
            f'  <rect class="card" width="{_WIDTH}" height="{height}" rx="9"/>',
            *(f"  {line}" for line in _body(everything, groups, panels, height)),
            "</svg>\n",
        ]
    )


_TITLE = "One change to many clients, everything in one run"


def _body(
    everything: Everything,
    groups: list[tuple[str, list[dict[str, Any]]]],
    panels: tuple[Panel, ...],
    height: float,
) -> Iterator[str]:
    yield _text(_MARGIN, 38, _TITLE, "title")
    for panel in panels:
        yield _text(panel.left, 66, panel.title, "strong")
    y = _TOP
    for name, contenders in groups:
        row = everything["rows"][name]
        bottom = y + _LINE * (len(contenders) + 1)
        yield _text(_MARGIN, y + 20, row["title"], "group")
        for panel in panels:
            yield from _grid(panel, y + 26, bottom)
        yield from _offered(panels[0], row, y + 26, bottom)
        for at, contender in enumerate(contenders, 1):
            yield from _contender(panels, contender, row, name, y + _LINE * at)
        y = bottom + 22
    environment = everything["environment"]
    for at, line in enumerate(_footer(environment)):
        yield _text(_MARGIN, height - 40 + 18 * at, line, "quiet")


def _footer(environment: dict[str, Any]) -> tuple[str, str]:
    versions = environment["versions"]
    named = ", ".join(
        f"{n} {versions[n]}" for n in ("MongoDB", "Python", "Node.js") if n in versions
    )
    return (
        "Logarithmic scales. Pale: cut off before every client had everything. Busy servers join "
        "changes, so each is cheaper; fanout.md has a calm row.",
        f'{named}; w:"{environment["write_concern"]}", {environment["document_bytes"]}-byte '
        f"documents, {environment['cores']} cores for server, database, writer and clients.",
    )


def _contender(
    panels: tuple[Panel, ...], contender: dict[str, Any], row: dict[str, Any], name: str, y: float
) -> Iterator[str]:
    found = contender["rows"][name]
    base = y + _LINE / 2 + 4
    kind = (
        "ours" if contender["ours"] else "limit" if "the limit" in contender["title"] else "other"
    )
    label = "strong" if contender["ours"] else "text"
    yield _text(_LABELS - 12, base, contender["title"], label, "end")
    if "collapsed" in found:
        yield _text(_LABELS + 6, base, f"collapsed: {found['collapsed']}", "trouble")
        return
    cut = " cut" if found["cut"] else ""
    for panel in panels:
        value = found[panel.figure]
        if value is None:
            continue
        end = panel.x(value)
        yield (
            f'<rect class="{kind}{cut}" x="{panel.left:.1f}" y="{y + (_LINE - _BAR) / 2:.1f}" '
            f'width="{max(1.0, end - panel.left):.1f}" height="{_BAR}" rx="2"/>'
        )
        said = words.rate(value) if panel.figure == "per_second" else f"{value:.1f}"
        yield _text(end + 6, base, said, label)
    if cut:
        end = panels[0].x(found["per_second"]) + 16 + 8 * len(words.rate(found["per_second"]))
        complete = f"{found['complete']:,.0f} of {row['clients']:,} complete"
        yield _text(end, base, complete, "trouble")


def _grid(panel: Panel, top: float, bottom: float) -> Iterator[str]:
    for power in range(panel.low, panel.high + 1):
        x = panel.x(10**power)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
        yield _text(x, bottom + 14, _short(10**power), "quiet", "middle")


def _offered(panel: Panel, row: dict[str, Any], top: float, bottom: float) -> Iterator[str]:
    """A mark where a paced row cannot be beaten."""
    if row["rate"]:
        x = panel.x(row["rate"] * row["clients"])
        yield f'<line class="offered" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
        yield _text(x, top - 4, "offered", "quiet", "middle")


def _panel(
    everything: Everything,
    groups: list[tuple[str, list[dict[str, Any]]]],
    title: str,
    figure: str,
    left: float,
    width: float,
) -> Panel:
    values = [
        value
        for name, contenders in groups
        for c in contenders
        if "collapsed" not in c["rows"][name] and (value := c["rows"][name][figure])
    ] or [1.0]
    low = math.floor(math.log10(min(values)) - 0.05)
    return Panel(title, figure, left, width, low, max(low + 1, math.ceil(math.log10(max(values)))))


def _short(value: float) -> str:
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{place}>{escape(text)}</text>'
