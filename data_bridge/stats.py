"""Stats: what each feed of a bridge is doing, as figures to look at and to send elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .feed import Feed
    from .token import ResumeToken

__all__ = ["FeedStats", "Stats", "stats_of"]

# A cursor hears from the server at least this often, in seconds.
_SILENCE = 2.0


@dataclass(frozen=True, slots=True)
class FeedStats:
    """One feed at one moment.

    Attributes:
        name: ``database.collection``, or ``database.*``.
        own: whether it has a pipeline or options of its own, and a cursor for them.
        subscribers: who reads from it.
        position: up to where it has read; ``None`` while it opens.
        lag: seconds of the cluster's time between that and what the server had written when it
            last replied, and how much longer than usual it has not replied.
        log_entries: changes in memory.
        log_bytes: the memory that they take.
        catching_up: catch-up cursors that are open for it.
        catch_ups: those that there were.
        reopened: how often its cursor was interrupted.
        resets: how often the server had lost what comes next.
        slow_readers: subscribers whose connection was closed because they took nothing.
    """

    name: str
    own: bool
    subscribers: int
    position: ResumeToken | None
    lag: float | None
    log_entries: int
    log_bytes: int
    catching_up: int
    catch_ups: int
    reopened: int
    resets: int
    slow_readers: int


@dataclass(frozen=True, slots=True)
class Stats:
    """A bridge at one moment."""

    feeds: tuple[FeedStats, ...]

    @property
    def subscribers(self) -> int:
        """Those of all feeds."""
        return sum(feed.subscribers for feed in self.feeds)


def stats_of(feed: Feed) -> FeedStats:
    """The figures of a feed; reads only, from any thread."""
    log, source, catch_ups = feed.log, feed.source, feed.catch_ups
    position = None if log is None else log.head
    return FeedStats(
        name=feed.name,
        own=feed.scope.pipeline != "[]",
        subscribers=feed.subscribers,
        position=position,
        lag=None if position is None else _lag(feed, position),
        log_entries=0 if log is None else len(log.entries),
        log_bytes=0 if log is None else log.bytes,
        catching_up=catch_ups.running,
        catch_ups=catch_ups.opened,
        reopened=source.reopened,
        resets=feed.resets,
        slow_readers=feed.slow_readers,
    )


def _lag(feed: Feed, position: ResumeToken) -> float:
    # Only the cluster's own clock is compared with itself: clocks of machines differ.
    source = feed.source
    silent = max(0.0, time.monotonic() - source.heard - _SILENCE)
    if source.cluster_time is None:
        return silent
    return max(0, source.cluster_time.time - position.cluster_time.time) + silent
