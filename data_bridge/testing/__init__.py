"""Tools for the tests of applications: a client that streams, a reader of events, fixtures.

Needs the extra ``testing``: ``pip install 'data-bridge[testing]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import (
        Comment,
        Event,
        EventDecoder,
        EventStream,
        Mark,
        StreamingTransport,
        events,
        streaming_client,
    )

__all__ = [
    "Comment",
    "Event",
    "EventDecoder",
    "EventStream",
    "Mark",
    "StreamingTransport",
    "events",
    "streaming_client",
]


def __getattr__(name: str) -> Any:
    # Only when asked for: pytest loads the plugin of this package in every run, with httpx
    # installed or not.
    if name in __all__:
        from . import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
