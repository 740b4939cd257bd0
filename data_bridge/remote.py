"""Remote: a live query whose filter only the server evaluates.

For each lot of changes the documents in question are looked up together with the filter, so that
what matches and what is shown are of one moment. Equal filters share it, and there is a bound on
their number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from pymongo.errors import PyMongoError

from .errors import Fault, fault, translated
from .log import RESET, Limits
from .order import key
from .query import Tracked, ids_of
from .question import Question
from .router import WHOLE_COLLECTION, member_key
from .source import Entry
from .token import ResumeToken

if TYPE_CHECKING:
    from .driver import Driver
    from .router import Router

__all__ = ["Remote"]

_LOT = 1000
_PAUSE = 0.5  # seconds before the server is asked again, if it did not answer


class Remote(Tracked):
    """Decides by asking the server which of the changed documents match now."""

    routed = False  # what the filter needs is the server's business

    def __init__(self, driver: Driver, router: Router, question: Question, limits: Limits) -> None:
        self._lot: list[Entry] = []
        self._asking: asyncio.Task[None] | None = None
        self._done: ResumeToken | None = None
        super().__init__(driver, router, question, limits)
        self.log.position = lambda: self._done if self._done is not None else router.head

    def add(self, entry: Entry) -> None:
        if not self._complete and entry.operation not in WHOLE_COLLECTION:
            return  # took() finds it in the feed's log
        if not self._lot and self._done is None:
            self._done = self._router.before
        self._lot.append(entry)
        if len(self._lot) > self.limits.log_entries:  # the server does not keep up
            self.reset(entry, "history lost")
            return
        if self._asking is None or self._asking.done():
            self._asking = self.start(self._ask())

    def begin(self, position: ResumeToken, changes: list[Entry]) -> None:
        if changes:
            self._done = position
        super().begin(position, changes)

    async def _ask(self) -> None:
        while self._lot and not self.closed:
            lot = self._lot[:_LOT]
            found: dict[Hashable, dict[str, Any]] = {}
            changed = [e for e in lot if e.operation in ("insert", "update", "replace")]
            ids = ids_of(changed)
            if ids:
                try:
                    documents = await self.driver.find_by_ids(
                        self.question.collection,
                        list(ids.values()),
                        filter=self.question.filter.query,
                        projection=self.question.projection,
                        timeout=self.limits.timeout,
                    )
                except (PyMongoError, TimeoutError, OSError) as error:
                    if fault(error) is Fault.TRANSIENT:
                        await asyncio.sleep(_PAUSE)
                        continue
                    self.fail(translated(error, f"read {self.question.collection}"))
                    break
                found = {key(document["_id"]): document for document in documents}
            if not self._lot:  # given up
                break
            del self._lot[: len(lot)]
            for entry in lot:
                self._decided(entry, found)
                self._done = entry.position
        self._done = None
        self.log.moved()

    def _decided(self, entry: Entry, found: dict[Hashable, dict[str, Any]]) -> None:
        operation = entry.operation
        if self.closed:
            return
        if operation in WHOLE_COLLECTION and entry.token > self.since:
            self.reset(entry, "history lost" if operation == RESET else operation)
        elif "documentKey" in entry.raw:
            member = member_key(entry.raw)
            document = None if operation == "delete" else found.get(member)
            self.decide(
                entry, member, entry.raw["documentKey"]["_id"], document is not None, document
            )

    def close(self) -> None:
        super().close()
        self._lot.clear()
