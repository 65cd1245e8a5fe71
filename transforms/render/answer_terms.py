"""An answer's terms: the JSON Schema of its text, the tools that it may call, and their arguments.

Part of *render*, which rejects rows whose own terms do not compile, and of *answer*, which validates against them and
has in-process engines decode under them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moebeam.model_runner.fence.fenced_schema import RowSchema, load_schema
from moebeam.model_runner.fence.limits import MAX_CPU_S
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import ChatOptions, parse_options_json
from moebeam.schemas.contract.answer_schema import AnswerSchema, Formats
from moebeam.schemas.errors import (
    InvalidResponseFormat,
    InvalidTools,
    JobFileError,
    MissingToolCall,
    RowError,
    ToolArgumentsInvalid,
    abbreviate,
)
from moebeam.schemas.records import ToolCall

MAX_COMPILED = 1024
"""Most rows' own terms that are kept compiled; rows mostly repeat a few."""

MAX_COMPILED_CHARACTERS = 4 << 20
"""Most characters of those, as JSON: compiled, each takes some 70 bytes."""


@dataclass(frozen=True, slots=True)
class AnswerTerms:
    """Compiled terms of one kind of request.

    Attributes:
        schema: of the answer's text; None if any text is allowed.
        arguments: tool name -> schema of its arguments, for tools that may be called.
    """

    options: ChatOptions
    schema: RowSchema | None
    arguments: Mapping[str, RowSchema]

    @property
    def has_tools(self) -> bool:
        return bool(self.arguments)

    @property
    def asks_for_reasoning(self) -> bool:
        """Whether the job or the row switches thinking on."""
        options = self.options
        return not options.is_thinking_off and (options.thinking is True or options.reasoning_effort is not None)

    def fill_arguments(self, calls: tuple[ToolCall, ...]) -> tuple[ToolCall, ...]:
        """Calls with `{}` for empty arguments, where the tool needs none."""
        return tuple(
            replace(call, arguments="{}") if not call.arguments.strip() and self._takes_nothing(call.name) else call
            for call in calls
        )

    def _takes_nothing(self, name: str) -> bool:
        schema = self.arguments.get(name)
        try:
            return schema is not None and schema.check("{}") == {}
        except RowError:
            return False

    def check_calls(self, calls: tuple[ToolCall, ...]) -> None:
        """Check an answer's calls against the offered tools.

        Raises:
            MissingToolCall: no call where one is required, or several where one is allowed.
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
            raise ToolArgumentsInvalid(f"tool_calls[{index}]: expected {known}, found {abbreviate(call.name)}")
        try:
            schema.check(call.arguments)
        except RowError as error:
            raise ToolArgumentsInvalid(f"tool_calls[{index}] {call.name}: {error}") from error


@dataclass(slots=True)
class TermsCache:
    """Terms of a job, and of rows that bring their own.

    Attributes:
        options: the job's own.
        schema: compiled from the job's response format; holds the user's pydantic model, if any.
        max_cpu_s: processor time that a schema which a row brings may take, to compile it or to check an answer.
    """

    options: ChatOptions
    schema: AnswerSchema | None
    formats: Formats = "assert"
    max_cpu_s: float = MAX_CPU_S
    _compiled: "dict[str | None, AnswerTerms | RowError]" = field(
        default_factory=dict["str | None", "AnswerTerms | RowError"]
    )
    _num_characters: int = 0

    def find(self, options: str | None) -> AnswerTerms:
        """Terms of a planned row.

        Args:
            options: its `options` column; None means the job's own.
        Raises:
            InvalidTools, InvalidResponseFormat: a schema in it does not compile, or takes too much.
        """
        found = self._compiled.get(options)
        if found is None:
            self._make_room(len(options or ""))
            # What took too long once is not tried for each row that brings it.
            found = self._compiled[options] = self._try_to_compile(options)
        if isinstance(found, RowError):
            raise type(found)(str(found))
        return found

    def _make_room(self, num_characters: int) -> None:
        self._num_characters += num_characters
        if len(self._compiled) >= MAX_COMPILED or self._num_characters > MAX_COMPILED_CHARACTERS:
            self._compiled.clear()
            self._num_characters = num_characters

    def _try_to_compile(self, options: str | None) -> AnswerTerms | RowError:
        try:
            return self._compile(self.options if options is None else parse_options_json(options))
        except RowError as error:
            return error

    def _compile(self, options: ChatOptions) -> AnswerTerms:
        arguments: dict[str, RowSchema] = {}
        for tool in options.callable_tools:
            try:
                arguments[tool.name] = self._load(tool.parameters, f"tool {tool.name}")
            except JobFileError as error:
                raise InvalidTools(f"parameters: {error}") from error
        return AnswerTerms(options, self._compile_schema(options), arguments)

    def _load(self, schema: Json, source: str) -> RowSchema:
        return load_schema(schema, formats=self.formats, source=source, max_cpu_s=self.max_cpu_s)

    def _compile_schema(self, options: ChatOptions) -> RowSchema | None:
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
                    return self._load(response_format.schema, "response_format")
                except JobFileError as error:
                    raise InvalidResponseFormat(str(error)) from error
