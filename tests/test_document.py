"""What a model declares, and what it reads and writes, on both drivers against a real server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import date
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from bson import Decimal128, ObjectId
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    computed_field,
    field_serializer,
)
from pydantic.alias_generators import to_camel
from pymongo import IndexModel

from data_bridge import connect
from data_bridge.document import (
    Document,
    Model,
    ModelSettings,
    collection_name,
    ensure_indexes,
    settings_of,
    to_json,
    to_jsonable,
)
from data_bridge.errors import (
    DocumentInvalid,
    DocumentNotFound,
    DuplicateKey,
    InvalidFilter,
    InvalidUpdate,
    ModelInvalid,
    NotBound,
    OperationFailed,
)

if TYPE_CHECKING:
    from data_bridge.bridge import Bridge


class Status(StrEnum):
    OPEN = "open"
    PAID = "paid"


class Order(Document):
    status: str
    total: float

    class Settings:
        collection = "orders"


class Invoice(Document):
    id: int
    status: Status = Status.OPEN
    amount: Decimal = Decimal("0.00")
    due: date | None = None

    class Settings:
        collection = "invoices"


class Ticket(Document):
    id: UUID = Field(default_factory=uuid.uuid4)
    title: str = ""

    class Settings:
        collection = "tickets"


class Place(Model):
    year: int
    number: int


class Entry(Document):
    id: Place
    text: str = ""

    class Settings:
        collection = "entries"


class Draft(Document):
    id: ObjectId | None = None

    class Settings:
        collection = "drafts"


class Unique(Document):
    name: str
    rank: int = 0

    class Settings:
        collection = "uniques"
        indexes = (IndexModel("name", unique=True, name="one_name"), ("rank", -1))


# -- declaring ----------------------------------------------------------------------------------


def test_a_document_without_a_collection_is_refused_by_name() -> None:
    class Abstract(Document):
        text: str

    with pytest.raises(ModelInvalid, match="Abstract has no collection"):
        collection_name(Abstract)
    with pytest.raises(ModelInvalid, match="Abstract has no collection"):
        _ = Abstract.collection
    assert settings_of(Abstract) == ModelSettings()


def test_a_subclass_has_the_settings_of_its_base_where_it_says_nothing() -> None:
    class Base(Document):
        class Settings:
            collection = "things"
            pre_images = True

    class Same(Base):
        pass

    class Other(Base):
        class Settings:
            collection = "others"

    class Extended(Base):
        class Settings(Base.Settings):
            indexes = ("a",)

    assert settings_of(Same) == ModelSettings("things", (), True)
    assert settings_of(Other) == ModelSettings("others", (), True)
    assert settings_of(Extended).collection == "things"
    assert len(settings_of(Extended).indexes) == 1


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"colection": "a"}, "has no 'colection'"),
        ({"collection": ""}, "does not take for a name"),
        ({"collection": 3}, "does not take for a name"),
        ({"collection": "a$b"}, "does not take for a name"),
        ({"collection": "system.users"}, "does not take for a name"),
        ({"indexes": "status"}, "indexes is not a list"),
        ({"indexes": [3]}, "indexes holds 3"),
        ({"indexes": [()]}, r"indexes holds \(\)"),
        ({"indexes": [[("a", 2)]]}, "indexes holds"),
        ({"indexes": [""]}, "indexes holds ''"),
        ({"pre_images": 1}, "pre_images is neither"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused_by_name(
    stated: dict[str, Any], message: str
) -> None:
    settings = type("Settings", (), {**stated, "__qualname__": "Wrong.Settings"})
    names = {"Settings": settings, "__qualname__": "Wrong", "__module__": __name__}
    with pytest.raises(ModelInvalid, match=f"Wrong.Settings.*{message}"):
        type("Wrong", (Document,), names)


@pytest.mark.parametrize(
    ("stated", "keys"),
    [
        ("a", {"a": 1}),
        (("a", -1), {"a": -1}),
        (["a", -1], {"a": -1}),
        (("a", "text"), {"a": "text"}),
        (("a", "b"), {"a": 1, "b": 1}),
        ([("a", 1), ("b", -1)], {"a": 1, "b": -1}),
        ([["a", 1], "b"], {"a": 1, "b": 1}),
        (IndexModel([("a", "hashed")]), {"a": "hashed"}),
    ],
    ids=str,
)
def test_an_index_is_a_name_a_pair_a_list_or_an_index_model(
    stated: Any, keys: dict[str, Any]
) -> None:
    class Indexed(Document):
        class Settings:
            collection = "indexed"
            indexes = (stated,)

    assert dict(settings_of(Indexed).indexes[0].document["key"]) == keys


@pytest.mark.parametrize("name", ["count", "update", "collection", "watch", "find"])
def test_a_field_that_would_hide_a_method_is_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(ModelInvalid, match=rf"hide Document.{name}.*alias='{name}'"):
        type("Hiding", (Document,), {"__annotations__": {name: int}, "__qualname__": "Hiding"})


def test_a_field_with_the_name_of_a_method_is_stored_by_its_alias() -> None:
    class Counter(Document):
        count_: int = Field(alias="count")

    counter = Counter(count=3)

    assert counter.to_bson() == {"_id": counter.id, "count": 3}
    assert Counter.from_bson(counter.to_bson()) == counter


def test_an_id_declared_with_an_underscore_is_refused() -> None:
    with pytest.raises(ModelInvalid, match="Declare 'id'"):

        class Wrong(Document):
            _id: int


# -- forms --------------------------------------------------------------------------------------


def test_the_id_is_read_as_either_name_and_written_as_id() -> None:
    made = ObjectId()
    for given in (
        {"id": made},
        {"_id": made},
        {"id": str(made)},
        {"_id": str(made)},
    ):
        order = Order.model_validate({**given, "status": "open", "total": 1})
        assert order.id == made
        assert order.to_bson() == {"_id": made, "status": "open", "total": 1.0}
        assert order.model_dump() == {"id": made, "status": "open", "total": 1.0}
        assert order.model_dump(by_alias=True) == order.model_dump()
        assert order.model_dump_json(by_alias=True) == (
            f'{{"id":"{made}","status":"open","total":1.0}}'
        )
        assert to_json(order) == order.model_dump_json().encode()
        assert to_jsonable(order) == {"id": str(made), "status": "open", "total": 1.0}


def test_a_new_document_has_an_object_id_of_its_own() -> None:
    first, second = Order(status="a", total=1), Order(status="a", total=1)
    assert isinstance(first.id, ObjectId)
    assert first.id != second.id


def test_a_stored_field_called_id_is_not_taken_for_the_id() -> None:
    class Repository(Document):
        github_id: int = Field(alias="id")

    made = ObjectId()
    repository = Repository.from_bson({"_id": made, "id": 7})

    assert (repository.id, repository.github_id) == (made, 7)
    assert repository.to_bson() == {"_id": made, "id": 7}


def test_an_id_without_default_is_required_by_pydantic_itself() -> None:
    with pytest.raises(ValidationError, match="Field required"):
        Invoice(amount=Decimal("1"))  # type: ignore[call-arg]


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_json_schema_calls_the_id_id(mode: Any) -> None:
    schema = Invoice.model_json_schema(mode=mode)

    assert schema["properties"]["id"] == {"title": "Id", "type": "integer"}
    assert "id" in schema["required"]
    assert "_id" not in str(schema)
    assert Order.model_json_schema(mode=mode)["properties"]["id"]["type"] == "string"


def test_an_excluded_field_is_stored_and_a_computed_or_private_one_is_not() -> None:
    class User(Document):
        name: str
        password: str = Field(exclude=True)
        _cache: int = PrivateAttr(1)

        @computed_field  # type: ignore[prop-decorator]
        @property
        def greeting(self) -> str:
            return f"Hello {self.name}"

        @field_serializer("name")
        def shouted(self, name: str) -> str:
            return name.upper()

    user = User(name="a", password="secret")

    assert user.to_bson() == {"_id": user.id, "name": "a", "password": "secret"}
    assert to_jsonable(user) == {"id": str(user.id), "name": "A", "greeting": "Hello a"}


def test_a_field_is_stored_under_the_name_it_validates_from() -> None:
    class Aliased(Document):
        one: int = Field(alias="uno")
        two: int = Field(validation_alias=AliasChoices(AliasPath("x", "y"), "dos", "due"))
        three: int = Field(serialization_alias="tres")

    aliased = Aliased.model_validate({"uno": 1, "due": 2, "three": 3})

    assert aliased.to_bson() == {"_id": aliased.id, "uno": 1, "dos": 2, "three": 3}
    assert Aliased.from_bson(aliased.to_bson()) == aliased


def test_a_field_that_only_a_path_leads_to_has_no_name_to_be_stored_under() -> None:
    class Deep(Document):
        first: str = Field(validation_alias=AliasPath("names", 0))

    with pytest.raises(DocumentInvalid, match="alias path of 'first'"):
        Deep.model_validate({"names": ["a"]}).to_bson()


def test_an_alias_generator_names_every_field_but_the_id() -> None:
    class Camel(Document):
        model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)
        unit_price: float

    camel = Camel(unit_price=1)

    assert camel.to_bson() == {"_id": camel.id, "unitPrice": 1.0}
    assert to_jsonable(camel) == {"id": str(camel.id), "unitPrice": 1.0}
    assert Camel.from_bson(camel.to_bson()) == camel


def test_extra_fields_are_stored_where_the_model_allows_them() -> None:
    class Open(Document):
        model_config = ConfigDict(extra="allow")

    document = Open.model_validate({"colour": "red", "n": Decimal("1.5")})

    assert document.to_bson() == {"_id": document.id, "colour": "red", "n": Decimal128("1.5")}


def test_a_document_that_does_not_fit_names_itself_and_its_fields_never_their_values() -> None:
    made = ObjectId()
    with pytest.raises(DocumentInvalid) as misfit:
        Order.from_bson({"_id": made, "status": {"secret": 1}, "total": "secret"})

    message = str(misfit.value)
    assert message.startswith(f"Order {made} in the database does not fit")
    assert "status (string_type)" in message
    assert "total (float_parsing)" in message
    assert "secret" not in message
    assert misfit.value.document_id == made
    assert isinstance(misfit.value.__cause__, ValidationError)


def test_what_is_no_document_at_all_does_not_fit_either() -> None:
    with pytest.raises(DocumentInvalid, match="Order in the database does not fit"):
        Order.from_bson([1])  # type: ignore[arg-type]


def test_a_document_may_hold_another_one_with_its_id() -> None:
    class Cart(Document):
        last: Order

    cart = Cart(last=Order(status="a", total=1))

    assert cart.to_bson()["last"]["_id"] == cart.last.id
    assert Cart.from_bson(cart.to_bson()) == cart
    assert "_id" not in str(Cart.model_json_schema())


async def test_a_model_without_an_open_bridge_is_told_how_to_open_one() -> None:
    with pytest.raises(NotBound, match="Order is not connected"):
        await Order.get(ObjectId())
    with pytest.raises(NotBound):
        Order.watch()


# -- writing ------------------------------------------------------------------------------------


async def test_an_inserted_document_is_stored_as_its_bson_and_found_by_its_id(
    bridge: Bridge,
) -> None:
    order = Order(status="open", total=2.5)

    assert await order.insert() is order

    assert await Order.collection.find_one() == {"_id": order.id, "status": "open", "total": 2.5}
    assert await Order.get(order.id) == order
    assert await Order.get(str(order.id)) == order


@pytest.mark.parametrize(
    "document",
    [
        Invoice(id=3, status=Status.PAID, amount=Decimal("1.10"), due=date(2024, 2, 29)),
        Ticket(title="a"),
        Entry(id=Place(year=2024, number=1), text="b"),
    ],
    ids=lambda d: type(d).__name__,
)
async def test_a_document_with_an_id_of_any_type_goes_through_its_life(
    bridge: Bridge, document: Any
) -> None:
    model = type(document)
    await document.insert()

    assert await model.get(document.id) == document
    assert await model.find() == [document]
    with pytest.raises(DuplicateKey):
        await document.model_copy().insert()
    await document.replace()
    await document.reload()
    await document.delete()
    assert await model.get(document.id) is None


async def test_an_id_from_a_url_is_read_as_the_model_reads_it(bridge: Bridge) -> None:
    await Invoice(id=7).insert()
    ticket = await Ticket().insert()

    assert (await Invoice.get("7")) == Invoice(id=7)
    assert (await Ticket.get(str(ticket.id))) == ticket
    assert await Invoice.get("seven") is None
    assert await Order.get("no object id") is None
    assert await Order.get("") is None
    with pytest.raises(InvalidFilter, match="dict is not the type of an id of Order"):
        await Order.get({"$gt": ""})


async def test_an_optional_id_is_made_when_the_document_is_stored(bridge: Bridge) -> None:
    inserted, saved = Draft(), Draft()
    await inserted.insert()
    await saved.save()

    assert {d.id for d in await Draft.find()} == {inserted.id, saved.id}
    assert isinstance(inserted.id, ObjectId)


async def test_inserting_an_id_twice_is_a_duplicate_key(bridge: Bridge) -> None:
    order = await Order(status="a", total=1).insert()
    with pytest.raises(DuplicateKey, match="cannot insert an Order"):
        await order.insert()


async def test_insert_many_keeps_the_order_of_its_ids(bridge: Bridge) -> None:
    invoices = [Invoice(id=n) for n in (5, 3, 9)]

    assert await Invoice.insert_many(iter(invoices)) == [5, 3, 9]
    assert await Invoice.find(sort="_id") == [invoices[1], invoices[0], invoices[2]]
    assert await Invoice.insert_many([]) == []


async def test_insert_many_stops_at_the_first_duplicate(bridge: Bridge) -> None:
    with pytest.raises(DuplicateKey, match="insert 3 documents of Invoice"):
        await Invoice.insert_many([Invoice(id=1), Invoice(id=1), Invoice(id=2)])
    assert await Invoice.count() == 1


async def test_insert_many_takes_only_documents_of_its_class(bridge: Bridge) -> None:
    with pytest.raises(DocumentInvalid, match="cannot insert into Order: dict is not one"):
        await Order.insert_many([{"status": "a"}])  # type: ignore[list-item]


async def test_save_inserts_and_then_replaces(bridge: Bridge) -> None:
    order = Order(status="a", total=1)
    await order.save()
    order.status = "b"

    assert await order.save() is order
    assert await Order.find() == [order]


async def test_replace_stores_the_whole_document_and_misses_one_that_is_gone(
    bridge: Bridge,
) -> None:
    order = await Order(status="a", total=1).insert()
    await Order.collection.update_one({"_id": order.id}, {"$set": {"stray": 1}})
    order.status = "b"
    await order.replace()
    assert await Order.collection.find_one() == order.to_bson()

    await order.delete()
    with pytest.raises(DocumentNotFound, match=f"cannot replace Order {order.id}") as missing:
        await order.replace()
    assert missing.value.document_id == order.id


async def test_update_brings_the_instance_to_its_stored_state(bridge: Bridge) -> None:
    invoice = await Invoice(id=1, amount=Decimal("1.00")).insert()
    await Invoice.collection.update_one({"_id": 1}, {"$set": {"due": None, "status": "paid"}})

    updated = await invoice.update({"$inc": {"amount": Decimal("0.50")}})

    assert updated is invoice
    assert invoice == Invoice(id=1, status=Status.PAID, amount=Decimal("1.50"))
    assert await Invoice.get(1) == invoice


async def test_update_takes_the_values_that_a_model_takes(bridge: Bridge) -> None:
    invoice = await Invoice(id=1).insert()
    await invoice.update({"$set": {"status": Status.PAID, "due": date(2024, 1, 2)}})
    assert (invoice.status, invoice.due) == (Status.PAID, date(2024, 1, 2))


async def test_update_takes_an_aggregation_pipeline(bridge: Bridge) -> None:
    order = await Order(status="a", total=2).insert()
    await order.update([{"$set": {"total": {"$multiply": ["$total", 3]}}}])
    assert order.total == 6


async def test_update_changes_a_frozen_instance_too(bridge: Bridge) -> None:
    class Frozen(Order):
        model_config = ConfigDict(frozen=True)

    frozen = await Frozen(status="a", total=1).insert()
    await frozen.update({"$set": {"status": "b"}})
    assert frozen.status == "b"


@pytest.mark.parametrize("update", [{"status": "b"}, {}, [], "x", {"$set": {}, "a": 1}], ids=str)
async def test_an_update_without_operators_is_refused_before_it_is_sent(
    bridge: Bridge, update: Any
) -> None:
    order = await Order(status="a", total=1).insert()
    with pytest.raises(InvalidUpdate, match=r"an update of an Order takes .*\$set"):
        await order.update(update)
    with pytest.raises(InvalidUpdate):
        await Order.update_many({}, update)
    assert (await order.reload()).status == "a"


async def test_an_update_that_the_server_refuses_keeps_the_instance(bridge: Bridge) -> None:
    order = await Order(status="a", total=1).insert()
    with pytest.raises(OperationFailed, match="cannot update an Order"):
        await order.update({"$nonsense": {"status": "b"}})
    assert order.status == "a"


async def test_an_update_to_what_does_not_fit_the_model_says_so(bridge: Bridge) -> None:
    order = await Order(status="a", total=1).insert()
    with pytest.raises(DocumentInvalid, match=r"total \(missing\)"):
        await order.update({"$unset": {"total": ""}})


async def test_update_delete_and_reload_miss_a_document_that_is_gone(bridge: Bridge) -> None:
    order = Order(status="a", total=1)
    for doing, call in (
        ("update", lambda: order.update({"$set": {"status": "b"}})),
        ("delete", order.delete),
        ("reload", order.reload),
    ):
        with pytest.raises(DocumentNotFound, match=f"cannot {doing} Order {order.id}"):
            await call()


async def test_reload_takes_over_what_others_wrote(bridge: Bridge) -> None:
    order = await Order(status="a", total=1).insert()
    await Order.collection.update_one({"_id": order.id}, {"$set": {"status": "b"}})

    assert await order.reload() is order
    assert order.status == "b"


async def test_many_are_updated_and_deleted_by_a_filter(bridge: Bridge) -> None:
    await Order.insert_many([Order(status=s, total=1) for s in "aab"])

    assert await Order.update_many({"status": "a"}, {"$set": {"total": 5}}) == 2
    assert await Order.update_many({"status": "a"}, {"$set": {"total": 5}}) == 0
    assert await Order.delete_many({"total": 5}) == 2
    assert await Order.count() == 1
    with pytest.raises(InvalidFilter, match="matches all"):
        await Order.delete_many(None)  # type: ignore[arg-type]
    assert await Order.delete_many({}) == 1


async def test_what_bson_cannot_hold_is_refused_without_its_values(bridge: Bridge) -> None:
    class Loose(Document):
        value: Any

        class Settings:
            collection = "loose"

    with pytest.raises(DocumentInvalid, match="over 16 MB") as refused:
        await Loose(value="secret" * 3_000_000).insert()
    assert "secret" not in str(refused.value)
    for value in ("\ud800 secret", {"a\0secret": 1}):
        with pytest.raises(DocumentInvalid, match="cannot insert a Loose") as refused:
            await Loose(value=value).insert()
        assert "secret" not in str(refused.value)
    assert await Loose.count() == 0


async def test_writes_and_reads_of_a_session_are_one_transaction(bridge: Bridge) -> None:
    kept = await Order(status="kept", total=1).insert()
    client = Order.collection.database.client
    started = client.start_session()
    session = await started if asyncio.iscoroutine(started) else started

    async with session:
        starting = session.start_transaction()
        if asyncio.iscoroutine(starting):
            await starting
        order = await Order(status="a", total=1).insert(session=session)
        await order.update({"$set": {"status": "b"}}, session=session)
        await Order.insert_many([Order(status="c", total=1)], session=session)
        await kept.delete(session=session)
        assert await Order.count(session=session) == 2
        assert await Order.get(order.id, session=session) == order
        assert await Order.find({"status": "b"}, session=session) == [order]
        assert await Order.find({"status": "b"}) == []
        await session.abort_transaction()

    assert await Order.find() == [kept]


# -- reading ------------------------------------------------------------------------------------


@pytest.fixture
async def orders(bridge: Bridge) -> AsyncIterator[list[Order]]:
    orders = [Order(status="ab"[n % 2], total=n) for n in range(6)]
    await Order.insert_many(orders)
    yield orders


async def test_find_is_awaited_to_a_list(orders: list[Order]) -> None:
    assert await Order.find(sort="total") == orders
    assert await Order.find({"status": "a"}, sort="total") == orders[::2]
    assert await Order.find({"total": {"$gt": 3}}, sort="-total") == orders[:3:-1]
    assert await Order.find(sort="total", skip=1, limit=2) == orders[1:3]
    assert await Order.find({"status": "none"}) == []


async def test_find_is_iterated_and_may_be_left_early(orders: list[Order]) -> None:
    found = Order.find(sort="total")

    assert [order async for order in found] == orders
    async for order in found:
        assert order == orders[0]
        break
    assert await found == orders


@pytest.mark.parametrize(
    "sort",
    ["-total", [("total", -1)], {"total": -1}, ["-total", "+status"], (("total", -1), "status")],
    ids=str,
)
async def test_sort_is_a_name_pairs_or_a_mapping(orders: list[Order], sort: Any) -> None:
    assert await Order.find(sort=sort) == orders[::-1]
    assert await Order.find_one(sort=sort) == orders[-1]


async def test_find_one_gives_none_where_nothing_matches(orders: list[Order]) -> None:
    assert await Order.find_one({"total": 3}) == orders[3]
    assert await Order.find_one({"total": 99}) is None
    assert await Order.find_one() is not None


async def test_count_counts_what_matches(orders: list[Order]) -> None:
    assert await Order.count() == 6
    assert await Order.count({"status": "a"}) == 3


async def test_filters_take_the_values_that_a_model_takes(bridge: Bridge) -> None:
    await Invoice(id=1, status=Status.PAID, amount=Decimal("2.50"), due=date(2024, 1, 2)).insert()
    for filter in (
        {"status": Status.PAID},
        {"amount": {"$gte": Decimal("2.50")}},
        {"due": date(2024, 1, 2)},
        {"_id": {"$in": {1, 2}}},
    ):
        assert await Invoice.count(filter) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Order.find("status"),  # type: ignore[arg-type]
        lambda: Order.find({"a": 1j}),
        lambda: Order.find(sort=3),  # type: ignore[arg-type]
        lambda: Order.find(sort=[("a", 1, 2)]),  # type: ignore[list-item]
        lambda: Order.find(sort="-"),
        lambda: Order.find(skip=-1),
        lambda: Order.find(limit=-1),
    ],
)
def test_a_filter_or_sort_that_is_none_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(InvalidFilter):
        wrong()


async def test_a_filter_that_the_server_refuses_is_an_operation_failed(bridge: Bridge) -> None:
    for call in (
        Order.find({"total": {"$nonsense": 1}}),
        Order.find_one({"$nonsense": 1}),
        Order.count({"$nonsense": 1}),
    ):
        with pytest.raises(OperationFailed, match="of Order|an Order"):
            await call


async def test_a_document_that_does_not_fit_fails_its_own_read(orders: list[Order]) -> None:
    await Order.collection.insert_one({"_id": "odd", "status": 5})

    with pytest.raises(DocumentInvalid, match="Order odd in the database"):
        await Order.find()
    with pytest.raises(DocumentInvalid, match="Order odd in the database"):
        await Order.find_one({"_id": "odd"})
    assert await Order.get(orders[0].id) == orders[0]


# -- indexes ------------------------------------------------------------------------------------


async def test_indexes_are_created_and_may_be_created_again(bridge: Bridge) -> None:
    collection = Unique.collection
    await ensure_indexes(Unique, collection)
    await ensure_indexes(Unique, collection)

    assert set(await collection.index_information()) == {"_id_", "one_name", "rank_-1"}
    await Unique(name="a").insert()
    with pytest.raises(DuplicateKey):
        await Unique(name="a").insert()
    second = await Unique(name="b").insert()
    with pytest.raises(DuplicateKey, match="cannot update an Unique|cannot update a Unique"):
        await second.update({"$set": {"name": "a"}})


async def test_an_index_that_conflicts_is_named_with_its_model(bridge: Bridge) -> None:
    collection = bridge.driver.collection("uniques_elsewhere")
    await collection.create_index("rank", name="one_name")

    with pytest.raises(OperationFailed, match="create the index 'one_name' of Unique") as conflict:
        await ensure_indexes(Unique, collection)
    assert conflict.value.code in (85, 86)


async def test_a_unique_index_over_duplicates_is_named_with_its_model(bridge: Bridge) -> None:
    collection = bridge.driver.collection("uniques_elsewhere")
    await collection.insert_many([{"name": "a"}, {"name": "a"}])

    with pytest.raises(DuplicateKey, match="create the index 'one_name' of Unique"):
        await ensure_indexes(Unique, collection)


# -- mongomock ----------------------------------------------------------------------------------


async def test_reads_and_writes_work_on_mongomock() -> None:
    mongomock_motor = pytest.importorskip("mongomock_motor")
    database = mongomock_motor.AsyncMongoMockClient()["shop"]
    async with connect(database, documents=[Invoice, Unique]):
        first = await Invoice(id=1, amount=Decimal("1.10"), due=date(2024, 1, 2)).insert()
        await Invoice.insert_many([Invoice(id=2), Invoice(id=3)])

        assert await Invoice.get(1) == first
        assert [i.id for i in await Invoice.find(sort="-_id", limit=2)] == [3, 2]
        assert [i.id async for i in Invoice.find({"_id": {"$gt": 1}}, sort="_id")] == [2, 3]
        await first.update({"$set": {"status": Status.PAID}})
        assert (await first.reload()).status is Status.PAID
        await first.save()
        await first.replace()
        with pytest.raises(DuplicateKey):
            await first.insert()
        await first.delete()
        assert await Invoice.count() == 2
        assert await Invoice.delete_many({}) == 2
        await Unique(name="a").insert()
        with pytest.raises(DuplicateKey):
            await Unique(name="a").insert()


class Embedded(BaseModel):
    amount: Decimal


async def test_a_plain_model_inside_comes_back_from_the_server_equal(bridge: Bridge) -> None:
    class Holder(Document):
        one: Embedded
        many: list[Embedded]
        named: dict[Status, Embedded]

        class Settings:
            collection = "holders"

    holder = Holder(
        one=Embedded(amount=Decimal("1.10")),
        many=[Embedded(amount=Decimal("2"))],
        named={Status.OPEN: Embedded(amount=Decimal("3"))},
    )
    await holder.insert()

    assert await Holder.get(holder.id) == holder
