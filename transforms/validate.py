"""Validate: hold every completion against the output contract.

Stands in the *answer* stage (run -> **validate** -> account -> commit): completions come from `transforms/run.py`,
validated answers go on to `transforms/account.py`. A failed answer stays in the stream with its error, because what
it cost is still to be accounted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from schemas.answer_schema import AnswerSchema
from schemas.errors import ContentRefused, EngineFailed, EngineOverloaded, NotJson, RowError, TruncatedAnswer
from schemas.records import Completion


@dataclass(frozen=True, slots=True)
class ValidatedAnswer:
    """A completion and what became of it.

    Attributes:
        output_json: the answer's JSON as the model wrote it, without the white space around it; None without a
            schema or with an error.
        error: why there is no valid answer; None if there is one.
    """

    completion: Completion
    output_json: str | None
    error: RowError | None


def validate(completions: Iterable[Completion], schema: AnswerSchema | None) -> Iterator[ValidatedAnswer]:
    """Validate completions one by one, lazily and in the order in which they come.

    Without a schema any text is an answer, also an empty or a truncated one; `finish_reason` tells.
    """
    for completion in completions:
        yield validate_completion(completion, schema)


def validate_completion(completion: Completion, schema: AnswerSchema | None) -> ValidatedAnswer:
    """Validate one completion: what the engine reports comes first, then the contract."""
    error = completion.error or _engine_error(completion)
    if error is None and schema is not None:
        try:
            schema.check(completion.text)
        except RowError as found:
            error = _truncated(completion, found) if isinstance(found, NotJson) else found
        else:
            return ValidatedAnswer(completion, completion.text.strip(), None)
    return ValidatedAnswer(completion, None, error)


def _engine_error(completion: Completion) -> RowError | None:
    match completion.finish_reason:
        case "content_filter":
            return ContentRefused("the provider's content filter stopped the answer (finish_reason content_filter)")
        case "insufficient_system_resource":
            return EngineOverloaded("the provider ran out of capacity (finish_reason insufficient_system_resource)")
        case "aborted" | "error":
            return EngineFailed(f"the engine gave up on the answer (finish_reason {completion.finish_reason})")
        case "stop" | "length" | "tool_calls":
            return None


def _truncated(completion: Completion, error: NotJson) -> RowError:
    if completion.finish_reason != "length":
        return error
    return TruncatedAnswer(
        f"max_tokens cut the answer after {completion.usage.completion_tokens} tokens, "
        f"before its JSON was complete: {error}; raise [sampling] max_tokens"
    )
