"""Repair: turns a failed answer into another request, which says what was wrong.

Part of *answer*, between *validate*, which found the error, and *run*, which is called again within the shard's step.
Each attempt is paid and accounted like the first.
"""

from dataclasses import dataclass, replace

from moebeam.model_runner.encoding.remote_prompts import Encoder
from moebeam.schemas.answers import ValidatedAnswer
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import EmptyAnswer, RowError, TruncatedAnswer
from moebeam.schemas.job.sections import RepairSection
from moebeam.schemas.records import Completion, Message, Request
from moebeam.transforms.render.render_rows import SchemaInPrompt, render_prompts

_WITHOUT_ANSWER = (EmptyAnswer, TruncatedAnswer)
"""Errors whose answers are not shown to the model again: empty, or too long."""


@dataclass(frozen=True, slots=True)
class Repair:
    """Builds the next attempt of a request; see `validate.NextAttempt`."""

    section: RepairSection
    encoder: Encoder
    schema_in_prompt: SchemaInPrompt = "auto"

    def __call__(self, request: Request, answer: ValidatedAnswer, num_asked: int | None = None) -> Request | None:
        """The request that asks again; None if attempts are used up, asking cannot help, or it would not fit.

        Only answers that break their contract are repaired; an engine failure is not the model's mistake.

        Args:
            num_asked: attempts that reached the model, if not all of them did.
        """
        error = answer.error
        if error is None or not error.retryable or error.error_stage != "validate":
            return None
        num_asked = request.attempt if num_asked is None else num_asked
        if num_asked >= self.section.max_attempts or request.messages[-1].role == "assistant":
            return None
        messages = (*request.messages, *_complain(answer.completion, error))
        try:
            (text,) = render_prompts(self.encoder, [(messages, request.options)], self.schema_in_prompt)
            if isinstance(text, RowError):
                # The chat template does not accept such a turn.
                return None
            (token_ids,) = self.encoder.encode_batch([text])
        except RowError:
            return None
        if not self.encoder.fits(int(token_ids.shape[0]), request.sampling.max_tokens):
            return None
        temperature = self.section.temperature
        sampling = request.sampling if temperature is None else replace(request.sampling, temperature=temperature)
        return replace(
            request, prompt_token_ids=token_ids, messages=messages, sampling=sampling, attempt=request.attempt + 1
        )


def _complain(completion: Completion, error: RowError) -> tuple[Message, ...]:
    """Turns that show the model its answer, where that helps, and the error."""
    complaint = f"This answer was not accepted: {error}. Answer the request again, with this put right."
    if isinstance(error, _WITHOUT_ANSWER):
        return (Message("user", f"Your last answer was not accepted: {error}. Answer the request again, briefly."),)
    if not completion.tool_calls:
        return (Message("assistant", completion.text), Message("user", complaint))
    calls: list[Json] = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in completion.tool_calls
    ]
    results = (Message("tool", complaint, {"tool_call_id": call.id}) for call in completion.tool_calls)
    return (Message("assistant", completion.text, {"tool_calls": calls}), *results)
