"""Run: sends requests through the engine and yields one completion each.

Part of *answer* (**run** -> validate -> account -> commit); requests come from a shard's plan. Enforces the engine
contract here, once for all engines.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.errors import EngineContractError, EngineFailed
from moebeam.schemas.records import NOTHING_USED, Completion, Request


def run(requests: Iterable[Request], runner: ModelRunner) -> Iterator[Completion]:
    """Answer requests, in whatever order the engine finishes them.

    A request that the engine never answers becomes a failed completion; nothing is lost.

    Raises:
        EngineContractError: the engine answered a request twice, or one that it was not given.
    """
    pending: dict[str, None] = {}

    def pulled() -> Iterator[Request]:
        for request in requests:
            pending[request.request_id] = None
            yield request

    for completion in runner.generate(pulled()):
        if completion.request_id not in pending:
            raise EngineContractError(
                f"{type(runner).__name__}: expected one completion a request, "
                f"found another for {completion.request_id!r}, which is not waiting"
            )
        del pending[completion.request_id]
        yield _with_sound_usage(completion)
    for request_id in pending:
        error = EngineFailed(f"{type(runner).__name__} ended without an answer to this request")
        yield Completion.from_error(request_id, error)


def _with_sound_usage(completion: Completion) -> Completion:
    """Turn a completion whose token counts contradict each other into a failure: its cost cannot be known."""
    usage = completion.usage
    is_sound = 0 <= (usage.cached_tokens or 0) <= usage.prompt_tokens and (
        0 <= usage.reasoning_tokens <= usage.completion_tokens
    )
    if is_sound:
        return completion
    error = EngineFailed(f"expected cached <= prompt and reasoning <= completion tokens, found {usage}")
    return replace(completion, usage=NOTHING_USED, error=error, finish_reason="error")
