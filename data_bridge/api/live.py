"""Live queries over HTTP: their frames, and who may see what.

The wire: ``snapshot`` frames, ``ready``, and then ``insert``, ``update``, ``replace``, ``delete``,
``enter`` and ``leave``; ``reset`` where the past is gone, and a new snapshot after it. Only ids
from which a client may resume are sent: none inside a snapshot.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..bridge import bridge_of
from ..bson_types import stored_names
from ..document import from_document
from ..document import to_json as document_json
from ..errors import DataBridgeError, DocumentInvalid, HandlerInvalid
from ..live import LiveEvent, LiveStream, Part
from ..log import RESET
from ..order import key
from ..query import LiveEntry
from ..question import question_of
from ..stand_in import StandIn
from ..token import ResumeToken, event_id
from .encoder import id_json, one_line_json

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ..document import Document

__all__ = ["Authorized", "LiveEncoder", "live_encoder", "live_endpoint"]

_log = logging.getLogger("data_bridge")

Authorize = Callable[[LiveEvent[Any], Request], bool | Awaitable[bool]]
_INVALID = b'null,"error":"the document does not fit its model"'


# -- frames -------------------------------------------------------------------------------------


class LiveEncoder:
    """Makes the frames of live queries, the same for everybody who looks at the same."""

    def __init__(
        self, models: tuple[tuple[str, Any], ...], resumable: bool, epoch: str = ""
    ) -> None:
        self._epoch = epoch
        self._models = dict(models)
        self._only = models[0] if len(models) == 1 else None
        self._resumable = resumable

    def __call__(self, entry: LiveEntry) -> bytes:
        if entry.operation == RESET:
            return self.reset(entry.reason)
        if self._only is not None:
            tag, model = b"", self._only[1]
        else:
            collection = entry.raw["ns"]["coll"]
            tag, model = b'"collection":%b,' % to_json(collection), self._models[collection]
        document = b"null"
        if entry.document is not None:
            document = _document(model, entry.document) or _INVALID
        name = entry.operation.encode()
        # Whoever is cut between two frames of one change sees both again.
        id = b""
        if self._resumable and entry.last:
            token = entry.raw["_id"]
            position = event_id(entry.token, token.get("_typeBits", b""), self._epoch)
            id = b"id: %b\n" % position.encode()
        data = one_line_json(
            b'{%b"operation":"%b","id":%b,"document":%b}' % (tag, name, id_json(entry.id), document)
        )
        return b"event: %b\n%bdata: %b\n\n" % (name, id, data)

    def snapshot(self, part: Part, documents: list[dict[str, Any]], sent: int, total: int) -> bytes:
        """Some of the documents that match."""
        tag = b""
        if self._only is None:
            tag = b'"collection":%b,' % to_json(part.question.collection)
        shown = [made for d in documents if (made := _document(part.model, d)) is not None]
        data = b'{%b"documents":[%b],"sent":%d,"total":%d}' % (tag, b",".join(shown), sent, total)
        return b"event: snapshot\ndata: %b\n\n" % one_line_json(data)

    def ready(self, position: ResumeToken | None, total: int) -> bytes:
        """The snapshot is complete, and changes follow."""
        id = b"" if position is None else b"id: %b\n" % str(position).encode()
        return b'event: ready\n%bdata: {"total":%d}\n\n' % (id, total)

    def reset(self, reason: str) -> bytes:
        """What came before is no base to go on from, and a snapshot follows.

        Without an id: whoever is cut before the snapshot is complete still has the rows of the id
        from before, and that the server must know.
        """
        return b'event: reset\ndata: {"reason":%b}\n\n' % to_json(reason)


@lru_cache(256)
def _shared(models: tuple[tuple[str, Any], ...], resumable: bool, epoch: str) -> LiveEncoder:
    return LiveEncoder(models, resumable, epoch)


def live_encoder(stream: LiveStream[Any]) -> LiveEncoder:
    """What makes frames of the events of a stream."""
    models = tuple((part.question.collection, part.model) for part in stream.parts)
    return _shared(models, stream.resumable, stream.epoch)


def _document(model: Any, document: dict[str, Any]) -> bytes | None:
    """The JSON of a document; ``None`` if it does not fit its model, which the log says."""
    try:
        made = document_json(from_document(model, document))
    except DocumentInvalid as error:
        _log.warning("%s", error)
        return None
    if not _has_id(model) and "_id" in document:
        # Without an id nobody could tell which document a later change is about.
        id = id_json(document["_id"])
        made = b'{"id":%b%b' % (id, b"}" if made == b"{}" else b"," + made[1:])
    return made


@lru_cache(256)
def _has_id(model: Any) -> bool:
    return any(stored in ("_id", "id") for _, stored in stored_names(model))


# -- who may see what ---------------------------------------------------------------------------


class Authorized:
    """A live query of which one client sees what ``authorize`` lets it see.

    What to show is decided anew for each client and each change, so nothing is shared. Whatever
    the client is not shown any more leaves, and what it never saw it never hears of.
    """

    resumable = False  # who may see what may have changed since

    def __init__(self, stream: LiveStream[Any], authorize: Authorize, request: Request) -> None:
        self._stream = stream
        self._authorize = authorize
        self._request = request
        models = tuple((p.question.collection, p.model) for p in stream.parts)
        self._encoder = _shared(models, False, "")
        self._frames: list[bytes] = []
        self._shown: set[Hashable] = set()
        self._deciding: asyncio.Future[bytes] | None = None

    resume_token: ResumeToken | None = None

    @property
    def pending(self) -> bool:
        return bool(self._frames)

    def start_after(self, position: ResumeToken) -> None:
        """It starts with a snapshot, always."""

    async def open(self) -> None:
        self._stream.start_fresh()  # its rows may be newer than what others share
        await self._stream.open()

    def take(self, encoder: Any) -> bytes:
        frames, self._frames = self._frames, []
        return b"".join(frames)

    @property
    def has_all(self) -> bool:
        return not self._frames

    async def wait(self, stand_in: StandIn | None = None) -> None:
        while not self._frames:
            if self._deciding is None:
                event = self._stream.next_event()
                if event is None:
                    await self._stream.wait()
                    continue
                self._deciding = asyncio.ensure_future(self._frame(event))
            # A wait that is cut short must not take the event with it.
            await asyncio.wait([self._deciding])
            decided, self._deciding = self._deciding, None
            if frame := decided.result():
                self._frames.append(frame)

    async def _frame(self, event: LiveEvent[Any]) -> bytes:
        encoder = self._encoder
        match event.operation:
            case "reset":
                self._shown.clear()
                return encoder.reset(event.reason)
            case "ready":
                # How many there are that it may not see is not its business.
                return encoder.ready(None, len(self._shown))
            case "snapshot":
                return await self._snapshot(event)
        member = (event.collection, key(event.document_id))
        was = member in self._shown
        if event.operation in ("delete", "leave"):
            self._shown.discard(member)
            return _plain(event, event.operation, encoder) if was else b""
        if await self._may(event):
            self._shown.add(member)
            appears = event.operation if event.operation == "insert" else "enter"
            return _plain(event, event.operation if was else appears, encoder)
        self._shown.discard(member)
        return _plain(event, "leave", encoder) if was else b""

    async def _snapshot(self, event: LiveEvent[Any]) -> bytes:
        allowed = []
        for document in event.raw:
            shown = LiveEvent(
                "snapshot-document", event.collection, event.model, document["_id"], raw=[document]
            )
            if await self._may(shown):
                self._shown.add((event.collection, key(document["_id"])))
                allowed.append(document)
        part = next(p for p in self._stream.parts if p.question.collection == event.collection)
        return self._encoder.snapshot(part, allowed, len(self._shown), len(self._shown))

    async def _may(self, event: LiveEvent[Any]) -> bool:
        try:
            answer = self._authorize(event, self._request)
            return bool(await answer if inspect.isawaitable(answer) else answer)
        except PermissionError:
            return False
        except DocumentInvalid as error:  # nobody can say who may see it
            _log.warning("%s", error)
            return False

    async def restart(self) -> None:
        await self._stream.restart()

    def stalled(self) -> None:
        self._stream.stalled()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        await self.open()
        while True:
            await self.wait()
            yield self.take(None)

    async def aclose(self) -> None:
        if self._deciding is not None:
            self._deciding.cancel()
            await asyncio.wait([self._deciding])
        await self._stream.aclose()


def _plain(event: LiveEvent[Any], operation: str, encoder: LiveEncoder) -> bytes:
    document = event.raw[0] if event.raw and operation not in ("delete", "leave") else None
    entry = LiveEntry.__new__(LiveEntry)
    entry.raw = {"ns": {"coll": event.collection}}
    entry.operation, entry.id, entry.document = operation, event.document_id, document
    entry.last, entry.reason = False, ""
    return encoder(entry)


# -- the endpoint -------------------------------------------------------------------------------


def live_endpoint(
    model: type[Document],
    *,
    filter: Any = None,
    sort: Any = None,
    limit: int | None = None,
    view: type[BaseModel] | None = None,
    authorize: Authorize | None = None,
    owner: Callable[[Request], Any] | None = None,
    **options: Any,
) -> Callable[[Request], Awaitable[Response]]:
    """A handler that streams a live query; ``App.live`` says what the arguments are."""
    from .sse import EventSourceResponse

    # What is wrong with it already is said where it is declared.
    question_of(model, None if callable(filter) else filter, sort, limit, view, None)
    for name, given in (("authorize", authorize), ("owner", owner)):
        if given is not None and not callable(given):
            raise HandlerInvalid(f"{name}= of a live query is a function, not {given!r}")
    for name in options.keys() & {"event", "data", "id"}:
        raise HandlerInvalid(f"{name}= is for watch(): a live query has its own")
    EventSourceResponse(_nothing(), **options)

    async def endpoint(request: Request) -> Response:
        began = time.monotonic()
        allowed = filter
        if callable(filter):
            try:
                allowed = filter(request)
                if inspect.isawaitable(allowed):
                    allowed = await allowed
            except PermissionError as error:
                if isinstance(error, DataBridgeError):  # the database's, not the user's
                    raise
                raise HTTPException(403) from error
            if allowed is None:  # forgotten, most likely; everything would be too much
                raise HTTPException(403)
            if not isinstance(allowed, Mapping):
                raise HandlerInvalid(
                    f"the filter of a live query of {model.__name__} gave "
                    f"{type(allowed).__name__}: it gives a MongoDB filter, {{}} for everything, or "
                    "raises HTTPException(401) or (403)."
                )
        stream = bridge_of(model).live(model, allowed, sort=sort, limit=limit, view=view)
        content: Any = stream if authorize is None else Authorized(stream, authorize, request)
        whose = None if owner is None else owner(request)
        response = EventSourceResponse(content, owner=whose, **options)
        response.decided = began  # the filter may have looked permissions up then already
        return response

    return endpoint


async def _nothing() -> AsyncIterator[Any]:
    return
    yield
