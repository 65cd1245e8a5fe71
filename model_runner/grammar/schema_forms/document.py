"""Writes forms as a schema that llguidance 1.9.1 enforces exactly, and lists what is left to validation.

Last step of `moebeam.model_runner.grammar.schema_forms`. The schema's only in-place keywords are `anyOf` without
siblings and references to its own `$defs`, so that nothing depends on how llguidance joins schemas; whatever a schema
leaves open is written out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from moebeam.model_runner.grammar.schema_forms.choices import Locations
from moebeam.model_runner.grammar.schema_forms.forms import Forms, State
from moebeam.model_runner.grammar.schema_forms.literals import can_be_written, has_control_character, normalise_literal
from moebeam.model_runner.grammar.schema_forms.relaxation import Relaxation
from moebeam.model_runner.grammar.schema_forms.values import (
    Anything,
    Array,
    Form,
    Number,
    Object,
    Simple,
    String,
    Values,
)
from moebeam.schemas.canonical import Json

Key: TypeAlias = tuple[str, ...]
Schema: TypeAlias = dict[str, Json]

MAX_INLINE_DEPTH = 12
"""Levels of a schema before a part gets a name: readers of JSON stop at some depth."""


@dataclass(frozen=True, slots=True)
class BuiltDocument:
    """A schema that a grammar can be made of; see `build_document`.

    Attributes:
        schema: None where no value at all is valid.
        enforced: pointer and keyword of all that is enforced, in the order in which it was met.
        narrowed: of which keywords less can be written than is valid.
        cost: parts of the schema that were looked at; some 0.2 ms each.
    """

    schema: Mapping[str, Json] | None
    relaxed: tuple[Relaxation, ...]
    enforced: tuple[tuple[str, str], ...]
    narrowed: tuple[Relaxation, ...] = ()
    cost: int = 0


def build_document(
    document: Json,
    *,
    are_formats_asserted: bool,
    max_string_length: int | None,
    left_out: Sequence[tuple[str, str]] = (),
) -> BuiltDocument:
    """Rewrite a schema.

    Args:
        document: an object or a boolean.
        max_string_length: most characters of a string for which the schema has no maximum and no expression; None
            sets no bound.
        left_out: pointer and keyword of what is left to validation beside what must be.
    """
    forms = Forms(document, are_formats_asserted=are_formats_asserted, left_out=left_out)
    return _Writer(forms, max_string_length).write()


class _Writer:
    def __init__(self, forms: Forms, max_string_length: int | None) -> None:
        self._forms = forms
        self._max_string_length = max_string_length
        self._states: dict[Key, State] = {}
        self._locations: dict[Key, Locations] = {}
        self._num_uses: dict[Key, int] = {}
        self._possible: set[Key] = set()
        self._names: dict[tuple[Key, bool], str] = {}
        self._definitions: Schema = {}
        self._relaxed: dict[Relaxation, None] = {}
        self._has_controls = False

    def write(self) -> BuiltDocument:
        root = (self._forms.references.root,)
        self._collect(root)
        self._find_possible()
        root_key = _make_key(root)
        if root_key not in self._possible:
            return BuiltDocument(None, (), ())
        self._count_uses(root_key)
        schema = self._write_schema(root, 0)
        assert isinstance(schema, dict), "a schema that some value keeps is an object"
        if self._has_controls:
            self._relax_declared_names()
        reached = [self._states[key] for key in self._num_uses]
        relaxed = dict.fromkeys(entry for state in reached for entry in state.relaxed) | self._relaxed
        enforced = dict.fromkeys(entry for state in reached for entry in state.enforced)
        narrowed = dict.fromkeys(entry for state in reached for entry in state.narrowed)
        if self._definitions:
            schema["$defs"] = self._definitions
        return BuiltDocument(
            schema, tuple(sorted(relaxed)), tuple(enforced), tuple(sorted(narrowed)), self._forms.num_parts
        )

    def _collect(self, root: Locations) -> None:
        waiting = [root]
        while waiting:
            locations = waiting.pop()
            key = _make_key(locations)
            if key in self._states:
                continue
            self._states[key] = self._forms.find_state(locations)
            self._locations[key] = locations
            waiting += [child for form in self._states[key].forms for child in reversed(_list_children(form))]

    def _find_possible(self) -> None:
        """Finds the states that some finite value satisfies; drops the others."""
        is_changed = True
        while is_changed:
            is_changed = False
            for key, state in self._states.items():
                if key not in self._possible and any(self._is_possible(form) for form in state.forms):
                    self._possible.add(key)
                    is_changed = True

    def _can_be_kept(self, locations: Locations) -> bool:
        return _make_key(locations) in self._possible

    def _is_possible(self, form: Form) -> bool:
        match form:
            case Values(values=values):
                return bool(values)
            case Array(prefix=prefix, items=items, min_items=min_items):
                return all(map(self._can_be_kept, prefix[:min_items])) and (
                    min_items <= len(prefix) or self._can_be_kept(items)
                )
            case Object(properties=properties, required=required):
                return all(self._can_be_kept(child) for name, child in properties if name in required)
            case _:
                return True

    def _count_uses(self, root: Key) -> None:
        waiting = [root]
        self._num_uses[root] = 1
        while waiting:
            for form in self._states[waiting.pop()].forms:
                if not self._is_possible(form):
                    continue
                for child in _list_children(form):
                    key = _make_key(child)
                    if key not in self._possible:
                        continue
                    if key not in self._num_uses:
                        waiting.append(key)
                    self._num_uses[key] = self._num_uses.get(key, 0) + 1

    def _write_schema(self, locations: Locations, depth: int, is_open: bool = False) -> Json:
        """A part of the schema.

        Args:
            is_open: leave what may be anything open, because llguidance joins the part with another that says so; two
                references to a definition that recurs it would join forever.
        """
        key = _make_key(locations)
        if key not in self._possible:
            return False
        forms = [form for form in self._states[key].forms if self._is_possible(form)]
        if any(isinstance(form, Anything) for form in forms):
            return {} if is_open else self._write_anything()
        is_small = len(forms) == 1 and isinstance(forms[0], Simple | Number | String)
        is_shared = self._num_uses[key] > 1 or depth > MAX_INLINE_DEPTH
        if (key, is_open) in self._names or (is_shared and not is_small):
            return self._write_named(key, forms, is_open)
        return self._write_any_of(forms, locations, depth, is_open)

    def _write_named(self, key: Key, forms: list[Form], is_open: bool) -> Schema:
        if (key, is_open) not in self._names:
            name = self._names[key, is_open] = f"d{len(self._names)}"
            self._definitions[name] = None
            self._definitions[name] = self._write_any_of(forms, self._locations[key], 0, is_open)
        return {"$ref": f"#/$defs/{self._names[key, is_open]}"}

    def _write_any_of(self, forms: Sequence[Form], locations: Locations, depth: int, is_open: bool) -> Schema:
        options: list[Schema] = []
        for form in forms:
            options += [option for option in self._write_form(form, locations, depth, is_open) if option not in options]
        return options[0] if len(options) == 1 else {"anyOf": list[Json](options)}

    def _write_form(self, form: Form, locations: Locations, depth: int, is_open: bool) -> list[Schema]:
        match form:
            case Anything():
                return [self._write_anything()]
            case Simple(type=name):
                return [{"type": name}]
            case Values(values=values):
                return self._write_values(values, locations)
            case Number():
                return [self._write_number(form)]
            case String():
                return [self._write_string(form)]
            case Array():
                return [self._write_array(form, depth, is_open)]
            case Object():
                return [self._write_object(form, depth, is_open)]

    def _write_values(self, values: Sequence[Json], locations: Locations) -> list[Schema]:
        literals: list[Json] = []
        options: list[Schema] = []
        for value in values:
            self._has_controls = self._has_controls or has_control_character(value)
            if not can_be_written(value):
                keyword = "const" if locations[0].get("const") is not None else "enum"
                self._relaxed[Relaxation(locations[0].pointer, keyword, "a value that llguidance cannot spell")] = None
                options.append(self._write_any_like(value))
            else:
                literals.append(normalise_literal(value))
        return [*([{"enum": literals}] if literals else []), *options]

    def _write_any_like(self, value: Json) -> Schema:
        match value:
            case str():
                return self._write_string(String())
            case int() | float():
                return {"type": "number"}
            case _:
                return self._write_anything()

    def _write_number(self, form: Number) -> Schema:
        schema: Schema = {"type": "integer" if form.is_integer else "number"}
        if form.minimum is not None:
            schema["minimum"] = form.minimum
        if form.maximum is not None:
            schema["maximum"] = form.maximum
        if form.multiple is not None:
            whole = form.multiple.denominator == 1
            schema["multipleOf"] = int(form.multiple) if whole else float(form.multiple)
        return schema

    def _write_string(self, form: String) -> Schema:
        schema: Schema = {"type": "string"}
        if form.min_length:
            schema["minLength"] = form.min_length
        if form.max_length is not None:
            schema["maxLength"] = form.max_length
        elif not form.patterns and self._max_string_length is not None:
            schema["maxLength"] = max(form.min_length, self._max_string_length)
        if len(form.patterns) < 2:
            return schema | ({"pattern": form.patterns[0]} if form.patterns else {})
        return {"allOf": [schema, *({"type": "string", "pattern": pattern} for pattern in form.patterns)]}

    def _write_array(self, form: Array, depth: int, is_open: bool) -> Schema:
        schema: Schema = {"type": "array"}
        if form.prefix:
            schema["prefixItems"] = [self._write_schema(child, depth + 2, is_open) for child in form.prefix]
        schema["items"] = self._write_schema(form.items, depth + 1, is_open)
        if form.min_items:
            schema["minItems"] = form.min_items
        if form.max_items is not None:
            schema["maxItems"] = form.max_items
        return schema

    def _write_object(self, form: Object, depth: int, is_open: bool) -> Schema:
        schema: Schema = {"type": "object"}
        if form.properties:
            # llguidance joins a property with the patterns that its name matches, although it contains them already.
            schema["properties"] = {
                name: self._write_schema(
                    child, depth + 2, is_open or any(self._forms.matches(pattern, name) for pattern, _ in form.patterns)
                )
                for name, child in form.properties
            }
            self._has_controls = self._has_controls or any(has_control_character(name) for name, _ in form.properties)
        if form.required:
            schema["required"] = [name for name, _ in form.properties if name in form.required]
        if form.patterns:
            schema["patternProperties"] = {
                pattern: self._write_schema(child, depth + 2, is_open) for pattern, child in form.patterns
            }
        schema["additionalProperties"] = self._write_schema(form.additional, depth + 1, is_open)
        if form.min_properties:
            schema["minProperties"] = form.min_properties
        if form.max_properties is not None:
            schema["maxProperties"] = form.max_properties
        return schema

    def _write_anything(self) -> Schema:
        if "any" not in self._definitions:
            itself: Schema = {"$ref": "#/$defs/any"}
            self._definitions["any"] = {
                "anyOf": [
                    {"type": "null"},
                    {"type": "boolean"},
                    {"type": "number"},
                    self._write_string(String()),
                    {"type": "array", "items": itself},
                    {"type": "object", "additionalProperties": itself},
                ]
            }
        return {"$ref": "#/$defs/any"}

    def _relax_declared_names(self) -> None:
        """Relaxes objects where numeric escapes, allowed for control characters, can disguise a declared name."""
        for key in self._num_uses:
            for form in self._states[key].forms:
                if (
                    isinstance(form, Object)
                    and form.properties
                    and (form.patterns or self._can_be_kept(form.additional))
                ):
                    pointer = self._locations[key][0].pointer if self._locations[key] else ""
                    reason = "a declared name may be spelled with escapes"
                    self._relaxed[Relaxation(pointer, "additionalProperties", reason)] = None


def _list_children(form: Form) -> list[Locations]:
    match form:
        case Array(prefix=prefix, items=items):
            return [*prefix, items]
        case Object(properties=properties, patterns=patterns, additional=additional):
            return [*(child for _, child in properties), *(child for _, child in patterns), additional]
        case _:
            return []


def _make_key(locations: Locations) -> Key:
    return tuple(sorted({location.key for location in locations}))
