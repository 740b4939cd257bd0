"""ServerSentEvent: one event, and the bytes of it.

https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

__all__ = ["ServerSentEvent", "check_event", "check_id"]

_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event.

    Args:
        data: the text; every line of it becomes a ``data:`` line. May be empty.
        event: the event's type, ``message`` to a client if left out.
        id: what a client sends back as ``Last-Event-ID`` when it reconnects.
        retry: how long a client waits before it reconnects, in milliseconds.

    Raises:
        ValueError: a line end in ``event`` or ``id`` or a NUL in ``id``, with which text from
            outside could add fields or events of its own; a negative ``retry``.
        TypeError: a value that is not of its type.
    """

    data: str
    event: str | None = None
    id: str | None = None
    retry: int | None = None

    # A generator per client makes one for each client and change, and what a frozen dataclass
    # would write here takes longer: it sets each field through object.__setattr__.
    def __init__(
        self,
        data: str,
        event: str | None = None,
        id: str | None = None,
        retry: int | None = None,
    ) -> None:
        if not isinstance(data, str):
            raise TypeError(
                f"data is text, not {type(data).__name__}: json.dumps() makes text of it"
            )
        if event is not None:
            check_event(event)
        if id is not None:
            check_id(id)
        if retry is not None:
            if not isinstance(retry, int) or isinstance(retry, bool):
                raise TypeError(f"retry is a whole number of milliseconds, not {retry!r}")
            if retry < 0:
                raise ValueError(f"retry is a number of milliseconds from 0 on, not {retry}")
        _set_data(self, data)
        _set_event(self, event)
        _set_id(self, id)
        _set_retry(self, retry)

    def encode(self) -> bytes:
        """The event as it goes over the wire, blank line included."""
        text = "" if self.event is None else f"event: {self.event}\n"
        if self.id is not None:
            text = f"{text}id: {self.id}\n"
        if self.retry is not None:
            text = f"{text}retry: {self.retry}\n"
        data = self.data
        if "\n" in data or "\r" in data:
            data = "\ndata: ".join(_LINE_END.split(data))
        text = f"{text}data: {data}\n\n"
        try:
            return text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 cannot carry
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()

    __bytes__ = encode


_set_data, _set_event, _set_id, _set_retry = (
    getattr(ServerSentEvent, field.name).__set__ for field in fields(ServerSentEvent)
)


def check_event(name: str) -> None:
    """Refuse a name from which a client would read more than one field."""
    if not isinstance(name, str):
        raise _no_text("event", name)
    if "\n" in name or "\r" in name:
        raise _not_one_line("event", name)


def check_id(id: str) -> None:
    """Refuse an id from which a client would read more than one field, or none."""
    if not isinstance(id, str):
        raise _no_text("id", id)
    if "\n" in id or "\r" in id or "\0" in id:
        raise _not_one_line("id", id)


def _no_text(field: str, value: object) -> TypeError:
    return TypeError(f"{field} is text, not {type(value).__name__}: str() makes text of it")


def _not_one_line(field: str, value: str) -> ValueError:
    return ValueError(f"{field} must not contain line ends or NUL: {value[:80]!r}")
