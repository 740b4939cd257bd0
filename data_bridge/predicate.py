"""The closures that a filter is compiled to: paths into a document, and tests of single values.

They follow the server's own matcher: a path yields values, and a test that is true for one of
them is true for the document. Negation is of the whole, never of one value.

https://github.com/mongodb/mongo/tree/v6.0/src/mongo/db/matcher
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from bson import DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex

from .order import MISSING, NUMBER, Key, bracket, integer, is_nan, key, number, regex_options
from .regex import compile_pattern

__all__ = [
    "NOTHING",
    "Beyond",
    "Constraint",
    "Node",
    "OnDocument",
    "OnValue",
    "all_of",
    "any_of",
    "as_document",
    "at",
    "comparison",
    "equality",
    "in_array",
    "membership",
    "negated",
    "one_of",
    "parts_of",
    "pattern",
    "remainder",
    "type_in",
    "values_at",
]

Document = Mapping[str, Any]
Constraint = tuple[str, tuple[Key, ...]]
OnDocument = Callable[[Document], bool]
OnValue = Callable[[Any], bool]


class Beyond(Exception):
    """This part of a filter is valid, but only the server evaluates it."""


class Node(NamedTuple):
    """A part of a filter."""

    on_document: OnDocument
    on_value: OnValue  # for an array's element under `$elemMatch`, where no path is followed
    equalities: tuple[Constraint, ...] = ()  # each must hold wherever the node does


# -- paths --------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def parts_of(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def values_at(document: Any, parts: Sequence[str], spread: bool = True) -> Iterator[Any]:
    """What the server's ``BSONElementIterator`` yields for a path.

    With `spread` an array at the end of the path gives its elements and then itself.
    """
    value = document
    for index, part in enumerate(parts):
        value = (value.as_doc() if value.__class__ is DBRef else value).get(part, MISSING)
        if value.__class__ is list:
            rest = parts[index + 1 :]
            if rest:
                yield from _values_in(value, rest, spread)
                return
            if spread:
                yield from value
            yield value
            return
        if not isinstance(value, (dict, DBRef)):
            yield value if index + 1 == len(parts) else MISSING
            return
    yield value


def _values_in(array: list[Any], parts: Sequence[str], spread: bool) -> Iterator[Any]:
    """The rest of a path goes into every document of an array, or to the element at an offset."""
    offset = int(parts[0]) if parts[0].isascii() and parts[0].isdigit() else -1
    if str(offset) != parts[0]:  # "01" is the name of a field and of nothing else
        offset = -1
    rest = parts[1:]
    for index, element in enumerate(array):
        nested = isinstance(element, (dict, DBRef))
        if nested:
            yield from values_at(element, parts, spread)
        if index != offset:
            continue
        if not rest:
            yield element  # an array found by its offset is not spread
        elif nested:
            yield from values_at(element, rest, spread)
        elif element.__class__ is list:
            yield from _values_in(element, rest, spread)


def at(path: str, test: OnValue, *, spread: bool = True) -> Node:
    """`test`, true for a document if it is true for one of the values at `path`."""
    parts = parts_of(path)
    if len(parts) > 1:
        return Node(lambda document: any(map(test, values_at(document, parts, spread))), test)
    if not spread:
        return Node(lambda document: test(document.get(path, MISSING)), test)

    def on_document(document: Document) -> bool:
        value = document.get(path, MISSING)
        if value.__class__ is list and any(map(test, value)):
            return True
        return test(value)

    return Node(on_document, test)


def in_array(path: str, test: OnValue) -> Node:
    """`test`, true for an array at `path` if it is true for one of its elements."""
    return at(path, lambda value: value.__class__ is list and any(map(test, value)), spread=False)


def as_document(element: Any) -> Document | None:
    """An array's element as the document that `$elemMatch` sees; an array's names are offsets."""
    if isinstance(element, dict):
        return element
    if element.__class__ is list:
        return {str(offset): v for offset, v in enumerate(element)}
    return element.as_doc() if element.__class__ is DBRef else None


# -- tests of one value -------------------------------------------------------------------------

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": operator.eq,
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
_PYTHON_NUMBERS = frozenset({int, float, Int64})


def comparison(name: str, operand: Any) -> OnValue:
    compare = _COMPARISONS[name]
    kind, wanted = key(operand)
    if isinstance(operand, (MinKey, MaxKey)):
        return lambda value: compare(bracket(value), kind)  # the only ones to cross brackets
    if kind == NUMBER:
        exact = number(operand)
        if is_nan(exact):  # comparable to itself alone
            reflexive = name in ("$eq", "$gte", "$lte")
            return lambda value: reflexive and bracket(value) == NUMBER and is_nan(number(value))

        def on_number(value: Any) -> bool:
            if value.__class__ in _PYTHON_NUMBERS:
                return compare(value, exact)
            return value.__class__ is Decimal128 and compare(number(value), exact)

        return on_number
    if operand.__class__ is str:
        return lambda value: value.__class__ is str and compare(value, operand)
    return lambda value: bracket(value) == kind and compare(key(value)[1], wanted)


def membership(operands: list[Any]) -> OnValue:
    patterns = [pattern(v.pattern, regex_options(v)) for v in operands if isinstance(v, Regex)]
    wanted = frozenset(key(v) for v in operands if not isinstance(v, Regex))
    kinds = frozenset(kind for kind, _ in wanted)

    def on_value(value: Any) -> bool:
        return bracket(value) in kinds and key(value) in wanted

    if not patterns:
        return on_value
    return lambda value: on_value(value) or any(matches(value) for matches in patterns)


def pattern(source: str, options: str) -> OnValue:
    """Text that the pattern matches, and regular expressions that are equal to it.

    Raises `Malformed`, and `Beyond` for a pattern that only PCRE can decide.
    """
    compiled = compile_pattern(source, options)
    if compiled is None:
        raise Beyond(f"the pattern {source!r}")
    search = compiled.search

    def on_value(value: Any) -> bool:
        if value.__class__ is str:
            return search(value) is not None
        if value.__class__ is not Regex:
            return False
        return value.pattern == source and regex_options(value) == options

    return on_value


def remainder(divisor: int, wanted: int) -> OnValue:
    def on_value(value: Any) -> bool:
        if bracket(value) != NUMBER:
            return False
        if (whole := integer(number(value))) is None:
            return False
        rest = abs(whole) % abs(divisor)  # as in C, the result has the sign of the dividend
        return (rest if whole >= 0 else -rest) == wanted

    return on_value


_TYPE_OF_BRACKET = {
    **{-1: -1, 5: 10, 15: 2, 20: 3, 25: 4, 30: 5, 35: 7, 40: 8},
    **{45: 9, 47: 17, 50: 11, 60: 13, 65: 15, 127: 127},
}
_TYPE_OF_NUMBER = {float: 1, Int64: 18, Decimal128: 19}


def type_in(types: frozenset[int]) -> OnValue:
    def on_value(value: Any) -> bool:
        if value is MISSING:
            return False
        if (kind := bracket(value)) != NUMBER:
            return _TYPE_OF_BRACKET[kind] in types
        short = 16 if value.__class__ is int and -(2**31) <= value < 2**31 else 18
        return _TYPE_OF_NUMBER.get(value.__class__, short) in types

    return on_value


# -- nodes --------------------------------------------------------------------------------------

_SAME_IN_PYTHON = frozenset({str, ObjectId, UUID})  # equal to another BSON value iff Python says so


def equality(path: str, operand: Any) -> Node:
    on_document, on_value, _ = at(path, comparison("$eq", operand))
    if operand.__class__ in _SAME_IN_PYTHON and "." not in path:

        def on_document(document: Document) -> bool:
            value = document.get(path)
            return value == operand or (value.__class__ is list and operand in value)

    return Node(on_document, on_value, _constraint(path, [operand]))


def one_of(path: str, operands: list[Any]) -> Node:
    """An equality with one of the values, or a match of one of the regular expressions."""
    on_document, on_value, _ = at(path, membership(operands))
    return Node(on_document, on_value, _constraint(path, operands))


def _constraint(path: str, operands: list[Any]) -> tuple[Constraint, ...]:
    """An equality with one of `operands`, if an index can hold all of them."""
    if any(isinstance(v, (dict, list, Regex)) for v in operands):
        return ()
    return ((path, tuple(dict.fromkeys(map(key, operands)))),)


def negated(node: Node) -> Node:
    on_document, on_value, _ = node
    return Node(lambda document: not on_document(document), lambda value: not on_value(value))


def all_of(nodes: Sequence[Node]) -> Node:
    return Node(
        _every([node.on_document for node in nodes]),
        _every([node.on_value for node in nodes]),
        tuple(constraint for node in nodes for constraint in node.equalities),
    )


def _every(tests: list[Callable[[Any], bool]]) -> Callable[[Any], bool]:
    match tests:
        case [test]:
            return test
        case [first, second]:
            return lambda value: first(value) and second(value)

    def every(value: Any) -> bool:
        for test in tests:  # noqa: SIM110 (a generator would cost more than most tests do)
            if not test(value):
                return False
        return True

    return every


def any_of(nodes: Sequence[Node]) -> Node:
    tests = [node.on_document for node in nodes]
    return Node(lambda document: any(test(document) for test in tests), NOTHING.on_value)


NOTHING = Node(lambda document: False, lambda value: False)
