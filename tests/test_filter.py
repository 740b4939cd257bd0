"""What a filter means, case by case, in the predicate and on the server alike."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple

import pytest
from bson import Binary, Code, DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.errors import OperationFailure

from data_bridge.errors import InvalidFilter
from data_bridge.filter import Filter, index_keys

NAN = float("nan")
CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True, uuid_representation=UuidRepresentation.STANDARD
)


class Case(NamedTuple):
    promise: str
    query: dict[str, Any]
    matching: list[dict[str, Any]]
    others: list[dict[str, Any]]


def a(*values: Any) -> list[dict[str, Any]]:
    """A document with a field `a` for each of the values."""
    return [{"a": value} for value in values]


D = Decimal128
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ONE, TWO = ObjectId("1" * 24), ObjectId("2" * 24)

CASES = [
    # -- null and missing
    Case("an empty filter matches all", {}, [{}, *a(1, None)], []),
    Case("null equals missing", {"a": None}, [{}, *a(None, [None], [1, None])], a(0, [], "", {})),
    Case("not null means there", {"a": {"$ne": None}}, a(0, [], ""), [{}, *a(None, [1, None])]),
    Case("at least null is null or missing", {"a": {"$gte": None}}, [{}, *a(None)], a(1, [])),
    Case("at most null is null or missing", {"a": {"$lte": None}}, [{}, *a([None])], a(1, [])),
    Case("nothing is below or above null", {"a": {"$gt": None}}, [], [{}, *a(None, 1)]),
    Case("null in a list means missing too", {"a": {"$in": [None, 1]}}, [{}, *a(1, None)], a(2)),
    Case(
        "null below a scalar and in each element",
        {"a.b": None},
        [{}, *a(1, {}, {"b": None}, [{}], [{"b": 1}, {}])],
        a([1], [], {"b": 1}, [{"b": 1}, 2], [[{}]]),
    ),
    Case("exists means any value", {"a": {"$exists": True}}, a(None, 0, [], {}), [{}, {"b": 1}]),
    Case("exists takes null for false", {"a": {"$exists": None}}, [{}], a(1)),
    Case("exists takes a zero decimal for false", {"a": {"$exists": D("0E+3")}}, [{}], a(1)),
    Case("exists takes an empty string for true", {"a": {"$exists": ""}}, a(1), [{}]),
    Case(
        "absence holds for arrays without such a document",
        {"a.b": {"$exists": False}},
        [{}, *a(1, [], [1], [[{"b": 1}]], [{}])],
        a({"b": 1}, [{"b": None}], [{}, {"b": 1}]),
    ),
    # -- numbers
    Case(
        "numbers are equal across types",
        {"a": 1},
        a(1, 1.0, Int64(1), D("1"), D("1.00"), [0, 1.0]),
        a(True, "1", 2, D("1.000000000000000000000000000000001"), [[1]]),
    ),
    Case("numbers do not round", {"a": 2.0**53}, a(2**53, D("9007199254740992")), a(2**53 + 1)),
    Case("0.1 as double is above 0.1", {"a": {"$gt": D("0.1")}}, a(0.1), a(D("0.1"), 0.0999)),
    Case(
        "a double is not its decimal of 34 digits",
        {"a": {"$gt": D("0.1000000000000000055511151231257827")}},
        a(0.1),
        a(D("0.1000000000000000055511151231257827")),
    ),
    Case("minus zero is zero", {"a": -0.0}, a(0, 0.0, D("-0"), D("0E-10")), a(5e-324, False)),
    Case("infinities are numbers", {"a": {"$gt": 1e308}}, a(float("inf"), D("1E+400")), a(NAN)),
    Case("NaN equals NaN", {"a": NAN}, a(NAN, D("NaN"), D("sNaN"), D("-NaN")), [{}, *a(0)]),
    Case("NaN is at least NaN", {"a": {"$gte": NAN}}, a(NAN, [1, NAN]), a(1, -1, D("Infinity"))),
    Case("nothing is below NaN", {"a": {"$lt": NAN}}, [], a(NAN, 1)),
    Case("NaN is not below numbers", {"a": {"$lt": 5}}, a(4), a(NAN, D("NaN"))),
    Case("NaN in a list", {"a": {"$in": [NAN, 1]}}, a(NAN, D("NaN"), 1), a(0)),
    Case("NaN comes first inside arrays", {"a": {"$lt": [0]}}, a([NAN], [-1]), a([0], [1], NAN)),
    # -- brackets and other types
    Case("comparison stays in its bracket", {"a": {"$gt": 1}}, a(2), [{}, *a("2", None, NOON)]),
    Case("a boolean is not a number", {"a": True}, a(True), a(1, 1.0, "true")),
    Case("false is below true", {"a": {"$lt": True}}, a(False), a(True, 0, None)),
    Case(
        "strings compare by UTF-8",
        {"a": {"$gt": "\uffff"}},
        a("\U0001d11e"),
        a("\uffff", "é", "z", "\ud7ff", Code("\U0001d11e")),
    ),
    Case("strings go beyond a null byte", {"a": {"$gt": "a\0a"}}, a("a\0b", "aa"), a("a", "a\0")),
    Case("code is not a string", {"a": "x"}, a("x"), a(Code("x"))),
    Case("code with a scope is another type", {"a": Code("x")}, a(Code("x")), a(Code("x", {}))),
    Case("dates compare in time", {"a": {"$lt": NOON}}, a(NOON - timedelta(0, 1)), a(NOON, 0)),
    Case(
        "a date equals itself in another zone",
        {"a": NOON.astimezone(timezone(timedelta(hours=3)))},
        a(NOON),
        a(NOON + timedelta(milliseconds=1)),
    ),
    Case(
        "a date has milliseconds",
        {"a": NOON.replace(microsecond=1999)},
        a(NOON.replace(microsecond=1000)),
        a(NOON),
    ),
    Case("a naive date is UTC", {"a": NOON.replace(tzinfo=None)}, a(NOON), a(None)),
    Case("a timestamp is not a date", {"a": {"$gt": Timestamp(1, 1)}}, a(Timestamp(1, 2)), a(NOON)),
    Case("object ids compare by bytes", {"a": {"$gt": ONE}}, a(TWO), a(ONE, "2" * 24)),
    Case(
        "binaries compare by length, subtype and bytes",
        {"a": {"$gt": Binary(b"bb", 5)}},
        a(b"aaa", Binary(b"aa", 6), Binary(b"bc", 5), uuid.UUID(int=0), Binary(b"", 2)),
        a(b"zz", Binary(b"bb", 5), b"z"),
    ),
    Case(
        "a UUID is not its legacy form",
        {"a": uuid.UUID(int=1)},
        a(uuid.UUID(int=1)),
        a(Binary(uuid.UUID(int=1).bytes, 3), uuid.UUID(int=1).bytes),
    ),
    Case(
        "everything is above MinKey", {"a": {"$gt": MinKey()}}, [{}, *a(None, 1, [])], a(MinKey())
    ),
    Case("nothing else is at most MinKey", {"a": {"$lte": MinKey()}}, a(MinKey()), [{}, *a(1)]),
    Case(
        "everything is below MaxKey",
        {"a": {"$lt": MaxKey()}},
        [{}, *a(None, [MaxKey()])],
        a(MaxKey()),
    ),
    Case("MaxKey equals only itself", {"a": MaxKey()}, a(MaxKey(), [MaxKey()]), [{}, *a(1)]),
    # -- documents and arrays
    Case(
        "documents are equal with their order",
        {"a": {"b": 1, "c": 2}},
        a({"b": 1.0, "c": Int64(2)}, [{"b": 1, "c": 2}]),
        a({"c": 2, "b": 1}, {"b": 1}, {"b": 1, "c": 2, "d": 3}, {"b": True, "c": 2}),
    ),
    Case("an empty document is a value", {"a": {}}, a({}, [{}]), [{}, *a(None, {"b": 1})]),
    Case(
        "documents compare type, then name, then value",
        {"a": {"$lt": {"b": 2}}},
        a({"b": 1}, {"a": 9}, {}, {"z": None}),
        a({"b": 2}, {"b": 2, "a": 1}, {"c": 0}, {"a": "x"}, 1),
    ),
    Case(
        "NaN's name comes before its value", {"a": {"$lt": {"a": 1}}}, a({"a": NAN}), a({"b": NAN})
    ),
    Case(
        "an array equals whole or by element",
        {"a": [1, 2]},
        a([1, 2], [0, [1, 2.0]]),
        a([1], [2, 1], [[[1, 2]]], [1, 2, 3], 1),
    ),
    Case("an empty array is a value", {"a": []}, a([], [[]], [1, []]), [{}, *a(None, [1])]),
    Case(
        "arrays compare by element",
        {"a": {"$lt": [2]}},
        a([1], [1, 9], [], [[1], 5]),
        a([2], [2, 0], 1, ["a"]),
    ),
    Case(
        "a value above one bound and below another",
        {"a": {"$gt": 5, "$lt": 3}},
        a([1, 9]),
        a(4, [4], 1, 9),
    ),
    Case("not equal to any element", {"a": {"$ne": 1}}, [{}, *a([], [2], None)], a(1, [2, 1])),
    Case(
        "a negation is of the whole",
        {"a": {"$not": {"$gt": 1, "$lt": 5}}},
        [{}, *a("x", [9], 1)],
        a(2, [9, 0]),
    ),
    Case("a double negation", {"a": {"$not": {"$not": {"$gt": 1}}}}, a(2, [2]), [{}, *a(1)]),
    # -- paths
    Case(
        "a path goes through documents and arrays",
        {"a.b": 1},
        a({"b": 1}, [{"b": 1}], {"b": [1]}, [{"b": [0, 1]}]),
        a([[{"b": 1}]], {"b": [[1]]}, 1),
    ),
    Case(
        "a number is an offset and a name",
        {"a.0": 1},
        a([1], {"0": 1}, [{"0": 1}], [2, {"0": [1]}]),
        a([2, 1], [[1]], 1, {"00": 1}),
    ),
    Case("a number with leading zeros is only a name", {"a.00": 1}, a({"00": 1}), a([1])),
    Case("offsets go into nested arrays", {"a.0.0": 1}, a([[1]], [{"0": 1}]), a([[[1]]], [1])),
    Case(
        "an offset and then a name",
        {"a.1.b": 1},
        a([0, {"b": 1}], [{"1": {"b": 1}}], [0, [{"b": 1}]]),
        a([{"b": 1}], [0, [[{"b": 1}]]]),
    ),
    Case(
        "an offset beyond the end is nothing",
        {"a.1": None},
        [{}, *a({}, [{"b": 1}], [0, None])],
        a([], [1], [1, 2]),
    ),
    Case(
        "an offset of a document is missing in it",
        {"a.0": None},
        a([{"b": 1}], [None]),
        a([[1]], [1], []),
    ),
    Case(
        "a reference is a document",
        {"a.$id": 1},
        a(DBRef("c", 1), [DBRef("c", 1)]),
        a(DBRef("c", 2), {"id": 1}),
    ),
    Case("a reference is a value", {"a": DBRef("c", 1)}, a(DBRef("c", 1)), a(DBRef("c", 1, "d"))),
    Case("_id is a field", {"_id": {"$gt": 4}}, [{"_id": 5}], [{"_id": 3}, {"_id": "x"}]),
    # -- operators
    Case("in nothing is nothing", {"a": {"$in": []}}, [], [{}, *a(1, [], None)]),
    Case("not in nothing is all", {"a": {"$nin": []}}, [{}, *a(1, [], None)], []),
    Case(
        "in takes whole values",
        {"a": {"$in": [1, [2], {"b": 1}]}},
        a(1.0, [2], [[2]], {"b": 1}, [{"b": 1}]),
        a(2, {"b": 1, "c": 1}, True),
    ),
    Case(
        "in takes patterns",
        {"a": {"$in": [re.compile("^x"), 1]}},
        a("xy", 1, ["", "x"]),
        a("yx", 2, Regex("x")),
    ),
    Case(
        "not in takes patterns",
        {"a": {"$nin": [Regex("x", "i")]}},
        [{}, *a(1, "y")],
        a("X", ["y", "x"], Regex("x", "i")),
    ),
    Case("all of nothing is nothing", {"a": {"$all": []}}, [], [{}, *a([], 1)]),
    Case("not all of nothing is all", {"a": {"$not": {"$all": []}}}, [{}, *a([], 1)], []),
    Case(
        "all in any order, or one value",
        {"a": {"$all": [1, Regex("x")]}},
        a(["ax", 1.0, 2]),
        a([1], "x", [[1, "x"]]),
    ),
    Case("all of one array", {"a": {"$all": [[1, 2]]}}, a([1, 2], [[1, 2]]), a([2, 1], 1)),
    Case("all with null", {"a": {"$all": [None]}}, [{}, *a(None, [None])], a([], 1)),
    Case(
        "all with elements",
        {"a": {"$all": [{"$elemMatch": {"b": 1}}, {"$elemMatch": {"c": 1}}]}},
        a([{"b": 1}, {"c": 1}], [{"b": 1, "c": 1}]),
        a([{"b": 1}], {"b": 1, "c": 1}),
    ),
    Case(
        "all ignores what stands beside elemMatch",
        {"a": {"$all": [{"$elemMatch": {"b": 1}, "c": 1}]}},
        a([{"b": 1}]),
        a([{"c": 1}]),
    ),
    Case("all takes unknown operators for values", {"a": {"$all": [{"$foo": 1}]}}, [], a(1, {})),
    Case(
        "one element in both bounds",
        {"a": {"$elemMatch": {"$gt": 1, "$lt": 5}}},
        a([0, 3, 9]),
        a([0, 9], 3, [[3]], []),
    ),
    Case(
        "one element with both fields",
        {"a": {"$elemMatch": {"b": 1, "c": 2}}},
        a([{"b": 1, "c": 2}]),
        a([{"b": 1}, {"c": 2}], {"b": 1, "c": 2}, []),
    ),
    Case("an element is not spread", {"a": {"$elemMatch": {"$in": [1]}}}, a([1]), a([[1]], 1)),
    Case(
        "an element that is an array is a document of offsets",
        {"a": {"$elemMatch": {"0": 1}}},
        a([[1, 2]], [{"0": 1}]),
        a([1], [[2]], [[[[1]]]]),
    ),
    Case(
        "any element that is a document or array",
        {"a": {"$elemMatch": {}}},
        a([{}], [1, []]),
        a([], [1], {}, {"b": 1}),
    ),
    Case(
        "no such element",
        {"a": {"$elemMatch": {"$not": {"$gt": 1}}}},
        a([1], ["x"], [9, None]),
        a([2], [], 1),
    ),
    Case(
        "an element's absence is never",
        {"a": {"$elemMatch": {"$exists": False}}},
        [],
        a([1], [], [None]),
    ),
    Case(
        "an element's size",
        {"a": {"$elemMatch": {"$size": 1}}},
        a([[1]], [1, [[2, 3]]]),
        a([1], [[1, 2]]),
    ),
    Case(
        "an element's element",
        {"a": {"$elemMatch": {"$elemMatch": {"$gt": 1}}}},
        a([[2]]),
        a([2], [[1]], [[[2]]]),
    ),
    Case(
        "an element of either kind",
        {"a": {"$elemMatch": {"$or": [{"b": 1}, {"b": 2}]}}},
        a([{"b": 2}]),
        a([{"b": 3}], [2], {"b": 1}),
    ),
    Case(
        "a reference's id in an element",
        {"a": {"$elemMatch": {"b.$id": 1}}},
        a([{"b": DBRef("c", 1)}]),
        a([{"b": 1}]),
    ),
    Case(
        "size counts the array itself",
        {"a": {"$size": 1}},
        a([1], [[1, 2]]),
        a([], [1, 2], 1, {"0": 1}),
    ),
    Case(
        "size below an array of documents",
        {"a.b": {"$size": 2}},
        a([{"b": [1, 2]}]),
        a([{"b": 1}, {"b": 2}]),
    ),
    Case("size takes a whole decimal", {"a": {"$size": D("1.0")}}, a([1]), a([])),
    Case(
        "mod takes whole parts",
        {"a": {"$mod": [3.9, 2]}},
        a(5, 5.9, D("5.9"), Int64(8), [2]),
        [{}, *a(-5, True, NAN, 1e300, D("1E+30"), float("inf"), "5", 9.3e18)],
    ),
    Case(
        "mod cuts off the fraction before it looks at the range",
        {"a": {"$mod": [2, 0]}},
        a(D("-9223372036854775808.5"), D("9223372036854775806.5"), -(2**63)),
        a(D("-9223372036854775809"), D("9223372036854775808"), 2.0**63, 2**63 - 1),
    ),
    Case("mod has the sign of the value", {"a": {"$mod": [3, -2]}}, a(-5, -5.5), a(5, 1)),
    Case(
        "type tells numbers apart",
        {"a": {"$type": "int"}},
        a(1, [1.5, 1]),
        [{}, *a(Int64(1), 1.5, True, D("1"))],
    ),
    Case(
        "type number is any number",
        {"a": {"$type": "number"}},
        a(1, 1.5, D("1"), Int64(1)),
        a("1", True, None),
    ),
    Case("type array is the array", {"a": {"$type": ["array", 10]}}, a([], [1], None), [{}, *a(1)]),
    Case("type of code", {"a": {"$type": 13}}, a(Code("x")), a(Code("x", {}), "x")),
    Case(
        "and, or, nor",
        {"$or": [{"a": 1}, {"$and": [{"a": {"$gt": 5}}, {"$nor": [{"a": 9}]}]}]},
        a(1, 6),
        [{}, *a(9, 2)],
    ),
    Case("nor of an absent field", {"$nor": [{"a": 1}, {"a": None}]}, a(2), [{}, *a(1)]),
    Case("a comment means nothing", {"a": 1, "$comment": "why"}, a(1), a(2)),
    # -- patterns
    Case(
        "a pattern finds",
        {"a": Regex("b")},
        a("abc", ["x", "b"], Regex("b")),
        [{}, *a("B", 1, None, Code("b"), Regex("b", "i"), Regex("bb"))],
    ),
    Case(
        "an equal expression is only that",
        {"a": {"$eq": Regex("b", "i")}},
        a(Regex("b", "i")),
        a("b", Regex("b")),
    ),
    Case(
        "options keep their order in an equality",
        {"a": {"$regex": "b", "$options": "mi"}},
        a("B"),
        a(Regex("b", "im")),
    ),
    Case(
        "options after a bare expression",
        {"a": {"$regex": Regex("b"), "$options": "i"}},
        a("B"),
        a("c"),
    ),
    Case(
        "empty options before an expression",
        {"a": {"$options": "", "$regex": Regex("b", "i")}},
        a("B"),
        a("c"),
    ),
    Case("not a pattern", {"a": {"$not": Regex("b")}}, [{}, *a("c", 1, [])], a("b", ["c", "b"])),
    Case("a pattern and a bound", {"a": {"$regex": "x", "$gt": "b"}}, a("cx"), a("ax", "c")),
    Case("a surrogate pair is one character", {"a": Regex("^.$")}, a("\U0001d11e"), a("aa")),
]


@pytest.fixture(scope="module")
def collection(mongo: MongoClient[dict[str, Any]]) -> Iterator[Collection[dict[str, Any]]]:
    name = f"test_{uuid.uuid4().hex[:16]}"
    yield mongo.get_database(name, codec_options=CODEC)["documents"]
    mongo.drop_database(name)


def both(
    collection: Collection[dict[str, Any]], query: dict[str, Any], documents: list[dict[str, Any]]
) -> tuple[list[bool], list[bool]]:
    """Which documents the predicate matches, and which the server finds."""
    collection.delete_many({})
    collection.insert_many([{"_id": n + 100, **document} for n, document in enumerate(documents)])
    stored = list(collection.find())
    compiled = Filter(query)
    assert compiled.in_process, compiled.beyond
    found = [document["_id"] for document in collection.find(compiled.query)]
    return [compiled.matches(d) for d in stored], [d["_id"] in found for d in stored]


@pytest.mark.parametrize("case", CASES, ids=[case.promise.replace(" ", "-") for case in CASES])
def test_a_filter_means_what_the_server_means(
    collection: Collection[dict[str, Any]], case: Case
) -> None:
    documents = case.matching + case.others
    expected = [True] * len(case.matching) + [False] * len(case.others)
    predicate, server = both(collection, case.query, documents)
    failing = [d for d, e, p in zip(documents, expected, predicate, strict=True) if e != p]
    assert server == expected
    assert not failing


# -- what is not a filter -----------------------------------------------------------------------

MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"$foo": 1}, r"\$foo"),
    ({"$gt": 1}, r"\$gt"),
    ({"$not": {"a": 1}}, r"\$not"),
    ({"a": {"$foo": 1}}, r"\$foo on 'a'"),
    ({"a.b": {"$gt": 1, "b": 2}}, r"b on 'a\.b'"),
    ({"a": {"$or": [{"b": 1}]}}, r"\$or on 'a'"),
    ({"a": {"$where": "1"}}, r"\$where on 'a'"),
    ({"a": {"$comment": "x"}}, r"\$comment on 'a'"),
    ({"a": {"$ref": "c"}}, r"\$ref on 'a'"),
    ({"a": {"$": 1}}, r"\$ on 'a'"),
    ({"$or": []}, r"\$or needs a nonempty array"),
    ({"$and": {"a": 1}}, r"\$and needs"),
    ({"$nor": [{"a": 1}, 1]}, r"\$nor needs an array of documents"),
    ({"$and": [{"b": {"$foo": 1}}]}, r"\$foo on 'b'"),
    ({"a": {"$in": 1}}, r"\$in on 'a' needs an array"),
    ({"a": {"$nin": {"b": 1}}}, r"\$nin on 'a' needs an array"),
    ({"a": {"$in": [{"$gt": 1}]}}, r"\$in on 'a'"),
    ({"a": {"$in": [{"$ref": "c"}]}}, r"\$in on 'a'"),
    ({"a": {"$in": [Regex("(")]}}, r"\$in on 'a'"),
    ({"a": {"$not": {}}}, r"\$not on 'a'"),
    ({"a": {"$not": 1}}, r"\$not on 'a'"),
    ({"a": {"$not": {"b": 1}}}, r"b on 'a'"),
    ({"a": {"$not": {"$foo": 1}}}, r"\$foo on 'a'"),
    ({"a": {"$ne": Regex("x")}}, r"\$ne on 'a'"),
    ({"a": {"$gte": Regex("x")}}, r"\$gte on 'a'"),
    ({"a": {"$size": -1}}, r"\$size on 'a'"),
    ({"a": {"$size": 1.5}}, r"\$size on 'a'"),
    ({"a": {"$size": "1"}}, r"\$size on 'a'"),
    ({"a": {"$size": True}}, r"\$size on 'a'"),
    ({"a": {"$size": NAN}}, r"\$size on 'a'"),
    ({"a": {"$size": 2**31}}, r"\$size on 'a'"),
    ({"a": {"$all": 1}}, r"\$all on 'a' needs an array"),
    ({"a": {"$all": [{"$gt": 1}]}}, r"\$all on 'a'"),
    ({"a": {"$all": [1, {"$elemMatch": {"b": 1}}]}}, r"\$all on 'a'"),
    ({"a": {"$all": [{"$elemMatch": {"b": 1}}, 1]}}, r"\$all on 'a'"),
    ({"a": {"$all": [{"$elemMatch": 1}]}}, r"\$elemMatch on 'a'"),
    ({"a": {"$elemMatch": 1}}, r"\$elemMatch on 'a'"),
    ({"a": {"$elemMatch": [{"b": 1}]}}, r"\$elemMatch on 'a'"),
    ({"a": {"$elemMatch": {"$gt": 1, "b": 1}}}, r"b on 'a'"),
    ({"a": {"$elemMatch": {"b": 1, "$gt": 1}}}, r"\$gt"),
    ({"a": {"$elemMatch": {"$gt": 1, "$or": [{"b": 1}]}}}, r"\$or on 'a'"),
    ({"a": {"$elemMatch": {"$and": [{"$gt": 1}]}}}, r"\$gt"),
    ({"a": {"$elemMatch": {"$where": "1"}}}, r"\$where"),
    ({"a": {"$elemMatch": {"$expr": True}}}, r"\$expr"),
    ({"a": {"$elemMatch": {"$or": [{"$expr": True}]}}}, r"\$expr"),
    ({"a": {"$mod": 3}}, r"\$mod on 'a'"),
    ({"a": {"$mod": [3]}}, r"\$mod on 'a'"),
    ({"a": {"$mod": [3, 1, 1]}}, r"\$mod on 'a'"),
    ({"a": {"$mod": [0.5, 1]}}, r"\$mod on 'a'"),
    ({"a": {"$mod": [3, "1"]}}, r"\$mod on 'a'"),
    ({"a": {"$mod": [NAN, 1]}}, r"\$mod on 'a'"),
    ({"a": {"$mod": [1e300, 1]}}, r"\$mod on 'a'"),
    ({"a": {"$type": "foo"}}, r"\$type on 'a'"),
    ({"a": {"$type": 0}}, r"\$type on 'a'"),
    ({"a": {"$type": 16.5}}, r"\$type on 'a'"),
    ({"a": {"$type": True}}, r"\$type on 'a'"),
    ({"a": {"$type": []}}, r"\$type on 'a'"),
    ({"a": {"$type": [[1]]}}, r"\$type on 'a'"),
    ({"a": {"$type": {"b": 1}}}, r"\$type on 'a'"),
    ({"a": {"$regex": 1}}, r"\$regex on 'a'"),
    ({"a": {"$options": "i"}}, r"\$options on 'a'"),
    ({"a": {"$regex": "x", "$options": 1}}, r"\$options on 'a'"),
    ({"a": {"$regex": "x", "$options": "q"}}, r"\$regex on 'a'"),
    ({"a": {"$regex": Regex("x", "i"), "$options": ""}}, r"\$options on 'a'"),
    ({"a": {"$options": "i", "$regex": Regex("x", "m")}}, r"\$options on 'a'"),
    ({"a": {"$regex": "x\0"}}, r"\$regex on 'a'"),
    ({"a": Regex("x", "l")}, r"\$regex on 'a'"),
    *[
        ({"a": {"$regex": pattern}}, r"\$regex on 'a'")
        for pattern in [
            "(",
            "(?:a",
            "a)",
            "[a",
            "[]",
            "[^]",
            "[z-a]",
            "a\\",
            "*a",
            "a|+",
        ]
        + ["{2}", "a{3,2}", "(|*)", "^*", "$+", r"\b?", "a**", "a{2}{3}", "a*?*", "a???"]
    ],
    # after something that only the server evaluates
    ({"$expr": True, "a": {"$foo": 1}}, r"\$foo on 'a'"),
    ({"a": {"$bitsAllSet": 1, "$foo": 1}}, r"\$foo on 'a'"),
]


@pytest.mark.parametrize(("query", "message"), MALFORMED, ids=repr)
def test_a_malformed_filter_is_refused_where_the_server_refuses_it(
    collection: Collection[dict[str, Any]], query: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidFilter, match=message):
        Filter(query)
    with pytest.raises(OperationFailure):
        list(collection.find(query))


VALID: list[dict[str, Any]] = [
    {"a": {"b": 1, "$gt": 1}},
    {"a": {"$eq": {"$gt": 1}}},
    {"a": {"$ne": {"$gt": 1}}},
    {"a": {"$ref": "c", "$id": 1}},
    {"a": {"$in": [{"$ref": "c", "$id": 1}, {"b": 1, "$gt": 1}]}},
    {"a": {"$all": [{"$ref": "c"}]}},
    {"a": {"$size": -0.0}},
    {"a": {"$exists": {"$foo": 1}}},
    {"$comment": {"$foo": 1}},
    {"a": {"$elemMatch": {"$comment": "x", "b": 1}}},
    {"a": {"$regex": "x", "$options": "iiu"}},
    {"a": re.compile("x")},
]


@pytest.mark.parametrize("query", VALID, ids=repr)
def test_a_strange_filter_is_accepted_where_the_server_accepts_it(
    collection: Collection[dict[str, Any]], query: dict[str, Any]
) -> None:
    assert Filter(query).in_process
    list(collection.find(query))


@pytest.mark.parametrize(
    "query",
    [1, None, "a", [("a", 1)], {1: 2}, {"a": {1: 2}}, {"a": object()}, {"a": {1}}, {"a": 2**64}]
    + [{"a\0": 1}, {"a": "\ud800"}],
)
def test_what_cannot_be_bson_is_no_filter(query: Any) -> None:
    with pytest.raises(InvalidFilter):
        Filter(query)


def test_a_filter_that_contains_itself_is_refused() -> None:
    query: dict[str, Any] = {"a": 1}
    query["$and"] = [query]
    with pytest.raises(InvalidFilter, match="levels deep"):
        Filter(query)


# -- what only the server evaluates -------------------------------------------------------------

BEYOND: list[tuple[dict[str, Any], str]] = [
    ({"$expr": {"$gt": ["$a", 1]}}, r"\$expr"),
    ({"$where": "true"}, r"\$where"),
    ({"$jsonSchema": {}}, r"\$jsonSchema"),
    ({"$alwaysTrue": 1}, r"\$alwaysTrue"),
    ({"$or": [{"a": 1}, {"$sampleRate": 0.5}]}, r"\$sampleRate"),
    ({"$id": 1}, r"\$id"),
    ({"a": {"$bitsAllSet": 1}}, r"\$bitsAllSet on 'a'"),
    ({"a": {"$not": {"$bitsAnySet": 1}}}, r"\$bitsAnySet"),
    ({"a": {"$geoWithin": {"$box": [[0, 0], [1, 1]]}}}, r"\$geoWithin"),
    ({"a": {"$elemMatch": {"$ref": "c"}}}, r"\$ref"),
    ({"a": {"$elemMatch": {"$jsonSchema": {}}}}, r"\$jsonSchema"),
    ({"a": {"$type": "symbol"}}, r"\$type"),
    ({"": 1}, "path"),
    ({"a.": 1}, "path"),
    ({"a..b": 1}, "path"),
    *[
        ({"a": {"$regex": pattern, "$options": options}}, "pattern")
        for pattern, options in [
            *[(p, "") for p in ("a*+", r"\h", r"\R", "[[:alpha:]]", "(?<=a)b", "(?<n>a)", r"a\Z")],
            *[
                (p, "")
                for p in ("(?i)a", r"(a)\1", r"\p{L}", r"\Bb", r"\x{41}", "(*UTF8)a", "[]a]")
            ],
            *[(p, "") for p in ("(a|b)*", "(a+)+", "a*a*a*a*", "(?>a)", r"\Qa\E", r"\v", "(?=a)*")],
            *[
                ("é", "i"),
                ("[à-ü]", "i"),
                ("a b", "x"),
                ("a" * 2000, ""),
                ("(" * 40 + ")" * 40, ""),
            ],
        ]
    ],
]


@pytest.mark.parametrize(("query", "reason"), BEYOND, ids=lambda v: repr(v)[:60])
def test_a_valid_filter_beyond_the_subset_is_left_to_the_server(
    collection: Collection[dict[str, Any]], query: dict[str, Any], reason: str
) -> None:
    list(collection.find(query))
    compiled = Filter(query)
    assert not compiled.in_process
    assert re.search(reason, compiled.beyond or "")
    with pytest.raises(InvalidFilter, match="by the server only"):
        compiled.matches({"a": 1})


SUBJECTS = [
    *["", "a", "A", "ab", "aB", "b", "abab", "aab", "\n", "a\n", "a\n\n", "\na", "a\nb", "b\na\n"],
    *["k", "K", "\u212a", "s", "S", "\u017f", "é", "É", "i", "\u0130", "\u0131", "ß", "\U0001d11e"],
    *["_", "-", "]", "[", "^", "\\", "{", "}", "{,2}", "a{", "a.b", "a b", " ", "\t", "\v", "\x85"],
    *[
        "\u2028",
        "\r\n",
        "\r",
        "0",
        "9",
        "\u0663",
        "a0_Z",
        "é a",
        "aé",
        "a\0b",
        "(",
        "+",
        "~~",
        "&&",
    ],
]
PATTERNS = [
    *[
        "",
        "a",
        "^a",
        "a$",
        "^a$",
        "^",
        "$",
        "^$",
        "^.$",
        "a.b",
        "a|b",
        "|a",
        "a||b",
        "(a|b)b",
        "(?:)",
    ],
    *[
        "a?b",
        "a*b",
        "^a+b",
        "a{2}",
        "^a{1,2}b",
        "a{2,}b",
        "a*?b",
        "a+?$",
        "a??b",
        "(ab)+$",
        "(ab){2}",
    ],
    *[
        "(?:a|b)?$",
        "^(a*)?$",
        "a(?=b)",
        "a(?!b)",
        "(?!a)",
        "^(?=.*b)a",
        r"\Aa",
        r"\ba",
        r"b\b",
        "^a|b$",
    ],
    *[
        r"\d",
        r"\D",
        r"\w",
        r"\W",
        r"^\W$",
        r"\s",
        r"^\S$",
        r"\t",
        r"\n",
        r"\.",
        r"\-",
        r"\_",
        r"\\",
    ],
    *[
        "{",
        "}",
        "]",
        "{,2}",
        "a{",
        "a{,2}",
        "a{x}",
        "-",
        "~~",
        "&&",
        r"\x41",
        r"\x7e",
        "[k]",
        "[^k]",
    ],
    *["[ab]", "[^a]", "^[^a]$", "[a-c]", "[a-]", "[-a]", "[a^]", r"[\]]", r"[\\]", "[[]", r"[\d]"],
    *[
        r"[^\w]",
        r"[\s-]",
        "[A-Z]",
        "[j-l]",
        "[Z-a]",
        "[^j-l]",
        r"[\x41-\x43]",
        "[&&~~||]",
        "[a-c-]",
    ],
    *["k", "s", "K|S", "i", "I", "[i]", "[a-z]", "[^a-z]", r"[^\W]", "ss", r"[\wk]", r"[^\Ws]"],
]


def test_a_pattern_in_the_subset_means_what_pcre_means(
    collection: Collection[dict[str, Any]],
) -> None:
    collection.delete_many({})
    collection.insert_many([{"_id": n, "a": text} for n, text in enumerate(SUBJECTS)])
    for options in ("", "i", "m", "s", "ims"):
        for pattern in [*PATTERNS, "é", "[à-ü]", r"\xe9"] if "i" not in options else PATTERNS:
            compiled = Filter({"a": {"$regex": pattern, "$options": options}})
            assert compiled.in_process, pattern
            found = [SUBJECTS[d["_id"]] for d in collection.find(compiled.query)]
            matching = [text for text in SUBJECTS if compiled.matches({"a": text})]
            assert matching == found, (pattern, options)


# -- keys, equalities and fields ----------------------------------------------------------------


def test_equal_filters_share_a_key_whatever_the_order_of_their_fields() -> None:
    one, other = Filter({"a": 1, "b": {"c": 1, "d": 2}}), Filter({"b": {"c": 1, "d": 2}, "a": 1})
    assert one == other
    assert len({one, other}) == 1
    assert one != Filter({"a": 1, "b": {"d": 2, "c": 1}})
    assert one != Filter({"a": 1})
    assert one != {"a": 1, "b": {"c": 1, "d": 2}}


def test_a_filter_keeps_its_own_copy_of_the_query() -> None:
    query: dict[str, Any] = {"a": {"$in": [1]}}
    compiled = Filter(query)
    query["a"]["$in"].append(2)
    assert compiled.query == {"a": {"$in": [1]}}
    assert not compiled.matches({"a": 2})


@pytest.mark.parametrize(
    ("query", "paths"),
    [
        ({"a": 1}, ["a"]),
        ({"a": {"$eq": None}, "b.c": "x"}, ["a", "b.c"]),
        ({"a": {"$in": [1, "x"]}}, ["a"]),
        ({"a": {"$in": []}}, ["a"]),
        ({"a": {"$all": [1, 2]}}, ["a", "a"]),
        ({"$and": [{"a": 1}, {"$and": [{"b": {"$eq": 1, "$gt": 0}}]}]}, ["a", "b"]),
        ({"a": {"$in": [1, {"b": 1}]}}, []),
        ({"a": {"$in": [1, Regex("x")]}}, []),
        ({"a": {"b": 1}, "c": [1], "d": Regex("x")}, []),
        ({"a": {"$ne": 1}, "b": {"$nin": [1]}, "c": {"$not": {"$eq": 1}}}, []),
        ({"$or": [{"a": 1}], "$nor": [{"b": 1}]}, []),
        ({"a": {"$elemMatch": {"b": 1}}, "b": {"$elemMatch": {"$eq": 1}}}, []),
    ],
    ids=repr,
)
def test_equalities_are_those_that_every_match_satisfies(
    query: dict[str, Any], paths: list[str]
) -> None:
    assert [path for path, _ in Filter(query).equalities] == paths


@pytest.mark.parametrize(
    "values",
    [
        [1, 1.0, Int64(1), D("1"), D("1.0"), D("10E-1")],
        [True],
        [0, -0.0, D("-0")],
        [False],
        [0.1],
        [D("0.1"), D("0.10")],
        [NAN, D("NaN"), D("sNaN")],
        [None],
        ["1"],
        [2**53, 2.0**53],
        [2**53 + 1],
        [uuid.UUID(int=1)],
        [Binary(uuid.UUID(int=1).bytes, 3)],
        [b"x", Binary(b"x", 0)],
        [NOON, NOON.astimezone(timezone(timedelta(hours=1)))],
        [Timestamp(1, 1)],
        [ONE],
        [MinKey()],
    ],
    ids=repr,
)
def test_equal_values_share_one_index_key_and_others_do_not(values: list[Any]) -> None:
    keys = {k for value in values for _, ks in Filter({"a": value}).equalities for k in ks}
    assert len(keys) == 1
    assert all(set(index_keys({"a": value}, "a")) == keys for value in values)
    others = [1, True, 0, False, 0.1, D("0.1"), NAN, None, "1", 2**53 + 1, 2**53, b"x", NOON, ONE]
    for value in others:
        equal = Filter({"a": values[0]}).matches({"a": value})
        assert (set(index_keys({"a": value}, "a")) == keys) is equal


def test_index_keys_follow_the_path_through_arrays() -> None:
    def keys(value: Any) -> set[Any]:
        return set(index_keys({"a": value}, "a"))

    missing = keys(None)
    assert set(index_keys({}, "a")) == missing
    assert set(index_keys({}, "a.b")) == missing
    assert keys([1, "x", [2]]) == keys(1) | keys("x")
    assert keys([]) == keys({}) == keys({"b": 1}) == set()
    document = {"a": [{"b": 1}, {"b": [2, 3]}, {}, 7]}
    assert set(index_keys(document, "a.b")) == keys([1, 2, 3, None])


def test_fields_are_the_top_level_names_that_the_predicate_reads() -> None:
    query = {
        "a.b": 1,
        "$or": [{"c": 1}, {"d": {"$elemMatch": {"e": 1}}}],
        "$nor": [{"f.0.g": None}],
    }
    assert Filter(query).fields == {"a", "c", "d", "f"}
