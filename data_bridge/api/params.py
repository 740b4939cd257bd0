"""Where each argument of a handler comes from, decided once, when its route is declared.

    async def orders(shop: str, limit: int = 20, tag: list[str] = Query([])): ...
    async def events(last_event_id: str = Header(None, alias="Last-Event-ID")): ...
    async def status(if_none_match: Annotated[str | None, Header()] = None): ...

A name of the route's path comes from the path, a ``Request`` is the request, a pydantic model is
the JSON body, and everything else comes from the query. What arrives is text; pydantic turns it
into what the annotation says, and everything that does not fit is reported at once.
https://docs.pydantic.dev/latest/concepts/conversion_table/
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import types
import typing
from collections import abc, deque
from collections.abc import Callable, Collection, Mapping
from decimal import DecimalException
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from bson import Decimal128, Int64, ObjectId
from pydantic import AfterValidator, BaseModel, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.types import Message, Receive

from ..errors import DataBridgeError, HandlerInvalid

__all__ = ["Binding", "Body", "Header", "Path", "Query", "RequestInvalid"]

Place = Literal["path", "query", "header", "body", "request"]

_REQUIRED: Final[Any] = ...
_ABSENT: Final = object()
_SHOWN = 100  # characters of a refused value that its report repeats
_MANY = (list, set, frozenset, tuple, deque, abc.Sequence, abc.Set, abc.Collection, abc.Iterable)
_UNIONS = (Union, types.UnionType)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What ``Header(…)`` and its like leave in a signature."""

    place: Place
    default: Any = _REQUIRED
    alias: str | None = None


# Functions that return Any, so that `last_event_id: str = Header(None)` passes a type checker.


def Header(default: Any = ..., *, alias: str | None = None) -> Any:
    """Take an argument from a request header.

    ``default`` is used as it is when the header is absent (``...``: it must be there). ``alias``
    is the header's name; otherwise it is the argument's with ``-`` for ``_``, in any case. Values
    are read as UTF-8, as browsers send ``Last-Event-ID``
    (https://html.spec.whatwg.org/multipage/server-sent-events.html#the-last-event-id-header),
    and as Latin-1 where that fails.
    """
    return Source("header", default, alias)


def Query(default: Any = ..., *, alias: str | None = None) -> Any:
    """Take an argument from the query string; a list takes every value of a repeated name.

    ``default`` is used as it is when the name is absent (``...``: it must be there); ``alias`` is
    the name in the query where it differs from the argument's.
    """
    return Source("query", default, alias)


def Path(*, alias: str | None = None) -> Any:
    """Take an argument from the route's path; ``alias`` is its name there, if it differs."""
    return Source("path", _REQUIRED, alias)


def Body(default: Any = ...) -> Any:
    """Take an argument from the JSON body, whatever its type; models need no ``Body``."""
    return Source("body", default)


_MARKERS: Mapping[Any, Source] = {
    Header: Source("header"),
    Query: Source("query"),
    Path: Source("path"),
    Body: Source("body"),
}


class RequestInvalid(DataBridgeError, HTTPException):
    """A request does not fit its handler's signature; ``errors`` lists every misfit.

    422, or 400 where the body is no JSON at all.
    """

    def __init__(self, errors: list[dict[str, Any]], status_code: int) -> None:
        HTTPException.__init__(
            self, status_code, "; ".join(f"{e['in']} {e['name']}: {e['message']}" for e in errors)
        )
        self.errors = errors


# -- BSON types in a signature ------------------------------------------------------------------
# Those that have a form as text. In a model, `Document` and `Model` know them all.


def _object_id(value: Any) -> ObjectId:
    if isinstance(value, ObjectId):
        return value
    if isinstance(value, str) and ObjectId.is_valid(value):
        return ObjectId(value)
    raise PydanticCustomError("object_id", "Input should be an ObjectId: 24 hexadecimal characters")


def _decimal128(value: Any) -> Decimal128:
    try:
        return value if isinstance(value, Decimal128) else Decimal128(str(value))
    except (DecimalException, ValueError):
        raise PydanticCustomError("decimal128", "Input should be a valid Decimal128") from None


_BSON: Mapping[Any, Any] = {
    ObjectId: Annotated[ObjectId, PlainValidator(_object_id)],
    Decimal128: Annotated[Decimal128, PlainValidator(_decimal128)],
    Int64: Annotated[int, Field(ge=-(2**63), lt=2**63), AfterValidator(Int64)],
}


def _with_bson(annotation: Any) -> Any:
    """The annotation with each BSON type that pydantic does not know replaced by one it does."""
    if isinstance(annotation, type) and annotation in _BSON:
        return _BSON[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is None or origin is Literal:
        return annotation
    if origin is Annotated:
        return Annotated[_with_bson(args[0]), *annotation.__metadata__]
    replaced = tuple(_with_bson(arg) for arg in args)
    if replaced == args:
        return annotation
    return Union[replaced] if origin in _UNIONS else origin[replaced]  # noqa: UP007


# -- reading a signature ------------------------------------------------------------------------


def _bare(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if isinstance(annotation, typing.NewType):
        return _bare(annotation.__supertype__)
    return annotation


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a union, or the annotation itself."""
    annotation = _bare(annotation)
    if get_origin(annotation) in _UNIONS:
        return [member for arg in get_args(annotation) for member in _members(arg)]
    return [annotation]


def _is_many(annotation: Any) -> bool:
    return any((get_origin(m) or m) in _MANY for m in _members(annotation))


def _is_structured(annotation: Any) -> bool:
    """Whether text cannot hold it, so that it has to be the JSON body."""
    for member in _members(annotation):
        kind = get_origin(member) or member
        if kind in _MANY:
            if any(_is_structured(arg) for arg in get_args(member)):
                return True
        elif isinstance(kind, type) and (
            issubclass(kind, BaseModel | dict)
            or kind is abc.Mapping
            or dataclasses.is_dataclass(kind)
            or typing.is_typeddict(kind)
        ):
            return True
    return False


@dataclasses.dataclass(frozen=True, slots=True)
class _Argument:
    name: str
    place: Place
    key: str  # its name in the request
    many: bool
    positional: bool
    default: Any
    adapter: TypeAdapter[Any] | None

    def read(self, request: Request) -> Any:
        """The text as it came, or _ABSENT."""
        if self.place == "path":
            return request.path_params.get(self.key, _ABSENT)
        if self.place == "query":
            query = request.query_params
            if self.many:
                return query.getlist(self.key) or _ABSENT
            return query.get(self.key, _ABSENT)
        # What EventSource sends is UTF-8, and Starlette's own headers are Latin-1.
        name = self.key.encode("latin-1")
        values = [_text(value) for key, value in request.headers.raw if key.lower() == name]
        if not values:
            return _ABSENT
        return values if self.many else values[0]

    def validated(self, raw: Any) -> Any:
        return raw if self.adapter is None else self.adapter.validate_python(raw)

    def fallback(self) -> Any:
        # A list that one request changes must not be the next one's default.
        mutable = isinstance(self.default, list | dict | set)
        return copy.copy(self.default) if mutable else self.default


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


class Binding:
    """A handler's arguments and where each comes from.

    ``where`` names the route in messages ("GET /orders/{id}"), ``path_names`` are the names in its
    path, ``has_body`` says whether its method has a request body, and ``namespace`` are the names
    at the place of the declaration: annotations that are strings (``from __future__ import
    annotations``) may use them. Raises `HandlerInvalid`, naming handler and argument, for an
    argument that nothing in a request can fill.
    """

    __slots__ = ("_arguments", "body", "name", "takes_request")

    def __init__(
        self,
        handler: Callable[..., Any],
        where: str,
        *,
        path_names: Collection[str] = (),
        has_body: bool = True,
        namespace: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = f"handler {qualified_name(handler)} of {where}"
        self._arguments: list[_Argument] = []
        self.body: _Argument | None = None
        self.takes_request = False
        try:
            signature = inspect.signature(handler)
        except (NameError, TypeError, ValueError) as error:
            raise HandlerInvalid(f"{self.name}: its signature cannot be read: {error}") from error
        for parameter in signature.parameters.values():
            annotation = self._resolved(handler, parameter, namespace)
            argument = self._argument(parameter, annotation, frozenset(path_names))
            if argument.place == "body":
                self._check_body(argument, has_body)
                self.body = argument
            self.takes_request = self.takes_request or argument.place == "request"
            self._arguments.append(argument)

    def _refuse(self, argument: str, why: str) -> HandlerInvalid:
        return HandlerInvalid(f"{self.name}: argument {argument!r} {why}")

    def _resolved(
        self,
        handler: Callable[..., Any],
        parameter: inspect.Parameter,
        namespace: Mapping[str, Any] | None,
    ) -> Any:
        if parameter.annotation is inspect.Parameter.empty:
            return Any

        # One by one, through a stand-in, so that a name that does not exist is told with its
        # argument, and so that the return annotation need not exist at all.
        def stand_in() -> None: ...

        stand_in.__annotations__ = {"argument": parameter.annotation}
        try:
            hints = typing.get_type_hints(
                stand_in, _globals_of(handler), dict(namespace or {}), include_extras=True
            )
        except Exception as error:  # evaluating a string may raise anything
            raise self._refuse(
                parameter.name,
                f"has the annotation {parameter.annotation!r}, which cannot be evaluated "
                f"({type(error).__name__}: {error}). It has to be importable at run time: move it "
                "out of `if TYPE_CHECKING`, or to the module's top level.",
            ) from error
        return hints["argument"]

    def _argument(
        self, parameter: inspect.Parameter, annotation: Any, path_names: Collection[str]
    ) -> _Argument:
        name = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise self._refuse(name, f"is {stars}{name}: nothing in a request can fill it")
        positional = parameter.kind is parameter.POSITIONAL_ONLY
        kind = _bare(annotation)
        untyped = parameter.annotation is parameter.empty and name == "request"
        if kind in (Request, HTTPConnection) or (untyped and name not in path_names):
            return _Argument(name, "request", name, False, positional, _REQUIRED, None)
        if isinstance(kind, type) and issubclass(kind, HTTPConnection):
            raise self._refuse(name, f"is a {kind.__name__}: only starlette's Request is given")

        source = self._source(parameter, annotation, path_names)
        key = source.alias or name
        if source.place == "path" and key not in path_names:
            raise self._refuse(name, f"is from the path, which has no {{{key}}}")
        if source.place == "header":
            key = (source.alias or name.replace("_", "-")).lower()
            if not key.isascii() or not key.replace("-", "").replace("_", "").isalnum():
                raise self._refuse(name, f"has {key!r} for a header's name, which is no such name")
        if source.place != "body" and _is_structured(annotation):
            raise self._refuse(
                name, f"is from the {source.place}, which is text and cannot hold {annotation!r}"
            )
        try:
            adapter = TypeAdapter[Any](_with_bson(annotation))
        except (PydanticUserError, NameError, TypeError) as error:
            raise self._refuse(
                name,
                f"has the type {annotation!r}, which pydantic cannot validate. Use a type it "
                "knows, or Annotated[…] with a validator.",
            ) from error
        many = _is_many(annotation) and source.place in ("query", "header")
        return _Argument(name, source.place, key, many, positional, source.default, adapter)

    def _source(
        self, parameter: inspect.Parameter, annotation: Any, path_names: Collection[str]
    ) -> Source:
        default = _REQUIRED if parameter.default is parameter.empty else parameter.default
        marks = [default] if _is_mark(default) else []
        if get_origin(annotation) is Annotated:
            marks += [mark for mark in annotation.__metadata__ if _is_mark(mark)]
        if len(marks) > 1:
            raise self._refuse(parameter.name, "is given more than one source")
        if marks:
            mark = marks[0]
            source = mark if isinstance(mark, Source) else _MARKERS[mark]
            if source.default is _REQUIRED and not _is_mark(default):
                source = dataclasses.replace(source, default=default)
            return source
        if parameter.name in path_names:
            return Source("path")
        return Source("body" if _is_structured(annotation) else "query", default)

    def _check_body(self, argument: _Argument, has_body: bool) -> None:
        if not has_body:
            raise self._refuse(argument.name, "is the request's body, and this method has none")
        if self.body is not None:
            raise self._refuse(
                argument.name,
                f"is the request's body, and so is {self.body.name!r}; put both in one model",
            )

    async def __call__(
        self, request: Request, max_body: int | None = None
    ) -> tuple[list[Any], dict[str, Any]]:
        """The positional and named arguments for one request.

        ``request`` has to be made with `limited` where there is a body. Raises `RequestInvalid`
        with every misfit, and starlette's HTTPException 413 and 415 for a body that is not read.
        """
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        errors: list[dict[str, Any]] = []
        not_json = False
        for argument in self._arguments:
            value: Any = None
            try:
                if argument.place == "request":
                    value = request
                elif argument.place == "body":
                    value = await _read_body(argument, request, max_body)
                else:
                    raw = argument.read(request)
                    value = _ABSENT if raw is _ABSENT else argument.validated(raw)
            except ValidationError as error:
                not_json = not_json or error.errors()[0]["type"] == "json_invalid"
                errors += _reports(argument, error)
            if value is _ABSENT:
                value = argument.fallback()
                if value is _REQUIRED:
                    errors.append(_report(argument, argument.key, "Required, but absent", None))
            if argument.positional:
                args.append(value)
            else:
                kwargs[argument.name] = value
        if errors:
            raise RequestInvalid(errors, 400 if not_json else 422)
        return args, kwargs


def _is_mark(value: Any) -> bool:
    return isinstance(value, Source) or (
        isinstance(value, types.FunctionType) and value in _MARKERS
    )


def _unwrapped(handler: Any) -> Any:
    while True:
        if hasattr(handler, "__wrapped__"):
            handler = handler.__wrapped__
        elif hasattr(handler, "func") and not inspect.isroutine(handler):  # functools.partial
            handler = handler.func
        elif inspect.isroutine(handler) or isinstance(handler, type):
            return handler
        else:
            handler = type(handler).__call__


def _globals_of(handler: Any) -> dict[str, Any]:
    return getattr(_unwrapped(handler), "__globals__", {})


def qualified_name(handler: Any) -> str:
    """``module.name`` of a handler, for a message."""
    handler = _unwrapped(handler)
    name = getattr(handler, "__qualname__", type(handler).__qualname__)
    return f"{handler.__module__}.{name}".replace(".<locals>", "")


# -- the body -----------------------------------------------------------------------------------


def limited(receive: Receive, limit: int) -> Receive:
    """``receive``, raising HTTPException 413 as soon as a body is over ``limit`` bytes."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(limit)
        return message

    return counted


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"The body is larger than {limit} bytes")


async def _read_body(argument: _Argument, request: Request, limit: int | None) -> Any:
    length = request.headers.get("content-length", "")
    if limit is not None and length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise _too_large(limit)
    body = await request.body()
    if not body:
        return _ABSENT
    # Asking for the type also keeps other sites' forms out: they cannot send it unasked.
    # https://fetch.spec.whatwg.org/#cors-safelisted-request-header
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise HTTPException(415, "The body has to be JSON: send Content-Type: application/json")
    assert argument.adapter is not None
    return argument.adapter.validate_json(body)


# -- what did not fit ---------------------------------------------------------------------------


def _report(argument: _Argument, name: str, message: str, value: Any) -> dict[str, Any]:
    return {"in": argument.place, "name": name, "message": message, "input": _shown(value)}


def _reports(argument: _Argument, error: ValidationError) -> list[dict[str, Any]]:
    reports = []
    for misfit in error.errors(include_url=False, include_context=False):
        # In text, only places in a list tell more than the argument's name.
        body = argument.place == "body"
        path = [str(part) for part in misfit["loc"] if body or isinstance(part, int)]
        name = ".".join(path if body and path else [argument.key, *path])
        value = None if misfit["type"] in ("missing", "json_invalid") else misfit["input"]
        reports.append(_report(argument, name, misfit["msg"], value))
    return reports


def _shown(value: Any) -> Any:
    """A refused value as its report repeats it: scalars only, and no longer than need be."""
    if isinstance(value, str):
        text = value if len(value) <= _SHOWN else value[:_SHOWN] + "…"
        return text.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    return value if isinstance(value, float) and abs(value) < float("inf") else None
