"""What goes into the torch engine and what comes out of it: prompts as token ids, answers as token ids.

`model_runner/torch_engine/runner.py` stands before it (requests, texts) and after it (completions); no torch here.
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
        sampling: temperature, top_p, min_p and whether log probabilities are wanted; its `stop` is not looked at.
        stop_token_ids: tokens that end the answer; the one that did is the answer's last.
        tenant: prompts of different tenants never share a prefix.
        seed: of the prompt's own random numbers.
        is_over: asked after each token with the answer so far; True ends the answer.
        constraint: what the answer must follow; the state of this answer alone.
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

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(slots=True)
class Finished:
    """What became of one prompt.

    Attributes:
        token_ids: the answer, its end token included.
        num_cached_tokens: prompt tokens that were already computed when the prompt was admitted.
        logprobs: natural logarithms, one a token, where asked for; 0 for tokens that a constraint forced.
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
