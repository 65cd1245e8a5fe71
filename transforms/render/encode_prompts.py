"""Encodes the prompts of a batch of rows, so that neither a huge one nor one that no tokenizer takes harms the others.

Part of *render*, between the laid-out prompts of `render_rows.py` and their planned rows.
"""

from collections.abc import Iterator, Sequence

from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.encoding.remote_prompts import Encoder
from moebeam.schemas.errors import ContextOverflow, RowError
from moebeam.schemas.records import TokenIds

MOST_TOKENS = 4 << 20
"""Stands for the context of a model that nobody knows: no model reads so much."""


def encode_prompts(encoder: Encoder, texts: Sequence[str]) -> Iterator[TokenIds | RowError]:
    """Token ids of prompts, or an error for one that the tokenizer cannot encode."""
    try:
        yield from encoder.encode_batch(texts)
    except RowError as error:
        if len(texts) == 1:
            yield error
            return
        for text in texts:
            yield from encode_prompts(encoder, [text])


def find_huge(encoder: Encoder, text: str, context_length: int | None) -> ContextOverflow | None:
    """Why a prompt is far too long for a context, told before it is encoded, which takes memory."""
    most = context_length or MOST_TOKENS
    if not isinstance(encoder, PromptEncoder) or not encoder.has_more_tokens(text, most):
        return None
    return ContextOverflow(
        f"expected prompt and output within the model's context of {most} tokens, "
        f"found a prompt of {len(text):,} characters with more tokens than that"
    )
