"""Bounds of a JSON Schema, counted before anything is built of it.

`schemas/contract/answer_schema.py` asks before it compiles. Two things grow without notice: a document itself, and the
number of its schemas that apply to one value. Where each of thirty definitions refers twice to the next, 300 bytes each
ask for a billion checks of one value; jsonschema-rs would go through all of them, and with `unevaluatedProperties`
also hold them all in memory, until the process aborts. A `$ref` that leads back to itself adds nothing and counts once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.references import References, SchemaLocation

MAX_OBJECTS = 50_000
"""Most objects in a document. The largest of SchemaStore, Azure's of 2.1 MB, has 40,377."""

MAX_APPLIED = 20_000
"""Most schemas that apply to one value: milliseconds of validation, 100 MB of jsonschema-rs in the worst case."""

MAX_CHAIN = 200
"""Most schemas of which each leads to the next in place; those who follow them recurse."""

MAX_LEVELS = 8
"""Levels of a value down to which schemas are counted. A schema that refers to itself twice doubles at each level; that
is common, and harmless for values as deep as people write them."""

MAX_PLACES = 2_000
"""Most different places in a value that are looked at; of larger schemas the first ones."""

_LISTS = ("allOf", "anyOf", "oneOf")
_SINGLE = ("not", "if", "then", "else")
_NAMED = ("dependentSchemas", "dependencies")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_ANY_PROPERTY = ("additionalProperties", "unevaluatedProperties", "patternProperties")
_ANY_ITEM = ("items", "additionalItems", "contains", "unevaluatedItems")


def find_excess(document: Json) -> str | None:
    """What of a schema exceeds a bound, for an error message; None if nothing does."""
    num_objects, has_references = _count_objects(document)
    if num_objects > MAX_OBJECTS:
        return f"expected a schema of at most {MAX_OBJECTS} objects, found {num_objects}"
    if not has_references:
        return None
    try:
        found = _Counting(References(document)).find_most_applied()
    except _ChainTooLong as error:
        return f"expected references that lead through at most {MAX_CHAIN} schemas, found more at {error}"
    if found is None:
        return None
    return (
        f"expected at most {MAX_APPLIED} schemas that apply to one value, found more at "
        f"{found or 'the root'}, because references repeat in `allOf` and the like; name each part once"
    )


class _ChainTooLong(Exception):
    """Schemas lead to one another in place, too many times; the message is the pointer of the last."""


def _count_objects(document: Json) -> tuple[int, bool]:
    """How many objects a document holds, and whether any has a reference; stops where there are too many."""
    number, has_references = 0, False
    waiting: list[Json] = [document]
    while waiting:
        found = waiting.pop()
        if isinstance(found, Mapping):
            number += 1
            has_references = has_references or any(keyword in found for keyword in _REFERENCES)
            waiting.extend(found.values())
        elif isinstance(found, Sequence) and not isinstance(found, str):
            waiting.extend(found)
    return number, has_references


class _Counting:
    """Counts the schemas that apply to the places of a value.

    A place is known by the schemas that its parent's schemas give it, each with the number of times that it applies.
    """

    def __init__(self, references: References) -> None:
        self._references = references
        self._locations: dict[str, SchemaLocation] = {}
        self._applied: dict[str, Counter[str]] = {}
        self._open: set[str] = set()

    def find_most_applied(self) -> str | None:
        """Pointer of a schema at a place where too many apply; None where there is no such place."""
        level = [Counter({self._enter(self._references.root): 1})]
        seen: set[frozenset[tuple[str, int]]] = set()
        for _ in range(MAX_LEVELS):
            below: list[Counter[str]] = []
            for place in level:
                if (key := frozenset(place.items())) in seen or len(seen) >= MAX_PLACES:
                    continue
                seen.add(key)
                applied = self._apply(place)
                if applied.total() > MAX_APPLIED:
                    return max(place, key=lambda name: self._find_applied(name).total())
                below += self._list_places_below(applied)
            level = below
        return None

    def _enter(self, location: SchemaLocation) -> str:
        self._locations[location.pointer] = location
        return location.pointer

    def _apply(self, place: Counter[str]) -> Counter[str]:
        """All schemas that apply to a place, with those that its own lead to in place."""
        found: Counter[str] = Counter()
        for pointer, times in place.items():
            _add(found, self._find_applied(pointer), times)
        return found

    def _find_applied(self, pointer: str) -> Counter[str]:
        """A schema and those that it leads to in place; each number at most just beyond the bound."""
        if pointer in self._applied:
            return self._applied[pointer]
        if pointer in self._open:
            return Counter()
        if len(self._open) > MAX_CHAIN:
            raise _ChainTooLong(pointer)
        self._open.add(pointer)
        found = Counter({pointer: 1})
        for child in self._list_in_place(self._locations[pointer]):
            if found.total() <= MAX_APPLIED:
                _add(found, self._find_applied(self._enter(child)), 1)
        self._open.discard(pointer)
        self._applied[pointer] = found
        return found

    def _list_in_place(self, location: SchemaLocation) -> Iterator[SchemaLocation]:
        for keyword in (*_LISTS, *_NAMED):
            yield from (child for child in location.children(keyword) if isinstance(child.schema, Mapping))
        for keyword in _SINGLE:
            if isinstance(location.get(keyword), Mapping):
                yield location.child(keyword)
        for keyword in _REFERENCES:
            target = self._references.resolve(location, keyword)
            if target is not None and isinstance(target.schema, Mapping):
                yield target

    def _list_places_below(self, applied: Counter[str]) -> Iterator[Counter[str]]:
        """The schemas of each property and of the items, as far as any are said of them."""
        properties: dict[str, Counter[str]] = {}
        any_property: Counter[str] = Counter()
        any_item: Counter[str] = Counter()
        prefix: dict[int, Counter[str]] = {}
        for pointer, times in applied.items():
            location = self._locations[pointer]
            if isinstance(names := location.get("properties"), Mapping):
                for name in names:
                    self._put(properties.setdefault(name, Counter()), location.child("properties", name), times)
            for keyword in _ANY_PROPERTY:
                for child in _list_below(location, keyword):
                    self._put(any_property, child, times)
            for keyword in _ANY_ITEM:
                if not isinstance(location.get(keyword), list):
                    for child in _list_below(location, keyword):
                        self._put(any_item, child, times)
            for keyword in ("prefixItems", "items"):
                if isinstance(location.get(keyword), list):
                    for index, child in enumerate(location.children(keyword)):
                        self._put(prefix.setdefault(index, Counter()), child, times)
        yield from (found + any_property for found in (*properties.values(), Counter[str]()))
        yield from (found + any_item for found in (*prefix.values(), Counter[str]()))

    def _put(self, place: Counter[str], child: SchemaLocation, times: int) -> None:
        if isinstance(child.schema, Mapping):
            place[self._enter(child)] += times


def _add(sums: Counter[str], more: Mapping[str, int], times: int) -> None:
    for key, number in more.items():
        sums[key] = min(sums[key] + number * times, MAX_APPLIED + 1)


def _list_below(location: SchemaLocation, keyword: str) -> list[SchemaLocation]:
    value = location.get(keyword)
    if keyword == "patternProperties":
        return location.children(keyword)
    return [location.child(keyword)] if isinstance(value, Mapping) else []
