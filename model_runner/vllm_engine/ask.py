"""What is sent to vLLM's worker of one request."""

import hashlib
from collections.abc import Iterable

from moebeam.model_runner.seeds import derive_seed
from moebeam.schemas.records import Request


def build_ask(
    request: Request, end_token_ids: Iterable[int], *, adapter: str | None, rank: int | None
) -> dict[str, object]:
    """A request as the worker takes it.

    Args:
        adapter: name of the LoRA adapter that answers; None for the checkpoint itself.
        rank: the data parallel rank that answers; None where there is one.
    """
    sampling = request.sampling
    # A digest, so that names stay out of vLLM's logs.
    salt = hashlib.sha256(request.tenant.encode("utf-8", "surrogatepass")).hexdigest() if request.tenant else None
    return {
        "prompt_token_ids": request.prompt_token_ids.tolist(),
        "cache_salt": salt,
        "sampling": {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": None if sampling.is_greedy else derive_seed(request),
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            # Beside the drawn token's own.
            "logprobs": sampling.top_logprobs if sampling.logprobs else None,
            "stop_token_ids": sorted(end_token_ids),
        },
        "grammar": request.grammar,
        # Stop strings are looked for here, token by token.
        "is_streamed": bool(sampling.stop),
        "adapter": adapter,
        "rank": rank,
    }
