"""What a value of a `config.json` may be: rules in words and as tests."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

from moebeam.schemas.canonical import Json

Values: TypeAlias = Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be, in words and as a test."""

    expected: str
    holds: Callable[[Json], bool]

    def or_null(self) -> "Rule":
        """The same, or null."""
        return Rule(f"{self.expected}, or null", lambda value: value is None or self.holds(value))


def is_number(value: Json) -> TypeGuard[int | float]:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def at_least(least: int) -> Rule:
    """A whole number with a lower bound."""
    return Rule(
        f"a whole number of at least {least}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
    )


def one_of(*values: Json) -> Rule:
    """One of a few values."""
    written = [json.dumps(value) for value in values]
    # Compared as written, because True equals 1 in Python.
    return Rule(" or ".join(written), lambda value: json.dumps(value) in written)


def number_of_at_least(least: float) -> Rule:
    """A number with a lower bound."""
    return Rule(f"a number of at least {least:g}", lambda value: is_number(value) and value >= least)


def number_above(bound: float) -> Rule:
    """A number with an open lower bound."""
    return Rule(f"a number above {bound:g}", lambda value: is_number(value) and value > bound)


def list_of(rule: Rule) -> Rule:
    """A list whose every entry keeps a rule."""
    return Rule(f"a list of {rule.expected}", lambda value: isinstance(value, list) and all(map(rule.holds, value)))


COUNT = at_least(1)
NATURAL = at_least(0)
FLAG = one_of(True, False)
POSITIVE = number_above(0)
EVEN = Rule(
    "an even whole number of at least 2",
    lambda value: isinstance(value, int) and at_least(2).holds(value) and value % 2 == 0,
)
SHARE = Rule("a number above 0 and at most 1", lambda value: is_number(value) and 0 < value <= 1)
