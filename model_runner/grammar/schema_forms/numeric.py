"""Builds forms of numbers, with bounds and divisors that llguidance 1.9.1 enforces exactly.

Part of `moebeam.model_runner.grammar.schema_forms`, beside `values`. Bounds are doubles, for validation and here;
divisors are decimal.
"""

import math
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction

from moebeam.model_runner.grammar.schema_forms.choices import Part
from moebeam.model_runner.grammar.schema_forms.values import Form, Notes, Number, Values
from moebeam.schemas.contract.references import SchemaLocation

MAX_MULTIPLE = 10_000
"""Largest divisor, in units of its last decimal: an automaton of as many states divides."""

MAX_DECIMALS = 15
MAX_DIGITS = 15
MAX_EXACT_INTEGER = 2**63 - 1
_MAX_FLOAT_BOUND = 9e18
"""Numbers beyond are integers, for doubles; llguidance reads bounds of fractions as 64-bit integers."""


def build_number_forms(parts: Sequence[Part], types: set[str], notes: Notes) -> list[Form]:
    """Any number, also with an exponent; or, within bounds, integers without limit and fractions up to 9e18.

    Doubles beyond 9e18 have no fractions. llguidance writes exponents only where a number has neither bounds nor a
    divisor; elsewhere a number is spelled out (0.00001), and `notes` says so.
    """
    low: tuple[Fraction, bool] | None = None  # and whether it is exclusive
    high: tuple[Fraction, bool] | None = None  # and whether it is inclusive
    multiple: Fraction | None = None
    at: dict[str, SchemaLocation] = {}
    for part in parts:
        for keyword, value in _number_keywords(part.location):
            at[keyword] = part.location
            notes.enforce(part.location, keyword)
            if keyword == "multipleOf":
                # Divisors are decimal, for validation too; bounds are doubles.
                number = Fraction(repr(value))
                multiple = number if multiple is None else _find_common_multiple(multiple, number)
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
            return _build_single(low[0], types, multiple)
    if "fraction" in types and "integer" in types and low is None and high is None and multiple is None:
        return [Number(False)]
    forms: list[Form] = []
    if "fraction" in types:
        for keyword, location in at.items():
            notes.narrow(location, keyword, "beside it numbers are written without exponent")
    if "fraction" in types and not (multiple is not None and multiple.denominator == 1):
        forms += _build_fractions(low, high, _limit_divisor(multiple, at, notes))
    first = None if low is None else (math.floor(low[0]) + 1 if low[1] else math.ceil(low[0]))
    last = None if high is None else (math.floor(high[0]) if high[1] else math.ceil(high[0]) - 1)
    is_covered = first is not None and last is not None and first >= -_MAX_FLOAT_BOUND and last <= _MAX_FLOAT_BOUND
    if (forms and is_covered) or (first is not None and last is not None and first > last):
        return forms
    integer_multiple = None if multiple is None else _limit_divisor(Fraction(multiple.numerator), at, notes)
    for bound, names in ((first, ("minimum", "exclusiveMinimum")), (last, ("maximum", "exclusiveMaximum"))):
        for name in names:
            if bound is not None and not _is_exact(bound) and name in at:
                notes.relax(at[name], name, "beyond the integers that llguidance can bound by")
    first = first if first is not None and _is_exact(first) else None
    last = last if last is not None and _is_exact(last) else None
    return [*forms, Number(True, first, last, integer_multiple)]


def _build_single(value: Fraction, types: set[str], multiple: Fraction | None) -> list[Form]:
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


def _number_keywords(location: SchemaLocation) -> Iterable[tuple[str, int | float]]:
    for keyword in ("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        value = location.get(keyword)
        if isinstance(value, bool):
            # Draft 4: whether the bound beside it is exclusive.
            bound = location.get("minimum" if keyword == "exclusiveMinimum" else "maximum")
            if value and isinstance(bound, int | float):
                yield keyword, bound
        elif isinstance(value, int | float):
            yield keyword, value


def _build_fractions(
    low: tuple[Fraction, bool] | None, high: tuple[Fraction, bool] | None, multiple: Fraction | None
) -> list[Form]:
    minimum = -_MAX_FLOAT_BOUND if low is None else _round_inward(low[0], is_exclusive=low[1], rounding=ROUND_CEILING)
    maximum = (
        _MAX_FLOAT_BOUND if high is None else _round_inward(high[0], is_exclusive=not high[1], rounding=ROUND_FLOOR)
    )
    minimum, maximum = max(minimum, -_MAX_FLOAT_BOUND), min(maximum, _MAX_FLOAT_BOUND)
    if minimum > maximum:
        return _list_between(low, high, multiple)
    # llguidance 1.9.1 refuses numbers whose digits are a prefix of a bound's: 0.2 under a maximum of 0.25.
    beginnings = tuple(
        number
        for number in dict.fromkeys([*_list_beginnings(minimum), *_list_beginnings(maximum)])
        if minimum <= number <= maximum and (multiple is None or (Fraction(repr(number)) / multiple).denominator == 1)
    )
    forms: list[Form] = [Number(False, minimum, maximum, divisor) for divisor in _list_divisors(multiple)]
    return [*forms, Values(beginnings)] if beginnings else forms


def _list_between(
    low: tuple[Fraction, bool] | None, high: tuple[Fraction, bool] | None, multiple: Fraction | None
) -> list[Form]:
    """The bounds themselves, and the double between them, where no number of 15 decimals is."""
    if low is None or high is None or max(abs(low[0]), abs(high[0])) > 1:
        return []
    candidates = (float(low[0]), float((low[0] + high[0]) / 2), float(high[0]))
    values = tuple(
        number
        for number in dict.fromkeys(candidates)
        if (Fraction(number) > low[0] or (Fraction(number) == low[0] and not low[1]))
        and (Fraction(number) < high[0] or (Fraction(number) == high[0] and high[1]))
        and (multiple is None or (Fraction(repr(number)) / multiple).denominator == 1)
    )
    return [Values(values)] if values else []


def _list_divisors(multiple: Fraction | None) -> list[Fraction | None]:
    """The divisor, and multiples of it with fewer decimals: for 0.25 llguidance 1.9.1 demands 0.50, not 0.5."""
    divisors = [multiple]
    decimals = 1
    while multiple is not None and (multiple * 10**decimals).denominator != 1:
        shorter = _find_common_multiple(multiple, Fraction(1, 10**decimals))
        if shorter not in divisors:
            divisors.append(shorter)
        decimals += 1
    return divisors


def _list_beginnings(bound: float) -> list[float]:
    """A bound truncated to every number of decimals; nothing for integers."""
    digits = format(Decimal(repr(bound)), "f").removesuffix(".0")
    whole, _, decimals = digits.partition(".")
    return [float(f"{whole}.{decimals[: length + 1]}") for length in range(len(decimals))]


def _round_inward(bound: Fraction, *, is_exclusive: bool, rounding: str) -> float:
    """The nearest inclusive bound of at most 15 digits.

    llguidance 1.9.1 reads longer ones inexactly (0.9999999999999999 as 1), lets 0 through where it is excluded, and
    compares digits, not doubles: 0.99999999999999999 is below 1 for it, and 1 for validation.
    """
    if abs(bound) > _MAX_FLOAT_BOUND:
        return math.copysign(2 * _MAX_FLOAT_BOUND, bound)
    decimal = Decimal(repr(float(bound)))
    # A number without exponent has no use for more decimals.
    quantum = Decimal(10) ** -MAX_DIGITS
    rounded = decimal
    if decimal:
        quantum = max(quantum, Decimal(10) ** (decimal.adjusted() - MAX_DIGITS + 1))
        rounded = decimal.quantize(quantum, rounding=rounding)
    if is_exclusive and rounded == decimal:
        rounded += quantum if rounding == ROUND_CEILING else -quantum
    return float(rounded)


def _limit_divisor(multiple: Fraction | None, at: dict[str, SchemaLocation], notes: Notes) -> Fraction | None:
    """The divisor, if a grammar can divide by it; None for 1 and where it has too many digits."""
    if multiple is None or multiple == 1:
        return None
    scaled, decimals = multiple, 0
    while scaled.denominator != 1 and decimals <= MAX_DECIMALS:
        scaled, decimals = scaled * 10, decimals + 1
    if scaled.denominator == 1 and scaled <= MAX_MULTIPLE:
        return multiple
    notes.relax(at["multipleOf"], "multipleOf", "a divisor of too many digits for a grammar")
    return None


def _find_common_multiple(first: Fraction, second: Fraction) -> Fraction:
    return Fraction(math.lcm(first.numerator, second.numerator), math.gcd(first.denominator, second.denominator))
