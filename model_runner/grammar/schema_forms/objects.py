"""Object forms: which properties may come, in which order, and what each must keep.

Part of `moebeam.model_runner.grammar.schema_forms`, beside `values`. llguidance 1.9.1 takes a schema's `properties` in
their order and other names after them; it asks a name for one schema only, so that what `properties`,
`patternProperties` and `additionalProperties` of several places say of a name is joined here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from moebeam.model_runner.grammar.schema_forms.choices import Choices, Part, Places
from moebeam.model_runner.grammar.schema_forms.patterns import UnsupportedPattern, are_disjoint, translate
from moebeam.model_runner.grammar.schema_forms.references import SchemaLocation, made
from moebeam.model_runner.grammar.schema_forms.values import (
    Anything,
    Form,
    Notes,
    Object,
    String,
    Values,
    count_of,
    evaluated_below,
)
from moebeam.schemas.canonical import Json

MAX_SPLIT_PROPERTIES = 12
"""Most optional properties of which one must come that become a form each."""

_NOTHING = made(False, "")
_MATCH_ALL = frozenset({"", "^", ".*", "^.*", "^[\\s\\S]*$"})


@dataclass(frozen=True, slots=True)
class _Rules:
    """What one place says of names: a schema each, a schema for each pattern, and one for the others.

    Attributes:
        is_open: whether named ones and patterns are only left out of `additional`, not constrained.
    """

    place: SchemaLocation
    properties: Mapping[str, SchemaLocation]
    patterns: Mapping[str, SchemaLocation]
    additional: SchemaLocation | None
    is_open: bool = False


def object_forms(
    parts: Sequence[Part],
    choices: Choices,
    notes: Notes,
    *,
    draft: int,
    forms_of: Callable[[Places], Sequence[Form] | None],
    matches: Callable[[str, str], bool],
    is_valid: Callable[[Json, Places], bool],
) -> list[Form]:
    """Objects.

    Args:
        forms_of: the forms of other places; None where there is none yet.
        matches: whether a name matches a regular expression of the document, as validation sees it.
        is_valid: whether a value keeps some places, as validation sees it.
    """
    rules = [_rules(part.place, notes) for part in parts]
    rules += [
        _unevaluated(part, parts, choices, notes)
        for part in parts
        if draft >= 2019 and not part.place.is_plain and part.place.get("unevaluatedProperties") is not None
    ]
    required: dict[str, None] = {}
    min_properties, max_properties = 0, None
    for part in parts:
        names = part.place.get("required")
        if isinstance(names, Sequence) and not isinstance(names, str):
            required |= dict.fromkeys(cast("Sequence[str]", names))
            notes.enforce(part.place, "required")
        min_properties = max(min_properties, count_of(part.place, "minProperties", notes) or 0)
        count = count_of(part.place, "maxProperties", notes)
        max_properties = (
            count if max_properties is None else max_properties if count is None else min(count, max_properties)
        )
    patterns = dict.fromkeys(pattern for rule in rules for pattern in rule.patterns)
    names = dict.fromkeys([*(name for rule in rules for name in rule.properties), *required])
    named = {name: tuple(_of_name(name, rules, matches)) for name in names}
    others = tuple(rule.additional for rule in rules if rule.additional is not None)
    by_pattern = _patterns(patterns, rules, others, notes)
    if by_pattern is None:
        # Names that several patterns may match keep none of them.
        by_pattern, others = {}, ()
    if len(by_pattern) == 1 and (only := next(iter(by_pattern))) in _MATCH_ALL:
        by_pattern, others = {}, by_pattern[only]
    form = Object(
        tuple(named.items()), frozenset(required), tuple(by_pattern.items()), others, min_properties, max_properties
    )
    for part in parts:
        if draft >= 6 and part.place.get("propertyNames") is not None:
            form = _restricted(form, part.place, notes, forms_of, is_valid)
    return _counted(form, parts, notes)


def _rules(place: SchemaLocation, notes: Notes) -> _Rules:
    found: dict[str, dict[str, SchemaLocation]] = {"properties": {}, "patternProperties": {}}
    for keyword, children in found.items():
        value = place.get(keyword)
        if isinstance(value, Mapping):
            children |= {name: place.child(keyword, name) for name in value}
            notes.enforce(place, keyword)
    has_additional = place.get("additionalProperties") is not None
    if has_additional:
        notes.enforce(place, "additionalProperties")
    additional = place.child("additionalProperties") if has_additional else None
    return _Rules(place, found["properties"], found["patternProperties"], additional)


def _unevaluated(part: Part, parts: Sequence[Part], choices: Choices, notes: Notes) -> _Rules:
    place = part.place
    notes.enforce(place, "unevaluatedProperties")
    if place.key in choices.unknown:
        notes.relax(place, "unevaluatedProperties", "part of what it looks at is not known")
        return _Rules(place, {}, {}, None, is_open=True)
    if place.key in choices.open_choices:
        notes.relax(place, "unevaluatedProperties", "what it leaves out depends on which alternatives match")
    properties: dict[str, SchemaLocation] = {}
    patterns: dict[str, SchemaLocation] = {}
    additional: SchemaLocation | None = place.child("unevaluatedProperties")
    for other in evaluated_below(part, parts, choices):
        if other.place.get("additionalProperties") is not None or (
            other.place.key != place.key and other.place.get("unevaluatedProperties") is not None
        ):
            additional = None
        for keyword, names in (("properties", properties), ("patternProperties", patterns)):
            value = other.place.get(keyword)
            names |= dict.fromkeys(value if isinstance(value, Mapping) else (), place)
    return _Rules(place, properties, patterns, additional, is_open=True)


def _of_name(name: str, rules: Iterable[_Rules], matches: Callable[[str, str], bool]) -> Iterable[SchemaLocation]:
    """All that is asked of the property of one name."""
    for rule in rules:
        found = [rule.properties[name]] if name in rule.properties else []
        found += [place for pattern, place in rule.patterns.items() if matches(pattern, name)]
        if not found and rule.additional is not None:
            yield rule.additional
        elif not rule.is_open:
            yield from found


def _patterns(
    patterns: Iterable[str], rules: Sequence[_Rules], others: Places, notes: Notes
) -> dict[str, Places] | None:
    """What is asked of names by translated pattern; None where no grammar can tell which patterns a name matches."""
    found: dict[str, Places] = {}
    for pattern in patterns:
        holders = [rule for rule in rules if pattern in rule.patterns]
        try:
            expression, *more = translate(pattern)
            if more:
                raise UnsupportedPattern("look-ahead")
        except UnsupportedPattern as error:
            for rule in holders:
                notes.relax(rule.place, "patternProperties", f"not an expression for grammars: {error}")
            return None
        children: list[SchemaLocation] = []
        for rule in rules:
            if pattern in rule.patterns:
                children += [] if rule.is_open else [rule.patterns[pattern]]
            elif rule.additional is not None:
                if rule.patterns and rule.additional.schema is not True:
                    notes.relax(rule.place, "patternProperties", "other patterns may match the same names")
                elif not rule.patterns:
                    children.append(rule.additional)
        found[expression] = (*found.get(expression, ()), *children)
    known = list(found)
    for index, first in enumerate(known):
        for second in known[index + 1 :]:
            if not are_disjoint(first, second):
                for rule in rules:
                    if rule.patterns and not rule.is_open:
                        notes.relax(rule.place, "patternProperties", "a name may match more than one pattern")
                return None
    return found


def _restricted(
    form: Object,
    place: SchemaLocation,
    notes: Notes,
    forms_of: Callable[[Places], Sequence[Form] | None],
    is_valid: Callable[[Json, Places], bool],
) -> Object:
    """An object form whose names keep `propertyNames`."""
    child = place.child("propertyNames")
    notes.enforce(place, "propertyNames")
    properties = [(name, places if is_valid(name, (child,)) else (_NOTHING,)) for name, places in form.properties]
    form = replace(form, properties=tuple(properties))
    if not form.patterns and any(other.schema is False for other in form.additional):
        return form
    names = forms_of((child,))
    if names is None:
        notes.relax(place, "propertyNames", "it names itself")
        return form
    strings = [name for name in names if isinstance(name, String)]
    listed = [value for name in names if isinstance(name, Values) for value in name.values if isinstance(value, str)]
    known = {name for name, _ in form.properties}
    if not names or (not strings and not any(isinstance(name, Anything) for name in names)):
        if form.patterns and set(listed) - known:
            notes.relax(place, "propertyNames", "beside patternProperties")
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
    notes.relax(place, "propertyNames", "more than one expression for names")
    return form


def _counted(form: Object, parts: Sequence[Part], notes: Notes) -> list[Form]:
    """The form's `minProperties` and `maxProperties` as llguidance can count: where every declared name is required."""
    optional = [name for name, _ in form.properties if name not in form.required]
    is_closed = not form.patterns and any(place.schema is False for place in form.additional)
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
            if part.place.get(keyword) is not None:
                notes.relax(part.place, keyword, reason)

    if most == 0:
        return [_without(form, optional, is_closed=True)]
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
        replace(_without(form, optional[:index]), required=form.required | {name})
        for index, name in enumerate(optional)
    ]
    if not is_closed:
        rest = _without(form, optional)
        forms.append(replace(rest, min_properties=len(form.required) + 1))
    return forms


def _without(form: Object, names: Sequence[str], *, is_closed: bool = False) -> Object:
    properties = tuple((name, (_NOTHING,) if name in names else places) for name, places in form.properties)
    if is_closed:
        return replace(form, properties=properties, patterns=(), additional=(_NOTHING,))
    return replace(form, properties=properties)
