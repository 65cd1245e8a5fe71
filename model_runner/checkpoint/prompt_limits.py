"""What a model can take at all: prompts of its own tokens, with room for an answer in its context.

Asked by the engines with a model at hand before a request is run: one that cannot run must not break those beside it.
"""

from moebeam.schemas.errors import ContextOverflow, EngineFailed, RowError
from moebeam.schemas.records import TokenIds


def why_not_runnable(
    token_ids: TokenIds, max_tokens: int, *, vocab_size: int, context_length: int | None
) -> RowError | None:
    """Why a prompt cannot be answered with up to so many tokens; None if it can.

    Args:
        token_ids: shape (num_prompt_tokens,).
        vocab_size: token ids that the model knows, from 0.
        context_length: most tokens of prompt and answer together; None is without a limit.
    """
    if token_ids.size == 0:
        return EngineFailed("expected a prompt of at least one token, found none")
    if max_tokens < 1:
        return EngineFailed(f"expected max_tokens of at least 1, found {max_tokens}")
    lowest, highest = int(token_ids.min()), int(token_ids.max())
    if lowest < 0 or highest >= vocab_size:
        return EngineFailed(
            f"expected token ids from 0 to {vocab_size - 1}, found {lowest} to {highest}: "
            "the prompt was encoded for another model"
        )
    if context_length is not None and token_ids.size + max_tokens > context_length:
        return ContextOverflow(
            f"{token_ids.size} prompt tokens and max_tokens {max_tokens} exceed the context of {context_length} tokens"
        )
    return None
