"""The error tree of moebeam; errors of libraries are mapped to it by type, where they are caught.

MoebeamError
├── JobError                    stops the job
│   ├── JobFileError            exit 2: job file or command
│   ├── InputPatternError       exit 2: the input matches no file
│   │   └── InputChanged        exit 2: a file of the input changed while it was read
│   ├── OutputError             exit 2: the output cannot be used
│   ├── MissingExtra            exit 2: a package that the job needs is not installed
│   ├── ClusterUnavailable      exit 2: the cluster cannot be reached or started
│   ├── EngineLoadError         exit 1: the model cannot be loaded
│   ├── EngineContractError     exit 1: the engine answered a request twice or without being asked
│   ├── EngineUnavailable       exit 1: no provider of a remote engine can answer now
│   ├── CommitError             exit 1: durable state is missing or contradicts itself
│   ├── TableCommitFailed       exit 1: the run is complete, but a table of a lakehouse did not take it
│   ├── PipelineFailed          exit 1: a step failed on a worker
│   └── JobInterrupted          exit 4: stopped by a signal or a budget, can be resumed
│       └── RunStopped          the same of `run_job`, with what was answered
└── RowError                    a row's problem; becomes a reject, never leaves a stage as an exception
    ├── read      UnreadableFile, UnreadableRowGroup, RowCountMismatch, InvalidLine,
    │             UnsupportedRequest, InvalidId, InvalidValue
    ├── render    TemplateFailed, TemplateBudgetExceeded, NullValue, InvalidMessages,
    │             InvalidSampling, InvalidTools, InvalidResponseFormat, ContextOverflow
    ├── plan      DuplicateId
    ├── run       EngineFailed, EngineCrashed, RequestGivenUp, EngineOverloaded, EngineTimeout, ContentRefused,
    │             RequestRefused, RedirectRefused, MalformedResponse, ResponseTooLarge
    └── validate  AnswerInterrupted, EmptyAnswer, TruncatedAnswer, NotJson, SchemaViolation, ModelRejected,
                  MalformedToolCall, MissingToolCall, ToolArgumentsInvalid
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

Stage = Literal["read", "render", "plan", "run", "validate"]


class MoebeamError(Exception):
    """Any error that moebeam raises on purpose."""

    retryable: ClassVar[bool] = False


class JobError(MoebeamError):
    """A problem that stops the whole job; `account` says what the run had paid by then, by state, as `--json` does."""

    exit_code: ClassVar[int] = 1
    account: Mapping[str, object] | None = None


class JobFileError(JobError):
    """The job file or the command is wrong; nothing was run."""

    exit_code = 2


class InputPatternError(JobError):
    """The input path or pattern names no file that could be read."""

    exit_code = 2


class InputChanged(InputPatternError):
    """A file of the input is no longer what the run began with; rows of two states of a file are never mixed."""


class OutputError(JobError):
    """The output folder cannot be written, or belongs to another job."""

    exit_code = 2


class MissingExtra(JobError):
    """An optional package is missing; the message names the extra of moebeam that installs it."""

    exit_code = 2


class ClusterUnavailable(JobError):
    """The cluster that should run the job cannot be reached or started; nothing was run."""

    exit_code = 2


class EngineLoadError(JobError):
    """The engine's model or tokenizer cannot be loaded."""


class EngineContractError(JobError):
    """The engine returned two completions for a request, or one for a request it never received."""


class EngineUnavailable(JobError):
    """No provider of a remote engine can answer now; unanswered requests are no rejects, the next start sends them."""


class CommitError(JobError):
    """A run's durable state is missing, damaged or inconsistent."""


class FileDamaged(CommitError):
    """A file of a run does not hold what was written."""


class TableCommitFailed(JobError):
    """The run is complete in its folder, but a table of a lakehouse did not take it; resume the run to commit it."""


class PipelineFailed(JobError):
    """A pipeline step failed on a worker; started again, the run continues."""


class JobInterrupted(JobError):
    """A signal or a budget stopped the run; it can be resumed."""

    exit_code = 4


class RunStopped(JobInterrupted):
    """A signal or a budget stopped `run_job`; the same call goes on, and so does `moebeam resume`.

    Attributes:
        answers: the rows answered so far, in the form in which `run_job` returns them.
        summary: what `moebeam run --json` prints of the run; empty if it stopped before anything was asked.
        output: folder of the run.
    """

    def __init__(
        self, message: str, *, answers: Any = None, summary: Mapping[str, object] | None = None, output: str = ""
    ) -> None:
        super().__init__(message)
        self.answers = answers
        self.summary: Mapping[str, object] = summary or {}
        self.output = output


class RowError(MoebeamError):
    """A problem of one row, file or row group; it becomes a row of rejects."""

    error_type: ClassVar[str] = "row_error"
    error_stage: ClassVar[Stage] = "run"


class UnreadableFile(RowError):
    """A file cannot be opened or is not in the declared format."""

    error_type = "unreadable_file"
    error_stage = "read"


class UnreadableRowGroup(RowError):
    """A row group of a readable file cannot be decoded."""

    error_type = "unreadable_row_group"
    error_stage = "read"


class RowCountMismatch(RowError):
    """A row group holds fewer or more rows than its footer says."""

    error_type = "row_count_mismatch"
    error_stage = "read"


class InvalidLine(RowError):
    """A line of a JSONL file is not a JSON object of the expected shape."""

    error_type = "invalid_line"
    error_stage = "read"


class UnsupportedRequest(RowError):
    """A batch request asks for something that moebeam does not support."""

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
    """The prompt template exceeded its budget of loops or output."""

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
    """The response format of a request does not have the documented shape, or its schema is not a JSON Schema."""

    error_type = "invalid_response_format"
    error_stage = "render"


class ContextOverflow(RowError):
    """The prompt plus the requested output exceeds the model's context."""

    error_type = "context_overflow"
    error_stage = "render"


class EngineFailed(RowError):
    """The engine failed on this request."""

    error_type = "engine_failed"


class RequestGivenUp(RowError):
    """The run was stopped while the request was in flight; it is asked again by the next start, never a reject."""

    error_type = "given_up"


class EngineCrashed(RowError):
    """This request kills the engine's process, even when it runs alone."""

    error_type = "engine_crashed"


class InvalidGrammar(RowError):
    """A request's grammar, or the schema it comes from, cannot be compiled or enforced."""

    error_type = "invalid_grammar"


class EngineOverloaded(RowError):
    """The engine or its provider was overloaded and asked to retry later."""

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
    """The provider rejects this request for a parameter, its form or its length."""

    error_type = "request_refused"


class MalformedResponse(RowError):
    """The provider's response is cut off, not JSON, or not of the documented shape."""

    error_type = "malformed_response"
    retryable = True


class ResponseTooLarge(RowError):
    """The provider's response has more bytes than an answer to the request can need."""

    error_type = "response_too_large"
    retryable = True


class RedirectRefused(RowError):
    """The provider sends the request to another address, which the job does not name."""

    error_type = "redirect_refused"


class AnswerInterrupted(RowError):
    """The provider stopped in the middle of an answer, which is billed as far as it got."""

    error_type = "answer_interrupted"
    error_stage = "validate"
    retryable = True


class EmptyAnswer(RowError):
    """The answer is empty or white space where JSON was asked for."""

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
    """The user's pydantic model rejected the answer."""

    error_type = "model_rejected"
    error_stage = "validate"
    retryable = True


class MalformedToolCall(RowError):
    """The answer starts a tool call whose markup cannot be parsed; the message names the character."""

    error_type = "tool_call_malformed"
    error_stage = "validate"
    retryable = True


class MissingToolCall(RowError):
    """The answer calls no tool where one was required, or several where only one was allowed."""

    error_type = "tool_call_missing"
    error_stage = "validate"
    retryable = True


class ToolArgumentsInvalid(RowError):
    """A call names a tool that was not offered, or its arguments break the tool's schema."""

    error_type = "tool_arguments_invalid"
    error_stage = "validate"
    retryable = True


def abbreviate(value: object, max_characters: int = 80) -> str:
    """Format a found value for an error message; long values are cut."""
    text = repr(value)
    return text if len(text) <= max_characters else text[: max_characters - 3] + "..."
