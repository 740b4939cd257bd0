"""A MongoDB filter, as a query for the server and as a predicate on decoded documents.

The predicate means exactly what the server means (null and missing, arrays, comparison brackets,
number types). What lies beyond the subset is still a filter, only not one to evaluate in process.

https://www.mongodb.com/docs/manual/reference/operator/query/
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn
from uuid import UUID

import bson
from bson import DBRef, Decimal128, Int64, ObjectId, Regex
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from bson.errors import BSONError

from .errors import InvalidFilter
from .order import (
    ARRAY,
    BOOL,
    MISSING,
    NULL,
    NUMBER,
    OBJECT,
    Key,
    bracket,
    integer,
    key,
    number,
    regex_options,
)
from .predicate import (
    NOTHING,
    Beyond,
    Constraint,
    Document,
    Node,
    OnDocument,
    all_of,
    any_of,
    as_document,
    at,
    comparison,
    equality,
    in_array,
    negated,
    one_of,
    parts_of,
    pattern,
    remainder,
    type_in,
    values_at,
)
from .regex import Malformed

__all__ = ["Filter", "index_keys"]


class Filter:
    """A valid MongoDB filter.

    `query` is a mapping as `find` takes it. It is copied; later changes to it have no effect.

    Raises `InvalidFilter` where the server would reject it, with the operator and the path.

    https://www.mongodb.com/docs/manual/tutorial/query-documents/
    """

    __slots__ = ("beyond", "equalities", "fields", "key", "matches", "query")

    query: dict[str, Any]
    """The filter for the server, not to be changed."""

    key: bytes
    """Equal for filters that are the same but for the order of their top-level fields."""

    beyond: str | None
    """Why only the server can evaluate it, or `None`."""

    matches: OnDocument
    """Whether a document matches. It takes a document as PyMongo decodes it with zone-aware dates
    and standard UUIDs, and raises `InvalidFilter` when the filter is `beyond` the subset."""

    equalities: tuple[Constraint, ...]
    """Paths with the keys of values of which a matching document has one, in `index_keys`."""

    fields: frozenset[str]
    """The top-level fields that `matches` reads."""

    def __init__(self, query: Mapping[str, Any]) -> None:
        if not isinstance(query, Mapping):
            raise InvalidFilter(f"a filter is a mapping, not {type(query).__name__}")
        self.query = _plain(query, 0)
        try:
            self.key = bson.encode(dict(sorted(self.query.items())), codec_options=_CODEC)
        except (BSONError, OverflowError, TypeError, ValueError) as error:
            raise InvalidFilter(f"the filter cannot be stored as BSON: {error}") from error
        compiler = _Compiler()
        node = compiler.conjunction(self.query)
        self.beyond = compiler.beyond
        self.matches = self._refuse if compiler.beyond else node.on_document
        self.equalities = node.equalities
        self.fields = frozenset(compiler.fields)

    @property
    def in_process(self) -> bool:
        """Whether `matches` can be used; otherwise the filter has to go to the server."""
        return self.beyond is None

    def _refuse(self, document: Document) -> NoReturn:
        raise InvalidFilter(f"this filter is evaluated by the server only: {self.beyond}")

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Filter) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Filter({self.query!r})"


def index_keys(document: Document, path: str) -> Collection[Key]:
    """The keys by which `document` can satisfy an equality on `path`.

    If a filter matches the document, each of its `equalities` on this path has a key among them.
    """
    parts = parts_of(path)
    if len(parts) == 1:
        value = document.get(path, MISSING)
        if value.__class__ is not list:
            return () if value.__class__ is dict else (key(value),)
    return {key(v) for v in values_at(document, parts) if bracket(v) not in (OBJECT, ARRAY)}


# -- the query, as plain values -----------------------------------------------------------------

_CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True, uuid_representation=UuidRepresentation.STANDARD
)
_PLAIN = frozenset({str, bool, float, type(None), ObjectId, Int64, Decimal128, UUID})
_DEEPEST = 180  # of the server's 200 levels, some go to the command around the filter


def _plain(value: Any, depth: int) -> Any:
    """`value` as a round trip through BSON gives it, but with database references as documents."""
    if depth > _DEEPEST:
        raise InvalidFilter(f"the filter is nested more than {_DEEPEST} levels deep")
    if isinstance(value, DBRef):
        value = value.as_doc()
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise InvalidFilter(f"a field name in a filter is a string, not {name!r}")
        return {str(name): _plain(v, depth + 1) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, depth + 1) for v in value]
    if type(value) in _PLAIN:
        return value
    try:
        return bson.decode(bson.encode({"": value}, codec_options=_CODEC), _CODEC)[""]
    except (BSONError, OverflowError, TypeError, ValueError) as error:
        raise InvalidFilter(f"{value!r} in a filter is no BSON value: {error}") from error


# -- the language -------------------------------------------------------------------------------

_BEYOND_DOCUMENTS = frozenset(
    {"$alwaysFalse", "$alwaysTrue", "$db", "$expr", "$id", "$jsonSchema", "$ref", "$sampleRate"}
    | {"$text", "$where"}
)
_ROOT_ONLY = frozenset({"$expr", "$text", "$where"})
_GEOMETRIC = frozenset({"$geoIntersects", "$geoNear", "$geoWithin", "$near", "$nearSphere"})
_BEYOND_FIELDS = _GEOMETRIC | {"$bitsAllClear", "$bitsAllSet", "$bitsAnyClear", "$bitsAnySet"}
_BEYOND_FIELDS |= {"$within"}
_OF_FIELDS = frozenset(
    {"$all", "$elemMatch", "$eq", "$exists", "$gt", "$gte", "$in", "$lt", "$lte", "$mod", "$ne"}
    | {"$nin", "$not", "$options", "$regex", "$size", "$type"}
    | _BEYOND_FIELDS
)
_OF_DOCUMENTS = frozenset({"$and", "$comment", "$nor", "$or"}) | _BEYOND_DOCUMENTS
# https://www.mongodb.com/docs/manual/reference/bson-types/
_TYPES = {
    **{"double": 1, "string": 2, "object": 3, "array": 4, "binData": 5, "undefined": 6},
    **{"objectId": 7, "bool": 8, "date": 9, "null": 10, "regex": 11, "dbPointer": 12},
    **{"javascript": 13, "symbol": 14, "javascriptWithScope": 15, "int": 16, "timestamp": 17},
    **{"long": 18, "decimal": 19, "minKey": -1, "maxKey": 127},
}
_INDISTINCT = frozenset({6, 12, 14})  # PyMongo decodes them as null, reference and string
_LONGEST_PATH = 100  # field names


def _invalid(name: str, path: str | None, problem: str) -> InvalidFilter:
    where = f" on {path!r}" if path is not None else ""
    return InvalidFilter(f"the filter is not valid: {name}{where} {problem}")


def _first(value: Any) -> str:
    """The name of the first field of a document, or the empty string."""
    return next(iter(value), "") if isinstance(value, dict) else ""


def _is_reference(value: dict[str, Any]) -> bool:
    return "$ref" in value and "$id" in value


def _is_expression(value: Any) -> bool:
    """Whether `value` is a document of operators rather than a literal."""
    return _first(value).startswith("$") and not _is_reference(value)


def _integer(value: Any, *, whole: bool = False) -> int | None:
    """`value` without its fraction; `None` if it is not a number of 64 bits, or not `whole`."""
    if bracket(value) != NUMBER:
        return None
    truncated = integer(number(value))
    return truncated if not whole or truncated == number(value) else None


class _Compiler:
    """One pass over a filter, which finds what is invalid even after what is beyond the subset."""

    def __init__(self) -> None:
        self.beyond: str | None = None
        self.fields: set[str] = set()

    def conjunction(self, query: dict[str, Any], *, inside: bool = False) -> Node:
        """A query document; `inside` of `$elemMatch` it applies to an element."""
        nodes: list[Node] = []
        for name, operand in query.items():
            try:
                if name.startswith("$"):
                    nodes += self.of_documents(name, operand, inside)
                else:
                    nodes += self.of_field(name, operand, inside)
            except Beyond as reason:
                self.beyond = self.beyond or str(reason)
        return all_of(nodes)

    def of_documents(self, name: str, operand: Any, inside: bool) -> list[Node]:
        if name not in _OF_DOCUMENTS and not name.startswith("$_internal"):
            raise _invalid(name, None, "is not an operator for documents")
        if inside and name in _ROOT_ONLY:
            raise _invalid(name, None, "applies only to the top-level document")
        if name == "$comment":
            return []
        if name not in ("$and", "$nor", "$or"):
            raise Beyond(name)
        if not isinstance(operand, list) or not operand:
            raise _invalid(name, None, "needs a nonempty array")
        if not all(isinstance(query, dict) for query in operand):
            raise _invalid(name, None, "needs an array of documents")
        nodes = [self.conjunction(query, inside=inside) for query in operand]
        if name == "$and":
            return nodes
        return [any_of(nodes) if name == "$or" else negated(any_of(nodes))]

    def of_field(self, path: str, operand: Any, inside: bool) -> list[Node]:
        parts = parts_of(path)
        if not inside:
            self.fields.add(parts[0])
        if "" in parts or len(parts) > _LONGEST_PATH:
            self.beyond = self.beyond or f"the path {path!r}"
        if _is_expression(operand):
            return self.operators(path, operand)
        if isinstance(operand, Regex):
            return [self.regex(path, operand.pattern, regex_options(operand))]
        return [equality(path, operand)]

    def operators(self, path: str, operators: dict[str, Any]) -> list[Node]:
        if not _GEOMETRIC.isdisjoint(operators):
            raise Beyond(next(name for name in operators if name in _GEOMETRIC))
        nodes: list[Node] = []
        for name, operand in operators.items():
            if name not in _OF_FIELDS and not name.startswith("$_internal"):
                raise _invalid(name, path, "is not an operator for fields")
            try:
                nodes += self.operator(path, name, operand, operators)
            except Beyond as reason:
                self.beyond = self.beyond or str(reason)
        return nodes

    def operator(self, path: str, name: str, operand: Any, siblings: dict[str, Any]) -> list[Node]:
        match name:
            case "$eq":
                return [equality(path, operand)]
            case "$gt" | "$gte" | "$lt" | "$lte" | "$ne" if isinstance(operand, Regex):
                raise _invalid(name, path, "cannot take a regular expression")
            case "$ne":
                return [negated(equality(path, operand))]
            case "$gt" | "$gte" | "$lt" | "$lte":
                return [at(path, comparison(name, operand))]
            case "$in":
                return [self.membership(path, name, operand)]
            case "$nin":
                return [negated(self.membership(path, name, operand))]
            case "$exists":
                there = bool(operand) if bracket(operand) in (BOOL, NULL) else True
                if bracket(operand) == NUMBER:
                    there = number(operand) != 0
                exists = at(path, lambda value: value is not MISSING, spread=False)
                return [exists if there else negated(exists)]
            case "$not":
                return [self.negation(path, operand)]
            case "$size":
                return [self.size(path, operand)]
            case "$all":
                return self.every(path, operand)
            case "$elemMatch":
                return [self.element(path, operand)]
            case "$mod":
                return [self.modulo(path, operand)]
            case "$type":
                return [self.type(path, operand)]
            case "$regex":
                return [self.regex(path, *self.regex_arguments(path, siblings))]
            case "$options":
                if "$regex" not in siblings:
                    raise _invalid(name, path, "needs a $regex")
                return []
        raise Beyond(f"{name} on {path!r}")

    def membership(self, path: str, name: str, operand: Any) -> Node:
        if not isinstance(operand, list):
            raise _invalid(name, path, "needs an array")
        if any(map(_is_expression, operand)):
            raise _invalid(name, path, "cannot contain operators")
        try:
            return one_of(path, operand)
        except Malformed as problem:
            raise _invalid(name, path, str(problem)) from problem

    def negation(self, path: str, operand: Any) -> Node:
        if isinstance(operand, Regex):
            return negated(self.regex(path, operand.pattern, regex_options(operand)))
        if not isinstance(operand, dict) or not operand:
            raise _invalid("$not", path, "needs a regular expression or a nonempty document")
        return negated(all_of(self.operators(path, operand)))

    def size(self, path: str, operand: Any) -> Node:
        size = _integer(operand, whole=True)
        if size is None or not 0 <= size < 2**31:
            raise _invalid("$size", path, "needs a non-negative 32-bit integer")
        return at(path, lambda v: v.__class__ is list and len(v) == size, spread=False)

    def every(self, path: str, operand: Any) -> list[Node]:
        if not isinstance(operand, list):
            raise _invalid("$all", path, "needs an array")
        if not operand:
            return [NOTHING]
        if _first(operand[0]) == "$elemMatch":
            if any(_first(v) != "$elemMatch" for v in operand):
                raise _invalid("$all", path, "cannot mix $elemMatch with anything else")
            return [self.element(path, v["$elemMatch"]) for v in operand]
        if any(_first(v) in _OF_FIELDS for v in operand):
            raise _invalid("$all", path, "cannot contain operators other than $elemMatch")
        return [
            self.regex(path, v.pattern, regex_options(v))
            if isinstance(v, Regex)
            else equality(path, v)
            for v in operand
        ]

    def element(self, path: str, operand: Any) -> Node:
        if not isinstance(operand, dict):
            raise _invalid("$elemMatch", path, "needs a document")
        first = _first(operand)
        reference = not {"$ref", "$id", "$db"}.isdisjoint(operand)
        if first.startswith("$") and first not in _OF_DOCUMENTS and not reference:
            return in_array(path, all_of(self.operators(path, operand)).on_value)
        on_document = self.conjunction(operand, inside=True).on_document

        def on_element(element: Any) -> bool:
            document = as_document(element)
            return document is not None and on_document(document)

        return in_array(path, on_element)

    def modulo(self, path: str, operand: Any) -> Node:
        if not isinstance(operand, list) or len(operand) != 2:
            raise _invalid("$mod", path, "needs an array of divisor and remainder")
        divisor, rest = (_integer(v) for v in operand)
        if not divisor or rest is None:
            raise _invalid("$mod", path, "needs two 64-bit integers, the divisor not 0")
        return at(path, remainder(divisor, rest))

    def type(self, path: str, operand: Any) -> Node:
        types: set[int] = set()
        for v in operand if isinstance(operand, list) else [operand]:
            if v == "number":
                types |= {1, 16, 18, 19}
                continue
            code = _TYPES.get(v) if isinstance(v, str) else _integer(v, whole=True)
            if code is None or code not in _TYPES.values():
                raise _invalid("$type", path, f"does not know the type {v!r}")
            types.add(code)
        if not types:
            raise _invalid("$type", path, "needs at least one type")
        if not types.isdisjoint(_INDISTINCT):
            raise Beyond(f"$type on {path!r} with a deprecated type")
        return at(path, type_in(frozenset(types)))

    def regex_arguments(self, path: str, siblings: dict[str, Any]) -> tuple[str, str]:
        source, options = "", ""
        for name, operand in siblings.items():  # in this order, as the server does
            if name == "$regex" and isinstance(operand, Regex):
                source, letters = operand.pattern, regex_options(operand)
                if options and letters:
                    raise _invalid("$options", path, "sets options that $regex has set")
                options = letters or options
            elif name == "$regex":
                if not isinstance(operand, str):
                    raise _invalid(name, path, "needs a string or a regular expression")
                source = operand
            elif name == "$options":
                if not isinstance(operand, str):
                    raise _invalid(name, path, "needs a string")
                if options:
                    raise _invalid(name, path, "sets options that $regex has set")
                options = operand
        return source, options

    def regex(self, path: str, source: str, options: str) -> Node:
        try:
            return at(path, pattern(source, options))
        except Malformed as problem:
            raise _invalid("$regex", path, str(problem)) from problem
