"""Builds one form for each type of value that an alternative allows; numbers and objects have their own modules.

Part of `moebeam.model_runner.grammar.schema_forms`, between `choices` and `document`. A form uses only
the few keywords that llguidance 1.9.1 enforces exactly.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, TypeAlias, cast

from moebeam.model_runner.grammar.schema_forms.choices import Choices, Locations, Part
from moebeam.model_runner.grammar.schema_forms.formats import FORMATS, NARROWED
from moebeam.model_runner.grammar.schema_forms.lexer_cost import is_affordable
from moebeam.model_runner.grammar.schema_forms.patterns import UnsupportedPattern, is_asserted, translate
from moebeam.model_runner.grammar.schema_forms.relaxation import Relaxation
from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.references import SchemaLocation

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
    """Arrays: first `prefix`, then `items`; the empty tuple of locations allows anything."""

    prefix: tuple[Locations, ...] = ()
    items: Locations = ()
    min_items: int = 0
    max_items: int | None = None


@dataclass(frozen=True, slots=True)
class Object:
    """Objects whose properties come in the order of `properties`; other names keep a pattern or `additional`.

    Attributes:
        required: names among `properties`.
        patterns: by translated expression; no name matches two.
    """

    properties: tuple[tuple[str, Locations], ...] = ()
    required: frozenset[str] = frozenset()
    patterns: tuple[tuple[str, Locations], ...] = ()
    additional: Locations = ()
    min_properties: int = 0
    max_properties: int | None = None


Form: TypeAlias = Anything | Values | Simple | Number | String | Array | Object


@dataclass(slots=True)
class Notes:
    """Collects, while forms are built, the keywords left to validation, those enforced and those of which less can be
    written than is valid."""

    relaxed: list[Relaxation] = field(default_factory=list[Relaxation])
    narrowed: list[Relaxation] = field(default_factory=list[Relaxation])
    enforced: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def relax(self, location: SchemaLocation, keyword: str, reason: str) -> None:
        self.relaxed.append(Relaxation(location.pointer, keyword, reason))

    def narrow(self, location: SchemaLocation, keyword: str, reason: str) -> None:
        self.narrowed.append(Relaxation(location.pointer, keyword, reason))

    def enforce(self, location: SchemaLocation, keyword: str) -> None:
        if not location.is_made:
            self.enforced.append((location.pointer, keyword))


def drop_keywords(part: Part, keywords: frozenset[str]) -> Part:
    """Makes some of a part's keywords admit everything; `additionalProperties` and the like still see them."""
    schema = part.location.schema
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
    return Part(SchemaLocation(wider, part.location.pointer, part.location.base, part.location.key), part.ancestors)


def find_types(parts: Iterable[Part]) -> set[str]:
    """The types that all parts allow; `fraction` stands for numbers that are not integers."""
    allowed = {"null", "boolean", "integer", "fraction", "string", "array", "object"}
    for part in parts:
        declared = part.location.get("type")
        if declared is None:
            continue
        names = {declared} if isinstance(declared, str) else set(cast("Sequence[str]", declared))
        if "number" in names:
            names |= {"integer", "fraction"}
        allowed &= names
    return allowed


def build_string_forms(parts: Sequence[Part], notes: Notes, *, draft: int, are_formats_asserted: bool) -> list[Form]:
    """Strings; a format becomes one or two expressions."""
    min_length, max_length = read_bounds(parts, "minLength", "maxLength", notes)
    patterns: dict[str, None] = {}
    for part in parts:
        location = part.location
        pattern = location.get("pattern")
        if isinstance(pattern, str):
            try:
                patterns |= dict.fromkeys(translate(pattern))
                notes.enforce(location, "pattern")
            except UnsupportedPattern as error:
                notes.relax(location, "pattern", f"not an expression for grammars: {error}")
        name = location.get("format")
        if are_formats_asserted and isinstance(name, str) and is_asserted(name, DRAFT_URIS[draft]):
            if name in FORMATS:
                patterns |= dict.fromkeys(FORMATS[name])
                notes.enforce(location, "format")
                if name in NARROWED:
                    notes.narrow(location, "format", NARROWED[name])
            else:
                notes.relax(location, "format", "no grammar is known for this format")
    if max_length is not None and min_length > max_length:
        return []
    return [_find_affordable(String(min_length, max_length, tuple(patterns)), parts, notes)]


def _find_affordable(form: String, parts: Sequence[Part], notes: Notes) -> String:
    """The string, without its bounds or without its expressions too, where a lexer cannot follow them together."""
    for keywords in (("minLength", "maxLength"), ("pattern", "format")):
        if is_affordable(form.patterns, form.min_length, form.max_length):
            return form
        for part in parts:
            for keyword in keywords:
                if part.location.get(keyword) is not None:
                    notes.relax(part.location, keyword, "beside the other keywords it overtaxes a lexer")
        form = String(patterns=form.patterns) if keywords[0] == "minLength" else String()
    return form


def read_bounds(parts: Iterable[Part], least: str, most: str, notes: Notes) -> tuple[int, int | None]:
    """The largest count under one keyword and the smallest under another; 0 and None where there is none."""
    lows = [read_count(part.location, least, notes) for part in parts]
    highs = [read_count(part.location, most, notes) for part in parts]
    return (
        max((count for count in lows if count is not None), default=0),
        min((count for count in highs if count is not None), default=None),
    )


def read_count(location: SchemaLocation, keyword: str, notes: Notes) -> int | None:
    """A keyword's count, also where it is written 2.0; None where there is none."""
    value = location.get(keyword)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    notes.enforce(location, keyword)
    return int(value)


def build_array_forms(parts: Sequence[Part], choices: Choices, notes: Notes, *, draft: int) -> list[Form]:
    """Arrays; of `contains` only the least number of items is enforced, of `uniqueItems` nothing."""
    min_items, max_items = read_bounds(parts, "minItems", "maxItems", notes)
    tuples: list[tuple[list[SchemaLocation], Locations, bool]] = []
    for part in parts:
        location = part.location
        prefix, rest = read_items(location, draft)
        tuples.append((prefix, rest, False))
        for keyword in ("prefixItems", "items", "additionalItems"):
            if location.get(keyword) is not None:
                notes.enforce(location, keyword)
        if location.get("contains") is not None and draft >= 6:
            min_items = max(min_items, _count_contained(location, draft, notes))
    for part in parts:
        if draft >= 2019 and not part.location.is_plain and part.location.get("unevaluatedItems") is not None:
            tuples.append(_read_unevaluated(part, parts, choices, notes, draft))
    num_prefix = max((len(prefix) for prefix, _, _ in tuples), default=0)
    children: list[Locations] = []
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
        if part.location.get("uniqueItems") is True and (max_items is None or max_items > 1):
            notes.relax(part.location, "uniqueItems", "a grammar does not compare items")
    if max_items is not None and max_items < num_prefix:
        children = [*children[:max_items], (_NOTHING,)]
    return [Array(tuple(children[:-1]), children[-1], min_items, max_items)]


_NOTHING = SchemaLocation(False, "", "", "=false")


def read_items(location: SchemaLocation, draft: int) -> tuple[list[SchemaLocation], Locations]:
    """The schemas of a location's first items, one each, and those of all later items."""
    items = location.get("items")
    if draft >= 2020:
        prefix = location.get("prefixItems")
        length = len(prefix) if isinstance(prefix, Sequence) and not isinstance(prefix, str) else 0
        return (
            [location.child("prefixItems", index) for index in range(length)],
            () if items is None else (location.child("items"),),
        )
    if isinstance(items, Sequence) and not isinstance(items, str):
        rest = () if location.get("additionalItems") is None else (location.child("additionalItems"),)
        return [location.child("items", index) for index in range(len(items))], rest
    return [], () if items is None else (location.child("items"),)


def _count_contained(location: SchemaLocation, draft: int, notes: Notes) -> int:
    """The least number of items that `contains` implies."""
    least = read_count(location, "minContains", notes) if draft >= 2019 else None
    least = 1 if least is None else least
    if location.get("contains") is True and (draft < 2019 or location.get("maxContains") is None):
        return least
    if least > 0 or location.get("maxContains") is not None:
        notes.relax(location, "contains", "a grammar does not count the items that match")
    return least


def _read_unevaluated(
    part: Part, parts: Sequence[Part], choices: Choices, notes: Notes, draft: int
) -> tuple[list[SchemaLocation], Locations, bool]:
    location = part.location
    below = find_evaluated(part, parts, choices)
    if location.key in choices.unknown:
        notes.relax(location, "unevaluatedItems", "part of what it looks at is not known")
        return [], (), True
    if location.key in choices.open_choices:
        notes.relax(location, "unevaluatedItems", "what it leaves out depends on which alternatives match")
    if any(other.location.get("contains") is not None and draft >= 2020 for other in below):
        notes.relax(location, "unevaluatedItems", "what it leaves out depends on which items `contains` matches")
        return [], (), True
    prefixes = [read_items(other.location, draft) for other in below]
    if any(rest for _, rest in prefixes) or any(
        other is not part and other.location.get("unevaluatedItems") is not None for other in below
    ):
        return [], (), True
    longest = max((prefix for prefix, _ in prefixes), key=len, default=[])
    return longest, (location.child("unevaluatedItems"),), True


def find_evaluated(part: Part, parts: Sequence[Part], choices: Choices) -> list[Part]:
    """The parts that a location's `unevaluated...` looks at: itself and what its own in-place keywords lead to."""
    key = part.location.key
    candidates = list(parts)
    if key in choices.open_choices:
        candidates = [other for alternative in choices.alternatives for other in alternative]
    found = {part.location.key: part}
    for other in candidates:
        is_seen = not any(ancestor.startswith("!") for ancestor in (other.location.key, *other.ancestors))
        if key in other.ancestors and is_seen and not other.location.is_made:
            found[other.location.key] = other
    return list(found.values())
