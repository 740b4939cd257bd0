"""Change: one change event of MongoDB, typed by a model.

https://www.mongodb.com/docs/manual/reference/change-events/
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bson import Timestamp

from .document import to_jsonable
from .errors import DocumentInvalid
from .token import ResumeToken

if TYPE_CHECKING:
    from .document import Document

__all__ = ["Change", "Operation", "UpdateDescription"]

D = TypeVar("D", bound="Document")
_UNREAD = object()
_log = logging.getLogger("data_bridge")


class Operation(StrEnum):
    """What happened, in MongoDB's words; the DDL events below the line come when asked for."""

    INSERT = "insert"
    UPDATE = "update"
    REPLACE = "replace"
    DELETE = "delete"
    DROP = "drop"
    RENAME = "rename"
    DROP_DATABASE = "dropDatabase"
    INVALIDATE = "invalidate"
    # show_expanded_events
    CREATE = "create"
    CREATE_INDEXES = "createIndexes"
    DROP_INDEXES = "dropIndexes"
    MODIFY = "modify"
    SHARD_COLLECTION = "shardCollection"
    RESHARD_COLLECTION = "reshardCollection"
    REFINE_COLLECTION_SHARD_KEY = "refineCollectionShardKey"


_OPERATIONS: dict[str, str] = {o.value: o for o in Operation}


@dataclass(frozen=True, slots=True)
class UpdateDescription:
    """What an update changed, by dotted path.

    https://www.mongodb.com/docs/manual/reference/change-events/update/
    """

    updated_fields: dict[str, Any]
    removed_fields: list[str]
    truncated_arrays: list[dict[str, Any]]


class Change(Generic[D]):
    """One change to a collection, shared by everybody who watches it: read it, do not alter it.

    ``full_document`` and its kin are validated when they are first read; a document that does not
    fit the model fails there, alone, and the stream goes on.
    """

    __slots__ = ("_before", "_document", "_full", "model", "raw")

    def __init__(self, raw: dict[str, Any], model: type[D]) -> None:
        self.raw = raw
        self.model = model
        self._full: Any = _UNREAD
        self._before: Any = _UNREAD
        self._document: Any = _UNREAD

    @property
    def operation(self) -> str:
        """What happened: an ``Operation``, or a plain string for a type that is not known yet."""
        # Servers to come send types to come.
        name: str = self.raw["operationType"]
        return _OPERATIONS.get(name, name)

    @property
    def document_id(self) -> Any:
        """The ``_id`` of the document; ``None`` for changes to a whole collection."""
        key = self.raw.get("documentKey")
        return key.get("_id") if key is not None else None

    @property
    def full_document(self) -> D | None:
        """The document after the change, if the stream was opened to carry it.

        Raises:
            DocumentInvalid: the document does not fit the model.
        """
        if self._full is _UNREAD:
            self._full = self._validated("fullDocument")
        full: D | None = self._full
        return full

    @property
    def full_document_before_change(self) -> D | None:
        """The document before the change, if the collection keeps pre-images.

        Raises:
            DocumentInvalid: the document does not fit the model.
        """
        if self._before is _UNREAD:
            self._before = self._validated("fullDocumentBeforeChange")
        before: D | None = self._before
        return before

    @property
    def document(self) -> dict[str, Any] | None:
        """``full_document`` as ``json.dumps`` takes it; ``None`` too where it does not fit."""
        if self._document is _UNREAD:
            try:
                full = self.full_document
            except DocumentInvalid as error:
                _log.warning("%s", error)
                full = None
            self._document = None if full is None else to_jsonable(full)
        document: dict[str, Any] | None = self._document
        return document

    def _validated(self, field: str) -> D | None:
        found = self.raw.get(field)
        return None if found is None else self.model.from_bson(found)

    @property
    def update_description(self) -> UpdateDescription | None:
        """What an update changed; ``None`` for other operations."""
        found = self.raw.get("updateDescription")
        if found is None:
            return None
        return UpdateDescription(
            found.get("updatedFields") or {},
            found.get("removedFields") or [],
            found.get("truncatedArrays") or [],
        )

    @property
    def timestamp(self) -> Timestamp:
        """The cluster time of the change; ``str()`` of it is accepted as a resume position.

        Changes of one transaction share it: a token is exact, a time starts before all of them.
        """
        time: Timestamp | None = self.raw.get("clusterTime")
        return self.resume_token.cluster_time if time is None else time

    @property
    def wall_time(self) -> datetime | None:
        """The server's clock at the change (MongoDB 6.0 and later)."""
        return self.raw.get("wallTime")

    @property
    def resume_token(self) -> ResumeToken:
        """The position just after this change."""
        return ResumeToken.of(self.raw["_id"])

    @property
    def namespace(self) -> str:
        """``database.collection``, or the database alone for ``dropDatabase``."""
        found: Mapping[str, str] = self.raw.get("ns") or {}
        return ".".join(v for v in (found.get("db"), found.get("coll")) if v)

    def __repr__(self) -> str:
        return f"<Change {self.operation} {self.namespace} {self.document_id!r}>"
