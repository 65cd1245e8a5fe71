"""Validate: hold every completion against the output contract.

Stands in the *answer* stage (run -> **validate** -> account -> commit): completions come from
`transforms/answer/run.py`, validated answers go on to `transforms/money/account.py`. A failed answer stays in the
stream with its error, because what it cost is still to be accounted; where `transforms/answer/repair.py` has another
request for it, it is asked again.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeAlias

from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.answers import ValidatedAnswer
from moebeam.schemas.contract.answer_wrappings import split_think, strip_fence
from moebeam.schemas.contract.strict_json import keep_last_keys
from moebeam.schemas.errors import (
    ContentRefused,
    EmptyAnswer,
    EngineFailed,
    EngineOverloaded,
    MalformedToolCall,
    NotJson,
    RowError,
    ToolArgumentsInvalid,
    TruncatedAnswer,
)
from moebeam.schemas.records import Completion, Request
from moebeam.transforms.answer.run import run
from moebeam.transforms.render.answer_terms import AnswerTerms

NextAttempt: TypeAlias = Callable[[Request, ValidatedAnswer], Request | None]


def answer_and_validate(
    requests: Iterable[Request],
    runner: ModelRunner,
    terms_of: Callable[[str], AnswerTerms],
    ask_again: NextAttempt | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[ValidatedAnswer]:
    """Answer requests and validate what comes, each attempt as soon as it is done.

    Without a schema any text is an answer, even an empty or truncated one (see `finish_reason`). Failed requests are
    asked again once all others are done, so at most a shard's failures are held in memory.

    Args:
        terms_of: what a request, by its id, is to be answered with.
        ask_again: the next attempt of a failed request, or None where there is none.
        pause: called before failed requests are asked again.
    """
    waiting: Iterable[Request] = requests
    while True:
        asked: dict[str, Request] = {}
        again: list[Request] = []
        for completion in run(_record_asked(waiting, asked), runner):
            request = asked.pop(completion.request_id)
            answer = validate_completion(completion, terms_of(request.request_id))
            following = ask_again(request, answer) if ask_again is not None and answer.error is not None else None
            if following is not None:
                again.append(following)
            yield replace(answer, attempt=request.attempt, is_last=following is None)
        if not again:
            return
        pause()
        waiting = again


def _record_asked(requests: Iterable[Request], asked: dict[str, Request]) -> Iterator[Request]:
    for request in requests:
        asked[request.request_id] = request
        yield request


def validate_completion(completion: Completion, terms: AnswerTerms) -> ValidatedAnswer:
    """Validate one completion: what the engine reports comes first, then tool calls, then the text.

    An answer that calls tools is a turn of its own: its text need not keep the schema. JSON may stand in a Markdown
    fence; `output_json` is what is inside.
    """
    try:
        if (error := completion.error or _engine_error(completion)) is not None:
            raise error
        completion = _unwrap(completion, terms)
        terms.check_calls(completion.tool_calls)
        if completion.tool_calls or terms.schema is None:
            return ValidatedAnswer(completion, None, None)
        text = strip_fence(completion.text)
        value = terms.schema.check(text)
    except RowError as found:
        return ValidatedAnswer(completion, None, _explain_truncation(completion, found))
    return ValidatedAnswer(completion, keep_last_keys(text.strip(), value), None, value)


def _unwrap(completion: Completion, terms: AnswerTerms) -> Completion:
    """The completion with its reasoning apart from its text, and with arguments for tools that need none.

    A think block in the text is reasoning if the job asks for reasoning or for JSON and the engine gave no reasoning of
    its own; in plain text it stays text.
    """
    calls = terms.fill_arguments(completion.tool_calls)
    if calls != completion.tool_calls:
        completion = replace(completion, tool_calls=calls)
    if completion.reasoning_content is None and (terms.schema is not None or terms.asks_for_reasoning):
        parts = split_think(completion.text, is_cut=completion.finish_reason == "length")
        if parts is not None:
            return replace(completion, reasoning_content=parts[0] or None, text=parts[1])
    return completion


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


_CUT_SHORT = (NotJson, EmptyAnswer, MalformedToolCall, ToolArgumentsInvalid)
"""What an answer looks like whose end is missing."""


def _explain_truncation(completion: Completion, error: RowError) -> RowError:
    if completion.finish_reason != "length" or not isinstance(error, _CUT_SHORT):
        return error
    num_tokens = completion.usage.completion_tokens
    after = "" if num_tokens is None else f" after {num_tokens} tokens"
    return TruncatedAnswer(
        f"max_tokens cut the answer{after}, before it was complete: {error}; raise [sampling] max_tokens"
    )
