"""Snapshot: what a query matches at one exact moment, and the position where its changes begin.

https://www.mongodb.com/docs/manual/reference/read-concern-snapshot/
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bson import Timestamp
from pymongo.errors import OperationFailure, PyMongoError

from .driver import Driver
from .errors import (
    InvalidFilter,
    OperationFailed,
    SnapshotTooLarge,
    SnapshotUnavailable,
    translated,
)
from .token import ResumeToken

__all__ = ["Snapshot", "read_snapshot"]

_BATCH = 5_000
# It cannot read a moment at which the collection was another one, or that is too long ago.
_UNAVAILABLE = frozenset({239, 246})
_PAUSE = 0.02
# What the server says of a filter or a sort that it cannot parse, or has no index for.
_INVALID = frozenset({2, 9, 14, 15, 27, 139, 168, 291, 16410, 17287, 40352, 51024, 51091})


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Documents as they were just before a position; every change from there on is not in them."""

    documents: list[dict[str, Any]]
    position: ResumeToken
    time: Timestamp | None = None  # of the snapshot itself
    frames: dict[Any, bytes] = field(default_factory=dict)  # made of it so far, for all


async def read_snapshot(
    driver: Driver,
    collection: str,
    filter: Mapping[str, Any],
    *,
    sort: Mapping[str, int] | None = None,
    limit: int | None = None,
    projection: Mapping[str, Any] | None = None,
    bound: int,
    timeout: float,
    head: ResumeToken,
    at: Timestamp | None = None,
) -> Snapshot:
    """Read what matches, all of it at one cluster time: ``at``, or the present.

    ``head`` is how far the changes are known already; the present is not before it.

    Raises:
        SnapshotTooLarge: more than ``bound`` documents match.
        InvalidFilter: the server does not take the filter.
    """
    command: dict[str, Any] = {"find": collection, "filter": dict(filter)}
    if sort:
        command["sort"] = dict(sort)
    if projection:
        command["projection"] = dict(projection)
    # One more than is allowed tells a full snapshot from one that was too large.
    command |= {"limit": limit or bound + 1, "batchSize": _BATCH}
    command["readConcern"] = {"level": "snapshot"} | ({"atClusterTime": at} if at else {})
    doing = f"read {driver.name}.{collection}"
    until = time.monotonic() + timeout
    while True:
        try:
            documents, moment = await driver.find(command, timeout=timeout)
            # The server forgets to say which moment it was when it runs JavaScript the first time.
            if moment is not None or not documents or time.monotonic() > until:
                break
        except OperationFailure as error:
            if error.code in _INVALID:
                raise InvalidFilter(
                    f"cannot {doing}: the server does not take the filter or the sort"
                ) from error
            if error.code not in _UNAVAILABLE or time.monotonic() > until:
                raise translated(error, doing) from error
            if at is not None:
                raise SnapshotUnavailable(f"cannot {doing} as of {at}") from error
        except (PyMongoError, TimeoutError, OSError) as error:
            raise translated(error, doing) from error
        await asyncio.sleep(_PAUSE)  # else the collection was just made, or dropped
    if limit is None and len(documents) > bound:
        raise SnapshotTooLarge(
            f"cannot {doing} live: more than {bound} documents match. Narrow the filter, give a "
            "sort and a limit, or raise Limits.snapshot_documents."
        )
    if moment is None:
        if documents:
            raise OperationFailed(f"cannot {doing}: snapshots need MongoDB 5.0 or newer")
        # There is no such collection, and so no moment of it; nor was there one at the head.
        moment = head.cluster_time
        if head.is_high_water or head.is_time:  # before all that happened at its time
            moment = _before(moment)
    # The first moment that the snapshot does not contain.
    return Snapshot(documents, ResumeToken.at(_after(moment)), moment)


def _before(time: Timestamp) -> Timestamp:
    if time.inc:
        return Timestamp(time.time, time.inc - 1)
    return Timestamp(time.time - 1, 0xFFFFFFFF)


def _after(time: Timestamp) -> Timestamp:
    if time.inc < 0xFFFFFFFF:
        return Timestamp(time.time, time.inc + 1)
    return Timestamp(time.time + 1, 0)
