"""Tells JSON Schemas that are certainly cheap, however they are written, from those that nobody can be sure of.

Rows bring schemas. One that is plain is compiled, checked and turned into a grammar where it is needed; any other runs
behind `moebeam.model_runner.fence.fenced_schema`. What is plain is a list of what is allowed: known keywords, no
regular expressions, few objects with every reference followed. Most schemas that people and libraries write are plain.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from moebeam.schemas.canonical import Json

MAX_CHARACTERS = 64 << 10
MAX_OBJECTS = 2_000
"""Most objects of a plain schema, those that a reference names counted wherever it stands."""

MAX_LEVELS = 100
"""Most levels of a plain schema, its references followed."""

MAX_NUMBER = 1 << 53

_ANNOTATIONS = frozenset(
    {"$comment", "$schema", "default", "deprecated", "description", "example", "examples", "readOnly", "title", "type"}
    | {"writeOnly", "const", "enum", "required"}
)
_NUMBERS = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength"}
    | {"minItems", "maxItems", "minProperties", "maxProperties"}
)
_NAMED = frozenset({"properties", "$defs", "definitions"})
_SINGLE = frozenset({"items", "additionalProperties"})
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_FORMATS = frozenset({"date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"})


class _NotPlain(Exception):
    """Something in a schema is not on the list."""


def is_plain(document: Json) -> bool:
    """Whether to compile a schema, to check a value and to make a grammar surely take little time and memory."""
    try:
        if len(json.dumps(document)) > MAX_CHARACTERS:
            return False
        _Walk(document).measure(document, ())
    except (_NotPlain, TypeError, ValueError, RecursionError):
        return False
    return True


@dataclass(slots=True)
class _Walk:
    """One reading of a document.

    Attributes:
        sizes: objects of what a reference names, once that is known.
        num_objects: those that were looked at.
    """

    document: Json
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    num_objects: int = 0

    def measure(self, schema: Json, open_references: tuple[str, ...]) -> int:
        """How many objects a schema has.

        Raises:
            _NotPlain: too many, or something that is not on the list.
        """
        if isinstance(schema, bool):
            return 0
        if not isinstance(schema, Mapping):
            raise _NotPlain
        self.num_objects += 1
        if self.num_objects > MAX_OBJECTS or len(open_references) > MAX_LEVELS:
            raise _NotPlain
        size = 1 + sum(self._measure_keyword(schema, keyword, open_references) for keyword in schema)
        if size > MAX_OBJECTS:
            raise _NotPlain
        return size

    def _measure_keyword(self, schema: Mapping[str, Json], keyword: str, opened: tuple[str, ...]) -> int:
        value = schema[keyword]
        if keyword in _ANNOTATIONS or (keyword == "format" and value in _FORMATS):
            return 0
        if keyword in _NUMBERS:
            if isinstance(value, int | float) and abs(value) <= MAX_NUMBER:
                return 0
        elif keyword in _SINGLE:
            return self.measure(value, opened)
        elif keyword in _NAMED and isinstance(value, Mapping):
            return sum(self.measure(child, opened) for child in value.values())
        elif keyword in _LISTS and isinstance(value, Sequence) and not isinstance(value, str):
            return sum(self.measure(child, opened) for child in value)
        elif keyword == "$ref" and isinstance(value, str):
            return self._measure_reference(value, opened)
        raise _NotPlain

    def _measure_reference(self, reference: str, opened: tuple[str, ...]) -> int:
        if reference in opened:
            # A schema of lists or trees; one with choices may apply to a value in ever more ways, level by level.
            if any(f'"{keyword}"' in json.dumps(self._find(reference)) for keyword in ("allOf", "anyOf", "oneOf")):
                raise _NotPlain
            return 0
        if reference not in self.sizes:
            self.sizes[reference] = self.measure(self._find(reference), (*opened, reference))
        return self.sizes[reference]

    def _find(self, reference: str) -> Json:
        """What `#`, `#/$defs/NAME` or `#/definitions/NAME` means."""
        found = self.document
        steps = reference.split("/")
        if steps[0] != "#" or len(steps) not in (1, 3) or "~" in reference or "%" in reference:
            raise _NotPlain
        for step in steps[1:]:
            if not isinstance(found, Mapping) or step not in found:
                raise _NotPlain
            found = cast("Mapping[str, Json]", found)[step]
        return found
