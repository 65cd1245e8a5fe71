"""Completions of what one provider answered, alone or in a batch, or did not answer."""

from collections.abc import Sequence
from datetime import datetime

from moebeam.model_runner.encoding.remote_prompts import estimate_output_tokens
from moebeam.model_runner.openai_engine.client import EndpointSpec
from moebeam.model_runner.openai_engine.responses import Answer
from moebeam.schemas.errors import RowError
from moebeam.schemas.prices import PriceMode, find_tier_mode
from moebeam.schemas.records import Completion, LostCall


def to_completion(
    request_id: str,
    answer: Answer,
    spec: EndpointSpec,
    revision: str,
    *,
    started_at: datetime,
    latency_ms: float,
    lost_calls: Sequence[LostCall] = (),
    price_mode: PriceMode = "online",
    num_prompt_tokens: int | None = None,
) -> Completion:
    """The completion of an answer.

    Args:
        revision: of the model, where the provider names neither a model nor a fingerprint of its own.
        price_mode: as the request was sent; the tier in which the provider says that it answered wins.
        num_prompt_tokens: of the request, counted or estimated here; stands in where the provider does not say.
    """
    if price_mode != "batch" and answer.service_tier is not None:
        price_mode = find_tier_mode(answer.service_tier)
    usage = answer.usage
    if not usage.is_known:
        num_output_tokens = estimate_output_tokens(answer.text, answer.reasoning_content, answer.tool_calls)
        usage = usage.with_estimates(num_prompt_tokens, num_output_tokens)
    # Prices are looked up by the name that was asked for; what stood behind it belongs to the revision.
    served = [answer.model if answer.model != spec.model else "", answer.fingerprint]
    return Completion(
        request_id=request_id,
        text=answer.text,
        finish_reason=answer.finish_reason,
        usage=usage,
        started_at=started_at,
        latency_ms=latency_ms,
        provider=spec.profile.name,
        model=spec.model,
        model_revision=" ".join(filter(None, served)) or revision,
        reasoning_content=answer.reasoning_content,
        tool_calls=answer.tool_calls,
        logprobs=answer.logprobs,
        top_logprobs=answer.top_logprobs,
        error=answer.error,
        lost_calls=tuple(lost_calls),
        price_mode=price_mode,
        provider_finish_reason=answer.provider_finish_reason,
    )


def to_failed_completion(
    request_id: str,
    error: RowError,
    spec: EndpointSpec,
    *,
    started_at: datetime,
    latency_ms: float,
    lost_calls: Sequence[LostCall] = (),
) -> Completion:
    """The completion of a request that has no answer from here."""
    return Completion.from_error(
        request_id,
        error,
        started_at=started_at,
        latency_ms=latency_ms,
        provider=spec.profile.name,
        model=spec.model,
        lost_calls=tuple(lost_calls),
    )
