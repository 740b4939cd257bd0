"""The comparison order of BSON values, as hashable keys that Python itself can compare.

https://www.mongodb.com/docs/manual/reference/bson-type-comparison-order/
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from fractions import Fraction
from typing import Any, Final
from uuid import UUID

from bson import Binary, Code, DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.datetime_ms import DatetimeMS

__all__ = ["MISSING", "Key", "bracket", "integer", "is_nan", "key", "number", "regex_options"]

Key = tuple[int, Any]


class _Missing(Enum):
    """What a path finds where there is no field. In the order of values it is null."""

    MISSING = "missing"


MISSING: Final = _Missing.MISSING

# Only values of one bracket are compared by the query operators; the numbers are the server's own.
MIN_KEY, NULL, NUMBER, STRING, OBJECT, ARRAY, BINARY = -1, 5, 10, 15, 20, 25, 30
OBJECT_ID, BOOL, DATE, TIMESTAMP, REGEX = 35, 40, 45, 47, 50
CODE, SCOPED_CODE, MAX_KEY = 60, 65, 127

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_NAN = (0, 0)  # below every number, and equal to itself
_LEGACY_BINARY = 2  # stored with its length inside, which counts when lengths are compared


def number(value: Any) -> int | float | Fraction:
    """A BSON number as one that Python compares without rounding, whatever the decimal context."""
    if value.__class__ is not Decimal128:
        return value  # type: ignore[no-any-return]
    decimal = value.to_decimal()
    if decimal.is_nan():
        return float("nan")
    if decimal.is_infinite():
        return float("-inf") if decimal.is_signed() else float("inf")
    numerator, denominator = decimal.as_integer_ratio()
    return numerator if denominator == 1 else Fraction(numerator, denominator)


def is_nan(exact: float | Fraction) -> bool:
    return exact != exact  # and not `math.isnan`, which has to convert to double


def integer(exact: float | Fraction) -> int | None:
    """The number without its fraction, or `None` if it is not one of 64 bits."""
    return int(exact) if -(2**63) - 1 < exact < 2**63 else None


def _number(value: Any) -> Hashable:
    exact = number(value)
    return _NAN if is_nan(exact) else (1, exact)


def _date(value: Any) -> Hashable:
    if isinstance(value, DatetimeMS):
        return int(value)
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    milliseconds: int = (value - _EPOCH) // _MILLISECOND
    return milliseconds


def _object(value: Mapping[str, Any]) -> Hashable:
    # the server looks at the type of a field first, then at its name, then at its value
    return tuple([(b, name, v) for name, (b, v) in ((n, key(e)) for n, e in value.items())])


def _binary(value: Any) -> Hashable:
    if isinstance(value, UUID):
        return (16, 4, value.bytes)
    subtype = value.subtype if isinstance(value, Binary) else 0
    return (len(value) + (4 if subtype == _LEGACY_BINARY else 0), subtype, bytes(value))


_OPTIONS = (("i", 2), ("l", 4), ("m", 8), ("s", 16), ("u", 32), ("x", 64))


def regex_options(value: Regex[Any]) -> str:
    """The option letters of a regular expression, in the order in which BSON stores them."""
    return "".join([letter for letter, bit in _OPTIONS if value.flags & bit])


_KINDS: tuple[tuple[type, int, Callable[[Any], Hashable]], ...] = (
    (str, STRING, lambda value: value),
    (bool, BOOL, lambda value: value),
    (int, NUMBER, _number),
    (float, NUMBER, _number),
    (Int64, NUMBER, _number),
    (Decimal128, NUMBER, _number),
    (type(None), NULL, lambda value: 0),
    (_Missing, NULL, lambda value: 0),
    (ObjectId, OBJECT_ID, lambda value: value.binary),
    (datetime, DATE, _date),
    (DatetimeMS, DATE, _date),
    (dict, OBJECT, _object),
    (DBRef, OBJECT, lambda value: _object(value.as_doc())),
    (list, ARRAY, lambda value: tuple([key(element) for element in value])),
    (UUID, BINARY, _binary),
    (Binary, BINARY, _binary),
    (bytes, BINARY, _binary),
    (Timestamp, TIMESTAMP, lambda value: (value.time, value.inc)),
    (Regex, REGEX, lambda value: (value.pattern, regex_options(value))),
    (Code, CODE, str),
    (MinKey, MIN_KEY, lambda value: 0),
    (MaxKey, MAX_KEY, lambda value: 0),
)
_KIND = {kind: (position, comparable) for kind, position, comparable in _KINDS}


def _kind(value: Any) -> tuple[int, Callable[[Any], Hashable]]:
    """What `_KIND` has no exact entry for: subclasses, and code with a scope."""
    if isinstance(value, Code) and value.scope is not None:
        return SCOPED_CODE, lambda code: (str(code), _object(code.scope))
    for kind in type(value).__mro__:
        if kind in _KIND:
            return _KIND[kind]
    raise TypeError(f"{type(value).__name__} is not a BSON type")


def bracket(value: Any) -> int:
    """The number of the value's comparison bracket: equal for int, long, double and decimal.

    Raises `TypeError` for what is not a BSON value.
    """
    try:
        found = _KIND[value.__class__]
    except KeyError:
        return _kind(value)[0]
    return found[0] if found[0] != CODE else _kind(value)[0]


def key(value: Any) -> Key:
    """A hashable key: equal for equal BSON values, and ordered as the server orders them.

    1, 1.0, ``Int64(1)`` and ``Decimal128("1.0")`` have one key, and so have a missing value and
    null; ``True`` is not 1, NaN equals NaN. Raises `TypeError` for what is not a BSON value.
    """
    if value.__class__ is str:
        return STRING, value
    try:
        position, comparable = _KIND[value.__class__]
    except KeyError:
        position, comparable = _kind(value)
    if position == CODE:
        position, comparable = _kind(value)
    return position, comparable(value)
