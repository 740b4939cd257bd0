"""Journal: one structured line at each turn of a feed's life, none per event."""

from __future__ import annotations

import logging
from typing import Any

from .token import ResumeToken

__all__ = ["log"]

_logger = logging.getLogger("data_bridge")


def log(level: int, feed: str, event: str, position: ResumeToken | None, **fields: Any) -> None:
    """Say what happened to a feed: readable in the message, and as attributes of the record.

    A record has ``event`` ("opened", "interrupted", "reopened", "reset", "closed", …), ``feed``,
    ``position`` and what else is given, all with the prefix ``data_bridge_``, for formatters that
    write JSON.
    """
    if _logger.isEnabledFor(level):
        said = "".join(f" {name}={value}" for name, value in fields.items())
        known = {"event": event, "feed": feed, "position": str(position), **fields}
        extra = {f"data_bridge_{name}": value for name, value in known.items()}
        _logger.log(level, "feed %s %s%s", feed, event, said, extra=extra, stacklevel=2)
