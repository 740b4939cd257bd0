"""Tools for the tests of applications: a streaming client, a reader of events, a mock database.

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
    from .mock import mock_database

__all__ = [
    "Comment",
    "Event",
    "EventDecoder",
    "EventStream",
    "Mark",
    "StreamingTransport",
    "events",
    "mock_database",
    "streaming_client",
]


def __getattr__(name: str) -> Any:
    # Only when asked for: pytest loads the plugin of this package in every run, with httpx
    # installed or not.
    if name == "mock_database":  # which needs mongomock-motor, as the others need httpx
        from .mock import mock_database

        return mock_database
    if name in __all__:
        from . import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
