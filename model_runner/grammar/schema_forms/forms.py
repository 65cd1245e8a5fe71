"""The forms of the values that keep some places, made when they are asked for and kept.

Part of `moebeam.model_runner.grammar.schema_forms`: brings `choices`, `values` and `objects` together for `document`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import quote

from jsonschema_rs import Registry, ValidationError, Validator, validator_for

from moebeam.model_runner.grammar.schema_forms.choices import Choices, Chooser, Part, Places
from moebeam.model_runner.grammar.schema_forms.numeric import number_forms
from moebeam.model_runner.grammar.schema_forms.objects import object_forms
from moebeam.model_runner.grammar.schema_forms.references import References, SchemaLocation, json_key, unescaped
from moebeam.model_runner.grammar.schema_forms.relaxation import Relaxation
from moebeam.model_runner.grammar.schema_forms.values import (
    DRAFT_URIS,
    Anything,
    Array,
    Form,
    Notes,
    Object,
    Simple,
    String,
    Values,
    array_forms,
    string_forms,
    types_of,
    without,
)
from moebeam.schemas.canonical import Json

MAX_STATES = 4_000
"""Most lists of places that a schema may lead to; each becomes a part of the grammar."""

_ROOT_URI = "http://schema.invalid/"
_PROOF_DEPTH = 4


@dataclass(slots=True)
class State:
    """The forms of some places, and what they leave to validation."""

    forms: list[Form]
    relaxed: list[Relaxation] = field(default_factory=list[Relaxation])
    enforced: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


class Forms:
    """All forms of one document."""

    def __init__(self, document: Json, *, are_formats_asserted: bool, left_out: Iterable[tuple[str, str]] = ()) -> None:
        """Read a schema.

        Args:
            left_out: pointer and keyword of what is left to validation.
            document: an object or a boolean; not to be changed.
            are_formats_asserted: whether validation asserts `format`.
        """
        self.references = References(document)
        self._are_formats_asserted = are_formats_asserted
        self._left_out: dict[str, set[str]] = {}
        for pointer, keyword in left_out:
            self._left_out.setdefault(pointer, set()).add(keyword)
        self._chooser = Chooser(self.references, is_empty=self.is_empty, values_of=self.values_of)
        self._states: dict[tuple[str, ...], State | None] = {}
        self._validators: dict[str, Validator | None] = {}
        self._registry: Registry | None = None

    def state(self, places: Places) -> State:
        """The forms of places; of places that ask for their own forms, anything."""
        return self._state(places) or State([Anything()])

    def forms_of(self, places: Places) -> Sequence[Form] | None:
        state = self._state(places)
        return None if state is None else state.forms

    def values_of(self, places: Places) -> list[Json] | None:
        """The only values that keep all of some places, where they can be listed."""
        forms = self.forms_of(places)
        if forms is None or not all(isinstance(form, Values) for form in forms):
            return None
        return [value for form in forms for value in cast("Values", form).values]

    def is_empty(self, places: Places, depth: int = 0) -> bool:
        """Whether it is certain that no value keeps all of some places."""
        forms = self.forms_of(places)
        return forms is not None and all(self._is_empty_form(form, depth) for form in forms)

    def is_valid(self, value: Json, places: Places) -> bool:
        """Whether a value keeps all of some places, as validation sees it."""
        for place in places:
            validator = self._validator(place)
            if validator is not None and not validator.is_valid(value):
                return False
        return True

    def _is_empty_form(self, form: Form, depth: int) -> bool:
        if depth >= _PROOF_DEPTH:
            return False
        match form:
            case Values(values=values):
                return not values
            case Array(prefix=prefix, items=items, min_items=min_items):
                needed = [*prefix[:min_items], *([items] if min_items > len(prefix) else [])]
                return any(self.is_empty(child, depth + 1) for child in needed)
            case Object(properties=properties, required=required):
                return any(name in required and self.is_empty(child, depth + 1) for name, child in properties)
            case _:
                return False

    def _state(self, places: Places) -> State | None:
        key = tuple(sorted({place.key for place in places}))
        if key in self._states:
            return self._states[key]
        self._states[key] = None
        if len(self._states) > MAX_STATES:
            state = State([Anything()], [Relaxation(places[0].pointer, "allOf", "too many schemas are joined")])
        else:
            state = self._made(places)
        self._states[key] = state
        return state

    def _made(self, places: Places) -> State:
        choices = self._chooser.choices(places)
        notes = Notes(list(choices.relaxed))
        forms: list[Form] = []
        values: dict[str, Json] = {}
        for parts in choices.alternatives:
            listed = _listed(parts)
            if listed is not None:
                values |= {json_key(value): value for value in listed if self.is_valid(value, places)}
                for place in places:
                    if self._validator(place) is None:
                        notes.relax(place, "enum", "validation of a part of the document is not known beforehand")
            else:
                forms += self._typed(parts, choices, notes)
        if values and not forms and all(self._validator(place) is not None for place in places):
            # Validation itself chose among the values, so that nothing is left to it.
            notes = Notes(enforced=notes.enforced)
        if values:
            forms.insert(0, Values(tuple(values.values())))
        if (
            any(isinstance(form, Anything) for form in forms)
            or {form for form in forms if not isinstance(form, Values)} >= _ANYTHING
        ):
            forms = [Anything()]
        return State(list(dict.fromkeys(forms)) if _are_hashable(forms) else forms, notes.relaxed, notes.enforced)

    def _typed(self, parts: list[Part], choices: Choices, notes: Notes) -> list[Form]:
        if not parts:
            return [Anything()]
        draft = self.references.draft
        if self._left_out:
            parts = [
                part if part.place.is_made else without(part, frozenset(self._left_out.get(part.place.pointer, ())))
                for part in parts
            ]
        types = types_of(parts)
        for part in parts:
            if part.place.get("type") is not None:
                notes.enforce(part.place, "type")
        forms: list[Form] = []
        if "null" in types:
            forms.append(Simple("null"))
        if "boolean" in types:
            forms.append(Simple("boolean"))
        if types & {"integer", "fraction"}:
            forms += number_forms(parts, types, notes)
        if "string" in types:
            forms += string_forms(parts, notes, draft=draft, are_formats_asserted=self._are_formats_asserted)
        if "array" in types:
            forms += array_forms(parts, choices, notes, draft=draft)
        if "object" in types:
            forms += object_forms(
                parts,
                choices,
                notes,
                draft=draft,
                forms_of=self.forms_of,
                matches=self.matches,
                is_valid=self.is_valid,
            )
        return forms

    def matches(self, pattern: str, name: str) -> bool:
        """Whether a name matches a regular expression, as validation sees it."""
        key = f"~{pattern}"
        if key not in self._validators:
            try:
                self._validators[key] = validator_for({"pattern": pattern})
            except (ValidationError, ValueError):
                self._validators[key] = None
        validator = self._validators[key]
        return validator is not None and validator.is_valid(name)

    def _validator(self, place: SchemaLocation) -> Validator | None:
        """None where the document refers outside itself: then nothing is known to be invalid."""
        if place.key not in self._validators:
            try:
                self._validators[place.key] = self._compiled(place)
            except (ValidationError, ValueError):
                self._validators[place.key] = None
        return self._validators[place.key]

    def _compiled(self, place: SchemaLocation) -> Validator:
        draft = DRAFT_URIS[self.references.draft]
        formats = self._are_formats_asserted
        if place.is_plain and not isinstance(place.schema, bool):
            return self._compiled_plain(place, draft)
        if place.is_made or isinstance(place.schema, bool):
            return validator_for(
                {"$schema": draft, "allOf": [cast("dict[str, Any]", place.schema)]}, validate_formats=formats
            )
        if self._registry is None:
            root = self.references.document
            schema = {**root, "$schema": draft} if isinstance(root, Mapping) else root
            uris = dict.fromkeys([_ROOT_URI, self.references.root.base])
            self._registry = Registry([(uri, cast("dict[str, Any]", schema)) for uri in uris])
        reference = _ROOT_URI + "#" + quote(place.pointer)
        return validator_for({"$schema": draft, "$ref": reference}, validate_formats=formats, registry=self._registry)

    def _compiled_plain(self, place: SchemaLocation, draft: str) -> Validator:
        """A place without its in-place keywords, where it stands: its parts may refer to the rest of the document."""
        schema = cast("Mapping[str, Json]", place.schema)
        kept = {keyword: value for keyword, value in schema.items() if keyword not in _IN_PLACE}
        formats = self._are_formats_asserted
        if place.key.startswith("+="):
            return validator_for({**kept, "$schema": draft}, validate_formats=formats)
        steps = [unescaped(step) for step in place.pointer.split("/")[1:]]
        root: Any = _replaced(self.references.document, steps, kept)
        registry = Registry([(_ROOT_URI, {**root, "$schema": draft})])
        reference = f"{_ROOT_URI}#{quote(place.pointer)}"
        return validator_for({"$schema": draft, "$ref": reference}, validate_formats=formats, registry=registry)


_IN_PLACE = frozenset(
    {"$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else"}
    | {"dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"}
)


def _replaced(document: Any, steps: Sequence[str], value: Json) -> Any:
    """A document with another value at one place; all else is shared."""
    if not steps:
        return value
    if isinstance(document, list):
        items = list(cast("list[Any]", document))
        items[int(steps[0])] = _replaced(items[int(steps[0])], steps[1:], value)
        return items
    return {**document, steps[0]: _replaced(document[steps[0]], steps[1:], value)}


_ANYTHING: set[Form] = {
    Simple("null"),
    Simple("boolean"),
    *number_forms((), {"integer", "fraction"}, Notes()),
    String(),
    Array(),
    Object(),
}


def _listed(parts: Sequence[Part]) -> list[Json] | None:
    """The values of the shortest `enum` or `const` among the parts."""
    found: list[list[Json]] = []
    for part in parts:
        schema = part.place.schema
        if isinstance(schema, Mapping):
            if "const" in schema:
                found.append([schema["const"]])
            enum = schema.get("enum")
            if isinstance(enum, Sequence) and not isinstance(enum, str):
                found.append(list(enum))
    return min(found, key=len, default=None)


def _are_hashable(forms: Sequence[Form]) -> bool:
    return not any(isinstance(form, Values) for form in forms)
