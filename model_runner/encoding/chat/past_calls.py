"""Calls of earlier turns, as rows bring them: OpenAI's objects or bare functions, arguments as JSON text or objects.

Endpoints take OpenAI's form with text. Chat templates read text or objects; `template_forms.py` finds out which.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from moebeam.model_runner.encoding.chat.strict_arguments import parse_object
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import InvalidMessages, NotJson

ArgumentsForm: TypeAlias = Literal["given", "text", "object"]
"""How arguments are wanted; `given`: as the row has them."""


def convert_calls(value: Json, form: ArgumentsForm, where: str) -> Json:
    """A message's `tool_calls` in OpenAI's form, with their arguments in one form.

    What is no list of calls is left as it is.

    Args:
        where: names the list in error messages.
    Raises:
        InvalidMessages: text that is no JSON object, where an object is wanted.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    return [_convert_call(call, form, f"{where}[{index}]") for index, call in enumerate(value)]


def is_left_out(arguments: Json) -> bool:
    """Whether a call has no arguments at all, as null or as blank text: that of a function that takes none."""
    return arguments is None or (isinstance(arguments, str) and not arguments.strip())


def _convert_call(call: Json, form: ArgumentsForm, where: str) -> Json:
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    if function is None and "name" in call:
        names = ("name", "arguments")
        function = {name: call[name] for name in names if name in call}
        call = {"type": "function", **{key: item for key, item in call.items() if key not in names}}
    if not isinstance(function, Mapping):
        return call
    return {**call, "function": {**function, "arguments": _convert_arguments(function.get("arguments"), form, where)}}


def _convert_arguments(arguments: Json, form: ArgumentsForm, where: str) -> Json:
    if is_left_out(arguments):
        arguments = "{}" if isinstance(arguments, str) or form == "text" else {}
    match form:
        case "text" if not isinstance(arguments, str):
            return json.dumps(arguments, ensure_ascii=False)
        case "object" if isinstance(arguments, str):
            try:
                return parse_object(arguments)
            except NotJson as error:
                raise InvalidMessages(f"{where}.arguments: expected a JSON object, found: {error}") from error
        case _:
            return arguments
