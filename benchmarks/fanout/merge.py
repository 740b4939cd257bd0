"""Several rounds of one contender as one set of figures: the medians."""

from __future__ import annotations

from statistics import median
from typing import Any


def merged(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of all rounds, and the rounds themselves."""
    names = list(dict.fromkeys(name for r in rounds for name in r["rows"]))
    numbers = list(dict.fromkeys(number for r in rounds for number in r["idle"]))
    return {
        "rows": {name: _row([r["rows"][name] for r in rounds]) for name in names},
        "idle": {n: _medians([r["idle"][n] for r in rounds if n in r["idle"]]) for n in numbers},
        "rounds": rounds,
    }


def _row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [row for row in rows if "collapsed" not in row]
    if not measured:
        return rows[0]
    return {
        **_medians(measured),
        "complete": min(row["complete"] for row in measured),
        "cut": any(row["cut"] for row in measured),
        "broken": sorted({how for row in measured for how in row["broken"]}),
        "collapses": sorted({row["collapsed"] for row in rows if "collapsed" in row}),
    }


def _medians(figures: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in figures[0]:
        values = [f[name] for f in figures if isinstance(f[name], int | float)]
        found[name] = median(values) if values else None
    return found
