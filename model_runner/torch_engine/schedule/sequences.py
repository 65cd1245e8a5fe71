"""Input and output of the torch engine, in token ids. Free of torch.

`runner.py` makes prompts of requests, and completions of what is finished.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moebeam.schemas.errors import RowError
from moebeam.schemas.records import Sampling, TokenIds

if TYPE_CHECKING:  # it imports torch
    from moebeam.model_runner.grammar.constraint import Constraint

StopReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One sequence to be continued.

    Attributes:
        prompt_id: unique among the prompts of one `run`.
        token_ids: int32, shape (num_prompt_tokens,), at least one.
        max_tokens: most tokens of the answer, at least 1.
        sampling: temperature, top_p, min_p, penalties and logprobs count; `stop` is ignored, see `is_over`.
        stop_token_ids: tokens that end the answer, of which they stay a part.
        tenant: prompts of different tenants never share a prefix.
        seed: of this prompt's random numbers.
        is_over: called with the answer so far after each token; True ends it.
        constraint: a grammar's state for this one answer.
        is_answered: it has its answer from an earlier run: nothing of it is computed, but prompts after it count what
            they share with it as cached, as they did in that run.
    """

    prompt_id: str
    token_ids: TokenIds
    max_tokens: int
    sampling: Sampling
    stop_token_ids: frozenset[int] = frozenset()
    tenant: str = ""
    seed: int = 0
    is_over: Callable[[Sequence[int]], bool] | None = None
    constraint: "Constraint | None" = None
    is_answered: bool = False

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(slots=True)
class Finished:
    """A retired prompt.

    Attributes:
        token_ids: the answer, its end token included.
        num_cached_tokens: prompt tokens that were already computed when the prompt was admitted.
        logprobs: natural logarithms, one a token, if asked for; 0 for forced tokens.
        admitted_s, finished_s: seconds since the epoch.
    """

    prompt_id: str
    token_ids: list[int]
    finish_reason: StopReason
    num_cached_tokens: int = 0
    logprobs: list[float] = field(default_factory=list[float])
    admitted_s: float = 0.0
    finished_s: float = 0.0
    error: RowError | None = None
