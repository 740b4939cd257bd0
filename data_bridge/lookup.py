"""Lookups: keeping what a live query shows from going backwards.

Without images the server looks a document up when it sends an update, so that the update shows the
document as it is by then, which may be later than the change. A replacement in the same reply shows
its own, older document: to a page the row would go back and forth. Where that can have happened the
document is looked up once more, and what is found stands for all changes up to then.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

from .order import key

if TYPE_CHECKING:
    from .driver import Driver
    from .source import Entry

__all__ = ["Lookups"]

_EXACT = frozenset({"insert", "replace"})  # carry the document of their own moment


class Lookups:
    """The documents of one cursor that may be ahead of their changes."""

    def __init__(self, driver: Driver, timeout: float) -> None:
        self._driver = driver
        self._timeout = timeout
        self._ahead: set[Hashable] = set()  # shown as of some moment after their change
        self._found: set[Hashable] = set()  # shown as of a lookup of our own

    async def settle(self, entries: Iterable[Entry]) -> None:
        """Have no entry show an older document than one before it."""
        doubtful: dict[tuple[str, Hashable], list[Entry]] = {}
        for entry in entries:
            document_key = entry.raw.get("documentKey")
            if document_key is None:
                continue
            collection = entry.raw["ns"]["coll"]
            name = (collection, key(document_key["_id"]))
            if entry.operation == "update":
                self._ahead.add(name)
            elif entry.operation not in _EXACT:
                continue
            elif name in self._ahead:
                self._found.add(name)
            if name in self._found:
                doubtful.setdefault(name, []).append(entry)
        if doubtful:
            await self._look_up(doubtful)

    async def _look_up(self, doubtful: dict[tuple[str, Hashable], list[Entry]]) -> None:
        by_collection: dict[str, list[Any]] = {}
        for (collection, _), entries in doubtful.items():
            by_collection.setdefault(collection, []).append(entries[0].raw["documentKey"]["_id"])
        found: dict[tuple[str, Hashable], dict[str, Any]] = {}
        for collection, ids in by_collection.items():
            documents = await self._driver.find_by_ids(collection, ids, timeout=self._timeout)
            found |= {(collection, key(document["_id"])): document for document in documents}
        for name, entries in doubtful.items():
            for entry in entries:
                entry.after = found.get(name)

    def exhausted(self) -> None:
        """The cursor had no more to say: later changes happened after every lookup of it.

        Not after our own ones: these stay in doubt until the cursor has caught up once more.
        """
        self._ahead, self._found = self._found, set()
