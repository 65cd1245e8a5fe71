"""One form for each type of value that an alternative allows: numbers, strings, arrays; objects are in `objects`.

Part of `model_runner.schema_forms`, between `choices` and `document`. A form says everything of its value with the few
keywords that llguidance 1.9.1 enforces to the letter.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction
from typing import Literal, TypeAlias, cast

from model_runner.schema_forms.choices import Choices, Part, Places
from model_runner.schema_forms.patterns import FORMATS, UnsupportedPattern, is_asserted, translate
from model_runner.schema_forms.references import Place
from model_runner.schema_forms.relaxation import Relaxation
from schemas.canonical import Json

MAX_MULTIPLE = 10_000
"""Largest divisor, in units of its last decimal: an automaton of as many states divides."""

MAX_DECIMALS = 15
MAX_DIGITS = 15
MAX_ITEMS = 10_000
MAX_EXACT_INTEGER = 2**63 - 1
_MAX_FLOAT_BOUND = 9e18
"""Numbers beyond are integers, for doubles; llguidance reads bounds of fractions as 64-bit integers."""

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

    def relax(self, place: Place, keyword: str, reason: str) -> None:
        self.relaxed.append(Relaxation(place.pointer, keyword, reason))

    def enforce(self, place: Place, keyword: str) -> None:
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
    return Part(Place(wider, part.place.pointer, part.place.base, part.place.key), part.ancestors)


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


def number_forms(parts: Sequence[Part], types: set[str], notes: Notes) -> list[Form]:
    """Numbers: integers as far as they go, and fractions up to where doubles have none."""
    low: tuple[Fraction, bool] | None = None  # and whether it is exclusive
    high: tuple[Fraction, bool] | None = None  # and whether it is inclusive
    multiple: Fraction | None = None
    at: dict[str, Place] = {}
    for part in parts:
        for keyword, value in _number_keywords(part.place):
            at[keyword] = part.place
            notes.enforce(part.place, keyword)
            if keyword == "multipleOf":
                # Divisors are decimal, for validation too; bounds are doubles.
                number = Fraction(repr(value))
                multiple = number if multiple is None else _least_common(multiple, number)
            elif keyword in ("minimum", "exclusiveMinimum"):
                bound = (Fraction(value), keyword == "exclusiveMinimum")
                low = bound if low is None else max(low, bound)
            else:
                bound = (Fraction(value), keyword == "maximum")
                high = bound if high is None else min(high, bound)
    if low is not None and high is not None:
        if low[0] > high[0] or (low[0] == high[0] and (low[1] or not high[1])):
            return []
        if low[0] == high[0]:
            return _only(low[0], types, multiple)
    forms: list[Form] = []
    if "fraction" in types and not (multiple is not None and multiple.denominator == 1):
        forms += _fractions(low, high, _divisor(multiple, at, notes))
    first = None if low is None else (math.floor(low[0]) + 1 if low[1] else math.ceil(low[0]))
    last = None if high is None else (math.floor(high[0]) if high[1] else math.ceil(high[0]) - 1)
    is_covered = first is not None and last is not None and first >= -_MAX_FLOAT_BOUND and last <= _MAX_FLOAT_BOUND
    if (forms and is_covered) or (first is not None and last is not None and first > last):
        return forms
    integer_multiple = None if multiple is None else _divisor(Fraction(multiple.numerator), at, notes)
    for bound, names in ((first, ("minimum", "exclusiveMinimum")), (last, ("maximum", "exclusiveMaximum"))):
        for name in names:
            if bound is not None and not _is_exact(bound) and name in at:
                notes.relax(at[name], name, "beyond the integers that llguidance can bound by")
    first = first if first is not None and _is_exact(first) else None
    last = last if last is not None and _is_exact(last) else None
    return [*forms, Number(True, first, last, integer_multiple)]


def _only(value: Fraction, types: set[str], multiple: Fraction | None) -> list[Form]:
    """The one number that is left between two equal bounds."""
    if value.denominator == 1:
        is_kept = multiple is None or (value / multiple).denominator == 1
        return [Values((int(value),))] if is_kept else []
    decimal = Fraction(repr(float(value)))
    is_kept = "fraction" in types and (multiple is None or (decimal / multiple).denominator == 1)
    return [Values((float(value),))] if is_kept else []


def _is_exact(bound: int) -> bool:
    """Whether llguidance, which reads bounds as doubles and then as 64-bit integers, keeps this one."""
    return bound == MAX_EXACT_INTEGER or (abs(bound) < 2**63 - 512 and int(float(bound)) == bound)


def _number_keywords(place: Place) -> Iterable[tuple[str, int | float]]:
    for keyword in ("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        value = place.get(keyword)
        if isinstance(value, bool):
            # Draft 4: whether the bound beside it is exclusive.
            bound = place.get("minimum" if keyword == "exclusiveMinimum" else "maximum")
            if value and isinstance(bound, int | float):
                yield keyword, bound
        elif isinstance(value, int | float):
            yield keyword, value


def _fractions(
    low: tuple[Fraction, bool] | None, high: tuple[Fraction, bool] | None, multiple: Fraction | None
) -> list[Form]:
    minimum = -_MAX_FLOAT_BOUND if low is None else _inward(low[0], is_exclusive=low[1], rounding=ROUND_CEILING)
    maximum = _MAX_FLOAT_BOUND if high is None else _inward(high[0], is_exclusive=not high[1], rounding=ROUND_FLOOR)
    minimum, maximum = max(minimum, -_MAX_FLOAT_BOUND), min(maximum, _MAX_FLOAT_BOUND)
    if minimum > maximum:
        return []
    # llguidance 1.9.1 leaves out numbers that begin the digits of a bound: 0.2 under a maximum of 0.25.
    beginnings = tuple(
        number
        for number in dict.fromkeys([*_beginnings(minimum), *_beginnings(maximum)])
        if minimum <= number <= maximum and (multiple is None or (Fraction(repr(number)) / multiple).denominator == 1)
    )
    forms: list[Form] = [Number(False, minimum, maximum, divisor) for divisor in _divisors(multiple)]
    return [*forms, Values(beginnings)] if beginnings else forms


def _divisors(multiple: Fraction | None) -> list[Fraction | None]:
    """The divisor, and larger ones for numbers of fewer decimals: llguidance 1.9.1 asks for 0.50 under 0.25."""
    divisors = [multiple]
    decimals = 1
    while multiple is not None and (multiple * 10**decimals).denominator != 1:
        shorter = _least_common(multiple, Fraction(1, 10**decimals))
        if shorter not in divisors:
            divisors.append(shorter)
        decimals += 1
    return divisors


def _beginnings(bound: float) -> list[float]:
    """A bound, and what is left of it with fewer decimals; nothing for integers."""
    digits = format(Decimal(repr(bound)), "f").removesuffix(".0")
    whole, _, decimals = digits.partition(".")
    return [float(f"{whole}.{decimals[: length + 1]}") for length in range(len(decimals))]


def _inward(bound: Fraction, *, is_exclusive: bool, rounding: str) -> float:
    """The nearest inclusive bound of at most 15 digits.

    llguidance 1.9.1 reads longer ones inexactly (0.9999999999999999 as 1), lets 0 through where it is excluded, and
    compares digits, not doubles: 0.99999999999999999 is below 1 for it, and 1 for validation.
    """
    decimal = Decimal(repr(float(bound)))
    if not decimal:
        quantum = Decimal(10) ** -MAX_DIGITS
        rounded = decimal
    else:
        quantum = Decimal(10) ** (decimal.adjusted() - MAX_DIGITS + 1)
        rounded = decimal.quantize(quantum, rounding=rounding)
    if is_exclusive and rounded == decimal:
        rounded += quantum if rounding == ROUND_CEILING else -quantum
    return float(rounded)


def _divisor(multiple: Fraction | None, at: dict[str, Place], notes: Notes) -> Fraction | None:
    """The divisor, if a grammar can divide by it; 1 is none for integers, and so is 0."""
    if multiple is None or multiple == 1:
        return None
    scaled, decimals = multiple, 0
    while scaled.denominator != 1 and decimals <= MAX_DECIMALS:
        scaled, decimals = scaled * 10, decimals + 1
    if scaled.denominator == 1 and scaled <= MAX_MULTIPLE:
        return multiple
    notes.relax(at["multipleOf"], "multipleOf", "a divisor of too many digits for a grammar")
    return None


def _least_common(first: Fraction, second: Fraction) -> Fraction:
    return Fraction(math.lcm(first.numerator, second.numerator), math.gcd(first.denominator, second.denominator))


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


def count_of(place: Place, keyword: str, notes: Notes) -> int | None:
    """A keyword's count, which may be written 2.0; None where there is none."""
    value = place.get(keyword)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    notes.enforce(place, keyword)
    return int(value)


def array_forms(parts: Sequence[Part], choices: Choices, notes: Notes, *, draft: int) -> list[Form]:
    """Arrays; what `contains` and `uniqueItems` ask beyond a number of items is left to validation."""
    min_items, max_items = 0, None
    tuples: list[tuple[list[Place], Places, bool]] = []
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
        child: list[Place] = []
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


_NOTHING = Place(False, "", "", "=false")


def items_of(place: Place, draft: int) -> tuple[list[Place], Places]:
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


def _contained(place: Place, draft: int, notes: Notes) -> int:
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
) -> tuple[list[Place], Places, bool]:
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
