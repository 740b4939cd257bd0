"""App: a Starlette application with a database, bound arguments and JSON results."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import SchemaSerializer
from pydantic_core import core_schema as cs
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from .. import errors
from ..bson_types import json_ready
from ..shutdown import guard
from .live import Authorize, live_endpoint
from .params import Binding, RequestInvalid, limited, qualified_name

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ..bridge import Bridge
    from ..document import Document
    from ..log import Limits

__all__ = ["App"]

Handler = TypeVar("Handler", bound=Callable[..., Any])

logger = logging.getLogger("data_bridge.api")

_NO_BODY = frozenset({204, 205, 304})
_STATIC = Path(__file__).parent.parent / "static"


class App(Starlette):
    """A Starlette application whose handlers take bound arguments and return what they have.

        app = App(database="mongodb://localhost/shop")

        @app.get("/orders/{order_id}")
        async def order(order_id: ObjectId) -> Order:
            return await Order.get(order_id)

    ``database`` is anything that `data_bridge.connect` takes (a URI, or a client or database of
    Motor, PyMongo's async API or mongomock-motor). It is opened before the user's own
    ``lifespan`` and closed after it; meanwhile the bridge is ``app.bridge``, ``app.state.bridge``
    and ``request.state.bridge``. ``documents`` are the models to prepare, and ``limits`` the
    bounds, as for `connect`.
    Without a database the application is for streams and JSON of any other origin. ``max_body``
    is the largest JSON body that a handler's argument is read from, in bytes; a larger one is a
    413. ``routes``, ``middleware``, ``exception_handlers``, ``lifespan`` and ``debug`` are
    Starlette's: https://www.starlette.io/applications/
    """

    def __init__(
        self,
        database: Any = None,
        *,
        routes: Sequence[BaseRoute] | None = None,
        middleware: Sequence[Middleware] | None = None,
        exception_handlers: Mapping[Any, Any] | None = None,
        lifespan: Callable[[Any], AbstractAsyncContextManager[Any]] | None = None,
        debug: bool = False,
        documents: Iterable[type[Document]] | None = None,
        limits: Limits | None = None,
        max_body: int = 1024 * 1024,
    ) -> None:
        self._database = database
        self._documents = None if documents is None else list(documents)
        self._limits = limits
        if inspect.isasyncgenfunction(lifespan):  # Starlette takes it without the decorator too
            lifespan = asynccontextmanager(lifespan)
        self._lifespan = lifespan
        self._bridge: Bridge | None = None
        self._serves_module = False
        self.max_body = max_body
        super().__init__(
            debug=debug,
            routes=routes,
            middleware=middleware,
            exception_handlers={**_EXCEPTION_HANDLERS, **(exception_handlers or {})},
            lifespan=self._open,
        )

    @property
    def bridge(self) -> Bridge:
        """The open bridge to the database. Raises `NotBound` outside the application's lifespan."""
        if self._bridge is None:
            why = "App(database=…) was given none" if self._database is None else "it is not open"
            raise errors.NotBound(
                f"the application has no bridge: {why}. It is open over the lifespan: run the "
                "application in an ASGI server with lifespan events on, or in a `test_client`."
            )
        return self._bridge

    @asynccontextmanager
    async def _open(self, app: Starlette) -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            stack.enter_context(guard())
            if self._database is not None:
                from ..bridge import connect

                connecting = connect(self._database, documents=self._documents, limits=self._limits)
                self._bridge = self.state.bridge = await stack.enter_async_context(connecting)
                stack.callback(self._forget)
            state: Mapping[str, Any] | None = None
            if self._lifespan is not None:
                state = await stack.enter_async_context(self._lifespan(app))
            # Beside the application's state also in every request's, as `lifespan` has it.
            yield state if self._bridge is None else {"bridge": self._bridge, **(state or {})}

    def _forget(self) -> None:
        self._bridge = None
        del self.state.bridge

    # -- routes ---------------------------------------------------------------------------------

    def get(
        self, path: str, *, status_code: int = 200, name: str | None = None
    ) -> Callable[[Handler], Handler]:
        """Declare a handler for GET (and HEAD) requests; the function itself is returned.

        ``status_code`` is for results that are not responses themselves, ``name`` is for
        ``url_for`` and defaults to the function's. Raises `HandlerInvalid` for a handler that no
        request could call.
        """
        return self._declare("GET", path, status_code, name)

    def post(
        self, path: str, *, status_code: int = 200, name: str | None = None
    ) -> Callable[[Handler], Handler]:
        """Declare a handler for POST requests; see `get`."""
        return self._declare("POST", path, status_code, name)

    def put(
        self, path: str, *, status_code: int = 200, name: str | None = None
    ) -> Callable[[Handler], Handler]:
        """Declare a handler for PUT requests; see `get`."""
        return self._declare("PUT", path, status_code, name)

    def patch(
        self, path: str, *, status_code: int = 200, name: str | None = None
    ) -> Callable[[Handler], Handler]:
        """Declare a handler for PATCH requests; see `get`."""
        return self._declare("PATCH", path, status_code, name)

    def delete(
        self, path: str, *, status_code: int = 200, name: str | None = None
    ) -> Callable[[Handler], Handler]:
        """Declare a handler for DELETE requests; see `get`."""
        return self._declare("DELETE", path, status_code, name)

    def live(
        self,
        path: str,
        model: type[Document],
        *,
        filter: Any = None,
        sort: Any = None,
        limit: int | None = None,
        view: type[BaseModel] | None = None,
        authorize: Authorize | None = None,
        owner: Callable[[Request], Any] | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        """Serve a live query of a model at a path: what matches now, and every change after.

        The browser's side of it is a module that the application serves from then on:
        ``import { live } from "/data-bridge/live.js"``.

        Args:
            filter: a MongoDB filter; or a function of the request, plain or async, that gives one
                or refuses with an HTTPException (401, 403) or a PermissionError. One that gives
                ``None`` refuses too: everything is ``{}``.
            sort, limit, view: as of ``Document.live``.
            authorize: a function of a ``LiveEvent`` and the request, plain or async, that says
                whether this client may see it. It costs what everybody shares otherwise.
            owner: a function of the request that says whose stream it is, for
                ``close_streams(owner=…)``.
            name: for ``url_for``.
            options: as of ``EventSourceResponse``.
        """
        endpoint = live_endpoint(
            model,
            filter=filter,
            sort=sort,
            limit=limit,
            view=view,
            authorize=authorize,
            owner=owner,
            **options,
        )
        self.add_route(path, endpoint, methods=["GET"], name=name or path.strip("/"))
        if not self._serves_module:
            self._serves_module = True
            self.mount("/data-bridge", StaticFiles(directory=_STATIC), name="data-bridge")

    def _declare(
        self, method: str, path: str, status_code: int, name: str | None
    ) -> Callable[[Handler], Handler]:
        def declare(handler: Handler) -> Handler:
            # Names at the place of the declaration, for annotations that are strings.
            namespace = sys._getframe(1).f_locals
            endpoint = _Endpoint(handler, method, path, status_code, self.max_body)
            route = Route(
                path, endpoint, methods=[method], name=name or getattr(handler, "__name__", path)
            )
            endpoint.bind(route.param_convertors, namespace)
            self.router.routes.append(route)
            return handler

        return declare


class _Endpoint:
    """One handler as an ASGI application: bind the arguments, call it, send what it returns."""

    def __init__(
        self, handler: Callable[..., Any], method: str, path: str, status_code: int, max_body: int
    ) -> None:
        self.handler = handler
        self.method = method
        self.where = f"{method} {path}"
        self.status_code = status_code
        self.max_body = max_body
        self._is_async = _is_async(handler)

    def bind(self, path_names: Iterable[str], namespace: Mapping[str, Any]) -> None:
        if isinstance(self.handler, type):
            raise errors.HandlerInvalid(
                f"handler {qualified_name(self.handler)} of {self.where} is a class; declare an "
                "endpoint class with app.add_route(path, endpoint)."
            )
        self._binding = Binding(
            self.handler,
            self.where,
            path_names=frozenset(path_names),
            has_body=self.method != "GET",
            namespace=namespace,
        )
        if _is_generator(self.handler):
            raise errors.HandlerInvalid(
                f"{self._binding.name} is a generator function. Put the generator inside of it "
                "and return EventSourceResponse(generate())."
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # In two steps, so that a stream that is open for hours keeps nothing of the first alive.
        response = await self._response(scope, receive, send)
        await response(scope, receive, send)

    async def _response(self, scope: Scope, receive: Receive, send: Send) -> Response:
        if self._binding.body is not None:
            receive = limited(receive, self.max_body)
        args, kwargs = await self._binding(Request(scope, receive, send), self.max_body)
        if self._is_async:
            result = await self.handler(*args, **kwargs)
        else:
            result = await run_in_threadpool(self.handler, *args, **kwargs)
        return result if isinstance(result, Response) else self._json(result)

    def _json(self, result: Any) -> Response:
        if self.status_code in _NO_BODY:
            if result is not None:
                raise self._wrong(result, f"a {self.status_code} response has no body; return None")
            return Response(status_code=self.status_code)
        remedy = _remedy(result)
        if remedy is not None:
            raise self._wrong(result, remedy)
        try:
            content = _ANY.to_json(result, fallback=_bson)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._wrong(
                result,
                "it has no JSON form. Return a pydantic model, a dict or list of plain and BSON "
                f"values, or a Response ({error})",
            ) from error
        return Response(content, self.status_code, media_type="application/json")

    def _wrong(self, result: Any, remedy: str) -> errors.ResultInvalid:
        kind = type(result)
        return errors.ResultInvalid(
            f"{self._binding.name} returned {kind.__module__}.{kind.__qualname__}: {remedy}."
        )


def _is_async(handler: Any) -> bool:
    while hasattr(handler, "func") and not inspect.isroutine(handler):  # functools.partial
        handler = handler.func
    return inspect.iscoroutinefunction(handler) or (
        not inspect.isroutine(handler) and inspect.iscoroutinefunction(type(handler).__call__)
    )


def _is_generator(function: Any) -> bool:
    return inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function)


# -- results ------------------------------------------------------------------------------------

# Each model serialises as it declares itself; NaN is no JSON, and bytes need not be text.
_ANY = SchemaSerializer(
    cs.any_schema(), cs.CoreConfig(ser_json_inf_nan="null", ser_json_bytes="base64")
)


def _bson(value: Any) -> Any:
    """The JSON form of a BSON value that pydantic does not know, as in the JSON of documents."""
    ready = json_ready(value)
    if ready is value:
        kind = type(value)
        raise TypeError(f"a {kind.__module__}.{kind.__qualname__} has no JSON form")
    return ready


def _remedy(result: Any) -> str | None:
    """What to do instead, for results that would only seem to have a JSON form, or never have."""
    from .sse import ServerSentEvent

    if isinstance(result, ServerSentEvent):
        return "yield events from an async generator and return EventSourceResponse(generate())"
    if hasattr(type(result), "__aiter__"):
        return "wrap it in EventSourceResponse(...)"
    if inspect.iscoroutine(result):
        result.close()  # it is never going to be awaited, and that is said already
        return "it has to be awaited: make the handler `async def` and use `await`"
    if inspect.isawaitable(result):
        return "it has to be awaited: make the handler `async def` and use `await`"
    if isinstance(result, BaseException):
        return "raise it instead"
    if isinstance(result, Iterator):
        return "return a list, or stream an async generator with EventSourceResponse(...)"
    if isinstance(result, bytes | bytearray | memoryview):
        return "wrap it in Response(...)"
    return None


# -- exceptions ---------------------------------------------------------------------------------
# Coroutine functions all, because Starlette calls plain ones in a thread.


def _detail(status_code: int, detail: Any, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"detail": detail}, status_code, headers)


async def _http_exception(request: Request, error: HTTPException) -> Response:
    if error.status_code in _NO_BODY:
        return Response(status_code=error.status_code, headers=error.headers)
    return _detail(error.status_code, error.detail, error.headers)


async def _request_invalid(request: Request, error: RequestInvalid) -> Response:
    return _detail(error.status_code, error.errors)


async def _client_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody is there to read it


async def _invalid_resume_token(request: Request, error: errors.InvalidResumeToken) -> Response:
    return _detail(400, str(error))


async def _document_not_found(request: Request, error: errors.DocumentNotFound) -> Response:
    return _detail(404, str(error))


async def _duplicate_key(request: Request, error: errors.DuplicateKey) -> Response:
    return _detail(409, str(error))


async def _server_unreachable(request: Request, error: errors.ServerUnreachable) -> Response:
    logger.error("%s %s: %s", request.method, request.url.path, error)
    # A browser's EventSource gives up for good on a 503; an empty stream makes it come back.
    # https://html.spec.whatwg.org/multipage/server-sent-events.html#sse-processing-model
    if "text/event-stream" in request.headers.get("accept", ""):
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        return Response(b"retry: 3000\n\n", headers=headers)
    return _detail(503, "The database does not answer at the moment", {"Retry-After": "3"})


async def _result_invalid(request: Request, error: errors.ResultInvalid) -> Response:
    if request.app.debug:
        raise error
    logger.error("%s", error, exc_info=error.__cause__)
    return _detail(500, "Internal Server Error")


_EXCEPTION_HANDLERS: Mapping[Any, Any] = {
    HTTPException: _http_exception,
    RequestInvalid: _request_invalid,
    ClientDisconnect: _client_disconnect,
    errors.InvalidResumeToken: _invalid_resume_token,
    errors.DocumentNotFound: _document_not_found,
    errors.DuplicateKey: _duplicate_key,
    errors.ServerUnreachable: _server_unreachable,
    errors.ResultInvalid: _result_invalid,
}
