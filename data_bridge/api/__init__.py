"""Everything that knows HTTP: the application, its parameters and Server-Sent Events."""

from ..shutdown import close_streams
from .app import App
from .params import Header, Path, Query
from .sse import EventSourceResponse, ServerSentEvent

__all__ = [
    "App",
    "EventSourceResponse",
    "Header",
    "Path",
    "Query",
    "ServerSentEvent",
    "close_streams",
]
