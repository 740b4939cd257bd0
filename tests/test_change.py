"""A change event as a typed object, whatever the server of today or tomorrow puts in it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from bson import ObjectId, Timestamp

from data_bridge import Change, Document, Operation, UpdateDescription
from data_bridge.errors import DocumentInvalid

TOKEN = "826B075A0B000000182B022C0100296E5A10042ED5FEF29505401F919B3D947308B63846645F696400290004"


class Order(Document):
    id: Any = None
    status: str

    class Settings:
        collection = "changed_orders"


def change(**raw: Any) -> Change[Order]:
    return Change({"_id": {"_data": TOKEN}, "operationType": "insert", **raw}, Order)


@pytest.mark.parametrize("operation", list(Operation), ids=str)
def test_known_operations_are_members(operation: Operation) -> None:
    assert change(operationType=operation.value).operation is operation


def test_an_unknown_operation_is_its_name() -> None:
    operation = change(operationType="frobnicate").operation
    assert operation == "frobnicate" and not isinstance(operation, Operation)


def test_an_event_with_nothing_in_it_has_nothing_in_it() -> None:
    bare = change()
    assert bare.document_id is None and bare.full_document is None and bare.document is None
    assert bare.full_document_before_change is None and bare.update_description is None
    assert bare.wall_time is None and bare.namespace == ""
    assert repr(bare) == "<Change insert  None>"


def test_documents_are_validated_when_first_read_and_only_then() -> None:
    key = ObjectId()
    found = change(
        documentKey={"_id": key, "shard": 1},
        fullDocument={"_id": key, "status": "b"},
        fullDocumentBeforeChange={"_id": key, "status": "a"},
    )
    assert found.document_id == key
    assert found.full_document is found.full_document
    assert found.full_document == Order(id=key, status="b")
    assert found.full_document_before_change == Order(id=key, status="a")
    assert found.full_document_before_change is found.full_document_before_change
    assert found.document == {"id": str(key), "status": "b"}
    assert found.document is found.document


def test_an_image_that_does_not_fit_fails_alone() -> None:
    found = change(fullDocument={"_id": 1, "status": "b"}, fullDocumentBeforeChange={"_id": 1})
    with pytest.raises(DocumentInvalid, match=r"status \(missing\)"):
        _ = found.full_document_before_change
    assert found.full_document == Order(id=1, status="b")


@pytest.mark.parametrize("id", [0, "", False, None, {"a": 1}], ids=repr)
def test_an_id_may_be_anything(id: Any) -> None:
    assert change(documentKey={"_id": id}).document_id == id


def test_an_update_is_described_by_paths() -> None:
    raw = {
        "updatedFields": {"a.b": 1},
        "removedFields": ["c"],
        "truncatedArrays": [{"field": "d", "newSize": 2}],
        "disambiguatedPaths": {},
    }
    assert change(updateDescription=raw).update_description == UpdateDescription(
        {"a.b": 1}, ["c"], [{"field": "d", "newSize": 2}]
    )
    assert change(updateDescription={}).update_description == UpdateDescription({}, [], [])


def test_a_change_has_a_time_and_a_position() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    found = change(wallTime=now, clusterTime=Timestamp(0x6B075A0B, 0x18))
    assert found.wall_time == now
    assert found.resume_token.hex == TOKEN
    assert found.timestamp == Timestamp(0x6B075A0B, 0x18) == found.resume_token.cluster_time
    assert str(found.timestamp) == "Timestamp(1795643915, 24)"


@pytest.mark.parametrize(
    ("ns", "expected"),
    [({"db": "shop", "coll": "orders"}, "shop.orders"), ({"db": "shop"}, "shop"), (None, "")],
    ids=str,
)
def test_a_namespace_is_a_name(ns: Any, expected: str) -> None:
    assert change(ns=ns).namespace == expected
