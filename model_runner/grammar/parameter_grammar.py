"""Writes the grammar of one DSML call's arguments, a parameter each, as raw text or JSON; for `answer_grammar.py`.

An unconstrained string is raw text, an `enum` string one of the listed texts; constrained strings and all other values
are JSON under their own part of the schema. Properties, optional or not, come in the schema's order. Where the schema
is not a plain object, any parameters are admitted and validation decides.

JSON under `string="false"` may hold a string that spells markup, which a JSON grammar cannot exclude; such a call
cannot be parsed, and the answer is rejected with that reason.
"""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import json
import re
from collections.abc import Mapping, Sequence
from typing import cast

from moebeam.model_runner.encoding.deepseek.dsml import DSML, DsmlFormat
from moebeam.model_runner.grammar.json_grammar import enforceable_schema
from moebeam.model_runner.grammar.lark_writer import LarkWriter
from moebeam.schemas.canonical import Json

MAX_ALTERNATIVES = 16
"""Most forms of the arguments that are written out; beyond, any parameters may come."""

_PLAIN_STRING = enforceable_schema({"type": "string"}).document
_ANYTHING: Mapping[str, Json] = {"$ref": "#/$defs/any"}
_MARKUP = re.compile(rf"{DSML}|<｜|</?think>")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_REFERENCE = re.compile(r'"\$ref": ?"#/\$defs/([^"]*)"')


class ParameterWriter:
    """Writes the parameters of one tool's calls."""

    def __init__(self, writer: LarkWriter, style: DsmlFormat, prefix: str) -> None:
        """Begin a call's rules, whose names begin with `prefix`."""
        self._writer = writer
        self._style = style
        self._prefix = prefix
        self._num_rules = 0

    def arguments(self, document: Mapping[str, Json]) -> str:
        """The parameters of a call and what stands between and around them, as the name of a rule.

        Args:
            document: the schema of the arguments, as `enforceable_schema` leaves it.
        """
        definitions = cast("Mapping[str, Mapping[str, Json]]", document.get("$defs", {}))
        options = _options(document, definitions)
        bodies: list[str] = []
        for option in options:
            if option.get("type") != "object" or len(options) > MAX_ALTERNATIVES:
                return self._generic()
            properties = cast("Mapping[str, Json]", option.get("properties", {}))
            if not properties and option.get("additionalProperties") is not False:
                return self._generic()
            bodies.append(self._parameters(option, properties, definitions))
        return self._rule(" | ".join(bodies))

    def _parameters(
        self, option: Mapping[str, Json], properties: Mapping[str, Json], definitions: Mapping[str, Mapping[str, Json]]
    ) -> str:
        required = cast("Sequence[str]", option.get("required", ()))
        parts: list[str] = []
        for name, child in properties.items():
            if child is False:
                continue
            parameter = self._parameter(name, cast("Mapping[str, Json]", child), definitions)
            parts.append(parameter if name in required else f"{parameter}?")
        # Without parameters the line between the tags stays empty.
        empty = self._writer.literal(self._style.between)
        if not parts:
            return empty
        return " ".join(parts) if required else f"({' '.join(parts)} | {empty})"

    def _parameter(self, name: str, child: Mapping[str, Json], definitions: Mapping[str, Mapping[str, Json]]) -> str:
        bodies: list[str] = []
        json_options: list[Json] = []
        raw: list[str] = []
        for option in _options(child, definitions):
            listed = option.get("enum")
            if option == _PLAIN_STRING:
                bodies.append(self._raw(self._style.parameter_begin(name, is_string=True)))
            elif isinstance(listed, Sequence) and not isinstance(listed, str):
                strings = [value for value in listed if isinstance(value, str) and _can_stand_raw(value)]
                others = [value for value in listed if not (isinstance(value, str) and _can_stand_raw(value))]
                raw += strings
                if others:
                    json_options.append({"enum": others})
            elif option == _ANYTHING:
                bodies.append(self._raw(self._style.parameter_begin(name, is_string=True)))
                json_options.append(option)
            else:
                json_options.append(option)
        if raw:
            begin = self._writer.literal(self._style.parameter_begin(name, is_string=True))
            values = " | ".join(f"{self._writer.literal(value)}" if value else '""' for value in raw)
            bodies.append(f"{begin} ({values}) {self._end()}")
        if json_options:
            schema = json_options[0] if len(json_options) == 1 else {"anyOf": json_options}
            begin = self._writer.literal(self._style.parameter_begin(name, is_string=False))
            document = _with_definitions(cast("Mapping[str, Json]", schema), definitions)
            bodies.append(f"{begin} {self._writer.json(document)} {self._end()}")
        return self._rule(" | ".join(bodies))

    def _raw(self, begin: str) -> str:
        text = self._writer.text_without("RAW", DSML)
        end = self._style.parameter_end + self._style.between
        return f"{self._writer.literal(begin)} {self._writer.until('raw', text, end)}"

    def _generic(self) -> str:
        """Any parameters: names without escapes, strings raw or as JSON, everything else JSON."""
        name = self._writer.terminal("NAME", r'/[^"\\<\x00-\x1f\x7f]{1,256}/')
        value = self._writer.rule("any_value", self._writer.json(enforceable_schema({}).document))
        bodies: list[str] = []
        for is_string in (True, False):
            before, after = self._style.parameter_begin("?", is_string=is_string).split("?")
            head = f"{self._writer.literal(before)} {name}"
            bodies.append(
                f"{head} {self._raw(after) if is_string else f'{self._writer.literal(after)} {value} {self._end()}'}"
            )
        parameter = self._writer.rule("any_parameter", " | ".join(bodies))
        return self._writer.rule("any_parameters", f"{parameter}+ | {self._writer.literal(self._style.between)}")

    def _end(self) -> str:
        return self._writer.literal(self._style.parameter_end + self._style.between)

    def _rule(self, body: str) -> str:
        self._num_rules += 1
        return self._writer.rule(f"{self._prefix}_{self._num_rules}", body)


def _options(schema: Mapping[str, Json], definitions: Mapping[str, Mapping[str, Json]]) -> list[Mapping[str, Json]]:
    """The alternatives of a schema, nested ones flattened."""
    if schema == _ANYTHING:
        return [schema]
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return _options(definitions[reference.removeprefix("#/$defs/")], definitions)
    options = schema.get("anyOf")
    if isinstance(options, Sequence) and not isinstance(options, str):
        return [found for option in options for found in _options(cast("Mapping[str, Json]", option), definitions)]
    return [{keyword: value for keyword, value in schema.items() if keyword != "$defs"}]


def _with_definitions(schema: Mapping[str, Json], definitions: Mapping[str, Mapping[str, Json]]) -> Mapping[str, Json]:
    """A part of a schema, with the definitions that it refers to."""
    needed: dict[str, Json] = {}
    waiting = [json.dumps(schema)]
    while waiting:
        for name in _REFERENCE.findall(waiting.pop()):
            if name not in needed:
                needed[name] = definitions[name]
                waiting.append(json.dumps(definitions[name]))
    return {**schema, "$defs": needed} if needed else schema


def _can_stand_raw(text: str) -> bool:
    """Whether `DsmlFormat.render` writes a string raw."""
    return _MARKUP.search(text) is None and not _CONTROL.search(text)
