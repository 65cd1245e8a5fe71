"""In-place keywords become alternatives: lists of places whose plain keywords a value must all keep.

Part of `moebeam.model_runner.grammar.schema_forms`. `allOf` and `$ref` join, `anyOf`, `oneOf`, `if` and `dependent...`
split, `not` turns about (see `negation`). Every value of the schemas given keeps at least one alternative; where an
alternative holds more, that is said.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, cast

from moebeam.model_runner.grammar.schema_forms.negation import negations
from moebeam.model_runner.grammar.schema_forms.references import References, SchemaLocation, draft_of, made
from moebeam.model_runner.grammar.schema_forms.relaxation import Relaxation
from moebeam.schemas.canonical import Json

Places: TypeAlias = tuple[SchemaLocation, ...]

MAX_ALTERNATIVES = 256
"""Most alternatives of one place; beyond, a keyword that splits is left to validation."""

_REFERENCES: dict[str, Callable[[int], bool]] = {
    "$ref": lambda draft: True,
    "$recursiveRef": lambda draft: draft == 2019,
    "$dynamicRef": lambda draft: draft >= 2020,
}
_PENDING = ("not", "oneOf", "if", "dependencies", "dependentRequired", "dependentSchemas")
_SINCE = {"if": 7, "dependentRequired": 2019, "dependentSchemas": 2019}

PLAIN_SINCE = {
    **dict.fromkeys(("type", "enum", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), 4),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), 4),
    **dict.fromkeys(("items", "minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties"), 4),
    **dict.fromkeys(("required", "properties", "patternProperties", "additionalProperties"), 4),
    **dict.fromkeys(("const", "contains", "propertyNames"), 6),
    **dict.fromkeys(("minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties"), 2019),
    "prefixItems": 2020,
}
"""Keywords that say something of the value itself, and the draft that has them first."""


@dataclass(frozen=True, slots=True)
class Part:
    """A place whose plain keywords hold, and the keys of the places that it was reached through."""

    place: SchemaLocation
    ancestors: frozenset[str]


@dataclass(slots=True)
class Choices:
    """The alternatives of a list of places.

    Attributes:
        alternatives: each a list of parts; none at all where no value is allowed, an empty one where every value is.
        relaxed: keywords for which the alternatives hold more than the places.
        open_choices: keys of the places below which more than one alternative may be taken at once.
        unknown: keys of the places below which something was left out.
    """

    alternatives: list[list[Part]]
    relaxed: list[Relaxation] = field(default_factory=list[Relaxation])
    open_choices: set[str] = field(default_factory=set[str])
    unknown: set[str] = field(default_factory=set[str])


@dataclass(slots=True)
class _Split:
    owner: SchemaLocation
    keyword: str
    options: list[Places]
    ancestors: frozenset[str]


@dataclass(slots=True)
class _Conjunction:
    parts: list[Part] = field(default_factory=list[Part])
    keys: set[str] = field(default_factory=set[str])
    splits: list[_Split] = field(default_factory=list[_Split])
    pending: list[tuple[SchemaLocation, str, frozenset[str]]] = field(
        default_factory=list[tuple[SchemaLocation, str, frozenset[str]]]
    )
    is_false: bool = False

    def copy(self) -> "_Conjunction":
        return _Conjunction(list(self.parts), set(self.keys), list(self.splits), list(self.pending), self.is_false)


class _TooMany(Exception):
    """A split led to more than `MAX_ALTERNATIVES`."""


class Chooser:
    """Splits places of one document into alternatives."""

    def __init__(
        self,
        references: References,
        *,
        is_empty: Callable[[Places], bool],
        values_of: Callable[[Places], list[Json] | None],
    ) -> None:
        """Prepare to split.

        Args:
            is_empty: whether no value at all keeps all of some places; False where that is not known.
            values_of: the only values that keep all of some places, where they are few enough to list.
        """
        self.references = references
        self._is_empty = is_empty
        self._values_of = values_of

    def choices(self, places: Places) -> Choices:
        """See `Choices`; the order of keywords in the document is that of the parts."""
        ignored: set[tuple[str, str]] = set()
        while True:
            found = Choices([])
            for pointer, keyword in sorted(ignored):
                found.relaxed.append(Relaxation(pointer, keyword, "it splits into too many alternatives"))
            conjunction = _Conjunction()
            for place in places:
                self._visit(place, frozenset(), conjunction, found)
            splits: dict[tuple[str, str], int] = {}
            try:
                self._branch(conjunction, found, ignored, splits)
            except _TooMany:
                # The widest split goes first; of equal ones the innermost.
                ignored.add(max(splits, key=lambda at: (splits[at], at[0].count("/"), at)))
                continue
            found.relaxed = list(dict.fromkeys(found.relaxed))
            return found

    def active(self, place: SchemaLocation, keyword: str) -> bool:
        """Whether a place has a keyword and its draft knows it."""
        schema = place.schema
        return (
            isinstance(schema, Mapping)
            and keyword in schema
            and self.references.draft >= _SINCE.get(keyword, PLAIN_SINCE.get(keyword, 4))
        )

    def _visit(
        self, place: SchemaLocation, ancestors: frozenset[str], conjunction: _Conjunction, found: Choices
    ) -> None:
        if conjunction.is_false or place.key in conjunction.keys:
            return
        conjunction.keys.add(place.key)
        schema = place.schema
        if schema is False:
            conjunction.is_false = True
        if not isinstance(schema, Mapping):
            return
        if place.pointer and not place.is_made and draft_of(schema) not in (None, self.references.draft):
            found.relaxed.append(Relaxation(place.pointer, "$schema", "a part of another draft"))
            found.unknown |= ancestors
            return
        if self.references.draft <= 7 and "$ref" in schema:
            self._follow(place, "$ref", ancestors, conjunction, found)
            return
        below = ancestors | {place.key}
        if place.is_plain:
            conjunction.parts.append(Part(place, ancestors))
            return
        is_plain = False
        for keyword in schema:
            if keyword in _REFERENCES:
                if _REFERENCES[keyword](self.references.draft):
                    self._follow(place, keyword, below, conjunction, found)
            elif keyword == "allOf":
                for child in _children(place, keyword):
                    self._visit(child, below, conjunction, found)
            elif keyword == "anyOf":
                options: list[Places] = [(child,) for child in _children(place, keyword)]
                conjunction.splits.append(_Split(place, keyword, options, below))
            elif keyword in _PENDING:
                if self.active(place, keyword):
                    conjunction.pending.append((place, keyword, below))
            elif not is_plain and keyword in PLAIN_SINCE and self.active(place, keyword):
                is_plain = True
                conjunction.parts.append(Part(place, ancestors))

    def _follow(
        self, place: SchemaLocation, keyword: str, ancestors: frozenset[str], conjunction: _Conjunction, found: Choices
    ) -> None:
        target = self.references.resolve(place, keyword)
        if target is None:
            found.relaxed.append(
                Relaxation(place.pointer, keyword, "what it names is outside the document or not known beforehand")
            )
            found.unknown |= ancestors
        else:
            self._visit(target, ancestors, conjunction, found)

    def _branch(
        self,
        conjunction: _Conjunction,
        found: Choices,
        ignored: set[tuple[str, str]],
        splits: dict[tuple[str, str], int],
    ) -> None:
        while conjunction.pending and not conjunction.is_false:
            place, keyword, ancestors = conjunction.pending.pop(0)
            if (place.pointer, keyword) not in ignored:
                for options in self._options(place, keyword, conjunction.parts, found):
                    conjunction.splits.append(_Split(place, keyword, options, ancestors))
        if conjunction.is_false:
            return
        if not conjunction.splits:
            found.alternatives.append(conjunction.parts)
            if len(found.alternatives) > MAX_ALTERNATIVES:
                raise _TooMany
            return
        split = conjunction.splits.pop(0)
        at = (split.owner.pointer, split.keyword)
        if at in ignored:
            found.unknown |= split.ancestors
            self._branch(conjunction, found, ignored, splits)
            return
        if len(split.options) > 1:
            splits[at] = max(len(split.options), splits.get(at, 0))
            if split.keyword == "anyOf":
                found.open_choices |= split.ancestors
        for option in split.options:
            branch = conjunction.copy()
            for place in option:
                self._visit(place, split.ancestors, branch, found)
            self._branch(branch, found, ignored, splits)

    def _options(
        self, place: SchemaLocation, keyword: str, context: Sequence[Part], found: Choices
    ) -> list[list[Places]]:
        """The splits that a keyword asks for; each a list of options of which a value takes at least one."""
        pointer = place.pointer
        known = tuple(part.place if part.place.is_plain else part.place.plain() for part in context)
        match keyword:
            case "not":
                options, is_exact = self._negations(place.child("not"), known, pointer)
                if not is_exact:
                    found.relaxed.append(Relaxation(pointer, keyword, "its opposite cannot be written as a grammar"))
                return [options]
            case "oneOf":
                return [self._one_of(place, known, found)]
            case "if":
                return self._if(place, known, found)
            case "dependentRequired":
                return [_dependent(name, names, pointer) for name, names in _items(place, keyword)]
            case "dependentSchemas":
                return [_absent_or(name, (place.child(keyword, name),), pointer) for name, _ in _items(place, keyword)]
            case _:
                return [
                    _dependent(name, value, pointer)
                    if isinstance(value, Sequence) and not isinstance(value, str)
                    else _absent_or(name, (place.child(keyword, name),), pointer)
                    for name, value in _items(place, keyword)
                ]

    def _one_of(self, place: SchemaLocation, known: Places, found: Choices) -> list[Places]:
        branches = _children(place, "oneOf")
        options: list[Places] = []
        is_exact = True
        for index, branch in enumerate(branches):
            chosen: list[Places] = [(branch,)]
            for other_index, other in enumerate(branches):
                if other_index == index or self._is_empty((*known, branch, other)):
                    continue
                others, is_exact_negation = self._negations(other, (*known, branch), place.pointer)
                is_exact = is_exact and is_exact_negation
                chosen = [(*left, *right) for left in chosen for right in others]
                if len(chosen) > MAX_ALTERNATIVES:
                    chosen, is_exact = [(branch,)], False
            options += chosen
        if not is_exact:
            found.relaxed.append(Relaxation(place.pointer, "oneOf", "more than one of its schemas may match"))
        return options

    def _if(self, place: SchemaLocation, known: Places, found: Choices) -> list[list[Places]]:
        condition = place.child("if")
        then, otherwise = (
            (place.child(keyword),) if place.get(keyword) is not None else () for keyword in ("then", "else")
        )
        if not then and not otherwise and not self.references.has_unevaluated:
            return []
        if self._is_empty((*known, condition)):
            return [[otherwise]]
        negated, is_exact = self._negations(condition, known, place.pointer)
        if not is_exact:
            found.relaxed.append(Relaxation(place.pointer, "if", "the opposite of its condition cannot be written"))
        return [[(condition, *then), *((*option, *otherwise) for option in negated)]]

    def _negations(self, place: SchemaLocation, known: Places, pointer: str) -> tuple[list[Places], bool]:
        options, is_exact = negations(
            place, known, pointer, references=self.references, values_of=self._values_of, children=property_places
        )
        # What a schema says that must not match is looked at by none.
        return [
            tuple(part.unseen() if isinstance(part, SchemaLocation) else made(part, pointer) for part in option)
            for option in options
        ], is_exact


def property_places(places: Places, name: str) -> Places:
    """What `properties` say of one property, without patterns."""
    found: list[SchemaLocation] = []
    for place in places:
        properties = place.get("properties")
        if isinstance(properties, Mapping) and name in properties:
            found.append(place.child("properties", name))
    return tuple(found)


def _children(place: SchemaLocation, keyword: str) -> list[SchemaLocation]:
    found = place.get(keyword)
    if not isinstance(found, Sequence) or isinstance(found, str):
        return []
    return [place.child(keyword, index) for index in range(len(found))]


def _items(place: SchemaLocation, keyword: str) -> list[tuple[str, Json]]:
    found = place.get(keyword)
    return list(found.items()) if isinstance(found, Mapping) else []


def _absent_or(name: str, otherwise: Places, pointer: str) -> list[Places]:
    absent: Json = {"properties": {name: False}}
    present: Json = {"required": [name]}
    return [(made(absent, pointer),), (made(present, pointer), *otherwise)]


def _dependent(name: str, names: Json, pointer: str) -> list[Places]:
    required = list(cast("Sequence[Json]", names))
    return _absent_or(name, (made({"required": required}, pointer),), pointer)
