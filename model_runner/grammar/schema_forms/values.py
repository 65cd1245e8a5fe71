"""One form for each type of value that an alternative allows; numbers and objects have their own modules.

Part of `moebeam.model_runner.grammar.schema_forms`, between `choices` and `document`. A form says everything of its
value with the few keywords that llguidance 1.9.1 enforces to the letter.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, TypeAlias, cast

from moebeam.model_runner.grammar.schema_forms.choices import Choices, Part, Places
from moebeam.model_runner.grammar.schema_forms.patterns import FORMATS, UnsupportedPattern, is_asserted, translate
from moebeam.model_runner.grammar.schema_forms.references import SchemaLocation
from moebeam.model_runner.grammar.schema_forms.relaxation import Relaxation
from moebeam.schemas.canonical import Json

_PERMISSIVE: dict[str, Json] = {"patternProperties": {"": True}}
_LISTS = frozenset({"prefixItems", "items"})

DRAFT_URIS = {
    4: "http://json-schema.org/draft-04/schema#",
    6: "http://json-schema.org/draft-06/schema#",
    7: "http://json-schema.org/draft-07/schema#",
    2019: "https://json-schema.org/draft/2019-09/schema",
    2020: "https://json-schema.org/draft/2020-12/schema",
}


@dataclass(frozen=True, slots=True)
class Anything:
    """Any JSON value."""


@dataclass(frozen=True, slots=True)
class Values:
    """Any of these values."""

    values: tuple[Json, ...]


@dataclass(frozen=True, slots=True)
class Simple:
    """Any null, or any boolean."""

    type: Literal["null", "boolean"]


@dataclass(frozen=True, slots=True)
class Number:
    """Numbers within bounds, both inclusive, as llguidance takes them.

    Attributes:
        multiple: that they are multiples of; None for any.
    """

    is_integer: bool
    minimum: float | None = None
    maximum: float | None = None
    multiple: Fraction | None = None


@dataclass(frozen=True, slots=True)
class String:
    """Strings of some length, in characters, that match expressions; all of them translated."""

    min_length: int = 0
    max_length: int | None = None
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Array:
    """Arrays: first `prefix`, then `items`; the empty tuple of places allows anything."""

    prefix: tuple[Places, ...] = ()
    items: Places = ()
    min_items: int = 0
    max_items: int | None = None


@dataclass(frozen=True, slots=True)
class Object:
    """Objects whose properties come in the order of `properties`; other names keep a pattern or `additional`.

    Attributes:
        required: names among `properties`.
        patterns: by translated expression; no name matches two.
    """

    properties: tuple[tuple[str, Places], ...] = ()
    required: frozenset[str] = frozenset()
    patterns: tuple[tuple[str, Places], ...] = ()
    additional: Places = ()
    min_properties: int = 0
    max_properties: int | None = None


Form: TypeAlias = Anything | Values | Simple | Number | String | Array | Object


@dataclass(slots=True)
class Notes:
    """What is learnt while forms are made: keywords left to validation, and all that are enforced."""

    relaxed: list[Relaxation] = field(default_factory=list[Relaxation])
    enforced: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def relax(self, place: SchemaLocation, keyword: str, reason: str) -> None:
        self.relaxed.append(Relaxation(place.pointer, keyword, reason))

    def enforce(self, place: SchemaLocation, keyword: str) -> None:
        if not place.is_made:
            self.enforced.append((place.pointer, keyword))


def without(part: Part, keywords: frozenset[str]) -> Part:
    """A part some of whose keywords allow everything; they still count for what other keywords leave to them."""
    schema = part.place.schema
    if not keywords or not isinstance(schema, Mapping):
        return part
    wider: dict[str, Json] = {}
    for keyword, value in schema.items():
        if keyword not in keywords:
            wider[keyword] = value
        elif keyword in _PERMISSIVE:
            wider[keyword] = _PERMISSIVE[keyword]
        elif keyword == "properties" and isinstance(value, Mapping):
            wider[keyword] = dict.fromkeys(value, True)
        elif keyword in _LISTS and isinstance(value, Sequence) and not isinstance(value, str):
            wider[keyword] = [True] * len(value)
    return Part(SchemaLocation(wider, part.place.pointer, part.place.base, part.place.key), part.ancestors)


def types_of(parts: Iterable[Part]) -> set[str]:
    """The types that all parts allow; `fraction` stands for numbers that are no integers."""
    allowed = {"null", "boolean", "integer", "fraction", "string", "array", "object"}
    for part in parts:
        declared = part.place.get("type")
        if declared is None:
            continue
        names = {declared} if isinstance(declared, str) else set(cast("Sequence[str]", declared))
        if "number" in names:
            names |= {"integer", "fraction"}
        allowed &= names
    return allowed


def string_forms(parts: Sequence[Part], notes: Notes, *, draft: int, are_formats_asserted: bool) -> list[Form]:
    """Strings, with formats as expressions."""
    min_length, max_length = 0, None
    patterns: dict[str, None] = {}
    for part in parts:
        place = part.place
        length = count_of(place, "minLength", notes)
        min_length = max(min_length, length or 0)
        length = count_of(place, "maxLength", notes)
        max_length = length if max_length is None else max_length if length is None else min(length, max_length)
        pattern = place.get("pattern")
        if isinstance(pattern, str):
            try:
                patterns |= dict.fromkeys(translate(pattern))
                notes.enforce(place, "pattern")
            except UnsupportedPattern as error:
                notes.relax(place, "pattern", f"not an expression for grammars: {error}")
        name = place.get("format")
        if are_formats_asserted and isinstance(name, str) and is_asserted(name, DRAFT_URIS[draft]):
            if name in FORMATS:
                patterns |= dict.fromkeys(FORMATS[name])
                notes.enforce(place, "format")
            else:
                notes.relax(place, "format", "no grammar is known for this format")
    if max_length is not None and min_length > max_length:
        return []
    return [String(min_length, max_length, tuple(patterns))]


def count_of(place: SchemaLocation, keyword: str, notes: Notes) -> int | None:
    """A keyword's count, which may be written 2.0; None where there is none."""
    value = place.get(keyword)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    notes.enforce(place, keyword)
    return int(value)


def array_forms(parts: Sequence[Part], choices: Choices, notes: Notes, *, draft: int) -> list[Form]:
    """Arrays; what `contains` and `uniqueItems` ask beyond a number of items is left to validation."""
    min_items, max_items = 0, None
    tuples: list[tuple[list[SchemaLocation], Places, bool]] = []
    for part in parts:
        place = part.place
        min_items = max(min_items, count_of(place, "minItems", notes) or 0)
        count = count_of(place, "maxItems", notes)
        max_items = count if max_items is None else max_items if count is None else min(count, max_items)
        prefix, rest = items_of(place, draft)
        tuples.append((prefix, rest, False))
        for keyword in ("prefixItems", "items", "additionalItems"):
            if place.get(keyword) is not None:
                notes.enforce(place, keyword)
        if place.get("contains") is not None and draft >= 6:
            min_items = max(min_items, _contained(place, draft, notes))
    for part in parts:
        if draft >= 2019 and not part.place.is_plain and part.place.get("unevaluatedItems") is not None:
            tuples.append(_unevaluated(part, parts, choices, notes, draft))
    num_prefix = max((len(prefix) for prefix, _, _ in tuples), default=0)
    children: list[Places] = []
    for index in range(num_prefix + 1):
        child: list[SchemaLocation] = []
        for prefix, rest, is_rest_only in tuples:
            if index < len(prefix):
                if not is_rest_only:
                    child.append(prefix[index])
            else:
                child += rest
        children.append(tuple(child))
    if max_items is not None and min_items > max_items:
        return []
    for part in parts:
        if part.place.get("uniqueItems") is True and (max_items is None or max_items > 1):
            notes.relax(part.place, "uniqueItems", "a grammar does not compare items")
    if max_items is not None and max_items < num_prefix:
        children = [*children[:max_items], (_NOTHING,)]
    return [Array(tuple(children[:-1]), children[-1], min_items, max_items)]


_NOTHING = SchemaLocation(False, "", "", "=false")


def items_of(place: SchemaLocation, draft: int) -> tuple[list[SchemaLocation], Places]:
    """What a place says of its first items one by one, and of all that follow."""
    items = place.get("items")
    if draft >= 2020:
        prefix = place.get("prefixItems")
        length = len(prefix) if isinstance(prefix, Sequence) and not isinstance(prefix, str) else 0
        return (
            [place.child("prefixItems", index) for index in range(length)],
            () if items is None else (place.child("items"),),
        )
    if isinstance(items, Sequence) and not isinstance(items, str):
        rest = () if place.get("additionalItems") is None else (place.child("additionalItems"),)
        return [place.child("items", index) for index in range(len(items))], rest
    return [], () if items is None else (place.child("items"),)


def _contained(place: SchemaLocation, draft: int, notes: Notes) -> int:
    """The least number of items that `contains` asks for."""
    least = count_of(place, "minContains", notes) if draft >= 2019 else None
    least = 1 if least is None else least
    if place.get("contains") is True and (draft < 2019 or place.get("maxContains") is None):
        return least
    if least > 0 or place.get("maxContains") is not None:
        notes.relax(place, "contains", "a grammar does not count the items that match")
    return least


def _unevaluated(
    part: Part, parts: Sequence[Part], choices: Choices, notes: Notes, draft: int
) -> tuple[list[SchemaLocation], Places, bool]:
    place = part.place
    below = evaluated_below(part, parts, choices)
    if place.key in choices.unknown:
        notes.relax(place, "unevaluatedItems", "part of what it looks at is not known")
        return [], (), True
    if place.key in choices.open_choices:
        notes.relax(place, "unevaluatedItems", "what it leaves out depends on which alternatives match")
    if any(other.place.get("contains") is not None and draft >= 2020 for other in below):
        notes.relax(place, "unevaluatedItems", "what it leaves out depends on which items `contains` matches")
        return [], (), True
    prefixes = [items_of(other.place, draft) for other in below]
    if any(rest for _, rest in prefixes) or any(
        other is not part and other.place.get("unevaluatedItems") is not None for other in below
    ):
        return [], (), True
    longest = max((prefix for prefix, _ in prefixes), key=len, default=[])
    return longest, (place.child("unevaluatedItems"),), True


def evaluated_below(part: Part, parts: Sequence[Part], choices: Choices) -> list[Part]:
    """The parts that a place's `unevaluated...` looks at: itself and what its own in-place keywords lead to."""
    key = part.place.key
    candidates = list(parts)
    if key in choices.open_choices:
        candidates = [other for alternative in choices.alternatives for other in alternative]
    found = {part.place.key: part}
    for other in candidates:
        is_seen = not any(ancestor.startswith("!") for ancestor in (other.place.key, *other.ancestors))
        if key in other.ancestors and is_seen and not other.place.is_made:
            found[other.place.key] = other
    return list(found.values())
