"""The report of a run: fanout.json with all figures, fanout.md with tables, fanout.svg."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..environment import header
from . import plot, words
from .compare import Everything, idle, idle_over_bare, over_bare
from .promises import promises

_COLUMNS = (
    *("deliveries/s", "complete clients", "p50", "p99"),
    *("CPU per delivery", "×", "changes per read"),
)
_CLIENT_LIMIT = 0.9  # of a core, which is all that its one thread can have
_NOTES = """\
Deliveries a second, percentiles and CPU are of everything between the first write and the last
receipt. In a paced row nobody can deliver more than is offered: there CPU and latency tell
contenders apart. Above 50 changes a second they are written in steps of 10 ms. p50 and p99 are
from the acknowledgement of the write to the receipt by a client. CPU is user and system time of
the server process alone, per event and client; “×” is over the bare broadcast of the same round.
What runs in several rounds has their medians, ratios too, which need not be those of the columns.
A server without room joins more changes into one send, which makes each cheaper: compare CPU where
the load is calm, capacity where it is busy. The load client, the writer and the database share the
cores with the server, so only ratios within one run mean anything elsewhere, and other work on the
machine moves those as well.
"""


def write(everything: Everything, out: Path) -> None:
    """Write all three files into a directory."""
    (out / "fanout.json").write_text(json.dumps(everything, indent=1) + "\n")
    (out / "fanout.md").write_text("\n".join(_markdown(everything)) + "\n")
    (out / "fanout.svg").write_text(plot.svg(everything))


def _markdown(everything: Everything) -> Iterator[str]:
    yield "# One change to many clients\n"
    if everything["quick"]:
        yield "**A quick run: it shows that everything works, its figures mean nothing.**\n"
    yield header(everything["environment"]) + "\n"
    yield _NOTES
    if not everything["quick"]:
        yield "## Ratios that we promise\n"
        yield from _promises(everything)
        yield ""
    yield "## Under load\n"
    for name, row in everything["rows"].items():
        if any(name in c["rows"] for c in everything["contenders"].values()):
            yield from _row(everything, name, row)
    yield from _trouble(everything)
    yield "\n## Idle\n"
    yield from _idle(everything)
    yield f"\nThe whole run took {everything['seconds']} s."


def _promises(everything: Everything) -> Iterator[str]:
    yield "| | promised | this run | |"
    yield "|---|---|---|---|"
    for promise in promises(everything):
        yield f"| {promise.what} | {promise.promised} | {promise.found} | {promise.verdict} |"


def _row(everything: Everything, name: str, row: dict[str, Any]) -> Iterator[str]:
    offered = f", {row['clients'] * row['rate']:,.0f} deliveries/s offered" if row["rate"] else ""
    yield f"**{row['title']}**{offered}\n"
    yield f"| | {' | '.join(_COLUMNS)} |"
    yield f"|---|{'---:|' * len(_COLUMNS)}"
    for key, contender in everything["contenders"].items():
        found = contender["rows"].get(name)
        if found is None:
            continue
        title = _title(contender)
        if "collapsed" in found:
            yield f"| {title} | collapsed |{' – |' * (len(_COLUMNS) - 1)}"
            continue
        ratio = over_bare(everything, key, name, "cpu_us")
        cells = (
            words.rate(found["per_second"]),
            f"{found['complete']:,} of {row['clients']:,}{' †' if found['cut'] else ''}",
            words.ms(found["p50_ms"]),
            words.ms(found["p99_ms"]),
            words.us(found["cpu_us"]),
            words.times(ratio),
            f"{found['per_piece']:.1f}" if found["per_piece"] else "–",
        )
        yield f"| {title} | {' | '.join(cells)} |"
    yield ""


def _trouble(everything: Everything) -> Iterator[str]:
    """What collapsed, was cut off or left out, said plainly."""
    rows = everything["rows"]
    lines = []
    for contender in everything["contenders"].values():
        title = contender["title"]
        if contender["left_out"]:
            lines.append(f"- {title} was left out: {contender['left_out']}.")
        for name, found in contender["rows"].items():
            at = f"{title}, {rows[name]['title']}"
            if "collapsed" in found:
                lines.append(f"- {at}: collapsed; {found['collapsed']}.")
                continue
            lines += [f"- {at}: collapsed in one round; {why}." for why in found["collapses"]]
            if found["cut"]:
                lines.append(
                    f"- † {at}: cut off after {rows[name]['limit']:g} s, "
                    f"{found['complete']:,} clients had everything by then; the figures are of "
                    f"the {found['deliveries'] / rows[name]['clients'] / rows[name]['changes']:.0%}"
                    " that had arrived."
                )
            if found["client_load"] > _CLIENT_LIMIT:
                lines.append(
                    f"- {at}: the load client used {found['client_load']:.0%} of a core: it "
                    "was the limit, not the server."
                )
            if found["broken"]:
                lines.append(f"- {at}: a client saw {', '.join(found['broken'])}.")
    if lines:
        yield "What did not go well:\n"
        yield from lines
    else:
        yield "Every client of every contender got every change, in order, once."


def _idle(everything: Everything) -> Iterator[str]:
    yield "| | clients | KiB of memory each | over bare | change-stream cursors |"
    yield "|---|---:|---:|---:|---:|"
    for key, contender in everything["contenders"].items():
        for number in map(int, contender["idle"]):
            cells = (
                f"{number:,}",
                words.kib(idle(everything, key, number, "rss_kib")),
                words.times(idle_over_bare(everything, key, number)),
                f"{idle(everything, key, number, 'cursors') or 0:.0f}",
            )
            yield f"| {_title(contender)} | {' | '.join(cells)} |"


def _title(contender: dict[str, Any]) -> str:
    return f"**{contender['title']}**" if contender["ours"] else str(contender["title"])
