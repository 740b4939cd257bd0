"""The report of a drain: ratios within each round, and their medians."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from ..environment import header

TITLES = {
    "pymongo_loop": "PyMongo's own `async for` (the measure)",
    "pymongo_typed": "**data-bridge on PyMongo, typed changes**",
    "pymongo_frames": "**data-bridge on PyMongo, SSE bytes**",
    "motor_loop": "Motor's own `async for`",
    "motor_typed": "**data-bridge on Motor, typed changes**",
    "motor_frames": "**data-bridge on Motor, SSE bytes**",
}
_OURS = tuple(name for name in TITLES if not name.endswith("_loop"))
_OF_PYMONGO = 0.5
_OF_MOTOR = 3.0

Rounds = list[dict[str, dict[str, float]]]


def markdown(found: dict[str, Any]) -> Iterator[str]:
    """The tables."""
    rounds: Rounds = found["rounds"]
    number: int = found["changes"]
    yield "# Draining from a resume token\n"
    if found["quick"]:
        yield "**A quick run: it shows that everything works, its figures mean nothing.**\n"
    yield header(found["environment"]) + "\n"
    yield (
        f"{number:,} inserts, read from the token before them, cursor opened within the time; each "
        f"way in a process of its own, {len(rounds)} rounds in turn. Ratios are of one round's "
        "pair; shown are their medians, and in brackets the lowest and the highest. The drivers' "
        "loops only decode BSON; data-bridge also validates every document, and for SSE bytes "
        "serialises it.\n"
    )
    yield "| | changes/s | over PyMongo's loop | over Motor's loop | CPU per change |"
    yield "|---|---:|---:|---:|---:|"
    for name, title in TITLES.items():
        rate = median(number / r[name]["seconds"] for r in rounds)
        cpu = median(r[name]["cpu"] / number * 1e6 for r in rounds)
        yield (
            f"| {title} | {rate:,.0f} | {_spread(_ratios(rounds, name, 'pymongo_loop'))} "
            f"| {_spread(_ratios(rounds, name, 'motor_loop'))} | {cpu:.1f} µs |"
        )
    yield "\n| | promised | this run | |"
    yield "|---|---|---|---|"
    for what, promised, ratio, least in _promises(rounds):
        kept = "kept" if ratio >= least else "**missed**"
        yield f"| {what} | ≥ {promised} | {ratio:.2f} × | {kept} |"


def _promises(rounds: Rounds) -> Iterator[tuple[str, str, float, float]]:
    for name in _OURS:
        ratio = median(_ratios(rounds, name, "pymongo_loop"))
        yield f"{_plain(name)}, over PyMongo's loop", f"{_OF_PYMONGO} ×", ratio, _OF_PYMONGO
    for name in _OURS:
        if name.startswith("motor"):
            ratio = median(_ratios(rounds, name, "motor_loop"))
            yield f"{_plain(name)}, over Motor's loop", f"{_OF_MOTOR:g} ×", ratio, _OF_MOTOR


def _plain(name: str) -> str:
    return TITLES[name].strip("*")


def _ratios(rounds: Rounds, name: str, base: str) -> list[float]:
    return [r[base]["seconds"] / r[name]["seconds"] for r in rounds]


def _spread(ratios: list[float]) -> str:
    if min(ratios) == max(ratios):
        return f"{ratios[0]:.2f} ×"
    return f"{median(ratios):.2f} × ({min(ratios):.2f}–{max(ratios):.2f})"
