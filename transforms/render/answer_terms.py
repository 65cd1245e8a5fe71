"""What an answer must keep: the JSON Schema of its text, the tools that it may call and their arguments.

Part of *render*, which refuses a row whose own terms cannot be compiled, and of *answer*, which validates by them and
has them enforced while engines in process decode.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moebeam.schemas.chat_options import ChatOptions, options_of
from moebeam.schemas.contract.answer_schema import AnswerSchema, Formats
from moebeam.schemas.errors import (
    InvalidResponseFormat,
    InvalidTools,
    JobFileError,
    MissingToolCall,
    RowError,
    ToolArgumentsInvalid,
    abbreviated,
)
from moebeam.schemas.records import ToolCall

MAX_COMPILED = 1024
"""Rows' own terms that are kept compiled; rows mostly repeat a few."""


@dataclass(frozen=True, slots=True)
class AnswerTerms:
    """What one kind of request may be answered with, compiled.

    Attributes:
        schema: of the answer's text; None where any text will do.
        arguments: the schema of each tool's arguments, of those that may be called.
    """

    options: ChatOptions
    schema: AnswerSchema | None
    arguments: Mapping[str, AnswerSchema]

    @property
    def has_tools(self) -> bool:
        return bool(self.arguments)

    def check_calls(self, calls: tuple[ToolCall, ...]) -> None:
        """Hold an answer's calls against the tools that were offered.

        Raises:
            MissingToolCall: none where one is demanded, or several where one is allowed.
            ToolArgumentsInvalid: a tool that was not offered, or arguments that break its schema.
        """
        choice = self.options.tool_choice
        if not calls and choice.mode in ("required", "named"):
            wanted = "a tool" if choice.name is None else repr(choice.name)
            raise MissingToolCall(f"expected a call of {wanted}, found none")
        if len(calls) > 1 and not self.options.parallel_tool_calls:
            raise MissingToolCall(f"expected one call (parallel calls are switched off), found {len(calls)}")
        for index, call in enumerate(calls):
            self._check_call(index, call)

    def _check_call(self, index: int, call: ToolCall) -> None:
        schema = self.arguments.get(call.name)
        if schema is None:
            known = ", ".join(self.arguments) or "no tool"
            raise ToolArgumentsInvalid(f"tool_calls[{index}]: expected {known}, found {abbreviated(call.name)}")
        try:
            schema.check(call.arguments)
        except RowError as error:
            raise ToolArgumentsInvalid(f"tool_calls[{index}] {call.name}: {error}") from error


@dataclass(slots=True)
class TermsCache:
    """The terms of a job, and of the rows that bring their own.

    Attributes:
        options: the job's own.
        schema: compiled of the job's own response format; holds the user's pydantic model where there is one.
    """

    options: ChatOptions
    schema: AnswerSchema | None
    formats: Formats = "assert"
    _compiled: dict[str | None, AnswerTerms] = field(default_factory=dict[str | None, AnswerTerms])

    def of(self, options: str | None) -> AnswerTerms:
        """The terms of a planned row.

        Args:
            options: its `options` column; None is the job's own.
        Raises:
            InvalidTools, InvalidResponseFormat: a schema in it cannot be compiled.
        """
        found = self._compiled.get(options)
        if found is None:
            if len(self._compiled) >= MAX_COMPILED:
                self._compiled.clear()
            found = self._compiled[options] = self._compile(self.options if options is None else options_of(options))
        return found

    def _compile(self, options: ChatOptions) -> AnswerTerms:
        arguments: dict[str, AnswerSchema] = {}
        for tool in options.callable_tools:
            try:
                arguments[tool.name] = AnswerSchema.from_json(
                    tool.parameters, formats=self.formats, source=f"tool {tool.name}"
                )
            except JobFileError as error:
                raise InvalidTools(f"parameters: {error}") from error
        return AnswerTerms(options, self._schema_of(options), arguments)

    def _schema_of(self, options: ChatOptions) -> AnswerSchema | None:
        response_format = options.response_format
        if response_format == self.options.response_format and self.schema is not None:
            return self.schema
        match response_format.type:
            case "text":
                return None
            case "json_object":
                return AnswerSchema.from_json({"type": "object"}, formats=self.formats, source="json_object")
            case "json_schema":
                try:
                    return AnswerSchema.from_json(
                        response_format.schema, formats=self.formats, source="response_format"
                    )
                except JobFileError as error:
                    raise InvalidResponseFormat(str(error)) from error
