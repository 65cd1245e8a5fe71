"""Which draft a schema is of, where each of its parts lies, and what a reference names. Nothing is ever fetched.

First of `moebeam.model_runner.grammar.schema_forms`: `choices` asks here what a `$ref` stands for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    """A schema that a value must keep, and where it stands.

    Attributes:
        schema: an object or a boolean.
        pointer: JSON pointer in the root document; of a schema that was made, the place that it was made for.
        base: URI against which its references resolve.
        key: equal for equal places. `=` begins the key of a schema that was made; `+` that of a place of which only
            what it says of the value itself counts, not its in-place keywords and what looks at them; `!` that of one
            that holds because another must not.
    """

    schema: Json = field(compare=False)
    pointer: str = field(compare=False)
    base: str = field(compare=False)
    key: str = ""

    @property
    def is_made(self) -> bool:
        """Whether the schema stands nowhere in the document."""
        return self.key.startswith("=")

    @property
    def is_plain(self) -> bool:
        """Whether its in-place keywords do not count."""
        return self.key.startswith("+")

    def plain(self) -> "SchemaLocation":
        """The place without its in-place keywords."""
        return SchemaLocation(self.schema, self.pointer, self.base, f"+{self.key}")

    def unseen(self) -> "SchemaLocation":
        """The place, such that `unevaluatedProperties` and `unevaluatedItems` do not look at it."""
        return SchemaLocation(self.schema, self.pointer, self.base, f"!{self.key}")

    def get(self, keyword: str) -> Json:
        return self.schema.get(keyword) if isinstance(self.schema, Mapping) else None

    def child(self, *steps: str | int) -> "SchemaLocation":
        """The schema below a keyword; a boolean or an object."""
        found: Json = self.schema
        for step in steps:
            found = cast("Mapping[str | int, Json]", found)[step]
        pointer = self.pointer + "".join(f"/{escaped(step)}" for step in steps)
        if self.key.startswith(("=", "+=")):
            return made(found, pointer)
        if found is True:
            return made(True, pointer)
        base = self.base
        if isinstance(found, Mapping) and isinstance(found.get("$id"), str):
            base = urldefrag(urljoin(base, cast("str", found["$id"])))[0]
        return SchemaLocation(found, pointer, base, pointer)


def made(schema: Json, pointer: str) -> SchemaLocation:
    """A schema of our own, without references, for the place at `pointer`."""
    return SchemaLocation(schema, pointer, _BASE, "=" + canonical_json(schema))


def escaped(step: str | int) -> str:
    """One step of a JSON pointer."""
    return str(step).replace("~", "~0").replace("/", "~1")


def unescaped(step: str) -> str:
    """The name that one step of a JSON pointer stands for."""
    return step.replace("~1", "/").replace("~0", "~")


class References:
    """The schemas of one document by URI and anchor.

    Attributes:
        draft: 4, 6, 7, 2019 or 2020; an unknown `$schema` counts as the newest.
        has_unevaluated: whether a keyword looks at what others have matched.
    """

    def __init__(self, document: Json) -> None:
        self.document = document
        self.draft = draft_of(document) or NEWEST_DRAFT
        self._id_keyword = "id" if self.draft == 4 else "$id"
        self._resources: dict[str, SchemaLocation] = {}
        self._anchors: dict[tuple[str, str], SchemaLocation] = {}
        self._dynamic_names: dict[str, int] = {}
        self.has_recursive_anchor = False
        self.has_unevaluated = False
        base = self._base_of(document, _BASE)
        self.root = SchemaLocation(document, "", base, "")
        self._resources[_BASE] = self._resources[base] = self.root
        for place in _subschemas(self.root, self._id_keyword):
            self._enter(place)

    def resolve(self, place: SchemaLocation, keyword: str) -> SchemaLocation | None:
        """What a reference names; None where that lies outside the document or depends on the way there.

        Args:
            keyword: `$ref`, `$dynamicRef` or `$recursiveRef` of the place.
        """
        reference = place.get(keyword)
        if not isinstance(reference, str):
            return None
        if keyword == "$recursiveRef" and self.has_recursive_anchor:
            return None
        uri, fragment = urldefrag(
            place.base + reference if reference.startswith("#") else urljoin(place.base, reference)
        )
        fragment = unquote(fragment)
        resource = self._resources.get(uri)
        if resource is None:
            return None
        if fragment and not fragment.startswith("/"):
            if keyword == "$dynamicRef" and self._dynamic_names.get(fragment, 0) > 1:
                return None
            return self._anchors.get((uri, fragment))
        return self._at(resource, fragment)

    def _at(self, place: SchemaLocation, pointer: str) -> SchemaLocation | None:
        found = place
        for step in pointer.split("/")[1:]:
            name = unescaped(step)
            schema = found.schema
            if isinstance(schema, Mapping) and name in schema:
                found = found.child(name)
            elif isinstance(schema, Sequence) and not isinstance(schema, str) and name.isdecimal():
                if int(name) >= len(schema):
                    return None
                found = found.child(int(name))
            else:
                return None
        return found if isinstance(found.schema, Mapping | bool) else None

    def _base_of(self, schema: Json, base: str) -> str:
        found = schema.get(self._id_keyword) if isinstance(schema, Mapping) else None
        return urldefrag(urljoin(base, found))[0] if isinstance(found, str) else base

    def _enter(self, place: SchemaLocation) -> None:
        identifier = place.get(self._id_keyword)
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


def draft_of(schema: Json) -> int | None:
    """The draft that a schema declares; None where it declares none, or none that is known."""
    declared = schema.get("$schema") if isinstance(schema, Mapping) else None
    if not isinstance(declared, str):
        return None
    return DRAFTS.get(declared.removesuffix("#").removeprefix("https://").removeprefix("http://"))


def _subschemas(root: SchemaLocation, id_keyword: str) -> Iterator[SchemaLocation]:
    """Every object that may be a schema, in document order; plain data is passed over."""
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
        for step in reversed(steps):
            child = place.child(step)
            if id_keyword != "$id" and isinstance(child.get(id_keyword), str):
                base = urldefrag(urljoin(place.base, cast("str", child.get(id_keyword))))[0]
                child = SchemaLocation(child.schema, child.pointer, base, child.key)
            waiting.append(child)


def json_key(value: Json) -> str:
    """A text that equal JSON values share, whatever the order of their keys; 1 and 1.0 are equal."""
    return json.dumps(_normal(value), sort_keys=True, separators=(",", ":"))


def _normal(value: Json) -> Json:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    if isinstance(value, Mapping):
        return {name: _normal(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_normal(item) for item in value]
    return value
