"""ResumeToken: a position in MongoDB's log, as an event id, in order, with its cluster time.

A change stream's tokens are the server's sort key written as hex, so that comparing two hex
strings is comparing two positions; the server merges the streams of its shards in just this way.
https://www.mongodb.com/docs/manual/changeStreams/#resume-tokens
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from functools import total_ordering
from typing import Any

from bson import Binary, Timestamp

from .errors import InvalidResumeToken

__all__ = ["ResumeToken"]

# A reconnect from another origin needs a CORS preflight once Last-Event-ID is longer than this:
# https://fetch.spec.whatwg.org/#cors-safelisted-request-header
_PREFLIGHT = 128
# An id can hold an `_id` of any length; beyond this it is no id but an attack.
_LONGEST = 8192

# The fields of a token, each in the server's KeyString form: 82 and the cluster time; the token
# version; 29 (high water) or 2C0100 (event); the index in a transaction; whether it is from an
# invalidate; the collection's UUID; the document's key; the end, 04.
_SHAPE = re.compile(
    r"82(?P<time>[0-9A-F]{16})2B[0-9A-F]{2}(?:29|2C0100)"
    r"(?:29|2B[0-9A-F]{2}|2C[0-9A-F]{4}|2D[0-9A-F]{6}|2E[0-9A-F]{8})6(?P<invalidate>[EF])"
    r"(?:5A1004[0-9A-F]{32})?(?P<key>(?:[0-9A-F]{2})*)04"
)
_TIMESTAMP = re.compile(r"Timestamp\(\s*(\d{1,10})\s*,\s*(\d{1,10})\s*\)")
# A document's key is an object, 46 … 00: one that was cut short does not end as one. The number of
# a fragment may follow, where an event was split.
_KEY = re.compile(r"46(?:[0-9A-F]{2})*00(?:29|2B[0-9A-F]{2})?")
_TIME = re.compile(r"82[0-9A-Fa-f]{16}")
_HEX = re.compile(r"(?:[0-9A-Fa-f]{2})+")
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")


@total_ordering
class ResumeToken:
    """Where a stream is: after one event, between two events, or at one cluster time.

    Tokens of one deployment compare as positions do (``a < b``: a is earlier). ``str(token)`` is
    the event id that travels as SSE ``id:`` and comes back as ``Last-Event-ID``.
    """

    __slots__ = ("epoch", "hex", "type_bits")

    def __init__(self, hex: str, type_bits: bytes = b"", epoch: str = "") -> None:
        self.hex = hex
        self.epoch = epoch  # of a live query: the feed whose documents were shown
        # Types that the sort key does not tell apart (an _id of 5 as int or as long).
        self.type_bits = type_bits

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> ResumeToken:
        """The token in a server's reply, ``{"_data": …}``; trusted, not checked."""
        return cls(document["_data"], bytes(document.get("_typeBits", b"")))

    @classmethod
    def at(cls, time: Timestamp) -> ResumeToken:
        """The position before everything of one cluster time (``startAtOperationTime``)."""
        return cls(f"82{time.time:08X}{time.inc:08X}")

    @classmethod
    def parse(cls, position: ResumeToken | Timestamp | Mapping[str, Any] | str) -> ResumeToken:
        """A position in any form that a user may hold.

        Args:
            position: a token, an event id, a ``change.timestamp`` or the ``str()`` of it, or the
                server's own ``{"_data": "82…"}``.

        Raises:
            InvalidResumeToken: it is none of these, or it is damaged.
        """
        if isinstance(position, ResumeToken):
            return position
        if isinstance(position, Timestamp):
            return cls.at(position)
        if isinstance(position, Mapping):
            data, bits = position.get("_data"), position.get("_typeBits", b"")
            if not isinstance(data, str) or not isinstance(bits, bytes):
                raise InvalidResumeToken('a resume token document looks like {"_data": "82…"}')
            return cls._checked(data.upper(), bytes(bits))
        if not isinstance(position, str):
            raise InvalidResumeToken(
                f"a resume position is a token, an event id or a timestamp, not {type(position)!r}"
            )
        return cls._from_event_id(position)

    @classmethod
    def _from_event_id(cls, text: str) -> ResumeToken:
        if not text or len(text) > _LONGEST:
            raise InvalidResumeToken(
                f"an event id has between 1 and {_LONGEST} characters, not {len(text)}"
            )
        if match := _TIMESTAMP.fullmatch(text):
            seconds, increment = int(match[1]), int(match[2])
            if max(seconds, increment) >= 2**32:
                raise InvalidResumeToken("a timestamp has two numbers below 2**32")
            return cls.at(Timestamp(seconds, increment))
        text, _, epoch = text.partition("~")
        if _TIME.fullmatch(text):
            return cls(text.upper(), b"", epoch)
        data, _, bits = text.partition(".")
        # Both parts have one form. A token in base64url starts with "g", which is no hex digit.
        decode = _from_hex if _HEX.fullmatch(data) else _from_base64url
        token = cls._checked(decode(data).hex().upper(), decode(bits) if bits else b"")
        token.epoch = epoch
        return token

    @classmethod
    def _checked(cls, hex: str, type_bits: bytes) -> ResumeToken:
        shape = _SHAPE.fullmatch(hex)
        if not shape or (shape["key"].startswith("46") and not _KEY.fullmatch(shape["key"])):
            raise InvalidResumeToken(
                "this is no resume token of MongoDB, or a part of one is missing. Send the id of "
                "the last event unchanged, or none to start from now."
            )
        return cls(hex, type_bits)

    @property
    def is_time(self) -> bool:
        """Whether this is a cluster time alone, not a token that the server made."""
        return len(self.hex) == 18

    @property
    def is_high_water(self) -> bool:
        """Whether this is the server's mark between two events, not the token of one."""
        return self.hex[22:24] == "29"

    @property
    def floor(self) -> str:
        """The position in hex, as where a log begins: everything after it is there.

        The server's mark before all of one time is as good as the time alone, which is shorter and
        so comes before it.
        """
        return self.hex[:18] if self.is_high_water else self.hex

    @property
    def is_invalidate(self) -> bool:
        """Whether this is the token of an invalidate, after which only ``startAfter`` goes on."""
        shape = _SHAPE.fullmatch(self.hex)
        return shape is not None and shape["invalidate"] == "F"

    @property
    def cluster_time(self) -> Timestamp:
        """The cluster time of the position, from the token itself."""
        return Timestamp(int(self.hex[2:10], 16), int(self.hex[10:18], 16))

    @property
    def document(self) -> dict[str, Any]:
        """The form that MongoDB's own tools and drivers take as ``resumeAfter``."""
        if self.type_bits:
            return {"_data": self.hex, "_typeBits": Binary(self.type_bits)}
        return {"_data": self.hex}

    @property
    def start(self) -> dict[str, Any]:
        """The option of ``$changeStream`` that starts a cursor here.

        ``startAfter`` takes all that ``resumeAfter`` takes and the token of an invalidate too.
        """
        if self.is_time:
            return {"startAtOperationTime": self.cluster_time}
        return {"startAfter": self.document}

    def __str__(self) -> str:
        return event_id(self.hex, self.type_bits, self.epoch)

    def __repr__(self) -> str:
        return f"ResumeToken({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return self.hex == other.hex if isinstance(other, ResumeToken) else NotImplemented

    def __lt__(self, other: ResumeToken) -> bool:
        return self.hex < other.hex if isinstance(other, ResumeToken) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hex)


def event_id(hex: str, type_bits: bytes = b"", epoch: str = "") -> str:
    """The event id of a token: its hex while that is short, base64url beyond."""
    end = f"~{epoch}" if epoch else ""
    if len(hex) + (2 * len(type_bits) + 1 if type_bits else 0) + len(end) <= _PREFLIGHT:
        return f"{hex}.{type_bits.hex().upper()}{end}" if type_bits else hex + end
    packed = [bytes.fromhex(hex), type_bits] if type_bits else [bytes.fromhex(hex)]
    return ".".join(base64.urlsafe_b64encode(p).decode().rstrip("=") for p in packed) + end


def _from_hex(part: str) -> bytes:
    if not _HEX.fullmatch(part):
        raise _neither()
    return bytes.fromhex(part)


def _from_base64url(part: str) -> bytes:
    if not _BASE64URL.fullmatch(part):
        raise _neither()
    try:
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except binascii.Error as error:
        raise _neither() from error


def _neither() -> InvalidResumeToken:
    return InvalidResumeToken("an event id is hexadecimal or base64url, and this is neither")
