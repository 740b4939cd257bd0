"""Generated filters on generated documents: the predicate and the server find the same ones.

``HYPOTHESIS_PROFILE=thorough`` runs many more examples.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import Binary, Code, DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from pymongo import MongoClient
from pymongo.collection import Collection

from data_bridge.filter import Filter, index_keys

# An example is about 300 pairs of a filter and a document.
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
EXAMPLES = 3_000 if THOROUGH else 150
CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True, uuid_representation=UuidRepresentation.STANDARD
)
generated = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
generated_in_memory = settings(generated, max_examples=EXAMPLES // 3)


pytestmark = pytest.mark.timeout(0 if THOROUGH else 300)


@pytest.fixture(scope="module")
def collection(mongo: MongoClient[dict[str, Any]]) -> Iterator[Collection[dict[str, Any]]]:
    name = f"test_{uuid.uuid4().hex[:16]}"
    yield mongo.get_database(name, codec_options=CODEC)["documents"]
    mongo.drop_database(name)


# Few names and few values, so that filters hit documents and values that are nearly equal meet.
NAMES = st.sampled_from(["a", "b", "0"])
PATHS = st.sampled_from(
    ["a"] * 8
    + ["a.b"] * 4
    + ["b", "a.a", "a.0", "a.1", "a.0.b", "a.b.0", "a.0.0", "a.b.a", "b.a", "b.b", "a.00", "0"]
    + ["a.0.a.b", "a.0.1", "a.b.b"]
)
COMMON = st.sampled_from([0, 1, 2, None, "a", "b", 1.0, Int64(1), True, False])
NUMBERS = st.sampled_from(
    [-1, 3, 5, 2**31, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), Int64(0), Int64(2)]
    + [0.0, -0.0, 1.5, -1.5, 0.1, 2.0**53, 2.0**63, 1e300, 5e-324]
    + [float("nan"), float("inf"), float("-inf")]
    + [Decimal128(n) for n in ("0", "-0", "1", "1.0", "0.1", "1.5", "9007199254740993", "-1.5")]
    + [Decimal128(n) for n in ("NaN", "sNaN", "Infinity", "-Infinity", "1E+400", "1E-6176")]
    + [Decimal128("0.1000000000000000055511151231257827"), Decimal128("9223372036854775808")]
)
OTHERS = st.sampled_from(
    ["", "A", "ab", "b\n", "a\nb", "é", "\uffff", "\U0001d11e", "a\0b", "k", "\u212a"]
    + [datetime(1969, 12, 31, 23, 59, 59, 999_000, UTC), datetime(2026, 1, 1, tzinfo=UTC)]
    + [ObjectId("0" * 24), ObjectId("f" * 24), uuid.UUID(int=0), uuid.UUID(int=1)]
    + [b"", b"a", b"ab", Binary(b"a", 128), Binary(b"abcde", 2), Binary(b"\0" * 16, 3)]
    + [Timestamp(0, 1), Timestamp(1, 0), MinKey(), MaxKey(), DBRef("a", 1), DBRef("b", 1)]
    + [Code("a"), Code("a", {"b": 1}), Code("a", {"b": 2})]
)
REGEXES = st.sampled_from([Regex("a"), Regex("^a$", "im"), Regex("B", "i"), Regex("[^a]", "s")])
SCALARS = st.one_of(COMMON, COMMON, COMMON, NUMBERS, OTHERS)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.dictionaries(NAMES, inner, min_size=1, max_size=2),
        st.lists(inner, min_size=1, max_size=3),
        st.lists(st.dictionaries(NAMES, inner, min_size=1, max_size=2), min_size=1, max_size=2),
        st.sampled_from([[], {}, [[]], [{}]]),
    )


FLAT = nested(SCALARS)
VALUES = st.one_of(SCALARS, SCALARS | REGEXES, FLAT, FLAT, FLAT, nested(SCALARS | FLAT))
LITERALS = st.one_of(COMMON, COMMON, COMMON, SCALARS, SCALARS, FLAT, nested(SCALARS | FLAT))
DOCUMENTS = st.lists(
    st.fixed_dictionaries({}, optional={"a": VALUES, "b": FLAT | SCALARS, "0": SCALARS})
    | st.fixed_dictionaries({"a": VALUES}),
    min_size=15,
    max_size=40,
)
TYPES = st.sampled_from([1, 2, 3, "array", 5, 8.0, "date", "null", 16, "long", "number", "regex"])
PATTERNS = st.sampled_from(
    ["a", "^a", "b$", "^$", ".b", "A|b", r"\W", "[^a]", "k", "[j-l]", "(ab)?$", "a{1,2}b?"]
)


def operators(depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """Documents of operators for one field."""
    choices: list[st.SearchStrategy[dict[str, Any]]] = [
        *[
            st.dictionaries(st.sampled_from([name]), LITERALS, min_size=1)
            for name in ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte")
        ],
        st.fixed_dictionaries({"$gte": LITERALS, "$lte": LITERALS}),
        st.fixed_dictionaries({"$in": st.lists(LITERALS | REGEXES, max_size=4)}),
        st.fixed_dictionaries({"$nin": st.lists(LITERALS | REGEXES, max_size=4)}),
        st.fixed_dictionaries({"$exists": st.sampled_from([True, False, 1, 0, None])}),
        st.fixed_dictionaries({"$size": st.sampled_from([0, 1, 2, 2.0])}),
        st.fixed_dictionaries({"$all": st.lists(COMMON | LITERALS | REGEXES, max_size=2)}),
        st.fixed_dictionaries({"$type": TYPES | st.lists(TYPES, min_size=1, max_size=3)}),
        st.fixed_dictionaries(
            {
                "$mod": st.tuples(
                    st.sampled_from([-3, -1, 1, 2, 2.5, Int64(3), Decimal128("2")]),
                    st.sampled_from([0, 1, -1, 0.5]),
                )
            }
        ),
        st.fixed_dictionaries(
            {"$regex": PATTERNS, "$options": st.sampled_from(["", "i", "m", "s", "im"])}
        ),
    ]
    if depth:
        inner = operators(depth - 1)
        element = st.fixed_dictionaries({"$elemMatch": inner | queries(depth - 1, NAMES)})
        choices += [
            *[st.fixed_dictionaries({"$not": inner | REGEXES})] * 2,
            *[element] * 3,
            st.fixed_dictionaries({"$all": st.lists(element, min_size=1, max_size=2)}),
        ]
    return st.one_of(choices)


def queries(depth: int, paths: st.SearchStrategy[str] = PATHS) -> st.SearchStrategy[dict[str, Any]]:
    conditions = st.one_of(operators(depth), operators(depth), LITERALS, REGEXES)
    one = st.dictionaries(paths, conditions, min_size=1, max_size=1)
    if not depth:
        return one
    several = st.lists(queries(depth - 1, paths), min_size=1, max_size=3)
    return st.one_of(
        one,
        one,
        one,
        st.dictionaries(paths, conditions, min_size=2, max_size=2),
        *[st.fixed_dictionaries({name: several}) for name in ("$and", "$or", "$nor")],
    )


FILTERS = st.lists(queries(2), min_size=8, max_size=20)


@generated
@given(
    documents=DOCUMENTS,
    filters=FILTERS,
)
def test_the_predicate_matches_what_the_server_finds(
    collection: Collection[dict[str, Any]],
    documents: list[dict[str, Any]],
    filters: list[dict[str, Any]],
) -> None:
    collection.delete_many({})
    collection.insert_many({"_id": n, **document} for n, document in enumerate(documents))
    stored = list(collection.find())
    for query in filters:
        compiled = Filter(query)
        assert compiled.in_process, compiled.beyond
        note(f"filter: {query}")
        expected = {document["_id"] for document in collection.find(compiled.query, {"_id": 1})}
        assert {d["_id"] for d in stored if compiled.matches(d)} == expected


@generated_in_memory
@given(
    documents=DOCUMENTS,
    filters=FILTERS,
)
def test_a_matching_document_is_in_the_index_of_each_equality(
    documents: list[dict[str, Any]], filters: list[dict[str, Any]]
) -> None:
    for query in filters:
        compiled = Filter(query)
        for document in filter(compiled.matches, documents):
            for path, keys in compiled.equalities:
                assert set(keys) & set(index_keys(document, path)), (query, document, path)


@generated_in_memory
@given(
    documents=DOCUMENTS,
    filters=FILTERS,
)
def test_the_predicate_reads_no_other_fields_than_it_says(
    documents: list[dict[str, Any]], filters: list[dict[str, Any]]
) -> None:
    for query in filters:
        compiled = Filter(query)
        for document in documents:
            read = {name: v for name, v in document.items() if name in compiled.fields}
            assert compiled.matches(read) == compiled.matches(document)
