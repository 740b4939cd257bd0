"""The report of the routing: what a change costs by how many subscribers there are."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from ..environment import header
from .measure import BATCH


def markdown(
    where: dict[str, Any],
    found: dict[str, dict[int, list[dict[str, Any]]]],
    changes: int,
    quick: bool,
) -> Iterator[str]:
    """The table."""
    yield "# Routing\n"
    if quick:
        yield "**A quick run: it shows that everything works, its figures mean nothing.**\n"
    yield header(where) + "\n"
    yield (
        f"{changes:,} updates, each of a document that one subscriber follows, in bulks of "
        f"{BATCH} from another process; without images. Subscribers are live queries in one "
        "process on one server cursor, each read by a task of its own up to the bytes of its "
        "frames, without a socket. CPU is that of this process, less what it takes when nothing "
        "happens; what Python's garbage collector takes is apart, because it grows with all that a "
        "process holds (`gc.freeze()` ends that). One event is delivered per change, so it is per "
        "delivered event too. Medians, in brackets the lowest and the highest. Memory is that of "
        "a query, its subscriber and its task.\n"
    )
    yield (
        "| each follows | subscribers | CPU per change | over the fewest | and the collector "
        "| idle | memory each |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for way, by_number in found.items():
        base: float | None = None
        for number, runs in by_number.items():
            costs = [(run["cpu"] - run["collector"]) / run["changes"] * 1e6 for run in runs]
            collector = median(run["collector"] / run["changes"] * 1e6 for run in runs)
            base = base or median(costs)
            idle = median(run["idle"] for run in runs) * 100
            memory = median(run["memory"] for run in runs) / 1024
            yield (
                f"| {way} | {number:,} | {median(costs):,.0f} µs "
                f"({min(costs):,.0f}–{max(costs):,.0f}) | {median(costs) / base:.2f} × "
                f"| {collector:,.0f} µs | {idle:.1f} % | {memory:.1f} KiB |"
            )
