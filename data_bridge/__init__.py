"""Live updates from MongoDB for Python web applications."""

from .bridge import Bridge, connect, lifespan, watch
from .change import Change, Operation, UpdateDescription
from .document import Document, Model
from .errors import DataBridgeError
from .live import LiveEvent, LiveStream, merge
from .log import Limits
from .stream import ChangeStream
from .token import ResumeToken

__version__ = "0.1.0"

__all__ = [
    "Bridge",
    "Change",
    "ChangeStream",
    "DataBridgeError",
    "Document",
    "Limits",
    "LiveEvent",
    "LiveStream",
    "Model",
    "Operation",
    "ResumeToken",
    "UpdateDescription",
    "connect",
    "lifespan",
    "merge",
    "watch",
]
