"""Run: sends requests through the engine and yields one completion each.

Part of *answer* (**run** -> validate -> account -> commit); requests come from a shard's plan. Enforces the engine
contract here, once for all engines.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from moebeam.model_runner.encoding.remote_prompts import estimate_output_tokens
from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.errors import EngineContractError, EngineFailed
from moebeam.schemas.records import Completion, Request


def run(requests: Iterable[Request], runner: ModelRunner) -> Iterator[Completion]:
    """Answer requests, in whatever order the engine finishes them.

    A request that the engine never answers becomes a failed completion; nothing is lost.

    Raises:
        EngineContractError: the engine answered a request twice, or one that it was not given.
    """
    pending: dict[str, Request] = {}

    def pulled() -> Iterator[Request]:
        for request in requests:
            pending[request.request_id] = request
            yield request

    for completion in runner.generate(pulled()):
        if completion.request_id not in pending:
            raise EngineContractError(
                f"{type(runner).__name__}: expected one completion a request, "
                f"found another for {completion.request_id!r}, which is not waiting"
            )
        request = pending.pop(completion.request_id)
        yield _with_estimates(completion, request)
    for request_id in pending:
        error = EngineFailed(f"{type(runner).__name__} ended without an answer to this request")
        yield Completion.from_error(request_id, error)


def _with_estimates(completion: Completion, request: Request) -> Completion:
    """The completion with estimates of the tokens that its engine did not count, unless the engine made some."""
    usage = completion.usage
    if usage.is_known:
        return completion
    num_prompt_tokens, num_output_tokens = usage.estimated_prompt_tokens, usage.estimated_completion_tokens
    if num_prompt_tokens is None:
        num_prompt_tokens = request.num_prompt_tokens
    if num_output_tokens is None:
        num_output_tokens = estimate_output_tokens(completion.text, completion.reasoning_content, completion.tool_calls)
    estimated = usage.with_estimates(num_prompt_tokens, num_output_tokens)
    return completion if estimated == usage else replace(completion, usage=estimated)
