"""The part of `chat_template.py` that runs behind the fence: a checkpoint's Jinja template, compiled and rendered.

The environment is the one that Hugging Face documents. It has no limits of its own; those of the fence hold.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from moebeam.model_runner.fence.limits import MAX_PROMPT_CHARACTERS
from moebeam.schemas.errors import EngineLoadError, InvalidMessages, TemplateBudgetExceeded

ENTRY = "moebeam.model_runner.encoding.chat_program:compile_chat_templates"

Chat: TypeAlias = "tuple[bool, Sequence[Mapping[str, Any]], Mapping[str, Any]]"
"""Whether the template for tools is meant, the messages, and all other variables."""


def compile_chat_templates(sources: tuple[str, str | None]) -> Callable[[Chat], str]:
    """What renders a chat with the default template, or with the one for tools where there is one.

    Raises:
        EngineLoadError: a source is no Jinja.
    """
    environment = _build_environment()
    try:
        templates = [environment.from_string(source) for source in sources if source is not None]
    except Exception as error:  # beside Jinja's errors Python's, as for blocks nested too deep
        raise EngineLoadError(f"expected a Jinja chat template, found: {error}") from error

    def render(chat: Chat) -> str:
        has_tools, messages, variables = chat
        return _render(templates[-1] if has_tools else templates[0], messages, variables)

    return render


def _render(template: jinja2.Template, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    try:
        prompt = template.render(messages=messages, **variables)
    except MemoryError:
        raise
    except RecursionError as error:
        raise TemplateBudgetExceeded("the chat template calls itself without end") from error
    except jinja2.TemplateError as error:
        raise InvalidMessages(f"the chat template refused the messages: {error}") from error
    except Exception as error:
        # A template is foreign code: a chat that it did not expect may raise anything.
        raise InvalidMessages(f"the chat template failed: {type(error).__name__}: {error}") from error
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise TemplateBudgetExceeded(
            f"the chat template: expected at most {MAX_PROMPT_CHARACTERS} characters, found {len(prompt)}"
        )
    return prompt


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks answers for training; a prompt keeps the body as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as a plain set

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _build_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    functions = cast("dict[str, Any]", environment.globals)
    functions["raise_exception"] = _raise_exception
    functions["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    # UTC, because workers of one job may run in different time zones.
    return datetime.now(UTC).strftime(pattern)
