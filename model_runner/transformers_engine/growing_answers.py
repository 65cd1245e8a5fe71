"""Answers that grow a token at a time under transformers' `generate`: forced prompts, grammars, and where they end.

Stands inside the `transformers` engine: `runner.py` hands these to `generate`, which calls the processors before each
token and `StopWhenAnswered` after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event

import numpy as np
import tokenizers
import torch
from transformers import LogitsProcessor, StoppingCriteria

from moebeam.model_runner.encoding.answer_text import cut_at_stop
from moebeam.model_runner.grammar.constraint import Constraint, MaskFiller
from moebeam.schemas.errors import RowError
from moebeam.schemas.records import FinishReason, Sampling, TokenIds


@dataclass(slots=True)
class GrowingAnswer:
    """An answer as it grows; `token_ids` end with the end token or the stop string, where there is one.

    Attributes:
        constraint: has taken all tokens so far, but for one that ended the answer.
        error: why its grammar allows nothing more, where it broke.
    """

    sampling: Sampling
    tokenizer: tokenizers.Tokenizer
    eos_token_ids: frozenset[int]
    constraint: Constraint | None = None
    token_ids: list[int] = field(default_factory=list[int])
    text: str = ""
    finish_reason: FinishReason | None = None
    error: RowError | None = None

    def append(self, token_id: int) -> None:
        """Take one more token, unless the answer is over."""
        if self.finish_reason is not None:
            return
        self.token_ids.append(token_id)
        if token_id in self.eos_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.sampling.max_tokens:
            self.finish_reason = "length"
        if self.sampling.stop or self.finish_reason is not None:
            self.text = self.tokenizer.decode(self.token_ids, skip_special_tokens=True)
        self.text, is_stopped = cut_at_stop(self.text, self.sampling.stop)
        if is_stopped:
            self.finish_reason = "stop"
        if self.finish_reason is None and self.constraint is not None:
            self._follow(self.constraint, token_id)

    def _follow(self, constraint: Constraint, token_id: int) -> None:
        try:
            constraint.accept(token_id)
        except RowError as error:
            self.finish_reason, self.error = "error", error
            return
        if constraint.is_over:
            self.finish_reason = "stop"


class ForcePrompt(LogitsProcessor):
    """Makes each row's next token its prompt's own, as long as the prompt has one."""

    def __init__(self, prompts: Sequence[TokenIds]) -> None:
        self._prompts = prompts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1]
        for row, prompt in enumerate(self._prompts):
            if position < prompt.shape[0]:
                scores[row] = -torch.inf
                scores[row, int(prompt[position])] = 0.0
        return scores


class Penalties(LogitsProcessor):
    """Makes each row's tokens that its answer already holds less likely, or likelier, as its request asks."""

    def __init__(self, answers: Sequence[GrowingAnswer]) -> None:
        self._answers = answers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, answer in enumerate(self._answers):
            if not answer.sampling.has_penalty or not answer.token_ids:
                continue
            token_ids, counts = torch.tensor(answer.token_ids).unique(return_counts=True)
            token_ids, counts = token_ids.to(scores.device), counts.to(scores.device, torch.float32)
            scores[row, token_ids] -= answer.sampling.frequency_penalty * counts
            scores[row, token_ids] -= answer.sampling.presence_penalty
        return scores


class AllowedTokens(LogitsProcessor):
    """Leaves each row that is past its prompt the tokens that its grammar allows."""

    def __init__(self, prompts: Sequence[TokenIds], answers: Sequence[GrowingAnswer], masks: MaskFiller) -> None:
        self._prompts = prompts
        self._answers = answers
        self._masks = masks

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1]
        rows = [
            answer.constraint if answer.finish_reason is None and position >= prompt.shape[0] else None
            for prompt, answer in zip(self._prompts, self._answers, strict=True)
        ]
        masks = self._masks.start(rows).result()  # (num_rows, num_words)
        if masks is None:
            return scores
        bits = np.unpackbits(masks.numpy().view(np.uint8), axis=1, bitorder="little")
        is_allowed = torch.from_numpy(bits[:, : scores.shape[1]]).to(scores.device, torch.bool)
        # A row whose constraint failed is allowed nothing; what is drawn then ends it with the reason.
        is_allowed |= ~is_allowed.any(dim=1, keepdim=True)
        return scores.masked_fill(~is_allowed, -torch.inf)


class StopWhenAnswered(StoppingCriteria):
    """Collects each row's tokens after its prompt; returns which rows are done: all, once `is_stopped` is set."""

    def __init__(self, prompts: Sequence[TokenIds], answers: Sequence[GrowingAnswer], is_stopped: Event) -> None:
        self._prompts = prompts
        self._answers = answers
        self._is_stopped = is_stopped

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        last_token_ids: list[int] = input_ids[:, -1].tolist()
        for prompt, answer, token_id in zip(self._prompts, self._answers, last_token_ids, strict=True):
            if input_ids.shape[1] > prompt.shape[0]:
                answer.append(token_id)
        is_stopped = self._is_stopped.is_set()
        is_done = [is_stopped or answer.finish_reason is not None for answer in self._answers]
        return torch.tensor(is_done, device=input_ids.device)
