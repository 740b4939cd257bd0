"""Metrics: the figures of ``bridge.stats()`` as OpenTelemetry instruments (extra ``otel``).

https://opentelemetry.io/docs/specs/otel/metrics/api/#asynchronous-instrument-api
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from opentelemetry.metrics import CallbackOptions, Meter, Observation, get_meter

from .stats import FeedStats

if TYPE_CHECKING:
    from .bridge import Bridge

__all__ = ["instrument"]

# The instrument, its unit, what it says, and the figure.
_NOW: tuple[tuple[str, str, str, Callable[[FeedStats], float | None]], ...] = (
    ("subscribers", "{subscriber}", "Subscribers of a feed", lambda f: f.subscribers),
    ("lag", "s", "How far a feed is behind the cluster", lambda f: f.lag),
    ("log.entries", "{change}", "Changes in a feed's memory", lambda f: f.log_entries),
    ("log.size", "By", "Memory that these take", lambda f: f.log_bytes),
    ("catch_ups.open", "{cursor}", "Catch-up cursors that are open", lambda f: f.catching_up),
)
_EVER: tuple[tuple[str, str, str, Callable[[FeedStats], float | None]], ...] = (
    ("catch_ups", "{cursor}", "Catch-up cursors that were opened", lambda f: f.catch_ups),
    ("reopened", "{interruption}", "Interruptions of a feed's cursor", lambda f: f.reopened),
    ("resets", "{reset}", "Losses of history", lambda f: f.resets),
    ("slow_readers", "{subscriber}", "Slow readers that were closed", lambda f: f.slow_readers),
)


def instrument(bridge: Bridge, meter: Meter | None = None) -> None:
    """Have OpenTelemetry observe a bridge, once; feeds are told apart by ``data_bridge.feed``.

    Without a meter, that of the application's global meter provider is used.
    """
    meter = meter or get_meter("data_bridge")
    for name, unit, says, figure in _NOW:
        meter.create_observable_gauge(
            f"data_bridge.feed.{name}", [_observing(bridge, figure)], unit, says
        )
    for name, unit, says, figure in _EVER:
        meter.create_observable_counter(
            f"data_bridge.feed.{name}", [_observing(bridge, figure)], unit, says
        )


def _observing(
    bridge: Bridge, figure: Callable[[FeedStats], float | None]
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(options: CallbackOptions) -> Iterable[Observation]:
        found: dict[tuple[str, bool], float] = {}
        for feed in bridge.stats().feeds:
            value = figure(feed)
            if value is not None:  # several pipelines on one collection are one series
                key = feed.name, feed.own
                found[key] = found.get(key, 0) + value
        for (name, own), value in found.items():
            attributes: dict[str, Any] = {"data_bridge.feed": name, "data_bridge.feed.own": own}
            yield Observation(value, attributes)

    return observe
