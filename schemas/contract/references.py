"""A JSON Schema's draft, the location of its subschemas, and reference resolution. Nothing is ever fetched.

`$ref` is resolved only here: for answer columns (`schemas/contract/shape_reader.py`), for error
messages (`schemas/contract/answer_schema.py`) and for what a mask can enforce (`model_runner/grammar/schema_forms/`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast
from urllib.parse import unquote, urldefrag, urljoin

from moebeam.schemas.canonical import Json, canonical_json

DRAFTS = {
    "json-schema.org/draft-04/schema": 4,
    "json-schema.org/draft-06/schema": 6,
    "json-schema.org/draft-07/schema": 7,
    "json-schema.org/draft/2019-09/schema": 2019,
    "json-schema.org/draft/2020-12/schema": 2020,
}
NEWEST_DRAFT = 2020

_DATA_KEYWORDS = frozenset({"const", "enum", "default", "examples", "example"})
_BASE = "http://schema.invalid/"


@dataclass(frozen=True, slots=True)
class SchemaLocation:
    """A schema and its location.

    Attributes:
        schema: an object or a boolean.
        pointer: JSON pointer into the root document; for a made schema, the place it was made for.
        base: URI that its references resolve against.
        key: equal for equal places. The prefix `=` marks a made schema; `+` a place that counts without its in-place
            keywords and the keywords that depend on them; `!` one that holds because another must not.
        id_keyword: `id` in draft 4, else `$id`.
    """

    schema: Json = field(compare=False)
    pointer: str = field(compare=False)
    base: str = field(compare=False)
    key: str = ""
    id_keyword: str = field(default="$id", compare=False)

    @property
    def is_made(self) -> bool:
        """Whether the schema was made, so is not in the document."""
        return self.key.startswith("=")

    @property
    def is_plain(self) -> bool:
        """Whether its in-place keywords are ignored."""
        return self.key.startswith("+")

    def plain(self) -> "SchemaLocation":
        """The place, ignoring its in-place keywords."""
        return replace(self, key=f"+{self.key}")

    def unseen(self) -> "SchemaLocation":
        """The place, hidden from `unevaluatedProperties` and `unevaluatedItems`."""
        return replace(self, key=f"!{self.key}")

    def get(self, keyword: str) -> Json:
        schema = self.schema
        # The first test is the usual case and ten times as fast as the second; this is called a million times.
        return schema.get(keyword) if type(schema) is dict or isinstance(schema, Mapping) else None

    def child(self, *steps: str | int) -> "SchemaLocation":
        """The schema below a keyword; a boolean or an object."""
        found: Json = self.schema
        for step in steps:
            found = cast("Mapping[str | int, Json]", found)[step]
        pointer = self.pointer + "".join(f"/{escape_step(step)}" for step in steps)
        if found is True or self.key.startswith(("=", "+=")):
            return make_schema(found, pointer)
        return SchemaLocation(found, pointer, self.base, pointer, self.id_keyword).enter()

    def children(self, keyword: str) -> "list[SchemaLocation]":
        """The schemas below a keyword, in order; empty if it holds neither a list nor an object."""
        found = self.get(keyword)
        if isinstance(found, Mapping):
            return [self.child(keyword, name) for name in found]
        if isinstance(found, Sequence) and not isinstance(found, str):
            return [self.child(keyword, index) for index in range(len(found))]
        return []

    def enter(self) -> "SchemaLocation":
        """The same place, with the schema's own identifier as base if it has one."""
        identifier = self.get(self.id_keyword)
        return replace(self, base=_join(self.base, identifier)[0]) if isinstance(identifier, str) else self


def make_schema(schema: Json, pointer: str) -> SchemaLocation:
    """Make a schema without references for the place at `pointer`."""
    return SchemaLocation(schema, pointer, _BASE, "=" + canonical_json(schema))


def escape_step(step: str | int) -> str:
    """Escape one step of a JSON pointer."""
    return str(step).replace("~", "~0").replace("/", "~1")


def unescape_step(step: str) -> str:
    """Unescape one step of a JSON pointer."""
    return step.replace("~1", "/").replace("~0", "~")


class References:
    """The schemas of one document by URI and anchor.

    Attributes:
        root: the document itself.
        draft: 4, 6, 7, 2019 or 2020; an unknown `$schema` counts as the newest.
        has_unevaluated: whether `unevaluatedProperties` or `unevaluatedItems` occurs.
    """

    def __init__(self, document: Json) -> None:
        self.document = document
        self.draft = read_draft(document) or NEWEST_DRAFT
        self._resources: dict[str, SchemaLocation] = {}
        self._anchors: dict[tuple[str, str], SchemaLocation] = {}
        self._dynamic_names: dict[str, int] = {}
        self.has_recursive_anchor = False
        self.has_unevaluated = False
        self.root = SchemaLocation(document, "", _BASE, "", "id" if self.draft == 4 else "$id").enter()
        self._resources[_BASE] = self._resources[self.root.base] = self.root
        for place in walk_schemas(self.root):
            self._enter(place)

    def resolve(self, place: SchemaLocation, keyword: str) -> SchemaLocation | None:
        """Resolve a reference; None if its target is outside the document or depends on the dynamic scope.

        Args:
            keyword: `$ref`, `$dynamicRef` or `$recursiveRef` of the place.
        """
        reference = place.get(keyword)
        if not isinstance(reference, str) or (keyword == "$recursiveRef" and self.has_recursive_anchor):
            return None
        if keyword == "$dynamicRef" and self._dynamic_names.get(unquote(reference.partition("#")[2]), 0) > 1:
            return None
        return self.find(reference, place.base)

    def find(self, reference: str, base: str) -> SchemaLocation | None:
        """Find the schema with this URI, pointer or anchor, regardless of dynamic scope."""
        uri, fragment = _join(base, reference)
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            return self._anchors.get((uri, fragment)) if uri in self._resources else None
        found = self._resources.get(uri)
        for step in fragment.split("/")[1:]:
            found = found and _descend(found, unescape_step(step))
        return found if found and isinstance(found.schema, Mapping | bool) else None

    def _enter(self, place: SchemaLocation) -> None:
        identifier = place.get(place.id_keyword)
        if isinstance(identifier, str) and not (self.draft <= 7 and isinstance(place.get("$ref"), str)):
            self._resources.setdefault(place.base, place)
            anchor = urldefrag(identifier)[1]
            if anchor and self.draft <= 7:
                self._anchors.setdefault((place.base, anchor), place)
        for keyword in ("$anchor", "$dynamicAnchor"):
            name = place.get(keyword)
            if isinstance(name, str):
                self._anchors.setdefault((place.base, name), place)
                if keyword == "$dynamicAnchor":
                    self._dynamic_names[name] = self._dynamic_names.get(name, 0) + 1
        self.has_unevaluated = self.has_unevaluated or any(
            place.get(keyword) is not None for keyword in ("unevaluatedItems", "unevaluatedProperties")
        )
        self.has_recursive_anchor = self.has_recursive_anchor or place.get("$recursiveAnchor") is True


def read_draft(schema: Json) -> int | None:
    """The draft that a schema declares; None if absent or unknown."""
    declared = schema.get("$schema") if isinstance(schema, Mapping) else None
    if not isinstance(declared, str):
        return None
    return DRAFTS.get(declared.removesuffix("#").removeprefix("https://").removeprefix("http://"))


def walk_schemas(root: SchemaLocation) -> Iterator[SchemaLocation]:
    """Yield every object that may be a schema, in document order; skips plain data."""
    waiting = [root]
    while waiting:
        place = waiting.pop()
        schema = place.schema
        if isinstance(schema, Mapping):
            yield place
            steps: list[str | int] = [name for name in schema if name not in _DATA_KEYWORDS]
        elif isinstance(schema, Sequence) and not isinstance(schema, str):
            steps = list(range(len(schema)))
        else:
            continue
        waiting.extend(place.child(step) for step in reversed(steps))


def _join(base: str, reference: str) -> tuple[str, str]:
    """Resolve a reference to URI and fragment; an invalid URI names nothing."""
    try:
        return urldefrag(base + reference if reference.startswith("#") else urljoin(base, reference))
    except ValueError:
        return reference, ""


def _descend(place: SchemaLocation, name: str) -> SchemaLocation | None:
    schema = place.schema
    if isinstance(schema, Mapping):
        return place.child(name) if name in schema else None
    if isinstance(schema, Sequence) and not isinstance(schema, str) and name.isdecimal() and int(name) < len(schema):
        return place.child(int(name))
    return None
