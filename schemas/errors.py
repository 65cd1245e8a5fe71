"""The error tree of moebeam.

    MoebeamError
    ├── JobError                    stops the job
    │   ├── JobFileError            exit 2: job file or command
    │   ├── InputPatternError       exit 2: the input names nothing
    │   ├── OutputError             exit 2: the output cannot be used
    │   ├── MissingExtra            exit 2: a package that the job needs is not installed
    │   ├── ClusterUnavailable      exit 2: the cluster cannot be reached or started
    │   ├── EngineLoadError         exit 1: the model cannot be loaded
    │   ├── EngineContractError     exit 1: the engine answered what it was not asked
    │   ├── EngineUnavailable       exit 1: no provider of a remote engine can answer anything now
    │   ├── CommitError             exit 1: durable state is missing or contradicts itself
    │   ├── PipelineFailed          exit 1: a step failed on a worker
    │   └── JobInterrupted          exit 4: stopped by a signal, can be resumed
    └── RowError                    a row's problem; becomes a row of rejects, never escapes a stage
        ├── read      UnreadableFile, UnreadableRowGroup, RowCountMismatch, InvalidLine,
        │             UnsupportedRequest, InvalidId, InvalidValue
        ├── render    TemplateFailed, TemplateBudgetExceeded, NullValue, InvalidMessages,
        │             InvalidSampling, InvalidTools, InvalidResponseFormat, ContextOverflow
        ├── plan      DuplicateId
        ├── run       EngineFailed, EngineCrashed, EngineOverloaded, EngineTimeout, ContentRefused,
        │             RequestRefused, MalformedResponse
        └── validate  AnswerInterrupted, EmptyAnswer, TruncatedAnswer, NotJson, SchemaViolation, ModelRejected,
                      MalformedToolCall, MissingToolCall, ToolArgumentsInvalid

Third-party errors are mapped onto this tree where they are caught, by type.
"""

from typing import ClassVar, Literal

Stage = Literal["read", "render", "plan", "run", "validate"]


class MoebeamError(Exception):
    """Any error that moebeam raises on purpose."""

    retryable: ClassVar[bool] = False


class JobError(MoebeamError):
    """A problem that stops the whole job."""

    exit_code: ClassVar[int] = 1


class JobFileError(JobError):
    """The job file or the command is wrong; nothing was run."""

    exit_code = 2


class InputPatternError(JobError):
    """The input path or pattern names no file that could be read."""

    exit_code = 2


class OutputError(JobError):
    """The output folder cannot be written, or belongs to another job."""

    exit_code = 2


class MissingExtra(JobError):
    """A package that is installed only on request is missing; says which extra of moebeam brings it."""

    exit_code = 2


class ClusterUnavailable(JobError):
    """The cluster that is to run the job cannot be reached, or cannot be started; nothing was run."""

    exit_code = 2


class EngineLoadError(JobError):
    """The engine's model or tokenizer cannot be loaded."""


class EngineContractError(JobError):
    """The engine gave a second completion for a request, or one for a request that it never got."""


class EngineUnavailable(JobError):
    """No provider of a remote engine can answer anything now: key, balance or address are wrong, or all is down.

    What was not answered stays unanswered, to be asked when the run is started again; it does not become rejects.
    """


class CommitError(JobError):
    """Durable state of a run is missing, damaged or contradicts itself."""


class PipelineFailed(JobError):
    """A step of the pipeline failed on a worker; the run can be started again and continues."""


class JobInterrupted(JobError):
    """A signal or a budget stopped the run in a state that can be resumed."""

    exit_code = 4


class RowError(MoebeamError):
    """A problem of one row (or of one file or row group); it becomes a row of rejects."""

    error_type: ClassVar[str] = "row_error"
    error_stage: ClassVar[Stage] = "run"


class UnreadableFile(RowError):
    """A file could not be opened or is not of the declared format."""

    error_type = "unreadable_file"
    error_stage = "read"


class UnreadableRowGroup(RowError):
    """A row group of a readable file could not be decoded."""

    error_type = "unreadable_row_group"
    error_stage = "read"


class RowCountMismatch(RowError):
    """A row group held fewer or more rows than its footer promised."""

    error_type = "row_count_mismatch"
    error_stage = "read"


class InvalidLine(RowError):
    """A line of a JSONL file is not a JSON object of the expected shape."""

    error_type = "invalid_line"
    error_stage = "read"


class UnsupportedRequest(RowError):
    """A batch request asks for something that moebeam does not do."""

    error_type = "unsupported_request"
    error_stage = "read"


class InvalidId(RowError):
    """The id column of a row is null, empty or not a scalar."""

    error_type = "invalid_id"
    error_stage = "read"


class DuplicateId(RowError):
    """An earlier row of the input has the same id."""

    error_type = "duplicate_id"
    error_stage = "plan"


class InvalidValue(RowError):
    """A column value cannot be decoded, for example text that is not UTF-8."""

    error_type = "invalid_value"
    error_stage = "read"


class TemplateFailed(RowError):
    """The prompt template raised on a row."""

    error_type = "template_failed"
    error_stage = "render"


class TemplateBudgetExceeded(RowError):
    """The prompt template looped or grew past its budget."""

    error_type = "template_budget_exceeded"
    error_stage = "render"


class NullValue(RowError):
    """The prompt template printed a column that is null on this row."""

    error_type = "null_value"
    error_stage = "render"


class InvalidMessages(RowError):
    """The messages of a row do not have the chat shape."""

    error_type = "invalid_messages"
    error_stage = "render"


class InvalidSampling(RowError):
    """A row's own sampling values are out of range."""

    error_type = "invalid_sampling"
    error_stage = "render"


class InvalidTools(RowError):
    """The tools of a request, or its choice among them, do not have the documented shape."""

    error_type = "invalid_tools"
    error_stage = "render"


class InvalidResponseFormat(RowError):
    """The response format of a request does not have the documented shape, or its schema is none."""

    error_type = "invalid_response_format"
    error_stage = "render"


class ContextOverflow(RowError):
    """Prompt and requested output together exceed the model's context."""

    error_type = "context_overflow"
    error_stage = "render"


class EngineFailed(RowError):
    """The engine failed on this request."""

    error_type = "engine_failed"


class EngineCrashed(RowError):
    """The engine's process dies over this request, also when it is the only one."""

    error_type = "engine_crashed"


class InvalidGrammar(RowError):
    """A request's grammar, or the schema that it is made from, cannot be compiled or enforced."""

    error_type = "invalid_grammar"


class EngineOverloaded(RowError):
    """The engine or its provider asked to come back later."""

    error_type = "engine_overloaded"
    retryable = True


class EngineTimeout(RowError):
    """The engine did not answer in time."""

    error_type = "engine_timeout"
    retryable = True


class ContentRefused(RowError):
    """The provider's content filter refused the request or the answer."""

    error_type = "refused"


class RequestRefused(RowError):
    """The provider does not take this request: a parameter, its form or its length."""

    error_type = "request_refused"


class MalformedResponse(RowError):
    """The provider's response is cut off, not JSON, or not of the documented shape."""

    error_type = "malformed_response"
    retryable = True


class AnswerInterrupted(RowError):
    """The provider gave up in the middle of an answer, which is paid as far as it got."""

    error_type = "answer_interrupted"
    error_stage = "validate"
    retryable = True


class EmptyAnswer(RowError):
    """The answer holds nothing but white space where JSON was asked for."""

    error_type = "empty"
    error_stage = "validate"
    retryable = True


class TruncatedAnswer(RowError):
    """`max_tokens` cut the answer before its JSON was complete."""

    error_type = "truncated"
    error_stage = "validate"
    retryable = True


class NotJson(RowError):
    """The answer is not JSON."""

    error_type = "not_json"
    error_stage = "validate"
    retryable = True


class SchemaViolation(RowError):
    """The answer is JSON but breaks the output schema."""

    error_type = "schema_violation"
    error_stage = "validate"
    retryable = True


class ModelRejected(RowError):
    """The user's pydantic model refused the answer."""

    error_type = "model_rejected"
    error_stage = "validate"
    retryable = True


class MalformedToolCall(RowError):
    """The answer begins to call a tool, but its markup cannot be read; says at which character."""

    error_type = "tool_call_malformed"
    error_stage = "validate"
    retryable = True


class MissingToolCall(RowError):
    """The answer calls no tool where one had to be called, or more than one where only one may be."""

    error_type = "tool_call_missing"
    error_stage = "validate"
    retryable = True


class ToolArgumentsInvalid(RowError):
    """A call names a tool that was not offered, or its arguments break the tool's schema."""

    error_type = "tool_arguments_invalid"
    error_stage = "validate"
    retryable = True


def abbreviated(value: object, max_characters: int = 80) -> str:
    """How a value that was found is shown in an error message: never the whole of a long one."""
    text = repr(value)
    return text if len(text) <= max_characters else text[: max_characters - 3] + "..."
