"""Reasoning efforts: the prompt text that each encoder uses for them, read from a checkpoint's own encoder.

DeepSeek publishes a model's encoder as a Python file beside its weights, and the texts of `high` and `max` differ from
one to the next. The file is never imported or run: only the literals of a few named constants are read from its syntax
tree. Where a job names an encoding and the checkpoint has no such file, the profile of the release is used.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar, cast

from moebeam.model_runner.checkpoint.files import read_checkpoint_file
from moebeam.schemas.errors import EngineLoadError, InvalidMessages, abbreviate
from moebeam.schemas.store import storage

_NUMBER = "{budget}"
_DEFAULT = "DEFAULT_REASONING_EFFORT"
_Value = TypeVar("_Value", str, int)


@dataclass(frozen=True, slots=True)
class EffortProfile:
    """The text that an encoder puts at the head of a prompt, by effort.

    Attributes:
        texts: by the encoder's own names; an empty text where the model does that anyway.
        default: the name where a request has none; None for no text.
        aliases: DeepSeek's API names that are not the encoder's, and what they mean (facts: April 2026 for the release,
            now for the later ones).
        numbers: a text with `{budget}`, where efforts may also be numbers from 1 to 100.
    """

    texts: Mapping[str, str]
    default: str | None = None
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(dict[str, str]()))
    numbers: str | None = None

    def find_text(self, effort: str | None) -> str:
        """The text for an effort as a request names it.

        Raises:
            InvalidMessages: the encoder does not know it.
        """
        name = effort if effort is not None else self.default
        if name is None:
            return ""
        name = self.aliases.get(name, name)
        if name in self.texts:
            return self.texts[name]
        if self.numbers and name.isascii() and name.isdecimal() and 1 <= int(name[:4]) <= 100:
            return self.numbers.replace(_NUMBER, str(int(name)))
        known = [*self.texts, *self.aliases, *(["1 to 100"] if self.numbers else [])]
        raise InvalidMessages(
            f"reasoning_effort: expected one that the model's encoder knows ({', '.join(known) or 'it knows none'}), "
            f"found {abbreviate(effort)}"
        )


NO_EFFORTS = EffortProfile({})

_THOROUGH = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)

V4_RELEASE = EffortProfile(
    texts={"high": "", "max": _THOROUGH}, aliases={"low": "high", "medium": "high", "xhigh": "max"}
)
_LATER_ALIASES = {"minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"}

_V4_1_TEXT = "Reasoning Effort: {budget} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
V4_1_RELEASE = EffortProfile(
    texts={
        name: _V4_1_TEXT.replace(_NUMBER, str(number)) for name, number in (("low", 50), ("high", 75), ("max", 100))
    },
    default="high",
    aliases=_LATER_ALIASES,
    numbers=_V4_1_TEXT,
)


def read_v4_efforts(path: str, file: str) -> EffortProfile:
    """The efforts of a V4 encoder: at release one text for `max`, later a text for each of low, high and max.

    Raises:
        EngineLoadError: the file is no Python, or a constant is not the literal that it should be.
    """
    constants = read_constants(path, file, ("REASONING_EFFORT_MAX", "REASONING_EFFORT_PROMPTS", _DEFAULT))
    where = storage.join(path, file)
    if "REASONING_EFFORT_PROMPTS" in constants:
        texts = _expect_mapping(constants["REASONING_EFFORT_PROMPTS"], str, f"{where}: REASONING_EFFORT_PROMPTS")
        return EffortProfile(texts, _expect_default(constants, texts, where), _aliases_for(texts))
    if "REASONING_EFFORT_MAX" in constants:
        text = _expect(constants["REASONING_EFFORT_MAX"], str, f"{where}: REASONING_EFFORT_MAX")
        return EffortProfile({"high": "", "max": text}, aliases=V4_RELEASE.aliases)
    return NO_EFFORTS


def read_v4_1_efforts(path: str, file: str) -> EffortProfile:
    """The efforts of a V4.1 encoder: a number for each name, and the text that the number stands in.

    Raises:
        EngineLoadError: the file is no Python, or a constant is not the literal that it should be.
    """
    constants = read_constants(path, file, ("REASONING_EFFORT_TEMPLATE", "REASONING_EFFORT_MAPPINGS", _DEFAULT))
    where = storage.join(path, file)
    if "REASONING_EFFORT_TEMPLATE" not in constants:
        return NO_EFFORTS
    template = _expect(constants["REASONING_EFFORT_TEMPLATE"], str, f"{where}: REASONING_EFFORT_TEMPLATE")
    found = constants.get("REASONING_EFFORT_MAPPINGS", dict[str, int]())
    numbers = _expect_mapping(found, int, f"{where}: REASONING_EFFORT_MAPPINGS")
    texts = {name: template.replace(_NUMBER, str(number)) for name, number in numbers.items()}
    return EffortProfile(texts, _expect_default(constants, texts, where), _aliases_for(texts), template)


def read_constants(path: str, file: str, names: tuple[str, ...]) -> dict[str, object]:
    """The literals of module-level constants of a Python file, which is parsed and never run.

    Raises:
        EngineLoadError: it cannot be read, is no Python, or one of the constants is no literal.
    """
    where = storage.join(path, file)
    try:
        tree = ast.parse(read_checkpoint_file(path, file), where)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise EngineLoadError(f"{where}: expected the Python source of a prompt encoder, found: {error}") from error
    constants: dict[str, object] = {}
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value: object = getattr(statement, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and target.id in names and isinstance(value, ast.expr):
                try:
                    constants[target.id] = cast("object", ast.literal_eval(value))
                except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
                    raise EngineLoadError(f"{where}: {target.id}: expected a literal, found: {error}") from error
    return constants


def _aliases_for(texts: Mapping[str, str]) -> Mapping[str, str]:
    return {alias: name for alias, name in _LATER_ALIASES.items() if alias not in texts and name in texts}


def _expect(value: object, kind: type[str], where: str) -> str:
    if not isinstance(value, kind):
        raise EngineLoadError(f"{where}: expected {kind.__name__}, found {abbreviate(value)}")
    return value


def _expect_mapping(value: object, kind: type[_Value], where: str) -> dict[str, _Value]:
    items = cast("dict[object, object]", value).items() if isinstance(value, dict) else None
    if items is None or not all(isinstance(key, str) and isinstance(item, kind) for key, item in items):
        raise EngineLoadError(f"{where}: expected {kind.__name__} by name, found {abbreviate(value)}")
    return cast("dict[str, _Value]", value)


def _expect_default(constants: Mapping[str, object], texts: Mapping[str, str], where: str) -> str | None:
    default = constants.get(_DEFAULT)
    if default is not None and not (isinstance(default, str) and default in texts):
        known = ", ".join(texts)
        raise EngineLoadError(f"{where}: {_DEFAULT}: expected one of {known}, found {abbreviate(default)}")
    return default
