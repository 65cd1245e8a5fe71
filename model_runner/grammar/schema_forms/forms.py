"""Builds the forms of the values that satisfy a list of locations, lazily, and caches them.

Part of `moebeam.model_runner.grammar.schema_forms`: brings `choices`, `values` and `objects` together for `document`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import quote

from jsonschema_rs import Registry, ValidationError, Validator, validator_for

from moebeam.model_runner.grammar.schema_forms.choices import Choices, Chooser, Locations, Part
from moebeam.model_runner.grammar.schema_forms.numeric import build_number_forms
from moebeam.model_runner.grammar.schema_forms.objects import build_object_forms
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
    build_array_forms,
    build_string_forms,
    drop_keywords,
    find_types,
)
from moebeam.schemas.canonical import Json, json_key
from moebeam.schemas.contract.references import References, SchemaLocation, unescape_step

MAX_STATES = 4_000
"""Most lists of locations that a schema may lead to; each becomes a part of the grammar."""

MAX_PARTS = 10_000
"""Most parts (see `choices`) that forms are built from, some 0.2 ms each; what comes after may be anything."""

_ROOT_URI = "http://schema.invalid/"
_PROOF_DEPTH = 4


@dataclass(slots=True)
class State:
    """The forms of some locations, and what they leave to validation."""

    forms: list[Form]
    relaxed: list[Relaxation] = field(default_factory=list[Relaxation])
    enforced: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    narrowed: list[Relaxation] = field(default_factory=list[Relaxation])


class Forms:
    """All forms of one document.

    Attributes:
        num_parts: from how many parts forms were built.
    """

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
        self._chooser = Chooser(self.references, is_empty=self.is_empty, list_values=self.list_values)
        self._states: dict[tuple[str, ...], State | None] = {}
        self._validators: dict[str, Validator | None] = {}
        self._registry: Registry | None = None
        self.num_parts = 0

    def find_state(self, locations: Locations) -> State:
        """The forms of locations; anything where building them asks for them again."""
        return self._find_state(locations) or State([Anything()])

    def find_forms(self, locations: Locations) -> Sequence[Form] | None:
        state = self._find_state(locations)
        return None if state is None else state.forms

    def list_values(self, locations: Locations) -> list[Json] | None:
        """All values that satisfy some locations, where they can be listed."""
        forms = self.find_forms(locations)
        if forms is None or not all(isinstance(form, Values) for form in forms):
            return None
        return [value for form in forms for value in cast("Values", form).values]

    def is_empty(self, locations: Locations, depth: int = 0) -> bool:
        """Whether certainly no value satisfies all of some locations."""
        forms = self.find_forms(locations)
        return forms is not None and all(self._is_empty_form(form, depth) for form in forms)

    def is_valid(self, value: Json, locations: Locations) -> bool:
        """Whether validation accepts a value for all of some locations."""
        for location in locations:
            validator = self._validator(location)
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

    def _find_state(self, locations: Locations) -> State | None:
        key = tuple(sorted({location.key for location in locations}))
        if key in self._states:
            return self._states[key]
        self._states[key] = None
        if len(self._states) > MAX_STATES or self.num_parts > MAX_PARTS:
            pointer = locations[0].pointer if locations else ""
            state = State([Anything()], [Relaxation(pointer, "allOf", "too many schemas are joined")])
        else:
            state = self._build_state(locations)
        self._states[key] = state
        return state

    def _build_state(self, locations: Locations) -> State:
        choices = self._chooser.find_choices(locations)
        notes = Notes(list(choices.relaxed))
        forms: list[Form] = []
        values: dict[str, Json] = {}
        for parts in choices.alternatives:
            listed = _find_listed_values(parts)
            if listed is not None:
                values |= {json_key(value): value for value in listed if self.is_valid(value, locations)}
                for location in locations:
                    if self._validator(location) is None:
                        notes.relax(location, "enum", "validation of a part of the document is not known beforehand")
            else:
                forms += self._build_forms(parts, choices, notes)
        if values and not forms and all(self._validator(location) is not None for location in locations):
            # Validation itself has selected the values, so nothing is left to it.
            notes = Notes(enforced=notes.enforced)
        if values:
            forms.insert(0, Values(tuple(values.values())))
        if (
            any(isinstance(form, Anything) for form in forms)
            or {form for form in forms if not isinstance(form, Values)} >= _ANYTHING
        ):
            forms = [Anything()]
        forms = list(dict.fromkeys(forms)) if _are_hashable(forms) else forms
        return State(forms, notes.relaxed, notes.enforced, notes.narrowed)

    def _build_forms(self, parts: list[Part], choices: Choices, notes: Notes) -> list[Form]:
        if not parts:
            return [Anything()]
        draft = self.references.draft
        self.num_parts += len(parts)
        if self._left_out:
            parts = [
                part
                if part.location.is_made
                else drop_keywords(part, frozenset(self._left_out.get(part.location.pointer, ())))
                for part in parts
            ]
        types = find_types(parts)
        for part in parts:
            if part.location.get("type") is not None:
                notes.enforce(part.location, "type")
        forms: list[Form] = []
        if "null" in types:
            forms.append(Simple("null"))
        if "boolean" in types:
            forms.append(Simple("boolean"))
        if types & {"integer", "fraction"}:
            forms += build_number_forms(parts, types, notes)
        if "string" in types:
            forms += build_string_forms(parts, notes, draft=draft, are_formats_asserted=self._are_formats_asserted)
        if "array" in types:
            forms += build_array_forms(parts, choices, notes, draft=draft)
        if "object" in types:
            forms += build_object_forms(
                parts,
                choices,
                notes,
                draft=draft,
                find_forms=self.find_forms,
                matches=self.matches,
                is_valid=self.is_valid,
            )
        return forms

    def matches(self, pattern: str, name: str) -> bool:
        """Whether a name matches a regular expression, by validation's engine."""
        key = f"~{pattern}"
        if key not in self._validators:
            try:
                self._validators[key] = validator_for({"pattern": pattern})
            except (ValidationError, ValueError):
                self._validators[key] = None
        validator = self._validators[key]
        return validator is not None and validator.is_valid(name)

    def _validator(self, location: SchemaLocation) -> Validator | None:
        """The validator of a location; None where the document refers outside itself."""
        if location.key not in self._validators:
            try:
                self._validators[location.key] = self._compile(location)
            except (ValidationError, ValueError):
                self._validators[location.key] = None
        return self._validators[location.key]

    def _compile(self, location: SchemaLocation) -> Validator:
        draft = DRAFT_URIS[self.references.draft]
        formats = self._are_formats_asserted
        if location.is_plain and not isinstance(location.schema, bool):
            return self._compile_plain(location, draft)
        if location.is_made or isinstance(location.schema, bool):
            return validator_for(
                {"$schema": draft, "allOf": [cast("dict[str, Any]", location.schema)]}, validate_formats=formats
            )
        if self._registry is None:
            root = self.references.document
            schema = {**root, "$schema": draft} if isinstance(root, Mapping) else root
            uris = dict.fromkeys([_ROOT_URI, self.references.root.base])
            self._registry = Registry([(uri, cast("dict[str, Any]", schema)) for uri in uris])
        reference = _ROOT_URI + "#" + quote(location.pointer)
        return validator_for({"$schema": draft, "$ref": reference}, validate_formats=formats, registry=self._registry)

    def _compile_plain(self, location: SchemaLocation, draft: str) -> Validator:
        """Compiles a location without its in-place keywords; its parts may still refer to the rest of the document."""
        schema = cast("Mapping[str, Json]", location.schema)
        kept = {keyword: value for keyword, value in schema.items() if keyword not in _IN_PLACE}
        formats = self._are_formats_asserted
        if location.key.startswith("+="):
            return validator_for({**kept, "$schema": draft}, validate_formats=formats)
        steps = [unescape_step(step) for step in location.pointer.split("/")[1:]]
        root: Any = _replace_at(self.references.document, steps, kept)
        registry = Registry([(_ROOT_URI, {**root, "$schema": draft})])
        reference = f"{_ROOT_URI}#{quote(location.pointer)}"
        return validator_for({"$schema": draft, "$ref": reference}, validate_formats=formats, registry=registry)


_IN_PLACE = frozenset(
    {"$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else"}
    | {"dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"}
)


def _replace_at(document: Any, steps: Sequence[str], value: Json) -> Any:
    """A document with another value at one location; all else is shared."""
    if not steps:
        return value
    if isinstance(document, list):
        items = list(cast("list[Any]", document))
        items[int(steps[0])] = _replace_at(items[int(steps[0])], steps[1:], value)
        return items
    return {**document, steps[0]: _replace_at(document[steps[0]], steps[1:], value)}


_ANYTHING: set[Form] = {
    Simple("null"),
    Simple("boolean"),
    *build_number_forms((), {"integer", "fraction"}, Notes()),
    String(),
    Array(),
    Object(),
}


def _find_listed_values(parts: Sequence[Part]) -> list[Json] | None:
    """The values of the shortest `enum` or `const` among the parts."""
    found: list[list[Json]] = []
    for part in parts:
        schema = part.location.schema
        if isinstance(schema, Mapping):
            if "const" in schema:
                found.append([schema["const"]])
            enum = schema.get("enum")
            if isinstance(enum, Sequence) and not isinstance(enum, str):
                found.append(list(enum))
    return min(found, key=len, default=None)


def _are_hashable(forms: Sequence[Form]) -> bool:
    return not any(isinstance(form, Values) for form in forms)
