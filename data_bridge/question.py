"""Question: what a live query asks, checked when it is declared."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from .bson_types import stored_names
from .document import Document, collection_name, encoded_filter, settings_of, sort_keys
from .errors import InvalidFilter, ModelInvalid
from .filter import Filter

if TYPE_CHECKING:
    from .document import Sort

__all__ = ["Question", "projection_of", "question_of"]

_KEPT = ("operationType", "clusterTime", "wallTime", "ns", "to", "documentKey")


@dataclass(frozen=True)
class Question:
    """What a live query asks; equal questions on one feed are answered by one query."""

    collection: str
    filter: Filter
    images: bool  # the feed carries the documents before and after each change
    sort: tuple[tuple[str, int], ...] = ()
    limit: int | None = None
    fields: tuple[str, ...] | None = None  # what a snapshot reads; None: all

    @property
    def projection(self) -> dict[str, Any] | None:
        return None if self.fields is None else dict.fromkeys(self.fields, 1)


def question_of(
    model: type[Document],
    filter: Mapping[str, Any] | None,
    sort: Sort | None,
    limit: int | None,
    view: type[BaseModel] | None,
    bound: int | None,
) -> Question:
    """The question of ``model.live(…)``; a bound that is not known yet is not checked.

    Raises:
        InvalidFilter: the filter, the sort or the limit is none.
        ModelInvalid: the view has a field that the model does not have.
    """
    asked = Filter(encoded_filter(model, filter))
    keys = tuple(sort_keys(model, sort) or ())
    for path, direction in keys:
        if direction not in (1, -1):
            raise InvalidFilter(
                f"{model.__name__}.live() cannot be sorted by {path!r} as {direction!r}: a live "
                "query knows 1 and -1."
            )
    if limit is not None:
        number = isinstance(limit, int) and not isinstance(limit, bool)
        if not number or not 1 <= limit <= (limit if bound is None else bound):
            to = "1 on" if bound is None else f"1 to {bound}"
            raise InvalidFilter(
                f"the limit of {model.__name__}.live() is a number from {to} (Limits.window), "
                f"not {limit!r}."
            )
        if not keys:
            raise InvalidFilter(
                f"{model.__name__}.live() has a limit and no sort: which documents would it show?"
            )
        if asked.beyond is not None:
            raise InvalidFilter(
                f"{model.__name__}.live() has a limit and a filter that only the server "
                f"evaluates: {asked.beyond}."
            )
    fields = None
    if view is not None:
        needed = set(_fields(view, model)) | {path.partition(".")[0] for path, _ in keys}
        fields = _without_parts(needed | set(asked.fields) | {"_id"})
    return Question(
        collection=collection_name(model),
        filter=asked,
        images=settings_of(model).pre_images,
        sort=keys,
        limit=limit,
        fields=fields,
    )


def projection_of(question: Question) -> dict[str, Any]:
    """The stage that keeps the fields of a question in the change events, and no others."""
    assert question.fields is not None
    kept = dict.fromkeys(_KEPT, 1)
    kept |= dict.fromkeys((f"fullDocument.{field}" for field in question.fields), 1)
    if question.images:
        before = {"_id", *question.filter.fields}
        kept |= dict.fromkeys((f"fullDocumentBeforeChange.{field}" for field in sorted(before)), 1)
    return {"$project": kept}


def merged_projection(questions: Sequence[Question]) -> dict[str, Any]:
    """``projection_of`` for the events of several collections on one cursor."""
    branches = []
    for question in questions:
        if question.fields is None:
            continue
        before = ["_id", *question.filter.fields]
        kept: dict[str, Any] = {name: f"${name}" for name in ("_id", *_KEPT)}
        kept["fullDocument"] = _picked("$fullDocument", _tree(question.fields))
        kept["fullDocumentBeforeChange"] = _picked("$fullDocumentBeforeChange", _tree(before))
        case = {"$eq": ["$ns.coll", question.collection]}
        branches.append({"case": case, "then": kept})
    return {"$replaceWith": {"$switch": {"branches": branches, "default": "$$ROOT"}}}


Tree = dict[str, "Tree"]


def _tree(paths: Iterable[str]) -> Tree:
    tree: Tree = {}
    for path in paths:
        inner = tree
        for part in path.split("."):
            inner = inner.setdefault(part, {})
    return tree


def _picked(value: str, tree: Tree) -> Any:
    """An expression for some fields of a document, or of each document of an array."""
    if not tree:
        return value
    each = {name: _picked(f"{value}.{name}", inner) for name, inner in tree.items()}
    document = {"$cond": [{"$eq": [{"$type": value}, "object"]}, each, "$$REMOVE"]}
    if "." not in value:
        return document
    name = f"e{value.count('.')}"
    elements = {"$map": {"input": value, "as": name, "in": _picked(f"$${name}", tree)}}
    return {"$cond": [{"$isArray": value}, elements, document]}


# -- views --------------------------------------------------------------------------------------


def _fields(view: type[BaseModel], model: type[BaseModel], inside: str = "") -> list[str]:
    """The stored paths that a view reads, each of which its model has."""
    known = {stored: name for name, stored in stored_names(model)}
    paths = []
    for name, own in stored_names(view):
        # A view need not be a Document to have an id.
        stored = "_id" if own == "id" and not inside and "_id" in known else own
        if stored not in known and model.model_config.get("extra") != "allow":
            raise ModelInvalid(
                f"{view.__qualname__}.{name} shows {inside + stored!r}, which "
                f"{model.__qualname__} does not store. Name the field as the model does, or give "
                f"it the alias of the stored one."
            )
        narrower = _model_in(view.model_fields[name].annotation)
        stored_as = (
            _model_in(model.model_fields[known[stored]].annotation) if stored in known else None
        )
        if narrower is not None and stored_as is not None and stored != "_id":
            paths += [
                f"{stored}.{path}" for path in _fields(narrower, stored_as, f"{inside}{stored}.")
            ]
        else:
            paths.append(stored)
    return paths


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation holds, alone, in a list, or optionally."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated or origin in (list, tuple, set):
        return _model_in(args[0]) if args else None
    if origin in (Union, types.UnionType):
        held = [arg for arg in args if arg is not type(None)]
        return _model_in(held[0]) if len(held) == 1 else None
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    )


def _without_parts(paths: set[str]) -> tuple[str, ...]:
    """Paths without those inside of others: MongoDB refuses to project both."""
    return tuple(
        sorted(path for path in paths if not any(path.startswith(f"{other}.") for other in paths))
    )
