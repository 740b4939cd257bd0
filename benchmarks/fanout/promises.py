"""The ratios that data-bridge promises, as this run has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import words
from .compare import Everything, idle, over, over_bare, row_of
from .plan import BARE

_DRIVERS = {"data_bridge_pymongo": "PyMongo", "data_bridge_motor": "Motor"}
_CPU = 1.15
_BETTER_SSE = 8.0
_PER_CLIENT = 20.0
_IDLE_KIB = 15.0


@dataclass(frozen=True)
class Promise:
    what: str
    promised: str
    found: str
    kept: bool | None  # None: this run cannot tell

    @property
    def verdict(self) -> str:
        return {True: "kept", False: "**missed**", None: "not shown"}[self.kept]


def promises(everything: Everything) -> Iterator[Promise]:
    """Each promise and what this run says of it."""
    rows = everything["rows"]
    for key, driver in _DRIVERS.items():
        ratio = over_bare(everything, key, "busy", "cpu_us")
        yield Promise(
            f"server CPU per delivery over the bare broadcast, {driver}, {rows['busy']['title']}",
            f"≤ {_CPU} ×",
            words.times(ratio) + _pieces(everything, key, "busy"),
            None if ratio is None else ratio <= _CPU,
        )
        yield _at_least(
            everything, key, "better_sse_shared", "busy", _BETTER_SSE, f"better-sse, {driver}"
        )
    for row in ("busy-100", "burst-100"):
        yield _at_least(
            everything,
            "data_bridge_generator_motor",
            "sse_starlette_per_client",
            row,
            _PER_CLIENT,
            "sse-starlette with a Motor stream per client, generator code on Motor",
        )
    clients = rows["calm"]["clients"]
    bare = idle(everything, BARE, clients, "rss_kib")
    for key, driver in _DRIVERS.items():
        mine = idle(everything, key, clients, "rss_kib")
        yield Promise(
            f"memory per idle subscriber, {driver}",
            f"≤ {_IDLE_KIB:g} KiB over the bare broadcast's",
            f"{words.kib(mine)} KiB (bare: {words.kib(bare)})",
            None if mine is None or bare is None else mine - bare <= _IDLE_KIB,
        )


def _pieces(everything: Everything, key: str, row: str) -> str:
    """Whether both sent pieces of one size: who sends fewer and larger ones pays less for each."""
    pair = [row_of(everything, k, row) for k in (key, BARE)]
    ours, bare = (found["per_piece"] if found else None for found in pair)
    if not ours or not bare or 0.9 < ours / bare < 1.1:
        return ""
    return f" ({ours:.1f} changes a read against {bare:.1f})"


def _at_least(
    everything: Everything, key: str, base: str, row: str, least: float, whom: str
) -> Promise:
    ratio = over(everything, key, base, row, "per_second")
    load, theirs = everything["rows"][row], row_of(everything, base, row)
    found, kept = words.times(ratio), None if ratio is None else ratio >= least
    if theirs and not theirs["deliveries"]:
        found = f"it delivered nothing within {load['limit']:g} s"
    elif theirs and load["rate"]:
        ceiling = load["rate"] * load["clients"] / theirs["per_second"]
        found += f" (with this load at most {words.times(ceiling)})"
        kept = kept or (None if ceiling < least else kept)
    return Promise(
        f"deliveries a second over {whom}, {load['title']}", f"≥ {least:g} ×", found, kept
    )
