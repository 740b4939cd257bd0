"""Figures of one contender over those of another, in the same run."""

from __future__ import annotations

from statistics import median
from typing import Any

from .plan import BARE, BARE_FEW

Everything = dict[str, Any]


def row_of(everything: Everything, key: str, row: str) -> dict[str, Any] | None:
    """A contender's figures of a row; ``None`` if there are none, for whatever reason."""
    found: dict[str, Any] | None = everything["contenders"].get(key, {}).get("rows", {}).get(row)
    return None if found is None or "collapsed" in found else found


def over(everything: Everything, key: str, base: str, row: str, figure: str) -> float | None:
    """One over the other: the median over the rounds, where both have run equally often.

    Rounds lie minutes apart, so that a round's own pair says more than two medians.
    """
    ours, theirs = (
        [r["rows"].get(row, {}).get(figure) for r in everything["contenders"][k]["rounds"]]
        if k in everything["contenders"]
        else []
        for k in (key, base)
    )
    if len(ours) == len(theirs):
        ratios = [a / b for a, b in zip(ours, theirs, strict=True) if a and b]
        return median(ratios) if ratios else None
    a, b = row_of(everything, key, row), row_of(everything, base, row)
    return a[figure] / b[figure] if a and b and a[figure] and b[figure] else None


def over_bare(everything: Everything, key: str, row: str, figure: str) -> float | None:
    """A contender over the limit of the same row."""
    base = BARE if row_of(everything, BARE, row) else BARE_FEW
    return over(everything, key, base, row, figure)


def idle(everything: Everything, key: str, clients: int, figure: str) -> float | None:
    """What an idle contender with so many clients takes."""
    found = everything["contenders"].get(key, {}).get("idle", {}).get(str(clients), {})
    value: float | None = found.get(figure)
    return value


def idle_over_bare(everything: Everything, key: str, clients: int) -> float | None:
    """An idle subscriber's memory over that of the same connection on the bare broadcast."""
    mine = idle(everything, key, clients, "rss_kib")
    limits = [idle(everything, base, clients, "rss_kib") for base in (BARE, BARE_FEW)]
    limit = next((found for found in limits if found), None)
    return mine / limit if mine and limit else None
