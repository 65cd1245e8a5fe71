"""Why an answer ended, in providers' own words, mapped to OpenAI's.

Below `responses.py`. The list is open: a word that is not here ends an answer like any other, because the answer came
whole and was paid; `is_known_reason` lets the engine count and log it.
"""

from collections.abc import Mapping

from moebeam.schemas.records import FinishReason

_WORDS: Mapping[FinishReason, tuple[str, ...]] = {
    "stop": ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "end", "complete", "completed"),
    "length": (
        "length",
        "max_tokens",
        "max_output_tokens",
        "max_length",
        "model_length",
        "token_limit",
        "model_context_window_exceeded",
    ),
    "tool_calls": ("tool_calls", "tool_call", "tool_use", "function_call"),
    "content_filter": (
        "content_filter",
        "content_filtered",
        "safety",
        "sensitive",
        "refusal",
        "recitation",
        "blocklist",
        "prohibited_content",
        "spii",
        "guardrail_intervened",
    ),
    "insufficient_system_resource": ("insufficient_system_resource",),
    # The provider gave up on the answer, which may be asked for again.
    "aborted": ("abort", "aborted", "cancelled", "canceled", "error", "network_error"),
}
_REASONS: Mapping[str, FinishReason] = {word: reason for reason, words in _WORDS.items() for word in words}


def map_finish_reason(word: str | None, *, has_calls: bool) -> FinishReason:
    """The reason that a provider's word stands for, in any case of letters.

    Args:
        word: None or empty where a whole answer, or a stream up to its `[DONE]`, names none.
        has_calls: whether the answer calls tools, which decides where the word says nothing.
    """
    return _REASONS.get(_fold(word)) or ("tool_calls" if has_calls else "stop")


def is_known_reason(word: str | None) -> bool:
    """Whether a word, or its absence, has a known meaning."""
    return not _fold(word) or _fold(word) in _REASONS


def _fold(word: str | None) -> str:
    return (word or "").strip().lower().removeprefix("finish_reason_")
