"""Every exception that data-bridge raises, and the server codes each one stands for.

The driver's own exception is always chained (``__cause__``), so nothing is hidden from a
debugger; what a caller has to *do* is in the class and in the message.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from pymongo import errors as driver

__all__ = [
    "ApplicationFailed",
    "AuthenticationFailed",
    "BridgeClosed",
    "DataBridgeError",
    "DocumentInvalid",
    "DocumentNotFound",
    "DuplicateKey",
    "EmbeddedServerFailed",
    "EventTooLarge",
    "HandlerInvalid",
    "InvalidFilter",
    "InvalidPipeline",
    "InvalidResumeToken",
    "InvalidUpdate",
    "ModelInvalid",
    "NotAReplicaSet",
    "NotBound",
    "OperationFailed",
    "ResultInvalid",
    "ResumeHistoryLost",
    "ServerUnreachable",
    "SnapshotTooLarge",
    "SnapshotUnavailable",
    "TooManyCursors",
    "WatchUnsupported",
]


class DataBridgeError(Exception):
    """Base of every exception of this package."""


# -- what the program declared ------------------------------------------------------------------


class ModelInvalid(DataBridgeError, TypeError):
    """A ``Document`` class is declared in a way that cannot work (no ``Settings.collection``)."""


class HandlerInvalid(DataBridgeError, TypeError):
    """A handler of an ``App`` is declared in a way that cannot work; the message names it."""


class ResultInvalid(DataBridgeError, TypeError):
    """A handler of an ``App`` returned what is no response and has no JSON form."""


class ApplicationFailed(DataBridgeError, RuntimeError):
    """An ASGI application under test broke the protocol: no response, or a failed lifespan."""


class NotBound(DataBridgeError, RuntimeError):
    """A model was used where no bridge is open for it in the running event loop."""


class BridgeClosed(DataBridgeError, RuntimeError):
    """The bridge was closed while, or before, it was used."""


class WatchUnsupported(DataBridgeError, NotImplementedError):
    """The database handed in has no change streams (mongomock)."""


class TooManyCursors(DataBridgeError):
    """More server-side cursors were asked for than the bridge allows."""


class InvalidFilter(DataBridgeError, ValueError):
    """A filter is not a valid MongoDB filter."""


class InvalidUpdate(DataBridgeError, ValueError):
    """An update has none of MongoDB's update operators."""


class InvalidPipeline(DataBridgeError, ValueError):
    """The server refused a pipeline or an option of a change stream."""


class SnapshotTooLarge(DataBridgeError):
    """A live query matches more documents than its bound allows."""


class SnapshotUnavailable(DataBridgeError):
    """A moment of the past cannot be read: the collection was made or changed since."""


# -- the server and the way to it ---------------------------------------------------------------


class ServerUnreachable(DataBridgeError, ConnectionError):
    """No suitable server answered within the time allowed."""


class AuthenticationFailed(DataBridgeError, PermissionError):
    """The server refused the credentials, or the user may not do this."""


class NotAReplicaSet(DataBridgeError):
    """The server is a standalone; change streams need a replica set or a sharded cluster."""


class OperationFailed(DataBridgeError):
    """The server refused a read or a write; ``code`` is the server's error code, if it sent one."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class DuplicateKey(OperationFailed):
    """A write would have repeated a value of a unique index."""


class EmbeddedServerFailed(DataBridgeError):
    """The embedded mongod was not found, or did not become a primary."""


# -- positions ----------------------------------------------------------------------------------


class InvalidResumeToken(DataBridgeError, ValueError):
    """A resume position is no token, is damaged, or lies in the future."""


class ResumeHistoryLost(DataBridgeError):
    """The server no longer has the history after a position: read the present state again."""


class EventTooLarge(ResumeHistoryLost):
    """One event is over 16 MB and the stream cannot pass it: read the present state again."""


# -- documents ----------------------------------------------------------------------------------


class DocumentInvalid(DataBridgeError, ValueError):
    """A stored document does not fit its model; ``document_id`` names it."""

    def __init__(self, message: str, document_id: Any = None) -> None:
        super().__init__(message)
        self.document_id = document_id


class DocumentNotFound(DataBridgeError, LookupError):
    """A document that had to exist does not; ``document_id`` names it."""

    def __init__(self, message: str, document_id: Any = None) -> None:
        super().__init__(message)
        self.document_id = document_id


# -- the server's codes -------------------------------------------------------------------------
# https://github.com/mongodb/mongo/blob/master/src/mongo/base/error_codes.yml
# https://github.com/mongodb/specifications/blob/master/source/change-streams/change-streams.md#resumable-error


class Fault(Enum):
    """What to do about an error that a change stream met."""

    TRANSIENT = "transient"  # back off and reopen at the last position
    LOST = "lost"  # the position is gone: reset
    TOO_LARGE = "too large"  # one event can never be read: reset
    FATAL = "fatal"  # trying again cannot help


_LOST = frozenset({136, 260, 280, 286})
_TOO_LARGE = frozenset({10334})
_MALFORMED_TOKEN = frozenset({9, 14, 15, 40647, 40649, 50796, 50811, 50816, 50819})
_AUTHENTICATION = frozenset({13, 18, 8000})
_STANDALONE = frozenset({40573})
_TIMED_OUT = frozenset({50, 89})
_RESUMABLE = frozenset(
    {6, 7, 43, 63, 89, 91, 133, 150, 189, 234, 262, 9001}
    | {10107, 11600, 11602, 13388, 13435, 13436}
    | {50, 237, 175, 11601}  # an operation that was cut short can be asked again
)


def fault(error: BaseException) -> Fault:
    """Classify what a change stream's cursor raised.

    The order matters: a server may attach the resumable label only to what can be resumed, but an
    error code that says "gone" is final whatever labels come with it.
    """
    if isinstance(error, driver.OperationFailure):
        if _id_was_removed(error):
            return Fault.FATAL
        if error.code in _LOST or error.has_error_label("NonResumableChangeStreamError"):
            return Fault.LOST
        if error.code in _TOO_LARGE:
            return Fault.TOO_LARGE
        if error.has_error_label("ResumableChangeStreamError") or error.code in _RESUMABLE:
            return Fault.TRANSIENT
        return Fault.TRANSIENT if error.timeout else Fault.FATAL
    if isinstance(error, driver.ConnectionFailure):  # network, server selection, not primary
        return Fault.TRANSIENT
    if isinstance(error, driver.PyMongoError) and error.timeout:
        return Fault.TRANSIENT
    if isinstance(error, (TimeoutError, OSError)):
        return Fault.TRANSIENT
    return Fault.FATAL


def translated(error: BaseException, doing: str, *, token: bool = False) -> DataBridgeError:
    """Our exception for one of the driver's; ``raise translated(e, "…") from e``.

    ``doing`` completes "cannot …". The server's own message is kept out of everything that could
    reach a browser: it may name other people's documents. It stays in the chained exception.
    ``token`` says that a resume token was sent along, so that its rejection is told apart from a
    rejected pipeline.
    """
    if isinstance(error, DataBridgeError):
        return error
    if isinstance(error, driver.DuplicateKeyError):
        return _duplicate(doing)
    if isinstance(error, driver.BulkWriteError):
        codes = {e.get("code") for e in (error.details or {}).get("writeErrors", ())}
        if codes & {11000, 11001}:
            return _duplicate(doing)
        return OperationFailed(f"cannot {doing}: {error}", next(iter(codes), None))
    if isinstance(error, driver.OperationFailure):
        return _from_code(error, doing, token)
    if isinstance(error, driver.ConfigurationError):
        return OperationFailed(f"cannot {doing}: {error}")
    if isinstance(error, (driver.ConnectionFailure, TimeoutError, OSError)) or getattr(
        error, "timeout", False
    ):
        return ServerUnreachable(
            f"cannot {doing}: no MongoDB server answered in time. "
            "Check that mongod runs, that host and port of the URI are right and that the "
            "replica set has a primary."
        )
    return OperationFailed(f"cannot {doing}: {type(error).__name__}: {error}")


def _duplicate(doing: str) -> DuplicateKey:
    return DuplicateKey(f"cannot {doing}: the value of a unique index exists already", 11000)


def _from_code(error: driver.OperationFailure, doing: str, token: bool) -> DataBridgeError:
    code = error.code
    if code in _STANDALONE:
        return not_a_replica_set(doing)
    if code in _AUTHENTICATION:
        return AuthenticationFailed(
            f"cannot {doing}: MongoDB refused the credentials or the user lacks a role for it. "
            "Check user, password and authSource of the URI; watching needs the role 'read' on "
            "the database."
        )
    if _id_was_removed(error):
        return InvalidPipeline(f"cannot {doing}: the pipeline may not change or remove _id.")
    if code in _LOST:
        return ResumeHistoryLost(
            f"cannot {doing}: the server no longer has the history after this position "
            "(the oplog has rolled past it). Read the present state again and watch from now."
        )
    if code in _TOO_LARGE:
        return EventTooLarge(
            f"cannot {doing}: one change event is over 16 MB, and no stream can pass it. Read the "
            "present state again and watch from now, without images of the whole document."
        )
    if token and code in _MALFORMED_TOKEN:
        return InvalidResumeToken(f"cannot {doing}: the server does not accept the resume token.")
    if error.timeout or code in _TIMED_OUT:
        return ServerUnreachable(f"cannot {doing}: the server did not finish it in time.")
    if doing.startswith("watch"):
        if code == 47:
            return InvalidPipeline(
                f"cannot {doing}: the collection keeps no pre- and post-images, and 'required' "
                "asks for them. Set Settings.pre_images = True or use 'whenAvailable'."
            )
        return InvalidPipeline(
            f"cannot {doing}: the server refuses the pipeline or an option (error {code})."
        )
    return OperationFailed(f"cannot {doing}: {error}", code)


def _id_was_removed(error: driver.OperationFailure) -> bool:
    # The code of a token that is lost, but here the next event would be lost in the same way.
    return error.code == 280 and "modified by the pipeline" in str(error)


def not_a_replica_set(doing: str) -> NotAReplicaSet:
    """The remedy for a standalone server, said in one place."""
    return NotAReplicaSet(
        f"cannot {doing}: this mongod runs standalone, and change streams need a replica set. "
        "Start mongod with --replSet rs0 and run rs.initiate() once (a set of one node is "
        "enough); `data-bridge demo` starts such a server by itself."
    )
