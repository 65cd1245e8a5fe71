"""Builds object forms: which properties may come, in which order, under which schemas.

Part of `moebeam.model_runner.grammar.schema_forms`, beside `values`. llguidance 1.9.1 takes a schema's `properties` in
their order and other names after them; it holds a name to one schema only, so what `properties`,
`patternProperties` and `additionalProperties` of several locations say of a name is joined here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from moebeam.model_runner.grammar.schema_forms.choices import Choices, Locations, Part
from moebeam.model_runner.grammar.schema_forms.patterns import UnsupportedPattern, are_disjoint, translate
from moebeam.model_runner.grammar.schema_forms.values import (
    Anything,
    Form,
    Notes,
    Object,
    String,
    Values,
    find_evaluated,
    read_bounds,
)
from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.references import SchemaLocation, make_schema

MAX_SPLIT_PROPERTIES = 12
"""Most optional properties of which one must come that become a form each."""

_NOTHING = make_schema(False, "")
_MATCH_ALL = frozenset({"", "^", ".*", "^.*", "^[\\s\\S]*$"})


@dataclass(frozen=True, slots=True)
class _Rules:
    """What one location says of names: a schema each, a schema for each pattern, and one for the others.

    Attributes:
        is_open: whether named ones and patterns are only left out of `additional`, not constrained.
    """

    location: SchemaLocation
    properties: Mapping[str, SchemaLocation]
    patterns: Mapping[str, SchemaLocation]
    additional: SchemaLocation | None
    is_open: bool = False


def build_object_forms(
    parts: Sequence[Part],
    choices: Choices,
    notes: Notes,
    *,
    draft: int,
    find_forms: Callable[[Locations], Sequence[Form] | None],
    matches: Callable[[str, str], bool],
    is_valid: Callable[[Json, Locations], bool],
) -> list[Form]:
    """Objects.

    Args:
        find_forms: the forms of other locations; None where there is none yet.
        matches: whether a name matches a regular expression of the document, as validation sees it.
        is_valid: whether a value keeps some locations, as validation sees it.
    """
    rules = [_read_rules(part.location, notes) for part in parts]
    rules += [
        _read_unevaluated(part, parts, choices, notes)
        for part in parts
        if draft >= 2019 and not part.location.is_plain and part.location.get("unevaluatedProperties") is not None
    ]
    required: dict[str, None] = {}
    min_properties, max_properties = read_bounds(parts, "minProperties", "maxProperties", notes)
    for part in parts:
        names = part.location.get("required")
        if isinstance(names, Sequence) and not isinstance(names, str):
            required |= dict.fromkeys(cast("Sequence[str]", names))
            notes.enforce(part.location, "required")
    patterns = dict.fromkeys(pattern for rule in rules for pattern in rule.patterns)
    names = dict.fromkeys([*(name for rule in rules for name in rule.properties), *required])
    named = {name: tuple(_find_by_name(name, rules, matches)) for name in names}
    others = tuple(rule.additional for rule in rules if rule.additional is not None)
    by_pattern = _find_by_pattern(patterns, rules, others, notes)
    if by_pattern is None:
        # No grammar tells which pattern a name matches, so none is enforced.
        by_pattern, others = {}, ()
    if len(by_pattern) == 1 and (only := next(iter(by_pattern))) in _MATCH_ALL:
        by_pattern, others = {}, by_pattern[only]
    form = Object(
        tuple(named.items()), frozenset(required), tuple(by_pattern.items()), others, min_properties, max_properties
    )
    for part in parts:
        if draft >= 6 and part.location.get("propertyNames") is not None:
            form = _restrict_names(form, part.location, notes, find_forms, is_valid)
    return _apply_counts(form, parts, notes)


def _read_rules(location: SchemaLocation, notes: Notes) -> _Rules:
    found: dict[str, dict[str, SchemaLocation]] = {"properties": {}, "patternProperties": {}}
    for keyword, children in found.items():
        value = location.get(keyword)
        if isinstance(value, Mapping):
            children |= {name: location.child(keyword, name) for name in value}
            notes.enforce(location, keyword)
    has_additional = location.get("additionalProperties") is not None
    if has_additional:
        notes.enforce(location, "additionalProperties")
    additional = location.child("additionalProperties") if has_additional else None
    return _Rules(location, found["properties"], found["patternProperties"], additional)


def _read_unevaluated(part: Part, parts: Sequence[Part], choices: Choices, notes: Notes) -> _Rules:
    location = part.location
    notes.enforce(location, "unevaluatedProperties")
    if location.key in choices.unknown:
        notes.relax(location, "unevaluatedProperties", "part of what it looks at is not known")
        return _Rules(location, {}, {}, None, is_open=True)
    if location.key in choices.open_choices:
        notes.relax(location, "unevaluatedProperties", "what it leaves out depends on which alternatives match")
    properties: dict[str, SchemaLocation] = {}
    patterns: dict[str, SchemaLocation] = {}
    additional: SchemaLocation | None = location.child("unevaluatedProperties")
    for other in find_evaluated(part, parts, choices):
        if other.location.get("additionalProperties") is not None or (
            other.location.key != location.key and other.location.get("unevaluatedProperties") is not None
        ):
            additional = None
        for keyword, names in (("properties", properties), ("patternProperties", patterns)):
            value = other.location.get(keyword)
            names |= dict.fromkeys(value if isinstance(value, Mapping) else (), location)
    return _Rules(location, properties, patterns, additional, is_open=True)


def _find_by_name(name: str, rules: Iterable[_Rules], matches: Callable[[str, str], bool]) -> Iterable[SchemaLocation]:
    """All schemas that hold for the property of one name."""
    for rule in rules:
        found = [rule.properties[name]] if name in rule.properties else []
        found += [location for pattern, location in rule.patterns.items() if matches(pattern, name)]
        if not found and rule.additional is not None:
            yield rule.additional
        elif not rule.is_open:
            yield from found


def _find_by_pattern(
    patterns: Iterable[str], rules: Sequence[_Rules], others: Locations, notes: Notes
) -> dict[str, Locations] | None:
    """The schemas that hold for names by translated pattern; None where a name may match several."""
    found: dict[str, Locations] = {}
    for pattern in patterns:
        holders = [rule for rule in rules if pattern in rule.patterns]
        try:
            expression, *more = translate(pattern)
            if more:
                raise UnsupportedPattern("look-ahead")
        except UnsupportedPattern as error:
            for rule in holders:
                notes.relax(rule.location, "patternProperties", f"not an expression for grammars: {error}")
            return None
        children: list[SchemaLocation] = []
        for rule in rules:
            if pattern in rule.patterns:
                children += [] if rule.is_open else [rule.patterns[pattern]]
            elif rule.additional is not None:
                if rule.patterns and rule.additional.schema is not True:
                    notes.relax(rule.location, "patternProperties", "other patterns may match the same names")
                elif not rule.patterns:
                    children.append(rule.additional)
        found[expression] = (*found.get(expression, ()), *children)
    known = list(found)
    for index, first in enumerate(known):
        for second in known[index + 1 :]:
            if not are_disjoint(first, second):
                for rule in rules:
                    if rule.patterns and not rule.is_open:
                        notes.relax(rule.location, "patternProperties", "a name may match more than one pattern")
                return None
    return found


def _restrict_names(
    form: Object,
    location: SchemaLocation,
    notes: Notes,
    find_forms: Callable[[Locations], Sequence[Form] | None],
    is_valid: Callable[[Json, Locations], bool],
) -> Object:
    """Restricts an object form to the names that `propertyNames` allows."""
    child = location.child("propertyNames")
    notes.enforce(location, "propertyNames")
    properties = [(name, locations if is_valid(name, (child,)) else (_NOTHING,)) for name, locations in form.properties]
    form = replace(form, properties=tuple(properties))
    if not form.patterns and any(other.schema is False for other in form.additional):
        return form
    names = find_forms((child,))
    if names is None:
        notes.relax(location, "propertyNames", "it names itself")
        return form
    strings = [name for name in names if isinstance(name, String)]
    listed = [value for name in names if isinstance(name, Values) for value in name.values if isinstance(value, str)]
    known = {name for name, _ in form.properties}
    if not names or (not strings and not any(isinstance(name, Anything) for name in names)):
        if form.patterns and set(listed) - known:
            notes.relax(location, "propertyNames", "beside patternProperties")
            return form
        properties += [(name, form.additional) for name in listed if name not in known]
        return replace(form, properties=tuple(properties), patterns=(), additional=(_NOTHING,))
    expressions: list[str] = []
    for name in strings if len(strings) == 1 and not listed else ():
        expressions += name.patterns
        if name.min_length or name.max_length is not None:
            longest = "" if name.max_length is None else name.max_length
            expressions.append(rf"^[\s\S]{{{name.min_length},{longest}}}$")
    if len(names) == 1 and not expressions:
        return form
    if len(expressions) == 1 and not form.patterns:
        return replace(form, patterns=((expressions[0], form.additional),), additional=(_NOTHING,))
    notes.relax(location, "propertyNames", "more than one expression for names")
    return form


def _apply_counts(form: Object, parts: Sequence[Part], notes: Notes) -> list[Form]:
    """Applies `minProperties` and `maxProperties`; llguidance counts only where every declared name is required."""
    optional = [name for name, _ in form.properties if name not in form.required]
    is_closed = not form.patterns and any(location.schema is False for location in form.additional)
    least = form.min_properties - len(form.required)
    most = None if form.max_properties is None else form.max_properties - len(form.required)
    if most is not None and most < max(0, least):
        return []
    if most is not None and is_closed and most >= len(optional):
        most = None
    if is_closed and least > len(optional):
        return []
    form = replace(form, min_properties=0, max_properties=None)

    def relax(keyword: str, reason: str) -> None:
        for part in parts:
            if part.location.get(keyword) is not None:
                notes.relax(part.location, keyword, reason)

    if most == 0:
        return [_forbid_names(form, optional, is_closed=True)]
    if not optional and not is_closed:
        if least > 1:
            relax("minProperties", "a name may come twice")
        return [
            replace(
                form,
                min_properties=len(form.required) + least if least > 0 else 0,
                max_properties=None if most is None else most + len(form.required),
            )
        ]
    if most is not None:
        relax("maxProperties", "a grammar does not count optional properties")
    if least <= 0:
        return [form]
    if is_closed and least == len(optional):
        return [replace(form, required=form.required | set(optional))]
    if least > 1 or len(optional) > MAX_SPLIT_PROPERTIES:
        relax("minProperties", "a grammar does not count optional properties")
    if len(optional) > MAX_SPLIT_PROPERTIES:
        return [form]
    # One of them is the first that comes; or none of them does, and some other name must.
    forms: list[Form] = [
        replace(_forbid_names(form, optional[:index]), required=form.required | {name})
        for index, name in enumerate(optional)
    ]
    if not is_closed:
        rest = _forbid_names(form, optional)
        forms.append(replace(rest, min_properties=len(form.required) + 1))
    return forms


def _forbid_names(form: Object, names: Sequence[str], *, is_closed: bool = False) -> Object:
    properties = tuple((name, (_NOTHING,) if name in names else locations) for name, locations in form.properties)
    if is_closed:
        return replace(form, properties=properties, patterns=(), additional=(_NOTHING,))
    return replace(form, properties=properties)
