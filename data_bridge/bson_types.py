"""BSON types as annotations of pydantic models, and Python values as BSON.

Nothing is patched: ``adapted`` rewrites the core schema of one model class while that class is
built, so reading a document costs what pydantic's own validation costs. ``encoded`` goes the other
way, by the values themselves.

https://www.mongodb.com/docs/manual/reference/bson-types/
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal, DecimalException
from enum import Enum
from functools import lru_cache, partial
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from pathlib import PurePath
from typing import Any, cast
from uuid import UUID

from bson import (
    Binary,
    Code,
    DatetimeMS,
    DBRef,
    Decimal128,
    Int64,
    MaxKey,
    MinKey,
    ObjectId,
    Regex,
    Timestamp,
)
from bson.binary import UUID_SUBTYPE
from bson.json_util import RELAXED_JSON_OPTIONS, default, loads
from bson.raw_bson import RawBSONDocument
from bson.tz_util import utc
from pydantic import AliasChoices, BaseModel, GetCoreSchemaHandler, RootModel, TypeAdapter
from pydantic.networks import AnyUrl
from pydantic.types import SecretBytes, SecretStr
from pydantic_core import CoreSchema, MultiHostUrl, PydanticSerializationError, Url
from pydantic_core import core_schema as cs

__all__ = ["Unstorable", "adapted", "encoded", "json_ready", "stored_names"]

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


# -- reading: the schema of each type -----------------------------------------------------------
# JSON has no form for most of these. What reads naturally in a browser is a string (ObjectId,
# Decimal128, Binary as base64) or a number (Int64, DatetimeMS in milliseconds); the rest are
# written as relaxed Extended JSON:
# https://www.mongodb.com/docs/manual/reference/mongodb-extended-json/


def _extended(value: Any) -> Any:
    return default(value, RELAXED_JSON_OPTIONS)


def _from_extended(cls: type[Any], value: dict[str, Any]) -> Any:
    try:
        found = loads(json.dumps(value), json_options=RELAXED_JSON_OPTIONS)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"not the Extended JSON of a {cls.__name__}") from error
    if not isinstance(found, cls):
        raise ValueError(f"not the Extended JSON of a {cls.__name__}")
    return found


def _base64(value: bytes) -> str:
    # the alphabet of pydantic's own ser_json_bytes="base64"
    return base64.urlsafe_b64encode(value).decode("ascii")


def _binary(value: bytes | UUID | str) -> Binary:
    # the drivers decode subtype 0 to bytes and subtype 4 to UUID: give both their type back
    if isinstance(value, UUID):
        return Binary(value.bytes, UUID_SUBTYPE)
    if isinstance(value, str):
        value = base64.b64decode(value.translate(_STANDARD_ALPHABET), validate=True)
    return Binary(value)


_STANDARD_ALPHABET = str.maketrans("-_", "+/")


def _decimal128(value: Decimal) -> Decimal128:
    try:
        return Decimal128(value)
    except DecimalException as error:
        raise ValueError("a Decimal128 holds 34 digits") from error


def _regex(value: re.Pattern[str] | str) -> Regex[str]:
    return Regex.from_native(value) if isinstance(value, re.Pattern) else Regex(value)


def _from_decimal128(value: Any) -> Any:
    return value.to_decimal() if type(value) is Decimal128 else value


def _naive(value: Any) -> Any:
    # Dates come back in UTC, marked with PyMongo's own object: a field declared naive takes them.
    if isinstance(value, datetime) and value.tzinfo is utc:
        return value.replace(tzinfo=None)
    return value


_after = cs.no_info_after_validator_function
_TO_STRING = cs.to_string_ser_schema(when_used="json")


def _written(function: Callable[[Any], Any], schema: CoreSchema) -> cs.SerSchema:
    return cs.plain_serializer_function_ser_schema(function, when_used="json", return_schema=schema)


def _as_extended(cls: type[Any], text: Callable[[str], Any] | None = None) -> _Recipe:
    object_ = cs.dict_schema(cs.str_schema(), cs.any_schema())
    reading: CoreSchema = _after(partial(_from_extended, cls), object_)
    if text is not None:
        reading = cs.union_schema([_after(text, cs.str_schema()), reading], mode="left_to_right")
    return reading, reading, _written(_extended, object_)


_Recipe = tuple[CoreSchema, CoreSchema, cs.SerSchema]  # from Python, from JSON, to JSON


def _recipes() -> dict[type[Any], _Recipe]:
    hexadecimal = _after(ObjectId, cs.str_schema(pattern="^[0-9a-fA-F]{24}$"))
    decimal = _after(_decimal128, cs.decimal_schema(allow_inf_nan=True))
    int64 = _after(Int64, cs.int_schema(ge=INT64_MIN, le=INT64_MAX))
    text = cs.str_schema()
    binary = _after(
        _binary, cs.union_schema([cs.is_instance_schema(UUID), cs.bytes_schema(strict=True)])
    )
    regex = _after(_regex, cs.union_schema([cs.is_instance_schema(re.Pattern), cs.str_schema()]))
    milliseconds = _after(DatetimeMS, cs.int_schema())
    milliseconds_or_instant = cs.union_schema(
        [milliseconds, _after(DatetimeMS, cs.datetime_schema())], mode="left_to_right"
    )
    regex_json = _as_extended(Regex, _regex)
    return {
        ObjectId: (hexadecimal, hexadecimal, _TO_STRING),
        Decimal128: (decimal, decimal, _TO_STRING),
        Int64: (int64, int64, _written(int, cs.int_schema())),
        Binary: (binary, _after(_binary, cs.str_schema()), _written(_base64, text)),
        DatetimeMS: (
            milliseconds_or_instant,
            milliseconds_or_instant,
            _written(int, cs.int_schema()),
        ),
        Regex: (cs.union_schema([regex, regex_json[0]]), *regex_json[1:]),
        Code: _as_extended(Code, Code),
        Timestamp: _as_extended(Timestamp),
        DBRef: _as_extended(DBRef),
        MinKey: _as_extended(MinKey),
        MaxKey: _as_extended(MaxKey),
    }


_SHAPES = {
    ObjectId: "24 hexadecimal characters",
    Decimal128: "a decimal number",
    Int64: "a 64-bit integer",
    Binary: "bytes, or base64 in JSON",
    DatetimeMS: "milliseconds since 1970",
    Regex: "a regular expression",
}
_RECIPES = _recipes()
_MARK = "data_bridge"  # in a node's metadata: this one is ours already


def _instance_schema(cls: type[Any], node: Mapping[str, Any]) -> CoreSchema:
    python, json_, serialization = _RECIPES[cls]
    return cs.json_or_python_schema(
        json_schema=json_,
        python_schema=cs.union_schema(
            [cs.is_instance_schema(cls), python],
            mode="left_to_right",
            custom_error_type="bson_type",
            custom_error_message=(
                f"Input should be {'an' if cls.__name__[0] in 'AEIO' else 'a'} {cls.__name__}"
                f" or {_SHAPES.get(cls, 'its Extended JSON')}"
            ),
        ),
        serialization=node.get("serialization", serialization),
        metadata={**(node.get("metadata") or {}), _MARK: True},
    )


# -- reading: rewriting a model's schema --------------------------------------------------------


def json_ready(value: Any) -> Any:
    """``value`` with each BSON value in it in its JSON form."""
    if isinstance(value, Mapping):
        return {
            str(k) if isinstance(k, (ObjectId, Decimal128)) else k: json_ready(v)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_ready(v) for v in value]
    if isinstance(value, (ObjectId, Decimal128)):
        return str(value)
    if isinstance(value, DatetimeMS):
        return int(value)
    if isinstance(value, (Binary, bytes)):
        return _base64(value)
    if isinstance(value, (Code, DBRef, MaxKey, MinKey, Regex, Timestamp)):
        return _extended(value)
    return value


def _write_any(value: Any, handler: cs.SerializerFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except (PydanticSerializationError, UnicodeError):
        return handler(json_ready(value))


def any_schema() -> CoreSchema:
    """``Any``, which serialises to JSON whatever BSON can hold."""
    return cs.any_schema(
        serialization=cs.wrap_serializer_function_ser_schema(_write_any, when_used="json"),
        metadata={_MARK: True},
    )


# Where a core schema keeps other core schemas: one, a list of them (labelled or not), or a dict.
_INNER = (
    "arguments_schema",
    "choices",
    "definitions",
    "extras_keys_schema",
    "extras_schema",
    "fields",
    "items_schema",
    "json_schema",
    "keys_schema",
    "lax_schema",
    "python_schema",
    "return_schema",
    "schema",
    "steps",
    "strict_schema",
    "values_schema",
)
_NAMED = ("choices", "fields")  # where a dict is of schemas by name, and no schema itself
_Node = Mapping[str, Any]


def _replacement(node: _Node) -> CoreSchema | None:
    """What stands in for this very node; ``None`` where it may stay."""
    match node["type"]:
        case "is-instance" if node["cls"] in _RECIPES:
            return _instance_schema(node["cls"], node)
        case "decimal":
            return cs.no_info_before_validator_function(
                _from_decimal128,
                node,
                metadata={_MARK: True},
            )
        case "datetime" if node.get("tz_constraint") == "naive":
            return cs.no_info_before_validator_function(
                _naive,
                node,
                metadata={_MARK: True},
            )
        case "any" if "serialization" not in node:
            return any_schema()
        case "dict" if "values_schema" not in node:
            return {**node, "values_schema": any_schema()}
        case "list" if "items_schema" not in node:
            return {**node, "items_schema": any_schema()}
    return None


def _is_ours(node: _Node) -> bool:
    return _MARK in (node.get("metadata") or ())


def _has_validator(node: _Node) -> bool:
    """Whether this is a class with a validator of its own, which pydantic then takes as it is."""
    return node.get("type") in ("model", "dataclass") and (
        "__pydantic_validator__" in vars(node["cls"])
    )


def _python_values(value: Any) -> Any:
    """What a class that knows nothing of BSON can validate: Decimal for Decimal128."""
    if isinstance(value, dict):
        return {k: _python_values(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_python_values(v) for v in value]
    return _from_decimal128(value)


def _children(node: _Node) -> Iterator[_Node]:
    for key in _INNER:
        value = node.get(key)
        if isinstance(value, list):
            inner = (item[0] if isinstance(item, tuple) else item for item in value)
            yield from (item for item in inner if isinstance(item, dict))
        elif isinstance(value, dict):
            yield from value.values() if key in _NAMED else (value,)
    if "serialization" in node:  # its own type is no validator: only what is inside counts
        yield from _children(node["serialization"])


def _unchanged(before: Any, after: Any) -> bool:
    return before is after or (isinstance(before, tuple) and before[0] is after[0])


class _Adaptation:
    """One walk over the schema of one model; shared parts are copied, never altered."""

    def __init__(self, model: type[BaseModel], handler: GetCoreSchemaHandler) -> None:
        self.model = model
        self.handler = handler
        self.references: dict[str, str] = {}
        self.definitions: list[CoreSchema] = []

    def walk(self, node: Any) -> Any:
        if not isinstance(node, dict) or _is_ours(node):  # a dataclass lists names, too
            return node
        reference = node.get("schema_ref")
        target = node if reference is None else self.resolved(reference)
        if target is None:
            return node
        if _has_validator(target) and target["cls"] is not self.model:
            return self.foreign(node, target)
        if reference is not None:
            renamed = self.reference(reference, target)
            return node if renamed == reference else {**node, "schema_ref": renamed}
        replacement = _replacement(node) if "type" in node else None
        return self.inside(node) if replacement is None else replacement

    def foreign(self, node: _Node, target: _Node) -> _Node:
        if hasattr(target["cls"], "__bson_adapted__") or not self.reaches(target, _is_decimal):
            return node
        return cs.no_info_before_validator_function(_python_values, node, metadata={_MARK: True})

    def inside(self, node: _Node) -> _Node:
        changed = {k: self.values(k, node[k]) for k in _INNER if k in node}
        if "serialization" in node:
            changed["serialization"] = self.inside(node["serialization"])
        if all(node[k] is v for k, v in changed.items()):
            return node
        return {**node, **changed}

    def values(self, key: str, value: Any) -> Any:
        if isinstance(value, list):
            items: list[Any] = [
                (self.walk(v[0]), *v[1:]) if isinstance(v, tuple) else self.walk(v) for v in value
            ]
            return value if all(map(_unchanged, value, items)) else items
        if not isinstance(value, dict):
            return value
        if key not in _NAMED:
            return self.walk(value)
        named = {k: self.walk(v) for k, v in value.items()}
        return value if all(value[k] is v for k, v in named.items()) else named

    def reference(self, ref: str, definition: _Node) -> str:
        """The reference to use for ``ref``: to an adapted copy, if it holds what needs one."""
        if ref not in self.references:
            self.references[ref] = ref
            if self.reaches(definition, lambda node: _replacement(node) is not None):
                # pydantic takes what follows the last colon for an id, and the rest for the name
                renamed = ref + (":bson" if ref.endswith("]") else "bson")
                self.references[ref] = renamed
                copy = self.inside({k: v for k, v in definition.items() if k != "ref"})
                self.definitions.append(cast(CoreSchema, {**copy, "ref": renamed}))
        return self.references[ref]

    def resolved(self, ref: str) -> _Node | None:
        try:
            return self.handler.resolve_ref_schema(cs.definition_reference_schema(ref))
        except LookupError:  # still being built, so it comes by here itself
            return None

    def reaches(self, node: _Node, wanted: Callable[[_Node], bool]) -> bool:
        seen: set[str] = set()
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if _is_ours(node):
                continue
            if "type" in node and wanted(node):
                return True
            ref = node.get("schema_ref")
            if ref is None:
                waiting.extend(_children(node))
            elif ref not in seen:
                seen.add(ref)
                definition = self.resolved(ref)
                waiting.extend(() if definition is None else (definition,))
        return False


def _is_decimal(node: _Node) -> bool:
    return bool(node["type"] == "decimal")


def adapted(
    schema: CoreSchema, model: type[BaseModel], handler: GetCoreSchemaHandler
) -> CoreSchema:
    """``schema`` of ``model``, with every BSON type in it validated and serialised.

    Typed dicts and standard dataclasses inside are adapted in copies of their own. Other models
    keep their validators; those with a ``Decimal`` somewhere are given Decimals for Decimal128s.
    """
    adaptation = _Adaptation(model, handler)
    walked: CoreSchema = adaptation.inside(schema)
    if not adaptation.definitions:
        return walked
    return cs.definitions_schema(walked, adaptation.definitions)


# -- writing ------------------------------------------------------------------------------------


class Unstorable(Exception):
    """A value has no BSON form; ``path`` leads to it from the outermost field."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path: list[str] = []


def _same(value: Any) -> Any:
    return value


def _int(value: int) -> Any:
    if INT64_MIN <= value <= INT64_MAX:
        return int(value)
    raise Unstorable("an integer of more than 64 bits")


def _decimal(value: Decimal) -> Decimal128:
    try:
        return Decimal128(value)
    except DecimalException as error:
        raise Unstorable("a Decimal of more than 34 digits") from error


def _list(value: Any) -> list[Any]:
    items = []
    try:
        for item in value:
            items.append(encoded(item))  # len(items) says where it failed
    except Unstorable as error:
        error.path.insert(0, str(len(items)))
        raise
    return items


def _dict(value: Mapping[Any, Any]) -> dict[str, Any]:
    document = {}
    for key, item in value.items():
        name = key if type(key) is str else _key(key)
        try:
            document[name] = encoded(item)
        except Unstorable as error:
            error.path.insert(0, name)
            raise
    return document


def _key(key: Any) -> str:
    """A key of a dict as the name of a field, in the form that pydantic reads back."""
    if isinstance(key, Enum):
        return _key(key.value)
    if isinstance(key, bool):
        return "true" if key else "false"
    if isinstance(key, (str, int, float)):
        return str.__str__(key) if isinstance(key, str) else repr(key)
    if isinstance(key, (date, time)):
        return key.isoformat()
    if isinstance(key, (ObjectId, UUID, Decimal, Decimal128, PurePath, AnyUrl, Url)):
        return str(key)
    raise Unstorable(f"a {type(key).__name__} as the key of a dict")


def _model(value: BaseModel) -> Any:
    if isinstance(value, RootModel):
        return encoded(value.root)
    return _fields(value, stored_names(type(value)), value.__pydantic_extra__)


def _dataclass(value: Any) -> dict[str, Any]:
    return _fields(value, _dataclass_names(type(value)), None)


def _fields(
    value: Any, names: tuple[tuple[str, str], ...], extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for attribute, name in names:
        try:
            document[name] = encoded(getattr(value, attribute))
        except Unstorable as error:
            error.path.insert(0, name)
            raise
    if extra:
        document.update(_dict(extra))
    return document


def _text(value: Any) -> str:
    return str(value)


def _by_schema(adapter: TypeAdapter[Any], value: Any) -> Any:
    return adapter.dump_python(value, mode="json")


_ENCODERS: tuple[tuple[type[Any] | tuple[type[Any], ...], Callable[[Any], Any]], ...] = (
    # the order matters: an IntEnum is an int, a Code is a str, a datetime is a date
    (Enum, lambda value: encoded(value.value)),
    (BaseModel, _model),
    ((ObjectId, Decimal128, Timestamp, Binary, Regex, Int64, Code, MinKey, MaxKey, DBRef), _same),
    ((DatetimeMS, RawBSONDocument, datetime, UUID, re.Pattern), _same),
    (bool, _same),
    (int, _int),
    (float, float),
    (str, str.__str__),
    ((bytes, bytearray, memoryview), bytes),
    (Decimal, _decimal),
    (date, lambda value: datetime(value.year, value.month, value.day, tzinfo=UTC)),
    (time, time.isoformat),
    (timedelta, timedelta.total_seconds),
    (Mapping, _dict),
    ((SecretStr, SecretBytes), lambda value: value.get_secret_value()),
    ((PurePath, AnyUrl, Url, MultiHostUrl), _text),
    ((IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network), _text),
)
_AS_THEY_ARE = frozenset(
    {str, float, bool, type(None), ObjectId, datetime, bytes, UUID, Decimal128, Int64}
)


@lru_cache(maxsize=1024)
def _encoder(cls: type[Any]) -> Callable[[Any], Any]:
    for known, encoder in _ENCODERS:
        if issubclass(cls, known):
            return encoder
    if dataclasses.is_dataclass(cls):
        return _dataclass
    if issubclass(cls, (list, tuple, AbstractSet)) or cls.__name__ == "deque":
        return _list
    if hasattr(cls, "__get_pydantic_core_schema__"):
        # a type that brought its own schema: what it shows in JSON is what it reads
        return partial(_by_schema, TypeAdapter(cls))
    raise Unstorable(f"a {cls.__name__}, for which BSON has no type")


def encoded(value: Any) -> Any:
    """``value`` as the drivers can store it.

    Models and dataclasses become documents; sets and tuples arrays; ``Enum`` its value;
    ``Decimal`` a Decimal128; ``date`` a BSON date at midnight UTC; ``time`` ISO 8601 text;
    ``timedelta`` seconds; paths, URLs and IP addresses text; keys that are no text, text.
    BSON's own types and ``datetime``, ``UUID`` and ``bytes`` stay as they are.

    Raises:
        Unstorable: something in it has no BSON form.
    """
    cls: Any = type(value)
    return value if cls in _AS_THEY_ARE else _encoder(cls)(value)


# -- the names of stored fields -----------------------------------------------------------------

_names: weakref.WeakKeyDictionary[type[Any], tuple[tuple[str, str], ...]] = (
    weakref.WeakKeyDictionary()
)


def stored_names(model: type[BaseModel]) -> tuple[tuple[str, str], ...]:
    """Each field of ``model`` with the name it is stored under: the name it validates from.

    That is the field's alias, if it has one, and else its own name, so that what was written is
    what can be read.
    """
    try:
        return _names[model]
    except KeyError:
        pass
    identified = hasattr(model, "__bson_id__")
    found = tuple(
        (name, "_id" if identified and name == "id" else _stored_name(name, field.validation_alias))
        for name, field in model.model_fields.items()
    )
    _names[model] = found
    return found


def _stored_name(name: str, alias: Any) -> str:
    if isinstance(alias, AliasChoices):
        alias = next((a for a in alias.choices if isinstance(a, str)), alias.choices[0])
    if alias is None or isinstance(alias, str):
        return alias or name
    raise Unstorable(f"the alias path of {name!r}, which names no single field to store it under")


def _dataclass_names(cls: type[Any]) -> tuple[tuple[str, str], ...]:
    own = getattr(cls, "__pydantic_fields__", None)
    if own is not None:
        return tuple((n, _stored_name(n, f.validation_alias)) for n, f in own.items())
    return tuple((f.name, f.name) for f in dataclasses.fields(cls))
