"""Bridge: one database, its driver and its feeds, for as long as an application runs."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from .catch_up import Slots
from .change import Operation
from .document import (
    Document,
    collection_name,
    encoded_filter,
    ensure_images,
    ensure_indexes,
    settings_of,
)
from .driver import Driver, open_driver
from .errors import BridgeClosed, InvalidPipeline, NotBound, TooManyCursors
from .feed import Feed
from .filter import Filter
from .live import LiveStream, Part
from .log import Limits
from .question import merged_projection, projection_of, question_of
from .shutdown import guard
from .source import Scope, canonical
from .stats import Stats, stats_of
from .stream import ChangeStream, Wishes
from .token import ResumeToken

if TYPE_CHECKING:
    from bson import Timestamp
    from pydantic import BaseModel

__all__ = ["Bridge", "bridge_of", "connect", "lifespan", "watch"]

_log = logging.getLogger("data_bridge")
D = TypeVar("D", bound="Document")

# A model finds its bridge through the event loop that it is used in: bridges belong to a loop, as
# the drivers' connections do, and one process may well run several (a server in a thread, a test).
_open: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, list[Bridge]] = (
    weakref.WeakKeyDictionary()
)

_OPERATIONS = frozenset(str(o) for o in Operation)
_IMAGES = ("default", "updateLookup", "whenAvailable", "required")
_IMAGES_BEFORE = ("off", "whenAvailable", "required")


class Bridge:
    """A database that is open for reading, writing and watching. Made by ``connect()``.

    Attributes:
        driver: the database behind Motor, PyMongo's async API or mongomock-motor.
        limits: the bounds that hold for this bridge.
    """

    def __init__(
        self,
        source: Any,
        *,
        documents: Iterable[type[Document]] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.documents = None if documents is None else tuple(documents)
        self.driver: Driver
        self._source = source
        self._feeds: dict[Scope, Feed] = {}
        self._running: set[Feed] = set()  # those and the ones that are about to end
        self._slots = Slots(self.limits.catch_ups)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self) -> Self:
        """Connect, check that changes can be watched, and create the models' indexes.

        Raises:
            ServerUnreachable, AuthenticationFailed, NotAReplicaSet: each with its remedy.
        """
        self.driver = open_driver(self._source)
        try:
            await self.driver.check(self.limits.timeout)
            for model in _declared(Document) if self.documents is None else self.documents:
                if settings_of(model).pre_images and self.driver.can_watch:
                    await ensure_images(model, self.driver.database)
                await ensure_indexes(model, self.driver.collection(collection_name(model)))
        except BaseException:
            await self.driver.close()
            raise
        self._loop = asyncio.get_running_loop()
        _open.setdefault(self._loop, []).append(self)
        return self

    async def close(self) -> None:
        """End every stream, give the cursors back and close the client if it was opened here."""
        if self._loop is None:
            return
        _open[self._loop].remove(self)
        self._loop = None
        await asyncio.gather(*(feed.close() for feed in self._running))
        await self.driver.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def watch(
        self,
        model: type[D],
        *,
        operations: Iterable[str] | str | None = None,
        filter: Mapping[str, Any] | None = None,
        pipeline: Sequence[Mapping[str, Any]] | None = None,
        resume_after: ResumeToken | Timestamp | Mapping[str, Any] | str | None = None,
        full_document: str | None = None,
        full_document_before_change: str | None = None,
        show_expanded_events: bool = False,
    ) -> ChangeStream[D]:
        """The changes to a model's collection; ``Document.watch()`` says what the arguments are."""
        images = "whenAvailable" if settings_of(model).pre_images else None
        scope = Scope(
            collection=collection_name(model),
            full_document=_one_of("full_document", full_document, _IMAGES)
            or images
            or "updateLookup",
            full_document_before_change=_one_of(
                "full_document_before_change", full_document_before_change, _IMAGES_BEFORE
            )
            or images,
            show_expanded_events=show_expanded_events,
            pipeline=_pipeline(pipeline),
        )
        position = None if resume_after is None else ResumeToken.parse(resume_after)
        return ChangeStream(
            lambda: self.feed(scope),
            model,
            position,
            Wishes(
                _operations(operations),
                None if filter is None else Filter(encoded_filter(model, filter)),
            ),
        )

    def live(
        self,
        model: type[D],
        filter: Mapping[str, Any] | None = None,
        *,
        sort: Any = None,
        limit: int | None = None,
        view: type[BaseModel] | None = None,
    ) -> LiveStream[Any]:
        """A live query of a model; ``Document.live()`` says what the arguments are."""
        question = question_of(model, filter, sort, limit, view, self.limits.window)
        stages = [] if question.fields is None else [projection_of(question)]
        return LiveStream(
            self,
            self._live_scope(question.collection, question.images, stages),
            (Part(question, view or model),),
        )

    def merged(self, parts: tuple[Part, ...]) -> LiveStream[Any]:
        """Several live queries as one stream; ``merge()`` says more."""
        images = all(part.question.images for part in parts)
        if not images:
            questions = [replace(part.question, images=False) for part in parts]
            parts = tuple(replace(p, question=q) for p, q in zip(parts, questions, strict=True))
        names = sorted(part.question.collection for part in parts)
        stages: list[Any] = [
            {
                "$match": {
                    "$or": [
                        {"ns.coll": {"$in": names}},
                        {"to.coll": {"$in": names}},
                        {"operationType": {"$in": ["dropDatabase", "invalidate"]}},
                    ]
                }
            }
        ]
        if any(part.question.fields is not None for part in parts):
            stages.append(merged_projection([part.question for part in parts]))
        return LiveStream(self, self._live_scope(None, images, stages), parts)

    @staticmethod
    def _live_scope(collection: str | None, images: bool, stages: list[Any]) -> Scope:
        return Scope(
            collection=collection,
            full_document="whenAvailable" if images else "updateLookup",
            full_document_before_change="whenAvailable" if images else None,
            pipeline=canonical(stages),
        )

    def feed(self, scope: Scope) -> Feed:
        """The feed of a scope, opened if it is not.

        Raises:
            BridgeClosed: the bridge is.
            TooManyCursors: the scope needs a cursor of its own, and there are too many.
        """
        if self._loop is None:
            raise BridgeClosed("this bridge is closed; watch() needs an open one")
        feed = self._feeds.get(scope)
        if feed is None:
            own = sum(1 for s in self._feeds if s.pipeline != "[]")
            if scope.pipeline != "[]" and own >= self.limits.cursors:
                raise TooManyCursors(
                    f"{own} different pipelines or views are watched already, and each has a "
                    "server cursor of its own. Use filter= or operations=, which share one, or "
                    "raise Limits.cursors."
                )
            feed = Feed(self.driver, scope, self.limits, self._slots, self._closed)
            self._feeds[scope] = feed
            self._running.add(feed)
            feed.task.add_done_callback(lambda _: self._running.discard(feed))
        return feed

    def stats(self) -> Stats:
        """What each feed is doing now. Cheap, and may be called from any thread."""
        return Stats(tuple(stats_of(feed) for feed in list(self._feeds.values())))

    def _closed(self, feed: Feed) -> None:
        if self._feeds.get(feed.scope) is feed:
            del self._feeds[feed.scope]

    def __repr__(self) -> str:
        state = "closed" if self._loop is None else f"{len(self._feeds)} feeds"
        return f"<Bridge {state}>"


def connect(
    source: Any,
    *,
    documents: Iterable[type[Document]] | None = None,
    limits: Limits | None = None,
) -> Bridge:
    """A bridge to a database, to be entered: ``async with connect("mongodb://…/shop") as bridge``.

    Args:
        source: a MongoDB URI that names a database, or a client or database of Motor, of PyMongo's
            async API or of mongomock-motor. A URI opens PyMongo's async client.
        documents: the models that live there. Needed only where several databases are open in one
            event loop; without it every model does.
        limits: bounds of memory, cursors and time.

    Raises, on entry:
        ServerUnreachable, AuthenticationFailed, NotAReplicaSet: each with its remedy.
    """
    return Bridge(source, documents=documents, limits=limits)


def lifespan(
    source: Any,
    *,
    documents: Iterable[type[Document]] | None = None,
    limits: Limits | None = None,
) -> Callable[[Any], AbstractAsyncContextManager[dict[str, Any]]]:
    """A lifespan for any ASGI framework: ``FastAPI(lifespan=lifespan("mongodb://…/shop"))``.

    The bridge is in the request's state as ``request.state.bridge``.
    https://asgi.readthedocs.io/en/latest/specs/lifespan.html
    """

    @asynccontextmanager
    async def context(app: Any) -> AsyncIterator[dict[str, Any]]:
        with guard():  # a stream that begins while the server stops must not keep it
            async with connect(source, documents=documents, limits=limits) as bridge:
                yield {"bridge": bridge}

    return context


def bridge_of(model: type[Document]) -> Bridge:
    """The bridge that is open for a model in the running event loop.

    Raises:
        NotBound: none is, or several are and none of them names the model.
    """
    try:
        bridges = _open.get(asyncio.get_running_loop(), [])
    except RuntimeError:
        bridges = []
    named = [b for b in bridges if b.documents is not None and model in b.documents]
    found = named or [b for b in bridges if b.documents is None]
    if len(found) == 1:
        return found[0]
    if found:
        raise NotBound(
            f"several databases are open and {model.__name__} could live in each of them. Say "
            f"which: connect(…, documents=[{model.__name__}])"
        )
    raise NotBound(
        f"{model.__name__} is not connected to a database. Open one around this code, "
        'async with connect("mongodb://…/shop"), or give the application one, '
        'App(database="mongodb://…/shop") or FastAPI(lifespan=lifespan("mongodb://…/shop")).'
    )


def _declared(base: type[Document]) -> list[type[Document]]:
    found = []
    for model in base.__subclasses__():
        if settings_of(model).collection is not None:
            found.append(model)
        found += _declared(model)
    return found


def _operations(operations: Iterable[str] | str | None) -> frozenset[str] | None:
    if operations is None:
        return None
    wanted = frozenset([operations] if isinstance(operations, str) else operations)
    if not wanted:
        raise ValueError("operations= is empty: nothing would ever be delivered")
    if unknown := [o for o in wanted if o not in _OPERATIONS]:
        raise ValueError(
            f"operations= has {unknown[0]!r}, which is none of {', '.join(sorted(_OPERATIONS))}"
        )
    return wanted


def _one_of(name: str, value: str | None, allowed: tuple[str, ...]) -> str | None:
    if value is not None and value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(allowed)}; not {value!r}")
    return value


def _pipeline(pipeline: Sequence[Mapping[str, Any]] | None) -> str:
    if pipeline is None:
        return "[]"
    if not isinstance(pipeline, Sequence) or not all(isinstance(s, Mapping) for s in pipeline):
        raise InvalidPipeline('a pipeline is a list of stages, like [{"$match": {…}}]')
    try:
        return canonical(list(pipeline))
    except (TypeError, ValueError) as error:
        raise InvalidPipeline(f"BSON cannot hold this pipeline: {error}") from error


def watch(model: type[D], **options: Any) -> ChangeStream[D]:
    """``model.watch(**options)``, for models that are handed around."""
    return bridge_of(model).watch(model, **options)
