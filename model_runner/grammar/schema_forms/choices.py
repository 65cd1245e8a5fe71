"""Expands in-place keywords into alternatives: lists of locations whose plain keywords must all hold.

Part of `moebeam.model_runner.grammar.schema_forms`. `allOf` and `$ref` join; `anyOf`, `oneOf`, `if` and `dependent...`
split; `not` is negated (see `negation`). Every valid value satisfies at least one alternative; where an alternative
admits more, `Choices.relaxed` says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, cast

from moebeam.model_runner.grammar.schema_forms.negation import negate
from moebeam.model_runner.grammar.schema_forms.relaxation import Relaxation
from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.references import References, SchemaLocation, make_schema, read_draft

Locations: TypeAlias = tuple[SchemaLocation, ...]
_Negations: TypeAlias = dict[tuple[str, ...], tuple[list[Locations], bool]]

MAX_ALTERNATIVES = 256
"""Most alternatives of one location; beyond, a keyword that splits is left to validation."""

_NUM_SINGLE_ROUNDS = 8
"""So many keywords are left out one after the other; then twice as many each time, so that a schema of a thousand
conditions takes no thousand rounds."""

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
    """A location whose plain keywords hold, and the keys of the locations that it was reached through."""

    location: SchemaLocation
    ancestors: frozenset[str]


@dataclass(slots=True)
class Choices:
    """The alternatives of a list of locations.

    Attributes:
        alternatives: each a list of parts; none at all where no value is allowed, an empty one where every value is.
        relaxed: keywords for which the alternatives hold more than the locations.
        open_choices: keys of the locations below which more than one alternative may be taken at once.
        unknown: keys of the locations below which something was left out.
        negated: opposites that were worked out on the way; rounds and branches ask for the same ones.
    """

    alternatives: list[list[Part]]
    relaxed: list[Relaxation] = field(default_factory=list[Relaxation])
    open_choices: set[str] = field(default_factory=set[str])
    unknown: set[str] = field(default_factory=set[str])
    negated: _Negations = field(default_factory=_Negations, repr=False)


@dataclass(slots=True)
class _Split:
    owner: SchemaLocation
    keyword: str
    options: list[Locations]
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
    """Splits locations of one document into alternatives."""

    def __init__(
        self,
        references: References,
        *,
        is_empty: Callable[[Locations], bool],
        list_values: Callable[[Locations], list[Json] | None],
    ) -> None:
        """Takes what it must know of other locations.

        Args:
            is_empty: whether no value satisfies all of some locations; False where that is not known.
            list_values: all values that satisfy all of some locations; None where they cannot be listed.
        """
        self.references = references
        self._is_empty = is_empty
        self._list_values = list_values

    def find_choices(self, locations: Locations) -> Choices:
        """Splits locations; parts come in the order of the document's keywords."""
        ignored: set[tuple[str, str]] = set()
        negated: _Negations = {}
        num_rounds = 0
        while True:
            found = Choices([], negated=negated)
            for pointer, keyword in sorted(ignored):
                found.relaxed.append(Relaxation(pointer, keyword, "it splits into too many alternatives"))
            conjunction = _Conjunction()
            for location in locations:
                self._visit(location, frozenset(), conjunction, found)
            splits: dict[tuple[str, str], int] = {}
            try:
                self._branch(conjunction, found, ignored, splits)
            except _TooMany:
                # The widest split goes first; of equal ones the innermost.
                widest = sorted(splits, key=lambda at: (splits[at], at[0].count("/"), at), reverse=True)
                ignored.update(widest[: 2 ** max(0, num_rounds - _NUM_SINGLE_ROUNDS)])
                num_rounds += 1
                continue
            found.relaxed = list(dict.fromkeys(found.relaxed))
            return found

    def is_active(self, location: SchemaLocation, keyword: str) -> bool:
        """Whether a location has a keyword that its draft defines."""
        schema = location.schema
        return (
            isinstance(schema, Mapping)
            and keyword in schema
            and self.references.draft >= _SINCE.get(keyword, PLAIN_SINCE.get(keyword, 4))
        )

    def _visit(
        self, location: SchemaLocation, ancestors: frozenset[str], conjunction: _Conjunction, found: Choices
    ) -> None:
        if conjunction.is_false or location.key in conjunction.keys:
            return
        conjunction.keys.add(location.key)
        schema = location.schema
        if schema is False:
            conjunction.is_false = True
        if not isinstance(schema, Mapping):
            return
        if location.pointer and not location.is_made and read_draft(schema) not in (None, self.references.draft):
            found.relaxed.append(Relaxation(location.pointer, "$schema", "a part of another draft"))
            found.unknown |= ancestors
            return
        if self.references.draft <= 7 and "$ref" in schema:
            self._follow(location, "$ref", ancestors, conjunction, found)
            return
        below = ancestors | {location.key}
        if location.is_plain:
            conjunction.parts.append(Part(location, ancestors))
            return
        is_plain = False
        for keyword in schema:
            if keyword in _REFERENCES:
                if _REFERENCES[keyword](self.references.draft):
                    self._follow(location, keyword, below, conjunction, found)
            elif keyword == "allOf":
                for child in _list_children(location, keyword):
                    self._visit(child, below, conjunction, found)
            elif keyword == "anyOf":
                options: list[Locations] = [(child,) for child in _list_children(location, keyword)]
                conjunction.splits.append(_Split(location, keyword, options, below))
            elif keyword in _PENDING:
                if self.is_active(location, keyword):
                    conjunction.pending.append((location, keyword, below))
            elif not is_plain and keyword in PLAIN_SINCE and self.is_active(location, keyword):
                is_plain = True
                conjunction.parts.append(Part(location, ancestors))

    def _follow(
        self,
        location: SchemaLocation,
        keyword: str,
        ancestors: frozenset[str],
        conjunction: _Conjunction,
        found: Choices,
    ) -> None:
        target = self.references.resolve(location, keyword)
        if target is None:
            found.relaxed.append(
                Relaxation(location.pointer, keyword, "what it names is outside the document or not known beforehand")
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
            location, keyword, ancestors = conjunction.pending.pop(0)
            if (location.pointer, keyword) not in ignored:
                for options in self._find_splits(location, keyword, conjunction.parts, found):
                    conjunction.splits.append(_Split(location, keyword, options, ancestors))
        if conjunction.is_false:
            return
        if len(conjunction.splits) > MAX_ALTERNATIVES:
            wide = [split for split in conjunction.splits if len(split.options) > 1]
            splits.update({(split.owner.pointer, split.keyword): len(split.options) for split in wide})
            if len(wide) > MAX_ALTERNATIVES:
                raise _TooMany
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
            for location in option:
                self._visit(location, split.ancestors, branch, found)
            self._branch(branch, found, ignored, splits)

    def _find_splits(
        self, location: SchemaLocation, keyword: str, context: Sequence[Part], found: Choices
    ) -> list[list[Locations]]:
        """The splits that a keyword asks for; each a list of options of which a value takes at least one."""
        pointer = location.pointer
        known = tuple(part.location if part.location.is_plain else part.location.plain() for part in context)
        match keyword:
            case "not":
                options, is_exact = self._negate(location.child("not"), known, pointer, found)
                if not is_exact:
                    found.relaxed.append(Relaxation(pointer, keyword, "its opposite cannot be written as a grammar"))
                return [options]
            case "oneOf":
                return [self._split_one_of(location, known, found)]
            case "if":
                return self._split_if(location, known, found)
            case "dependentRequired":
                return [_require_beside(name, names, pointer) for name, names in _list_items(location, keyword)]
            case "dependentSchemas":
                return [
                    _split_on_presence(name, (location.child(keyword, name),), pointer)
                    for name, _ in _list_items(location, keyword)
                ]
            case _:
                return [
                    _require_beside(name, value, pointer)
                    if isinstance(value, Sequence) and not isinstance(value, str)
                    else _split_on_presence(name, (location.child(keyword, name),), pointer)
                    for name, value in _list_items(location, keyword)
                ]

    def _split_one_of(self, location: SchemaLocation, known: Locations, found: Choices) -> list[Locations]:
        branches = _list_children(location, "oneOf")
        options: list[Locations] = []
        is_exact = True
        for index, branch in enumerate(branches):
            chosen: list[Locations] = [(branch,)]
            for other_index, other in enumerate(branches):
                if other_index == index or self._is_empty((*known, branch, other)):
                    continue
                others, is_exact_negation = self._negate(other, (*known, branch), location.pointer, found)
                is_exact = is_exact and is_exact_negation
                chosen = [(*left, *right) for left in chosen for right in others]
                if len(chosen) > MAX_ALTERNATIVES:
                    chosen, is_exact = [(branch,)], False
            options += chosen
        if not is_exact:
            found.relaxed.append(Relaxation(location.pointer, "oneOf", "more than one of its schemas may match"))
        return options

    def _split_if(self, location: SchemaLocation, known: Locations, found: Choices) -> list[list[Locations]]:
        condition = location.child("if")
        then, otherwise = (
            (location.child(keyword),) if location.get(keyword) is not None else () for keyword in ("then", "else")
        )
        if not then and not otherwise and not self.references.has_unevaluated:
            return []
        if self._is_empty((*known, condition)):
            return [[otherwise]]
        negated, is_exact = self._negate(condition, known, location.pointer, found)
        if not is_exact:
            found.relaxed.append(Relaxation(location.pointer, "if", "the opposite of its condition cannot be written"))
        return [[(condition, *then), *((*option, *otherwise) for option in negated)]]

    def _negate(
        self, location: SchemaLocation, known: Locations, pointer: str, found: Choices
    ) -> tuple[list[Locations], bool]:
        """The opposite of a location beside others, and whether it is exact."""
        key = (location.key, pointer, *(part.key for part in known))
        if key not in found.negated:
            found.negated[key] = self._work_out_negation(location, known, pointer)
        return found.negated[key]

    def _work_out_negation(
        self, location: SchemaLocation, known: Locations, pointer: str
    ) -> tuple[list[Locations], bool]:
        options, is_exact = negate(
            location,
            known,
            pointer,
            references=self.references,
            list_values=self._list_values,
            children=find_property_locations,
        )
        # `unevaluated...` ignores schemas that must not match.
        return [
            tuple(part.unseen() if isinstance(part, SchemaLocation) else make_schema(part, pointer) for part in option)
            for option in options
        ], is_exact


def find_property_locations(locations: Locations, name: str) -> Locations:
    """What `properties` say of one property, without patterns."""
    found: list[SchemaLocation] = []
    for location in locations:
        properties = location.get("properties")
        if isinstance(properties, Mapping) and name in properties:
            found.append(location.child("properties", name))
    return tuple(found)


def _list_children(location: SchemaLocation, keyword: str) -> list[SchemaLocation]:
    found = location.get(keyword)
    if not isinstance(found, Sequence) or isinstance(found, str):
        return []
    return [location.child(keyword, index) for index in range(len(found))]


def _list_items(location: SchemaLocation, keyword: str) -> list[tuple[str, Json]]:
    found = location.get(keyword)
    return list(found.items()) if isinstance(found, Mapping) else []


def _split_on_presence(name: str, otherwise: Locations, pointer: str) -> list[Locations]:
    absent: Json = {"properties": {name: False}}
    present: Json = {"required": [name]}
    return [(make_schema(absent, pointer),), (make_schema(present, pointer), *otherwise)]


def _require_beside(name: str, names: Json, pointer: str) -> list[Locations]:
    required = list(cast("Sequence[Json]", names))
    return _split_on_presence(name, (make_schema({"required": required}, pointer),), pointer)
