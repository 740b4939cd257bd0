"""Document: a pydantic model of the documents in one collection, with its reads and writes.

An add-on to the driver, not another ODM: ``Order.collection`` is the driver's own collection, for
everything that is not here.
"""

from __future__ import annotations

import weakref
from collections.abc import (
    AsyncIterator,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, Unpack, cast, overload

from bson import ObjectId, Timestamp
from bson.errors import BSONError
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    create_model,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from pydantic_core import core_schema as cs
from pymongo import IndexModel, ReturnDocument
from pymongo.errors import OperationFailure, PyMongoError
from typing_extensions import Format, get_annotations

from .bson_types import Unstorable, adapted, any_schema, encoded
from .errors import (
    DocumentInvalid,
    DocumentNotFound,
    InvalidFilter,
    InvalidUpdate,
    ModelInvalid,
    translated,
)

if TYPE_CHECKING:
    from .live import LiveStream
    from .stream import ChangeStream
    from .token import ResumeToken

__all__ = [
    "Document",
    "Find",
    "Model",
    "ModelSettings",
    "collection_name",
    "encoded_filter",
    "ensure_images",
    "ensure_indexes",
    "from_document",
    "settings_of",
    "sort_keys",
    "to_bson",
    "to_json",
    "to_jsonable",
]

D = TypeVar("D", bound="Document")
M = TypeVar("M", bound=BaseModel)
Filter = Mapping[str, Any]
Sort = str | Sequence[tuple[str, Any]] | Mapping[str, Any]


# -- models and their forms ---------------------------------------------------------------------


def _with_fields(schema: CoreSchema, change: Any) -> CoreSchema:
    """``schema`` of a model with its ``model-fields`` changed, whatever validators wrap them."""
    if schema["type"] == "model-fields":
        return cast(CoreSchema, change(schema))
    inner = schema.get("schema")
    if not isinstance(inner, dict):
        return schema
    return cast(CoreSchema, {**schema, "schema": _with_fields(cast(CoreSchema, inner), change)})


def _extras_written(fields: cs.ModelFieldsSchema) -> cs.ModelFieldsSchema:
    # values of extra="allow" have no annotation, and are whatever BSON held
    return fields if "extras_schema" in fields else {**fields, "extras_schema": any_schema()}


class Model(BaseModel):
    """A pydantic model in which every BSON type may be annotated; for parts of a document.

    An ordinary ``BaseModel`` inside a document works as well, as long as its own fields have types
    that pydantic knows. BSON's types validate from what the driver returns and from JSON, and
    serialise to JSON: ``ObjectId`` and ``Decimal128`` as text, ``Int64`` as a number, ``Binary``
    and ``bytes`` as URL-safe base64, the others as relaxed Extended JSON
    (https://www.mongodb.com/docs/manual/reference/mongodb-extended-json/).
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True, ser_json_bytes="base64", val_json_bytes="base64"
    )
    __bson_adapted__: ClassVar[bool] = True

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = handler(source)
        if cls.model_config.get("extra") == "allow":
            schema = _with_fields(schema, _extras_written)
        return adapted(schema, cls, handler)


def to_bson(model: BaseModel) -> dict[str, Any]:
    """The document that stands for ``model`` in MongoDB.

    Every field is stored, also one with ``Field(exclude=True)``, which hides it from the API only;
    computed fields and private attributes are not. A field is stored under the name it validates
    from: its alias if it has one (also from an alias generator), else its own name; the ``id`` of
    a ``Document`` is ``_id``. Serialisers shape what an API shows and do not touch what is stored.

    Raises:
        DocumentInvalid: a value has no BSON form; the message names the field.
    """
    try:
        return cast("dict[str, Any]", encoded(model))
    except Unstorable as error:
        where = f"the field {'.'.join(error.path)!r} holds " if error.path else "it has "
        raise DocumentInvalid(
            f"cannot store {_named(type(model), getattr(model, 'id', None))}: "
            f"{where}{error.reason}.",
            getattr(model, "id", None),
        ) from error


def to_json(model: BaseModel) -> bytes:
    """``model`` as the bytes of its JSON, as FastAPI would send it: ``id``, not ``_id``."""
    return model.__pydantic_serializer__.to_json(model, by_alias=True)


def to_jsonable(model: BaseModel) -> dict[str, Any]:
    """``model`` as what ``json.dumps`` takes; the same as ``to_json`` writes."""
    return cast(
        "dict[str, Any]",
        model.__pydantic_serializer__.to_python(model, mode="json", by_alias=True),
    )


def from_document(model: type[M], document: Mapping[str, Any]) -> M:
    """The instance of a model, or of a view of it, for a document as the driver returns it.

    Raises:
        DocumentInvalid: it does not fit.
    """
    if issubclass(model, Document):
        return model.from_bson(document)
    if "_id" in document:
        document = {"id": document["_id"], **document}
    try:
        found: M = model.__pydantic_validator__.validate_python(
            document, by_alias=True, by_name=True
        )
    except ValidationError as error:
        raise _misfit(model, document, error) from error
    return found


# -- settings -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What the ``Settings`` of a ``Document`` say.

    Attributes:
        collection: the collection's name; ``None`` for an abstract base.
        indexes: created when a bridge opens.
        pre_images: the collection keeps pre- and post-images of its changes
            (https://www.mongodb.com/docs/manual/changeStreams/#change-streams-with-document-pre--and-post-images).
    """

    collection: str | None = None
    indexes: tuple[IndexModel, ...] = ()
    pre_images: bool = False


def settings_of(model: type[Document]) -> ModelSettings:
    """The settings of ``model``, with those of its bases where it says nothing itself."""
    return model.__settings__


def collection_name(model: type[Document]) -> str:
    """The name of the collection of ``model``.

    Raises:
        ModelInvalid: the model has no ``Settings.collection``.
    """
    name = model.__settings__.collection
    if name is None:
        raise ModelInvalid(
            f"{model.__qualname__} has no collection. Give it one:\n"
            f"    class {model.__name__}(Document):\n"
            f"        class Settings:\n"
            f'            collection = "{model.__name__.lower()}s"'
        )
    return name


def _read_settings(model: type[Document]) -> ModelSettings:
    stated: dict[str, Any] = {}
    for base in reversed(model.__mro__):
        for part in reversed(getattr(base.__dict__.get("Settings"), "__mro__", ())):
            if part is not object:
                stated |= {k: v for k, v in vars(part).items() if not k.startswith("__")}
    unknown = sorted(set(stated) - {"collection", "indexes", "pre_images"})
    if unknown:
        raise ModelInvalid(
            f"{model.__qualname__}.Settings has no {unknown[0]!r}; it knows "
            "'collection', 'indexes' and 'pre_images'."
        )
    collection = stated.get("collection")
    if collection is not None and not _is_collection_name(collection):
        raise ModelInvalid(
            f"{model.__qualname__}.Settings.collection is {collection!r}, which MongoDB does not "
            "take for a name: it is text without '$' and NUL and does not start with 'system.'."
        )
    indexes = stated.get("indexes", ())
    if not isinstance(indexes, (list, tuple)):
        raise ModelInvalid(f"{model.__qualname__}.Settings.indexes is not a list.")
    pre_images = stated.get("pre_images", False)
    if not isinstance(pre_images, bool):
        raise ModelInvalid(f"{model.__qualname__}.Settings.pre_images is neither True nor False.")
    found = tuple(_index(model, index) for index in indexes)
    return ModelSettings(collection, found, pre_images)


def _is_collection_name(name: Any) -> bool:
    # https://www.mongodb.com/docs/manual/reference/limits/#mongodb-limit-Restriction-on-Collection-Names
    return (
        isinstance(name, str)
        and name != ""
        and not set(name) & {"$", "\0"}
        and not name.startswith(("system.", "."))
        and not name.endswith(".")
    )


def _index(model: type[Document], stated: Any) -> IndexModel:
    """An index from ``"field"``, ``("field", -1)``, a list of such, or an ``IndexModel``."""
    if isinstance(stated, IndexModel):
        return stated
    directions = (1, -1, "text", "hashed", "2d", "2dsphere")
    match stated:
        case str():
            keys: list[Any] = [stated]
        case [str(), direction] if direction in directions and not isinstance(direction, bool):
            keys = [tuple(stated)]
        case [*several] if several:
            keys = [tuple(k) if isinstance(k, list) else k for k in several]
        case _:
            keys = [None]
    pairs = [(k, 1) if isinstance(k, str) and k else k for k in keys]
    for pair in pairs:
        match pair:
            case (str(), direction) if direction in directions:
                continue
        raise ModelInvalid(
            f"{model.__qualname__}.Settings.indexes holds {stated!r}; an index is a field's name, "
            "(name, direction), a list of these, or a pymongo.IndexModel."
        )
    return IndexModel(pairs)


async def ensure_indexes(model: type[Document], collection: Any) -> None:
    """Create the indexes of ``Settings.indexes`` that ``collection`` does not have yet.

    One by one, so that the message of a failure names its index.
    https://www.mongodb.com/docs/manual/reference/command/createIndexes/

    Raises:
        DuplicateKey: an index is to be unique, and the values there are not.
        OperationFailed: an index of that name or those keys exists with other options.
    """
    for index in model.__settings__.indexes:
        name = index.document["name"]
        with _translating(f"create the index {name!r} of {model.__name__}"):
            await collection.create_indexes([index])


async def ensure_images(model: type[Document], database: Any) -> None:
    """Have the collection of ``model`` keep images of its documents before and after each change.

    https://www.mongodb.com/docs/manual/changeStreams/#change-streams-with-document-pre--and-post-images

    Raises:
        OperationFailed: the server does not allow it; it needs MongoDB 6.0.
    """
    with _translating(f"have {model.__name__} keep images of its changes"):
        await keep_images(database, collection_name(model))


async def keep_images(database: Any, collection: str) -> None:
    """``ensure_images`` for a collection; the driver's errors pass through."""
    images = {"changeStreamPreAndPostImages": {"enabled": True}}
    try:
        await database.command({"create": collection, **images})
    except OperationFailure as error:
        if error.code != 48:  # NamespaceExists
            raise
        await database.command({"collMod": collection, **images})


# -- what goes wrong ----------------------------------------------------------------------------


@contextmanager
def _translating(doing: str) -> Iterator[None]:
    try:
        yield
    except (BSONError, OverflowError, UnicodeError) as error:
        # not in the message: what the driver says here may quote the whole document
        raise DocumentInvalid(
            f"cannot {doing}: BSON cannot hold it, or it is over 16 MB ({type(error).__name__})."
        ) from error
    except (PyMongoError, NotImplementedError) as error:
        raise translated(error, doing) from error


def _a(model: type[BaseModel]) -> str:
    return f"{'an' if model.__name__[:1] in 'AEIOU' else 'a'} {model.__name__}"


def _named(model: type[BaseModel], document_id: Any) -> str:
    return model.__name__ if document_id is None else f"{model.__name__} {document_id}"


def _misfit(model: type[BaseModel], document: Any, error: ValidationError) -> DocumentInvalid:
    document_id = document.get("_id") if isinstance(document, Mapping) else None
    # The first step of a location is a field's name; further ones may be keys, which are data.
    fields = {
        f"{e['loc'][0] if e['loc'] else 'the whole'} ({e['type']})": None
        for e in error.errors(include_url=False, include_context=False, include_input=False)
    }
    return DocumentInvalid(
        f"{_named(model, document_id)} in the database does not fit its model: "
        f"{', '.join(fields)}.",
        document_id,
    )


def _missing(document: Document, doing: str) -> DocumentNotFound:
    return DocumentNotFound(
        f"cannot {doing} {_named(type(document), document.id)}: "
        "the collection has no document with this id.",
        document.id,
    )


def encoded_filter(model: type[Document], filter: Filter | None) -> Any:
    """A filter with the values that a model holds as BSON has them."""
    if filter is None:
        return {}
    if not isinstance(filter, Mapping):
        raise InvalidFilter(
            f"a filter for {model.__name__} is a dict like {{'status': 'open'}}, "
            f"not {type(filter).__name__}."
        )
    try:
        return encoded(filter)
    except Unstorable as error:
        raise InvalidFilter(
            f"the filter for {model.__name__} has {error.reason} at {'.'.join(error.path)!r}."
        ) from error


def _update(model: type[Document], update: Any) -> Any:
    if isinstance(update, Mapping):
        valid = bool(update) and all(isinstance(k, str) and k[:1] == "$" for k in update)
    else:
        valid = isinstance(update, list) and bool(update)
    if not valid:
        raise InvalidUpdate(
            f"an update of {_a(model)} takes MongoDB's operators, like "
            "{'$set': {'status': 'paid'}}, or an aggregation pipeline in a list. "
            "To store the whole document, use save() or replace()."
        )
    try:
        return encoded(update)
    except Unstorable as error:
        raise InvalidUpdate(
            f"the update of {_a(model)} has {error.reason} at {'.'.join(error.path)!r}."
        ) from error


def sort_keys(model: type[Document], sort: Sort | None) -> list[tuple[str, Any]] | None:
    """Sort keys as the drivers take them, from a name, ``-name``, pairs or a mapping."""
    if sort is None:
        return None
    keys: Any = list(sort.items()) if isinstance(sort, Mapping) else sort
    pairs: list[tuple[str, Any]] = []
    for key in keys if isinstance(keys, (list, tuple)) else [keys]:
        match key:
            case str() if key.lstrip("+-"):
                pairs.append((key.lstrip("+-"), -1 if key.startswith("-") else 1))
            case (str() as name, direction) if name:
                pairs.append((name, direction))
            case _:
                raise InvalidFilter(
                    f"{model.__name__} cannot be sorted by {key!r}; use 'total', '-total' or "
                    "pairs like ('total', -1)."
                )
    return pairs or None


def _with_session(session: Any) -> dict[str, Any]:
    return {} if session is None else {"session": session}  # mongomock refuses even None


# -- the document -------------------------------------------------------------------------------


class _Collection:
    """``Order.collection``: no field, but an attribute of the class."""

    def __get__(self, instance: object, owner: type[Document]) -> Any:
        return _collection(owner)


def _collection(model: type[Document]) -> Any:
    from .bridge import bridge_of  # which imports this module

    name = collection_name(model)  # first: without one, no bridge can have the model
    return bridge_of(model).driver.collection(name)


def _id_accepted(fields: cs.ModelFieldsSchema) -> cs.ModelFieldsSchema:
    """``fields`` with an ``id`` that validates from ``_id`` and ``id``, by whatever alias else.

    Here and not by an alias of the field, so that a subclass may declare ``id`` as it likes and
    serialisation, type checkers and alias generators still see a field of the name ``id``.
    """
    if "id" not in fields["fields"]:
        return fields
    field = fields["fields"]["id"]
    own = field.get("validation_alias", [])
    paths: list[Any] = [["_id"], ["id"]]
    others: list[Any] = [own] if isinstance(own, str) else list(own)
    for path in others:
        steps = [path] if isinstance(path, str) else path
        if steps not in paths:
            paths.append(steps)
    return {
        **fields,
        "fields": {**fields["fields"], "id": {**field, "validation_alias": paths}},
    }


class Document(Model):
    """A document of one collection.

        class Order(Document):
            status: str
            total: float

            class Settings:
                collection = "orders"
                indexes = ["status", ("total", -1)]

    ``id`` is the document's ``_id``: an ``ObjectId`` made in the client by default, or any other
    BSON type by annotation (``id: int``, ``id: UUID = Field(default_factory=uuid4)``, a model).
    Validation takes ``_id`` and ``id``; whatever is serialised says ``id``.

    BSON dates are instants in milliseconds: a ``datetime`` comes back aware, in UTC, with its
    microseconds cut to milliseconds; one without a zone is taken for UTC. ``Decimal`` is stored as
    Decimal128 and comes back equal, ``date`` as the date at midnight UTC, ``UUID`` in the standard
    representation. An instance keeps the values it was given until ``reload()``.
    """

    __settings__: ClassVar[ModelSettings] = ModelSettings()
    __bson_id__: ClassVar[bool] = True

    # the driver's own collection, of the bridge that is open in the running event loop
    collection: ClassVar[_Collection] = _Collection()

    if TYPE_CHECKING:
        id: Any = Field(default_factory=ObjectId)  # so that a subclass may say ``id: int``
    else:
        id: ObjectId = Field(default_factory=ObjectId)

    def __init_subclass__(cls, **kwargs: Unpack[ConfigDict]) -> None:
        # before pydantic takes the method for the field's default
        super().__init_subclass__(**kwargs)
        annotations = get_annotations(cls, format=Format.FORWARDREF)
        for name in annotations.keys() & vars(Document).keys() - {"id"}:
            if not name.startswith("_"):
                raise ModelInvalid(
                    f"the field {name!r} of {cls.__qualname__} would hide Document.{name}. Call "
                    f"it otherwise and keep its stored name: {name}_: … = Field(alias={name!r})."
                )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.__settings__ = _read_settings(cls)
        if "_id" in cls.__private_attributes__:
            raise ModelInvalid(
                f"{cls.__qualname__} declares '_id', which pydantic takes for a private "
                "attribute. Declare 'id': it is stored as '_id'."
            )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = super().__get_pydantic_core_schema__(source, handler)
        if schema["type"] == "definitions":
            return {**schema, "schema": _with_fields(schema["schema"], _id_accepted)}
        return _with_fields(schema, _id_accepted)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler, /
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        found = handler.resolve_ref_schema(schema)
        properties = found.get("properties", {})
        if "_id" in properties and "id" not in properties:  # what a client should send
            found["properties"] = {("id" if k == "_id" else k): v for k, v in properties.items()}
            if "required" in found:
                found["required"] = ["id" if k == "_id" else k for k in found["required"]]
        return schema

    # -- forms --

    @classmethod
    def from_bson(cls, document: Mapping[str, Any]) -> Self:
        """The instance for a document as the driver returns it.

        Raises:
            DocumentInvalid: it does not fit the model; the message names the document and its
                fields, never their values, and the pydantic error is chained.
        """
        try:
            found: Self = cls.__pydantic_validator__.validate_python(
                document, strict=False, by_alias=True
            )
        except ValidationError as error:
            raise _misfit(cls, document, error) from error
        return found

    def to_bson(self) -> dict[str, Any]:
        """This document as it is stored; see ``data_bridge.document.to_bson``."""
        return to_bson(self)

    # -- writes --

    async def insert(self, *, session: Any = None) -> Self:
        """Store this document, which must be new, and return it.

        An ``id`` that is ``None`` gets a new ``ObjectId``.
        https://www.mongodb.com/docs/manual/reference/method/db.collection.insertOne/

        Raises:
            DuplicateKey: its id, or a value of a unique index, exists already.
            DocumentInvalid: a value in it has no BSON form.
        """
        _identify(self)
        document = to_bson(self)
        with _translating(f"insert {_a(type(self))}"):
            await _collection(type(self)).insert_one(document, **_with_session(session))
        return self

    @classmethod
    async def insert_many(cls, documents: Iterable[Self], *, session: Any = None) -> list[Any]:
        """Store several new documents in one request and return their ids, in the same order.

        At the first that is refused the rest is not stored.
        https://www.mongodb.com/docs/manual/reference/method/db.collection.insertMany/

        Raises:
            DuplicateKey: an id, or a value of a unique index, exists already.
            DocumentInvalid: one is no instance of this class, or has no BSON form.
        """
        instances = list(documents)
        for instance in instances:
            if not isinstance(instance, cls):
                raise DocumentInvalid(
                    f"cannot insert into {cls.__name__}: {type(instance).__name__} is not one."
                )
            _identify(instance)
        if instances:
            stored = [to_bson(instance) for instance in instances]
            with _translating(f"insert {len(stored)} documents of {cls.__name__}"):
                await _collection(cls).insert_many(stored, **_with_session(session))
        return [instance.id for instance in instances]

    async def save(self, *, session: Any = None) -> Self:
        """Store this document, in place of one with its id if there is one, and return it.

        https://www.mongodb.com/docs/manual/reference/method/db.collection.replaceOne/ with upsert.

        Raises:
            DuplicateKey: a value of a unique index exists already.
            DocumentInvalid: a value in it has no BSON form.
        """
        _identify(self)
        document = to_bson(self)
        with _translating(f"save {_a(type(self))}"):
            await _collection(type(self)).replace_one(
                {"_id": document["_id"]}, document, upsert=True, **_with_session(session)
            )
        return self

    async def replace(self, *, session: Any = None) -> Self:
        """Store this document in place of the one with its id, and return it.

        https://www.mongodb.com/docs/manual/reference/method/db.collection.replaceOne/

        Raises:
            DocumentNotFound: there is none (any more).
            DuplicateKey: a value of a unique index exists already.
            DocumentInvalid: a value in it has no BSON form.
        """
        document = to_bson(self)
        with _translating(f"replace {_a(type(self))}"):
            result = await _collection(type(self)).replace_one(
                {"_id": document["_id"]}, document, **_with_session(session)
            )
        if result.acknowledged and not result.matched_count:
            raise _missing(self, "replace")
        return self

    async def update(
        self, update: Mapping[str, Any] | list[Mapping[str, Any]], *, session: Any = None
    ) -> Self:
        """Change the stored document, take its new state over into this instance, return it.

        Args:
            update: MongoDB's update operators, or an aggregation pipeline; the names in it are
                those of the stored fields.

        https://www.mongodb.com/docs/manual/reference/method/db.collection.findOneAndUpdate/

        Raises:
            DocumentNotFound: there is no document with this id (any more).
            InvalidUpdate: ``update`` is neither.
            DuplicateKey: a value of a unique index exists already.
            DocumentInvalid: the document was changed, and does not fit the model now.
        """
        change = _update(type(self), update)
        with _translating(f"update {_a(type(self))}"):
            found = await _collection(type(self)).find_one_and_update(
                _by_id(self), change, return_document=ReturnDocument.AFTER, **_with_session(session)
            )
        if found is None:
            raise _missing(self, "update")
        return _become(self, type(self).from_bson(found))

    async def delete(self, *, session: Any = None) -> None:
        """Delete the stored document.

        https://www.mongodb.com/docs/manual/reference/method/db.collection.deleteOne/

        Raises:
            DocumentNotFound: there is none with this id (any more).
        """
        with _translating(f"delete {_a(type(self))}"):
            result = await _collection(type(self)).delete_one(
                _by_id(self), **_with_session(session)
            )
        if result.acknowledged and not result.deleted_count:
            raise _missing(self, "delete")

    async def reload(self, *, session: Any = None) -> Self:
        """Take the stored state over into this instance, and return it.

        Raises:
            DocumentNotFound: there is no document with this id (any more).
            DocumentInvalid: what is stored does not fit the model.
        """
        with _translating(f"reload {_a(type(self))}"):
            found = await _collection(type(self)).find_one(_by_id(self), **_with_session(session))
        if found is None:
            raise _missing(self, "reload")
        return _become(self, type(self).from_bson(found))

    @classmethod
    async def delete_many(cls, filter: Filter, *, session: Any = None) -> int:
        """Delete every document that ``filter`` matches (``{}``: all), and return how many.

        https://www.mongodb.com/docs/manual/reference/method/db.collection.deleteMany/

        Raises:
            InvalidFilter: ``filter`` is no dict, or holds what BSON cannot.
        """
        query = _required_filter(cls, filter)
        with _translating(f"delete documents of {cls.__name__}"):
            result = await _collection(cls).delete_many(query, **_with_session(session))
        return int(result.deleted_count) if result.acknowledged else 0

    @classmethod
    async def update_many(
        cls,
        filter: Filter,
        update: Mapping[str, Any] | list[Mapping[str, Any]],
        *,
        session: Any = None,
    ) -> int:
        """Update every document that ``filter`` matches, and return how many were changed.

        https://www.mongodb.com/docs/manual/reference/method/db.collection.updateMany/

        Raises:
            InvalidFilter: ``filter`` is no dict, or holds what BSON cannot.
            InvalidUpdate: ``update`` has no update operators.
            DuplicateKey: a value of a unique index exists already.
        """
        query, change = _required_filter(cls, filter), _update(cls, update)
        with _translating(f"update documents of {cls.__name__}"):
            result = await _collection(cls).update_many(query, change, **_with_session(session))
        return int(result.modified_count) if result.acknowledged else 0

    # -- reads --

    @classmethod
    async def get(cls, document_id: Any, *, session: Any = None) -> Self | None:
        """The document with this id, or ``None``.

        Args:
            document_id: an id, or its text form from a URL; text that is no id of this model
                belongs to no document, so it gives ``None``.

        Raises:
            InvalidFilter: ``document_id`` is neither.
            DocumentInvalid: the document does not fit the model.
        """
        try:
            key = encoded(
                _id_model(cls)
                .__pydantic_validator__.validate_python({"value": document_id}, strict=False)
                .value
            )
        except (ValidationError, Unstorable) as error:
            if isinstance(document_id, str):
                return None
            raise InvalidFilter(
                f"{type(document_id).__name__} is not the type of an id of {cls.__name__}."
            ) from error
        with _translating(f"get {_a(cls)}"):
            found = await _collection(cls).find_one({"_id": key}, **_with_session(session))
        return None if found is None else cls.from_bson(found)

    @classmethod
    async def find_one(
        cls, filter: Filter | None = None, *, sort: Sort | None = None, session: Any = None
    ) -> Self | None:
        """The first document that ``filter`` matches, or ``None``; arguments as of ``find``."""
        query, keys = encoded_filter(cls, filter), sort_keys(cls, sort)
        with _translating(f"find {_a(cls)}"):
            found = await _collection(cls).find_one(
                query, **({"sort": keys} if keys else {}), **_with_session(session)
            )
        return None if found is None else cls.from_bson(found)

    @classmethod
    def find(
        cls,
        filter: Filter | None = None,
        *,
        sort: Sort | None = None,
        skip: int = 0,
        limit: int = 0,
        session: Any = None,
    ) -> Find[Self]:
        """The documents that ``filter`` matches: ``await`` them as a list, or ``async for``.

        Args:
            filter: a MongoDB query on stored names (``_id``, not ``id``); values may be what a
                model holds, such as an ``Enum`` or a ``Decimal``.
            sort: ``"total"``, ``"-total"``, ``[("status", 1), ("total", -1)]``.
            skip: how many to leave out at the start.
            limit: how many at most; 0 is all.

        https://www.mongodb.com/docs/manual/reference/method/db.collection.find/

        Raises:
            InvalidFilter: an argument is not of this form.
        """
        if skip < 0 or limit < 0:
            raise InvalidFilter(f"skip and limit of {cls.__name__}.find() cannot be negative.")
        return Find(cls, encoded_filter(cls, filter), sort_keys(cls, sort), skip, limit, session)

    @classmethod
    async def count(cls, filter: Filter | None = None, *, session: Any = None) -> int:
        """How many documents ``filter`` matches, exactly.

        https://www.mongodb.com/docs/manual/reference/method/db.collection.countDocuments/

        Raises:
            InvalidFilter: ``filter`` is no dict, or holds what BSON cannot.
        """
        query = encoded_filter(cls, filter)
        with _translating(f"count documents of {cls.__name__}"):
            return int(await _collection(cls).count_documents(query, **_with_session(session)))

    # -- changes --

    @classmethod
    def watch(
        cls,
        *,
        operations: Collection[str] | None = None,
        filter: Filter | None = None,
        pipeline: Sequence[Mapping[str, Any]] | None = None,
        resume_after: ResumeToken | Timestamp | Mapping[str, Any] | str | None = None,
        full_document: str | None = None,
        full_document_before_change: str | None = None,
        show_expanded_events: bool = False,
    ) -> ChangeStream[Self]:
        """The changes of this collection: ``async for``, or ``async with`` to be ready on entry.

        Args:
            operations: only these, such as ``Operation.INSERT`` or ``["insert", "delete"]``.
            filter: only changes whose document this MongoDB filter matches.
            pipeline: stages of a change stream's aggregation, on the server.
            resume_after: the position to go on from: a token, an event id, or a cluster time.
            full_document: ``"updateLookup"``, ``"whenAvailable"``, ``"required"``.
            full_document_before_change: ``"whenAvailable"``, ``"required"``, ``"off"``.
            show_expanded_events: the DDL events as well.

        https://www.mongodb.com/docs/manual/changeStreams/

        Raises:
            NotBound: no bridge is open for this model in the running event loop.
            InvalidResumeToken: ``resume_after`` is no position.
        """
        from .bridge import bridge_of  # which imports this module

        return bridge_of(cls).watch(
            cls,
            operations=operations,
            filter=filter,
            pipeline=pipeline,
            resume_after=resume_after,
            full_document=full_document,
            full_document_before_change=full_document_before_change,
            show_expanded_events=show_expanded_events,
        )

    @overload
    @classmethod
    def live(
        cls,
        filter: Filter | None = None,
        *,
        sort: Sort | None = None,
        limit: int | None = None,
    ) -> LiveStream[Self]: ...

    @overload
    @classmethod
    def live(
        cls,
        filter: Filter | None = None,
        *,
        sort: Sort | None = None,
        limit: int | None = None,
        view: type[M],
    ) -> LiveStream[M]: ...

    @classmethod
    def live(
        cls,
        filter: Filter | None = None,
        *,
        sort: Sort | None = None,
        limit: int | None = None,
        view: type[BaseModel] | None = None,
    ) -> LiveStream[Any]:
        """What matches now, and every change after: ``async for``, or ``EventSourceResponse``.

        Args:
            filter: a MongoDB query on stored names; only documents that match are ever seen.
            sort: the order of the documents; with ``limit``, of a window that follows it.
            limit: how many of them at most, at any moment; needs ``sort``.
            view: a pydantic model to show them as. Fields that it does not have stay in the
                database, unless the filter needs them.

        https://www.mongodb.com/docs/manual/reference/read-concern-snapshot/

        Raises:
            NotBound: no bridge is open for this model in the running event loop.
            InvalidFilter: the filter, the sort or the limit is none.
            ModelInvalid: the view has a field that the model does not have.
        """
        from .bridge import bridge_of  # which imports this module

        return bridge_of(cls).live(cls, filter, sort=sort, limit=limit, view=view)


class Find(Generic[D]):
    """The documents of a query: ``await`` gives a list, ``async for`` one after the other.

    Nothing is sent before; each ``await`` and each ``async for`` asks the server anew.
    """

    def __init__(
        self,
        model: type[D],
        filter: dict[str, Any],
        sort: list[tuple[str, Any]] | None,
        skip: int,
        limit: int,
        session: Any,
    ) -> None:
        self._model = model
        self._options = {"sort": sort, "skip": skip, "limit": limit, **_with_session(session)}
        self._filter = filter

    def __await__(self) -> Generator[Any, None, list[D]]:
        return self._list().__await__()

    def __aiter__(self) -> AsyncIterator[D]:
        return self._each()

    def _cursor(self) -> Any:
        return _collection(self._model).find(self._filter, **self._options)

    async def _list(self) -> list[D]:
        with _translating(f"find documents of {self._model.__name__}"):
            found = await self._cursor().to_list(None)
        return [self._model.from_bson(document) for document in found]

    async def _each(self) -> AsyncIterator[D]:
        doing = f"find documents of {self._model.__name__}"
        with _translating(doing):
            cursor = self._cursor()
        try:
            documents = aiter(cursor)
            while True:
                with _translating(doing):
                    try:
                        document = await anext(documents)
                    except StopAsyncIteration:
                        return
                yield self._model.from_bson(document)
        finally:
            await cursor.close()

    def __repr__(self) -> str:
        return f"<Find {self._model.__name__}>"


# -- ids ----------------------------------------------------------------------------------------


_id_models: weakref.WeakKeyDictionary[type[Document], type[BaseModel]] = weakref.WeakKeyDictionary()


def _id_model(model: type[Document]) -> type[BaseModel]:
    """A model of one field, ``value``, which validates as the ``id`` of ``model`` does."""
    found = _id_models.get(model)
    if found is None:
        annotation = model.model_fields["id"].rebuild_annotation()
        found = create_model(f"{model.__name__}Id", __base__=Model, value=(annotation, ...))
        _id_models[model] = found
    return found


def _by_id(document: Document) -> dict[str, Any]:
    try:
        return {"_id": encoded(document.id)}
    except Unstorable as error:
        raise DocumentInvalid(
            f"the id of this {type(document).__name__} has {error.reason}."
        ) from error


def _identify(document: Document) -> None:
    """Give a document whose ``id`` may be ``None``, and is, an ``ObjectId``."""
    if document.id is None:
        try:
            made = _id_model(type(document)).model_validate({"value": ObjectId()})
        except ValidationError as error:
            raise DocumentInvalid(
                f"cannot store {_a(type(document))} without an id, and an ObjectId is none for it."
            ) from error
        document.__dict__["id"] = made.value  # type: ignore[attr-defined]
        document.__pydantic_fields_set__.add("id")


def _become(document: D, fresh: D) -> D:
    """Take the state of ``fresh`` over, also where the model is frozen."""
    object.__setattr__(document, "__dict__", fresh.__dict__)
    object.__setattr__(document, "__pydantic_extra__", fresh.__pydantic_extra__)
    object.__setattr__(document, "__pydantic_fields_set__", fresh.__pydantic_fields_set__)
    return document


def _required_filter(model: type[Document], filter: Any) -> Any:
    if filter is None:
        raise InvalidFilter(f"a filter for {model.__name__} is needed here; {{}} matches all.")
    return encoded_filter(model, filter)
