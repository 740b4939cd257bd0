"""Encoders: the frames of changes, each made once for everybody who asked for the same.

The wire: the operation as the event's name, the resume token as its id, and as its data
``{"operation", "id", "document"}`` with the document as the model serialises it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from bson import ObjectId
from pydantic_core import to_json

from ..bson_types import json_ready
from ..change import Change
from ..document import to_json as document_json
from ..errors import DocumentInvalid
from ..log import RESET
from ..source import Entry
from ..stream import ChangeStream, Wishes
from ..token import ResumeToken, event_id
from .event import ServerSentEvent, check_event, check_id

__all__ = [
    "ChangeEncoder",
    "Made",
    "Named",
    "change_encoder",
    "id_json",
    "one_line_json",
    "reset_frame",
]

_log = logging.getLogger("data_bridge")

Named = str | Callable[[Change[Any]], str] | None
Made = Callable[[Change[Any]], Any] | None
_INVALID = b'null,"error":"the document does not fit its model"'


class ChangeEncoder:
    """Makes the frame of one change of a ``ChangeStream``."""

    __slots__ = ("_data", "_event", "_id", "_model", "_wants")

    def __init__(self, model: Any, wishes: Wishes, event: Named, data: Made, id: Made) -> None:
        self._id = id
        self._wants = wishes.wants
        self._model = model
        self._event = event
        self._data = data

    def __call__(self, entry: Entry) -> bytes:
        if entry.operation == RESET:
            return reset_frame("history lost", str(entry.position) if self._id is None else None)
        return self.frame(entry.typed(self._model)) if self._wants(entry) else b""

    def frame(self, change: Change[Any]) -> bytes:
        """The frame of a change, wanted or not."""
        raw = change.raw
        name = self._event
        if name is None:
            name = raw["operationType"]
        elif not isinstance(name, str):
            name = name(change)
            check_event(name)
        if self._id is None:
            token = raw["_id"]
            position: str | None = event_id(token["_data"], token.get("_typeBits", b""))
        else:
            position = self._id(change)
            if position is not None:
                check_id(position)
        head = f"event: {name}\n" if position is None else f"event: {name}\nid: {position}\n"
        if self._data is None:
            return b"%bdata: %b\n\n" % (head.encode(), change_json(change))
        data = self._data(change)
        if not isinstance(data, str):
            data = one_line_json(to_json(data, fallback=json_ready)).decode()
        return head.encode() + ServerSentEvent(data).encode()


# Equal wishes get the same encoder, by which a log knows whose frames can be shared. The wishes
# hold functions of the application, and an application has few of them; those made for each
# request push each other out.
@lru_cache(256)
def _shared(model: Any, wishes: Wishes, event: Named, data: Made, id: Made) -> ChangeEncoder:
    return ChangeEncoder(model, wishes, event, data, id)


def change_encoder(stream: ChangeStream[Any], event: Named, data: Made, id: Made) -> ChangeEncoder:
    """What makes frames of the changes of a stream."""
    model: Any = stream.model
    return _shared(model, stream.wishes, event, data, id)


def change_json(change: Change[Any]) -> bytes:
    """The data of a change; a document that does not fit its model fails only itself."""
    try:
        full = change.full_document
        document = b"null" if full is None else document_json(full)
    except DocumentInvalid as error:
        _log.warning("%s", error)
        document = _INVALID
    identity = id_json(change.document_id)
    return one_line_json(
        b'{"operation":"%b","id":%b,"document":%b}'
        % (change.operation.encode(), identity, document)
    )


def id_json(id: Any) -> bytes:
    """The JSON of an ``_id``, as a model that says nothing else of its ``id`` writes it."""
    if id.__class__ is ObjectId:  # nearly always; the way through pydantic costs five times more
        return b'"%b"' % str(id).encode()
    return to_json(id, fallback=json_ready, bytes_mode="base64", inf_nan_mode="null")


def one_line_json(text: bytes) -> bytes:
    """JSON without the characters that many clients take for line ends: U+0085, U+2028, U+2029."""
    if text.isascii():  # as most is
        return text
    if b"\xe2\x80" in text:
        text = text.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    if b"\xc2\x85" in text:
        text = text.replace(b"\xc2\x85", b"\\u0085")
    return text


def reset_frame(reason: str, position: str | ResumeToken | None) -> bytes:
    """Tells a client that changes were lost, and from where it goes on (empty: from now)."""
    id = None if position is None else str(position)
    return ServerSentEvent(f'{{"reason":"{reason}"}}', event=RESET, id=id).encode()
