"""What a value becomes in MongoDB, in Python again, in JSON and in JSON schema."""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
import warnings
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from ipaddress import IPv4Address
from pathlib import PurePosixPath
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import bson
import pytest
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
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AnyUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NaiveDatetime,
    PlainSerializer,
    RootModel,
    SecretStr,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypedDict

from data_bridge.document import Document, Model, to_bson, to_json, to_jsonable
from data_bridge.errors import DocumentInvalid

CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True, uuid_representation=UuidRepresentation.STANDARD
)
OID = ObjectId("65f0c0ffee65f0c0ffee65f0")
T = TypeVar("T")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Status(StrEnum):
    OPEN = "open"


class Level(IntEnum):
    LOW = 1


class Price(BaseModel):
    """A model that knows nothing of BSON."""

    amount: Decimal
    currency: str = "EUR"
    former: Price | None = None


class Part(Model):
    """A model of this package."""

    key: ObjectId
    amount: Decimal = Decimal("0.10")
    others: list[Part] = Field(default_factory=list)


@dataclasses.dataclass
class Point:
    at: ObjectId
    weight: Decimal


@pydantic_dataclass
class Size:
    width: Decimal


class Names(TypedDict):
    first: str
    weight: Decimal
    at: ObjectId


class Pair(NamedTuple):
    left: int
    right: ObjectId


class Tags(RootModel[list[str]]):
    pass


class Box(Model, Generic[T]):
    content: T


class Invoice(Document):
    customer: ObjectId
    total: Decimal128
    part: Part
    price: Price
    note: str = Field("", exclude=True)


def stored(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` as the server would give it back."""
    return bson.decode(bson.encode(document, codec_options=CODEC), CODEC)


def holder(annotation: Any, **config: Any) -> type[Document]:
    base = Document
    if config:
        base = type("Base", (Document,), {"model_config": ConfigDict(**config)})
    return create_model("Holder", __base__=base, value=(annotation, ...))


BSON_VALUES: list[tuple[Any, Any, Any]] = [
    (ObjectId, OID, "65f0c0ffee65f0c0ffee65f0"),
    (Decimal128, Decimal128("1.10"), "1.10"),
    (Timestamp, Timestamp(7, 9), {"$timestamp": {"t": 7, "i": 9}}),
    (Binary, Binary(b"\xff\xfe", 0), "__4="),
    (
        Regex,
        Regex("^a", re.IGNORECASE),
        {"$regularExpression": {"pattern": "^a", "options": "i"}},
    ),
    (Int64, Int64(5), 5),
    (Code, Code("f()"), {"$code": "f()"}),
    (MinKey, MinKey(), {"$minKey": 1}),
    (MaxKey, MaxKey(), {"$maxKey": 1}),
    (DBRef, DBRef("orders", OID), {"$ref": "orders", "$id": {"$oid": str(OID)}}),
    (DatetimeMS, DatetimeMS(1500), 1500),
]
PYTHON_VALUES: list[tuple[Any, Any]] = [
    (Decimal, Decimal("12345678901234567890.123456789")),
    (Decimal, Decimal("1.10")),
    (Decimal, Decimal("-0")),
    (datetime, datetime(2024, 2, 29, 12, 30, 15, 123000, tzinfo=UTC)),
    (NaiveDatetime, datetime(2024, 2, 29, 12, 30, 15, 123000)),
    (date, date(2024, 2, 29)),
    (time, time(23, 59, 59, 123456)),
    (timedelta, timedelta(days=-3, microseconds=1)),
    (uuid.UUID, uuid.UUID(int=12345)),
    (bytes, b"\x00\xff"),
    (Colour, Colour.BLUE),
    (Status, Status.OPEN),
    (Level, Level.LOW),
    (Literal["a", 1], 1),
    (set[int], {1, 2}),
    (frozenset[str], frozenset({"a"})),
    (tuple[int, str], (1, "a")),
    (tuple[ObjectId, ...], (OID, OID)),
    (PurePosixPath, PurePosixPath("/a/b")),
    (AnyUrl, AnyUrl("https://example.org/a?b=c")),
    (IPv4Address, IPv4Address("10.0.0.1")),
    (SecretStr, SecretStr("s")),
    (int, 2**40),
    (bool, True),
    (float, 1.5),
    (dict[str, int], {"a": 1}),
    (dict[int, str], {1: "a"}),
    (dict[Colour, Decimal], {Colour.RED: Decimal("2.50")}),
    (dict[ObjectId, str], {OID: "a"}),
    (dict[date, bool], {date(2024, 1, 1): True}),
    (dict[bool, int], {True: 1}),
    (Price, Price(amount=Decimal("9.99"), former=Price(amount=Decimal("10.00")))),
    (list[Price], [Price(amount=Decimal("1"))]),
    (Price | None, Price(amount=Decimal("1"))),
    (Part, Part(key=OID, amount=Decimal("3.30"), others=[Part(key=OID)])),
    (Point, Point(OID, Decimal("0.5"))),
    (Size, Size(Decimal("0.5"))),
    (Names, {"first": "a", "weight": Decimal("1.5"), "at": OID}),
    (Pair, Pair(1, OID)),
    (Tags, Tags(["a"])),
    (Box[Decimal], Box[Decimal](content=Decimal("1.0"))),
    (Box[ObjectId], Box[ObjectId](content=OID)),
    (ObjectId | None, None),
    (ObjectId | int, 3),
    (Any, {"deep": [OID, {"amount": Decimal128("1")}]}),
]


@pytest.mark.parametrize(
    ("annotation", "value"), [v[:2] for v in BSON_VALUES] + PYTHON_VALUES, ids=repr
)
def test_a_value_comes_back_from_the_database_equal_and_of_its_type(
    annotation: Any, value: Any
) -> None:
    model = holder(annotation)
    written = model(value=value)

    read = model.from_bson(stored(written.to_bson()))

    assert read == written
    assert type(read.value) is type(value)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"), BSON_VALUES, ids=[v[0].__name__ for v in BSON_VALUES]
)
def test_a_bson_value_becomes_json_and_is_read_from_it(
    annotation: Any, value: Any, expected: Any
) -> None:
    model = holder(annotation)
    written = model(value=value)

    assert json.loads(to_json(written))["value"] == expected
    assert to_jsonable(written) == json.loads(to_json(written))
    assert json.loads(written.model_dump_json()) == json.loads(to_json(written))

    read = model.model_validate_json(to_json(written))
    assert read == written
    assert type(read.value) is annotation
    assert model.model_validate(written.model_dump()) == written


@pytest.mark.parametrize(
    ("annotation", "value"), PYTHON_VALUES, ids=[repr(v[0]) for v in PYTHON_VALUES]
)
def test_every_value_becomes_json(annotation: Any, value: Any) -> None:
    json.loads(to_json(holder(annotation)(value=value)))


@pytest.mark.parametrize("mode", ["validation", "serialization"])
@pytest.mark.parametrize(
    "annotation",
    [v[0] for v in BSON_VALUES] + [v[0] for v in PYTHON_VALUES],
    ids=repr,
)
def test_every_annotation_has_a_json_schema(annotation: Any, mode: Any) -> None:
    schema = holder(annotation).model_json_schema(mode=mode)

    assert set(schema["properties"]) == {"id", "value"}
    json.dumps(schema)


def test_json_schema_says_what_an_object_id_looks_like() -> None:
    assert holder(ObjectId).model_json_schema()["properties"]["value"] == {
        "title": "Value",
        "type": "string",
        "pattern": "^[0-9a-fA-F]{24}$",
    }


@pytest.mark.parametrize(
    ("annotation", "given", "expected"),
    [
        (ObjectId, str(OID), OID),
        (Decimal128, Decimal("1.5"), Decimal128("1.5")),
        (Decimal128, "1.5", Decimal128("1.5")),
        (Int64, 7, Int64(7)),
        (Binary, b"a", Binary(b"a", 0)),
        (Binary, uuid.UUID(int=1), Binary(uuid.UUID(int=1).bytes, 4)),
        (Regex, "a", Regex("a")),
        (Regex, re.compile("a", re.MULTILINE), Regex("a", re.MULTILINE | re.UNICODE)),
        (Code, "f()", Code("f()")),
        (DatetimeMS, datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), DatetimeMS(1000)),
    ],
    ids=repr,
)
def test_a_bson_type_takes_the_python_value_it_stands_for(
    annotation: Any, given: Any, expected: Any
) -> None:
    found = holder(annotation)(value=given).value

    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("subtype", [0, 1, 3, 4, 5, 128])
def test_binary_keeps_its_subtype_in_the_database(subtype: int) -> None:
    model = holder(Binary)
    written = model(value=Binary(b"0123456789abcdef", subtype))

    read = model.from_bson(stored(written.to_bson()))

    assert read.value == written.value
    assert read.value.subtype == subtype


@pytest.mark.parametrize(
    ("annotation", "given"),
    [
        (ObjectId, "not an id"),
        (ObjectId, "65f0c0ffee65f0c0ffee65f"),
        (ObjectId, 5),
        (Decimal128, "many"),
        (Decimal128, "1." + "1" * 40),
        (Int64, 2**63),
        (Int64, "x"),
        (Timestamp, {"$oid": str(OID)}),
        (Timestamp, {"$timestamp": {"t": "x"}}),
        (Timestamp, {}),
        (Binary, 5),
        (DBRef, "orders"),
        (MinKey, {"$maxKey": 1}),
        (MaxKey, None),
    ],
    ids=repr,
)
def test_a_value_that_is_none_of_its_bson_type_is_a_validation_error(
    annotation: Any, given: Any
) -> None:
    model = holder(annotation)
    with pytest.raises(ValidationError):
        model(value=given)
    with pytest.raises(ValidationError):
        model.model_validate_json(json.dumps({"value": given}))


def test_base64_is_read_in_both_alphabets_and_refused_otherwise() -> None:
    model = holder(Binary)
    for text in ("__4=", "//4="):
        assert model.model_validate_json(json.dumps({"value": text})).value == Binary(b"\xff\xfe")
    with pytest.raises(ValidationError):
        model.model_validate_json('{"value": "no base64!"}')


def test_values_without_annotation_become_json_too() -> None:
    class Loose(Document):
        model_config = ConfigDict(extra="allow")
        anything: Any
        mapping: dict  # type: ignore[type-arg]
        items: list  # type: ignore[type-arg]

    loose = Loose(
        anything={"a": [OID, {"b": Decimal128("1.5")}], "raw": b"\xff", OID: 1},
        mapping={"id": OID},
        items=[Timestamp(1, 2), Int64(3), DatetimeMS(4), (Regex("a"),)],
        extra=OID,
    )

    assert json.loads(to_json(loose)) == {
        "id": str(loose.id),
        "anything": {"a": [str(OID), {"b": "1.5"}], "raw": "_w==", str(OID): 1},
        "mapping": {"id": str(OID)},
        "items": [
            {"$timestamp": {"t": 1, "i": 2}},
            3,
            4,
            [{"$regularExpression": {"pattern": "a", "options": ""}}],
        ],
        "extra": str(OID),
    }
    assert Loose.from_bson(stored(loose.to_bson())).model_extra == {"extra": OID}


def test_an_annotated_type_keeps_its_own_validators_and_serialisers() -> None:
    class Marked(Document):
        upper: Annotated[ObjectId, PlainSerializer(lambda v: str(v).upper(), when_used="json")]
        loose: Annotated[ObjectId, BeforeValidator(lambda v: v if v != "none" else OID)]
        limited: Annotated[Decimal, Field(gt=0, max_digits=3)]

    marked = Marked(upper=OID, loose="none", limited=Decimal("1.5"))

    assert json.loads(to_json(marked))["upper"] == str(OID).upper()
    assert marked.loose == OID
    assert Marked.from_bson(stored(marked.to_bson())) == marked
    with pytest.raises(DocumentInvalid, match=r"limited \(greater_than\)"):
        Marked.from_bson({**marked.to_bson(), "limited": Decimal128("-1")})


@pytest.mark.parametrize("mode", ["before", "wrap", "after"])
def test_a_model_with_validators_of_its_own_is_adapted_too(mode: Any) -> None:
    def before(cls: Any, value: Any) -> Any:
        return value

    def wrap(cls: Any, value: Any, handler: Any) -> Any:
        return handler(value)

    def after(self: Any) -> Any:
        return self

    function = {"before": classmethod(before), "wrap": classmethod(wrap), "after": after}[mode]
    model: Any = create_model(
        "Checked",
        __base__=Document,
        __validators__={"check": model_validator(mode=mode)(function)},  # type: ignore[dict-item]
        key=(ObjectId, ...),
        amount=(Decimal, ...),
    )
    checked = model(key=OID, amount="1.50")

    assert model.from_bson(stored(checked.to_bson())) == checked
    assert model.model_validate_json(to_json(checked)) == checked


def test_a_discriminated_union_of_plain_models_with_decimals_round_trips() -> None:
    class Card(BaseModel):
        kind: Literal["card"] = "card"
        fee: Decimal

    class Cash(Model):
        kind: Literal["cash"] = "cash"
        till: ObjectId

    class Paid(Document):
        payment: Annotated[Card | Cash, Field(discriminator="kind")]

    for payment in (Card(fee=Decimal("0.30")), Cash(till=OID)):
        paid = Paid(payment=payment)
        assert Paid.from_bson(stored(paid.to_bson())) == paid
    assert Paid.model_json_schema()["properties"]["payment"]["discriminator"]


def test_models_that_refer_to_each_other_are_adapted() -> None:
    class Node(Document):
        parent: ObjectId | None = None
        children: list[Leaf] = Field(default_factory=list)

    class Leaf(Model):
        amount: Decimal
        owner: Node | None = None

    Node.model_rebuild(_types_namespace={"Leaf": Leaf, "Node": Node})
    Leaf.model_rebuild(_types_namespace={"Leaf": Leaf, "Node": Node})
    node = Node(parent=OID, children=[Leaf(amount=Decimal("1.0"))])

    assert Node.from_bson(stored(node.to_bson())) == node
    assert json.loads(to_json(node))["parent"] == str(OID)
    Node.model_json_schema()


def test_a_plain_model_is_left_as_it_was() -> None:
    class Owner(Document):
        price: Price

    with pytest.raises(ValidationError):
        Price.model_validate({"amount": Decimal128("1")})
    assert Owner.from_bson({"_id": OID, "price": {"amount": Decimal128("1")}}).price.amount == 1


def test_a_type_with_a_schema_of_its_own_is_stored_as_its_json() -> None:
    class Money:
        def __init__(self, text: str) -> None:
            self.text = text

        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
            from pydantic_core import core_schema as cs

            return cs.no_info_after_validator_function(
                cls,
                cs.str_schema(),
                serialization=cs.plain_serializer_function_ser_schema(lambda v: v.text),
            )

    model = holder(Money)
    document = model(value="1 EUR").to_bson()

    assert document["value"] == "1 EUR"
    assert model.from_bson(document).value.text == "1 EUR"


def test_a_zone_is_turned_into_utc_and_microseconds_are_cut() -> None:
    model = holder(datetime)
    written = datetime(2024, 1, 1, 1, 0, 0, 123999, tzinfo=timezone(timedelta(hours=1)))

    read = model.from_bson(stored(model(value=written).to_bson())).value

    assert read == datetime(2024, 1, 1, 0, 0, 0, 123000, tzinfo=UTC)
    assert read.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**63, "an integer of more than 64 bits"),
        (Decimal("1." + "1" * 40), "a Decimal of more than 34 digits"),
        (1j, "a complex, for which BSON has no type"),
        ({(1, 2): 3}, "a tuple as the key of a dict"),
        ({"deep": [0, object()]}, "a object, for which BSON has no type"),
    ],
    ids=["too long an integer", "too precise", "complex", "key", "object"],
)
def test_a_value_without_a_bson_form_is_refused_by_its_field(value: Any, message: str) -> None:
    document = holder(Any)(value=value)
    with pytest.raises(DocumentInvalid) as refused:
        document.to_bson()

    assert message in str(refused.value)
    assert "'value" in str(refused.value)
    assert refused.value.document_id == document.id


def test_the_path_to_what_cannot_be_stored_is_named() -> None:
    with pytest.raises(DocumentInvalid, match=r"'value\.deep\.1'"):
        holder(Any)(value={"deep": [0, 1j]}).to_bson()


def test_a_strict_model_reads_what_it_wrote() -> None:
    model = holder(tuple[Colour, date, Decimal, uuid.UUID, set[int]], strict=True)
    written = model(value=(Colour.RED, date(2024, 1, 1), Decimal("1"), uuid.UUID(int=1), {1}))

    assert model.from_bson(stored(written.to_bson())) == written


def test_no_class_of_bson_or_pydantic_is_altered() -> None:
    for cls in (ObjectId, Decimal128, Timestamp, Binary, Regex, Int64, Code, MinKey, DBRef):
        assert not hasattr(cls, "__get_pydantic_core_schema__")
        assert not hasattr(cls, "__get_pydantic_json_schema__")
    with pytest.raises(Exception, match="arbitrary_types_allowed"):
        TypeAdapter(ObjectId)


def test_fastapi_takes_returns_and_documents_a_document() -> None:
    fastapi = pytest.importorskip("fastapi")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastapi.testclient import TestClient

    app = fastapi.FastAPI()

    @app.post("/invoices", response_model=Invoice)
    def create(invoice: Invoice) -> Any:
        return invoice

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = TestClient(app)
    body = {
        "customer": str(OID),
        "total": "1.10",
        "part": {"key": str(OID)},
        "price": {"amount": "2"},
        "note": "n",
    }

    answer = client.post("/invoices", json=body)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"id", "customer", "total", "part", "price"}
    assert answer.json()["customer"] == str(OID)
    assert client.post("/invoices", json={**body, "id": str(OID)}).json()["id"] == str(OID)
    assert client.post("/invoices", json={**body, "customer": "x"}).status_code == 422

    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name, schema in schemas.items():
        assert "_id" not in schema.get("properties", {}), name


_json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(alphabet=st.characters(exclude_categories=("Cs",)))
    | st.binary()
    | st.builds(ObjectId),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc$.", min_size=1), inner),
    max_leaves=8,
)


@given(_json_values)
def test_any_value_of_bson_survives_the_database_and_has_a_json_form(value: Any) -> None:
    document = ANY(value=value)

    assert ANY.from_bson(stored(document.to_bson())) == document
    json.loads(to_json(document))


@given(st.timedeltas(timedelta(days=-90_000), timedelta(days=90_000)))
def test_a_timedelta_of_centuries_keeps_its_microseconds(value: timedelta) -> None:
    document = DELTA(value=value)

    assert DELTA.from_bson(stored(document.to_bson())) == document


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**15), max_value=10**15).map(
        lambda d: d.quantize(Decimal("1e-9"))
    )
)
def test_a_decimal_keeps_its_digits_and_its_exponent(value: Decimal) -> None:
    read = DECIMAL.from_bson(stored(DECIMAL(value=value).to_bson())).value

    assert str(read) == str(value)


ANY: Any = holder(Any)
DELTA: Any = holder(timedelta)
DECIMAL: Any = holder(Decimal)


def test_to_bson_takes_any_model() -> None:
    assert to_bson(Price(amount=Decimal("1.5"))) == {
        "amount": Decimal128("1.5"),
        "currency": "EUR",
        "former": None,
    }
